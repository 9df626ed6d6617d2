"""Sprites: binary images of five known factors, drawn here or read from the published file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.data import Data
from pyro_vae.files import parsing

FACTORS = ("shape", "scale", "orientation", "x", "y")
DRAWN_AT_ONCE = 4096  # images drawn at once


@dataclass(frozen=True)
class Sprites:
    """Every combination of five factors, as binary images, drawn when asked for.

    Row r has the factors `factors(r)`, of which the last varies fastest, as in the published
    data. The defaults are the sizes of these; fewer values are spread over the same range.
    Nothing is downloaded, and nothing is random. Shapes are squares, ellipses and hearts of
    about the same area; scales go from 0.5 to 1, positions as far as no shape is cut off, and
    orientations once around (the published file holds angle 0 twice). By their symmetry a
    square looks the same at four orientations of a turn, and an ellipse at two.

    Args:
        shapes: Number of shapes, 1 to 3: square, ellipse, heart.
        scales: Number of scales.
        orientations: Number of orientations, counter-clockwise from upright.
        xs: Number of horizontal positions, from the left.
        ys: Number of vertical positions, from the top.
        size: Height and width of an image, 8 or more.

    Raises:
        ValueError: If a number is out of its range.

    References:
        Matthey et al. dSprites: disentanglement testing sprites dataset. 2017.
    """

    shapes: int = 3
    scales: int = 6
    orientations: int = 40
    xs: int = 32
    ys: int = 32
    size: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.shapes <= len(SHAPES) or min(self.sizes) < 1 or self.size < 8:
            raise ValueError(
                f"expected 1 to {len(SHAPES)} shapes, at least 1 value of each other factor and "
                f"images of 8 x 8 or larger; got {self}"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of values of each of `FACTORS`."""
        return self.shapes, self.scales, self.orientations, self.xs, self.ys

    def __len__(self) -> int:
        return math.prod(self.sizes)

    def factors(self, rows: Tensor | None = None) -> Tensor:
        """Returns the index of each factor's value [M, 5] at `rows` [M]; all rows if None."""
        rows = torch.arange(len(self)) if rows is None else rows
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise ValueError(f"expected rows from 0 to {len(self) - 1}; got others")
        return torch.stack(torch.unravel_index(rows, self.sizes), -1)

    def rows(self, factors: Tensor) -> Tensor:
        """Returns the rows [M] that have these factors, int64 [M, 5]: the inverse of `factors`.

        Raises:
            ValueError: If a value is out of its factor's range.
        """
        sizes = torch.tensor(self.sizes)
        if factors.shape[-1] != len(sizes) or ((factors < 0) | (factors >= sizes)).any():
            raise ValueError(f"expected factors [M, 5], from 0 and below {self.sizes}")
        return (factors * (sizes.flip(0).cumprod(0).flip(0) // sizes)).sum(-1)

    def draw(self, rows: Tensor) -> Tensor:
        """Draws the images at `rows`, int64 [M], as uint8 of 0 and 1, [M, 1, size, size]."""
        parts = [self._draw(self.factors(part)) for part in rows.split(DRAWN_AT_ONCE)]
        return torch.cat(parts).unsqueeze(1)

    def data(self) -> Data:
        """Draws all rows, with shapes as labels; `factors(data.rows)` returns their factors."""
        rows = torch.arange(len(self))
        return Data(self.draw(rows), labels=self.factors(rows)[:, 0], levels=2, name="sprites")

    def _draw(self, factors: Tensor) -> Tensor:
        shape, scale, orientation, x, y = factors.T
        size = _linspace(0.5, 1.0, self.scales)[scale]
        angle = orientation * (2 * math.pi / self.orientations)
        centres = [_linspace(MARGIN, 1 - MARGIN, n) for n in (self.xs, self.ys)]
        pixel = (torch.arange(self.size, dtype=torch.float64) + 0.5) / self.size
        right = (pixel - centres[0][x, None])[:, None, :]
        up = (centres[1][y, None] - pixel)[:, :, None]
        cos, sin = (f(angle)[:, None, None] for f in (torch.cos, torch.sin))
        u = (right * cos + up * sin) / size[:, None, None]
        v = (up * cos - right * sin) / size[:, None, None]
        image = torch.zeros(len(factors), self.size, self.size, dtype=torch.uint8)
        for kind, inside in enumerate(SHAPES):
            mask = shape == kind
            image[mask] = inside(u[mask], v[mask]).to(torch.uint8)
        return image


def _heart(u: Tensor, v: Tensor) -> Tensor:
    a, b = u / LOBE, v / LOBE + 0.1  # the curve reaches from -1 to 1.24: nearly centred
    return (a.square() + b.square() - 1).pow(3) <= a.square() * b.pow(3)


HALF = 0.125  # half the side of a square; all lengths are in sides of the image
WIDE, NARROW = 0.2, 0.1  # half the axes of an ellipse
LOBE = 0.13  # unit of length of a heart, whose area is 3.66 of its squares
MARGIN = 0.22  # least distance of a centre from the border: a little more than any shape needs
SHAPES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (  # whether (u, v) is inside a shape
    lambda u, v: (u.abs() <= HALF) & (v.abs() <= HALF),
    lambda u, v: (u / WIDE).square() + (v / NARROW).square() <= 1,
    _heart,
)


def read_dsprites(path: str | Path) -> tuple[Data, Tensor]:
    """Reads the published dSprites file.

    Args:
        path: The .npz file, with the arrays `imgs` [N, H, W] and `latents_classes` [N, 6], whose
            first column, the one colour, is left out. It takes 3 GB of memory.

    Returns:
        The rows, labelled by shape, and the index of each value [N, 5] of `FACTORS`.

    Raises:
        ValueError: If the file cannot be read or lacks these arrays. Python objects in it, such
            as its metadata, are never read.
    """
    what = "the published dSprites file with arrays imgs and latents_classes"
    with (
        parsing(path, what, "download it again"),
        np.load(path, allow_pickle=False) as arrays,
    ):
        images, classes = arrays["imgs"], arrays["latents_classes"]
    if images.ndim != 3 or classes.shape != (len(images), 6) or images.dtype != np.uint8:
        raise ValueError(
            f"{path}: expected imgs [N, H, W] of uint8 and latents_classes [N, 6], got "
            f"{list(images.shape)} of {images.dtype} and {list(classes.shape)}"
        )
    factors = torch.from_numpy(classes[:, 1:].astype(np.int64))
    x = torch.from_numpy(images).unsqueeze(1)
    return Data(x, labels=factors[:, 0], levels=2, name=str(path)), factors


def _linspace(low: float, high: float, count: int) -> Tensor:
    """Returns `count` evenly spaced values from `low` to `high`, or their middle if it is 1."""
    if count == 1:
        return torch.tensor([(low + high) / 2], dtype=torch.float64)
    return torch.linspace(low, high, count, dtype=torch.float64)
