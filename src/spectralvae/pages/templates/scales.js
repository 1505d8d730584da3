"use strict";
// Numbers, ticks and scales of the plots.

/** A number with the digits that tell it from others `spacing` apart; 5 significant ones if no spacing is given. */
function format(value, spacing) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return Number(value.toPrecision(5)).toExponential().replace("e+", "e");
  const last = spacing ? Math.floor(Math.log10(spacing) + 1e-9) : Math.floor(Math.log10(size || 1)) - 4;
  return value.toLocaleString("en-US", { maximumFractionDigits: Math.min(Math.max(-last, 0), 12) });
}

function linearTicks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const spacing = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / spacing - 1e-9); i * spacing <= high + spacing * 1e-9; i++) {
    const value = i * spacing + 0; // no -0
    ticks.push({ value, label: format(value, spacing) });
  }
  return ticks;
}

/** Decades between low and high, or 1, 2, 5 of each, on both sides of zero; linear ticks if these are too few. */
function logTicks(low, high, threshold, most) {
  for (const factors of [[1], [1, 2, 5]]) {
    const sizes = [];
    const smallest = threshold || low;
    for (let power = Math.floor(Math.log10(smallest)); 10 ** power <= Math.max(high, -low); power++) {
      sizes.push(...factors.map((factor) => factor * 10 ** power).filter((size) => size >= smallest * 0.999));
    }
    const values = threshold ? [...sizes.map((size) => -size).reverse(), 0, ...sizes] : sizes;
    const inside = values.filter((value) => value >= low && value <= high);
    const stride = Math.ceil(inside.length / most);
    const zero = Math.max(inside.indexOf(0), 0);
    if (inside.length >= 3) {
      const labelled = (value) => ({ value, label: format(Number(value.toPrecision(3))) });
      return inside.filter((_, i) => (i - zero) % stride === 0).map(labelled);
    }
  }
  return linearTicks(low, high, most);
}

/** Values to pixels. A logarithmic scale with a threshold is linear within +-threshold (symlog). */
class Scale {
  constructor(log, threshold, domain, pixels) {
    Object.assign(this, { log, threshold, domain, pixels });
    this.ends = domain.map((value) => this.bend(value));
  }
  bend(value) {
    if (!this.log) return value;
    if (!this.threshold) return Math.log10(value);
    const size = Math.abs(value) / this.threshold;
    return size <= 1 ? value / this.threshold : Math.sign(value) * (1 + Math.log10(size));
  }
  place(value) {
    const [low, high] = this.ends;
    return this.pixels[0] + ((this.bend(value) - low) / (high - low)) * (this.pixels[1] - this.pixels[0]);
  }
  unbend(bent) {
    if (!this.log) return bent;
    if (!this.threshold) return 10 ** bent;
    return this.threshold * (Math.abs(bent) <= 1 ? bent : Math.sign(bent) * 10 ** (Math.abs(bent) - 1));
  }
  valueAt(pixel) {
    const share = (pixel - this.pixels[0]) / (this.pixels[1] - this.pixels[0]);
    return this.unbend(this.ends[0] + share * (this.ends[1] - this.ends[0]));
  }
  ticks(most) {
    return this.log ? logTicks(...this.domain, this.threshold, most) : linearTicks(...this.domain, most);
  }
}

/** The extent of values with a margin, as it looks on the scale. */
function padded(log, threshold, low, high, share) {
  if (high - low <= 1e-6 * Math.max(Math.abs(low), Math.abs(high))) {
    const half = Math.abs(low) * 0.05 || 1;
    return [low - half, high + half];
  }
  const scale = new Scale(log, threshold, [low, high], [0, 1]);
  return [scale.valueAt(-share), scale.valueAt(1 + share)];
}

/** A power of ten below nine tenths of the sizes, so that few values lie in the linear part. */
function symlogThreshold(values) {
  const sizes = values.map(Math.abs).filter((size) => size > 0).sort((a, b) => a - b);
  return sizes.length ? 10 ** Math.floor(Math.log10(sizes[Math.floor(sizes.length / 10)])) : 1;
}
