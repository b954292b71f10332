"use strict";
// One episode as a conversation.

const SHADES = ["log-probability", "entropy", "off"];

/** A call on one line. */
function callOf(call) {
  return `${call.name}(${line(call.arguments)})`;
}

/** An action, its tokens shaded by how unsure the policy was; below it the calls that the environment read in it. */
function actionOf(node, { shade } = {}) {
  const wanted = shade ?? (node.entropies.length ? "entropy" : "log-probability");
  const values = wanted === "off" ? [] : wanted === "entropy" ? node.entropies : node.logprobs.map((logprob) => -logprob);
  const body = h("div", { class: "text action" });
  if (!node.pieces || !values.length) {
    body.append(visible(node.text));
  } else {
    let start = 0;
    node.pieces.forEach((piece, i) => {
      if (!piece) return; // the next token completes the character
      const after = start >= node.text.length;
      const told = [JSON.stringify(piece), isNumber(node.logprobs[i]) && `log-probability ${nats(node.logprobs[i])} (${percent(Math.exp(node.logprobs[i]))})`, isNumber(node.entropies[i]) && `entropy ${nats(node.entropies[i])}`];
      body.append(h("span", { class: `token h${heat(Math.min(values[i], 4), 4)}${after ? " stop" : ""}`, title: told.filter(Boolean).join("\n") }, piece));
      start += piece.length;
    });
  }
  if (node.text === "" && !body.textContent) body.append(h("span", { class: "quiet" }, "(empty)"));
  if (node.calls.length) body.append(h("div", { class: "calls" }, node.calls.map((call) => h("span", { class: "call" }, callOf(call)))));
  return body;
}

function messageOf(message) {
  return h("div", { class: `message ${/^\w+$/.test(message.role) ? message.role : "other"}` }, h("span", { class: "role" }, message.role), h("div", { class: "text" }, message.text || h("span", { class: "quiet" }, "(empty)")));
}

async function showEpisode(main, parameters) {
  const [run, number] = [parameters.get("run"), Number(parameters.get("tree"))];
  const tree = await readTree(run, number);
  const rollout = Number(parameters.get("rollout") ?? winner(tree));
  const path = tree.paths[rollout];
  if (!path) throw new Error(`tree ${number} has ${plural(tree.leaves.length, "rollout")}; there is no #${rollout}`);
  const nodes = path.map((i) => tree.nodes[i]);
  const recorded = nodes.some((node) => node.entropies.length) ? SHADES : SHADES.filter((name) => name !== "entropy");
  const shade = recorded.includes(parameters.get("shade")) ? parameters.get("shade") : recorded[recorded.length - 2];
  const unshaded = nodes.every((node) => !node.pieces);
  const here = (changes) => ({ run, ...chosenFilters(), tree: number, rollout, ...(parameters.get("shade") && { shade }), ...changes });

  const turns = nodes.map((node, i) => {
    const advantage = tree.advantages?.[rollout]?.[i];
    const numbers = { ...turnNumbers(node), advantage: isNumber(advantage) ? signed(advantage) : null };
    const info = Object.keys(node.info).length ? more("info", () => h("pre", { class: "text" }, json(node.info))) : null;
    return h("section", { class: "turn", id: `turn${i + 1}`, "aria-label": `turn ${i + 1}`, onclick: () => select(i + 1, false) },
      h("div", { class: "message assistant" },
        h("span", { class: "role" }, "assistant", h("span", { class: "quiet" }, `turn ${i + 1}`)),
        h("div", null, actionOf(node, { shade }),
          h("p", { class: "numbers" }, Object.entries(numbers).filter(([name, value]) => value && name !== "reward").map(([name, value]) => h("span", null, h("i", null, name), ` ${value}`))))),
      node.messages.map((message) => messageOf(message)),
      h("p", { class: `reward ${node.reward > 0 ? "won" : node.reward < 0 ? "lost" : ""}` },
        h("span", null, h("i", null, "reward"), ` ${signed(node.reward)}`),
        Object.entries(node.terms).filter(([, value]) => value !== null).map(([name, value]) => h("span", { class: "term" }, h("i", null, name), ` ${digits(value)}`)), info));
  });
  const last = nodes.at(-1);
  const end = h("p", { class: `ending ${tree.succeeded ? (tree.succeeded[rollout] ? "won" : "lost") : ""}` },
    h("b", null, last.terminated ? "terminated" : last.truncated ? `truncated: ${last.info.cause ?? "no cause given"}` : "not ended"),
    ` after ${plural(nodes.length, "turn")} · return ${points(tree.returns[rollout])}${tree.succeeded ? ` · ${tree.succeeded[rollout] ? "success" : "failed"}` : ""}`);
  const rail = h("nav", { class: "rail", "aria-label": "turns" },
    h("h2", null, "rollouts"),
    h("div", { class: "chips" }, tree.leaves.map((_, i) => h("a", { href: link("episode", here({ rollout: i })), class: `chip ${tree.succeeded ? (tree.succeeded[i] ? "won" : "lost") : ""}`, "aria-current": i === rollout ? "page" : null, title: `return ${points(tree.returns[i])}, ${ending(tree, i)}` }, `#${i}`))),
    h("h2", null, "turns"),
    h("ol", null, nodes.map((node, i) => h("li", null, h("a", { href: link("episode", here({ turn: i + 1 })), onclick: (event) => { event.preventDefault(); select(i + 1); } },
      h("span", { class: "gist" }, gist(node)), node.reward ? h("span", { class: "number" }, signed(node.reward)) : h("span", { class: "number quiet" }, `${node.tokens}t`))))),
  );
  const shades = h("span", { class: "shades", role: "group", "aria-label": "shading" }, h("span", { class: "quiet" }, "shading"), recorded.map((name) => h("a", { href: link("episode", here({ shade: name, turn: current.parameters.get("turn") })), "aria-current": name === shade ? "true" : null }, name)),
    shade !== "off" && !unshaded && h("span", { class: "key" }, [0, 2, 4, 6, 8].map((level) => h("i", { class: `h${level}` }))), shade !== "off" && !unshaded && h("span", { class: "quiet" }, "0 to 4 nats"),
    unshaded && h("span", { class: "quiet" }, "no tokenizer in the run: means only"));
  put(main,
    h("h1", null, `episode ${number}.${rollout}`, facts(tree)),
    h("div", { class: "tools" }, h("a", { href: link("tree", { run, ...chosenFilters(), tree: number, node: path.at(-1) }) }, "tree"), h("button", { type: "button", onclick: () => pin(run, number, rollout) }, comparing() ? "compare with the kept one" : "compare with another"), shades),
    h("div", { class: "conversation" }, rail, h("article", { "aria-label": "conversation" }, lessonsOf(tree), tree.messages.map((message) => messageOf(message)), turns, end, more("task and info", () => h("pre", { class: "text" }, json({ task: tree.task, info: tree.info }))))));

  let at = Number(parameters.get("turn") ?? 0);
  function select(turn, scroll = true) {
    at = Math.min(Math.max(turn, 0), nodes.length);
    keep({ turn: at || null });
    draw(scroll);
  }
  function draw(scroll) {
    turns.forEach((element, i) => element.classList.toggle("at", i + 1 === at));
    rail.querySelectorAll("li a").forEach((element, i) => (i + 1 === at ? element.setAttribute("aria-current", "step") : element.removeAttribute("aria-current")));
    rail.querySelector("[aria-current=step]")?.scrollIntoView({ block: "nearest" });
    if (scroll && at) turns[at - 1].scrollIntoView({ block: "nearest" });
    if (scroll && !at) main.scrollIntoView({ block: "start" });
  }
  draw(at > 0);
  return {
    keys: {
      j: () => select(at + 1),
      k: () => select(at - 1),
      l: () => rollout + 1 < tree.leaves.length && go("episode", here({ rollout: rollout + 1 })),
      h: () => rollout > 0 && go("episode", here({ rollout: rollout - 1 })),
      t: () => go("tree", { run, ...chosenFilters(), tree: number, node: at ? path[at - 1] : null }),
      s: () => go("episode", here({ shade: recorded[(recorded.indexOf(shade) + 1) % recorded.length], turn: at || null })),
      c: () => pin(run, number, rollout),
      "[": () => neighbour(-1),
      "]": () => neighbour(1),
    },
    help: [["j k", "next, previous turn"], ["h l", "previous, next rollout"], ["t", "the tree"], ["s", "shading: log-probability, entropy, off"], ["c", "keep for a comparison, then compare"], ["[ ]", "previous, next tree"]],
  };
}
