"use strict";
// The lessons of a run, one of them with its evidence and history, and those that an episode was told.

const LESSON_STATES = ["in-force", "all", ...STATES];

/** The conditions on lessons that are in the address. */
function chosenLessons() {
  const found = ["state", "words"].map((name) => [name, current.parameters.get(name)]).filter(([, value]) => value);
  return Object.fromEntries(found);
}

const lessonLink = (run, number, told) => h("a", { href: link("lesson", { run, ...chosenLessons(), lesson: number }) }, told ?? String(number));

/** An effect in words: the mean, and the interval around it. */
function effectOf({ mean: middle, low, high, pairs }) {
  return h("span", { title: `${plural(pairs, "pair")} of groups of rollouts` }, signed(middle), h("span", { class: "quiet" }, ` (${signed(low)} … ${signed(high)})`));
}

/** The interval of an effect as a bar; the rule in its middle is no effect, its ends are `reach`. */
function effectBar({ mean: middle, low, high }, reach) {
  const x = (value) => 30 + 30 * Math.max(-1, Math.min(1, value / reach));
  return s("svg", { class: "bar effect", viewBox: "0 0 60 8", "aria-hidden": "true" },
    s("line", { class: "rule", x1: 30, x2: 30, y1: 0, y2: 8 }),
    s("line", { class: "interval run0", x1: x(low), x2: x(high), y1: 4, y2: 4 }),
    s("circle", { class: "mark run0", cx: x(middle), cy: 4, r: 2.3 }));
}

const stateOf = (lesson) => h("span", { class: `state ${lesson.state}` }, lesson.state);
const placeOf = (lesson) => [lesson.env.replace(/^treegym\//, ""), ...lesson.tags].join(" ");
const toldWhere = (when) => (when ? [h("span", { class: "quiet" }, "when you read "), `“${when}”`] : h("span", { class: "quiet" }, "in the prompt"));

async function showLessons(main, parameters, signal) {
  const run = parameters.get("run");
  let state = { known: 0, matching: 0, rows: [] };
  let at = parameters.get("at"); // the id of the lesson under the cursor
  let generation = 0; // grows when conditions change: answers to earlier requests are dropped
  let drawn = ""; // the rows that are shown, as JSON
  let timer; // of a change in the fields
  let later; // timer of the next request for a run that is being written
  signal.addEventListener("abort", () => [timer, later].forEach(clearTimeout));
  const chosen = parameters.get("state") ?? "";
  const form = h("form", { class: "filters", role: "search", "aria-label": "filter lessons", onsubmit: (event) => event.preventDefault() },
    h("label", null, "words", h("input", { name: "words", type: "search", autocomplete: "off", spellcheck: "false", placeholder: "in text, phrase, tags", class: "wide", value: parameters.get("words") ?? "", oninput: changed })),
    h("label", null, "state", h("select", { name: "state", onchange: changed }, LESSON_STATES.map((name, i) => h("option", { value: i ? name : "", selected: name === chosen }, name)))));
  const count = h("p", { class: "count", role: "status" });
  const body = h("tbody");
  const head = ["id", "state", "effect", "", "evidence", "where", "told", "lesson"];
  put(main, h("h1", null, h("span", null, `lessons of ${run}`)), form, count,
    h("div", { class: "scroll" }, h("table", { class: "runs lesson-list", role: "grid", "aria-label": "lessons" },
      h("thead", null, h("tr", null, head.map((name) => h("th", { scope: "col", class: ["id", "evidence"].includes(name) ? "number" : null }, name)))), body)));

  function changed() {
    clearTimeout(timer);
    timer = setTimeout(() => {
      keep({ ...Object.fromEntries(new FormData(form)), at: null });
      generation++;
      read();
    }, 150);
  }
  async function read() {
    const mine = generation;
    clearTimeout(later);
    try {
      const answer = await source.lessons(run, chosenLessons());
      if (mine !== generation || signal.aborted) return;
      state = answer;
      const name = form.elements.state.selectedOptions[0].textContent;
      const all = `${plural(answer.known, "lesson")} ${name === "all" ? "in all states" : name.replace("-", " ")}`;
      const words = current.parameters.get("words") ? `${answer.matching.toLocaleString("en")} of ${all}` : all;
      put(count, answer.rows.length < answer.matching ? `${words}; the first ${answer.rows.length.toLocaleString("en")} are shown` : words);
      draw();
    } catch (error) {
      if (mine !== generation || signal.aborted) return;
      put(count, h("span", { class: "error", role: "alert" }, error.message));
      put(body);
      drawn = "";
      if (error.refused) return;
    }
    if (source.live) later = setTimeout(read, 4000);
  }
  function draw() {
    const content = JSON.stringify(state.rows);
    if (content !== drawn) {
      const reach = Math.max(1e-9, ...state.rows.filter((row) => row.effect).flatMap(({ effect }) => [Math.abs(effect.low), Math.abs(effect.high)]));
      put(body, state.rows.map((row) => rowOf(row, reach)));
      drawn = content;
    }
    [...body.rows].forEach((element, i) => {
      const here = i === place();
      element.classList.toggle("at", here);
      element.setAttribute("aria-selected", String(here));
    });
  }
  function rowOf(row, reach) {
    return h("tr", { onclick: (event) => event.target.closest("a") ?? open(row.id) },
      h("th", { scope: "row", class: "number" }, lessonLink(run, row.id)),
      h("td", null, stateOf(row)),
      h("td", null, row.effect ? effectOf(row.effect) : h("span", { class: "none" }, "not measured")),
      h("td", null, row.effect && effectBar(row.effect, reach)),
      h("td", { class: "number" }, row.seen),
      h("td", null, placeOf(row)),
      h("td", { class: "told" }, toldWhere(row.when)),
      h("td", { class: "lesson-text" }, row.text));
  }
  const place = () => Math.max(0, state.rows.findIndex((row) => String(row.id) === at));
  function move(by) {
    const row = state.rows[Math.min(Math.max(place() + by, 0), state.rows.length - 1)];
    if (!row) return;
    at = String(row.id);
    keep({ at });
    draw();
    body.rows[place()].scrollIntoView({ block: "nearest" });
  }
  function open(number) {
    if (number === undefined) return;
    keep({ at: number });
    go("lesson", { run, ...chosenLessons(), lesson: number });
  }
  await read();
  body.rows[place()]?.scrollIntoView({ block: "nearest" });
  const enter = () => open(state.rows[place()]?.id);
  return {
    keys: { j: () => move(1), k: () => move(-1), Home: () => move(-Infinity), End: () => move(Infinity), Enter: enter, l: enter, h: () => go("trees", { run }), "/": () => form.elements.words.focus() },
    help: [["j k", "next, previous lesson"], ["Home End", "the first, the last"], ["Enter or l", "open it"], ["h", "the trees"], ["/", "search for words"]],
  };
}

async function showLesson(main, parameters) {
  const [run, number] = [parameters.get("run"), Number(parameters.get("lesson"))];
  const { lesson, history } = await source.lesson(run, number);
  const rows = history.map((change) => h("tr", null,
    h("td", { class: "number" }, change.number),
    h("td", { class: "quiet" }, timeOf(change.time)),
    h("td", null, change.author || "–"),
    h("td", null, change.kind),
    h("td", { class: "lesson-text" }, changeOf(run, change)),
    h("td", { class: "lesson-text" }, change.reason)));
  put(main,
    h("h1", null, `lesson ${number}`, h("span", { class: "quiet" }, lesson ? lesson.state : "forgotten: its text was erased")),
    lesson && factsOf(run, lesson),
    lesson && evidenceOf(run, lesson.evidence),
    h("h2", null, "history", h("span", { class: "quiet" }, plural(history.length, "change"))),
    h("div", { class: "scroll" }, h("table", { class: "settings", "aria-label": "history" }, headOf("change", "UTC", "by", "", "what", "why"), h("tbody", null, rows))));

  async function beside(by) {
    const { rows: all } = await source.lessons(run, chosenLessons());
    const next = by > 0 ? all.find(({ id }) => id > number) : all.findLast(({ id }) => id < number);
    if (next) go("lesson", { run, ...chosenLessons(), lesson: next.id });
  }
  return {
    keys: { h: up, "[": () => beside(-1), "]": () => beside(1) },
    help: [["h", "the lessons"], ["[ ]", "previous, next lesson"]],
  };
}

const headOf = (...names) => h("thead", null, h("tr", null, names.map((name) => h("th", { scope: "col" }, name))));
const timeOf = (seconds) => new Date(1000 * seconds).toISOString().slice(0, 16).replace("T", " ");

function factsOf(run, lesson) {
  const facts = {
    told: toldWhere(lesson.when),
    environment: lesson.env,
    tags: lesson.tags.join(" "),
    state: [stateOf(lesson), lesson.replaced_by && [" by lesson ", lessonLink(run, lesson.replaced_by)]],
    effect: lesson.effect ? [effectOf(lesson.effect), ` in ${plural(lesson.effect.pairs, "pair")}`] : "not measured",
    author: lesson.author,
  };
  return [h("p", { class: "text lesson-said" }, lesson.text),
    h("dl", { class: "facts" }, Object.entries(facts).filter(([, value]) => value !== "").map(([name, value]) => [h("dt", null, name), h("dd", null, value)]))];
}

/** The rollouts that a lesson was drawn from. Those of this run are links. */
function evidenceOf(run, pieces) {
  if (!pieces.length) return h("p", { class: "quiet" }, "no evidence: it was not drawn from rollouts");
  const side = (piece, i) => h("td", null, points(piece.returns[i]), h("span", { class: "quiet" }, ` in ${piece.counts[i]}`));
  const rows = pieces.map((piece) => {
    const here = piece.rollouts !== null;
    const node = piece.nodes.length === 1 ? piece.nodes[0] : null;
    return h("tr", null,
      h("td", null, here ? h("a", { href: link("tree", { run, tree: piece.tree, node }) }, `tree ${piece.tree}`) : h("span", { class: "quiet" }, `${piece.run} tree ${piece.tree}`)),
      h("td", null, (piece.rollouts ?? []).map((rollout) => [h("a", { href: link("episode", { run, tree: piece.tree, rollout }) }, `${piece.tree}.${rollout}`), " "])),
      side(piece, 0), side(piece, 1),
      h("td", null, signed(piece.returns[0] - piece.returns[1])),
      h("td", null, piece.in_force.map((id) => [lessonLink(run, id), " "])));
  });
  return [h("h2", null, "evidence", h("span", { class: "quiet" }, `${plural(pieces.length, "comparison")}: mean return of the rollouts that did so, and of the others`)),
    h("div", { class: "scroll" }, h("table", { class: "settings", "aria-label": "evidence" }, headOf("tree", "episodes", "did so", "others", "gain", "told meanwhile"), h("tbody", null, rows)))];
}

/** What a change has changed, in words. */
function changeOf(run, { kind, fields }) {
  if (kind === "add") return fields.text ?? (fields.sha256 && "its text was erased");
  return Object.entries(fields).map(([name, value], i) => [i > 0 && ", ",
    name === "effect" && value ? ["effect ", effectOf(value)] :
    name === "replaced_by" && value ? ["replaced by ", lessonLink(run, value)] :
    name === "evidence" ? `${plural(value, "more piece")} of evidence` : value !== null && line({ [name]: value })].filter(Boolean));
}

/** The notes that a task tells. */
function notesOf(task) {
  return task.wrappers.filter(([name]) => name === "WithNotes").flatMap(([, given]) => (Array.isArray(given?.notes) ? given.notes : []));
}

/** The lessons that were in force in an episode: its task's notes, or those that the tree names. */
function lessonsOf(tree) {
  const named = tree.lessons?.length ? tree.lessons : (tree.info.lessons ?? []);
  const notes = notesOf(tree.task);
  const list = notes.length ? notes : Array.isArray(named) ? named : [named];
  if (!list.length) return null;
  return h("section", { class: "lessons", "aria-label": "lessons in force" }, h("h3", null, "lessons in force"), h("ul", null, list.map((note) => h("li", null, noteOf(tree, note)))));
}

function noteOf(tree, note) {
  const { text, when, id } = typeof note === "string" ? { text: note } : (note ?? {});
  return [
    when && [toldWhere(String(when)), ": "], text ?? json(note), " ",
    id && (tree.has_lessons ? lessonLink(tree.run, id, `lesson ${id}`) : h("span", { class: "quiet" }, `lesson ${id}`)),
  ];
}
