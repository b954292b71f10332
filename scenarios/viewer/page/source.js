"use strict";
// Where the runs come from: the server, or the data in this file.

// The conditions on trees, which agents/store/where.py defines, and the order of a listing.
const FILTERS = ["stage", "steps", "env", "returns", "term", "rollouts", "success", "cause", "text", "order"];
const STATES = ["proposed", "active", "retired", "replaced"]; // of lessons, as agents/memory/lesson.py has them
const IN_FORCE = STATES.slice(0, 2);
const SLACK = 1e-6; // by which ranges of reward terms are extended, as in agents/tree.py

async function ask(path, parameters) {
  const answer = await fetch(`api/${path}?${new URLSearchParams(parameters)}`);
  const content = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(content.error), { refused: answer.status < 500 }); // the same request would be refused again
  return content;
}

const server = {
  live: true,
  runs: () => ask("runs", {}),
  curves: (run) => ask("curves", { run }),
  trees: (run, question) => ask("trees", { run, ...question }),
  tree: (run, tree) => ask("tree", { run, tree }),
  lessons: (run, question) => ask("lessons", { run, ...question }),
  lesson: (run, lesson) => ask("lesson", { run, lesson }),
};

/** The text of a lesson in which words are looked for, as viewer/lessons.py has it. */
function searchedOf({ id, text, when, env, tags }) {
  return [id, text, when, env, ...tags].join(" ").toLowerCase();
}

/** Gives the answers of the server from the data that an exported file holds. */
function exported(data) {
  const held = (content, what) => {
    if (content === undefined) throw new Error(`this file does not hold ${what}`);
    return content;
  };
  const pagesOf = (run) => {
    const { pages, error } = held(data.lessons[run], `lessons of ${run}`);
    if (error) throw new Error(error);
    return pages;
  };
  return {
    live: false,
    runs: async () => ({ title: data.title, runs: data.runs }),
    curves: async (run) => held(data.curves[run], `the run ${run}`),
    tree: async (run, tree) => held(data.trees[run]?.[tree], `tree ${tree} of ${run}`),
    trees: async (run, question) => {
      const rows = held(data.rows[run], `the run ${run}`);
      const matching = rows.filter((row) => passes(row, question) && holds(data.trees[run][row.number], question.text));
      const key = (question.order ?? "").replace("-", "");
      const way = (question.order ?? "").startsWith("-") ? -1 : 1;
      if (key) matching.sort((a, b) => way * ((a[key] ?? -Infinity) - (b[key] ?? -Infinity)));
      const offset = Number(question.offset ?? 0);
      const names = (values) => [...new Set(values)].sort();
      return {
        known: rows.length,
        complete: true,
        matching: matching.length,
        offset,
        place: matching.findIndex((row) => String(row.number) === question.at),
        rows: matching.slice(offset, offset + Number(question.limit ?? 1000)),
        stages: names(rows.map((row) => String(row.stage ?? ""))),
        envs: names(rows.map((row) => row.env)),
        causes: names(rows.flatMap((row) => Object.keys(row.causes))),
        lessons: Object.hasOwn(data.lessons, run),
      };
    },
    lessons: async (run, { state = "", words = "" }) => {
      const of = { "": IN_FORCE, "in-force": IN_FORCE, all: STATES };
      const rows = pagesOf(run).map(({ lesson }) => lesson).filter((row) => (of[state] ?? [state]).includes(row.state));
      const parts = words.toLowerCase().split(/\s+/).filter(Boolean);
      const matching = rows.filter((row) => parts.every((part) => searchedOf(row).includes(part)));
      return { known: rows.length, matching: matching.length, rows: matching };
    },
    lesson: async (run, number) => held(pagesOf(run).find(({ lesson }) => lesson.id === Number(number)), `lesson ${number} of ${run}`),
  };
}

/** The ends of LOW:HIGH, either of which may be missing; a number alone is both. */
function range(name, text) {
  const [low, high = low, ...more] = text.replace("..", ":").split(":").map((end) => end.trim()); // earlier pages wrote LOW..HIGH
  const ends = [low ? Number(low) : -Infinity, high ? Number(high) : Infinity];
  if (!(low || high) || more.length || ends.some(Number.isNaN)) {
    throw new Error(`${name}: a number or LOW:HIGH with either end left out, such as 3, 0.5: or :8, got '${text}'`);
  }
  return ends;
}

/** [name, ends] of each NAME=LOW:HIGH; commas stand between them. */
function termRanges(text) {
  const names = new Set();
  return text.split(",").map((part) => {
    const [, name, bounds] = part.trim().match(/^([^=]+)=(.*)$/s) ?? [];
    if (!name) throw new Error(`term: NAME=LOW:HIGH with either end left out, such as exact=0.5:, got '${part}'`);
    if (names.has(name)) throw new Error(`term: one range for each name, got two for ${name}`);
    names.add(name);
    const [low, high] = range(`term ${name}`, bounds);
    return [name, [low - SLACK, high + SLACK]];
  });
}

function passes(row, question) {
  const within = (value, [low, high]) => isNumber(value) && low <= value && value <= high;
  const numbers = { steps: row.step, returns: row.mean_return, rollouts: row.rollouts };
  const share = row.success;
  const success = { all: share >= 1, some: share > 0, mixed: share > 0 && share < 1, none: share <= 0 };
  return (
    (!question.stage || question.stage === row.stage) &&
    (!question.env || question.env === row.env) &&
    Object.entries(numbers).every(([name, value]) => !question[name] || within(value, range(name, question[name]))) &&
    (!question.term || termRanges(question.term).every(([name, ends]) => within(row.terms[name], ends))) &&
    (!question.success || (share !== null && success[question.success])) &&
    (!question.cause || Object.hasOwn(row.causes, question.cause))
  );
}

function holds(tree, text) {
  if (!text) return true;
  const texts = [tree.messages, ...tree.nodes.map((node) => node.messages)].flat().map((message) => message.text);
  return [...texts, ...tree.nodes.map((node) => node.text)].some((each) =>
    each.toLowerCase().includes(text.toLowerCase()),
  );
}

const held = document.getElementById("data");
const source = held ? exported(JSON.parse(held.textContent)) : server;

const lastTrees = new Map(); // the trees that were read last, shared by the pages of trees, episodes and comparisons
async function readTree(run, number) {
  const key = `${number} ${run}`;
  if (!lastTrees.has(key)) {
    const tree = await source.tree(run, number);
    tree.paths = tree.leaves.map((leaf) => pathTo(tree, leaf));
    tree.turns = tree.nodes.map((_, node) => pathTo(tree, node).length);
    lastTrees.set(key, tree);
    if (lastTrees.size > 6) lastTrees.delete(lastTrees.keys().next().value);
  }
  return lastTrees.get(key);
}

function pathTo(tree, node) {
  const path = [];
  for (let at = node; at >= 0; at = tree.nodes[at].parent) path.unshift(at);
  return path;
}

/** The rollout that did best: one that succeeded, then the highest return, then the first. */
function winner(tree) {
  const rank = (rollout) => (tree.succeeded?.[rollout] ? 1e9 : 0) + tree.returns[rollout];
  return tree.leaves.reduce((best, _, rollout) => (rank(rollout) > rank(best) ? rollout : best), 0);
}

/** How unsure the policy was of each token of an action: the entropies, or without them the sampled tokens' surprise. */
function unsureness(node) {
  if (node.entropies.length) return { name: "entropy", values: node.entropies };
  return { name: "surprise", values: node.logprobs.map((logprob) => -logprob) };
}

/** How a rollout ended, in words. */
function ending(tree, rollout) {
  const last = tree.nodes[tree.leaves[rollout]];
  if (last.truncated) return String(last.info.cause ?? "truncated");
  if (tree.succeeded) return tree.succeeded[rollout] ? "success" : "failed";
  return last.terminated ? "terminated" : "open";
}
