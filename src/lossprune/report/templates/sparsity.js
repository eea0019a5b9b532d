"use strict";
// The figure over all sparsities of a dense network, of the runs that pass the filters.

const keptOf = (run) => 100 * (1 - DATA.networks[run.network].sparsity);

// Loss and error right after pruning, and the error after each tuning: what a panel each draws.
function sparsityMeasures(best) {
  const pruned = onePerSeed(best.filter((run) => run.lossAfter !== null));
  const tuned = best.filter((run) => run.tuned && run.error !== null);
  const tunings = [...groups(tuned, (run) => run.tuning)];
  tunings.sort(([a], [b]) => a.localeCompare(b));
  return [
    {
      yLabel: DATA.measures.loss,
      runs: pruned,
      value: (run) => run.lossAfter,
      dense: (run) => run.lossBefore,
    },
    {
      yLabel: DATA.measures["error after pruning"],
      runs: pruned,
      value: (run) => inPercent(run.errorPruned),
      dense: (run) => inPercent(run.errorBefore),
    },
    ...tunings.map(([tuning, runs]) => ({
      yLabel: DATA.measures.error + tuning,
      runs,
      value: (run) => 100 * run.error,
      dense: (run) => inPercent(run.errorBefore),
    })),
  ].filter(({ runs }) => runs.length);
}

function sparsityLine(own, value, dash) {
  const name = `${own[0].criterion} ${methodOf(own[0])}`;
  return {
    colour: colourOf(own[0].criterion),
    dash,
    points: ascending(own.map(keptOf)).map((kept) => {
      const runs = own.filter((run) => keptOf(run) === kept);
      const { y, ...rest } = averaged(runs, value);
      const regs = unique(runs.map((run) => FACETS.reg(run.reg))).join(", ");
      const title = `${name}, ${short(kept)} % kept, λ ${regs}: ${rangeText({ y, ...rest })}`;
      return { x: kept, y, title };
    }),
  };
}

function sparsityFigure() {
  const best = atBest(DATA.runs.filter((run) => atAnySparsity(run) && passesAll(run)));
  const stages = unique([...best].sort((a, b) => a.stages - b.stages).map((run) => methodOf(run)));
  const dashOf = (run) => DASHES[stages.indexOf(methodOf(run)) % DASHES.length];
  const methodName = (run) => `${run.criterion} ${methodOf(run)}`;
  const measures = sparsityMeasures(best);
  const x = falling(unique(measures.flatMap(({ runs }) => runs.map(keptOf))));
  const panels = measures.map(({ yLabel, runs, value, dense }) => {
    const levels = denseLevels(runs, dense);
    const inOrder = criteriaOf(runs).flatMap((name) => [
      ...groups(
        runs.filter((run) => run.criterion === name),
        methodName,
      ).values(),
    ]);
    return {
      title: `${yLabel}, ${nText(runs, (run) => `${methodName(run)} ${run.network}`)}`,
      x,
      y: linear([...runs.map(value), ...heights(levels)]),
      yLabel,
      levels,
      dots: runs.map((run) => seedDot(run, keptOf(run), value(run))),
      lines: inOrder.map((own) => sparsityLine(own, value, dashOf(own[0]))),
    };
  });
  const order = (run) => [DATA.criteria.indexOf(run.criterion), run.stages];
  const legend = [...groups(best, methodName)]
    .map(([label, [run]]) => ({ label, run, place: order(run) }))
    .sort((a, b) => a.place[0] - b.place[0] || a.place[1] - b.place[1])
    .map(({ label, run }) => ({ label, colour: colourOf(run.criterion), dash: dashOf(run) }));
  return named(
    "error-against-sparsity",
    "Of each criterion and π, at each sparsity, at the best of the λ shown (lowest mean " +
      "validation loss after pruning, over all seeds). Lines are means over the seeds shown, " +
      "small dots are seeds. All other figures are at the sparsity chosen above.",
    legend.concat(panels.length ? denseLegend(panels[0].levels) : []),
    panels,
    here().dense,
  );
}
