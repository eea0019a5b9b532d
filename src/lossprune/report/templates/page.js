"use strict";
// What the page shows of the data, under the filters that are set.

const DATA = JSON.parse(document.getElementById("data").textContent);
DATA.runs.forEach((run, place) => { run.id = place; });
const REG = new Map(DATA.regs);
const FACETS = { criterion: (value) => value, stages: String, reg: (value) => REG.get(value) ?? short(value), seed: String };
const state = { network: 0, criterion: new Set(), stages: new Set(), reg: new Set(), seed: new Set(), limit: 100 };
const sorting = new Map();
const id = (name) => document.getElementById(name);

const passes = (facet, value) => !state[facet].size || state[facet].has(value);
const inNetwork = (run) => run.network === state.network || (run.network < 0 && run.family === DATA.networks[state.network].family);
const baselineShown = (run) => run.prunes || !(state.criterion.size || state.stages.size || state.reg.size);
const visible = (run) => inNetwork(run) && passes("seed", run.seed) && baselineShown(run) && (!run.prunes || (passes("criterion", run.criterion) && passes("stages", run.stages) && passes("reg", run.reg)));

const colourOf = (criterion) => (["MP", "LM", "QM", "OBD"].includes(criterion) ? `var(--c-${criterion.toLowerCase()})` : "var(--c-other)");
const methodOf = (run) => `π ${run.stages}${run.schedule === "linear" ? " linear" : ""}`;
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
    const key = [run.criterion, run.stages, run.schedule, run.reg, run.seed].join("|");
    if (!chosen.has(key) || chosen.get(key).epochs < run.epochs) chosen.set(key, run);
  }
  return [...chosen.values()];
}

const methodColours = (runs) => {
  const order = [...groups([...runs].sort((a, b) => a.stages - b.stages || a.schedule.localeCompare(b.schedule)), methodOf).keys()];
  return new Map(order.map((name, place) => [name, `var(--p-${place % 6})`]));
};
const legendOf = (colours) => [...colours].map(([label, colour]) => ({ label, colour }));

function filesOf(prefix) {
  const slug = DATA.networks[state.network].name.toLowerCase().replace(/[^a-z0-9.]+/g, "-").replace(/^[-.]+|[-.]+$/g, "");
  return DATA.figures.filter((path) => path.startsWith(`figures/${prefix}--${slug}.`)).map((path) => ({ path, label: path.split(".").pop().toUpperCase() }));
}

function nText(own, key) {
  const counts = [...groups(own, key).values()].map((rows) => unique(rows.map((row) => row.seed)).length);
  const [low, high] = [Math.min(...counts), Math.max(...counts)];
  return low === high ? `n = ${low}` : `n = ${low}–${high}`;
}

function perCriterion(runs, draw) {
  return DATA.criteria.filter((name) => runs.some((run) => run.criterion === name)).map((name) => draw(name, runs.filter((run) => run.criterion === name)));
}

function lossFigure(shown) {
  let runs = onePerSeed(shown.filter((run) => run.lossAfter !== null));
  const magnitude = runs.filter((run) => run.criterion === "MP");
  if (magnitude.length < runs.length) runs = runs.filter((run) => run.criterion !== "MP");
  const colours = methodColours(runs), regs = ascending(runs.map((run) => run.reg)), x = categories(regs, FACETS.reg);
  const level = runs.some((run) => run.criterion !== "MP") && magnitude.length ? averaged(magnitude, (run) => run.lossAfter) : null;
  const values = runs.map((run) => run.lossAfter).concat(level ? [level.y] : []);
  const y = linear(values);
  const levels = level ? [{ y: level.y, colour: colourOf("MP"), title: `MP: ${short(level.y)} (n = ${level.n})` }] : [];
  const panels = perCriterion(runs, (criterion, own) => panel({
    title: `${criterion}, ${nText(own, (run) => `${methodOf(run)} ${run.reg}`)}`, x, y, xLabel: "λ", yLabel: "training loss", levels,
    lines: [...groups(own, methodOf)].map(([method, rows]) => ({
      colour: colours.get(method),
      points: regs.filter((reg) => rows.some((run) => run.reg === reg)).map((reg) => {
        const point = averaged(rows.filter((run) => run.reg === reg), (run) => run.lossAfter);
        return { x: reg, ...point, title: `${criterion} ${method}, λ ${FACETS.reg(reg)}: ${short(point.y)} [${short(point.low)}, ${short(point.high)}], n = ${point.n}` };
      }),
    })),
  }));
  const legend = legendOf(colours).concat(level ? [{ label: `MP, n = ${level.n}`, colour: colourOf("MP") }] : []);
  return figure("Loss after pruning against λ", "Training loss right after pruning, mean over the seeds shown; the band is from the lowest to the highest. n counts seeds.", legend, panels, filesOf("loss-against-lambda"));
}

function errorFigure(shown) {
  const rows = shown.filter((run) => run.tuned && run.error !== null && bestReg.get(methodKey(run)) === run.reg);
  const stages = ascending(rows.map((run) => run.stages)), x = categories(stages, String), y = linear(rows.map((run) => 100 * run.error));
  const criteria = DATA.criteria.filter((name) => rows.some((run) => run.criterion === name));
  const panels = [...groups(rows, (run) => run.tuning)].map(([tuning, own]) => panel({
    title: `${tuning}, ${nText(own, (run) => `${run.criterion} ${methodOf(run)}`)}`, x, y, xLabel: "stages π", yLabel: "test error, %",
    lines: [...groups(own, (run) => run.criterion + (run.schedule === "linear" ? " linear" : ""))].map(([name, part]) => ({
      colour: colourOf(part[0].criterion),
      points: ascending(part.map((run) => run.stages)).map((count) => {
        const point = averaged(part.filter((run) => run.stages === count), (run) => 100 * run.error);
        return { x: count, ...point, title: `${name} π ${count}: ${short(point.y)} % [${short(point.low)}, ${short(point.high)}], n = ${point.n}` };
      }),
    })),
  }));
  return figure("Error after fine-tuning against stages", "Test error of the network with the lowest validation error, at the best λ of each criterion and π (lowest mean validation loss after pruning); mean and range over the seeds shown.", criteria.map((label) => ({ label, colour: colourOf(label) })), panels, filesOf("error-against-stages"));
}

function stageFigure(shown) {
  const parts = DATA.stages.filter((part) => shown.has(part.run)).map((part) => ({ ...DATA.runs[part.run], points: part.points }));
  const colours = methodColours(parts);
  const all = parts.flatMap((part) => part.points.flatMap(([, predicted, realised]) => [predicted, realised])).filter((value) => value !== null);
  const x = symlog(all, 0.001), ends = bounds(all);
  const panels = perCriterion(parts, (criterion, own) => panel({
    title: `${criterion}, ${nText(own, methodOf)}`, x, y: x, xLabel: "predicted ΔL of a stage", yLabel: "realised ΔL of a stage", diagonal: ends,
    dots: own.flatMap((part) => part.points.filter((point) => point[1] !== null && point[2] !== null).map(([stage, predicted, realised]) => ({
      x: predicted, y: realised, colour: colours.get(methodOf(part)),
      title: `${criterion} ${methodOf(part)}, stage ${stage}, seed ${part.seed}: predicted ${short(predicted)}, realised ${short(realised)}`,
    }))),
  }));
  return figure("Predicted against realised loss change, stage by stage", "On the examples that each stage measures, at the best λ. On the dashed line the model of the loss is exact. MP predicts nothing.", legendOf(colours), panels, filesOf("predicted-against-realised"));
}

function gapFigure(shown) {
  const runs = shown.filter((run) => run.tuned && run.lossChange !== null && run.gap !== null);
  const panels = [...groups(runs, (run) => run.tuning)].map(([tuning, own]) => {
    const rho = DATA.networks[state.network].correlations.find((found) => found.tuning === tuning);
    const text = rho && rho.rho !== null ? `: ρ = ${rho.rho.toFixed(2)} [${rho.low.toFixed(2)}, ${rho.high.toFixed(2)}], n = ${rho.n}` : "";
    return panel({
      title: tuning + text, x: linear(own.map((run) => run.lossChange)), y: linear(own.map((run) => 100 * run.gap)), xLabel: "ΔL by pruning", yLabel: "error gap, points",
      dots: own.map((run) => ({ x: run.lossChange, y: 100 * run.gap, colour: colourOf(run.criterion), title: `${run.criterion} ${methodOf(run)}, λ ${FACETS.reg(run.reg)}, seed ${run.seed}: ΔL ${short(run.lossChange)}, gap ${short(100 * run.gap)}` })),
    });
  });
  const criteria = DATA.criteria.filter((name) => runs.some((run) => run.criterion === name));
  return figure("Loss change against error gap after fine-tuning", "A dot a run. The gap is the test error after fine-tuning minus that before pruning. ρ is Spearman’s rank correlation over all fine-tuned runs of this network, whatever the filters, with its 95 % bootstrap interval (2,000 resamples of runs).", criteria.map((label) => ({ label, colour: colourOf(label) })), panels, filesOf("loss-change-against-error-gap"));
}

function layerFigure(shown) {
  const parts = DATA.layers.filter((part) => shown.has(part.run)).map((part) => ({ ...DATA.runs[part.run], ...part }));
  const colours = methodColours(parts), names = unique(parts.flatMap((part) => part.names));
  const places = names.map((_, place) => place), x = categories(places, (place) => names[place].replace(/\.weight$/, ""));
  const y = log(parts.flatMap((part) => part.kept.map((kept) => 100 * Math.max(kept, 1e-5))));
  const panels = perCriterion(parts, (criterion, own) => panel({
    title: `${criterion}, ${nText(own, methodOf)}`, x, y, xLabel: "layer", yLabel: "weights kept, %", tilt: names.length > 4,
    lines: [...groups(own, methodOf)].map(([method, rows]) => ({
      colour: colours.get(method),
      points: places.map((place) => {
        const point = averaged(rows, (row) => (row.names.includes(names[place]) ? 100 * row.kept[row.names.indexOf(names[place])] : null));
        return { x: place, y: point ? point.y : null, title: point ? `${names[place]}, ${method}: ${short(point.y)} % kept, n = ${point.n}` : "" };
      }),
    })),
  }));
  return figure("Sparsity layer by layer", "Share of each layer’s weights that is kept, at the best λ, mean over the seeds shown.", legendOf(colours), panels, filesOf("layer-sparsity"));
}

function curveFigure(shown) {
  const parts = DATA.curves.filter((part) => shown.has(part.run)).map((part) => ({ ...DATA.runs[part.run], points: part.points }));
  const colours = methodColours(parts);
  const x = linear(parts.flatMap((part) => part.points.map((point) => point[0]))), y = log(parts.flatMap((part) => part.points.map((point) => 100 * point[1])));
  const panels = perCriterion(parts, (criterion, own) => panel({
    title: `${criterion}, ${nText(own, methodOf)}`, x, y, xLabel: "epoch", yLabel: "validation error, %",
    lines: [...groups(own, methodOf)].map(([method, rows]) => {
      const epochs = groups(rows.flatMap((row) => row.points), (point) => point[0]);
      return { colour: colours.get(method), bare: true, points: [...epochs].sort((a, b) => a[0] - b[0]).map(([epoch, points]) => ({ x: epoch, y: averaged(points, (point) => (point[1] === null ? null : 100 * point[1])).y })) };
    }),
  }));
  return figure("Training curves", "Validation error while fine-tuning at the best λ, mean over the seeds shown.", legendOf(colours), panels, filesOf("training-curves"));
}

const methodKey = (run) => [run.network, run.criterion, run.stages, run.schedule].join("|");
const bestReg = new Map(DATA.runs.filter((run) => run.best).map((run) => [methodKey(run), run.reg]));

function drawCharts(runs) {
  const pruning = runs.filter((run) => run.prunes), shown = new Set(pruning.map((run) => run.id));
  id("charts").replaceChildren(lossFigure(pruning), errorFigure(pruning), gapFigure(pruning), stageFigure(shown), layerFigure(shown), curveFigure(shown));
}

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
    return el("th", { scope: "col", class: column.text ? "text" : null, "aria-sort": sorted }, column.plain ? column.heading : el("button", { type: "button", onclick: turn }, column.heading));
  });
  const body = rows.map((row) => el("tr", { "data-run": row.id }, ...row.cells.map((cell, place) => el("td", { class: columns[place].text ? "text" : null }, cell))));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name, "data-table": name }, el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body)));
}

// A column that says the same of every method of a network is left to the files.
function tellsSomething(own, place, network) {
  const heading = own.columns[place].heading;
  const cells = new Set(own.rows.filter((row) => row.network === network).map((row) => row.cells[place]));
  if (heading === "schedule") return cells.has("linear");
  if (heading === "diverged" || heading === "unfinished") return cells.size > 1 || !cells.has("0");
  if (heading === "fine-tuning") return [...cells].filter(Boolean).length > 1;
  return true;
}

function drawTables() {
  const network = DATA.networks[state.network].name;
  const any = (facet, values) => !state[facet].size || !values.length || values.some((value) => state[facet].has(value));
  id("summaries").replaceChildren(...DATA.tables.map((own) => {
    const rows = own.rows.filter((row) => row.network === network && any("criterion", row.criterion) && any("stages", row.stages) && any("reg", row.reg));
    const links = ["csv", "md", "tex"].map((kind) => el("a", { href: `tables/${own.name}.${kind}` }, { csv: "CSV", md: "Markdown", tex: "LaTeX" }[kind]));
    const kept = own.columns.map((_, place) => place).filter((place) => tellsSomething(own, place, network));
    const shown = rows.map((row) => ({ cells: kept.map((place) => row.cells[place]), sort: kept.map((place) => row.sort[place]) }));
    return el("div", { class: "block" }, el("h3", {}, own.title), el("p", { class: "caption" }, own.caption, ...links.flatMap((link) => [" ", link])), rows.length ? table(own.name, kept.map((place) => own.columns[place]), shown) : el("p", { class: "empty" }, "No row passes the filters."));
  }));
  id("seed-note").hidden = !state.seed.size;
}

const RUN_COLUMNS = [
  ["criterion", (run) => (run.prunes ? run.criterion : "baseline"), null, true],
  ["π", (run) => (run.prunes ? run.stages : null)],
  ["λ", (run) => (run.prunes ? run.reg : null), FACETS.reg],
  ["seed", (run) => run.seed, String],
  ["fine-tuning", (run) => run.tuning, null, true],
  ["status", (run) => run.status, null, true],
  ["loss before", (run) => run.lossBefore],
  ["loss after", (run) => run.lossAfter],
  ["error pruned", (run) => run.errorPruned, percent],
  ["error best", (run) => run.error, percent],
  ["sparsity", (run) => (run.prunes ? run.sparsity : null)],
  ["seconds", (run) => run.seconds],
];

function drawRuns(runs) {
  const columns = [{ heading: "", text: true, plain: true }, ...RUN_COLUMNS.map(([heading, , , text]) => ({ heading, text: Boolean(text) }))];
  const rows = runs.map((run) => {
    const sort = [null, ...RUN_COLUMNS.map(([, value]) => value(run))];
    return { id: run.id, sort, run };
  });
  for (const row of rows) {
    row.cells = columns.map((_, place) => {
      if (place === 0) return "";
      const [, , form] = RUN_COLUMNS[place - 1], value = row.sort[place];
      return value === null ? "–" : form ? form(value) : typeof value === "number" ? short(value) : value;
    });
  }
  const drawn = table("runs", columns, rows.length > state.limit && !sorting.has("runs") ? rows.slice(0, state.limit) : rows);
  const lines = [...drawn.querySelectorAll("tbody tr")];
  lines.slice(state.limit).forEach((line) => line.remove());
  for (const line of lines.slice(0, state.limit)) {
    const run = DATA.runs[Number(line.dataset.run)];
    line.firstChild.append(el("button", { type: "button", class: "open", onclick: () => open(run), "aria-label": `Open run ${nameOf(run)}` }, "open"));
  }
  id("run-list").replaceChildren(drawn);
  const statuses = [...groups(runs, (run) => run.status)].map(([name, own]) => `${own.length} ${name}`).join(", ");
  id("run-count").textContent = `${runs.length.toLocaleString("en")} of ${DATA.runs.length.toLocaleString("en")} runs pass the filters${statuses ? `: ${statuses}` : ""}.`;
  id("show-more").hidden = runs.length <= state.limit;
  id("show-more").textContent = `Show ${Math.min(400, runs.length - state.limit)} more`;
}

const nameOf = (run) => (run.prunes ? `${run.criterion} ${methodOf(run)}, λ ${FACETS.reg(run.reg)}, seed ${run.seed}` : `baseline, seed ${run.seed}`);

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

function fileLink(run, file) {
  const path = [DATA.root, ...run.folder.split("/").filter((part) => part !== ".").map(encodeURIComponent), file].join("/");
  return el("a", { href: path }, file);
}

async function open(run) {
  id("detail-title").textContent = nameOf(run);
  const facts = { status: run.status + (run.message ? `: ${run.message}` : ""), network: run.prunes ? DATA.networks[run.network].name : run.family, "loss before": short(run.lossBefore), "loss after pruning": short(run.lossAfter), "test error after pruning": percent(run.errorPruned), "test error, best network": percent(run.error), "epochs trained": run.epochs, seconds: short(run.seconds) };
  const command = el("pre", { class: "command", id: "detail-command" }, run.command);
  const copy = el("button", { type: "button", onclick: () => navigator.clipboard?.writeText(run.command).then(() => { copy.textContent = "Copied"; }) }, "Copy");
  id("detail-body").replaceChildren(
    el("dl", { class: "facts" }, ...Object.entries(facts).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value))))),
    el("h3", {}, "Command"), command, copy,
    ...(DATA.root === null ? [] : [el("h3", {}, "Files"), el("p", {}, fileLink(run, DATA.files.log), " · ", fileLink(run, DATA.files.record))]),
  );
  id("detail").showModal();
  const packed = id(`detail-${run.id}`);
  if (!packed || typeof DecompressionStream === "undefined") {
    id("detail-body").append(el("p", { class: "note" }, "The page holds the logs and records of the first runs only, to stay small" + (DATA.root === null ? "." : "; the files above hold this one’s.")));
    return;
  }
  const texts = await unpack(packed.textContent.trim());
  id("detail-body").append(el("h3", {}, "Log"), el("pre", { id: "detail-log", tabindex: "0" }, texts.log), el("h3", {}, "Record"), el("pre", { id: "detail-record", tabindex: "0" }, texts.record));
}

// The method is chosen by the loss right after pruning; its test error is looked up, not searched.
function drawHeadlines() {
  const tiles = [];
  const add = (label, value, under) => tiles.push(el("div", { class: "tile" }, el("dt", {}, label), el("dd", {}, value, el("small", {}, under))));
  const { leader, correlations } = DATA.networks[state.network];
  if (leader) {
    add("Lowest loss change by pruning", leader.change, `${leader.method}, n = ${leader.n}`);
    for (const { error, n, tuning } of leader.errors) add("Its test error after fine-tuning", error, `${leader.method}, n = ${n}, ${tuning}`);
  }
  for (const rho of correlations) if (rho.rho !== null) add("Loss change and error gap, Spearman’s ρ", rho.rho.toFixed(2), `95 % interval ${rho.low.toFixed(2)} to ${rho.high.toFixed(2)}, n = ${rho.n}, ${rho.tuning}`);
  id("headlines").replaceChildren(...tiles);
}

function drawFilters() {
  const runs = DATA.runs.filter((run) => inNetwork(run)), pruning = runs.filter((run) => run.prunes);
  const values = { criterion: DATA.criteria.filter((name) => pruning.some((run) => run.criterion === name)), stages: ascending(pruning.map((run) => run.stages)), reg: ascending(pruning.map((run) => run.reg)), seed: ascending(runs.map((run) => run.seed)) };
  for (const [facet, label] of Object.entries(FACETS)) {
    id(`filter-${facet}`).replaceChildren(...values[facet].map((value) => {
      const turn = (event) => { if (event.target.checked) state[facet].add(value); else state[facet].delete(value); state.limit = 100; draw(); };
      return el("label", {}, el("input", { type: "checkbox", value: label(value), checked: state[facet].has(value), onchange: turn }), el("span", {}, label(value)));
    }));
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
  id("network").replaceChildren(...DATA.networks.map((network, place) => el("option", { value: place }, network.name)));
  id("network").addEventListener("change", (event) => { state.network = Number(event.target.value); reset(); });
  id("clear").addEventListener("click", reset);
  id("show-more").addEventListener("click", () => { state.limit += 400; drawRuns(DATA.runs.filter(visible)); });
  id("detail-close").addEventListener("click", () => id("detail").close());
  id("detail").addEventListener("click", (event) => { if (event.target === id("detail")) id("detail").close(); });
  id("filters").addEventListener("submit", (event) => event.preventDefault());
  id("theme").addEventListener("click", () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  id("more").open = matchMedia("(min-width: 641px)").matches;
  reset();
  document.documentElement.dataset.ready = "";
}

begin();
