// Runs the steps of a traced function: torch's operations on arrays of float32, in row-major order.
"use strict";

const OPS = {};
const count = shape => shape.reduce((a, b) => a * b, 1);
const made = (shape, data) => ({ shape, data: data || new Float32Array(count(shape)) });
const scalar = value => made([], Float32Array.of(value));
const axis = (t, d) => (d < 0 ? d + t.shape.length : d);
const axes = (t, d) => (d == null || d.length === 0 ? t.shape.map((_, i) => i) : [d].flat().map(i => axis(t, i)));

function strides(shape) {
  const out = new Array(shape.length);
  for (let i = shape.length - 1, step = 1; i >= 0; step *= shape[i--]) out[i] = step;
  return out;
}

// A copy of what lies at these steps in memory.
function strided(t, shape, steps, offset = 0) {
  const out = made(shape);
  const last = shape.length - 1;
  let at = 0;
  const walk = (d, from) => {
    if (d > last) { out.data[at++] = t.data[from]; return; }
    const n = shape[d], step = steps[d];
    if (d === last) for (let i = 0; i < n; i++, from += step) out.data[at++] = t.data[from];
    else for (let i = 0; i < n; i++, from += step) walk(d + 1, from);
  };
  walk(0, offset);
  return out;
}

function expanded(t, shape) {
  const own = strides(t.shape), lead = shape.length - t.shape.length;
  const steps = shape.map((n, d) => (d < lead || (t.shape[d - lead] === 1 && n !== 1) ? 0 : own[d - lead]));
  return strided(t, shape, steps);
}

function common(shapes) {
  const length = Math.max(...shapes.map(s => s.length));
  return Array.from({ length }, (_, d) => {
    const sizes = shapes.map(s => s[d - length + s.length] ?? 1);
    return sizes.find(n => n !== 1) ?? 1;
  });
}

const same = (a, b) => a.length === b.length && a.every((n, i) => n === b[i]);
const whole = (t, shape) => (same(t.shape, shape) ? t : expanded(t, shape));
const valued = x => (typeof x === "object" ? x : scalar(Number(x)));

function unary(f) {
  return (t, ...rest) => {
    const out = made(t.shape);
    for (let i = 0; i < out.data.length; i++) out.data[i] = f(t.data[i], ...rest);
    return out;
  };
}

function binary(f) {
  return (a, b) => {
    [a, b] = [valued(a), valued(b)];
    const out = made(common([a.shape, b.shape]));
    const one = a.data.length === 1, other = b.data.length === 1;
    const x = one ? a.data : whole(a, out.shape).data, y = other ? b.data : whole(b, out.shape).data;
    for (let i = 0; i < out.data.length; i++) out.data[i] = f(x[one ? 0 : i], y[other ? 0 : i]);
    return out;
  };
}

// Folds some dimensions: f of a running value and an entry, from a start.
function folded(t, dims, keep, start, f) {
  const gone = new Set(axes(t, dims));
  const order = [...t.shape.keys()].filter(d => !gone.has(d)).concat([...gone]);
  const moved = OPS.permute(t, order);
  const kept = t.shape.filter((_, d) => !gone.has(d)), length = t.data.length / (count(kept) || 1);
  const out = made(keep ? t.shape.map((n, d) => (gone.has(d) ? 1 : n)) : kept);
  for (let i = 0; i < out.data.length; i++) {
    let value = start;
    for (let j = 0; j < length; j++) value = f(value, moved.data[i * length + j]);
    out.data[i] = value;
  }
  return out;
}

function erf(x) { // series near zero, a continued fraction of erfc beyond: to 1e-9
  const a = Math.abs(x);
  if (a > 5.5) return Math.sign(x);
  if (a < 2.5) {
    let term = x, sum = x;
    for (let n = 1; n < 60 && Math.abs(term) > 1e-17; n++) { term *= -x * x / n; sum += term / (2 * n + 1); }
    return 2 / Math.sqrt(Math.PI) * sum;
  }
  let fraction = 0;
  for (let n = 40; n > 0; n--) fraction = n / 2 / (a + fraction);
  return Math.sign(x) * (1 - Math.exp(-a * a) / Math.sqrt(Math.PI) / (a + fraction));
}

// Half to even, as torch rounds.
function rounded(x) {
  const low = Math.floor(x), rest = x - low;
  return rest > 0.5 || (rest === 0.5 && low % 2 !== 0) ? low + 1 : low;
}

OPS.tanh = unary(Math.tanh);
OPS.sigmoid = unary(x => 1 / (1 + Math.exp(-x)));
OPS.exp = unary(Math.exp);
OPS.expm1 = unary(Math.expm1);
OPS.log = unary(Math.log);
OPS.log1p = unary(Math.log1p);
OPS.log2 = unary(Math.log2);
OPS.log10 = unary(Math.log10);
OPS.sqrt = unary(Math.sqrt);
OPS.rsqrt = unary(x => 1 / Math.sqrt(x));
OPS.abs = unary(Math.abs);
OPS.neg = unary(x => -x);
OPS.sign = unary(Math.sign);
OPS.floor = unary(Math.floor);
OPS.ceil = unary(Math.ceil);
OPS.round = unary(rounded);
OPS.sin = unary(Math.sin);
OPS.cos = unary(Math.cos);
OPS.erf = unary(erf);
OPS.reciprocal = unary(x => 1 / x);
OPS.relu = unary(x => (x > 0 ? x : 0));
OPS.logical_not = unary(x => Number(!x));
OPS.bitwise_not = unary(x => Number(!x));
OPS.isnan = unary(x => Number(Number.isNaN(x)));
OPS.leaky_relu = unary((x, slope = 0.01) => (x > 0 ? x : slope * x));
OPS.elu = unary((x, alpha = 1, scale = 1, inner = 1) => scale * (x > 0 ? x : alpha * Math.expm1(inner * x)));
OPS.clamp = unary((x, low, high) => Math.min(Math.max(x, low ?? -Infinity), high ?? Infinity));
OPS.gelu = (t, words) => unary(words && words.approximate === "tanh"
  ? x => x / 2 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)))
  : x => x / 2 * (1 + erf(x * Math.SQRT1_2)))(t);
OPS.full_like = (t, value) => made(t.shape, new Float32Array(t.data.length).fill(value));

const sum = binary((x, y) => x + y), difference = binary((x, y) => x - y);
const times = (b, words) => (words && words.alpha !== undefined ? OPS.mul(b, words.alpha) : b);
OPS.mul = binary((x, y) => x * y);
OPS.add = (a, b, words) => sum(a, times(b, words));
OPS.sub = (a, b, words) => difference(a, times(b, words));
OPS.div = binary((x, y) => x / y);
OPS.pow = binary((x, y) => x ** y);
OPS.maximum = binary(Math.max);
OPS.minimum = binary(Math.min);
OPS.eq = binary((x, y) => Number(x === y));
OPS.ne = binary((x, y) => Number(x !== y));
OPS.lt = binary((x, y) => Number(x < y));
OPS.le = binary((x, y) => Number(x <= y));
OPS.gt = binary((x, y) => Number(x > y));
OPS.ge = binary((x, y) => Number(x >= y));
OPS.logical_and = binary((x, y) => Number(x && y ? 1 : 0));
OPS.logical_or = binary((x, y) => Number(x || y ? 1 : 0));
OPS.where = (c, a, b) => {
  [a, b] = [valued(a), valued(b)];
  const shape = common([c.shape, a.shape, b.shape]);
  const [p, x, y] = [c, a, b].map(t => whole(t, shape).data);
  return made(shape, x.map((value, i) => (p[i] ? value : y[i])));
};

OPS.view = (t, shape) => {
  const known = shape.reduce((a, n) => (n < 0 ? a : a * n), 1);
  return made(shape.map(n => (n < 0 ? t.data.length / known : n)), t.data);
};
OPS.reshape = OPS.view;
OPS.unsafe_view = OPS.view;
OPS.clone = t => t;
OPS.alias = t => t;
OPS.to_copy = t => t;
OPS.getitem = (parts, i) => parts[i];
OPS.squeeze = (t, dims) => {
  const gone = new Set(axes(t, dims));
  return made(t.shape.filter((n, d) => !(gone.has(d) && n === 1)), t.data);
};
OPS.unsqueeze = (t, d) => made(t.shape.toSpliced(d < 0 ? d + t.shape.length + 1 : d, 0, 1), t.data);
OPS.permute = (t, dims) => {
  const own = strides(t.shape);
  return strided(t, dims.map(d => t.shape[axis(t, d)]), dims.map(d => own[axis(t, d)]));
};
OPS.expand = (t, shape) => {
  const lead = shape.length - t.shape.length;
  return expanded(t, shape.map((n, d) => (n < 0 ? t.shape[d - lead] : n)));
};
OPS.select = (t, d, i) => {
  d = axis(t, d);
  const own = strides(t.shape), rest = [...t.shape.keys()].filter(k => k !== d);
  const at = i < 0 ? i + t.shape[d] : i;
  return strided(t, rest.map(k => t.shape[k]), rest.map(k => own[k]), at * own[d]);
};
OPS.slice = (t, d = 0, start = 0, end = null, step = 1) => {
  d = axis(t, d);
  const n = t.shape[d], inside = i => Math.min(Math.max(i < 0 ? i + n : i, 0), n);
  const own = strides(t.shape), from = inside(start ?? 0), to = inside(end ?? n);
  const shape = t.shape.with(d, Math.max(0, Math.ceil((to - from) / step)));
  return strided(t, shape, own.map((s, k) => (k === d ? s * step : s)), from * own[d]);
};
OPS.split_with_sizes = (t, sizes, d = 0) => {
  let from = 0;
  return sizes.map(n => OPS.slice(t, d, from, from += n));
};
OPS.cat = (parts, d = 0) => {
  parts = parts.filter(t => !(t.shape.length === 1 && t.shape[0] === 0));
  d = axis(parts[0], d);
  const inner = count(parts[0].shape.slice(d + 1)), outer = count(parts[0].shape.slice(0, d));
  const out = made(parts[0].shape.with(d, parts.reduce((n, t) => n + t.shape[d], 0)));
  let at = 0;
  for (let i = 0; i < outer; i++) for (const t of parts) {
    const n = t.shape[d] * inner;
    out.data.set(t.data.subarray(i * n, (i + 1) * n), at);
    at += n;
  }
  return out;
};

OPS.mm = (a, b) => {
  const [n, k] = a.shape, m = b.shape[1], out = made([n, m]), w = b.data;
  for (let i = 0; i < n; i++) for (let j = 0; j < k; j++) {
    const x = a.data[i * k + j];
    if (x === 0) continue;
    for (let c = 0, to = i * m, from = j * m; c < m; c++) out.data[to++] += x * w[from++];
  }
  return out;
};
OPS.addmm = (bias, a, b) => sum(OPS.mm(a, b), bias);
OPS.bmm = (a, b) => {
  const [n, i, k] = a.shape, m = b.shape[2], out = made([n, i, m]);
  for (let s = 0; s < n; s++) {
    const x = made([i, k], a.data.subarray(s * i * k, (s + 1) * i * k));
    const y = made([k, m], b.data.subarray(s * k * m, (s + 1) * k * m));
    out.data.set(OPS.mm(x, y).data, s * i * m);
  }
  return out;
};
OPS.sum = (t, dims = null, keep = false) => folded(t, dims, keep, 0, (a, b) => a + b);
OPS.amax = (t, dims = [], keep = false) => folded(t, dims, keep, -Infinity, Math.max);
OPS.amin = (t, dims = [], keep = false) => folded(t, dims, keep, Infinity, Math.min);
OPS.argmax = (t, d, keep = false) => { // the first of the greatest
  d = axis(t, d);
  const n = t.shape[d], after = new Array(t.shape.length - 1 - d).fill(1);
  const places = made([n, ...after], Float32Array.from({ length: n }, (_, i) => i));
  return OPS.amin(OPS.where(OPS.eq(t, OPS.amax(t, [d], true)), places, n), [d], keep);
};
OPS.mean = (t, dims = null, keep = false) => {
  const total = OPS.sum(t, dims, keep);
  return OPS.mul(total, total.data.length / t.data.length);
};
OPS.logsumexp = (t, dims, keep = false) => {
  const top = OPS.amax(t, dims, true);
  const rest = OPS.log(OPS.sum(OPS.exp(OPS.sub(t, top)), dims, true));
  const total = OPS.add(rest, top);
  return keep ? total : OPS.squeeze(total, dims);
};
OPS.log_softmax = (t, d) => OPS.sub(t, OPS.logsumexp(t, [d], true));
OPS.softmax = (t, d) => OPS.exp(OPS.log_softmax(t, d));

OPS.native_batch_norm_legit_no_training = (t, weight, bias, mean, variance, momentum, eps) => {
  const out = made(t.shape), channels = t.shape[1], inner = count(t.shape.slice(2));
  for (let i = 0; i < out.data.length; i++) {
    const c = Math.floor(i / inner) % channels;
    const unit = (t.data[i] - mean.data[c]) / Math.sqrt(variance.data[c] + eps);
    out.data[i] = unit * (weight ? weight.data[c] : 1) + (bias ? bias.data[c] : 0);
  }
  return [out];
};
OPS.native_layer_norm = (t, shape, weight, bias, eps) => {
  const out = made(t.shape), n = count(shape);
  for (let from = 0; from < out.data.length; from += n) {
    let mean = 0, square = 0;
    for (let i = 0; i < n; i++) mean += t.data[from + i] / n;
    for (let i = 0; i < n; i++) square += (t.data[from + i] - mean) ** 2 / n;
    for (let i = 0; i < n; i++) {
      const unit = (t.data[from + i] - mean) / Math.sqrt(square + eps);
      out.data[from + i] = unit * (weight ? weight.data[i] : 1) + (bias ? bias.data[i] : 0);
    }
  }
  return [out];
};
OPS.upsample_nearest2d = (t, size) => {
  const [n, c, h, w] = t.shape, [H, W] = size, out = made([n, c, H, W]);
  for (let p = 0, at = 0; p < n * c; p++) for (let y = 0; y < H; y++) for (let x = 0; x < W; x++)
    out.data[at++] = t.data[(p * h + Math.floor(y * h / H)) * w + Math.floor(x * w / W)];
  return out;
};
OPS.convolution = (t, kernel, bias, stride, padding, dilation, transposed, extra, groups) => {
  const [n, inputs, h, w] = t.shape, [kh, kw] = kernel.shape.slice(2);
  const outputs = transposed ? kernel.shape[1] * groups : kernel.shape[0];
  const side = (s, k, d) => (transposed
    ? (s - 1) * stride[d] - 2 * padding[d] + dilation[d] * (k - 1) + extra[d] + 1
    : Math.floor((s + 2 * padding[d] - dilation[d] * (k - 1) - 1) / stride[d]) + 1);
  const H = side(h, kh, 0), W = side(w, kw, 1), out = made([n, outputs, H, W]);
  // a kernel entry joins small rows, one in `stride` of the large rows
  const [sh, sw, lh, lw] = transposed ? [h, w, H, W] : [H, W, h, w];
  const per = [inputs / groups, outputs / groups];
  for (let b = 0; b < n; b++) for (let i = 0; i < inputs; i++) for (let j = 0; j < per[1]; j++) {
    const o = Math.floor(i / per[0]) * per[1] + j;
    const at = transposed ? (i * per[1] + j) * kh * kw : (o * per[0] + i % per[0]) * kh * kw;
    const from = (b * inputs + i) * h * w, to = (b * outputs + o) * H * W;
    const [small, large] = transposed ? [from, to] : [to, from];
    for (let ky = 0; ky < kh; ky++) for (let kx = 0; kx < kw; kx++) {
      const value = kernel.data[at + ky * kw + kx], shift = kx * dilation[1] - padding[1];
      const first = Math.max(0, Math.ceil(-shift / stride[1]));
      const end = Math.min(sw, Math.floor((lw - 1 - shift) / stride[1]) + 1);
      for (let y = 0; y < sh; y++) {
        const row = y * stride[0] + ky * dilation[0] - padding[0];
        if (row < 0 || row >= lh) continue;
        let s = small + y * sw + first, l = large + row * lw + first * stride[1] + shift;
        if (transposed) for (let x = first; x < end; x++, l += stride[1]) out.data[l] += value * t.data[s++];
        else for (let x = first; x < end; x++, l += stride[1]) out.data[s++] += value * t.data[l];
      }
    }
  }
  if (!bias) return out;
  for (let i = 0; i < out.data.length; i++) out.data[i] += bias.data[Math.floor(i / (H * W)) % outputs];
  return out;
};

// The function of a declared program, from arrays to an array.
function runnable(program, constants) {
  const first = program.inputs + constants.length;
  return inputs => {
    const values = [...inputs, ...constants];
    const filled = part => {
      if (Array.isArray(part)) return part.map(filled);
      if (part === null || typeof part !== "object") return part;
      return "r" in part ? values[part.r] : Number(part.f);
    };
    program.steps.forEach(([name, parts, words], i) => {
      const given = Object.keys(words).length ? [words] : [];
      values[first + i] = OPS[name](...parts.map(filled), ...given);
    });
    return values[program.output];
  };
}
