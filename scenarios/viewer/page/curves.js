"use strict";
// Small charts of a run's metrics; two runs share the axes.

const WIDTH = 336;
const HEIGHT = 148;
const LEFT = 46;
const RIGHT = 10;
const TOP = 10;
const BOTTOM = 20;
const SMOOTH = 5; // steps in the running mean

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step) found.push(at);
  return found.map((at) => Number(at.toPrecision(12)));
}

/** At every point, the mean of the last SMOOTH points. */
function smoothed(line) {
  return line.map(([x], i) => [x, mean(line.slice(Math.max(0, i + 1 - SMOOTH), i + 1).map(([, y]) => y))]);
}

/** The chart of one metric of one or two runs: [{name, line: [[x, y]], marks: [[x, mean, low, high]]}]. */
function chart(title, series) {
  const xs = series.flatMap(({ line, marks }) => [...line, ...marks].map(([x]) => x));
  const ys = series.flatMap(({ line, marks }) => [...line.map(([, y]) => y), ...marks.flatMap((mark) => mark.slice(1))]);
  const left = Math.min(...xs);
  const right = Math.max(...xs, left + 1);
  const share = title === "success";
  let low = share ? 0 : Math.min(...ys, Math.min(...ys) > 0 && Math.min(...ys) < Math.max(...ys) / 2 ? 0 : Infinity);
  let high = share ? 1 : Math.max(...ys);
  if (low === high) [low, high] = [low - 1, high + 1];
  const toX = (x) => LEFT + ((x - left) / (right - left)) * (WIDTH - LEFT - RIGHT);
  const toY = (y) => TOP + ((high - y) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const path = (line) => line.map(([x, y], i) => `${i ? "L" : "M"}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`).join("");
  const svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": described(title, series) });
  for (const y of ticks(low, high, 5)) {
    svg.append(
      s("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: toY(y), y2: toY(y) }),
      s("text", { class: "tick", x: LEFT - 6, y: toY(y) + 3.5, "text-anchor": "end" }, share ? `${Math.round(100 * y)}%` : digits(y)),
    );
  }
  for (const x of ticks(left, right, 5).filter(Number.isInteger)) {
    svg.append(s("text", { class: "tick", x: toX(x), y: HEIGHT - 5, "text-anchor": "middle" }, String(x)));
  }
  series.forEach(({ line, marks }, run) => {
    const long = line.length > 4 * SMOOTH;
    if (long) svg.append(s("path", { class: `line faint run${run}`, d: path(line) }));
    if (line.length > 1) svg.append(s("path", { class: `line run${run}`, d: path(long ? smoothed(line) : line) }));
    else if (line.length) svg.append(s("circle", { class: `mark run${run}`, cx: toX(line[0][0]), cy: toY(line[0][1]), r: 2.5 }));
    for (const [x, y, least, most] of marks) {
      svg.append(
        s("line", { class: `interval run${run}`, x1: toX(x), x2: toX(x), y1: toY(least), y2: toY(most) }),
        s("circle", { class: `mark run${run}`, cx: toX(x), cy: toY(y), r: 3 }),
      );
    }
  });
  const rule = s("line", { class: "rule", y1: TOP, y2: HEIGHT - BOTTOM, x1: -9, x2: -9 });
  svg.append(rule);
  const reading = h("span", { class: "reading" });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = left + (((event.clientX - box.left) / box.width) * WIDTH - LEFT) * ((right - left) / (WIDTH - LEFT - RIGHT));
    const nearest = [...xs].sort((a, b) => Math.abs(a - at) - Math.abs(b - at))[0];
    rule.setAttribute("x1", toX(nearest));
    rule.setAttribute("x2", toX(nearest));
    const values = series.map(({ line, marks }) => [...line, ...marks].find(([x]) => x === nearest)?.[1]);
    put(reading, visible(`step ${nearest}: ${values.map((y) => (share ? percent(y) : digits(y))).join(" / ")}`));
  });
  svg.addEventListener("pointerleave", () => {
    rule.setAttribute("x1", -9);
    rule.setAttribute("x2", -9);
    put(reading);
  });
  return h("figure", { class: "chart" }, h("figcaption", null, h("span", null, title), reading), svg);
}

function described(title, series) {
  const told = series
    .filter(({ line }) => line.length)
    .map(({ name, line }) => `${name} from ${digits(line[0][1])} to ${digits(line.at(-1)[1])}`);
  return `${title} by step: ${told.join("; ")}`;
}

/** All numbers of a metrics row; those in groups are named group/name. */
function numbers(row) {
  const found = {};
  for (const [name, value] of Object.entries(row)) {
    if (name === "step" || name === "low" || name === "high") continue;
    if (isNumber(value)) found[name] = value;
    else if (value && typeof value === "object") {
      for (const [part, inner] of Object.entries(value)) if (isNumber(inner)) found[`${name}/${part}`] = inner;
    }
  }
  if (row.seconds) found.seconds = Object.values(row.seconds).filter(isNumber).reduce((sum, value) => sum + value, 0);
  return found;
}

const CHIEF = ["success", "return", "loss", "sampled_tokens", "seconds", "surprise", "turns", "tool_calls"];
// Evaluations, and the step of the improvement at which each is marked; null: the step that its row names.
const HELD_OUT = { "warmed up": 0, midway: null, trained: Infinity };

/** {stage: {metric: series}} of one run. A row with an interval is an evaluation: a mark among the improvement's steps. */
function stagesOf(curves) {
  const stages = {};
  const last = Math.max(0, ...curves.metrics.filter((row) => row.stage === "improvement").map((row) => row.step + 1));
  for (const row of curves.metrics) {
    const evaluation = isNumber(row.low) && isNumber(row.high);
    if (evaluation && !(row.stage in HELD_OUT)) continue;
    const stage = (stages[evaluation ? "improvement" : row.stage] ??= {});
    for (const [name, value] of Object.entries(evaluation ? { success: row.success } : numbers(row))) {
      const series = (stage[name] ??= { name: curves.name, line: [], marks: [] });
      if (evaluation) series.marks.push([Math.min(HELD_OUT[row.stage] ?? row.step, last), row.success, row.low, row.high]);
      else series.line.push([row.step, value]);
    }
  }
  return stages;
}

/** The charts of one or two runs: the metrics in CHIEF, then the others behind a heading that opens. */
function charts(runs) {
  const each = runs.map(stagesOf);
  const names = [...new Set(each.flatMap(Object.keys))].sort((a, b) => (b === "improvement") - (a === "improvement"));
  return names.map((stage) => {
    const metrics = [...new Set(each.flatMap((stages) => Object.keys(stages[stage] ?? {})))];
    const drawn = (name) =>
      chart(name, each.map((stages, run) => stages[stage]?.[name] ?? { name: runs[run].name, line: [], marks: [] }));
    const rest = metrics.filter((name) => !CHIEF.includes(name));
    const chief = CHIEF.filter((name) => metrics.includes(name));
    return h("section", { class: "charts", "aria-label": `${stage} curves` },
      h("h2", null, stage),
      h("div", { class: "grid-of-charts" }, chief.map(drawn)),
      rest.length > 0 && more(`${plural(rest.length, "more metric")}`, () => h("div", { class: "grid-of-charts" }, rest.map(drawn))),
    );
  });
}

/** A heading that opens. Its content is made when it opens for the first time. */
function more(title, make) {
  const details = h("details", null, h("summary", null, title));
  details.addEventListener("toggle", () => details.open && details.children.length < 2 && details.append(make()));
  return details;
}
