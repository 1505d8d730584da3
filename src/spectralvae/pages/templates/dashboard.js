// The page of a run: it tells its own age, and reloads itself until the run is finished: it may be started again.
const STALE = 900; // seconds without news that a reader should hear of
const loaded = Date.now();

function showAge() {
  const seconds = Math.max(0, (Date.now() - Date.parse(data.updated)) / 1000);
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const [unit, size] = units.find((entry) => seconds >= entry[1]) ?? ["s", 1];
  const age = `${Math.floor(seconds / size)} ${unit}`;
  document.getElementById("age").textContent = `(${age} ago)`;
  if (data.state === "running" && seconds > STALE && !document.getElementById("stale")) {
    const warning = document.createElement("li");
    warning.id = "stale";
    warning.textContent = `No news for ${age}: the run was killed, or hangs, or its steps are very slow.`;
    document.getElementById("warnings").append(warning);
    document.querySelector(".state").textContent = "no news";
  }
}

showAge();
setInterval(() => {
  showAge();
  const due = Date.now() - loaded >= data.reload_seconds * 1000;
  const dragging = Object.values(groups).some((group) => group.dragging);
  if (reload && reload.checked && due && !dragging) window.location.reload();
}, 1000);
if (reload) reload.addEventListener("change", remember);
