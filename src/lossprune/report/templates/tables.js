"use strict";
// Tables that sort: those of the report, and the list of runs.

const sorting = new Map();

// Rows are {cells, sort, …}; nothing sorts last, in either direction.
function table(name, columns, rows) {
  const order = sorting.get(name);
  if (order) {
    const sign = order.up ? 1 : -1;
    rows = [...rows].sort((a, b) => {
      const [left, right] = [a.sort[order.column], b.sort[order.column]];
      if (left === null || right === null) return (left === null) - (right === null);
      return sign * (typeof left === "string" ? left.localeCompare(right) : left - right);
    });
  }
  const head = columns.map((column, place) => {
    const sorted = order && order.column === place ? (order.up ? "ascending" : "descending") : null;
    const turn = () => {
      sorting.set(name, { column: place, up: !(order && order.column === place && order.up) });
      draw();
      document.querySelector(`[data-table="${name}"] th:nth-child(${place + 1}) button`)?.focus();
    };
    return el(
      "th",
      { scope: "col", class: column.text ? "text" : null, "aria-sort": sorted },
      column.plain
        ? column.heading
        : el("button", { type: "button", onclick: turn }, column.heading),
    );
  });
  const body = rows.map((row) =>
    el(
      "tr",
      { "data-run": row.id },
      ...row.cells.map((cell, place) =>
        el("td", { class: columns[place].text ? "text" : null }, cell),
      ),
    ),
  );
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": name, "data-table": name },
    el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body)),
  );
}

// Some tables are of a network, some of a dense network at all its sparsities.
const ofNetwork = (row) => row.network === here().name || row.network === here().dense;

// A column that says the same of every method of a network is left to the files.
function tellsSomething(own, place) {
  const heading = own.columns[place].heading;
  const cells = new Set(own.rows.filter(ofNetwork).map((row) => row.cells[place]));
  if (heading === "schedule") return cells.has("linear");
  if (heading === "diverged" || heading === "unfinished") return cells.size > 1 || !cells.has("0");
  if (heading === "fine-tuning") return [...cells].filter(Boolean).length > 1;
  return true;
}

function drawTables() {
  const any = (facet, values) =>
    !state[facet].size || !values.length || values.some((value) => state[facet].has(value));
  id("summaries").replaceChildren(
    ...DATA.tables
      .filter((own) => !own.several || own.rows.some(ofNetwork))
      .map((own) => {
        const rows = own.rows.filter(
          (row) =>
            ofNetwork(row) &&
            any("criterion", row.criterion) &&
            any("stages", row.stages) &&
            any("reg", row.reg),
        );
        const links = ["csv", "md", "tex"].map((kind) =>
          el(
            "a",
            { href: `tables/${own.name}.${kind}` },
            { csv: "CSV", md: "Markdown", tex: "LaTeX" }[kind],
          ),
        );
        const at = siblings().length > 1 && !own.several ? `, ${here().removed}` : "";
        const kept = own.columns
          .map((_, place) => place)
          .filter((place) => tellsSomething(own, place));
        const shown = rows.map((row) => ({
          cells: kept.map((place) => row.cells[place]),
          sort: kept.map((place) => row.sort[place]),
        }));
        return el(
          "div",
          { class: "block" },
          el("h3", {}, own.title + at),
          el("p", { class: "caption" }, own.caption, ...links.flatMap((link) => [" ", link])),
          rows.length
            ? table(
                own.name,
                kept.map((place) => own.columns[place]),
                shown,
              )
            : el("p", { class: "empty" }, "No row passes the filters."),
        );
      }),
  );
  id("seed-note").hidden = !state.seed.size;
}

const RUN_COLUMNS = [
  ["criterion", (run) => (run.prunes ? run.criterion : "baseline"), null, true],
  ["π", (run) => (run.prunes ? run.stages : null), FACETS.stages],
  ["λ", (run) => (run.prunes ? run.reg : null), FACETS.reg],
  ["seed", (run) => run.seed, String],
  ["fine-tuning", (run) => run.tuning, null, true],
  ["status", (run) => run.status, null, true],
  ["loss before", (run) => run.lossBefore],
  ["loss after", (run) => run.lossAfter],
  ["error pruned", (run) => run.errorPruned, percent],
  ["error best", (run) => run.error, percent],
  ["sparsity", (run) => (run.prunes || run.sparsity ? run.sparsity : null)],
  ["seconds", (run) => run.seconds],
];

function cellText(value, form) {
  if (value === null) return "–";
  if (form) return form(value);
  return typeof value === "number" ? short(value) : value;
}

function drawRuns(runs) {
  const columns = [
    { heading: "", text: true, plain: true },
    ...RUN_COLUMNS.map(([heading, , , text]) => ({ heading, text: Boolean(text) })),
  ];
  const rows = runs.map((run) => {
    const values = RUN_COLUMNS.map(([, value]) => value(run));
    const cells = RUN_COLUMNS.map(([, , form], place) => cellText(values[place], form));
    return { id: run.id, cells: ["", ...cells], sort: [null, ...values] };
  });
  const drawn = table(
    "runs",
    columns,
    rows.length > state.limit && !sorting.has("runs") ? rows.slice(0, state.limit) : rows,
  );
  const lines = [...drawn.querySelectorAll("tbody tr")];
  lines.slice(state.limit).forEach((line) => line.remove());
  for (const line of lines.slice(0, state.limit)) {
    const run = DATA.runs[Number(line.dataset.run)];
    line.firstChild.append(
      el(
        "button",
        {
          type: "button",
          class: "open",
          onclick: () => open(run),
          "aria-label": `Open run ${nameOf(run)}`,
        },
        "open",
      ),
    );
  }
  id("run-list").replaceChildren(drawn);
  const statuses = [...groups(runs, (run) => run.status)]
    .map(([name, own]) => `${own.length} ${name}`)
    .join(", ");
  const [passing, all] = [runs, DATA.runs].map((list) => list.length.toLocaleString("en"));
  id("run-count").textContent =
    `${passing} of ${all} runs pass the filters${statuses ? `: ${statuses}` : ""}.`;
  id("show-more").hidden = runs.length <= state.limit;
  id("show-more").textContent = `Show ${Math.min(400, runs.length - state.limit)} more`;
}
