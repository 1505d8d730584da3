// Plots of a page, drawn as SVG from its JSON data:
//   groups: name -> {label, log_from, x_log, y_log, pad}: charts that share an x axis, its zoom and its scales
//   charts: {id, group, label, y: "switch" | "log" | "linear" | "zero", series, references, spikes}
//   series: {label, color, draw: "curve" | "line" | "dots" | "bars", x, y, low?, high?, smooth?}; null is a gap
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 280;
const MARGIN = { left: 66, right: 24, top: 22, bottom: 38 };
const LEAST_DRAG = 5; // pixels: less is a click
const DOT_SPACING = 7; // pixels: closer ones would hide the line

function add(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function addHtml(parent, name, className, text) {
  const node = document.createElement(name);
  node.className = className;
  node.append(text);
  parent.append(node);
  return node;
}

/** SVG path through points, broken at gaps; a point alone becomes a dot. */
function trace(points) {
  let path = "";
  let length = 0;
  for (const point of [...points, null]) {
    if (point) path += `${length ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
    else if (length === 1) path += "h0";
    length = point ? length + 1 : 0;
  }
  return path;
}

/** Points at least so many pixels apart along x. */
function spaced(points, spacing) {
  let last = -Infinity;
  return points.filter(([at]) => {
    const far = at - last >= spacing;
    if (far) last = at;
    return far;
  });
}

function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, i) => {
    if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = i;
  });
  return best;
}

/** Charts with one x axis: zoom, scales and crosshair are theirs together. */
class Group {
  constructor(name, settings, changed) {
    Object.assign(this, { name, changed, ...settings });
    this.charts = [];
    this.range = null; // of x: [from, to]; to = null: up to the newest, also when there will be more
    this.dragging = false;
  }
  whole() {
    const xs = this.charts.flatMap((chart) => chart.series.flatMap((series) => series.x));
    let low = Infinity;
    let high = -Infinity;
    for (const x of xs) {
      low = Math.min(low, x);
      high = Math.max(high, x);
    }
    this.hidden = this.x_log && low < this.log_from;
    if (this.x_log) low = Math.max(low, this.log_from);
    return high > low || this.pad ? [low - this.pad, high + this.pad] : [low - 0.5, high + 0.5];
  }
  domain() {
    const [low, high] = this.whole();
    if (!this.range) return [low, high];
    const from = Math.max(this.range[0], low);
    const to = this.range[1] === null ? high : Math.min(this.range[1], high);
    return to > from ? [from, to] : [low, high];
  }
  zoom(from, to) {
    const [low, high] = this.domain();
    if (to - from < 1e-6 * (Math.abs(from) + Math.abs(to))) return;
    const newest = high - to <= 1e-6 * (high - low) && (!this.range || this.range[1] === null);
    this.range = [Math.max(from, low), newest ? null : Math.min(to, high)];
    this.update();
  }
  set(changes) {
    Object.assign(this, changes);
    this.update();
  }
  update() {
    this.render();
    this.changed();
  }
  render() {
    this.charts.forEach((chart) => chart.render());
  }
  hover(x) {
    this.charts.forEach((chart) => chart.hover(x));
  }
}

class Chart {
  constructor(spec, group) {
    Object.assign(this, spec);
    this.in = group;
    group.charts.push(this);
    this.figure = document.getElementById(spec.id);
    this.readout = addHtml(this.figure, "div", "readout", "");
    this.svg = add(this.figure, "svg", { height: HEIGHT, role: "img" });
    this.listen();
  }

  render() {
    const width = Math.max(this.figure.clientWidth, 200);
    this.svg.replaceChildren();
    this.svg.setAttribute("width", width);
    const size = { width: width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
    const box = { x: MARGIN.left, y: MARGIN.top, ...size };
    this.box = box;
    this.x = new Scale(this.in.x_log, 0, this.in.domain(), [box.x, box.x + box.width]);
    this.y_scale = this.makeYScale([box.y + box.height, box.y]);
    this.drawAxes();
    const clip = add(this.svg, "clipPath", { id: `clip-${this.id}` });
    add(clip, "rect", box);
    this.plot = add(this.svg, "g", { "clip-path": `url(#clip-${this.id})` });
    this.series.forEach((series) => this.drawSeries(series));
    this.drawReferences();
    this.drawSpikes();
    add(this.svg, "rect", { ...box, class: "frame" });
    this.hover(null);
  }

  /** Whether a point, or a segment of line from it to a neighbour, lies within the range of x. */
  reaches(series, i) {
    const [from, to] = this.x.domain;
    const meets = (a, b) => Math.min(a, b) <= to && Math.max(a, b) >= from;
    const before = series.x[Math.max(i - 1, 0)];
    const after = series.x[Math.min(i + 1, series.x.length - 1)];
    return !(this.x.log && series.x[i] <= 0) && (meets(before, series.x[i]) || meets(series.x[i], after));
  }

  makeYScale(pixels) {
    const [from, to] = this.x.domain;
    // the next points beyond the edges are drawn, too; references do not keep a reader from zooming
    const drawn = this.in.range ? [] : this.references.map((reference) => reference.value);
    const inside = [...drawn];
    for (const series of this.series) {
      const columns = [series.y, series.low, series.high, series.smooth].filter(Boolean);
      series.x.forEach((x, i) => {
        if (!this.reaches(series, i)) return;
        const values = columns.map((column) => column[i]).filter((value) => value !== null);
        drawn.push(...values);
        if (x >= from && x <= to) inside.push(...values);
      });
    }
    const values = inside.length ? inside : drawn;
    if (this.y === "zero" || !values.length) values.push(0);
    const log = this.y === "log" || (this.y === "switch" && this.in.y_log);
    const threshold = log && [...drawn, ...values].some((value) => value <= 0) ? symlogThreshold(values) : 0;
    const low = values.reduce((a, b) => Math.min(a, b));
    const high = values.reduce((a, b) => Math.max(a, b));
    const domain = padded(log, threshold, low, high, 0.05);
    if (this.y === "zero" && low === 0) domain[0] = 0;
    return new Scale(log, threshold, domain, pixels);
  }

  drawAxes() {
    const { x, y, width, height } = this.box;
    for (const tick of this.y_scale.ticks(7)) {
      const at = this.y_scale.place(tick.value);
      add(this.svg, "path", { d: `M${x} ${at}h${width}`, class: tick.value === 0 ? "zero" : "grid" });
      add(this.svg, "text", { x: x - 6, y: at + 4, "text-anchor": "end" }, tick.label);
    }
    for (const tick of this.x.ticks(Math.max(3, Math.floor(width / 60)))) {
      const at = this.x.place(tick.value);
      add(this.svg, "path", { d: `M${at} ${y}v${height}`, class: "grid" });
      add(this.svg, "text", { x: at, y: y + height + 15, "text-anchor": "middle" }, tick.label);
    }
    const { log, threshold } = this.y_scale;
    const kind = threshold ? ` (symlog axis: linear within ±${format(threshold)})` : log ? " (log axis)" : "";
    add(this.svg, "text", { x: 4, y: 13, class: "y-label" }, this.label + kind);
    const start = this.in.hidden && this.x.domain[0] === this.in.log_from ? `, from ${format(this.in.log_from)} on` : "";
    const from = this.in.x_log ? ` (log axis${start})` : "";
    const place = { x: x + width / 2, y: HEIGHT - 5, "text-anchor": "middle", class: "x-label" };
    add(this.svg, "text", place, this.in.label + from);
  }

  /** Pixels of a column; null at gaps and far from the range of x. */
  points(series, column) {
    const shown = (value, i) => value !== null && this.reaches(series, i);
    return column.map((value, i) => (shown(value, i) ? [this.x.place(series.x[i]), this.y_scale.place(value)] : null));
  }

  drawSeries(series) {
    const y = this.points(series, series.y);
    const path = (points, kind) => add(this.plot, "path", { d: trace(points), class: `${kind} ${series.color}` });
    if (series.draw === "bars") {
      const half = Math.max((this.x.place(1) - this.x.place(0)) * 0.4, 0.5);
      const zero = this.y_scale.place(0);
      const bars = y.filter(Boolean).map(([at, top]) => `M${at - half} ${zero}V${top}H${at + half}V${zero}Z`);
      add(this.plot, "path", { d: bars.join(""), class: `bars ${series.color}` });
      return;
    }
    if (series.low) {
      const low = this.points(series, series.low);
      const high = this.points(series, series.high);
      if (series.draw === "curve") this.drawBand(low, high, series.color);
      else path(low.flatMap((point, i) => [point, high[i], null]), "line thin");
    }
    if (series.smooth) {
      path(y, "line raw");
      path(this.points(series, series.smooth), "line");
    } else if (series.draw !== "dots") path(y, "line thin");
    if (series.draw === "dots" || (series.draw === "curve" && !series.smooth)) {
      const dots = spaced(y.filter(Boolean), series.draw === "dots" ? 0 : DOT_SPACING);
      path(dots.flatMap((point) => [point, null]), "dots");
    }
  }

  drawBand(low, high, color) {
    let path = "";
    let start = 0;
    for (let i = 0; i <= low.length; i++) {
      if (i < low.length && low[i] && high[i]) continue;
      if (i > start) path += `${trace([...low.slice(start, i), ...high.slice(start, i).reverse()])}Z`;
      start = i + 1;
    }
    add(this.plot, "path", { d: path, class: `band ${color}` });
  }

  drawReferences() {
    const { x, y, width, height } = this.box;
    let lowest = -Infinity;
    const placed = this.references.map(({ label, value }) => {
      return { label: `${label}: ${format(Number(value.toPrecision(3)))}`, at: this.y_scale.place(value) };
    });
    const inside = placed.filter(({ at }) => at >= y && at <= y + height);
    for (const { label, at } of inside.sort((a, b) => a.at - b.at)) {
      add(this.plot, "path", { d: `M${x} ${at}h${width}`, class: "reference" });
      lowest = Math.max(at - 4 < y + 10 ? at + 13 : at - 4, lowest + 13);
      add(this.plot, "text", { x: x + width - 5, y: lowest, class: "reference-label" }, label);
    }
  }

  drawSpikes() {
    const [from, to] = this.x.domain;
    const inside = this.spikes.filter(({ step }) => step >= from && step <= to);
    const triangles = inside.map(({ step }) => `M${(this.x.place(step) - 5).toFixed(1)} ${this.box.y}h10l-5 8Z`);
    if (inside.length) add(this.plot, "path", { d: triangles.join(""), class: "triangle spike" });
  }

  /** Cross hair and values at x; the legend where there is no x. */
  hover(x) {
    this.crosshair?.remove();
    this.readout.replaceChildren();
    if (x !== null) {
      const at = this.x.place(x);
      this.crosshair = add(this.plot, "path", { d: `M${at} ${this.box.y}v${this.box.height}`, class: "crosshair" });
      addHtml(this.readout, "span", "", `${this.in.label} ${format(x, 0.01)}`);
    }
    for (const series of this.series) {
      const entry = addHtml(this.readout, "span", series.color, "");
      addHtml(entry, "i", `swatch ${series.draw === "line" || series.smooth ? "" : "dots"}`, "");
      entry.append(x === null ? series.label : this.describe(series, x));
    }
    const near = this.spikes.filter(({ step }) => x !== null && Math.abs(this.x.place(step) - this.x.place(x)) <= 6);
    if (x === null ? this.spikes.length : near.length) {
      const entry = addHtml(this.readout, "span", "spike", "");
      addHtml(entry, "i", "swatch triangle", "");
      entry.append(x === null ? "spike" : near.map(({ step, text }) => `step ${format(step)}: ${text}`).join("; "));
    }
  }

  describe(series, x) {
    const i = nearest(series.x, x);
    const value = (column) => (column[i] === null ? "none" : format(column[i]));
    let text = `${series.short} ${value(series.y)}`;
    if (series.low && series.low[i] !== series.high[i]) text += ` (${value(series.low)} to ${value(series.high)})`;
    if (series.smooth) text += `, smoothed ${value(series.smooth)}`;
    return series.x[i] === x ? text : `${text} at ${format(series.x[i], 0.01)}`;
  }

  listen() {
    const group = this.in;
    const inside = (event) => {
      const { x, width } = this.box;
      return Math.min(Math.max(event.clientX - this.svg.getBoundingClientRect().left, x), x + width);
    };
    let start = null;
    let selection = null;
    const end = () => {
      selection?.remove();
      start = selection = null;
      group.dragging = false;
    };
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.svg.setPointerCapture(event.pointerId);
      start = inside(event);
      group.dragging = true;
      selection = add(this.svg, "rect", { y: this.box.y, height: this.box.height, width: 0, class: "selection" });
    });
    this.svg.addEventListener("pointermove", (event) => {
      const at = inside(event);
      if (start !== null) {
        selection.setAttribute("x", Math.min(start, at));
        selection.setAttribute("width", Math.abs(at - start));
      }
      const { x } = this.series[0];
      group.hover(x[nearest(x, this.x.valueAt(at))]);
    });
    this.svg.addEventListener("pointerup", (event) => {
      if (start === null) return;
      const [from, to] = [start, inside(event)].sort((a, b) => a - b);
      end();
      if (to - from >= LEAST_DRAG) group.zoom(this.x.valueAt(from), this.x.valueAt(to));
    });
    this.svg.addEventListener("pointercancel", end);
    this.svg.addEventListener("pointerleave", () => group.hover(null));
    this.svg.addEventListener("dblclick", () => group.set({ range: null }));
  }
}
