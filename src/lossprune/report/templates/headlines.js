"use strict";
// The tiles above the figures: what is best of the runs that pass the filters, and best of what.

function ranks(values) {
  const order = values.map((_, place) => place).sort((a, b) => values[a] - values[b]);
  const found = new Array(values.length);
  for (let first = 0; first < order.length;) {
    let next = first;
    while (next < order.length && values[order[next]] === values[order[first]]) next++;
    for (let place = first; place < next; place++) found[order[place]] = (first + next + 1) / 2;
    first = next;
  }
  return found;
}

function spearman(x, y) {
  const [a, b] = [ranks(x), ranks(y)];
  const middle = (x.length + 1) / 2; // the mean rank, whatever the ties
  const sum = (left, right) =>
    left.reduce((total, rank, place) => total + (rank - middle) * (right[place] - middle), 0);
  return sum(a, b) / Math.sqrt(sum(a, a) * sum(b, b));
}

// Of all runs of a tuning the report has ρ with its interval; of some of them there is ρ alone.
function correlation(tuning, runs) {
  const known = here().correlations.find((rho) => rho.tuning === tuning);
  if (known && known.n === runs.length && known.rho !== null) {
    const [rho, low, high] = [known.rho, known.low, known.high].map((value) => value.toFixed(2));
    return { rho, low, high, n: known.n };
  }
  if (runs.length < 4) return null;
  const rho = spearman(
    runs.map((run) => run.lossChange),
    runs.map((run) => run.gap),
  );
  return Number.isFinite(rho) ? { rho: rho.toFixed(2), n: runs.length } : null;
}

// The group of runs with the lowest mean, among those with the most seeds; null of none.
function lowest(found, value) {
  const measured = [...found.values()].map((runs) => ({ runs, ...averaged(runs, value) }));
  const most = Math.max(0, ...measured.map(({ n }) => n ?? 0));
  const competing = measured.filter(({ n }) => n === most && most > 0);
  competing.sort((a, b) => a.y - b.y);
  return competing.length ? { ...competing[0], among: competing.length } : null;
}

const counted = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

const methodAndReg = (run) => `${run.criterion} ${methodOf(run)}, λ ${FACETS.reg(run.reg)}`;

function changeTiles(runs) {
  const pruned = onePerSeed(runs.filter((run) => run.lossChange !== null));
  const first = lowest(groups(atBest(pruned), methodKey), (run) => run.lossChange);
  if (!first) return [];
  const regs = unique(pruned.map((run) => run.reg)).length;
  const name = methodAndReg(first.runs[0]);
  const among =
    `lowest of ${counted(first.among, "criterion and π", "criteria and π")} at ` +
    here().removed +
    (regs > 1 ? `, each at the best of up to ${regs} λ by validation loss` : "");
  const tiles = [
    ["Lowest loss change by pruning", signed(first.y), `${name}, n = ${first.n}: ${among}`],
  ];
  // Chosen by the loss right after pruning: its test error is looked up, not searched.
  const { criterion, stages, schedule, reg } = first.runs[0];
  const same = runs.filter(
    (run) =>
      run.tuned &&
      run.error !== null &&
      [run.criterion, run.stages, run.schedule, run.reg].join() ===
        [criterion, stages, schedule, reg].join(),
  );
  for (const [tuning, own] of groups(same, (run) => run.tuning)) {
    const { y, n } = averaged(own, (run) => run.error);
    tiles.push(["Its test error after fine-tuning", percent(y), `${name}, n = ${n}, ${tuning}`]);
  }
  return tiles;
}

function errorTiles(tuning, runs) {
  const key = (run) => `${methodKey(run)}|${run.reg}`;
  const first = lowest(groups(runs, key), (run) => run.validError);
  if (!first) return [];
  const test = averaged(first.runs, (run) => run.error);
  const under =
    `${methodAndReg(first.runs[0])}, n = ${first.n}, ${tuning}: lowest mean validation error ` +
    `(${percent(first.y)}) of ${counted(first.among, "criterion, π and λ", "criteria, π and λ")} ` +
    `at ${here().removed}, ${counted(runs.length, "run", "runs")}`;
  return [["Test error at the lowest validation error", percent(test.y), under]];
}

function correlationTiles(tuning, runs) {
  const found = correlation(
    tuning,
    runs.filter((run) => run.lossChange !== null && run.gap !== null),
  );
  if (!found) return [];
  const interval =
    found.low === undefined ? "of the runs shown" : `95 % interval ${found.low} to ${found.high}`;
  const under = `${interval}, n = ${found.n} runs, ${tuning}`;
  return [["Loss change and error gap, Spearman’s ρ", found.rho, under]];
}

// How many of the report's runs pass the filters; what was left out passes none.
function drawCounts(runs) {
  const statuses = {
    runs: null,
    finished: "finished",
    unfinished: "running",
    diverged: "diverged",
  };
  for (const [name, status] of Object.entries(statuses)) {
    const counts = [runs, DATA.runs].map(
      (list) => list.filter((run) => !status || run.status === status).length,
    );
    const [passing, all] = counts.map((count) => count.toLocaleString("en"));
    const rest = passing === all ? [] : [el("small", {}, `of ${all} in the report`)];
    document.querySelector(`[data-count="${name}"]`)?.replaceChildren(passing, ...rest);
  }
}

function drawHeadlines(runs) {
  drawCounts(runs);
  const prunings = runs.filter((run) => run.prunes);
  const tuned = prunings.filter((run) => run.tuned && run.error !== null);
  const tunings = [...groups(tuned, (run) => run.tuning)];
  const tiles = [
    ...changeTiles(prunings),
    ...tunings.flatMap(([tuning, own]) => errorTiles(tuning, own)),
    ...tunings.flatMap(([tuning, own]) => correlationTiles(tuning, own)),
  ];
  id("headlines").replaceChildren(
    ...tiles.map(([label, value, under]) =>
      el(
        "div",
        { class: "tile" },
        el("dt", {}, label),
        el("dd", {}, value, el("small", {}, under)),
      ),
    ),
  );
}
