"use strict";
// Two episodes, or two runs, side by side; the first difference is marked.

/** An episode's name in an address: run:tree.rollout. */
function parseEpisode(name) {
  const match = /^(.*):(\d+)\.(\d+)$/s.exec(name ?? "");
  return match && { run: match[1], tree: Number(match[2]), rollout: Number(match[3]) };
}

const comparing = () => current.parameters.get("keep");

/** Keeps an episode for a comparison. If one is kept already, compares the two. */
function pin(run, tree, rollout) {
  const name = `${run}:${tree}.${rollout}`;
  const kept = comparing();
  if (kept && kept !== name) return go("compare", { a: kept, b: name });
  keep({ keep: kept ? null : name });
  showAgain();
}

/** The messages, actions and reward of an episode in order: [{turn, what, text}]. */
function partsOf(tree, rollout) {
  const parts = tree.messages.map((message) => ({ turn: 0, what: message.role, text: message.text }));
  tree.paths[rollout].forEach((i, turn) => {
    const node = tree.nodes[i];
    parts.push({ turn: turn + 1, what: "assistant", text: node.text });
    node.messages.forEach((message) => parts.push({ turn: turn + 1, what: message.role, text: message.text }));
    const end = node.terminated ? ", terminated" : node.truncated ? `, truncated: ${node.info.cause ?? "no cause given"}` : "";
    parts.push({ turn: turn + 1, what: "reward", text: `${signed(node.reward)} ${terms(node.terms)}${end}` });
  });
  return parts;
}

/** Pairs the parts of two episodes turn by turn: [[a or undefined, b or undefined]]. */
function aligned(a, b) {
  const pairs = [];
  const turns = Math.max(a.at(-1)?.turn ?? 0, b.at(-1)?.turn ?? 0);
  for (let turn = 0; turn <= turns; turn++) {
    const [left, right] = [a, b].map((parts) => parts.filter((part) => part.turn === turn));
    // The reward comes last on both sides.
    const longest = Math.max(left.length, right.length);
    const padded = [left, right].map((parts) => turn && parts.length ? [...parts.slice(0, -1), ...Array(longest - parts.length), parts.at(-1)] : parts);
    for (let i = 0; i < longest; i++) pairs.push([padded[0][i], padded[1][i]]);
  }
  return pairs;
}

/** How many characters two texts share at the start, and how many at the end, there in whole words. */
function parting(a, b) {
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a.at(-1 - end) === b.at(-1 - end)) end++;
  while (end && /\w/.test(a.at(-end)) && /\w/.test(a.at(-1 - end) ?? b.at(-1 - end) ?? " ")) end--;
  return [start, end];
}

function marked(text, other) {
  if (other === undefined || text === other) return visible(text);
  const [start, end] = parting(text, other);
  return [visible(text.slice(0, start)), h("mark", null, text.slice(start, text.length - end)), visible(text.slice(text.length - end))];
}

async function showCompare(main, parameters) {
  const names = [parameters.get("a"), parameters.get("b")];
  const episodes = names.map(parseEpisode);
  if (episodes.some((episode) => !episode)) return compareRuns(main, names);
  const trees = await Promise.all(episodes.map(({ run, tree }) => readTree(run, tree)));
  trees.forEach((tree, side) => {
    if (!tree.paths[episodes[side].rollout]) throw new Error(`there is no episode ${names[side]}`);
  });
  const [a, b] = trees.map((tree, side) => partsOf(tree, episodes[side].rollout));
  const pairs = aligned(a, b);
  const differing = pairs.map(([left, right]) => left?.text !== right?.text || left?.what !== right?.what);
  const first = differing.indexOf(true);
  const rows = pairs.map(([left, right], i) => {
    const same = !differing[i];
    const cellOf = (part, other) =>
      h("div", { class: `side ${part?.what ?? "missing"}`, role: "cell" }, part && [h("span", { class: "role" }, part.what, part.what === "assistant" && h("span", { class: "quiet" }, `turn ${part.turn}`)), h("div", { class: "text" }, marked(part.text, other?.text))], !part && h("span", { class: "quiet" }, "–"));
    return h("div", { class: `pair${same ? " same" : " differs"}${i === first ? " first" : ""}`, id: `pair${i}`, role: "row" },
      i === first && h("p", { class: "flag" }, "first difference"), cellOf(left, right), cellOf(right, left));
  });
  const where = first < 0 ? "the episodes are equal" : whereOf(pairs[first]);
  const headings = episodes.map(({ run, tree, rollout }, side) => h("div", { class: "side", role: "columnheader" },
    h("a", { href: link("episode", { run, tree, rollout }) }, `${run} ${tree}.${rollout}`), h("span", { class: "quiet" }, ` return ${points(trees[side].returns[rollout])} · ${ending(trees[side], rollout)}`)));
  put(main,
    h("h1", null, "two episodes", h("span", { class: "quiet" }, where)),
    h("div", { class: "compare", role: "table", "aria-label": "two episodes" }, h("div", { class: "pair heading", role: "row" }, headings), rows));

  let at = first;
  function jump(by) {
    for (let i = at + by; i >= 0 && i < rows.length; i += by) {
      if (differing[i]) {
        at = i;
        return draw();
      }
    }
  }
  function draw() {
    rows.forEach((row, i) => row.classList.toggle("at", i === at));
    rows[at]?.scrollIntoView({ block: "center" });
  }
  if (first >= 0) draw();
  return {
    keys: { j: () => jump(1), k: () => jump(-1), x: () => go("compare", { a: names[1], b: names[0] }) },
    help: [["j k", "next, previous difference"], ["x", "swap the sides"]],
  };
}

function whereOf([left, right]) {
  if (!left || !right) return `first difference: one has no ${(left ?? right).what} at turn ${(left ?? right).turn}`;
  const place = left.turn ? `turn ${left.turn}, ${left.what === "assistant" ? "action" : left.what}` : `prompt, ${left.what}`;
  return `first difference: ${place}, character ${parting(left.text, right.text)[0] + 1}`;
}

async function compareRuns(main, names) {
  const runs = await Promise.all(names.map((name) => source.curves(name)));
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.scenario)))];
  const values = keys.map((key) => runs.map((run) => run.scenario[key]));
  const first = values.findIndex(([a, b]) => a !== b);
  const differing = keys.flatMap((key, i) => (values[i][0] !== values[i][1] ? [i] : []));
  const setting = (i) => h("tr", { class: i === first ? "first" : "" }, h("th", { scope: "row" }, keys[i], i === first && h("span", { class: "flag" }, "first difference")), values[i].map((value) => h("td", null, h("code", null, value === undefined ? "–" : h("mark", null, value)))));
  const stages = [...new Set(runs.flatMap((run) => Object.keys(run.results)))];
  const part = firstStep(runs);
  put(main,
    h("h1", null, "two runs", h("span", { class: "quiet" }, part)),
    h("p", { class: "legend" }, names.map((name, run) => h("a", { class: `name run${run}`, href: link("trees", { run: name }) }, name))),
    h("table", { class: "settings", "aria-label": "results" },
      h("thead", null, h("tr", null, h("th", null, "held-out success"), names.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", null, stages.map((stage) => h("tr", null, h("th", { scope: "row" }, HEADINGS[stage] ?? stage), runs.map((run) => {
        const success = run.results[stage]?.success;
        return h("td", null, success ? `${percent(success.mean)}  (${percent(success.low)} … ${percent(success.high)})` : "–");
      }))))),
    h("table", { class: "settings", "aria-label": "settings that differ" },
      h("thead", null, h("tr", null, h("th", null, differing.length ? `${differing.length} of ${plural(keys.length, "setting")} differ` : "the settings are equal"), names.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", null, differing.map(setting))),
    h("div", { class: "curves" }, charts(runs)));
  return {
    keys: { x: () => go("compare", { a: names[1], b: names[0] }), h: () => go("runs", { run: names[0], with: names[1] }) },
    help: [["x", "swap the sides"], ["h", "the runs"]],
  };
}

/** The first row of metrics in which two runs differ, in words. The seconds of a step are not compared. */
function firstStep(runs) {
  const [a, b] = runs.map((run) => run.metrics.map(({ seconds, ...row }) => row));
  const length = Math.max(a.length, b.length);
  for (let i = 0; i < length; i++) {
    const row = a[i] ?? b[i];
    if (JSON.stringify(a[i]) !== JSON.stringify(b[i])) return `metrics part at ${row.stage}, step ${row.step}`;
  }
  return length ? "the metrics are equal" : "no metrics";
}
