"use strict";
// Rollouts to read: one step at a time is unpacked, when it is asked for.

const cache = new Map();
const now = {
  run: 0,
  view: "samples",
  at: 0, // index of the step, among those in the page
  prompt: 0,
  problem: 0,
  sort: "sampled",
  shade: "none",
  unique: true,
};
const box = (style, ...children) => element("div", { class: style }, ...children);

// A chunk of the page: base64 of gzipped JSON -> its value.
async function load(id) {
  if (cache.has(id)) return cache.get(id);
  const packed = Uint8Array.from(atob(byId(id).textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const value = JSON.parse(await new Response(stream).text());
  cache.set(id, value);
  if (cache.size > 40) cache.delete(cache.keys().next().value);
  return value;
}

const rolloutsOf = (run) => aboutOf(run).rollouts;
const rolloutsNow = () => rolloutsOf(data.runs[now.run]);
const chunk = (name) => `r${now.run}-${name}`;

// What comes before the first update is of step 0.
const stepName = (step) => (step ? `step ${step}` : "before");

// A label with a select, whose change draws anew. options: [value, text].
function choice(label, name, options) {
  const select = element("select", { name });
  for (const [value, text] of options) select.append(element("option", { value }, text));
  select.value = now[name];
  select.addEventListener("change", () => {
    now[name] = select.value;
    render();
  });
  return element("label", {}, `${label} `, select);
}

// ---- training samples ----------------------------------------------------------------------------

const SORTS = {
  sampled: ["as sampled", () => 0],
  reward: ["highest reward", (a, b) => b.reward - a.reward],
  worst: ["lowest reward", (a, b) => a.reward - b.reward],
  advantage: ["highest advantage", (a, b) => b.advantage - a.advantage],
  long: ["longest", (a, b) => b.tokens - a.tokens],
  short: ["shortest", (a, b) => a.tokens - b.tokens],
};

// Groups of one prompt, asked several times in a step, as one.
function uniquePrompts(groups) {
  const found = new Map();
  for (const group of groups) {
    const same = found.get(group.prompt);
    if (same) same.samples = same.samples.concat(group.samples);
    else found.set(group.prompt, { ...group });
  }
  return [...found.values()];
}

// Samples of one text that earned the same, as one with a count.
function equalSamples(samples) {
  const found = new Map();
  for (const one of samples) {
    const key = JSON.stringify([one.text, one.reward, one.advantage, one.finish, one.error]);
    const same = found.get(key);
    if (same) same.count++;
    else found.set(key, { ...one, count: 1 });
  }
  return [...found.values()];
}

// What is not the same in all prompts: the question without the words that stand around it.
function questions(prompts) {
  if (prompts.length < 2) return prompts;
  const common = (texts) => {
    let n = 0;
    while (n < texts[0].length && texts.every((text) => text[n] === texts[0][n])) n++;
    return texts[0].slice(0, n);
  };
  const head = common(prompts).replace(/[^\n]*$/, "");
  const backwards = common(prompts.map((prompt) => [...prompt].reverse().join("")));
  const tail = [...backwards]
    .reverse()
    .join("")
    .replace(/^[^\n<]*/, "");
  return prompts.map(
    (prompt) => prompt.slice(head.length, prompt.length - tail.length).trim() || prompt,
  );
}

function promptList(groups) {
  const list = box("prompts");
  list.setAttribute("role", "group");
  list.setAttribute("aria-label", "prompts of this step");
  const short = questions(groups.map((group) => group.prompt));
  groups.forEach((group, i) => {
    const samples = group.samples;
    const right = samples.filter((one) => one.right).length;
    const equal = samples.every((one) => one.reward === samples[0].reward);
    const said = `${right} of ${samples.length} right${equal ? " · no signal" : ""}`;
    const button = element("button", { type: "button", "aria-current": i === now.prompt });
    button.append(visible(short[i].slice(0, 160)), element("span", { class: "note" }, said));
    button.addEventListener("click", () => choosePrompt(i));
    list.append(button);
  });
  list.addEventListener("keydown", (event) => {
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    choosePrompt(Math.min(groups.length - 1, Math.max(0, now.prompt + by)));
  });
  return list;
}

function choosePrompt(number) {
  now.prompt = number;
  renderBody();
}

const FINISHES = {
  length: "cut off",
  stop: "stopped",
  too_long: "not asked: the prompt does not fit",
};

// A completion: what it earned, and its text, token by token where that is asked for.
function sampleCard(one, name = "") {
  const parts = Object.entries(one.parts ?? {}).map(([part, value]) => `${part} ${short(value)}`);
  const times = one.count > 1 ? `${one.count} × ` : "";
  const facts = [`reward ${short(one.reward)}${parts.length ? ` (${parts.join(", ")})` : ""}`];
  if (one.advantage !== undefined) facts.push(`advantage ${signed(one.advantage)}`);
  facts.push(`${one.tokens} tokens`, FINISHES[one.finish] ?? one.finish);

  const card = box("sample");
  if (name) card.append(element("p", { class: "head" }, element("b", {}, name)));
  const verdict = element("b", {}, `${times}${one.right ? "✓ right" : "✗ wrong"}`);
  card.append(element("p", { class: "head" }, verdict, " · ", visible(facts.join(" · "))));
  if (one.error) card.append(note("the reward failed: ", visible(one.error)));
  if (one.ids && now.shade !== "none") card.append(...tokens(one));
  else card.append(element("div", { class: "text", tabindex: 0 }, visible(one.text)));
  return card;
}

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);

// ---- tokens --------------------------------------------------------------------------------------

// How strong a token's shade is, from 0 to 1, its colour, and whether its line is dashed.
function shade(one, i) {
  if (now.shade === "entropies") return [(one.entropies?.[i] ?? 0) / 150, "var(--cool)", false];
  if (now.shade === "logprobs") return [-(one.logprobs?.[i] ?? 0) / 300, "var(--warm)", false];
  const less = one.advantage < 0;
  return [Math.abs(one.advantage ?? 0), less ? "var(--warm)" : "var(--cool)", less];
}

// What is known of a token, in words. Log-probs and entropies are in hundredths of a nat.
function numbersOf(one, i, text) {
  const found = [`token ${i + 1} of ${one.ids.length} ${JSON.stringify(text)}`];
  found.push(`id ${one.ids[i]}`);
  const logprob = one.logprobs?.[i] ?? null;
  if (logprob !== null) {
    const probability = 100 * Math.exp(logprob / 100);
    found.push(`log-prob ${(logprob / 100).toFixed(2)} (${probability.toFixed(1)}%)`);
  }
  const entropy = one.entropies?.[i] ?? null;
  if (entropy !== null) found.push(`entropy ${(entropy / 100).toFixed(2)} nats`);
  if (one.advantage !== undefined) found.push(`advantage ${signed(one.advantage)}`);
  return found.join(" · ");
}

function tokenOf(one, i) {
  const piece = pieces[one.ids[i]] ?? `[${one.ids[i]}]`;
  const [strength, color, dashed] = shade(one, i);
  const token = element("span", { class: "token", title: numbersOf(one, i, piece) });
  if (strength > 0.1) token.classList.add(strength > 0.5 ? "much" : "some");
  if (dashed) token.classList.add("minus");
  const opacity = Math.min(0.6, 0.6 * strength).toFixed(2);
  token.style.backgroundColor = `rgba(${color}, ${opacity})`;
  token.append(visible(piece.replace(/\n/g, "⏎\n")));
  return token;
}

// A completion token by token, and a line for the numbers of the one that is pointed at.
function tokens(one) {
  const readout = element("p", { class: "readout", "aria-live": "polite" });
  const text = element("div", {
    class: "text",
    tabindex: 0,
    role: "group",
    "aria-label": "tokens",
  });
  one.ids.forEach((_, i) => text.append(tokenOf(one, i)));
  let at = -1;
  const point = (i) => {
    text.children[at]?.classList.remove("current");
    at = Math.min(one.ids.length - 1, Math.max(0, i));
    text.children[at].classList.add("current");
    readout.replaceChildren(visible(text.children[at].title));
  };
  text.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    point(at + by);
  });
  text.addEventListener("pointerover", (event) => {
    const i = [...text.children].indexOf(event.target.closest(".token"));
    if (i >= 0) point(i);
  });
  return [text, readout];
}

const KEYS = {
  none: "",
  logprobs: "Shaded: unlikely tokens. Dotted underline: log-prob below −0.3; solid: below −1.5.",
  entropies:
    "Shaded: tokens where the model was undecided. Dotted underline: entropy above 0.15 nats; " +
    "solid: above 0.75.",
  advantage:
    "Blue and plain underline: made more likely by the update. Orange and dashed: less likely.",
};
const POINT = "Point at a token for its numbers, or focus a text and use ← and →.";

let pieces = {};

async function renderSamples(body) {
  const { steps } = rolloutsNow();
  now.at = Math.min(now.at, steps.length - 1);
  let groups = await load(chunk(`step-${steps[now.at]}`));
  if (now.unique) groups = uniquePrompts(groups);
  now.prompt = Math.min(now.prompt, groups.length - 1);
  const group = groups[now.prompt];
  const samples = equalSamples(group.samples).sort(SORTS[now.sort][1]);

  const facts = [`answer ${group.answer}`];
  if (group.task) facts.push(`task ${group.task}`);
  facts.push(`${samples.length} different among ${group.samples.length} samples`);
  const right = box("samples", box("text prompt", visible(group.prompt)));
  right.append(note(visible(facts.join(" · "))), ...samples.map((one) => sampleCard(one)));
  body.replaceChildren(promptList(groups), right);
  byId("step-now").textContent = stepName(steps[now.at]);
}

// ---- the same held-out problems across steps -----------------------------------------------------

async function renderAnswers(body) {
  const steps = rolloutsNow().answers;
  const found = await Promise.all(steps.map((step) => load(chunk(`answers-${step}`))));
  const one = found[0][now.problem];
  const right = box("samples", box("text prompt", visible(one.prompt)));
  right.append(note(visible(`answer ${one.answer ?? ""}`)));
  found.forEach((all, s) => right.append(sampleCard(all[now.problem], stepName(steps[s]))));
  body.replaceChildren(box("prompts answers", answerTable(found, steps)), right);
}

// A row a problem, a mark an evaluation. Problems whose mark changes come first.
function answerTable(found, steps) {
  const short = questions(found[0].map((one) => one.prompt));
  const same = (i) => found.every((all) => all[i]?.right === found[0][i].right);
  const rows = found[0].map((_, i) => i);
  rows.sort((a, b) => same(a) - same(b));

  const body = element("tbody");
  for (const i of rows) {
    const asked = element("td", { class: "asked", title: short[i].slice(0, 500) });
    asked.append(visible(short[i].slice(0, 70)));
    const row = element("tr", { "aria-current": i === now.problem }, asked);
    found.forEach((all, s) => row.append(answerMark(all[i]?.right, stepName(steps[s]), i)));
    body.append(row);
  }
  const heads = ["problem", ...steps.map((step) => step || "before")];
  const head = element("tr", {}, ...heads.map((text) => element("th", {}, `${text}`)));
  return element("table", {}, element("thead", {}, head), body);
}

function answerMark(right, step, problem) {
  const name = `${step}: ${right ? "right" : "wrong"}`;
  const button = element("button", { type: "button", title: name, "aria-label": name });
  button.className = right ? "yes" : "no";
  button.append(right ? "✓" : "✗");
  button.addEventListener("click", () => {
    now.problem = problem;
    renderBody();
  });
  return element("td", {}, button);
}

// ---- controls ------------------------------------------------------------------------------------

function controls() {
  const { steps, by_token: byToken, answers } = rolloutsNow();
  const bar = box("controls");
  const runs = data.runs.map((run, r) => [r, run.label]).filter(([r]) => rolloutsOf(data.runs[r]));
  if (runs.length > 1) bar.append(choice("run", "run", runs));
  const views = steps.length ? [["samples", "training samples"]] : [];
  if (answers.length) views.push(["answers", "held-out problems across steps"]);
  if (views.length > 1) bar.append(choice("show", "view", views));
  if (now.view === "answers") return [bar];

  bar.append(stepSlider(steps));
  bar.append(
    choice(
      "sort",
      "sort",
      Object.entries(SORTS).map(([name, [text]]) => [name, text]),
    ),
  );
  const shades = { none: "nothing", logprobs: "log-prob", entropies: "entropy" };
  const all = Object.entries({ ...shades, advantage: "advantage" });
  if (byToken) bar.append(choice("colour tokens by", "shade", all));
  bar.append(uniqueToggle());
  return [bar, element("p", { class: "key" }, notes().join(" "))];
}

function stepSlider(steps) {
  const range = element("input", { type: "range", min: 0, max: steps.length - 1, value: now.at });
  range.setAttribute("aria-label", "step");
  range.addEventListener("input", () => {
    now.at = +range.value;
    renderBody();
  });
  const said = element("output", { id: "step-now" }, stepName(steps[now.at]));
  return element("label", {}, said, " ", range);
}

function uniqueToggle() {
  const toggle = element("input", { type: "checkbox" });
  toggle.checked = now.unique;
  toggle.addEventListener("change", () => {
    now.unique = toggle.checked;
    renderBody();
  });
  return element("label", {}, toggle, " equal prompts as one");
}

// What the colours mean, and what is not in the page.
function notes() {
  const { steps, of_steps: ofSteps, by_token: byToken, cut } = rolloutsNow();
  const found = [];
  if (now.shade !== "none") found.push(KEYS[now.shade], POINT);
  if (steps.length < ofSteps) {
    const some = `${steps.length} of ${ofSteps} steps are in this page, evenly apart`;
    found.push(`${some}: all would make it too large.`);
  }
  if (cut) found.push(`Of a step up to ${cut} prompts are left out for the same reason.`);
  if (!byToken) found.push("These files hold no log-probs, or no tokenizer was found.");
  return found;
}

const body = element("div", { class: "panes" });
let drawn = 0;

async function renderBody() {
  const mine = ++drawn;
  const target = element("div", { class: "panes" });
  if (now.view === "answers") await renderAnswers(target);
  else await renderSamples(target);
  if (mine !== drawn) return; // another step was asked for meanwhile
  const within = document.activeElement?.closest("#rollouts .prompts"); // the focus stays where it was
  body.className = now.view === "answers" ? "panes halves" : "panes";
  body.replaceChildren(...target.childNodes);
  if (within) body.querySelector("button[aria-current=true], [aria-current=true] button")?.focus();
}

async function render() {
  now.run = +now.run;
  const focused = document.activeElement?.name;
  pieces = await load(chunk("pieces"));
  const { steps, answers } = rolloutsNow();
  if (!answers.length) now.view = "samples";
  if (!steps.length) now.view = "answers";
  byId("rollouts").replaceChildren(element("h2", {}, "Rollouts to read"), ...controls(), body);
  await renderBody();
  if (focused) document.querySelector(`#rollouts [name="${focused}"]`)?.focus();
}

function startRollouts() {
  const first = data.runs.findIndex(rolloutsOf);
  if (first < 0) return;
  now.run = first;
  now.at = rolloutsNow().steps.length - 1;
  byId("rollouts").hidden = false;
  render();
}

startRollouts();
