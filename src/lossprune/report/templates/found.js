"use strict";
// The figures of what runs find on their way: the curve of a budget, and λ stage by stage.

const KEPT = [100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1]; // ticks

// From the dense network on: the share of weights kept falls.
function fromDense(parts) {
  const kept = [100, ...parts.flatMap((part) => part.points.map((point) => point[0]))];
  const least = Math.min(...kept);
  return falling(
    kept,
    KEPT.filter((tick) => tick >= least),
  );
}

const anyOf = (parts) => DATA[parts].some((part) => DATA.runs[part.run].network === state.network);

function budgetFigure(shown) {
  const parts = partsOf(DATA.points, shown);
  const stages = unique([...parts].sort((a, b) => a.stages - b.stages).map(methodOf));
  const dashOf = (part) => DASHES[stages.indexOf(methodOf(part)) % DASHES.length];
  const method = (part) => `${part.criterion} ${methodOf(part)}`;
  const x = fromDense(parts);
  const measures = [
    { yLabel: "validation loss", value: (point) => point[1] },
    { yLabel: "validation error, %", value: (point) => inPercent(point[2]) },
  ];
  const judged = ({ value }) => parts.some((part) => value(part.points[0]) !== null);
  const panels = measures.filter(judged).map(({ yLabel, value }) => {
    const marks = parts.flatMap((part) =>
      part.points.map((point) => ({
        x: point[0],
        y: value(point),
        r: point[3] ? 4 : 1.5,
        colour: colourOf(part.criterion),
        title:
          `${nameOf(part)}: ${short(point[0])} % kept, ${yLabel} ${short(value(point))}` +
          (point[3] ? ", what it came to" : ""),
      })),
    );
    return {
      title: `${yLabel}, ${nText(parts, method)}`,
      x,
      y: linear(marks.map((mark) => mark.y)),
      yLabel,
      dots: marks.filter((mark) => mark.y !== null),
      lines: parts.map((part) => ({
        colour: colourOf(part.criterion),
        dash: dashOf(part),
        bare: true,
        points: part.points.map((point) => ({ x: point[0], y: value(point) })),
      })),
    };
  });
  const legend = [...groups(parts, method)].map(([label, [part]]) => ({
    label,
    colour: colourOf(part.criterion),
    dash: dashOf(part),
  }));
  return named(
    "validation-against-sparsity",
    "Every mask that a run judged on its way, at the best λ: a line a run, those beyond the " +
      "budget among them; the large dot is what the run came to.",
    legend,
    panels,
  );
}

function regsFigure(shown) {
  const parts = partsOf(DATA.regsOfStages, shown);
  const colours = methodColours(parts);
  const regs = parts.flatMap((part) => part.points.map((point) => point[1]));
  const positive = regs.filter((reg) => reg > 0);
  const least = positive.length ? 10 ** Math.floor(Math.log10(Math.min(...positive))) : 1;
  const x = fromDense(parts);
  const panels = perCriterion(parts, (criterion, own) => ({
    title: `${criterion}, ${nText(own, methodOf)}`,
    x,
    y: symlog([0, ...regs], least),
    lines: own.map((part) => ({
      colour: colours.get(methodOf(part)),
      points: part.points.map(([kept, reg], place) => ({
        x: kept,
        y: reg,
        title:
          `${criterion} ${methodOf(part)}, stage ${place + 1}, seed ${part.seed}: ` +
          `λ ${short(reg)} at ${short(kept)} % kept`,
      })),
    })),
  }));
  return named(
    "lambda-of-stages",
    "What each stage chose, where λ is found on the way: a line a run, a dot a stage.",
    legendOf(colours),
    panels,
  );
}
