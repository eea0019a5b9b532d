"use strict";
// The page as a whole: headlines, filters, and what happens when one is set.

function drawFilters() {
  const runs = DATA.runs.filter((run) => inNetwork(run));
  const pruning = runs.filter((run) => run.prunes);
  const values = {
    criterion: criteriaOf(pruning),
    stages: ascending(pruning.map((run) => run.stages)),
    reg: ascending(pruning.map((run) => run.reg)),
    seed: ascending(runs.map((run) => run.seed)),
  };
  for (const [facet, label] of Object.entries(FACETS)) {
    id(`filter-${facet}`).replaceChildren(
      ...values[facet].map((value) => {
        const turn = (event) => {
          if (event.target.checked) state[facet].add(value);
          else state[facet].delete(value);
          state.limit = 100;
          draw();
        };
        return el(
          "label",
          {},
          el("input", {
            type: "checkbox",
            value: label(value),
            checked: state[facet].has(value),
            onchange: turn,
          }),
          el("span", {}, label(value)),
        );
      }),
    );
  }
}

function drawCharts(runs) {
  const pruning = runs.filter((run) => run.prunes);
  const shown = new Set(pruning.map((run) => run.id));
  state.width = id("charts").clientWidth;
  id("charts").replaceChildren(
    ...(sparsities().length > 1 ? [sparsityFigure()] : []),
    lossFigure(pruning),
    errorFigure(pruning),
    gapFigure(pruning),
    ...(anyOf("points") ? [budgetFigure(shown)] : []),
    ...(anyOf("regsOfStages") ? [regsFigure(shown)] : []),
    stageFigure(shown),
    layerFigure(shown),
    curveFigure(shown),
  );
}

function draw() {
  const runs = DATA.runs.filter(visible);
  drawHeadlines(runs);
  drawCharts(runs);
  drawTables();
  drawRuns(runs);
  const active = Object.keys(FACETS).reduce((sum, facet) => sum + state[facet].size, 0);
  id("active").textContent = active ? `(${active} set)` : "";
  id("clear").disabled = !active;
}

function reset() {
  for (const facet of Object.keys(FACETS)) state[facet].clear();
  state.limit = 100;
  drawFilters();
  draw();
}

// Show a network: one dense network at one sparsity.
function turnTo(network) {
  state.network = network;
  const own = siblings().sort((a, b) => a.sparsity - b.sparsity);
  id("sparsity").replaceChildren(
    ...own.map((one) => el("option", { value: DATA.networks.indexOf(one) }, one.removed)),
  );
  id("sparsity").value = String(network);
  id("sparsity").parentElement.hidden = own.length < 2;
  reset();
}

function begin() {
  const dense = unique(DATA.networks.map((network) => network.dense));
  id("network").replaceChildren(
    ...dense.map((name, place) => {
      const own = DATA.networks.filter((network) => network.dense === name);
      return el("option", { value: place }, own.length > 1 ? name : own[0].name);
    }),
  );
  id("network").addEventListener("change", (event) =>
    turnTo(DATA.networks.findIndex(({ dense: name }) => name === dense[event.target.value])),
  );
  id("sparsity").addEventListener("change", (event) => turnTo(Number(event.target.value)));
  id("clear").addEventListener("click", reset);
  id("show-more").addEventListener("click", () => {
    state.limit += 400;
    drawRuns(DATA.runs.filter(visible));
  });
  id("detail-close").addEventListener("click", () => id("detail").close());
  id("detail").addEventListener("click", (event) => {
    if (event.target === id("detail")) id("detail").close();
  });
  id("filters").addEventListener("submit", (event) => event.preventDefault());
  id("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  id("more").open = matchMedia("(min-width: 641px)").matches;
  turnTo(0);
  new ResizeObserver(() => {
    if (id("charts").clientWidth !== state.width) drawCharts(DATA.runs.filter(visible));
  }).observe(id("charts"));
  document.documentElement.dataset.ready = "";
}

begin();
