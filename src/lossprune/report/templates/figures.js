"use strict";
// The figures of one network, of the runs that pass the filters.

// The colours are variables of the style, which palette.py writes.
function colourOf(criterion) {
  const [name] = criterion.split("+");
  if (!DATA.palette.criteria.includes(name)) return "var(--c-other)";
  const moved = DATA.criteria.filter((other) => other.startsWith(`${name}+`));
  const shade = criterion === name ? "" : `-${moved.indexOf(criterion) % DATA.palette.shades}`;
  return `var(--c-${name.toLowerCase()}${shade})`;
}

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

// The networks before pruning: a dotted line, the mean over the seeds shown.
function denseLevels(runs, value) {
  const firsts = [...groups(runs, (run) => run.seed).values()].map((rows) => rows[0]);
  const point = averaged(firsts, value);
  const title = point ? `dense: ${short(point.y)} (n = ${point.n})` : "";
  return point ? [{ y: point.y, colour: "var(--soft)", dash: DOTTED, title }] : [];
}

const denseLegend = (levels) =>
  levels.length ? [{ label: "dense", colour: "var(--soft)", dash: DOTTED }] : [];

// One seed beside the mean of all.
const seedDot = (run, x, y) => ({
  x,
  y,
  r: 1.8,
  colour: colourOf(run.criterion),
  title: `${nameOf(run)}: ${short(y)}`,
});

const heights = (levels) => levels.map((level) => level.y);

function rhoText(tuning, runs) {
  const found = correlation(tuning, runs);
  if (!found) return "";
  const interval = found.low === undefined ? "" : ` [${found.low}, ${found.high}]`;
  return `: ρ = ${found.rho}${interval}, n = ${found.n}`;
}

// A figure by its name: its title, files and axes are those of the files beside the page.
function named(name, caption, legend, panels, network = here().name) {
  const { title, x, y } = DATA.labels[name];
  const at = network === here().name && siblings().length > 1 ? `, ${here().removed}` : "";
  const files = ["png", "svg", "pdf"]
    .map((kind) => ({
      path: `figures/${name}--${DATA.slugs[network]}.${kind}`,
      label: kind.toUpperCase(),
    }))
    .filter(({ path }) => DATA.figures.includes(path));
  const labelled = panels.map((panel) => ({ xLabel: x, yLabel: y, ...panel }));
  return figure(title + at, caption, legend, labelled, files);
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
  const dense = denseLevels(runs, (run) => run.lossBefore);
  const levels = [...dense];
  if (level)
    levels.push({
      y: level.y,
      colour: colourOf("MP"),
      dash: DASHES[1],
      title: `MP: ${short(level.y)} (n = ${level.n})`,
    });
  const y = linear([...runs.map((run) => run.lossAfter), ...heights(levels)]);
  const panels = perCriterion(runs, (criterion, own) => ({
    title: `${criterion}, ${nText(own, (run) => `${methodOf(run)} ${run.reg}`)}`,
    x,
    y,
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
  }));
  const legend = legendOf(colours).concat(
    level ? [{ label: `MP, n = ${level.n}`, colour: colourOf("MP"), dash: DASHES[1] }] : [],
    denseLegend(dense),
  );
  return named(
    "loss-against-lambda",
    "Training loss right after pruning, mean over the seeds shown; the band is from the lowest " +
      "to the highest. n counts seeds.",
    legend,
    panels,
  );
}

function errorFigure(shown) {
  const rows = atBest(shown).filter((run) => run.tuned && run.error !== null);
  const stages = ascending(rows.map((run) => run.stages));
  const x = categories(stages, FACETS.stages);
  const criteria = criteriaOf(rows);
  const aside = (criterion) => 7 * (criteria.indexOf(criterion) - (criteria.length - 1) / 2);
  const levels = denseLevels(rows, (run) => inPercent(run.errorBefore));
  const y = linear([...rows.map((run) => 100 * run.error), ...heights(levels)]);
  const panels = [...groups(rows, (run) => run.tuning)].map(([tuning, own]) => ({
    title: `${tuning}, ${nText(own, (run) => `${run.criterion} ${methodOf(run)}`)}`,
    x,
    y,
    levels,
    dots: own.map((run) => ({
      ...seedDot(run, run.stages, 100 * run.error),
      aside: aside(run.criterion),
    })),
    lines: [
      ...groups(own, (run) => run.criterion + (run.schedule === "linear" ? " linear" : "")),
    ].map(([name, part]) => ({
      colour: colourOf(part[0].criterion),
      dash: part[0].schedule === "linear" ? DASHES[1] : DASHES[0],
      points: ascending(part.map((run) => run.stages)).map((count) => {
        const own = part.filter((run) => run.stages === count);
        const { y, ...point } = averaged(own, (run) => 100 * run.error);
        const title = `${name} π ${FACETS.stages(count)}: ${rangeText({ y, ...point }, " %")}`;
        return { x: count, y, aside: aside(part[0].criterion), title };
      }),
    })),
  }));
  return named(
    "error-against-stages",
    "Test error of the network with the lowest validation error, at the best of the λ shown of " +
      "each criterion and π (lowest mean validation loss after pruning, over all seeds). Lines " +
      "are means over the seeds shown, small dots are seeds.",
    criterionLegend(rows).concat(denseLegend(levels)),
    panels,
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
  const panels = perCriterion(parts, (criterion, own) => ({
    title: `${criterion}, ${nText(own, methodOf)}`,
    x,
    y: x,
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
  }));
  return named(
    "predicted-against-realised",
    "On the examples that each stage measures, at the best λ. On the dashed line the model of " +
      "the loss is exact. MP predicts nothing.",
    legendOf(colours),
    panels,
  );
}

function gapFigure(shown) {
  const runs = shown.filter((run) => run.tuned && run.lossChange !== null && run.gap !== null);
  const levels = runs.length
    ? [{ y: 0, colour: "var(--soft)", dash: DOTTED, title: "dense: no gap" }]
    : [];
  const panels = [...groups(runs, (run) => run.tuning)].map(([tuning, own]) => ({
    title: tuning + rhoText(tuning, own),
    x: linear(own.map((run) => run.lossChange)),
    y: linear([...own.map((run) => 100 * run.gap), 0]),
    levels,
    dots: own.map((run) => ({
      x: run.lossChange,
      y: 100 * run.gap,
      colour: colourOf(run.criterion),
      title: `${nameOf(run)}: ΔL ${short(run.lossChange)}, gap ${short(100 * run.gap)}`,
    })),
  }));
  return named(
    "loss-change-against-error-gap",
    "A dot a run. The gap is the test error after fine-tuning minus that before pruning. ρ is " +
      "Spearman’s rank correlation over the fine-tuned runs shown; of all of them with its 95 % " +
      "bootstrap interval (2,000 resamples of runs).",
    criterionLegend(runs).concat(denseLegend(levels)),
    panels,
  );
}

function layerFigure(shown) {
  const parts = partsOf(DATA.layers, shown);
  const colours = methodColours(parts);
  const longest = [...parts].sort((a, b) => b.names.length - a.names.length); // some lack a layer
  const names = unique(longest.flatMap((part) => part.names));
  const places = names.map((_, place) => place);
  const x = categories(places, (place) => names[place].replace(/\.weight$/, ""));
  const y = log(parts.flatMap((part) => part.kept.map((kept) => 100 * Math.max(kept, 1e-5))));
  const panels = perCriterion(parts, (criterion, own) => ({
    title: `${criterion}, ${nText(own, methodOf)}`,
    x,
    y,
    tilt: names.length > 4,
    lines: [...groups(own, methodOf)].map(([method, rows]) => ({
      colour: colours.get(method),
      points: places.map((place) => {
        const point = averaged(rows, (row) =>
          row.names.includes(names[place]) ? 100 * row.kept[row.names.indexOf(names[place])] : null,
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
  }));
  return named(
    "layer-sparsity",
    "Share of each layer’s weights that is kept, at the best λ, mean over the seeds shown.",
    legendOf(colours),
    panels,
  );
}

function curveFigure(shown) {
  const parts = partsOf(DATA.curves, shown);
  const colours = methodColours(parts);
  const x = linear(parts.flatMap((part) => part.points.map((point) => point[0])));
  const dense = denseLevels(parts, (run) => inPercent(run.validBefore));
  const levels = dense.filter((level) => level.y > 0); // 0 has no place on this axis
  const errors = parts.flatMap((part) => part.points.map((point) => inPercent(point[1])));
  const y = log([...errors, ...heights(levels)]);
  const panels = perCriterion(parts, (criterion, own) => ({
    title: `${criterion}, ${nText(own, methodOf)}`,
    x,
    y,
    levels,
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
            y: averaged(points, (point) => inPercent(point[1]))?.y ?? null,
          })),
      };
    }),
  }));
  return named(
    "training-curves",
    "At the best λ, mean over the seeds shown.",
    legendOf(colours).concat(denseLegend(levels)),
    panels,
  );
}
