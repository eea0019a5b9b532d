"use strict";
// The page as a whole: headlines, filters, and what happens when one is set.

// The method is chosen by the loss right after pruning; its test error is looked up, not searched.
function drawHeadlines() {
  const tiles = [];
  const add = (label, value, under) =>
    tiles.push(
      el(
        "div",
        { class: "tile" },
        el("dt", {}, label),
        el("dd", {}, value, el("small", {}, under)),
      ),
    );
  const { leader, correlations } = DATA.networks[state.network];
  if (leader) {
    add("Lowest loss change by pruning", leader.change, `${leader.method}, n = ${leader.n}`);
    for (const { error, n, tuning } of leader.errors)
      add("Its test error after fine-tuning", error, `${leader.method}, n = ${n}, ${tuning}`);
  }
  for (const rho of correlations)
    if (rho.rho !== null)
      add(
        "Loss change and error gap, Spearman’s ρ",
        rho.rho.toFixed(2),
        `95 % interval ${rho.low.toFixed(2)} to ${rho.high.toFixed(2)}, ` +
          `n = ${rho.n}, ${rho.tuning}`,
      );
  id("headlines").replaceChildren(...tiles);
}

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

function draw() {
  const runs = DATA.runs.filter(visible);
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
  drawHeadlines();
  draw();
}

function begin() {
  id("network").replaceChildren(
    ...DATA.networks.map((network, place) => el("option", { value: place }, network.name)),
  );
  id("network").addEventListener("change", (event) => {
    state.network = Number(event.target.value);
    reset();
  });
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
  reset();
  document.documentElement.dataset.ready = "";
}

begin();
