"use strict";
// Curves as SVG, drawn by hand: one function draws a chart, and all charts share one cursor.

const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "12 4", "1 4"];
const MARKERS = ["circle", "square", "diamond", "cross"];
const charts = []; // every chart on the page

// An SVG element inside a parent.
function svg(parent, name, attributes = {}, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text) element.textContent = text;
  parent.append(element);
  return element;
}

// Round values from low to high, about so many.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((s) => s * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    found.push(i * step);
  return found;
}

// Powers of ten from low to high; where there are fewer than two, round values.
function logTicks(low, high) {
  const found = [];
  for (let p = Math.ceil(Math.log10(low)); p <= Math.log10(high); p++) found.push(10 ** p);
  return found.length > 1 ? found : ticks(low, high, 3).filter((value) => value > 0);
}

// A number as a person reads it, in a chart's unit.
function words(value, unit = "") {
  if (value === null || value === undefined) return "–";
  return unit === "share" ? percent(value) : short(value);
}

// 0.9925 -> 99.2%, as Python writes it: of two that are as near the even one.
function percent(share) {
  const tenths = 1000 * share;
  const tie = Math.abs(tenths - Math.floor(tenths) - 0.5) < 1e-9;
  const whole = tie ? 2 * Math.round(tenths / 2) : Math.round(tenths);
  return `${(whole / 10).toFixed(1)}%`;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e15) return value.toExponential(1).replace("e+", "e");
  for (const [unit, scale] of [
    ["T", 1e12],
    ["G", 1e9],
    ["M", 1e6],
    ["k", 1e4],
  ]) {
    if (size >= scale) return `${+(value / (unit === "k" ? 1e3 : scale)).toPrecision(3)}${unit}`;
  }
  if (size && size < 1e-4) return value.toExponential(1);
  return `${+value.toPrecision(3)}`;
}

// The mean, the least and the most of the values around each, so many on either side.
function around(values, side) {
  return values.map((_, i) => {
    const near = values.slice(Math.max(0, i - side), i + side + 1).filter((v) => v !== null);
    const sum = near.reduce((a, b) => a + b, 0);
    return near.length
      ? { mean: sum / near.length, low: Math.min(...near), high: Math.max(...near) }
      : null;
  });
}

// "M x y L x y ...", with a gap where there is no value.
function path(xs, ys) {
  let found = "";
  let pen = "M";
  ys.forEach((y, i) => {
    if (y === null || Number.isNaN(y)) pen = "M";
    else {
      found += `${pen}${xs[i].toFixed(1)} ${y.toFixed(1)}`;
      pen = "L";
    }
  });
  return found;
}

function marker(parent, kind, x, y, color) {
  const at = { fill: color, stroke: "var(--paper)", "stroke-width": 1 };
  if (kind === "circle") svg(parent, "circle", { ...at, cx: x, cy: y, r: 4 });
  else if (kind === "square")
    svg(parent, "rect", { ...at, x: x - 3.5, y: y - 3.5, width: 7, height: 7 });
  else if (kind === "diamond") svg(parent, "path", { ...at, d: `M${x} ${y - 5}l5 5l-5 5l-5-5z` });
  else
    svg(parent, "path", { d: `M${x - 4} ${y - 4}l8 8m0-8l-8 8`, stroke: color, "stroke-width": 2 });
}

// The range of y: of shares from 0 to 1 where they come near it, else what the values need.
function rangeOf(chart, lines) {
  const values = lines.flatMap((line) => [...line.y, ...(line.low ?? []), ...(line.high ?? [])]);
  const known = values.filter((value) => value !== null && !(chart.log && value <= 0));
  if (!known.length) return [0.1, 1];
  const low = known.reduce((a, b) => Math.min(a, b));
  const high = known.reduce((a, b) => Math.max(a, b));
  if (chart.log) return [low / 1.3, high * 1.3];
  if (chart.unit === "share") {
    const whole = chart.name === "right" || chart.levels.length || high > 0.5;
    return [0, whole ? 1 : Math.max(1.15 * high, 0.05)];
  }
  const from = Math.min(low, 0);
  return [from, high + 0.08 * (high - from || 1)];
}

// Draw a chart into its figure. lines: [{label, x, y, low, high, points, band, color, dash,
// marker}]; marks: [{x, kind}] of warnings and resumed runs.
function draw(figure, chart, lines, marks, height) {
  const box = figure.querySelector("svg");
  const width = Math.max(240, figure.clientWidth);
  box.replaceChildren();
  box.setAttribute("height", height);
  box.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const labels = lines.map((line) => labelOf(line, chart, lines.length > 1));
  box.setAttribute("aria-label", `${chart.title}: ${labels.join(", ")}`);

  const frame = frameOf(box, chart, lines, labels, width, height);
  drawAxes(frame, chart);
  marks.forEach((mark) => drawMark(frame, mark));
  lines.forEach((line) => (line.points ? drawPoints(frame, line) : drawCurve(frame, line)));
  drawLabels(frame, lines, labels);
  const style = { class: "cursor", y1: frame.top, y2: frame.bottom, visibility: "hidden" };
  Object.assign(figure.state, { frame, lines, chart, cursor: svg(box, "line", style) });
}

// A line's last value, with its name where there are several: a single one has the chart's title.
function labelOf(line, chart, several) {
  const value = words(
    line.y.findLast((one) => one !== null),
    chart.unit,
  );
  return several ? `${line.label} ${value}` : value;
}

// Where things are in a chart: its edges, and the scales X and Y from values to pixels.
function frameOf(box, chart, lines, labels, width, height) {
  const widest = Math.max(...labels.map((label) => label.length));
  const left = 46;
  const right = width - Math.min(width * 0.42, 7.2 * widest + 12);
  const top = 8;
  const bottom = height - 24;
  const [low, high] = rangeOf(chart, lines);
  const lastX = Math.max(1e-9, ...lines.map((line) => line.x[line.x.length - 1] ?? 0));
  const X = (x) => left + (x / lastX) * (right - left);
  const Y = (y) => {
    if (y === null || (chart.log && y <= 0)) return null;
    const log = Math.log(y / low) / Math.log(high / low);
    const share = chart.log ? log : (y - low) / (high - low);
    return bottom - share * (bottom - top);
  };
  return { box, left, right, top, bottom, low, high, lastX, X, Y };
}

function drawAxes({ box, left, right, bottom, top, low, high, lastX, X, Y }, chart) {
  const across = (kind, y) =>
    svg(box, "line", { class: kind, x1: left, x2: right, y1: Y(y), y2: Y(y) });
  const write = (y, text) =>
    svg(box, "text", { x: left - 6, y: Y(y) + 4, "text-anchor": "end" }, text);
  const tall = bottom - top > 190;
  const values = chart.log ? logTicks(low, high) : ticks(low, high, tall ? 5 : 3);
  for (const y of values) {
    across("grid-line", y);
    write(y, chart.unit === "share" ? `${+(100 * y).toPrecision(3)}%` : short(y));
  }
  for (const [y, label] of chart.levels) {
    if (y > high) continue;
    across("level", y);
    if (!values.some((value) => Math.abs(value - y) < 1e-9)) write(y, label);
  }
  for (const x of ticks(0, lastX, right > 400 ? 6 : 3)) {
    svg(box, "text", { x: X(x), y: bottom + 18, "text-anchor": "middle" }, short(x));
  }
}

// A warning is a triangle on the axis; where a run was resumed there is a line.
function drawMark({ box, top, bottom, X }, mark) {
  const x = X(mark.x);
  if (mark.kind === "warning") {
    svg(box, "path", { class: "warned", d: `M${x} ${bottom - 7}l4 7h-8z` });
  } else svg(box, "line", { class: "resumed", x1: x, x2: x, y1: top, y2: bottom });
}

const strokeOf = (line) => {
  return { fill: "none", stroke: line.color, "stroke-width": 2, "stroke-dasharray": line.dash };
};

// Values with their intervals.
function drawPoints({ box, X, Y }, line) {
  const kept = line.y.map((_, i) => i).filter((i) => line.y[i] !== null);
  const xs = kept.map((i) => X(line.x[i]));
  const ys = kept.map((i) => Y(line.y[i]));
  svg(box, "path", { ...strokeOf(line), d: path(xs, ys) });
  kept.forEach((i, n) => {
    const low = line.low?.[i] ?? null;
    if (low !== null) {
      const ends = { x1: xs[n], x2: xs[n], y1: Y(low), y2: Y(line.high[i]) };
      svg(box, "line", { ...ends, stroke: line.color });
    }
    marker(box, line.marker, xs[n], ys[n], line.color);
  });
}

// What was measured, faint, and its moving mean; or a band around it.
function drawCurve({ box, X, Y }, line) {
  const kept = line.y.map((_, i) => i).filter((i) => line.y[i] !== null);
  const xs = kept.map((i) => X(line.x[i]));
  const values = kept.map((i) => line.y[i]);
  const side = values.length > 30 ? Math.ceil(values.length / 40) : 0;
  const near = around(values, side);
  if (line.band) {
    const above = path(
      xs,
      near.map((one) => Y(one.high)),
    );
    const below = path(xs.toReversed(), near.map((one) => Y(one.low)).toReversed());
    svg(box, "path", { d: `${above}${below.replace("M", "L")}Z`, fill: line.color, opacity: 0.18 });
  } else if (side) {
    const faint = { opacity: 0.3, "stroke-width": 1, d: path(xs, values.map(Y)) };
    svg(box, "path", { ...strokeOf(line), ...faint });
  }
  svg(box, "path", {
    ...strokeOf(line),
    d: path(
      xs,
      near.map((one) => Y(one.mean)),
    ),
  });
}

// Labels beside the ends of the lines, moved apart where they would overlap.
function drawLabels({ box, right, bottom, Y }, lines, labels) {
  const found = lines.map((line, i) => {
    const end = line.y.findLast((value) => value !== null) ?? null;
    return { color: line.color, label: labels[i], y: Y(end) ?? bottom };
  });
  found.sort((a, b) => a.y - b.y);
  for (let i = 1; i < found.length; i++) found[i].y = Math.max(found[i].y, found[i - 1].y + 14);
  let below = bottom + 14;
  for (const one of found.toReversed()) below = one.y = Math.min(one.y, below - 14);
  for (const one of found) {
    const style = { class: "label", x: right + 8, y: one.y + 4, style: `fill:${one.color}` };
    svg(box, "text", style, one.label);
  }
}

// Show the values at x in every chart; null: show the notes again.
function pointAt(x, axis) {
  for (const figure of charts) {
    const { frame, lines, cursor, chart } = figure.state;
    const note = figure.querySelector(".note");
    cursor.setAttribute("visibility", x === null ? "hidden" : "visible");
    if (x === null) {
      note.textContent = chart.note;
      continue;
    }
    cursor.setAttribute("x1", frame.X(x));
    cursor.setAttribute("x2", frame.X(x));
    const found = [];
    for (const line of lines) {
      const i = nearest(line, x);
      if (i < 0) continue;
      const where = line.points && line.x[i] !== x ? ` (at ${short(line.x[i])})` : "";
      found.push(`${line.label} ${words(line.y[i], chart.unit)}${where}`);
    }
    note.textContent = `${axis} ${short(x)}: ${found.join(", ")}`;
  }
}

// The index of a line's value that is nearest to x, or -1.
function nearest(line, x) {
  let best = -1;
  let least = Infinity;
  line.y.forEach((value, i) => {
    const away = Math.abs(line.x[i] - x);
    if (value !== null && away < least) [best, least] = [i, away];
  });
  return best;
}
