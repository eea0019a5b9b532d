"use strict";
// The six figures, of the runs that pass the filters.

// The colours are variables of the style, which palette.py writes.
const colourOf = (criterion) =>
  DATA.palette.criteria.includes(criterion)
    ? `var(--c-${criterion.toLowerCase()})`
    : "var(--c-other)";

function methodColours(runs) {
  const sorted = [...runs].sort(
    (a, b) => a.stages - b.stages || a.schedule.localeCompare(b.schedule),
  );
  const order = [...groups(sorted, methodOf).keys()];
  return new Map(order.map((name, place) => [name, `var(--p-${place % DATA.palette.methods})`]));
}

const legendOf = (colours) => [...colours].map(([label, colour]) => ({ label, colour }));

const criterionLegend = (runs) =>
  legendOf(new Map(criteriaOf(runs).map((name) => [name, colourOf(name)])));

function rhoText(tuning) {
  const { correlations } = DATA.networks[state.network];
  const found = correlations.find((rho) => rho.tuning === tuning);
  if (!found || found.rho === null) return "";
  const [rho, low, high] = [found.rho, found.low, found.high].map((value) => value.toFixed(2));
  return `: ρ = ${rho} [${low}, ${high}], n = ${found.n}`;
}

function filesOf(prefix) {
  const slug = DATA.networks[state.network].name
    .toLowerCase()
    .replace(/[^a-z0-9.]+/g, "-")
    .replace(/^[-.]+|[-.]+$/g, "");
  return DATA.figures
    .filter((path) => path.startsWith(`figures/${prefix}--${slug}.`))
    .map((path) => ({ path, label: path.split(".").pop().toUpperCase() }));
}

function lossFigure(shown) {
  let runs = onePerSeed(shown.filter((run) => run.lossAfter !== null));
  const magnitude = runs.filter((run) => run.criterion === "MP");
  if (magnitude.length < runs.length) runs = runs.filter((run) => run.criterion !== "MP");
  const colours = methodColours(runs);
  const regs = ascending(runs.map((run) => run.reg));
  const x = categories(regs, FACETS.reg);
  const level =
    runs.some((run) => run.criterion !== "MP") && magnitude.length
      ? averaged(magnitude, (run) => run.lossAfter)
      : null;
  const values = runs.map((run) => run.lossAfter).concat(level ? [level.y] : []);
  const y = linear(values);
  const levels = level
    ? [{ y: level.y, colour: colourOf("MP"), title: `MP: ${short(level.y)} (n = ${level.n})` }]
    : [];
  const panels = perCriterion(runs, (criterion, own) =>
    panel({
      title: `${criterion}, ${nText(own, (run) => `${methodOf(run)} ${run.reg}`)}`,
      x,
      y,
      xLabel: "λ",
      yLabel: "training loss",
      levels,
      lines: [...groups(own, methodOf)].map(([method, rows]) => ({
        colour: colours.get(method),
        points: regs
          .filter((reg) => rows.some((run) => run.reg === reg))
          .map((reg) => {
            const here = rows.filter((run) => run.reg === reg);
            const point = averaged(here, (run) => run.lossAfter);
            const title = `${criterion} ${method}, λ ${FACETS.reg(reg)}: ${rangeText(point)}`;
            return { x: reg, ...point, title };
          }),
      })),
    }),
  );
  const legend = legendOf(colours).concat(
    level ? [{ label: `MP, n = ${level.n}`, colour: colourOf("MP") }] : [],
  );
  return figure(
    "Loss after pruning against λ",
    "Training loss right after pruning, mean over the seeds shown; the band is from the lowest " +
      "to the highest. n counts seeds.",
    legend,
    panels,
    filesOf("loss-against-lambda"),
  );
}

function errorFigure(shown) {
  const rows = shown.filter(
    (run) => run.tuned && run.error !== null && bestReg.get(methodKey(run)) === run.reg,
  );
  const stages = ascending(rows.map((run) => run.stages));
  const x = categories(stages, String);
  const y = linear(rows.map((run) => 100 * run.error));
  const panels = [...groups(rows, (run) => run.tuning)].map(([tuning, own]) =>
    panel({
      title: `${tuning}, ${nText(own, (run) => `${run.criterion} ${methodOf(run)}`)}`,
      x,
      y,
      xLabel: "stages π",
      yLabel: "test error, %",
      lines: [
        ...groups(own, (run) => run.criterion + (run.schedule === "linear" ? " linear" : "")),
      ].map(([name, part]) => ({
        colour: colourOf(part[0].criterion),
        points: ascending(part.map((run) => run.stages)).map((count) => {
          const here = part.filter((run) => run.stages === count);
          const point = averaged(here, (run) => 100 * run.error);
          return { x: count, ...point, title: `${name} π ${count}: ${rangeText(point, " %")}` };
        }),
      })),
    }),
  );
  return figure(
    "Error after fine-tuning against stages",
    "Test error of the network with the lowest validation error, at the best λ of each " +
      "criterion and π (lowest mean validation loss after pruning); mean and range over the " +
      "seeds shown.",
    criterionLegend(rows),
    panels,
    filesOf("error-against-stages"),
  );
}

function stageFigure(shown) {
  const parts = partsOf(DATA.stages, shown);
  const colours = methodColours(parts);
  const all = parts
    .flatMap((part) => part.points.flatMap(([, predicted, realised]) => [predicted, realised]))
    .filter((value) => value !== null);
  const x = symlog(all, 0.001);
  const ends = bounds(all);
  const panels = perCriterion(parts, (criterion, own) =>
    panel({
      title: `${criterion}, ${nText(own, methodOf)}`,
      x,
      y: x,
      xLabel: "predicted ΔL of a stage",
      yLabel: "realised ΔL of a stage",
      diagonal: ends,
      dots: own.flatMap((part) =>
        part.points
          .filter((point) => point[1] !== null && point[2] !== null)
          .map(([stage, predicted, realised]) => ({
            x: predicted,
            y: realised,
            colour: colours.get(methodOf(part)),
            title:
              `${criterion} ${methodOf(part)}, stage ${stage}, seed ${part.seed}: ` +
              `predicted ${short(predicted)}, realised ${short(realised)}`,
          })),
      ),
    }),
  );
  return figure(
    "Predicted against realised loss change, stage by stage",
    "On the examples that each stage measures, at the best λ. On the dashed line the model of " +
      "the loss is exact. MP predicts nothing.",
    legendOf(colours),
    panels,
    filesOf("predicted-against-realised"),
  );
}

function gapFigure(shown) {
  const runs = shown.filter((run) => run.tuned && run.lossChange !== null && run.gap !== null);
  const panels = [...groups(runs, (run) => run.tuning)].map(([tuning, own]) => {
    return panel({
      title: tuning + rhoText(tuning),
      x: linear(own.map((run) => run.lossChange)),
      y: linear(own.map((run) => 100 * run.gap)),
      xLabel: "ΔL by pruning",
      yLabel: "error gap, points",
      dots: own.map((run) => ({
        x: run.lossChange,
        y: 100 * run.gap,
        colour: colourOf(run.criterion),
        title: `${nameOf(run)}: ΔL ${short(run.lossChange)}, gap ${short(100 * run.gap)}`,
      })),
    });
  });
  return figure(
    "Loss change against error gap after fine-tuning",
    "A dot a run. The gap is the test error after fine-tuning minus that before pruning. ρ is " +
      "Spearman’s rank correlation over all fine-tuned runs of this network, whatever the " +
      "filters, with its 95 % bootstrap interval (2,000 resamples of runs).",
    criterionLegend(runs),
    panels,
    filesOf("loss-change-against-error-gap"),
  );
}

function layerFigure(shown) {
  const parts = partsOf(DATA.layers, shown);
  const colours = methodColours(parts);
  const names = unique(parts.flatMap((part) => part.names));
  const places = names.map((_, place) => place);
  const x = categories(places, (place) => names[place].replace(/\.weight$/, ""));
  const y = log(parts.flatMap((part) => part.kept.map((kept) => 100 * Math.max(kept, 1e-5))));
  const panels = perCriterion(parts, (criterion, own) =>
    panel({
      title: `${criterion}, ${nText(own, methodOf)}`,
      x,
      y,
      xLabel: "layer",
      yLabel: "weights kept, %",
      tilt: names.length > 4,
      lines: [...groups(own, methodOf)].map(([method, rows]) => ({
        colour: colours.get(method),
        points: places.map((place) => {
          const point = averaged(rows, (row) =>
            row.names.includes(names[place])
              ? 100 * row.kept[row.names.indexOf(names[place])]
              : null,
          );
          return {
            x: place,
            y: point ? point.y : null,
            title: point
              ? `${names[place]}, ${method}: ${short(point.y)} % kept, n = ${point.n}`
              : "",
          };
        }),
      })),
    }),
  );
  return figure(
    "Sparsity layer by layer",
    "Share of each layer’s weights that is kept, at the best λ, mean over the seeds shown.",
    legendOf(colours),
    panels,
    filesOf("layer-sparsity"),
  );
}

function curveFigure(shown) {
  const parts = partsOf(DATA.curves, shown);
  const colours = methodColours(parts);
  const x = linear(parts.flatMap((part) => part.points.map((point) => point[0])));
  const y = log(parts.flatMap((part) => part.points.map((point) => 100 * point[1])));
  const panels = perCriterion(parts, (criterion, own) =>
    panel({
      title: `${criterion}, ${nText(own, methodOf)}`,
      x,
      y,
      xLabel: "epoch",
      yLabel: "validation error, %",
      lines: [...groups(own, methodOf)].map(([method, rows]) => {
        const epochs = groups(
          rows.flatMap((row) => row.points),
          (point) => point[0],
        );
        return {
          colour: colours.get(method),
          bare: true,
          points: [...epochs]
            .sort((a, b) => a[0] - b[0])
            .map(([epoch, points]) => ({
              x: epoch,
              y: averaged(points, (point) => (point[1] === null ? null : 100 * point[1])).y,
            })),
        };
      }),
    }),
  );
  return figure(
    "Training curves",
    "Validation error while fine-tuning at the best λ, mean over the seeds shown.",
    legendOf(colours),
    panels,
    filesOf("training-curves"),
  );
}

function drawCharts(runs) {
  const pruning = runs.filter((run) => run.prunes);
  const shown = new Set(pruning.map((run) => run.id));
  id("charts").replaceChildren(
    lossFigure(pruning),
    errorFigure(pruning),
    gapFigure(pruning),
    stageFigure(shown),
    layerFigure(shown),
    curveFigure(shown),
  );
}
