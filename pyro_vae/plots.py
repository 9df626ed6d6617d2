"""Figures, from tensors."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_vae import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "calibration",
    "audit",
    "columns",
    "curves",
    "factor_matrix",
    "image_rows",
    "images",
    "latent",
    "reconstructions",
    "save",
    "terms",
    "traversals",
    "unit_kl",
]


def images(x: Tensor, title: str = "", limits: tuple[float, float] | None = None) -> Figure:
    """A square grid of images.

    Args:
        x: Images [N, C, H, W], C one or three.
        title: Above the grid.
        limits: Values shown as black and white; the lowest and highest of `x` if None.
    """
    side = max(1, round(len(x) ** 0.5))
    rows = [_row(x[i : i + side], side) for i in range(0, len(x), side)]
    return _picture(torch.cat(rows, -2), title, limits or _limits(x), width=5)


def reconstructions(
    x: Tensor, reconstructed: Tensor, limits: tuple[float, float] | None = None
) -> Figure:
    """Images [N, C, H, W] in a row, above what the model makes of them, in rows of ten."""
    parts = []
    for i in range(0, len(x), 10):
        pair = [_row(x[i : i + 10], 10), _row(reconstructed[i : i + 10], 10)]
        parts += [*pair, torch.full_like(pair[0][..., :2, :], float("nan"))]
    title = "data (upper rows) and their reconstructions (lower rows)"
    return _picture(torch.cat(parts[:-1], -2), title, limits or _limits(x), width=8)


def image_rows(
    x: Tensor, names: Sequence[str], title: str = "", limits: tuple[float, float] | None = None
) -> Figure:
    """Rows of images [R, T, C, H, W], each with its name [R] to the left; limits as in `images`.

    Raises:
        ValueError: If there is not one name for each row.
    """
    if x.ndim != 5 or len(x) != len(names):
        raise ValueError(
            f"expected images [R, T, C, H, W] and R names; got {list(x.shape)} and {len(names)}"
        )
    picture = torch.cat([_row(row, x.shape[1]) for row in x], -2)
    figure = _picture(picture, title, limits or _limits(x), width=6)
    (ax,) = figure.axes
    ax.set_axis_on()
    for side in ax.spines.values():
        side.set_visible(False)
    height = x.shape[-2]
    middles = [i * (height + 1) + (height - 1) / 2 for i in range(len(x))]
    ax.set_yticks(middles, list(names), fontsize=8)
    ax.set_xticks([])
    ax.tick_params(length=0)
    return figure


def columns(data: Tensor, samples: Tensor, names: Sequence[str] | None = None) -> Figure:
    """Histograms of the first nine columns of tables [N, D]: data beside samples.

    Heights are shares of all rows, so that samples outside the data's range are missed.

    Args:
        data: Rows of data; NaN is left out.
        samples: Rows of the model.
        names: One for each column; their numbers from 0 if None.
    """
    count = data.shape[1]
    shown = min(count, 9)
    rows = int(shown**0.5)
    figure, axes = _axes(rows, -(-shown // rows), 2)
    for d, ax in enumerate(axes[:shown]):
        known = data[:, d][~data[:, d].isnan()]
        bins = _bins(known)
        drawn = samples[:, d]
        for values, label, kind in ((known, "data", "stepfilled"), (drawn, "samples", "step")):
            weights = [1 / len(values)] * len(values)
            column, alpha = values.tolist(), 0.4 if kind == "stepfilled" else 1
            ax.hist(column, bins, weights=weights, histtype=kind, alpha=alpha, label=label)
        ax.set_title(_short(names[d] if names else f"column {d}"), fontsize=9)
        ax.locator_params(axis="x", nbins=4, prune="both")
        ax.tick_params(labelsize=8)
        ax.set_yticks([])
    for ax in axes[shown:]:
        ax.remove()
    figure.set_layout_engine("constrained", wspace=0.06)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    title = f"the first {shown} of {count} columns" if shown < count else "each column"
    figure.suptitle(f"{title}, share of rows", fontsize=10)
    return figure


def curves(rows: Sequence[Mapping[str, float | None]]) -> Figure:
    """Bound, KL and reconstruction over epochs, of training and validation data.

    Args:
        rows: One mapping per epoch, as in `History.rows`: "epoch", "elbo", "kl" and
            "reconstruction" of training, and the same after `validation_`.
    """
    figure, axes = _axes(1, 3, 3.2)
    titles = {"elbo": "ELBO", "kl": "KL", "reconstruction": "reconstruction"}
    for ax, (term, title) in zip(axes, titles.items()):
        for part, start in (("training", ""), ("validation", "validation_")):
            points = [(row["epoch"], row.get(start + term)) for row in rows]
            points = [(e, v) for e, v in points if v is not None]
            if points:
                ax.plot(*zip(*points), label=part, marker="." if len(points) < 3 else None)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("epoch")
    axes[0].set_ylabel("nats per datum")
    axes[0].legend(frameon=False)
    return figure


def latent(
    means: Tensor, labels: Tensor | None = None, names: Sequence[str] | None = None
) -> Figure:
    """Posterior means [N, D] in the two dimensions of largest variance, coloured by label.

    Args:
        means: Posterior means [N, D].
        labels: Class of each of the N data, or None.
        names: Names of the D dimensions; z0, z1, ... if None.
    """
    pair = sorted(means.var(0).argsort(descending=True)[:2].tolist())
    first, second = pair if len(pair) == 2 else (pair[0], pair[0])
    figure, (ax,) = _axes(1, 1, 5)
    x, y = means[:, first].tolist(), means[:, second].tolist()
    if labels is None:
        ax.scatter(x, y, s=6)
    else:
        points = ax.scatter(x, y, c=labels.tolist(), s=6, cmap="tab10")
        ax.legend(*points.legend_elements(num=None), title="label", fontsize=8)
    ax.set_xlabel(f"E[{_unit(first, names)} | x]")
    ax.set_ylabel(f"E[{_unit(second, names)} | x]")
    chosen = ", the two dimensions of largest variance" if means.shape[1] > 2 else ""
    ax.set_title(f"posterior means{chosen}", fontsize=10)
    return figure


def traversals(
    decoded: Tensor,
    kl: Tensor,
    values: Tensor | None = None,
    top: int | None = None,
    limits: tuple[float, float] | None = None,
    dims: Sequence[int | str] | None = None,
) -> Figure:
    """What each latent dimension does: a row of images for each, of most KL first.

    Args:
        decoded: Images [D, T, C, H, W]: dimension d at its t-th value, the others held.
        kl: KL of each dimension [D], in nats.
        values: The T values of a dimension, for the title.
        top: Rows shown; all if None.
        limits: As in `images`.
        dims: Numbers or names of the D dimensions, where they are some of more.
    """
    if decoded.ndim != 5 or len(decoded) != len(kl):
        raise ValueError(
            f"expected images [D, T, C, H, W] and kl [D]; got {list(decoded.shape)} and "
            f"{list(kl.shape)}"
        )
    order = kl.argsort(descending=True)[:top].tolist()
    shown = [d if dims is None else dims[d] for d in order]
    named = [name if isinstance(name, str) else f"z{name}" for name in shown]
    names = [f"{name}, {kl[d]:.2f} nats" for name, d in zip(named, order)]
    title = "each latent dimension by itself"
    if values is not None:
        title += f", from {values.min():.1f} to {values.max():.1f}"
    return image_rows(decoded[order], names, title, limits or _limits(decoded))


def factor_matrix(information: Tensor, names: Sequence[str]) -> Figure:
    """Mutual information of each factor with each latent dimension [F, D], in nats."""
    if information.ndim != 2 or len(information) != len(names):
        raise ValueError(
            f"expected a matrix [F, D] and F names; got {list(information.shape)} and {names}"
        )
    figure, (ax,) = _axes(1, 1, max(3.0, 0.45 * max(information.shape)))
    picture = ax.imshow(information.tolist(), cmap="viridis", vmin=0, aspect="auto")
    figure.colorbar(picture, ax=ax, label="nats")
    ax.set_yticks(range(len(names)), names)
    ax.set_xticks(range(information.shape[1]))
    ax.set_xlabel("latent dimension")
    ax.set_title("mutual information of factors and latents", fontsize=10)
    return figure


def unit_kl(epochs: Tensor, kl: Tensor, names: Sequence[str] | None = None) -> Figure:
    """KL of each latent dimension [T, D] over epochs [T], in nats; the largest are named.

    Args:
        epochs: Epochs [T].
        kl: KL of each dimension after each [T, D].
        names: Names of the D dimensions; z0, z1, ... if None.
    """
    figure, (ax,) = _axes(1, 1, 4)
    named = set(kl[-1].argsort(descending=True)[:10].tolist())
    for d in range(kl.shape[1]):
        ax.plot(epochs.tolist(), kl[:, d].tolist(), label=_unit(d, names) if d in named else None)
    _over_epochs(ax, "KL of each latent dimension")
    return figure


def calibration(uniforms: Tensor, names: Sequence[str]) -> Figure:
    """How often a guide's intervals hold the truth, over their mass, for each latent dimension.

    On the diagonal the guide is right; below it, too sure of itself. The three curves furthest
    from it are named. The band is where 95 % of the curves of an exact guide lie.

    Args:
        uniforms: Of `metrics.calibration` [N, D].
        names: Of its columns.
    """
    figure, (ax,) = _axes(1, 1, 4)
    levels = torch.linspace(0, 1, 101)
    inside = (2 * uniforms.cpu() - 1).abs()
    shares = (inside < levels[:, None, None]).double().mean(1)  # [101, D]
    furthest = (shares - levels[:, None]).abs().amax(0).argsort(descending=True)[:3].tolist()
    band = 1.36 / len(uniforms) ** 0.5  # the Kolmogorov-Smirnov distance of 5 %
    ax.fill_between(levels, levels - band, levels + band, color="0.9", lw=0)
    ax.plot([0, 1], [0, 1], "k--", lw=0.8)
    for d in range(len(names)):
        ax.plot(levels, shares[:, d], color="0.7", lw=0.8)
    for d in furthest:
        ax.plot(levels, shares[:, d], lw=1.6, label=names[d])
    ax.legend(title="furthest off", loc="upper left", frameon=False)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="mass of the guide's interval")
    ax.set_ylabel("share of simulated data whose latent it holds")
    return figure


def terms(epochs: Tensor, parts: Mapping[str, Tensor]) -> Figure:
    """Parts of the KL, such as those of `metrics.elbo_decomposition`, [T] each, over epochs."""
    figure, (ax,) = _axes(1, 1, 4)
    for name, values in parts.items():
        ax.plot(epochs.tolist(), values.tolist(), label=name.replace("_", " "))
    _over_epochs(ax, "parts of the KL")
    return figure


def audit(gap: Tensor, reliable: Tensor, reach: float) -> Figure:
    """What an exact draw adds to the estimate of each simulated datum, in order.

    Args:
        gap: Upper less lower bound [N], in nats.
        reliable: Whether the estimate is called reliable [N].
        reach: The gap beyond which a reliable datum fails the audit.
    """
    figure, (ax,) = _axes(1, 1, 4)
    gap, order = gap.sort()
    for name, which in (("reliable", reliable[order]), ("doubtful", ~reliable[order])):
        (place,) = which.nonzero(as_tuple=True)
        ax.plot(place.tolist(), gap[place].tolist(), ".", label=f"{name}: {len(place)}")
    ax.axhline(reach, color="grey", linewidth=1, linestyle="--")
    ax.set_yscale("symlog", linthresh=reach)
    ax.set_xlabel("simulated data, by gap")
    ax.set_ylabel("gap of the bounds, nats")
    ax.set_title("audit: what an exact draw adds", fontsize=10)
    ax.legend(frameon=False)
    return figure


def save(figure: Figure, path: str) -> None:
    """Writes a PNG at 150 dots per inch, all or nothing."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150, bbox_inches="tight")
    files.write(path, png.getvalue())


def _unit(d: int, names: Sequence[str] | None) -> str:
    return f"z{d}" if names is None else names[d]


def _axes(rows: int, columns: int, size: float) -> tuple[Figure, list]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * size * 1.15, rows * size), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _bins(column: Tensor) -> list[float]:
    """Edges of bins: about the root of the count of rows, or one for each of few integers."""
    low, high = (column.min().item(), column.max().item()) if len(column) else (0.0, 1.0)
    if bool((column == column.round()).all()) and high - low < 40:
        return torch.arange(low - 0.5, high + 1).tolist()
    count = min(max(round(len(column) ** 0.5), 5), 40)
    return torch.linspace(low, high, count + 1).tolist()


def _short(name: str, most: int = 26) -> str:
    name = name if len(name) <= most else f"{name[: most - 3]}..."
    return name.replace("$", r"\$")  # matplotlib takes what is between for mathematics


def _over_epochs(ax: Axes, title: str) -> None:
    ax.set_xlabel("epoch")
    ax.set_ylabel("nats per datum")
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _picture(x: Tensor, title: str, limits: tuple[float, float], width: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, width * x.shape[-2] / x.shape[-1] + 0.4))
    ax = figure.subplots()
    low, high = limits
    shown = ((x.float() - low) / (high - low)).clamp(0, 1).nan_to_num(0.4)
    picture = shown.movedim(0, -1).squeeze(-1)
    ax.imshow(picture.tolist(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title, fontsize=10)
    return figure


def _row(x: Tensor, count: int) -> Tensor:
    """Images [n, C, H, W] side by side, padded to `count`, a grey line between them."""
    x = torch.nn.functional.pad(x.float().cpu(), (0, 1, 0, 1), value=float("nan"))
    blank = torch.full((count - len(x), *x.shape[1:]), float("nan"))
    return torch.cat([*x, *blank], -1)


def _limits(x: Tensor) -> tuple[float, float]:
    x = x[~x.isnan()]
    low, high = (x.min().item(), x.max().item()) if len(x) else (0.0, 1.0)
    return (low, high) if high > low else (low, low + 1)
