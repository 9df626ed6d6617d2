// The page: reads what it holds, draws it, and lets a person move in it.

const $ = id => document.getElementById(id);
const PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c00", "#7f7f7f"];
const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

// ---- reading

async function opened() {
  const bytes = Uint8Array.from(atob($("data").textContent), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  return { header, tensor: entry => entry && read(buffer, entry, 4 + length) };
}

function read(buffer, { kind, shape, at }, start) {
  const size = count(shape);
  if (kind === "u1") return made(shape, new Uint8Array(buffer, start + at, size));
  if (kind === "f4") return made(shape, new Float32Array(buffer, start + at, size));
  const halves = new Uint16Array(buffer, start + at, size);
  return made(shape, Float32Array.from(halves, half));
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, power = (bits >> 10) & 31, rest = bits & 1023;
  if (power === 0) return sign * rest * 2 ** -24;
  return power === 31 ? (rest ? NaN : sign * Infinity) : sign * (1 + rest / 1024) * 2 ** (power - 15);
}

let held, model, state;
const row = (t, i) => { const n = t.data.length / t.shape[0]; return t.data.subarray(i * n, (i + 1) * n); };

function prepared({ header, tensor }) {
  const all = part => Object.fromEntries(Object.entries(part).map(([k, v]) => [k, v && v.kind ? tensor(v) : v]));
  const { decoder, prior, draws, rows, output, grid } = header;
  held = { ...header, prior: all(prior), draws: all(draws), rows: all(rows), output: all(output), grid: grid && all(grid) };
  const { shape } = held.output;
  const channels = shape.length === 3 ? (shape[0] === 3 ? 3 : 1) : 0;
  model = {
    size: held.rows.means.shape[1],
    image: channels > 0,
    channels,
    width: channels ? shape[2] : 0,
    height: channels ? (channels === 3 ? shape[1] : shape[0] * shape[1]) : 0,
    decode: decoder.program ? program(decoder, tensor) : atlas(all(decoder)),
    follow: header.follow.map(part => program(part, tensor)),
  };
}

function program(decoder, tensor) {
  const run = runnable(decoder.program, decoder.constants.map(tensor));
  return (z, y) => run([made([1, z.length], Float32Array.from(z)), ...(y ? [made([1, y.length], Float32Array.from(y))] : [])]).data;
}

// The nearest code that was decoded beforehand; images come as 256 levels.
function atlas({ z: places, x, y: conditions }) {
  return (z, y) => {
    let best = 0, least = Infinity;
    for (let i = 0; i < places.shape[0]; i++) {
      let far = distance(row(places, i), z);
      if (conditions) far += 1e3 * distance(row(conditions, i), y);
      if (far < least) [best, least] = [i, far];
    }
    const found = Float32Array.from(row(x, best));
    if (!(x.data instanceof Uint8Array)) return found;
    const { low, high } = held.output;
    return found.map((v, i) => low.data[i] + v / 255 * (high.data[i] - low.data[i]));
  };
}

const distance = (a, b) => a.reduce((sum, v, d) => sum + (v - b[d]) ** 2, 0);

// ---- colours and pictures

const ink = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function ramp(stops, t) {
  const at = Math.min(Math.max(t, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(at), stops.length - 2);
  return stops[i].map((c, k) => Math.round(c + (at - i) * (stops[i + 1][k] - c)));
}

// Levels of 0 to 1, channel by channel, on a canvas of as many pixels.
function pixels(levels) {
  const { width, height, channels } = model, image = new ImageData(width, height), plane = width * height;
  for (let i = 0; i < plane; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = 255 * levels[(channels === 3 ? c * plane : 0) + i];
    image.data[4 * i + 3] = 255;
  }
  return image;
}

function levels(x) {
  const { low, high } = held.output;
  return Float32Array.from(x, (v, i) => (v - low.data[i]) / (high.data[i] - low.data[i]));
}

function paint(canvas, image) {
  [canvas.width, canvas.height] = [image.width, image.height];
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Several pictures side by side, in rows of `across`.
function tiled(canvas, images, across) {
  const { width, height } = model;
  canvas.hidden = !images.length;
  canvas.width = across * (width + 1);
  canvas.height = Math.ceil(images.length / across) * (height + 1);
  const context = canvas.getContext("2d");
  images.forEach((image, i) => context.putImageData(image, (i % across) * (width + 1), Math.floor(i / across) * (height + 1)));
}

const decoded = (z, y = state.y) => model.decode(z, y);
const thumbnail = n => pixels(Float32Array.from(row(held.rows.shown, n), v => v / 255));

// ---- the map

const view = { low: [0, 0], high: [1, 1], side: 1 };
const toPixel = (z, d) => {
  const t = (z - view.low[d]) / (view.high[d] - view.low[d]) * view.side;
  return d === 0 ? t : view.side - t;
};
const toLatent = (p, d) => {
  const t = (d === 0 ? p : view.side - p) / view.side;
  return view.low[d] + t * (view.high[d] - view.low[d]);
};

function framed() {
  const { means } = held.rows, ends = state.axes.map(d => {
    let low = Infinity, high = -Infinity;
    for (let n = 0; n < means.shape[0]; n++) {
      const v = means.data[n * model.size + d];
      [low, high] = [Math.min(low, v), Math.max(high, v)];
    }
    return [low, high];
  });
  if (held.grid) return Object.assign(view, { low: held.grid.low, high: held.grid.high });
  const half = 1.15 * Math.max(2, ...ends.map(([a, b]) => (b - a) / 2));
  view.low = ends.map(([a, b]) => (a + b) / 2 - half);
  view.high = ends.map(([a, b]) => (a + b) / 2 + half);
}

// Where a code stands; of one latent, rows stand one above another.
const spot = (z, share = 0.5) => state.axes.map((d, k) => (k && model.size === 1 ? share * view.side : toPixel(z[d], k)));
const place = (t, n) => spot(row(t, n), (n + 0.5) / t.shape[0]);

function drawMap() {
  const canvas = $("map"), scale = window.devicePixelRatio || 1;
  view.side = canvas.clientWidth;
  canvas.width = canvas.height = Math.round(view.side * scale);
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.fillStyle = ink("--card");
  context.fillRect(0, 0, view.side, view.side);
  const ground = $("ground").value;
  if (ground === "decoded") drawManifold(context);
  else if (ground !== "none") drawGround(context, ground);
  drawTicks(context);
  if ($("show-draws").checked) held.draws.z.shape[0] && drawCrosses(context);
  if ($("show-components").checked) drawComponents(context);
  drawPoints(context);
  drawMarks(context);
}

// The range of colours of a quantity: of its middle values.
function spread(values) {
  const sorted = [...values].filter(Number.isFinite).sort((a, b) => a - b);
  return [sorted[Math.floor(0.02 * sorted.length)], sorted[Math.ceil(0.98 * sorted.length) - 1]];
}

// The colour and the strength of a place of the map; holes count where the prior or codes are.
function grounded(ground) {
  const p = held.grid.log_p.data, q = held.grid.log_q.data;
  if (ground !== "holes") {
    const values = ground === "prior" ? p : q, top = Math.max(...values);
    return i => [...ramp(RAMP, (values[i] - top) / 12 + 1), 220];
  }
  const [blue, orange] = [[0, 114, 178], [230, 110, 10]], tops = [Math.max(...p), Math.max(...q)];
  return i => {
    const excess = p[i] - q[i], near = 1 + Math.max(p[i] - tops[0], q[i] - tops[1]) / 8;
    const strength = Math.min(1, Math.abs(excess) / 4) * Math.max(0, Math.min(1, 2 * near));
    return [...(excess > 0 ? orange : blue), 230 * strength];
  };
}

function drawGround(context, ground) {
  const colour = grounded(ground), n = held.grid.side, image = new ImageData(n, n);
  for (let i = 0; i < n * n; i++) image.data.set(colour(i), 4 * i);
  const small = document.createElement("canvas");
  paint(small, image);
  context.drawImage(small, 0, 0, view.side, view.side);
}

const manifold = { key: "", canvas: null };

// What the decoder makes of a grid of codes; the other latents stay where they are.
function drawManifold(context) {
  const most = Math.floor(Math.sqrt(1500 / state.ms)); // a second and a half in all
  const n = Math.max(4, Math.min(20, most, Math.floor(view.side / Math.max(36, model.width / 2))));
  const rest = [...state.z].map((v, d) => (state.axes.includes(d) ? 0 : v.toFixed(3)));
  const key = [n, ...rest, ...(state.y || []), ...state.axes].join();
  if (key !== manifold.key) {
    const small = document.createElement("canvas"), z = Float32Array.from(state.z);
    [small.width, small.height] = [n * model.width, n * model.height];
    for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) {
      z[state.axes[0]] = toLatent((j + 0.5) / n * view.side, 0);
      if (model.size > 1) z[state.axes[1]] = toLatent((i + 0.5) / n * view.side, 1);
      small.getContext("2d").putImageData(pixels(levels(decoded(followed(z, Math.max(...state.axes))))), j * model.width, i * model.height);
    }
    Object.assign(manifold, { key, canvas: small });
  }
  context.imageSmoothingEnabled = manifold.canvas.width > view.side;
  context.drawImage(manifold.canvas, 0, 0, view.side, view.side);
}

function drawTicks(context) {
  context.fillStyle = ink("--soft");
  context.font = "12px system-ui, sans-serif";
  const ground = $("ground").value !== "none";
  const text = (words, x, y, align) => {
    context.textAlign = align;
    const wide = context.measureText(words).width, left = align === "right" ? x - wide : align === "center" ? x - wide / 2 : x;
    if (ground) { context.fillStyle = ink("--card"); context.fillRect(left - 2, y - 11, wide + 4, 14); }
    context.fillStyle = ink("--soft");
    context.fillText(words, x, y);
  };
  const name = d => held.names[state.axes[d]], end = v => v.toFixed(1);
  text(end(view.low[0]), 4, view.side - 5, "left");
  text(`${end(view.high[0])}  ${name(0)}`, view.side - 5, view.side - 5, "right");
  text(model.size > 1 ? `${end(view.high[1])}  ${name(1)}` : "rows, in order", 4, 14, "left");
}

function drawCrosses(context) {
  const { z, excess } = held.draws, [, far] = excess ? spread(excess.data) : [0, 0];
  for (let n = 0; n < z.shape[0]; n++) {
    const [x, y] = place(z, n), hole = excess && excess.data[n] > Math.max(0, 0.75 * far);
    context.strokeStyle = hole ? ink("--orange") : ink("--blue");
    context.lineWidth = hole ? 2 : 1.2;
    context.beginPath();
    context.moveTo(x - 4, y); context.lineTo(x + 4, y); context.moveTo(x, y - 4); context.lineTo(x, y + 4);
    context.stroke();
  }
}

function drawComponents(context) {
  const { loc, scale, weights } = held.prior, most = Math.max(...weights.data);
  const unit = view.side / (view.high[0] - view.low[0]);
  for (let c = 0; c < loc.shape[0]; c++) {
    const [x, y] = place(loc, c), [a, b] = state.axes.map(d => scale.data[c * model.size + d] * unit);
    context.globalAlpha = 0.25 + 0.75 * weights.data[c] / most;
    context.strokeStyle = ink("--orange");
    context.lineWidth = c === state.component ? 3 : 1.2;
    context.beginPath(); context.ellipse(x, y, a, b, 0, 0, 7); context.stroke();
  }
  context.globalAlpha = 1;
}

function coloured() {
  const { labels, log_prob, elbo } = held.rows, kind = $("colour").value;
  if (kind === "class") return { of: n => PALETTE[labels.data[n] % PALETTE.length], glyph: n => (labels.data[n] < 0 ? "?" : String(labels.data[n])) };
  const values = { log_prob: log_prob.data, elbo: elbo.data, gap: log_prob.data.map((v, n) => v - elbo.data[n]) }[kind];
  if (!values) return { of: () => ink("--point") };
  const [low, high] = spread(values);
  const of = n => (Number.isFinite(values[n]) ? `rgb(${ramp(RAMP, (values[n] - low) / (high - low))})` : "");
  return { of, low, high };
}

function drawPoints(context) {
  const { means } = held.rows, { of, glyph } = coloured(), dense = means.shape[0] > (view.side / 14) ** 2;
  context.font = "600 11px system-ui, sans-serif";
  context.textAlign = "center";
  for (let n = 0; n < means.shape[0]; n++) {
    const [x, y] = place(means, n), colour = of(n);
    context.strokeStyle = context.fillStyle = colour || ink("--soft");
    if (glyph && !dense) { context.lineWidth = 3; context.strokeStyle = ink("--card"); context.strokeText(glyph(n), x, y + 4); context.fillText(glyph(n), x, y + 4); }
    else {
      context.beginPath(); context.arc(x, y, 2.6, 0, 7);
      context.lineWidth = 1;
      if (colour) context.fill(); else context.stroke();
    }
    if (state.chosen.has(n)) { context.strokeStyle = ink("--orange"); context.lineWidth = 2; context.beginPath(); context.arc(x, y, 7, 0, 7); context.stroke(); }
  }
}

function drawMarks(context) {
  const { means, scales } = held.rows, unit = view.side / (view.high[0] - view.low[0]);
  context.lineWidth = 2;
  if (state.row >= 0) {
    const [x, y] = place(means, state.row);
    context.strokeStyle = ink("--blue");
    for (const times of [1, 2]) {
      const [a, b] = state.axes.map(d => Math.max(1, times * scales.data[state.row * model.size + d] * unit));
      context.beginPath(); context.ellipse(x, y, a, b, 0, 0, 7); context.stroke();
    }
  }
  if (state.path) drawPath(context);
  const [x, y] = spot(state.z);
  for (const [colour, width] of [[ink("--card"), 6], [ink("--ink"), 2.5]]) {
    context.strokeStyle = colour; context.lineWidth = width;
    context.beginPath(); context.arc(x, y, 8, 0, 7);
    context.moveTo(x - 13, y); context.lineTo(x + 13, y); context.moveTo(x, y - 13); context.lineTo(x, y + 13);
    context.stroke();
  }
  if (state.lasso) {
    context.strokeStyle = ink("--orange"); context.setLineDash([5, 4]);
    context.beginPath(); state.lasso.forEach(([a, b], i) => (i ? context.lineTo(a, b) : context.moveTo(a, b)));
    context.closePath(); context.stroke(); context.setLineDash([]);
  }
}

function drawPath(context) {
  context.strokeStyle = ink("--orange");
  context.lineWidth = 2.5;
  context.beginPath();
  for (let i = 0; i <= 40; i++) {
    const [x, y] = spot(between(i / 40));
    if (i) context.lineTo(x, y); else context.moveTo(x, y);
  }
  context.stroke();
}

// ---- between two rows

function between(t) {
  const a = row(held.rows.means, state.from), b = row(held.rows.means, state.to);
  if (document.querySelector("[name=path]:checked").value === "line") return a.map((v, d) => v + t * (b[d] - v));
  const [m, n] = [a, b].map(v => Math.sqrt(distance(v, v.map(() => 0))));
  const cosine = a.reduce((s, v, d) => s + v * b[d], 0) / (m * n || 1);
  const angle = Math.acos(Math.min(1, Math.max(-1, cosine)));
  if (!(Math.sin(angle) > 1e-4)) return a.map((v, d) => v + t * (b[d] - v));
  const [p, q] = [Math.sin((1 - t) * angle), Math.sin(t * angle)].map(v => v / Math.sin(angle));
  const size = m + t * (n - m);
  return a.map((v, d) => size * (p * v / m + q * b[d] / n));
}

function drawFilm() {
  const y = held.rows.y ? row(held.rows.y, state.from) : null;
  const steps = Array.from({ length: 9 }, (_, i) => i / 8);
  tiled($("film"), model.image ? steps.map(t => pixels(levels(decoded(between(t), y)))) : [], 9);
}

// ---- what is shown of the code and of a row

function drawMade() {
  const x = decoded(state.z);
  if (model.image) paint($("picture"), pixels(levels(x)));
  else drawColumns(x);
  const shown = [...state.z].slice(0, 12).map(fixed).join(", ");
  $("code").textContent = `z = (${shown}${model.size > 12 ? ", ..." : ""})`;
}

let bars = [];

function columnName(i) {
  return held.output.columns[i] || `x${i}`;
}

function makeColumns() {
  const { shape } = held.output, most = Math.min(500, count(shape));
  bars = Array.from({ length: most }, (_, i) => {
    const line = added($("columns"), "div", "column");
    const name = added(line, "span"), bar = added(line, "span", "bar"), value = added(line, "span");
    name.textContent = name.title = columnName(i);
    return { fill: added(bar, "i"), mark: added(bar, "b"), value };
  });
  added($("columns"), "p", "soft").textContent = `Bars: E[x | z], from the 1st to the 99th percentile of the rows.${held.rows.shown ? " Marks: the picked row." : ""}`;
  if (most < count(shape)) added($("columns"), "p", "soft").textContent = `The first ${most} of ${count(shape)} columns.`;
}

function drawColumns(x) {
  const unit = levels(x), own = state.row >= 0 && held.rows.shown ? levels(row(held.rows.shown, state.row)) : null;
  const part = v => `${Math.min(100, Math.max(0, 100 * v))}%`;
  bars.forEach(({ fill, mark, value }, i) => {
    fill.style.width = part(unit[i]);
    mark.hidden = !own || !Number.isFinite(own[i]);
    if (!mark.hidden) mark.style.left = part(own[i]);
    const names = held.output.categories[i] || [];
    value.textContent = value.title = names.length === 2 ? `${(100 * x[i]).toFixed(0)}% ${names[1]}` : cell(x[i], names);
    if (names.length > 2) [fill.style.width, mark.hidden] = [0, true];
  });
}

// A value of a column: the name of a code, or a number.
function cell(v, names) {
  if (names.length) return names[Math.min(names.length - 1, Math.max(0, Math.round(v)))];
  return Number(v.toPrecision(4)).toLocaleString(undefined, { useGrouping: "min2" });
}

// Two decimals, and no minus before a zero.
const fixed = v => (Math.round(100 * v) / 100 || 0).toFixed(2);

// The values of a row of a table, the first dozen.
function values(x) {
  const each = [...x].slice(0, 12).map((v, i) => `${columnName(i)} ${Number.isFinite(v) ? cell(v, held.output.categories[i] || []) : "missing"}`);
  return each.join(", ") + (x.length > 12 ? ", ..." : "");
}

function drawRow() {
  const n = state.row;
  $("numbers").hidden = n < 0;
  if (n < 0) return;
  if (model.image) {
    if (held.rows.shown) paint($("original"), thumbnail(n));
    const y = held.rows.y ? row(held.rows.y, n) : null;
    paint($("again"), pixels(levels(decoded(row(held.rows.means, n), y))));
  }
  const { log_prob, stderr, verdict, elbo, labels, numbers } = held.rows, told = Number.isFinite(log_prob.data[n]);
  const lines = {
    row: String(numbers.data[n]),
    ...(labels ? { class: className(n) } : {}),
    ...(!model.image && held.rows.shown ? { values: values(row(held.rows.shown, n)) } : {}),
    "log p(x)": told ? `${fixed(log_prob.data[n])} ± ${stderr.data[n].toPrecision(2)} nats, ${verdict[n]}` : "not estimated: evaluate first, or raise judged",
    ELBO: `${fixed(elbo.data[n])} nats, a lower bound`,
    ...(told ? { "inference gap": `${fixed(log_prob.data[n] - elbo.data[n])} nats, log p(x) less ELBO` } : {}),
    "q(z | x)": [...row(held.rows.means, n)].slice(0, 6).map((m, d) => `${fixed(m)} ± ${fixed(row(held.rows.scales, n)[d])}`).join(", ") + (model.size > 6 ? ", ..." : ""),
  };
  $("numbers").replaceChildren();
  for (const [name, text] of Object.entries(lines)) {
    const line = added($("numbers"), "tr");
    added(line, "th").textContent = name;
    added(line, "td").textContent = text;
  }
}

function drawChosen() {
  const rows = [...state.chosen].sort((a, b) => a - b);
  $("count").textContent = rows.length;
  $("list").value = rows.map(n => held.rows.numbers.data[n]).join(", ");
  const few = model.image && held.rows.shown ? rows.slice(0, 60) : [];
  tiled($("strip"), few.map(thumbnail), 12);
}

// ---- moving

let waiting = false;

function refresh() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; shown(); });
}

function shown() {
  drawMap();
  drawMade();
  for (const { d, slider, value } of state.sliders) {
    slider.value = state.z[d];
    value.textContent = fixed(state.z[d]);
  }
}

function move(z, y) {
  state.z = Float32Array.from(z);
  if (y && state.y) { state.y = Float32Array.from(y); showCondition(); }
  refresh();
}

// A code with the layers below that of a latent at their means given it.
function followed(z, d) {
  let layer = 0;
  for (let end = held.layers[0]; d >= end; end += held.layers[++layer]);
  return layer && model.follow.length && $("follow").checked ? Float32Array.from(model.follow[layer - 1](z, state.y)) : z;
}

const follow = d => { state.z = followed(state.z, d); };

function pick(n) {
  state.row = n;
  $("row").value = n;
  move(row(held.rows.means, n), held.rows.y && row(held.rows.y, n));
  drawRow();
}

function nearest(z, most = Infinity) {
  const { means } = held.rows;
  let best = -1, least = most;
  for (let n = 0; n < means.shape[0]; n++) {
    const far = distance(row(means, n), z);
    if (far < least) [best, least] = [n, far];
  }
  return best;
}

function pointed([x, y], most = 9) {
  let best = -1, least = most;
  for (let n = 0; n < held.rows.means.shape[0]; n++) {
    const [a, b] = place(held.rows.means, n), far = Math.hypot(a - x, b - y);
    if (far < least) [best, least] = [n, far];
  }
  return best;
}

function inside(polygon, [x, y]) {
  let odd = false;
  polygon.forEach(([ax, ay], i) => {
    const [bx, by] = polygon[(i + 1) % polygon.length];
    if (ay > y !== by > y && x < ax + (y - ay) / (by - ay) * (bx - ax)) odd = !odd;
  });
  return odd;
}

function choose(rows, keep) {
  if (!keep) state.chosen.clear();
  rows.forEach(n => state.chosen.add(n));
  drawChosen();
  refresh();
}

// A standard normal draw.
const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());

function drawFrom(c) {
  const { loc, scale } = held.prior;
  state.component = c;
  $("component").value = c;
  move(row(loc, c).map((m, d) => m + row(scale, c)[d] * normal()));
}

function drawPrior() {
  const { weights } = held.prior;
  if (!weights) return jump(Math.floor(Math.random() * held.draws.z.shape[0]), "One of the draws made beforehand");
  let left = Math.random(), c = 0;
  while (c < weights.data.length - 1 && (left -= weights.data[c]) > 0) c++;
  drawFrom(c);
  $("drawn").textContent = weights.data.length > 1 ? `A draw from component ${c}, of weight ${weights.data[c].toPrecision(2)}.` : "A draw from the prior.";
}

function jump(n, words) {
  move(row(held.draws.z, n), held.draws.y && row(held.draws.y, n));
  const { excess } = held.draws;
  $("drawn").textContent = `${words}${excess ? `: log p(z) less log q(z) is ${excess.data[n].toFixed(1)} nats` : ""}.`;
}

let holes = 0;

function nextHole() {
  const { excess } = held.draws;
  const order = [...excess.data.keys()].sort((a, b) => excess.data[b] - excess.data[a]);
  jump(order[holes % 20], `Hole ${holes % 20 + 1} of 20, draws of the prior where codes are fewest`);
  holes++;
}

function showComponent(c) {
  state.component = c;
  move(row(held.prior.loc, c));
  $("drawn").textContent = `The mean of component ${c}, of weight ${held.prior.weights.data[c].toPrecision(2)}.`;
  if (!held.prior.inputs) return;
  $("pseudo").hidden = false;
  paint($("pseudo"), pixels(Float32Array.from(row(held.prior.inputs, c), v => v / 255)));
}

// ---- controls

function added(parent, tag, kind = "") {
  const element = document.createElement(tag);
  element.className = kind;
  return parent.appendChild(element);
}

function offer(select, choices) {
  select.replaceChildren();
  for (const [value, text] of choices) {
    const option = added(select, "option");
    [option.value, option.textContent] = [value, text];
  }
}

function makeSliders(most) {
  const order = held.kl.map((_, d) => d).sort((a, b) => held.kl[b] - held.kl[a]).slice(0, most);
  $("sliders").replaceChildren();
  state.sliders = order.map(d => {
    const name = added($("sliders"), "label"), slider = added($("sliders"), "input");
    const value = added($("sliders"), "output"), note = added($("sliders"), "span", "soft");
    Object.assign(slider, { type: "range", id: `z${d}`, min: -4, max: 4, step: 0.01 });
    Object.assign(name, { htmlFor: slider.id, textContent: held.names[d] });
    note.textContent = held.kl[d].toFixed(2);
    slider.addEventListener("input", () => { state.z[d] = Number(slider.value); follow(d); refresh(); });
    return { d, slider, value };
  });
  $("more").hidden = most >= model.size;
}

function ordered() {
  const { log_prob, elbo, numbers } = held.rows, n = [...elbo.data.keys()];
  const value = {
    row: i => numbers.data[i], low: i => log_prob.data[i], high: i => -log_prob.data[i],
    gap: i => elbo.data[i] - log_prob.data[i], elbo: i => elbo.data[i],
  }[$("sort").value];
  const last = v => (Number.isFinite(v) ? v : Infinity);
  return n.sort((a, b) => last(value(a)) - last(value(b)) || a - b);
}

function offerRows() {
  offer($("row"), ordered().map(n => [n, rowName(n)]));
  $("row").value = state.row;
}

const className = n => (held.rows.labels.data[n] < 0 ? "unknown" : String(held.rows.labels.data[n]));
const rowName = n => `${held.rows.numbers.data[n]}${held.rows.labels ? ` (class ${className(n)})` : ""}`;

function step(by) {
  const select = $("row"), last = select.options.length - 1;
  pick(Number(select.options[Math.min(last, Math.max(0, select.selectedIndex + by))].value));
}

function makeCondition() {
  if (!state.y) return;
  $("condition").hidden = false;
  if (held.classes === state.y.length) {
    const label = added($("condition"), "label"), select = added(label, "select");
    label.prepend("class ");
    offer(select, [...state.y.keys()].map(c => [c, c]));
    select.addEventListener("change", () => move(state.z, state.y.map((_, c) => Number(c === Number(select.value)))));
    return;
  }
  state.y.forEach((_, c) => {
    const label = added($("condition"), "label"), input = added(label, "input");
    label.prepend(`y${c} `);
    Object.assign(input, { type: "number", step: "any" });
    input.addEventListener("input", () => { state.y[c] = Number(input.value); refresh(); });
  });
}

function showCondition() {
  const [select] = $("condition").getElementsByTagName("select");
  if (select) select.value = state.y.indexOf(1);
  else [...$("condition").getElementsByTagName("input")].forEach((input, c) => { input.value = state.y[c]; });
}

function legend() {
  const ground = $("ground").value, { low, high } = coloured();
  const words = {
    none: "", decoded: "Ground: what the decoder makes of each place.",
    prior: "Ground: log p(z), bright where the prior draws most.",
    codes: "Ground: log q(z), bright where most codes are.",
    holes: "Ground: orange where the prior draws and no codes are (holes), blue where codes are denser than the prior says; strongest from 4 nats.",
  }[ground];
  const scale = low === undefined ? "" : ` Points: dark is ${low.toFixed(1)}, bright is ${high.toFixed(1)} nats${$("colour").value === "elbo" ? "" : "; rings are not estimated"}.`;
  const draws = $("show-draws").checked && held.draws.excess ? " Crosses: draws of the prior, orange where codes are fewest." : "";
  $("legend").textContent = `${words}${scale}${draws} Ellipses: one and two standard deviations of q(z | x).`;
}

function makeChoices() {
  const { rows, grid, prior } = held, two = model.size === 2;
  offer($("ground"), [["none", "none"], ...(model.image ? [["decoded", "decoded images"]] : []),
    ...(grid ? [["prior", "prior log p(z)"], ["codes", "codes log q(z)"], ["holes", "holes of the prior"]] : [])]);
  if (grid) $("ground").value = "holes";
  const told = rows.log_prob.data.some(Number.isFinite);
  offer($("colour"), [...(rows.labels ? [["class", "class"]] : []), ...(told ? [["log_prob", "log p(x)"], ["gap", "inference gap"]] : []), ["elbo", "ELBO"], ["none", "none"]]);
  const latents = held.names.map((name, d) => [d, name]);
  offer($("across"), latents);
  offer($("up"), latents);
  [$("across").value, $("up").value] = state.axes;
  document.querySelectorAll(".axes").forEach(e => { e.hidden = two || model.size < 2; });
  document.querySelectorAll(".mixture").forEach(e => { e.hidden = !prior.loc || prior.loc.shape[0] < 2; });
  if (prior.loc) $("component").max = prior.loc.shape[0] - 1;
  $("follow").parentNode.hidden = !model.follow.length;
  $("hole").hidden = !held.draws.excess;
  offer($("sort"), [["row", "row number"], ...(told ? [["low", "lowest log p(x)"], ["high", "highest log p(x)"], ["gap", "largest gap"]] : []), ["elbo", "lowest ELBO"]]);
  const all = [...rows.numbers.data.keys()].map(n => [n, rowName(n)]);
  for (const id of ["from", "to"]) { offer($(id), all); $(id).value = state[id]; }
  $("picture").hidden = !model.image;
  document.querySelector(".pair").hidden = !model.image;
  $("original").parentNode.hidden = !rows.shown;
}

function told() {
  $("about").textContent = held.about[0];
  $("order").textContent = `Ordered by ${held.order}, shown at the right.`;
  const notes = [...held.about.slice(1), held.decoder.said];
  notes.push("log p(x), ELBO and gap are in nats per row, of the data as the model sees them. They were computed beforehand, with their errors; the page computes means of decoded data only.");
  notes.push(held.prior.loc ? "The page draws from the prior itself." : `The page cannot draw from this prior itself: it takes one of ${held.draws.z.shape[0]} draws made beforehand.`);
  if (held.draws.excess) notes.push("A hole is a place where the prior draws and few codes are: log p(z) less log q(z) is large. q(z) is the average of q(z | x) over the rows of this page; in many latents it is low between codes everywhere, so compare draws with one another.");
  if (!held.rows.shown) notes.push("The rows themselves were left out.");
  notes.forEach(text => { added(document.querySelector("#notes ul"), "li").textContent = text; });
}

function centre() {
  const { means } = held.rows, z = new Float32Array(model.size);
  means.data.forEach((v, i) => { z[i % model.size] += v / means.shape[0]; });
  return z;
}

// ---- the pointer and the keys

const at = event => { const box = $("map").getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
const mode = () => document.querySelector("[name=mode]:checked").value;

function moveTo([x, y]) {
  const z = Float32Array.from(state.z);
  state.axes.slice(0, model.size).forEach((d, k) => { z[d] = toLatent([x, y][k], k); });
  move(z);
  follow(Math.max(...state.axes));
}

function onMap() {
  const canvas = $("map");
  let start = null;
  canvas.addEventListener("pointerdown", event => {
    canvas.setPointerCapture(event.pointerId);
    start = at(event);
    if (mode() === "select") state.lasso = [start];
    else if (pointed(start) < 0) moveTo(start);
  });
  canvas.addEventListener("pointermove", event => {
    const here = at(event);
    if (!start) return hover(here);
    if (state.lasso) { state.lasso.push(here); return refresh(); }
    if (Math.hypot(here[0] - start[0], here[1] - start[1]) > 3) moveTo(here);
  });
  canvas.addEventListener("pointerup", event => {
    const end = at(event), still = start && Math.hypot(end[0] - start[0], end[1] - start[1]) <= 3, n = pointed(end);
    if (state.lasso) lassoed(still, n, event.shiftKey);
    else if (still && n >= 0) pick(n);
    start = null;
  });
  canvas.addEventListener("pointerleave", () => { $("hover").hidden = true; });
  canvas.addEventListener("keydown", keyed);
}

function lassoed(still, n, keep) {
  const polygon = state.lasso, { means } = held.rows;
  state.lasso = null;
  const found = [...Array(means.shape[0]).keys()].filter(i => inside(polygon, place(means, i)));
  choose(still ? (n >= 0 ? [n] : []) : found, keep);
}

function hover(here) {
  const n = pointed(here), canvas = $("hover");
  canvas.hidden = n < 0 || !model.image || !held.rows.shown;
  $("map").title = n < 0 ? "" : `row ${rowName(n)}`;
  if (canvas.hidden) return;
  paint(canvas, thumbnail(n));
  canvas.style.left = `${Math.min(here[0] + 14, view.side - 90)}px`;
  canvas.style.top = `${Math.max(0, here[1] - 100)}px`;
}

function keyed(event) {
  const by = (event.shiftKey ? 0.05 : 0.01) * (view.high[0] - view.low[0]);
  const arrows = { ArrowLeft: [0, -by], ArrowRight: [0, by], ArrowDown: [1, -by], ArrowUp: [1, by] };
  if (event.key in arrows) {
    const [k, change] = arrows[event.key], z = Float32Array.from(state.z);
    z[state.axes[k]] += change;
    move(z);
    follow(state.axes[k]);
  } else if (event.key === "Enter") pick(nearest(state.z));
  else if (event.key === " ") {
    const n = nearest(state.z);
    if (state.chosen.has(n)) { state.chosen.delete(n); choose([], true); } else choose([n], true);
  } else return;
  event.preventDefault();
}

function connect() {
  const on = (id, kind, f) => $(id).addEventListener(kind, f);
  onMap();
  for (const id of ["ground", "colour", "show-draws", "show-components"]) on(id, "change", () => { legend(); refresh(); });
  for (const [k, id] of ["across", "up"].entries()) on(id, "change", () => { state.axes[k] = Number($(id).value); framed(); refresh(); });
  on("draw", "click", drawPrior);
  on("hole", "click", nextHole);
  on("centre", "click", () => move(centre()));
  on("component", "input", () => {
    const last = held.prior.loc.shape[0] - 1;
    showComponent(Math.min(last, Math.max(0, Math.floor(Number($("component").value)) || 0)));
  });
  on("component-draw", "click", () => { drawFrom(state.component); $("drawn").textContent = `A draw from component ${state.component}.`; });
  on("more", "click", () => { makeSliders(model.size); refresh(); });
  on("row", "change", () => pick(Number($("row").value)));
  on("sort", "change", () => { offerRows(); pick(Number($("row").options[0].value)); });
  on("previous", "click", () => step(-1));
  on("next", "click", () => step(1));
  const along = () => { state.path = true; drawFilm(); move(between(Number($("position").value)), held.rows.y && row(held.rows.y, state.from)); };
  for (const id of ["from", "to"]) {
    on(id, "change", () => { state[id] = Number($(id).value); along(); });
    on(`as-${id}`, "click", () => { state[id] = Math.max(0, state.row); $(id).value = state[id]; state.path = true; drawFilm(); refresh(); });
  }
  on("position", "input", along);
  document.querySelectorAll("[name=path]").forEach(e => e.addEventListener("change", along));
  on("copy", "click", () => { $("list").select(); document.execCommand("copy"); });
  on("nearest", "click", () => {
    const far = [...held.rows.numbers.data.keys()].map(n => [distance(row(held.rows.means, n), state.z), n]);
    choose(far.sort((a, b) => a[0] - b[0]).slice(0, 20).map(([, n]) => n), true);
  });
  on("clear", "click", () => choose([], false));
  window.addEventListener("resize", refresh);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);
}

function timed() {
  decoded(state.z);
  const times = Array.from({ length: 7 }, () => { const start = performance.now(); decoded(state.z); return performance.now() - start; });
  return times.sort((a, b) => a - b)[3];
}

async function start() {
  prepared(await opened());
  const top = held.kl.map((_, d) => d).sort((a, b) => held.kl[b] - held.kl[a]);
  const { y, means, labels } = held.rows, last = means.shape[0] - 1;
  const other = labels ? labels.data.findIndex(label => label !== labels.data[0]) : last;
  const axes = model.size === 2 ? [0, 1] : [top[0], top[1] ?? top[0]];
  state = { axes, row: 0, from: 0, to: other < 0 ? last : other, path: false, chosen: new Set(), sliders: [], component: 0, lasso: null, z: centre(), y: y ? Float32Array.from(row(y, 0)) : null };
  state.ms = timed();
  document.querySelector("main").hidden = false;
  framed();
  makeSliders(Math.min(12, model.size));
  if (!model.image) makeColumns();
  makeChoices();
  makeCondition();
  connect();
  told();
  offerRows();
  pick(Math.max(0, held.rows.log_prob.data.findIndex(Number.isFinite)));
  drawFilm();
  drawChosen();
  legend();
  shown();
  const { ms } = state;
  $("status").textContent = `A decode takes ${ms < 0.1 ? "less than 0.1" : ms.toFixed(1)} ms here.`;
  document.body.dataset.ready = ms;
}

start().catch(error => {
  document.body.dataset.failed = String(error);
  $("status").textContent = `This page cannot be shown: ${error}`;
});
