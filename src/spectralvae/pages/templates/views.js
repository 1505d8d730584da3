// What the reader chose (zoom, scales, no reloading) stands in the address after "#": it survives a reload of a local
// file, where other memory may be closed to a page, and can be kept as a bookmark.
const data = JSON.parse(document.getElementById("data").textContent);
const reload = document.getElementById("reload"); // on the page of a running run only
const groups = {};

function remember() {
  const chosen = new URLSearchParams();
  for (const [name, group] of Object.entries(groups)) {
    if (group.range) chosen.set(`${name}.range`, group.range.map((end) => end ?? "newest").join(","));
    for (const axis of ["x_log", "y_log"]) {
      if (group[axis] !== data.groups[name][axis]) chosen.set(`${name}.${axis}`, group[axis]);
    }
  }
  if (reload && !reload.checked) chosen.set("reload", "off");
  window.location.replace(`#${chosen.toString() || "default"}`);
}

function recall() {
  const chosen = new URLSearchParams(window.location.hash.slice(1));
  for (const [name, group] of Object.entries(groups)) {
    const ends = (chosen.get(`${name}.range`) ?? "").split(",");
    const [from, to] = ends.map((end) => (end === "newest" ? null : Number(end)));
    if (Number.isFinite(from) && (to === null || to > from)) group.range = [from, to];
    for (const axis of ["x_log", "y_log"]) {
      if (chosen.has(`${name}.${axis}`)) group[axis] = chosen.get(`${name}.${axis}`) === "true";
    }
  }
  if (reload) reload.checked = chosen.get("reload") !== "off";
}

function showPressed() {
  for (const button of document.querySelectorAll("[data-axis]")) {
    const group = groups[button.parentNode.parentNode.dataset.group];
    button.setAttribute("aria-pressed", group[`${button.dataset.axis}_log`] === (button.dataset.scale === "log"));
  }
}

function listenToToolbars() {
  for (const toolbar of document.querySelectorAll(".toolbar")) {
    const group = groups[toolbar.dataset.group];
    for (const button of toolbar.querySelectorAll("[data-axis]")) {
      const change = { [`${button.dataset.axis}_log`]: button.dataset.scale === "log" };
      button.addEventListener("click", () => group.set(change));
    }
    toolbar.querySelector("[data-reset]").addEventListener("click", () => group.set({ range: null }));
  }
}

function changed() {
  showPressed();
  remember();
}

for (const [name, settings] of Object.entries(data.groups)) groups[name] = new Group(name, settings, changed);
for (const chart of data.charts) new Chart(chart, groups[chart.group]);
recall();
listenToToolbars();
showPressed();
const render = () => Object.values(groups).forEach((group) => group.render());
render();
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth !== width) render(); // a phone's toolbars change the height at every scroll
  width = window.innerWidth;
});
