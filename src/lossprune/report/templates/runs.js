"use strict";
// The runs of the page, the filters that are set, and what passes them.

const DATA = JSON.parse(document.getElementById("data").textContent);
DATA.runs.forEach((run, place) => {
  run.id = place;
});
const REG = new Map(DATA.regs);
const FACETS = {
  criterion: (value) => value,
  stages: (value) => (value < 0 ? "auto" : String(value)), // found on the way
  reg: (value) => REG.get(value) ?? short(value),
  seed: String,
};
const state = {
  network: 0,
  criterion: new Set(),
  stages: new Set(),
  reg: new Set(),
  seed: new Set(),
  limit: 100,
  width: 0, // that the figures were drawn for
};

const id = (name) => document.getElementById(name);

const passes = (facet, value) => !state[facet].size || state[facet].has(value);

const here = () => DATA.networks[state.network];

// The networks that are one dense network at several sparsities.
const siblings = () => DATA.networks.filter((network) => network.dense === here().dense);

const sparsities = () => siblings().filter((network) => network.sparsity !== null);

const inNetwork = (run) =>
  run.network === state.network || (run.network < 0 && run.family === here().family);

// A budget finds a sparsity of its own, which is null here.
const atAnySparsity = (run) => run.prunes && sparsities().includes(DATA.networks[run.network]);

const baselineShown = (run) =>
  run.prunes || !(state.criterion.size || state.stages.size || state.reg.size);

const passesAll = (run) =>
  passes("seed", run.seed) &&
  baselineShown(run) &&
  (!run.prunes ||
    (passes("criterion", run.criterion) && passes("stages", run.stages) && passes("reg", run.reg)));

const visible = (run) => inNetwork(run) && passesAll(run);

const methodOf = (run) =>
  `π ${FACETS.stages(run.stages)}${run.schedule === "linear" ? " linear" : ""}`;

const nameOf = (run) =>
  run.prunes
    ? `${run.criterion} ${methodOf(run)}, λ ${FACETS.reg(run.reg)}, seed ${run.seed}`
    : `${run.sparsity ? "pruned before" : "baseline"}, seed ${run.seed}`;

const inPercent = (value) => (value === null ? null : 100 * value);

const signed = (value) => (value < 0 ? "" : "+") + value.toFixed(4);

const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(2)} %`);

const unique = (values) => [...new Set(values)];

const ascending = (values) => unique(values).sort((a, b) => a - b);

function groups(rows, key) {
  const found = new Map();
  for (const row of rows) {
    const name = key(row);
    if (!found.has(name)) found.set(name, []);
    found.get(name).push(row);
  }
  return found;
}

function averaged(rows, value) {
  const numbers = rows.map(value).filter((number) => number !== null);
  if (!numbers.length) return null;
  const mean = numbers.reduce((sum, number) => sum + number, 0) / numbers.length;
  return { y: mean, low: Math.min(...numbers), high: Math.max(...numbers), n: numbers.length };
}

// The same pruning, evaluated alone and before fine-tuning, is one measurement.
function onePerSeed(runs) {
  const chosen = new Map();
  for (const run of runs) {
    const key = [methodKey(run), run.reg, run.seed].join("|");
    if (!chosen.has(key) || chosen.get(key).epochs < run.epochs) chosen.set(key, run);
  }
  return [...chosen.values()];
}

const criteriaOf = (runs) =>
  DATA.criteria.filter((name) => runs.some((run) => run.criterion === name));

// What the page knows along the stages, epochs or layers of the runs shown, with their settings.
const partsOf = (parts, shown) =>
  parts.filter((part) => shown.has(part.run)).map((part) => ({ ...DATA.runs[part.run], ...part }));

const rangeText = ({ y, low, high, n }, unit = "") =>
  `${short(y)}${unit} [${short(low)}, ${short(high)}], n = ${n}`;

function nText(own, key) {
  const counts = [...groups(own, key).values()].map(
    (rows) => unique(rows.map((row) => row.seed)).length,
  );
  const [low, high] = [Math.min(...counts), Math.max(...counts)];
  return low === high ? `n = ${low}` : `n = ${low}–${high}`;
}

function perCriterion(runs, draw) {
  return criteriaOf(runs).map((name) => {
    const own = runs.filter((run) => run.criterion === name);
    return draw(name, own);
  });
}

const methodKey = (run) => [run.network, run.criterion, run.stages, run.schedule].join("|");

// The runs of each method at the best of the λ that are among them.
function atBest(runs) {
  const best = new Map();
  for (const run of runs)
    if (run.rank !== null)
      best.set(methodKey(run), Math.min(best.get(methodKey(run)) ?? Infinity, run.rank));
  return runs.filter((run) => run.rank === best.get(methodKey(run)));
}
