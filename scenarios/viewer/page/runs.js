"use strict";
// The runs, and the curves of one or two of them.

const HEADINGS = { model: "evaluated" }; // the heading of a stage, if it is not its name

/** A share with its interval as a bar under the number. */
function share(result) {
  if (!isNumber(result?.mean)) return h("span", { class: "none" }, "–");
  const bar = s("svg", { class: "bar", viewBox: "0 0 60 5", "aria-hidden": "true" },
    s("line", { class: "grid", x1: 0, x2: 60, y1: 2.5, y2: 2.5 }),
    s("line", { class: "interval run0", x1: 60 * result.low, x2: 60 * result.high, y1: 2.5, y2: 2.5 }),
    s("circle", { class: "mark run0", cx: 60 * result.mean, cy: 2.5, r: 2.3 }));
  return h("span", { class: "share", title: `95%: ${percent(result.low)} to ${percent(result.high)}` }, percent(result.mean), bar);
}

function size(bytes) {
  return bytes > 1e6 ? `${(bytes / 1e6).toFixed(1)} MB` : bytes ? `${Math.ceil(bytes / 1e3)} kB` : "–";
}

const sectionOf = (element) => element.closest("section").getAttribute("aria-label");

async function showRuns(main, parameters, signal) {
  const { title, runs } = await source.runs();
  let at = Math.max(0, runs.findIndex((run) => run.name === parameters.get("run")));
  let chosen = []; // names of the runs whose curves are shown
  let plotted = ""; // the data of the curves that are shown, as JSON
  let later; // timer of the next request for a run that is being written
  signal.addEventListener("abort", () => clearTimeout(later));
  const body = h("tbody");
  const curves = h("div", { class: "curves" });
  const stages = [...new Set(runs.map((run) => Object.keys(run.stages)).sort((a, b) => b.length - a.length).flat())];
  const learned = runs.some((run) => run.lessons);
  const rows = runs.map((run, i) =>
    h("tr", { onclick: (event) => event.target.closest("a, button") ?? select(i) },
      h("td", null, h("button", { class: "mark-run", "aria-label": `overlay ${run.name}`, "aria-pressed": "false", title: "overlay (x)", onclick: () => overlay(i) })),
      h("th", { scope: "row" }, h("a", { href: link("trees", { run: run.name }) }, run.name)),
      h("td", null, run.env?.replace(/^treegym\//, "") ?? "–"),
      h("td", null, run.algorithm ?? "–"),
      h("td", null, run.model ?? "–"),
      h("td", { class: "number" }, run.seed ?? "–"),
      h("td", { class: run.finished ? "" : "quiet", title: run.fault }, run.fault ? "damaged" : (run.finished ? "finished" : "unfinished") + (run.failures ? `, ${run.failures} failed` : "")),
      stages.map((stage) => h("td", { class: "number" }, share(run.stages[stage]))),
      h("td", { class: "number" }, run.gain ? h("span", { title: `95%: ${percent(run.gain.low)} to ${percent(run.gain.high)}` }, signed(100 * run.gain.mean).replace(/(\.\d)\d$/, "$1")) : "–"),
      h("td", { class: "number" }, size(run.bytes)),
      learned && h("td", null, run.lessons && h("a", { href: link("lessons", { run: run.name }) }, "lessons")),
    ),
  );
  body.append(...rows);
  const head = ["", "run", "environment", "algorithm", "model", "seed", "state", ...stages.map((stage) => HEADINGS[stage] ?? stage), "gain, points", "trees", ...(learned ? ["memory"] : [])];
  put(main,
    h("h1", null, title, h("span", { class: "quiet" }, plural(runs.length, "run"))),
    h("div", { class: "scroll" }, h("table", { class: "runs", role: "grid", "aria-label": "runs" },
      h("thead", null, h("tr", null, head.map((name, i) => h("th", { scope: "col", class: i === 5 || (i > 6 && name !== "memory") ? "number" : null }, name)))), body)),
    curves,
  );

  async function select(i) {
    at = Math.min(Math.max(i, 0), runs.length - 1);
    keep({ run: runs[at].name });
    await draw();
  }
  async function overlay(i) {
    keep({ with: current.parameters.get("with") === runs[i].name ? null : runs[i].name });
    await draw();
  }
  async function draw() {
    const other = current.parameters.get("with");
    chosen = [runs[at].name, ...(other && other !== runs[at].name ? [other] : [])];
    rows.forEach((row, i) => {
      row.classList.toggle("at", i === at);
      row.setAttribute("aria-selected", String(i === at));
      const button = row.querySelector("button");
      button.className = `mark-run ${i === at ? "run0" : runs[i].name === other ? "run1" : ""}`;
      button.setAttribute("aria-pressed", String(runs[i].name === other));
    });
    rows[at].scrollIntoView({ block: "nearest" });
    await follow();
  }
  async function follow() {
    clearTimeout(later);
    const asked = chosen;
    const read = await Promise.all(asked.map(source.curves));
    if (asked !== chosen || !curves.isConnected) return; // the cursor has moved on
    const content = JSON.stringify(read);
    if (content !== plotted) plot(read);
    plotted = content;
    if (source.live && !read.every((each) => each.finished)) again();
  }
  function again() {
    clearTimeout(later);
    if (!signal.aborted) later = setTimeout(() => follow().catch(again), 4000);
  }
  function plot(read) {
    const open = [...curves.querySelectorAll("details[open]")].map(sectionOf);
    const names = chosen.map((name, run) => h("span", { class: `name run${run}` }, name));
    put(curves,
      h("p", { class: "legend" }, names,
        chosen.length > 1 && h("a", { href: link("compare", { a: chosen[0], b: chosen[1] }) }, "compare"),
        h("span", { class: "quiet" }, `lines: means of ${SMOOTH} steps, each step faint; dots: held-out tasks with 95% intervals`)),
      charts(read),
    );
    if (!read.some((each) => each.metrics.length)) curves.append(h("p", { class: "quiet" }, "no metrics yet"));
    for (const details of curves.querySelectorAll("details")) details.open = open.includes(sectionOf(details));
  }
  if (runs.length) await draw();
  else main.append(h("p", { class: "quiet" }, "no runs here"));
  return {
    keys: {
      j: () => select(at + 1),
      k: () => select(at - 1),
      x: () => overlay(at),
      c: () => current.parameters.get("with") && go("compare", { a: runs[at].name, b: current.parameters.get("with") }),
      Enter: () => go("trees", { run: runs[at].name }),
      l: () => go("trees", { run: runs[at].name }),
      m: () => runs[at].lessons && go("lessons", { run: runs[at].name }),
    },
    help: [["j k", "next, previous run"], ["Enter or l", "its trees"], ["m", "its lessons"], ["x", "overlay its curves on another's"], ["c", "compare with the overlaid run"]],
  };
}
