// The calculator's page: a form from form.json, the settings in the address, and what the worker answers.

const MAIN = ["as_trainer", "rank", "init_r", "virtual_tokens", "targets", "batch_size", "seq_len", "precision", "checkpointing"];
const SIDES = ["first", "second"];
const AT_FIRST = { model: "llama-3.1-8b", method: "qlora", gpu: "rtx4090" };
const BESIDE = [
  { name: "response_len", kind: "whole", choices: [], help: "positions with a loss, for response_only; half of them if empty", defaults: { "": null } },
  { name: "examples", kind: "whole", choices: [], help: "sequences in an epoch: how long it takes", defaults: { "": null } },
  { name: "epochs", kind: "number", choices: [], help: "of the training", defaults: { "": 1 } },
  { name: "price_per_hour", kind: "number", choices: [], help: "of one card: what the training costs", defaults: { "": null } },
  { name: "tflops", kind: "number", choices: [], help: "of a card that is not known: dense, in bf16", defaults: { "": null } },
  { name: "bandwidth", kind: "number", choices: [], help: "of its memory, in GB/s", defaults: { "": null } },
  { name: "gpus", kind: "whole", choices: [], help: "cards over which weights, gradients and states are sharded", defaults: { "": 1 } },
];
const MEANINGS = {
  allocated: "tensors and workspaces that torch counts",
  reserved: "segments that the allocator holds for them",
  device: "with the CUDA context: what nvidia-smi shows",
};
const SIZES = new Set(["count", "all", "difference"]); // columns of numbers
const PAUSE_MS = 150; // after the last key

const find = (selector, root = document) => root.querySelector(selector);
const main = find("main");

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function spoken(bytes) {
  const [size, unit, digits] = Math.abs(bytes) >= 2 ** 30 / 10 ? [2 ** 30, "GiB", 2] : [2 ** 20, "MiB", 1];
  return `${(bytes / size).toFixed(digits)} ${unit}`;
}

const amount = (bytes) => make("data", { value: bytes, title: `${bytes.toLocaleString("en")} bytes` }, spoken(bytes));
const row = (...cells) => make("tr", {}, ...cells);
const cell = (...content) => make("td", {}, ...content);
const sizeCell = (...content) => make("td", { class: "size" }, ...content);
const headed = (...names) => make("thead", {}, row(...names.map((name) => make("th", { scope: "col", class: SIZES.has(name) && "size" }, name))));

// The form.

function labelled(name, control, help = "") {
  const text = name.replaceAll("_", " ");
  return make("label", {}, make("span", {}, text), control, ...(help ? [make("small", {}, help)] : []));
}

function select(name, options) {
  return make("select", { name }, ...options.map(([value, text]) => make("option", { value }, text)));
}

function fieldOf(field, side) {
  let control;
  if (field.kind === "choice" || field.kind === "switch") {
    const choices = field.kind === "switch" ? ["on", "off"] : field.choices;
    control = select(field.name, [["", ""], ...choices.map((choice) => [choice, choice])]);
  } else if (field.kind === "text") {
    control = make("input", { name: field.name, list: `${side}-${field.name}` });
  } else {
    control = make("input", { name: field.name, type: "number", step: field.kind === "whole" ? 1 : "any", min: 0 });
  }
  const label = labelled(field.name, control, field.help);
  if (field.kind === "text") {
    label.append(make("datalist", { id: `${side}-${field.name}` }, ...field.choices.map((value) => make("option", { value }))));
  }
  label.field = field;
  return label;
}

function fillForm(side, offer) {
  const millions = (count) => (count < 1e9 ? `${Math.round(count / 1e6)}M` : `${(count / 1e9).toFixed(1)}B`);
  const models = Object.entries(offer.models).map(([name, count]) => [name, `${name} (${millions(count)})`]);
  const cards = Object.entries(offer.cards);
  const card = make("input", { name: "gpu", list: `${side}-cards`, placeholder: "any" });
  const config = labelled("config", make("textarea", { name: "config", spellcheck: "false" }), "the text of a config.json");
  const fields = [...offer.fields, ...BESIDE].map((field) => fieldOf(field, side));
  const more = make("details", {}, make("summary", {}, "More settings"));
  const own = find(`#${side}`);
  own.append(
    make("h2", {}, side === "first" ? "Settings" : "Compared with"),
    labelled("model", select("model", [...models, ["", "another: paste its config.json"]])),
    config,
    labelled("method", select("method", Object.entries(offer.methods))),
    ...fields.filter((label) => MAIN.includes(label.field.name)),
    labelled("card", card, "a name, or its memory, as in 24GiB"),
    make("datalist", { id: `${side}-cards` }, ...cards.map(([value, text]) => make("option", { value }, text))),
    more,
  );
  more.append(...fields.filter((label) => !MAIN.includes(label.field.name)));
  if (side === "first") {
    const compare = make("input", { type: "checkbox", id: "compare" });
    compare.addEventListener("change", () => showSecond(compare.checked, true));
    own.append(make("label", { class: "check" }, compare, "Compare with other settings"));
  }
  own.addEventListener("submit", (event) => event.preventDefault());
  own.addEventListener("input", (event) => event.target.id !== "compare" && changed());
}

// Shows the fields that the method has, each with its default.
function adapt(own) {
  const method = own.elements.method.value;
  const trainer = own.elements.as_trainer?.value ? ", or the trainer's" : "";
  own.elements.config.parentElement.hidden = own.elements.model.value !== "";
  for (const label of own.querySelectorAll("label")) {
    if (!label.field) continue;
    const { name, kind, defaults } = label.field;
    const owner = method in defaults ? method : "";
    label.hidden = !(owner in defaults);
    const value = defaults[owner];
    const control = own.elements[name];
    const said = value === null || value === undefined ? "" : kind === "switch" ? (value ? "on" : "off") : String(value);
    if (control.tagName === "SELECT") control.options[0].text = said ? `${said}, the default${trainer}` : "not set";
    else control.placeholder = said;
  }
}

function read(own) {
  const found = {};
  for (const control of own.elements) {
    if (!control.name || control.closest("label").hidden || control.value.trim() === "") continue;
    const kind = control.closest("label").field?.kind;
    const value = control.value.trim();
    found[control.name] = kind === "switch" ? value === "on" : kind === "whole" || kind === "number" ? Number(value) : value;
  }
  return found;
}

function write(own, given) {
  for (const control of own.elements) {
    if (!control.name) continue;
    const value = given[control.name];
    control.value = value === undefined ? "" : value === true ? "on" : value === false ? "off" : value;
  }
  if (!given.config && !own.elements.model.value) own.elements.model.value = AT_FIRST.model;
  if (!own.elements.method.value) own.elements.method.value = AT_FIRST.method;
  adapt(own);
}

function showSecond(shown, copied) {
  main.classList.toggle("compared", shown);
  find("#compare").checked = shown;
  find("#second").hidden = find("#why").hidden = !shown;
  if (shown && copied) write(find("#second"), read(find("#first")));
  if (copied) changed();
}

// The address.

function toAddress(all) {
  const parts = new URLSearchParams();
  all.forEach((given, number) => {
    for (const [name, value] of Object.entries(given)) {
      const text = name === "config" ? value.replace(/\s+/g, " ") : value === true ? "on" : value === false ? "off" : value;
      parts.set((number ? "b." : "") + name, text);
    }
  });
  return `#${parts}`;
}

function fromAddress() {
  const all = [{}, {}];
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (name.startsWith("b.")) all[1][name.slice(2)] = value;
    else all[0][name] = value;
  }
  const some = (given) => Object.keys(given).length > 0;
  write(find("#first"), some(all[0]) ? all[0] : AT_FIRST);
  write(find("#second"), all[1]);
  showSecond(some(all[1]), false);
}

// Asking.

let worker, timer, began;
let job = 0; // answers to earlier ones are dropped

function changed() {
  for (const side of SIDES) adapt(find(`#${side}`));
  clearTimeout(timer);
  timer = setTimeout(ask, PAUSE_MS);
}

function ask() {
  clearTimeout(timer);
  const all = SIDES.map((side) => find(`#${side}`)).filter((own) => !own.hidden).map(read);
  const address = toAddress(all);
  find("#link").href = address;
  history.replaceState(null, "", address);
  main.setAttribute("aria-busy", "true");
  find("#fits > summary").textContent = `Which methods fit on ${all[0].gpu ?? "a card"}?`;
  find("#fits > p").textContent = all[0].gpu ? "" : "Choose a card in the settings.";
  find("#fits tbody").replaceChildren();
  began = performance.now();
  worker.postMessage({ job: ++job, settings: all.map((given) => JSON.stringify(given)), fits: find("#fits").open && Boolean(all[0].gpu) });
}

const say = (text) => (find("#status").textContent = text);

function heard({ data }) {
  if (data.ready) {
    performance.mark("ready");
    say("Python is there. Loading the calculator …");
  }
  if (data.failed) say(`The calculator failed: ${data.failed}`);
  if (data.job !== job) return;
  if (data.answers) {
    showAnswers(data.answers);
    main.setAttribute("aria-busy", "false");
    performance.mark("answered");
    say(`Answered in ${((performance.now() - began) / 1000).toFixed(1)} s.`);
  }
  if (data.why) showWhy(data.why);
  if (data.fit) showFit(data.fit);
  if (data.done) main.dataset.done = find("#link").getAttribute("href");
}

// Showing.

function showAnswers(answers) {
  const open = new Set([...find("#answers").querySelectorAll("details[open]")].map((details) => details.dataset.key));
  const largest = Math.max(...answers.flatMap((answer) => Object.values(answer.phases ?? {})));
  find("#answers").replaceChildren(...answers.map((answer, number) => articleOf(answer, number, largest)));
  for (const details of find("#answers").querySelectorAll("details")) details.open = open.has(details.dataset.key);
  if (answers.length < 2 || answers.some((answer) => answer.problems)) find("#why > div").replaceChildren();
}

function articleOf(answer, number, largest) {
  const own = find(`#${SIDES[number]}`);
  const wrong = new Set((answer.problems ?? []).map((problem) => problem.where));
  for (const control of own.elements) {
    if (wrong.has(control.name)) control.setAttribute("aria-invalid", "true");
    else control.removeAttribute("aria-invalid");
  }
  if (answer.problems) return make("article", {}, problemsOf(answer.problems));
  const peaks = ["allocated", "reserved", "device"].map((name) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, amount(answer[`peak_${name}_bytes`]), make("small", {}, MEANINGS[name]))),
  );
  const counted = `${answer.parameters.toLocaleString("en")} parameters, ${answer.trainable_parameters.toLocaleString("en")} trained`;
  return make(
    "article",
    {},
    make("h2", {}, `${answer.model}, ${find(`[name=method] option[value=${answer.method}]`, own).text}`),
    make("p", { class: "faint" }, counted),
    make("dl", { class: "peaks" }, ...peaks),
    ...(answer.card ? [roomOf(answer)] : []),
    ...(answer.tokens_per_second ? [timeOf(answer)] : []),
    barsOf(answer, largest),
    legendOf(answer),
    termsOf(answer, number),
    make(
      "details",
      { "data-key": `assumptions-${number}` },
      make("summary", {}, "What is assumed"),
      make("ul", {}, ...[answer.agreement, ...answer.assumptions].filter(Boolean).map((line) => make("li", {}, line))),
    ),
  );
}

function problemsOf(problems) {
  const lines = problems.map(({ where, message, remedy }) => make("li", {}, `${where}: ${message}${remedy ? ` → ${remedy}` : ""}`));
  return make("ul", { class: "problems", role: "alert" }, ...lines);
}

function roomOf({ card, peak_device_bytes: needed, least_device_bytes: least }) {
  const words = { yes: "fits", tight: "tight", no: "does not fit" };
  const bytes = { yes: card.usable_bytes - needed, tight: needed - card.usable_bytes, no: least - card.usable_bytes };
  const rest = { yes: "are left", tight: "of cached memory have to be given back, and steps are slower", no: "are missing" };
  const on = ` on ${card.name}, of which CUDA can use ${spoken(card.usable_bytes)}: `;
  return make("p", {}, make("strong", { class: card.fits }, words[card.fits]), on, amount(bytes[card.fits]), ` ${rest[card.fits]}.`);
}

function timeOf({ tokens_per_second: speed, time }) {
  const told = (value) => Number(value.toPrecision(3)).toLocaleString("en");
  const between = ({ value, low, high }, unit = 1) => `${told(value / unit)} (${told(low / unit)} to ${told(high / unit)})`;
  const parts = [`${between(speed)} tokens a second`, `${between(time.step_seconds)} seconds a step`];
  if (time.training_seconds) parts.push(`${between(time.training_seconds, 3600)} hours for the training`);
  if (time.cost) parts.push(`${between(time.cost)} for ${time.training_seconds ? "the training" : "1M tokens"}, in the currency of the price`);
  return make("p", {}, `About ${parts.join("; ")}${time.unvalidated ? ` (not validated: ${time.unvalidated})` : ""}.`);
}

function barsOf(answer, largest) {
  const rows = Object.entries(answer.phases).map(([phase, bytes]) => {
    const parts = Object.entries(answer.alive[phase]);
    const text = parts.map(([kind, size]) => `${kind} ${spoken(size)}`).join(", ");
    const bar = make("div", { class: "bar", role: "img", "aria-label": text });
    bar.style.width = `${(100 * bytes) / largest}%`;
    for (const [kind, size] of parts) {
      const part = make("span", { "data-kind": kind, title: `${kind} ${spoken(size)}` });
      part.style.flexGrow = size;
      bar.append(part);
    }
    const binds = phase === answer.binding_phase;
    return make("tr", { class: binds ? "binds" : null }, make("th", { scope: "row" }, phase), cell(bar), sizeCell(amount(bytes)));
  });
  return make("table", { class: "bars", "aria-label": "What is alive at the peak of each phase" }, make("tbody", {}, ...rows));
}

function legendOf(answer) {
  const items = Object.entries(answer.components).map(([kind, bytes]) =>
    make("li", {}, make("i", { "data-kind": kind }), `${kind} `, amount(bytes)),
  );
  const what = make("p", { class: "faint" }, `Alive at the peak, that of ${answer.binding_phase}:`);
  return make("div", {}, what, make("ul", { class: "legend" }, ...items));
}

function scrolling(label, table) {
  return make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": label }, table);
}

function termsOf(answer, number) {
  const rows = answer.terms.map((term) =>
    row(cell(term.kind), cell(term.name), sizeCell(String(term.count)), cell(term.formula), sizeCell(amount(term.bytes)), cell(term.source)),
  );
  const table = make("table", {}, headed("kind", "what", "count", "bytes of one", "all", "source"), make("tbody", {}, ...rows));
  const summary = make("summary", {}, "Every term, with its formula and source");
  return make("details", { "data-key": `terms-${number}` }, summary, scrolling("Every term", table));
}

function showWhy(why) {
  const largest = Math.max(1, ...why.changes.map((change) => Math.abs(change.first_bytes - change.second_bytes)));
  const rows = why.changes
    .filter((change) => Math.abs(change.first_bytes - change.second_bytes) > why.notable_bytes / 50)
    .map((change) => {
      const more = change.first_bytes - change.second_bytes;
      const bar = make("div", { class: more < 0 ? "less" : "more" });
      bar.style.width = `${(100 * Math.abs(more)) / largest}%`;
      return row(cell(change.name), cell(change.kind), sizeCell(amount(change.second_bytes)), sizeCell(amount(change.first_bytes)), sizeCell(amount(more)), cell(bar));
    });
  const peak = [why.second_bytes, why.first_bytes, why.first_bytes - why.second_bytes].map((bytes) => sizeCell(amount(bytes)));
  const table = make("table", {}, headed("term", "of", why.second, why.first, "difference", ""), make("tbody", {}, ...rows, row(cell("peak"), cell(), ...peak, cell())));
  find("#why > div").replaceChildren(...why.sentences.map((sentence) => make("p", {}, sentence)), scrolling("The difference, term by term", table));
}

function showFit(fit) {
  if (fit.problems) return find("#fits > p").replaceChildren(problemsOf(fit.problems));
  const sizes = [fit.largest_batch_size, fit.largest_seq_len, fit.largest_rank].map((size) => sizeCell(size ? String(size) : "-"));
  const bytes = (value, none = "-") => sizeCell(value === null ? none : amount(value));
  const state = make("td", { class: fit.fits }, fit.fits);
  find("#fits tbody").append(
    row(cell(fit.label), state, bytes(fit.peak_device_bytes), bytes(fit.headroom_bytes), ...sizes, cell(fit.advice), bytes(fit.advised_device_bytes, "")),
  );
}

// The start.

if (typeof WebAssembly === "undefined") {
  say("This browser has no WebAssembly, which the calculator needs: use a current browser, or the command peftscope memory.");
} else {
  say("Loading Python, up to 10 MB at the first visit …");
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = heard;
  worker.onerror = () => say("The calculator's files could not be loaded: reload the page.");
  const offer = await (await fetch("form.json")).json();
  for (const side of SIDES) fillForm(side, offer);
  main.hidden = false;
  fromAddress();
  ask();
  addEventListener("hashchange", () => (fromAddress(), ask()));
  find("#fits").addEventListener("toggle", ask);
}
