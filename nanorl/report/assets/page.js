"use strict";
// The page: headline, reasons, curves, tables. Text of a model goes through visible(), and no text
// is ever taken for markup.

const data = JSON.parse(document.getElementById("data").textContent);
const several = data.runs.length > 1;
const SIGNS = { better: "▲", worse: "▼", "no clear change": "◆", open: "○" };
const byId = (id) => document.getElementById(id);

// An element with attributes and children; a child that is a string becomes text.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key.startsWith("aria-")) made.setAttribute(key, value);
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const note = (...children) => element("p", { class: "note" }, ...children);

// A text with a visible mark for each character that would not show, or would steer the line:
// control and formatting characters (those of writing direction among them), lone surrogates.
const HIDDEN = /([^\P{C}\n\t]|[\u2028\u2029\u115f\u1160\u3164\uffa0])/u;

function visible(text) {
  const found = document.createDocumentFragment();
  // Every second piece is one of those characters.
  String(text)
    .split(HIDDEN)
    .forEach((piece, i) => {
      if (i % 2 === 0) found.append(piece);
      else {
        const code = piece.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
        const title = "a character that does not show";
        found.append(element("span", { class: "mark", title }, `U+${code}`));
      }
    });
  return found;
}

// A text in which no line ends inside the name of a constant, such as --lr.
function sentence(text) {
  const found = document.createDocumentFragment();
  for (const piece of String(text).split(/(--[\w=.]+)/)) {
    const name = piece.startsWith("--");
    found.append(name ? element("span", { class: "whole" }, piece) : visible(piece));
  }
  return found;
}

// A table; a cell that is a number stands to the right.
function table(heads, rows) {
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)));
  const body = rows.map((row) => {
    const cells = row.map((cell) => {
      return element("td", { class: typeof cell === "number" ? "number" : null }, cellText(cell));
    });
    return element("tr", {}, ...cells);
  });
  const parts = [element("thead", {}, head), element("tbody", {}, ...body)];
  return element("div", { class: "scroll", tabindex: 0 }, element("table", {}, ...parts));
}

function cellText(cell) {
  if (cell instanceof Node) return cell;
  if (cell === null || cell === undefined) return "–";
  return visible(typeof cell === "object" ? JSON.stringify(cell) : cell);
}

function show(id, ...children) {
  byId(id).hidden = false;
  byId(id).append(...children);
}

// ---- headline ------------------------------------------------------------------------------------

function interval(one) {
  return `${words(one.accuracy, "share")} [${words(one.low, "share")}, ${words(one.high, "share")}]`;
}

function bigNumber(one, what) {
  const range = `${what}: ${words(one.low, "share")} to ${words(one.high, "share")}`;
  const value = element("span", { class: "big" }, words(one.accuracy, "share"));
  return element("div", {}, value, element("span", { class: "what" }, range));
}

function headline(run, index) {
  const { tone, words: verdict, before, after } = run.verdict;
  const found = element("div", { class: `run ${tone.split(" ")[0]} ${several ? "small" : ""}` });
  const label = [run.name, run.task, run.kind].filter(Boolean).join(" · ");
  const swatch = several ? sample(index, index, false) : null;
  const sign = element("span", { class: "sign", "aria-hidden": true }, SIGNS[tone]);
  found.append(element("p", { class: "eyebrow" }, swatch, visible(label)));
  found.append(element("h1", {}, sign, " ", verdict));
  found.append(element("p", { class: "lead" }, run.verdict.sentence));
  if (run.note) {
    found.append(element("p", { class: "lead soft" }, "Hypothesis: ", visible(run.note)));
  }
  if (before) {
    const first = bigNumber(before, before.step ? `step ${before.step}` : "before");
    const numbers = element("div", { class: "numbers" }, first);
    if (after) {
      const arrow = element("span", { class: "arrow" }, "→");
      numbers.append(arrow, bigNumber(after, `after step ${after.step}`));
    }
    const n = before.n ? ` of ${before.n} held-out problems` : "";
    const what = `Share${n} that one greedy answer solves, with 95% intervals.`;
    found.append(numbers, note(what));
  }
  found.append(terms("facts", run.facts, visible));
  byId("headline").append(found);
}

// Names and what is said of them.
function terms(style, pairs, show) {
  const found = pairs.map(([name, text]) => {
    return element("div", {}, element("dt", {}, name), element("dd", {}, show(text)));
  });
  return element("dl", { class: style }, ...found);
}

function reasons(run) {
  if (!run.reasons.length) return;
  if (several) show("why", element("h3", {}, visible(run.name)));
  show("why", terms("why", run.reasons, sentence));
}

// ---- curves --------------------------------------------------------------------------------------

// A short piece of a curve as it is drawn, for legends.
function sample(color, dash, points) {
  const box = document.createElementNS(SVG, "svg");
  box.setAttribute("width", 34);
  box.setAttribute("height", 12);
  box.setAttribute("aria-hidden", true);
  const style = { x1: 0, x2: 34, y1: 6, y2: 6, stroke: `var(--c${color % 6})`, "stroke-width": 2 };
  svg(box, "line", { ...style, "stroke-dasharray": DASHES[dash % DASHES.length] });
  if (points) marker(box, MARKERS[color % MARKERS.length], 17, 6, `var(--c${color % 6})`);
  return box;
}

// The curves of a chart: of each run that has such a stage, each of the chart's lines. Of several
// runs only the share correct has all of them, the other charts their first.
function linesOf(chart, kind, axis) {
  const found = [];
  data.runs.forEach((run, r) => {
    const stage = stageOf(run, kind);
    if (!stage) return;
    const wanted = several && chart.name !== "right" ? chart.lines.slice(0, 1) : chart.lines;
    wanted.forEach((line, l) => {
      const columns = stage.columns;
      if (!columns[line.column] || columns[line.column].every((value) => value === null)) return;
      const color = several ? r : l;
      found.push({
        label: several ? `${run.label} ${wanted.length > 1 ? line.label : ""}`.trim() : line.label,
        x: columns[`x/${axis}`],
        y: columns[line.column],
        low: columns[line.low],
        high: columns[line.high],
        points: line.points,
        band: line.band,
        color: `var(--c${color % 6})`,
        dash: DASHES[(several ? (l ? 2 : 0) + r : l) % DASHES.length],
        marker: MARKERS[color % MARKERS.length],
      });
    });
  });
  return found;
}

// The stage that a run's headline is of.
const aboutOf = (run) => run.stages[run.about];

function stageOf(run, kind) {
  if (kind === run.kind) return aboutOf(run);
  return run.stages.find((stage) => stage.kind === kind);
}

function marksOf(kind, axis) {
  const found = [];
  for (const run of several ? [] : data.runs) {
    const stage = stageOf(run, kind);
    const { "x/step": steps, [`x/${axis}`]: xs } = stage.columns;
    for (const event of stage.events) {
      if (!["warning", "resumed"].includes(event.kind)) continue;
      const i = steps.findLastIndex((step) => step <= event.step);
      found.push({ x: xs[Math.max(0, i)], kind: event.kind });
    }
  }
  return found;
}

function addChart(parent, chart, kind, height) {
  const named = { "data-chart": `${kind}-${chart.name}`, "aria-label": chart.title };
  const figure = element("figure", { tabindex: 0, role: "group", ...named });
  const unit = ["", "share"].includes(chart.unit) ? "" : `, ${chart.unit}`;
  figure.append(element("h3", {}, chart.title + unit));
  const box = svg(figure, "svg", { role: "img" });
  figure.append(element("p", { class: "note", "aria-live": "polite" }, chart.note));
  figure.state = { chart, kind, height, x: null };
  box.addEventListener("pointermove", (event) => {
    const { left, right, lastX } = figure.state.frame;
    const at = event.clientX - box.getBoundingClientRect().left;
    const x = ((at - left) / (right - left)) * lastX;
    pointAt(Math.min(lastX, Math.max(0, x)), axisNow());
  });
  box.addEventListener("pointerleave", () => pointAt(null));
  figure.addEventListener("blur", () => pointAt(null));
  figure.addEventListener("keydown", (event) => move(figure, event));
  parent.append(figure);
  charts.push(figure);
}

// The arrow keys move the cursor from one value to the next.
function move(figure, event) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by) return;
  event.preventDefault();
  const line = figure.state.lines.find((one) => !one.points) ?? figure.state.lines[0];
  const last = line.x.length - 1;
  let at = by > 0 ? 0 : last;
  if (figure.state.x !== null) at = nearest(line, figure.state.x) + by;
  figure.state.x = line.x[Math.min(last, Math.max(0, at))];
  pointAt(figure.state.x, axisNow());
}

const axisNow = () => document.querySelector("#axes input:checked").value;

function drawAll() {
  const axis = axisNow();
  for (const figure of charts) {
    const { chart, kind, height } = figure.state;
    draw(figure, chart, linesOf(chart, kind, axis), marksOf(kind, axis), height);
    figure.state.x = null;
  }
}

function axes() {
  for (const name of data.axes) {
    const known = data.runs.some((run) => aboutOf(run).columns[`x/${name}`].some((x) => x > 0));
    const input = element("input", { type: "radio", name: "axis", value: name, disabled: !known });
    input.addEventListener("change", drawAll);
    input.checked = name === "step";
    const title = known ? null : "not known for this run";
    byId("axes").append(element("label", { title }, input, name));
  }
}

function curves() {
  axes();
  const kind = data.runs[0].kind;
  const [first, ...others] = data.charts[kind] ?? [];
  if (first) addChart(byId("curves"), first, kind, 300);
  const grid = element("div", { class: "grid" });
  byId("curves").append(grid);
  for (const chart of others) addChart(grid, chart, kind, 150);
  legend();

  for (const earlier of ["base", "sft"]) {
    if (earlier === kind || !data.charts[earlier]) continue;
    const names = { base: "Base: pretraining", sft: "SFT: fine-tuning" };
    const stages = element("div", { class: "grid" });
    show("stages", element("h3", {}, names[earlier]), stages);
    for (const chart of data.charts[earlier]) addChart(stages, chart, earlier, 150);
  }
}

function legend() {
  const add = (...children) => byId("legend").append(element("span", {}, ...children));
  if (several) data.runs.forEach((run, r) => add(sample(r, r, true), visible(run.label)));
  else {
    const kinds = aboutOf(data.runs[0]).events.map((event) => event.kind);
    if (kinds.includes("warning")) add("▲ a warning (listed below)");
    if (kinds.includes("resumed")) add("┊ resumed");
  }
  const every = Math.max(...data.runs.map((run) => aboutOf(run).every));
  if (every > 1) add(`one step in ${every} is drawn, and each evaluation`);
}

// ---- tables --------------------------------------------------------------------------------------

function constants() {
  if (!several) return;
  const rows = data.differences.map(([name, values]) => [name, ...values]);
  if (!rows.length) rows.push(["all constants are the same", ...data.runs.map(() => "")]);
  const against = data.against.map((words) => element("p", { class: "lead" }, visible(words)));
  show("constants", ...against, table(["constant", ...data.runs.map((run) => run.label)], rows));
}

// [name, stage] of every stage of every run.
function allStages() {
  return data.runs.flatMap((run) => {
    return run.stages.map((stage) => [several ? `${run.label} ${stage.name}` : stage.name, stage]);
  });
}

function results() {
  const rows = [];
  for (const [name, stage] of allStages()) {
    for (const one of stage.evaluations) {
      const pass = Object.keys(one).findLast((key) => key.startsWith("pass@"));
      const best = pass && one.way === "sampled" ? `${pass} ${words(one[pass], "share")}` : "";
      const length = one.length === undefined ? "" : one.length.toFixed(1);
      const form = one.format === undefined ? "" : words(one.format, "share");
      const asked = [name, one.step, one.label, one.way];
      rows.push([...asked, interval(one), form, one.n, length, best]);
    }
  }
  const heads = ["stage", "step", "task", "how", "accuracy, 95% interval", "in the task's form"];
  if (rows.length)
    show("results", table([...heads, "problems", "tokens", "best of several"], rows));
}

function events() {
  const rows = [];
  for (const [name, stage] of allStages()) {
    for (const one of stage.events) rows.push([name, one.step, one.kind, sentence(one.text)]);
  }
  if (!rows.length) return;
  const kept = "Of its checkpoints a stage keeps the first, the best and the last two";
  show("events", note(`${kept}, and those that others start from.`));
  show("events", table(["stage", "step", "what", ""], rows));
}

function cards() {
  for (const [name, stage] of allStages()) {
    const settings = table(["constant", "value"], Object.entries(stage.settings));
    const rest = element("pre", {}, visible(JSON.stringify(stage.card, null, 2)));
    const title = element("summary", {}, visible(name));
    byId("card").append(
      element("details", {}, title, settings, element("h3", {}, "run.json"), rest),
    );
  }
}

function start() {
  data.runs.forEach(headline);
  constants();
  data.runs.forEach(reasons);
  curves();
  if (several) byId("curves").after(byId("why")); // first what is different, then why
  results();
  events();
  cards();
  byId("made").append(data.made);
  drawAll();
  let waiting = 0;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 100);
  });
}

start();
