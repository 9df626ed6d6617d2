"""Figures, from tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["columns", "curves", "images", "latent", "reconstructions", "save"]


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


def columns(data: Tensor, samples: Tensor, names: Sequence[str] | None = None) -> Figure:
    """Histograms of the first nine columns of tables [N, D]: data beside samples."""
    shown = min(data.shape[1], 9)
    figure, axes = _axes(-(-shown // 3), min(shown, 3), 2.2)
    for d, ax in enumerate(axes[:shown]):
        low, high = data[:, d].min().item(), data[:, d].max().item()
        bins = torch.linspace(low, high if high > low else low + 1, 40).tolist()
        for values, label in ((data, "data"), (samples, "samples")):
            ax.hist(values[:, d].tolist(), bins, density=True, histtype="step", label=label)
        ax.set_xlabel(names[d] if names else f"column {d}")
        ax.set_yticks([])
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def curves(rows: Sequence[Mapping[str, float | None]]) -> Figure:
    """Bound, KL and reconstruction over epochs, of training and validation data.

    Args:
        rows: One mapping per epoch, as in `History.rows`: "epoch", "elbo", "kl" and
            "reconstruction" of training, and the same after "validation_".
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


def latent(means: Tensor, labels: Tensor | None = None) -> Figure:
    """Posterior means [N, D] in the two dimensions of largest variance, coloured by label."""
    pair = means.var(0).argsort(descending=True)[:2].tolist()
    first, second = pair if len(pair) == 2 else (pair[0], pair[0])
    figure, (ax,) = _axes(1, 1, 5)
    x, y = means[:, first].tolist(), means[:, second].tolist()
    if labels is None:
        ax.scatter(x, y, s=6)
    else:
        points = ax.scatter(x, y, c=labels.tolist(), s=6, cmap="tab10")
        ax.legend(*points.legend_elements(num=None), title="label", fontsize=8)
    ax.set_xlabel(f"E[z{first} | x]")
    ax.set_ylabel(f"E[z{second} | x]")
    ax.set_title("posterior means, the two dimensions of largest variance", fontsize=10)
    return figure


def save(figure: Figure, path: str) -> None:
    """Writes a PNG at 150 dots per inch, and closes the figure."""
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _axes(rows: int, columns: int, size: float) -> tuple[Figure, list]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * size * 1.15, rows * size), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


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
    low, high = x.min().item(), x.max().item()
    return (low, high) if high > low else (low, low + 1)
