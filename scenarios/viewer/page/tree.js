"use strict";
// One tree, drawn from left to right: each column is a turn, each row a branch.

const GAP = 18; // pixels between the columns
const LINE = 34; // pixels between the rows

/** The {column, row} of each node, and the path of each row. A node is in the row of its first child. */
function layout(tree) {
  const children = new Map([[-1, []], ...tree.nodes.map((_, node) => [node, []])]);
  tree.nodes.forEach((node, i) => children.get(node.parent).push(i));
  const places = [];
  const rows = []; // the last node of each row
  const stack = [...children.get(-1)].reverse();
  while (stack.length) {
    const node = stack.pop();
    places[node] = { column: tree.turns[node], row: rows.length };
    const next = children.get(node);
    if (next.length) stack.push(...[...next].reverse());
    else rows.push(node);
  }
  return { children, places, rows };
}

/** {state key: {name: a letter, nodes}} of the states in which branches meet: nodes of several branches lead to them. */
function meetings(tree) {
  const byKey = new Map();
  tree.nodes.forEach((node, i) => {
    if (node.key && !node.terminated && !node.truncated) byKey.set(node.key, [...(byKey.get(node.key) ?? []), i]);
  });
  const found = new Map();
  for (const [key, nodes] of byKey) {
    const last = new Set(pathTo(tree, nodes.at(-1)));
    const apart = nodes.some((node) => !last.has(node)) || nodes.some((node, i) => i && !pathTo(tree, node).includes(nodes[0]));
    if (apart) found.set(key, { name: letters(found.size), nodes });
  }
  return found;
}

function letters(number) {
  return (number >= 26 ? letters(Math.floor(number / 26) - 1) : "") + String.fromCharCode(65 + (number % 26));
}

/** What an action does, in a few characters: its first call, or how it begins. */
function gist(node) {
  const [call] = node.calls;
  const said = call ? `${call.name} ${Object.values(call.arguments).map((value) => (typeof value === "string" ? value : JSON.stringify(value))).join(" ")}` : node.text;
  return shown(said.replace(/\s+/g, " ").trim()) || "(empty)";
}

/** The level of shading, 0 to 8, of a value between 0 and the greatest. */
function heat(value, greatest) {
  return greatest > 0 ? Math.round((8 * Math.max(0, value)) / greatest) : 0;
}

/** The results of the rollouts through a node, in words. */
function fate(tree, rollouts) {
  if (!tree.succeeded) return "";
  const won = rollouts.filter((rollout) => tree.succeeded[rollout]).length;
  return won === rollouts.length ? "won" : won ? "mixed" : "lost";
}

async function showTree(main, parameters) {
  const [run, number] = [parameters.get("run"), Number(parameters.get("tree"))];
  const tree = await readTree(run, number);
  const { children, places, rows } = layout(tree);
  const best = winner(tree);
  const winning = new Set(tree.succeeded?.[best] || new Set(tree.returns).size > 1 ? tree.paths[best] : []);
  const through = tree.nodes.map(() => []);
  tree.paths.forEach((path, rollout) => path.forEach((node) => through[node].push(rollout)));
  const meets = meetings(tree);
  const unsure = tree.nodes.map((node) => unsureness(node));
  const means = unsure.map(({ values }) => (values.length ? mean(values) : 0));
  const greatest = Math.max(0, ...means);
  const measure = unsure.find(({ values }) => values.length)?.name ?? "surprise";
  const texts = tree.nodes.map((node) => gist(node));
  const small = parameters.get("labels") === "off";
  const longest = Math.min(22, Math.max(...texts.map((text) => text.length), 4));
  const boxWidth = small ? 12 : Math.round(longest * 6.7 + 14);
  const step = boxWidth + GAP;
  const pitch = small ? 22 : LINE;
  const half = small ? 6 : 11;
  const x = (column) => 14 + column * step - (small ? 0 : step - 64);
  const y = (row) => 22 + row * pitch;
  const depth = Math.max(...tree.turns);
  const width = x(depth) + boxWidth + 24 + 250;

  const svg = s("svg", { class: "tree", width, height: y(rows.length - 1) + 26, role: "tree", tabindex: 0, "aria-label": `tree ${number}: ${plural(tree.leaves.length, "rollout")}, ${plural(tree.nodes.length, "turn")}` });
  const rootX = small ? 14 : 8;
  const rootWidth = small ? 12 : 44;
  const ends = (node) => (node < 0 ? [rootX + rootWidth, y(0)] : [x(places[node].column) + boxWidth, y(places[node].row)]);
  const edges = tree.nodes.map((node, i) => {
    const [fromX, fromY] = ends(node.parent);
    const [toX, toY] = [x(places[i].column), y(places[i].row)];
    const bend = fromX + GAP * 0.55;
    const d = fromY === toY ? `M${fromX} ${fromY}H${toX}` : `M${fromX} ${fromY}C${bend} ${fromY} ${fromX + 3} ${toY} ${toX} ${toY}`;
    const edge = s("path", { class: `edge ${fate(tree, through[i])}${winning.has(i) ? " winning" : ""}`, d });
    edge.style.strokeWidth = `${1.1 + 0.7 * Math.log2(Math.max(1, through[i].length))}px`;
    return edge;
  });
  svg.append(...edges.filter((_, i) => !winning.has(i)), ...edges.filter((_, i) => winning.has(i)));
  svg.append(s("g", { class: "node root", role: "treeitem", id: "node-1", "aria-level": 1, "aria-label": "prompt", onclick: () => select(-1) },
    s("rect", { x: rootX, y: y(0) - half, width: rootWidth, height: 2 * half, rx: small ? 6 : 3 }),
    !small && s("text", { x: rootX + 22, y: y(0) + 4, "text-anchor": "middle" }, "prompt")));
  const drawn = tree.nodes.map((node, i) => {
    const { column, row } = places[i];
    const done = node.terminated || node.truncated;
    const meeting = meets.get(node.key);
    const label = `turn ${column}, ${texts[i]}, ${plural(node.tokens, "token")}, ${measure} ${nats(means[i])}` +
      `${node.reward ? `, reward ${points(node.reward)}` : ""}${children.get(i).length > 1 ? `, forks into ${children.get(i).length}` : ""}` +
      `${meeting && !done ? `, state ${meeting.name}` : ""}${winning.has(i) ? ", on the winning path" : ""}`;
    return s("g", { class: `node h${heat(means[i], greatest)}${winning.has(i) ? " winning" : ""}${done ? ` done ${fate(tree, through[i])}` : ""}${children.get(i).length > 1 ? " fork" : ""}`, role: "treeitem", id: `node${i}`, "aria-level": column + 1, "aria-label": label, onclick: () => select(i), ondblclick: () => openEpisode(i) },
      s("title", null, label),
      s("rect", { x: x(column), y: y(row) - half, width: boxWidth, height: 2 * half, rx: small ? 6 : 3 }),
      !small && s("text", { x: x(column) + 7, y: y(row) + 4 }, texts[i].length > longest ? `${texts[i].slice(0, longest - 1)}…` : texts[i]),
      !small && s("text", { class: "count", x: x(column) + boxWidth - 2, y: y(row) + half + 9, "text-anchor": "end" }, `${node.tokens}t${node.reward ? ` ${signed(node.reward)}` : ""}`),
      !done && meeting && s("text", { class: "meeting", x: x(column) + (small ? 6 : 3), y: y(row) + (small ? 3 : half + 9), "text-anchor": small ? "middle" : "start" }, meeting.name));
  });
  svg.append(...drawn);
  rows.forEach((leaf, row) => {
    const rollouts = through[leaf].filter((rollout) => tree.leaves[rollout] === leaf);
    if (!rollouts.length) return;
    const advantages = tree.advantages?.[rollouts[0]];
    const told = `${rollouts.map((rollout) => `#${rollout}`).join(" ")}  ${points(tree.returns[rollouts[0]])}  ${ending(tree, rollouts[0])}` +
      `${advantages?.length ? `  A ${signed(mean(advantages))}` : ""}${winning.size && rollouts.includes(best) ? "  best" : ""}`;
    svg.append(s("a", { href: link("episode", { run, ...chosenFilters(), tree: number, rollout: rollouts[0] }), class: `end ${fate(tree, rollouts)}`, tabindex: -1 },
      s("text", { x: x(places[leaf].column) + boxWidth + 10, y: y(row) + 4 }, told)));
  });
  const panel = h("aside", { class: "panel", "aria-label": "selected turn", "aria-live": "polite" });
  const legend = h("p", { class: "legend" },
    h("span", null, h("span", { class: "key" }, [0, 2, 4, 6, 8].map((level) => h("i", { class: `h${level}` }))), ` mean ${measure} of the action, 0 to ${nats(greatest)} nats`),
    winning.size > 0 && h("span", null, h("i", { class: "stroke winning" }), tree.succeeded?.[best] ? "winning path" : "best path"),
    h("span", null, h("i", { class: "stroke thick" }), "shared by several rollouts"),
    meets.size > 0 && h("span", null, h("b", { class: "meeting" }, "A"), " states in which branches meet"));
  put(main,
    h("h1", null, `tree ${number}`, facts(tree)),
    legend,
    h("div", { class: "split" }, h("div", { class: "canvas scroll" }, svg), panel));

  let at = parameters.has("node") ? Number(parameters.get("node")) : -1;
  if (!(at >= -1 && at < tree.nodes.length)) at = -1;
  function select(node) {
    at = node;
    keep({ node });
    draw();
  }
  function draw() {
    const peers = at >= 0 ? (meets.get(tree.nodes[at].key)?.nodes ?? []) : [];
    [svg.querySelector("#node-1"), ...drawn].forEach((element, i) => {
      element.classList.toggle("at", i - 1 === at);
      element.setAttribute("aria-selected", String(i - 1 === at));
      element.classList.toggle("peer", peers.length > 0 && i - 1 !== at && peers.includes(i - 1));
    });
    svg.setAttribute("aria-activedescendant", `node${at}`);
    const element = at < 0 ? svg.querySelector("#node-1") : drawn[at];
    element.querySelector("rect").scrollIntoView({ block: "nearest", inline: "nearest" });
    put(panel, at < 0 ? promptOf(tree) : nodeOf(tree, at, { rollouts: through[at], meeting: meets.get(tree.nodes[at].key), children: children.get(at), means, run, number }));
  }
  function openEpisode(node) {
    const rollout = node < 0 ? best : through[node].includes(best) ? best : (through[node][0] ?? best);
    go("episode", { run, ...chosenFilters(), tree: number, rollout, turn: node < 0 ? null : tree.turns[node] });
  }
  /** Goes to the nearest row above or below with another node in this column; in a shorter row, to its last node. */
  function move(by) {
    const column = at < 0 ? 0 : tree.turns[at];
    for (let row = (at < 0 ? 0 : places[at].row) + by; row >= 0 && row < rows.length; row += by) {
      const path = pathTo(tree, rows[row]);
      const node = path[Math.min(Math.max(column, 1), path.length) - 1];
      if (node !== at && Math.sign(places[node].row - (at < 0 ? -1 : places[at].row)) === by) return select(node);
    }
  }
  draw();
  return {
    keys: {
      j: () => move(1),
      k: () => move(-1),
      h: () => (at < 0 ? go("trees", { run, ...chosenFilters(), at: number }) : select(tree.nodes[at].parent)),
      l: () => children.get(at).length && select(children.get(at)[0]),
      w: () => select(tree.paths[best].at(-1)),
      t: () => go("tree", { ...Object.fromEntries(current.parameters), labels: small ? null : "off" }),
      Enter: () => openEpisode(at),
      c: () => pin(run, number, at < 0 ? best : (through[at][0] ?? best)),
      "[": () => neighbour(-1),
      "]": () => neighbour(1),
    },
    help: [["h l", "parent, first child"], ["j k", "next, previous branch"], ["w", "the winning leaf"], ["t", "labels on or off"], ["Enter", "the episode through this turn"], ["c", "compare this rollout with another"], ["[ ]", "previous, next tree"]],
  };
}

/** The facts beside a tree's heading: environment, stage, step, rollouts, mean return. */
function facts(tree) {
  const labels = ["stage", "step"].filter((name) => name in tree.labels).map((name) => (name === "stage" ? tree.labels.stage : `step ${tree.labels.step}`));
  const told = [tree.task.env.replace(/^treegym\//, ""), ...labels, `${plural(tree.leaves.length, "rollout")}`, `mean return ${points(mean(tree.returns))}`];
  return h("span", { class: "quiet", title: `seed ${tree.task.seed}` }, told.join(" · "));
}

function promptOf(tree) {
  return h("div", null,
    h("h2", null, "prompt", h("span", { class: "quiet" }, plural(tree.prompt, "token"))),
    lessonsOf(tree),
    tree.messages.map((message) => messageOf(message)),
    table({ seed: tree.task.seed, options: line(tree.task.options), settings: line(tree.task.settings), wrappers: tree.task.wrappers.filter(([name]) => name !== "WithNotes").map(([name, told]) => `${name} ${line(told)}`.trim()).join(" · "), "state key": tree.state_key }),
    more("info and cost", () => h("pre", { class: "text" }, json({ info: tree.info, cost: tree.cost }))));
}

/** The action of a node, the environment's answer, and its numbers. */
function nodeOf(tree, i, { rollouts, meeting, children, means, run, number }) {
  const node = tree.nodes[i];
  const turn = tree.turns[i];
  const advantages = tree.advantages ? rollouts.map((rollout) => `#${rollout} ${signed(tree.advantages[rollout]?.[turn - 1])}`).join("  ") : null;
  return h("div", null,
    h("h2", null, `turn ${turn}`, h("span", { class: "quiet" }, `node ${i} · rollouts ${rollouts.map((rollout) => `#${rollout}`).join(" ")}`)),
    actionOf(node, { shade: current.parameters.get("shade") }),
    node.messages.map((message) => messageOf(message)),
    table({
      ...turnNumbers(node),
      advantage: advantages,
      forks: children.length > 1 ? `${children.length}, mean ${unsureness(node).name} of the children ${nats(mean(children.map((child) => means[child])))}` : null,
      state: meeting ? `${meeting.name}, reached by ${plural(meeting.nodes.length, "turn")}` : null,
      "state key": node.key,
      ended: node.terminated ? "terminated" : node.truncated ? `truncated: ${node.info.cause ?? "no cause given"}` : null,
      info: line(node.info),
    }),
    h("p", null, h("span", { class: "quiet" }, rollouts.length > 1 ? "episodes " : "episode "), rollouts.map((rollout) => [h("a", { href: link("episode", { run, ...chosenFilters(), tree: number, rollout, turn }) }, `#${rollout}`), " "])));
}

/** The numbers of a turn. */
function turnNumbers(node) {
  const { logprobs, entropies } = node;
  return {
    tokens: `${node.tokens} sampled, ${node.observation} observed`,
    "log-probability": logprobs.length ? `${nats(mean(logprobs))} nats a token` : null,
    entropy: entropies.length ? `${nats(mean(entropies))} nats, first token ${nats(entropies[0])}` : null,
    reward: `${points(node.reward)}${terms(node.terms) ? `: ${terms(node.terms)}` : ""}`,
    stop: node.stop === "length" ? "cut at the token limit" : null,
    weights: versions(node),
  };
}

/** The versions of the weights that sampled a turn; null for version 0, which everything has that is not trained. */
function versions({ weights, last_weights: last }) {
  if (last !== null && last !== weights) return `versions ${weights} to ${last}`;
  return weights ? `version ${weights}` : null;
}

function table(rows) {
  return h("dl", { class: "facts" }, Object.entries(rows).filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) => [h("dt", null, name), h("dd", null, String(value))]));
}
