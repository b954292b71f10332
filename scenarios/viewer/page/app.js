"use strict";
// Which page is shown, as the address says; keys, theme and help.

const VIEWS = { runs: showRuns, trees: showTrees, tree: showTree, episode: showEpisode, compare: showCompare, lessons: showLessons, lesson: showLesson };
const ARROWS = { ArrowDown: "j", ArrowUp: "k", ArrowLeft: "h", ArrowRight: "l" };
const COMMON = [["g", "the runs"], ["d", "dark or light"], ["?", "these keys"], ["Esc", "leave a field, close, back to where this came from"]];

let current = { view: "runs", parameters: new URLSearchParams(), page: { keys: {}, help: [] } };
let leave = new AbortController(); // aborted when another page is shown

/** The address of a page, without empty parameters. An episode that is kept for a comparison stays in the address. */
function link(view, parameters) {
  const kept = view === "compare" ? null : current.parameters.get("keep");
  const all = Object.entries({ ...parameters, ...(kept && { keep: kept }) });
  const query = new URLSearchParams(all.filter(([, value]) => value !== null && value !== undefined && value !== ""));
  return `#${view}${query.size ? `?${query}` : ""}`;
}

function go(view, parameters) {
  location.hash = link(view, parameters);
}

/** Writes parameters into the address without showing the page again. null removes a parameter. */
function keep(parameters) {
  for (const [name, value] of Object.entries(parameters)) {
    if (value === null || value === "") current.parameters.delete(name);
    else current.parameters.set(name, value);
  }
  history.replaceState(null, "", `#${current.view}${current.parameters.size ? `?${current.parameters}` : ""}`);
}

async function show() {
  leave.abort();
  leave = new AbortController();
  const { signal } = leave;
  const [view, query] = location.hash.slice(1).split(/\?(.*)/s);
  const parameters = new URLSearchParams((query ?? "").replace(/(^|&)step=/, "$1steps=")); // links of earlier pages say step
  current = { view: Object.hasOwn(VIEWS, view) ? view : "runs", parameters, page: { keys: {}, help: [] } };
  const main = document.getElementById("main");
  const stage = h("div", { class: `page ${current.view}` }); // a page that was left may go on drawing: its element is detached
  main.setAttribute("aria-busy", "true");
  document.title = shown(["treegym", ...["run", "tree", "rollout", "lesson"].map((name) => current.parameters.get(name)).filter(Boolean)].join(" "));
  showTop();
  try {
    put(main, stage);
    main.scrollTop = 0;
    if (document.activeElement === document.body) main.focus({ preventScroll: true }); // so that keys scroll it
    const page = await VIEWS[current.view](stage, current.parameters, signal);
    if (!signal.aborted) current.page = page;
  } catch (error) {
    if (!signal.aborted) put(stage, h("p", { class: "error", role: "alert" }, error.message));
  } finally {
    if (!signal.aborted) main.setAttribute("aria-busy", "false");
  }
}

/** Shows the page again, scrolled to the same place, with links that carry the present parameters. */
async function showAgain() {
  const main = document.getElementById("main");
  const { scrollTop } = main;
  await show();
  main.scrollTop = scrollTop;
}

function showTop() {
  const { view, parameters } = current;
  const [run, tree, rollout] = ["run", "tree", "rollout"].map((name) => parameters.get(name));
  const way = [h("a", { href: link("runs", run ? { run } : {}) }, "runs")];
  if (run && view !== "runs") way.push(h("a", { href: link("trees", { run, ...chosenFilters(), at: tree }) }, run));
  if (run && tree) way.push(h("a", { href: link("tree", { run, ...chosenFilters(), tree }) }, `tree ${tree}`));
  if (view === "episode" && rollout) way.push(h("span", null, `#${rollout}`));
  const lesson = view === "lesson" && parameters.get("lesson");
  if (run && (view === "lessons" || lesson)) way.push(h("a", { href: link("lessons", { run, ...chosenLessons(), at: lesson }) }, "lessons"));
  if (lesson) way.push(h("span", null, lesson));
  if (view === "compare") way.push(h("span", null, "compare"));
  const kept = parameters.get("keep");
  put(document.getElementById("top"),
    h("a", { class: "brand", href: "#runs" }, "treegym"),
    h("nav", { "aria-label": "breadcrumb" }, way.map((step, i) => [i > 0 && h("span", { class: "quiet", "aria-hidden": "true" }, "/"), step])),
    h("span", { class: "gap" }),
    kept && h("span", { class: "kept" }, `kept: ${kept}`, h("button", { type: "button", "aria-label": "keep it no longer", onclick: () => { keep({ keep: null }); showAgain(); } }, "×")),
    h("button", { type: "button", "aria-label": "dark or light", onclick: turnTheme }, "theme"),
    h("button", { type: "button", "aria-label": "keys", onclick: showHelp }, "?"));
}

function turnTheme() {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark" ||
    (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  setTheme(dark ? "light" : "dark");
  try {
    localStorage.setItem("treegym-theme", document.documentElement.dataset.theme);
  } catch {
    // without storage the choice of a theme is not remembered
  }
}

function setTheme(theme) {
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
}

function showHelp() {
  const dialog = document.getElementById("help");
  const rows = [...current.page.help, ...COMMON];
  put(dialog, h("h2", null, "keys"), h("dl", { class: "facts" }, rows.map(([keys, what]) => [h("dt", null, keys.split(" ").map((key) => (key === "or" ? " or " : h("kbd", null, key)))), h("dd", null, what)])), h("p", { class: "quiet" }, "Arrows are h j k l. The address names what is shown: it can be shared."), h("form", { method: "dialog" }, h("button", null, "close")));
  dialog.showModal();
}

/** One level up: from an episode to its tree, from there to the list, to the runs; from a lesson to the lessons. */
function up() {
  const { view, parameters } = current;
  const [run, tree] = [parameters.get("run"), parameters.get("tree")];
  if (view === "episode") go("tree", { run, ...chosenFilters(), tree });
  else if (view === "tree") go("trees", { run, ...chosenFilters(), at: tree });
  else if (view === "compare") history.back();
  else if (view === "lesson") go("lessons", { run, ...chosenLessons(), at: parameters.get("lesson") });
  else if (view === "lessons") go("trees", { run });
  else if (view === "trees") go("runs", { run });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.getElementById("help").open) return;
  const typing = event.target.closest?.("input, select, textarea");
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.key === "Enter" && event.target.closest?.("a, button, summary")) return;
  const key = ARROWS[event.key] ?? event.key;
  const common = { g: () => go("runs", {}), d: turnTheme, "?": showHelp, Escape: up };
  const act = current.page.keys[key] ?? common[key];
  if (!act) return;
  event.preventDefault();
  act();
});

try {
  setTheme(localStorage.getItem("treegym-theme"));
} catch {
  // without storage there is no choice to restore
}
window.addEventListener("hashchange", show);
show();
