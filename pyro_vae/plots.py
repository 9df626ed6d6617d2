"""Draws figures from tensors, in one style."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.rcsetup import cycler
from torch import Tensor

from pyro_vae import files

__all__ = [
    "PALETTE",
    "calibration",
    "audit",
    "columns",
    "curves",
    "factor_matrix",
    "image_rows",
    "images",
    "latent",
    "pairs",
    "reconstructions",
    "save",
    "style",
    "svg",
    "terms",
    "traversals",
    "unit_kl",
]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
"""Colours that colour-blind readers tell apart (Okabe and Ito, Color Universal Design, 2008)."""

STYLE: Any = {
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.markersize": 4,
    "savefig.dpi": 192,
    "svg.hashsalt": "pyro_vae",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
Names = Sequence[str] | Mapping[str, Sequence[str | float]] | None  # of columns (and their codes)
DPI = 96  # pixels of a page in an inch
GREY = "#767676"  # colour of text that is legible on white and on black
DARK_COLOURS = {  # the colour on dark pages of each colour on light ones
    **{"#ffffff": "#181c20", "#000000": "#e4e7ea", "#0072b2": "#4aa3df", "#666666": "#a0a9b2"},
    **{"#b0b0b0": "#444b52", "#b3b3b3": "#5a626a", "#cccccc": "#4a5158", "#e6e6e6": "#2b3138"},
}
RULES = "\n".join(
    f'[style*="{part}: {light}"] {{ {part}: {dark} !important }}'
    for light, dark in DARK_COLOURS.items()
    for part in ("fill", "stroke")
)
DARK = f"\n@media (prefers-color-scheme: dark) {{ svg {{ fill: #e4e7ea }}\n{RULES} }}".encode()


@contextmanager
def style() -> Iterator[None]:
    """Sets the style of the figures here, also for your own: `with plots.style(): ...`.

    Matplotlib's settings are restored afterwards.
    """
    with matplotlib.rc_context(STYLE):
        yield


class _NotebookFigure(Figure):
    """A figure that a notebook shows if it is the last line of a cell."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        width, height = (round(side * DPI) for side in self.get_size_inches())
        return _render(self, "png"), {"width": width, "height": height}


def images(x: Tensor, title: str = "", limits: tuple[float, float] | None = None) -> Figure:
    """Draws images in a square grid.

    Args:
        x: Images [N, C, H, W], C one or three.
        title: Title above the grid.
        limits: Values shown as black and white; the lowest and highest of `x` if None.
    """
    side = max(1, round(len(x) ** 0.5))
    rows = [_image_row(x[i : i + side], side) for i in range(0, len(x), side)]
    return _image_figure(torch.cat(rows, -2), title, limits, width=5)


def reconstructions(
    x: Tensor, reconstructed: Tensor, limits: tuple[float, float] | None = None
) -> Figure:
    """Draws images [N, C, H, W] in rows of ten, each row above that of its reconstructions."""
    parts = []
    for batch in zip(x.split(10), reconstructed.split(10)):
        pair = [_image_row(row, 10) for row in batch]
        parts += [*pair, torch.full_like(pair[0][..., :2, :], math.nan)]
    title = "data (upper rows) and their reconstructions (lower rows)"
    return _image_figure(torch.cat(parts[:-1], -2), title, limits or _min_max(x), width=7)


def image_rows(
    x: Tensor, names: Sequence[str], title: str = "", limits: tuple[float, float] | None = None
) -> Figure:
    """Draws rows of images [R, T, C, H, W] with R names to the left; limits as in `images`.

    Raises:
        ValueError: If there is not one name for each row.
    """
    _check_shape(x, 5, len(names), "images [R, T, C, H, W] and R names")
    picture = torch.cat([_image_row(row, x.shape[1]) for row in x], -2)
    return _image_figure(picture, title, limits, width=6, names=names)


@style()
def columns(data: Tensor, samples: Tensor, names: Names = None) -> Figure:
    """Draws histograms of the first nine columns of data and of samples [N, D].

    Heights are shares of all rows, so those of samples add up to less if some lie outside the
    data's range. Skewed columns above 0 have a logarithmic axis; of others a few far values are
    left out.

    Args:
        data: Rows of data; NaN is left out.
        samples: Rows drawn from the model.
        names: Names of columns (numbers if None), or a mapping from these to names of codes.
    """
    codes = names if isinstance(names, Mapping) else {}
    count = data.shape[1]
    number = min(count, 9)
    figure, axes = _subplots(-(-number // 3), min(number, 3), 2)
    for ax, name, column, draws in zip(axes, _names(names, count, "column "), data.T, samples.T):
        column = column[~column.isnan()]
        bins = _bin_edges(column)
        for values, label, kind in ((column, "data", "stepfilled"), (draws, "samples", "step")):
            kwargs = {"histtype": kind, "alpha": 0.4 if label == "data" else 1, "label": label}
            share = torch.ones(len(values)) / len(values)
            ax.hist(values.tolist(), bins, weights=share.tolist(), **kwargs)
        ax.set_title(_short(name), fontsize=9)
        if _is_skewed(column):
            ax.set_xscale("log")
        else:
            ax.locator_params(axis="x", nbins=4, prune="both", integer=_is_discrete(column))
        _name_ticks(ax.xaxis, codes.get(name, ()))
        ax.set_yticks([])
    for ax in axes[number:]:
        ax.remove()
    figure.set_layout_engine("constrained", wspace=0.06)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    title = f"the first {number} of {count} columns" if number < count else "each column"
    figure.suptitle(f"{title}, share of rows", fontsize=10)
    return figure


@style()
def pairs(data: Tensor, samples: Tensor, names: Names = None) -> Figure:
    """Draws pairs of columns of data above those of samples [N, D], on the axes of the data.

    They are the four pairs, among the first hundred columns, whose ranks correlate most in the
    data. Codes and small counts are spread by a little noise.

    Args:
        data: Rows of data; NaN is left out.
        samples: Rows drawn from the model.
        names: As in `columns`.
    """
    strongest = _most_correlated(data[:, :100], 4)
    figure, axes = _subplots(2, len(strongest), 1.8)
    codes = names if isinstance(names, Mapping) else {}
    titles = _names(names, data.shape[1], "column ")
    parts = (("data", data), ("samples", samples))
    for ax, ((title, rows), pair) in zip(axes, product(parts, strongest)):
        x, y = (_jitter(rows[:1000, d], d).tolist() for d in pair)
        ax.plot(x, y, ".", ms=2, alpha=0.5, color=PALETTE[rows is samples], rasterized=True)
        xlim, ylim = (_axis_limits(_jitter(data[:, d], d)) for d in pair)
        xscale, yscale = ("log" if _is_skewed(data[:, d]) else "linear" for d in pair)
        ax.set(xlim=xlim, ylim=ylim)  # set first: of samples below 0 matplotlib finds none
        ax.set(xscale=xscale, yscale=yscale)
        ax.minorticks_off()
        xlabel, ylabel = (_short(titles[d], 18) for d in pair)
        ax.set(xlabel=xlabel, ylabel=ylabel, xticks=[], yticks=[])
        for axis, d in zip((ax.xaxis, ax.yaxis), pair):
            _name_ticks(axis, codes.get(titles[d], ()), 5)
        if pair == strongest[0]:
            ax.set_title(title, loc="left")
    return figure


@style()
def curves(rows: Sequence[Mapping[str, float | None]]) -> Figure:
    """Draws bound, KL and reconstruction over epochs, of training and validation data.

    Args:
        rows: One mapping per epoch, as in `History.rows`: "epoch", "elbo", "kl" and
            "reconstruction" of training, and the last three with the prefix `validation_`.
    """
    figure, axes = _subplots(1, 3, 2)
    titles = {"elbo": "ELBO", "kl": "KL", "reconstruction": "reconstruction"}
    for ax, (term, title) in zip(axes, titles.items()):
        parts = {"training": term, "validation": f"validation_{term}"}
        lines = {
            part: [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
            for part, key in parts.items()
        }
        _plot_lines(ax, lines, title=title)
    axes[0].set_ylabel("nats per datum")
    _name_lines(axes[-1])
    return figure


@style()
def latent(
    means: Tensor,
    labels: Tensor | None = None,
    names: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Draws posterior means in the two dimensions of largest variance, labels at class medians.

    If there is one dimension alone, the other axis shows the order of the rows.

    Args:
        means: Posterior means [N, D].
        labels: Class of each of the N data, or None.
        names: Names of the D dimensions; z0, z1, ... if None.
        class_names: What the labels stand for; their numbers if None.
    """
    pair = sorted(means.var(0, correction=0).argsort(descending=True)[:2].tolist())
    plane = means[:, pair].float().cpu()
    if len(pair) == 1:
        plane = torch.cat([plane, torch.linspace(*_min_max(plane), len(plane))[:, None]], 1)
    labels = torch.zeros(len(means)) if labels is None else labels
    figure, (ax,) = _subplots(1, 1, 4.5)
    taken, gap = torch.empty(0, 2), 0.06 * (plane.amax(0) - plane.amin(0)).max().item()
    for i, label in enumerate(classes := labels.unique().tolist()):
        points = plane[labels == label]
        kwargs = {"marker": "o^sDv"[i // len(PALETTE) % 5], "color": PALETTE[i % len(PALETTE)]}
        ax.scatter(*points.T.tolist(), s=10, linewidths=0, rasterized=True, **kwargs)
        if len(classes) > 1:
            halo = [withStroke(linewidth=3, foreground="#ffffff")]
            taken = torch.cat([taken, _label_position(points, taken, gap)[None]])
            place = taken[-1].tolist()
            text = {"color": kwargs["color"], "path_effects": halo, "weight": "bold"}
            word = f"{label:g}" if class_names is None else _short(class_names[int(label)], 18)
            ax.text(*place, "?" if label < 0 else word, size=13, **text)
    names = _names(names, means.shape[1], "z")
    xlabel, ylabel = (*(f"E[{names[d]} | x]" for d in pair), "rows, in order")[:2]
    note = ", the two dimensions of largest variance" if means.shape[1] > 2 else ""
    ax.set(xlabel=xlabel, ylabel=ylabel, title=f"posterior means{note}")
    return figure


def _label_position(points: Tensor, taken: Tensor, gap: float) -> Tensor:
    """Returns the median of points [N, 2], or the nearest point that is `gap` from `taken`."""
    median = points.median(0).values
    candidates = torch.cat([median[None], points[(points - median).norm(dim=1).argsort()]])
    is_free = (torch.cdist(candidates, taken) > gap).all(1)
    return candidates[int(is_free.float().argmax())]


def traversals(
    decoded: Tensor,
    kl: Tensor,
    values: Tensor | None = None,
    top: int | None = None,
    limits: tuple[float, float] | None = None,
    dims: Sequence[str | int] | None = None,
) -> Figure:
    """Draws what each latent dimension does: a row of images for each, of most KL first.

    Args:
        decoded: Images [D, T, C, H, W]: dimension d at its t-th value, the others fixed.
        kl: KL of each dimension [D], in nats.
        values: The T values of a dimension, for the title.
        top: Number of rows shown; all if None.
        limits: As in `images`.
        dims: Names of the D dimensions, or their numbers; z0, z1, ... if None.
    """
    _check_shape(decoded, 5, len(kl), "images [D, T, C, H, W] and kl [D]")
    order = kl.argsort(descending=True)[:top].tolist()
    all_names = _names(dims, len(kl), "z")
    names = [f"{all_names[d]}, {kl[d]:.2f} nats" for d in order]
    span = "" if values is None else f", from {values.min():.1f} to {values.max():.1f}"
    title = f"each latent dimension by itself{span}"
    return image_rows(decoded[order], names, title, limits or _min_max(decoded))


@style()
def factor_matrix(information: Tensor, names: Sequence[str]) -> Figure:
    """Draws mutual information of each factor with each latent dimension [F, D], in nats."""
    _check_shape(information, 2, len(names), "a matrix [F, D] and F names")
    figure, (ax,) = _subplots(1, 1, max(3.0, 0.45 * max(information.shape)))
    picture = ax.imshow(information.tolist(), cmap="viridis", vmin=0, aspect="auto")
    figure.colorbar(picture, ax=ax, label="nats")
    ax.set_yticks(range(len(names)), names)
    ax.set_xticks(range(information.shape[1]))
    ax.set(xlabel="latent dimension", title="mutual information of factors and latents")
    return figure


@style()
def unit_kl(epochs: Tensor, kl: Tensor, names: Sequence[str] | None = None) -> Figure:
    """Draws the KL of each latent dimension over epochs, in nats, and its last value as a bar.

    The largest lines and as many bars as fit are named; bars of a layer have one colour.

    Args:
        epochs: Epochs [T].
        kl: KL of each dimension after each epoch [T, D].
        names: Names of the D dimensions; z0, z1, ... if None.
    """
    figure, (ax, bars) = _subplots(1, 2, 3)
    order = kl[-1].argsort(descending=True).tolist()
    names = _names(names, kl.shape[1], "z")
    sites = [names[d].rpartition("[")[0] for d in order]
    for site, colour in zip(sorted(set(sites)), PALETTE):
        bars_of_site = [(i, kl[-1, d].item()) for i, d in enumerate(order) if sites[i] == site]
        total = sum(value for _, value in bars_of_site)
        bars.bar(*zip(*bars_of_site), color=colour, label=f"{site}, {total:.1f} nats")
    lines = {names[d]: [*zip(epochs.tolist(), kl[:, d].tolist())] for d in order}
    _plot_lines(ax, lines, title="KL of each latent dimension", ylabel="nats per datum")
    for line in ax.lines[len(PALETTE) : 10]:
        line.set_linestyle("--")
    for line in ax.lines[10:]:
        line.set(color="0.8", label="_")
    _name_lines(ax)
    title = f"the last of each, {kl[-1].sum():.1f} nats in all"
    bars.set(title=title, xlabel="latent dimensions, in order")
    _name_ticks(bars.xaxis, [names[d] for d in order], 20)
    if len(set(sites)) > 1:
        bars.legend()
    return figure


@style()
def calibration(uniforms: Tensor, names: Sequence[str]) -> Figure:
    """Draws how often a guide's intervals hold the truth, over their mass, for each dimension.

    On the diagonal the guide is right; below it, its intervals are too narrow. The three curves
    furthest from it are named. The band is where 95 % of the curves of an exact guide lie.

    Args:
        uniforms: The uniforms of `metrics.calibration` [N, D].
        names: Names of the D columns.
    """
    figure, (ax,) = _subplots(1, 1, 3.4)
    levels = torch.linspace(0, 1, 101)
    inside = (2 * uniforms.cpu() - 1).abs()
    shares = (inside < levels[:, None, None]).double().mean(1)  # [101, D]
    furthest = (shares - levels[:, None]).abs().amax(0).argsort(descending=True)[:3].tolist()
    band = 1.36 / len(uniforms) ** 0.5  # the Kolmogorov-Smirnov distance of 5 %
    ax.fill_between(levels, levels - band, levels + band, color="0.9", lw=0)
    ax.plot([0, 1], [0, 1], "k--", lw=0.8)
    ax.plot(levels, shares, color="0.7", lw=0.8)
    for d in furthest:
        ax.plot(levels, shares[:, d], lw=1.6, label=names[d])
    ax.legend(title="furthest off", loc="upper left")
    ax.set(xlabel="mass of the guide's interval", xlim=(0, 1), ylim=(0, 1))
    ax.set_ylabel("share of simulated data whose latent it holds")
    return figure


@style()
def terms(epochs: Tensor, parts: Mapping[str, Tensor]) -> Figure:
    """Draws parts of the KL, such as of `metrics.elbo_decomposition`, [T] each, over epochs."""
    figure, (ax,) = _subplots(1, 1, 3)
    lines = {
        name.replace("_", " "): [*zip(epochs.tolist(), values.tolist())]
        for name, values in parts.items()
    }
    _plot_lines(ax, lines, title="parts of the KL", ylabel="nats per datum")
    _name_lines(ax)
    return figure


@style()
def audit(gap: Tensor, reliable: Tensor, reach: float) -> Figure:
    """Draws what an exact draw adds to the estimate of each simulated datum, in ascending order.

    Args:
        gap: Upper less lower bound [N], in nats.
        reliable: Whether each estimate is called reliable [N].
        reach: The gap beyond which a reliable datum fails the audit.
    """
    figure, (ax,) = _subplots(1, 1, 3)
    gap, order = gap.sort()
    for name, which in (("reliable", reliable[order]), ("doubtful", ~reliable[order])):
        (index,) = which.nonzero(as_tuple=True)
        ax.plot(index.tolist(), gap[index].tolist(), ".", label=f"{name}: {len(index)}")
    ax.axhline(reach, color="grey", linewidth=1, linestyle="--")
    ax.set_yscale("symlog", linthresh=reach)
    ax.set(xlabel="simulated data, by gap", ylabel="gap of the bounds, nats; limit dashed")
    ax.set_title("audit: what an exact draw adds")
    ax.legend()
    return figure


def save(figure: Figure, path: str) -> None:
    """Writes a figure to an .svg file, which turns dark with the page, or else as PNG."""
    files.write(path, svg(figure) if path.endswith(".svg") else _render(figure, "png"))


def svg(figure: Figure) -> bytes:
    """Returns a figure as SVG, the same bytes each time; it is dark on a dark screen."""
    image = _render(figure, "svg", metadata={"Date": None})
    return image.replace(b"</style>", DARK + b"</style>", 1)


@style()
def _render(figure: Figure, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, **options)
    return file.getvalue()


def _names(names: Iterable[str | int] | None, count: int, prefix: str) -> list[str]:
    names = range(count) if names is None else names
    return [name if isinstance(name, str) else f"{prefix}{name}" for name in names]


def _subplots(rows: int, columns: int, size: float) -> tuple[Figure, list[Any]]:
    figure = _NotebookFigure(figsize=(columns * size * 1.15, rows * size), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _check_shape(x: Tensor, dims: int, count: int, expected: str) -> None:
    if x.ndim != dims or len(x) != count:
        raise ValueError(f"expected {expected}; got {list(x.shape)} and {count}")


def _is_discrete(column: Tensor) -> bool:
    """Returns whether a column holds integers in a range below 40."""
    low, high = _min_max(column)
    return bool((column == column.round()).all()) and high - low < 40


def _bin_edges(column: Tensor) -> list[float]:
    """Returns the edges of bins: about sqrt(N) bins, or one for each of few integers."""
    low, high = _axis_limits(column)
    if _is_discrete(column):
        return torch.arange(low - 0.5, high + 1).tolist()
    edges = min(max(round(len(column) ** 0.5), 5), 40) + 1
    if _is_skewed(column):
        within = torch.logspace(math.log10(low), math.log10(high), edges).tolist()[1:-1]
        return [low, *within, high]  # exact ends, as many rows may lie there
    return torch.linspace(low, high, edges).tolist()


def _is_skewed(column: Tensor) -> bool:
    """Returns whether a column above 0 reaches 20 times as far above its median as below."""
    column = column[~column.isnan()].double()
    if not len(column) or column.min() <= 0 or _is_discrete(column):
        return False
    low, middle, high = column.quantile(column.new_tensor([0.01, 0.5, 0.99]))
    return bool(high - middle > 20 * (middle - low))


def _axis_limits(column: Tensor) -> tuple[float, float]:
    """Returns the limits of a column, without values far from its middle 98 per cent."""
    column = column[~column.isnan()].double()
    low, high = _min_max(column)
    if not len(column) or _is_discrete(column) or _is_skewed(column):
        return low, high
    start, end = column.quantile(column.new_tensor([0.01, 0.99])).tolist()
    far = 2 * (end - start) or math.inf
    return max(low, start - far), min(high, end + far)


def _most_correlated(data: Tensor, count: int) -> list[list[int]]:
    """Returns the pairs of columns of [N, D] whose ranks have the largest correlations."""
    filled = torch.where(data.isnan(), data.nanmedian(0).values.nan_to_num(), data)
    ranks = torch.stack([column.unique(return_inverse=True)[1] for column in filled.T])
    index = torch.triu_indices(len(ranks), len(ranks), 1)
    strength = torch.corrcoef(ranks.double()).abs().nan_to_num(0.0)[index[0], index[1]]
    best = strength.topk(min(count, len(strength))).indices
    return index[:, best].T.tolist()


def _jitter(column: Tensor, seed: int) -> Tensor:
    """Returns a column, with a little noise added if it holds few integers (`_is_discrete`)."""
    if not _is_discrete(column[~column.isnan()]):
        return column
    noise = torch.rand(column.shape, generator=torch.Generator().manual_seed(seed))
    return column + 0.6 * noise.to(column) - 0.3


def _short(name: str, most: int = 26) -> str:
    name = " ".join(name.split())  # a tab has no glyph
    name = name if len(name) <= most else f"{name[: most - 3]}..."
    return name.replace("$", r"\$")  # matplotlib reads text between them as mathematics


def _name_ticks(axis: Any, names: Sequence[str | float], most: int = 10) -> None:
    """Writes names at 0, 1, ... of an axis, as many as fit; no names leave it as it is."""
    if every := -(-len(names) // most):
        labels = [_short(str(name), 12) for name in names[::every]]
        is_long = axis.axis_name == "x" and len("".join(labels)) > 18
        axis.set_ticks(range(0, len(names), every), labels, rotation=90 * is_long)


def _plot_lines(ax: Any, lines: Mapping[str, Sequence[tuple[Any, Any]]], **labels: str) -> None:
    """Draws lines over epochs, by name; with dots if they are too short to be seen."""
    for name, points in lines.items():
        ax.plot(*zip(*points), label=name, marker="." if len(points) < 3 else "")
    ax.set(xlabel="epoch", **labels)
    ax.locator_params(axis="x", integer=True, min_n_ticks=1)


def _name_lines(ax: Any) -> None:
    """Writes the name of each labelled line beside its right end, at least a text line apart."""
    gap = 0.24 / ax.figure.get_figheight()
    (low, high), height = ax.get_ylim(), -1.0
    lines = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
    lines.sort(key=lambda line: line.get_ydata()[-1])
    for remaining, line in zip(range(len(lines), 0, -1), lines):
        end = (line.get_ydata()[-1] - low) / (high - low)
        height = min(max(end, height + gap), 1 - gap * (remaining - 1))
        name, kwargs = str(line.get_label()), {"color": line.get_color(), "va": "center"}
        ax.text(1.02, height, name, transform=ax.transAxes, **kwargs)


@style()
def _image_figure(
    x: Tensor, title: str, limits: Sequence[float] | None, width: float, names: Sequence[str] = ()
) -> Figure:
    """Draws an image [C, H, W] beside names of rows; a pixel takes a whole number of dots.

    The background is transparent, for light and dark pages.
    """
    high, wide = x.shape[-2:]
    scale = max(1, round(width * DPI / wide))
    left = round(6 * max(map(len, names))) + 8 if names else 0
    top = 24 if title else 0
    size = max(wide * scale + left, 6 * len(title)), high * scale + top
    figure = _NotebookFigure(figsize=(size[0] / DPI, size[1] / DPI), facecolor="none")
    box = left / size[0], 0, wide * scale / size[0], high * scale / size[1]
    ax = figure.add_axes(box)
    darkest, lightest = limits or _min_max(x)
    levels = ((x.float() - darkest) / (lightest - darkest)).clamp(0, 1).nan_to_num(0.4)
    picture = levels.movedim(0, -1).squeeze(-1).tolist()
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    ax.set_title(title, loc="left", color=GREY)
    ax.spines[:].set_visible(False)
    middles = [(i + 0.5) * high / len(names) - 1 for i in range(len(names))]
    ax.set_yticks(middles, names, fontsize=8, color=GREY)
    ax.set_xticks([])
    ax.tick_params(length=0)
    return figure


def _image_row(x: Tensor, count: int) -> Tensor:
    """Joins images [n, C, H, W] side by side, padded to `count`, with a grey line between them."""
    added = (0, 1, 0, 1, 0, 0, 0, count - len(x))  # on both sides of W, H, C and n
    return torch.cat([*torch.nn.functional.pad(x.float().cpu(), added, value=math.nan)], -1)


def _min_max(x: Tensor) -> tuple[float, float]:
    x = x[~x.isnan()]
    low, high = (x.min().item(), x.max().item()) if len(x) else (0.0, 1.0)
    return (low, high) if high > low else (low, low + 1)
