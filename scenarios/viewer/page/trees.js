"use strict";
// The trees of a run: fields for conditions on them, and a list that draws only the rows in sight.

const ROW = 26; // pixels, as in style.css
const PAGE = 200; // rows in one request
const COLUMNS = [
  ["number", "tree"],
  ["stage", "stage", false],
  ["step", "step"],
  ["env", "environment", false],
  ["question", "task", false],
  ["rollouts", "rollouts"],
  ["nodes", "turns"],
  ["mean_return", "mean return"],
  ["best_return", "best"],
  ["success", "success"],
  ["sampled_tokens", "tokens"],
  ["tool_calls", "calls"],
  ["causes", "cut short", false],
];

function cell(row, name) {
  const value = row[name];
  if (name === "success") return value === null ? "–" : `${Math.round(100 * value)}%`;
  if (name.endsWith("return")) return points(value);
  if (name === "env") return value.replace(/^treegym\//, "");
  if (name === "causes") return Object.entries(value).map(([cause, count]) => `${cause} ×${count}`).join(", ");
  return isNumber(value) ? value.toLocaleString("en") : (value ?? "–");
}

/** The conditions and the order that are in the address. */
function chosenFilters() {
  const found = FILTERS.filter((name) => current.parameters.get(name)).map((name) => [name, current.parameters.get(name)]);
  return Object.fromEntries(found);
}

async function showTrees(main, parameters, signal) {
  const run = parameters.get("run");
  let pages = new Map(); // number of the page: its rows; null until they have arrived
  let state = { matching: 0, known: 0, complete: false, stages: [], envs: [], causes: [] };
  let at = 0; // the row of the cursor
  let generation = 0; // grows when conditions or order change: answers to earlier requests are dropped
  let later; // timer of the next request
  let seeking; // the tree in the address is not found yet, and the user has not moved

  const field = (name, label, attributes) =>
    h("label", null, label, h("input", { name, type: "text", autocomplete: "off", spellcheck: "false", value: parameters.get(name) ?? "", oninput: changed, ...attributes }));
  const choice = (name, label) => h("label", null, label, h("select", { name, onchange: changed }));
  const form = h("form", { class: "filters", role: "search", "aria-label": "filter trees", onsubmit: (event) => event.preventDefault() },
    field("text", "text", { type: "search", placeholder: "in messages and actions", class: "wide" }),
    choice("stage", "stage"),
    field("steps", "steps", { placeholder: "3:8", class: "short" }),
    choice("env", "environment"),
    field("returns", "return", { placeholder: "0.5:", class: "short" }),
    field("term", "reward term", { placeholder: "exact=0.5:", class: "medium" }),
    field("rollouts", "rollouts", { placeholder: "2:", class: "short" }),
    choice("success", "success"),
    choice("cause", "cut short"),
    h("button", { type: "button", onclick: clear }, "clear"),
  );
  const count = h("p", { class: "count", role: "status" });
  const head = h("div", { class: "row head", role: "row" }, COLUMNS.map(([name, label, sorts]) =>
    h("span", { role: "columnheader", class: `c-${name}` }, sorts === false ? label : h("button", { type: "button", "data-order": name, onclick: () => sort(name) }, label))));
  const space = h("div", { class: "space", role: "rowgroup" });
  const list = h("div", { class: "list", role: "grid", tabindex: 0, "aria-label": "trees", onscroll: draw, onwheel: settle, onpointerdown: settle }, head, space);
  const lessons = h("a", { href: link("lessons", { run }), hidden: true }, "lessons");
  put(main, h("h1", null, h("span", null, `trees of ${run}`), lessons), form, count, list);

  function options(name, values) {
    const select = form.elements[name];
    const chosen = current.parameters.get(name) ?? "";
    const all = ["", ...values, ...(values.includes(chosen) || !chosen ? [] : [chosen])];
    if (select.options.length === all.length) return;
    put(select, ...all.map((value) => h("option", { value, selected: value === chosen }, value || "any")));
    select.value = chosen;
  }
  let timer;
  function changed() {
    clearTimeout(timer);
    timer = setTimeout(apply, 150);
  }
  function apply() {
    keep({ ...Object.fromEntries(new FormData(form)), at: null });
    begin();
  }
  function clear() {
    for (const element of form.elements) element.value = "";
    apply();
  }
  function sort(name) {
    const order = current.parameters.get("order");
    keep({ order: order === `-${name}` ? name : order === name ? null : `-${name}` });
    begin();
  }
  function begin() {
    pages = new Map();
    at = 0;
    generation++;
    seeking = current.parameters.has("at");
    list.scrollTop = 0;
    return read();
  }
  function settle() {
    seeking = false;
  }
  function again(wait) {
    clearTimeout(later);
    later = setTimeout(read, wait);
  }

  /** A page of the list; nothing if conditions or order have changed since the request. */
  async function page(number, more) {
    const mine = generation;
    try {
      const answer = await source.trees(run, { ...chosenFilters(), offset: number * PAGE, limit: PAGE, ...more });
      return mine === generation && !signal.aborted ? answer : null;
    } catch (error) {
      if (mine !== generation || signal.aborted) return null;
      put(count, h("span", { class: "error", role: "alert" }, error.message));
      if (source.live && !error.refused) again(4000);
      return null;
    }
  }
  async function read() {
    const number = sight()[0];
    const answer = await page(number, seeking && { at: current.parameters.get("at") });
    if (!answer) return;
    if (answer.matching !== state.matching) pages.clear(); // the rows may have moved
    state = answer;
    pages.set(number, answer.rows);
    lessons.hidden = !answer.lessons;
    options("stage", answer.stages);
    options("env", answer.envs);
    options("cause", answer.causes);
    options("success", ["all", "some", "mixed", "none"]);
    list.setAttribute("aria-busy", String(!answer.complete));
    space.style.height = `${answer.matching * ROW}px`;
    if (seeking && answer.place >= 0) {
      at = answer.place;
      reveal();
    }
    seeking &&= answer.place < 0 && !answer.complete;
    const total = answer.complete ? plural(answer.known, "tree") : `${answer.known.toLocaleString("en")} trees read so far`;
    const filtered = Object.keys(chosenFilters()).some((name) => name !== "order");
    put(count, filtered ? `${answer.matching.toLocaleString("en")} of ${total}` : total);
    draw();
    if (!answer.complete || source.live) again(answer.complete ? 4000 : 50);
  }
  signal.addEventListener("abort", () => clearTimeout(later));
  function sight() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
    const last = Math.min(state.matching, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
    return [Math.floor(first / PAGE), first, last];
  }
  function draw() {
    const [, first, last] = sight();
    const rows = [];
    for (let place = first; place < last; place++) {
      const number = Math.floor(place / PAGE);
      if (!pages.has(number)) {
        pages.set(number, null);
        ahead(number);
      }
      rows.push(drawn(place, rowAt(place)));
    }
    put(space, ...rows);
    list.setAttribute("aria-rowcount", state.matching + 1);
    list.setAttribute("aria-activedescendant", state.matching ? `row${at}` : "");
    for (const button of head.querySelectorAll("button")) {
      const order = current.parameters.get("order") ?? "";
      const sorted = order.replace("-", "") === button.dataset.order;
      button.parentElement.setAttribute("aria-sort", sorted ? (order.startsWith("-") ? "descending" : "ascending") : "none");
    }
  }
  async function ahead(number) {
    const answer = await page(number);
    if (!answer) return;
    pages.set(number, answer.rows);
    draw();
  }
  function drawn(place, row) {
    const element = h("div", { class: `row${place === at ? " at" : ""}`, role: "row", id: `row${place}`, "aria-rowindex": place + 2, "aria-selected": String(place === at), onclick: () => row && open(place) },
      COLUMNS.map(([name]) => {
        const bar = name === "success" && row && row.success !== null;
        return h("span", { role: "gridcell", class: `c-${name}`, title: name === "question" ? row?.question : null },
          row && (name === "number" ? h("a", { href: hrefOf(row), tabindex: -1 }, String(row.number)) : cell(row, name)),
          bar && s("svg", { class: "bar", viewBox: "0 0 30 4", "aria-hidden": "true" }, s("rect", { class: "rest", width: 30, height: 4 }), s("rect", { class: "won", width: 30 * Math.min(1, row.success), height: 4 })));
      }));
    element.style.top = `${place * ROW}px`;
    return element;
  }
  const hrefOf = (row) => link("tree", { run, ...chosenFilters(), tree: row.number });
  const rowAt = (place) => pages.get(Math.floor(place / PAGE))?.[place % PAGE];
  function open(place) {
    const row = rowAt(place);
    if (!row) return;
    keep({ at: row.number });
    location.hash = hrefOf(row);
  }
  function reveal() {
    const body = list.clientHeight - ROW;
    if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
    else if ((at + 1) * ROW > list.scrollTop + body) list.scrollTop = (at + 1) * ROW - body;
  }
  function move(by) {
    settle();
    at = Math.min(Math.max(at + by, 0), Math.max(0, state.matching - 1));
    reveal();
    draw();
    const row = rowAt(at);
    if (row) keep({ at: row.number });
  }
  await begin();
  return {
    keys: {
      j: () => move(1),
      k: () => move(-1),
      PageDown: () => move(20),
      PageUp: () => move(-20),
      Home: () => move(-Infinity),
      End: () => move(Infinity),
      Enter: () => open(at),
      l: () => open(at),
      h: () => go("runs", { run }),
      m: () => state.lessons && go("lessons", { run }),
      "/": () => form.elements.text.focus(),
    },
    help: [["j k", "next, previous tree"], ["PageUp PageDown Home End", "further"], ["Enter or l", "open it"], ["h", "the runs"], ["m", "the lessons"], ["/", "search in the texts"]],
  };
}

/** Goes to the next (1) or previous (-1) tree that meets the conditions in the address. */
async function neighbour(by) {
  const [run, tree] = [current.parameters.get("run"), current.parameters.get("tree")];
  const { place } = await source.trees(run, { ...chosenFilters(), at: tree, limit: 0 });
  if (!isNumber(place) || place < 0 || place + by < 0) return;
  const { rows } = await source.trees(run, { ...chosenFilters(), offset: place + by, limit: 1 });
  if (rows.length) go(current.view, { run, ...chosenFilters(), tree: rows[0].number });
}
