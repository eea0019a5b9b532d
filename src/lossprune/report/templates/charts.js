"use strict";
// Charts as SVG: a panel with axes, lines with bands, dots and levels. It knows nothing of pruning.

const SVG = "http://www.w3.org/2000/svg";
const [H, LEFT, RIGHT, TOP, BOTTOM] = [230, 54, 8, 8, 42];
const [NARROWEST, WIDEST, GAP, GUTTER] = [255, 480, 18, 32]; // of panels, and between them
const SIGN = 6.8; // pixels of a letter of an axis, about
const DASHES = ["none", "7 4", "2 3", "8 3 2 3"];
const DOTTED = DASHES[2];

function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false)
      node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(name, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 100000))
    return value.toExponential(1).replace("+", "");
  return String(Number(value.toPrecision(4)));
}

// Scales map data to pixels; each has its ticks as [value, label].
function bounds(values, zero = false) {
  let low = zero ? 0 : Infinity;
  let high = -Infinity;
  for (const value of values)
    if (value !== null && Number.isFinite(value)) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  if (high === -Infinity) return [0, 1];
  if (low === high) return [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  return [low, high];
}

function linear(values, zero = false) {
  let [low, high] = bounds(values, zero);
  const margin = (high - low) * 0.05;
  if (!zero) low -= margin;
  high += margin;
  const raw = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw) * power;
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + 1e-12; tick += step)
    ticks.push([tick, short(Math.abs(tick) < step / 1e6 ? 0 : tick)]);
  return { at: (value) => (value - low) / (high - low), ticks };
}

function log(values) {
  const positive = values.filter((value) => value > 0);
  if (!positive.length) return linear(values);
  let [low, high] = bounds(positive).map(Math.log10);
  if (!Number.isFinite(low)) low = high - 1;
  const margin = (high - low) * 0.05;
  low -= margin;
  high += margin;
  const factors = high - low > 2 ? [1] : high - low > 0.9 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
  const ticks = [];
  for (let decade = Math.floor(low); decade <= high; decade++)
    for (const factor of factors) {
      const tick = factor * 10 ** decade;
      const place = Math.log10(tick);
      if (place >= low && place <= high) ticks.push([tick, short(tick)]);
    }
  const thin = Math.ceil(ticks.length / 6);
  return {
    at: (value) => (Math.log10(Math.max(value, 10 ** low)) - low) / (high - low),
    ticks: ticks.filter((_, place) => place % thin === 0),
  };
}

// Linear below the threshold, logarithmic above, on both sides of 0.
function symlog(values, threshold) {
  const bend = (value) => Math.sign(value) * Math.log10(1 + Math.abs(value) / threshold);
  const inner = linear(values.map(bend));
  const [low, high] = bounds(values);
  const ticks = [[0, "0"]];
  for (let decade = Math.round(Math.log10(threshold)) + 1; decade < 6; decade++)
    for (const sign of [-1, 1]) {
      const tick = sign * 10 ** decade;
      if (tick >= low && tick <= high) ticks.push([tick, short(tick)]);
    }
  return { at: (value) => inner.at(bend(value)), ticks };
}

// Logarithmic, falling, with ticks at the values themselves or at others.
function falling(values, at = values) {
  const logs = values.map(Math.log);
  const [low, high] = bounds(logs);
  const margin = (high - low) * 0.06;
  return {
    at: (value) => (high + margin - Math.log(value)) / (high - low + 2 * margin),
    ticks: [...at].sort((a, b) => b - a).map((value) => [value, short(value)]),
  };
}

// As many ticks as have room for their labels: all, every other one, every third.
function roomy(ticks, px) {
  const placed = [...ticks].sort((a, b) => px(a[0]) - px(b[0]));
  const half = (tick) => (SIGN * tick[1].length) / 2;
  for (let thin = 1; thin < placed.length; thin++) {
    const kept = placed.filter((_, place) => place % thin === 0);
    const free = (tick, place) =>
      !place || px(tick[0]) - half(tick) > px(kept[place - 1][0]) + half(kept[place - 1]) + 4;
    if (kept.every(free)) return kept;
  }
  return placed.slice(0, 1);
}

function categories(values, label = short) {
  const places = new Map(values.map((value, place) => [value, place]));
  const width = Math.max(values.length, 1);
  return {
    at: (value) => ((places.has(value) ? places.get(value) : Math.floor(value)) + 0.5) / width,
    ticks: values.map((value) => [value, label(value)]),
  };
}

// lines: {colour, dash, points: [{x, y, low, high, title}], bare}; dots: {x, y, r, colour, title};
// levels: {y, colour, dash, title}. A mark may stand aside of its x, by pixels.
function drawPanel(
  {
    title,
    x,
    y,
    xLabel,
    yLabel,
    lines = [],
    dots = [],
    levels = [],
    diagonal = null,
    tilt = false,
  },
  width,
) {
  const px = (value) => LEFT + x.at(value) * (width - LEFT - RIGHT);
  const placed = (mark) => px(mark.x) + (mark.aside ?? 0);
  const py = (value) => H - BOTTOM - y.at(value) * (H - TOP - BOTTOM);
  const root = svg("svg", {
    width,
    height: H,
    role: "img",
    "aria-label": `${title ? title + ": " : ""}${yLabel} against ${xLabel}`,
  });
  for (const [value, label] of y.ticks) {
    root.append(
      svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: py(value), y2: py(value) }),
    );
    root.append(svg("text", { x: LEFT - 6, y: py(value) + 4, "text-anchor": "end" }, label));
  }
  for (const [value, label] of tilt ? x.ticks : roomy(x.ticks, px)) {
    const at = px(value);
    root.append(svg("line", { class: "axis", x1: at, x2: at, y1: H - BOTTOM, y2: H - BOTTOM + 4 }));
    const place = tilt
      ? { transform: `translate(${at + 4} ${H - BOTTOM + 12}) rotate(-35)`, "text-anchor": "end" }
      : { x: at, y: H - BOTTOM + 16, "text-anchor": "middle" };
    root.append(svg("text", place, label));
  }
  root.append(svg("path", { class: "axis", d: `M${LEFT} ${TOP}V${H - BOTTOM}H${width - RIGHT}` }));
  if (!tilt)
    root.append(
      svg("text", { x: (LEFT + width - RIGHT) / 2, y: H - 6, "text-anchor": "middle" }, xLabel),
    );
  root.append(
    svg(
      "text",
      { transform: `translate(11 ${(TOP + H - BOTTOM) / 2}) rotate(-90)`, "text-anchor": "middle" },
      yLabel,
    ),
  );
  for (const level of levels) {
    const line = svg("line", {
      class: "dash",
      x1: LEFT,
      x2: width - RIGHT,
      y1: py(level.y),
      y2: py(level.y),
      style: `stroke:${level.colour};stroke-dasharray:${level.dash}`,
    });
    line.append(svg("title", {}, level.title));
    root.append(line);
  }
  if (diagonal)
    root.append(
      svg("line", {
        class: "dash",
        x1: px(diagonal[0]),
        y1: py(diagonal[0]),
        x2: px(diagonal[1]),
        y2: py(diagonal[1]),
        style: `stroke:var(--soft);stroke-dasharray:${DASHES[1]}`,
      }),
    );
  for (const dot of dots) drawDot(root, dot, placed(dot), py(dot.y), dot.r ?? 3);
  for (const line of lines) drawLine(root, line, placed, py);
  return el(
    "figure",
    { class: "panel", style: `width:${width}px` },
    title ? el("figcaption", {}, title) : null,
    root,
  );
}

function drawLine(root, line, placed, py) {
  const points = line.points.filter((point) => point.y !== null && Number.isFinite(point.y));
  if (!points.length) return;
  if (points.some((point) => point.low !== undefined)) {
    const up = points.map((point) => `${placed(point).toFixed(1)} ${py(point.high).toFixed(1)}`);
    const down = points
      .map((point) => `${placed(point).toFixed(1)} ${py(point.low).toFixed(1)}`)
      .reverse();
    root.append(
      svg("path", {
        class: "band",
        d: `M${[...up, ...down].join("L")}Z`,
        style: `fill:${line.colour}`,
      }),
    );
  }
  root.append(
    svg("path", {
      class: "line",
      d:
        "M" +
        points.map((point) => `${placed(point).toFixed(1)} ${py(point.y).toFixed(1)}`).join("L"),
      style: `stroke:${line.colour};stroke-dasharray:${line.dash ?? DASHES[0]}`,
    }),
  );
  if (!line.bare)
    for (const point of points)
      drawDot(root, { ...point, colour: line.colour }, placed(point), py(point.y), 3.4);
}

function drawDot(root, dot, cx, cy, r) {
  const node = svg("circle", {
    class: "dot",
    cx: cx.toFixed(1),
    cy: cy.toFixed(1),
    r,
    style: `fill:${dot.colour}`,
  });
  if (dot.title) node.append(svg("title", {}, dot.title));
  root.append(node);
}

// Text has the same size in every panel: panels are drawn as wide as there is room for them.
function panelWidth(count, all) {
  const room = count === 1 && all > 640 ? (all - GUTTER) / 2 : all;
  const columns = Math.max(1, Math.min(count, Math.floor((room + GAP) / (NARROWEST + GAP))));
  return Math.floor(Math.min(WIDEST, (room - GAP * (columns - 1)) / columns));
}

function legendEntry({ label, colour, dash = DASHES[0] }) {
  const mark = svg("svg", { class: "key", width: 22, height: 10, "aria-hidden": "true" });
  const style = `stroke:${colour};stroke-dasharray:${dash}`;
  mark.append(svg("line", { x1: 0, x2: 22, y1: 5, y2: 5, style }));
  return el("li", {}, mark, label);
}

function figure(title, caption, legend, panels, files) {
  const links = files.map((file) => el("a", { href: file.path }, file.label));
  const width = panelWidth(panels.length, id("charts").clientWidth);
  const body = panels.length
    ? [
        el("ul", { class: "legend" }, ...legend.map(legendEntry)),
        el("div", { class: "panels" }, ...panels.map((panel) => drawPanel(panel, width))),
      ]
    : [el("p", { class: "empty" }, "No run here has what this figure shows.")];
  const note = el("p", { class: "caption" }, caption, ...links.flatMap((link) => [" ", link]));
  return el(
    "section",
    { class: panels.length === 1 ? "figure half" : "figure" },
    el("h3", {}, title),
    note,
    ...body,
  );
}
