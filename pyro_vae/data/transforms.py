"""Transforms from the original values of a file to model values, with their log-Jacobians."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.arguments import closest
from pyro_vae.data.mapped import CHUNK, Mapped

NAMES = ("none", "threshold", "static", "dynamic", "dequantise", "rescale", "standardise")
BINARY = NAMES[1:4]


class Transform:
    r"""A map T from original values to model values.

    A model gives :math:`\log p(T(x))`; in the original units, of bin width 1, the density is

    .. math:: \log p(x) = \log p(T(x)) + \log |\det \partial T / \partial x|.

    Attributes:
        noisy: Whether T needs uniform noise.
        fresh: Whether training redraws the noise at each visit; otherwise each row keeps its own.
        binary: Whether every model value is 0 or 1.
    """

    noisy = False
    fresh = False
    binary = False

    def __call__(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """Maps rows to model values.

        Args:
            x: The original values, [N, *E].
            u: Uniform noise in [0, 1) of the same shape; read only where ``noisy``.

        Returns:
            The model values, float32 [N, *E].

        Raises:
            ValueError: If the transform is noisy and ``u`` is None.
        """
        if self.noisy and u is None:
            raise ValueError(f"{type(self).__name__} needs uniform noise u of x's shape, got None")
        return self._map(x, u)

    def _map(self, x: Tensor, u: Any) -> Tensor:
        return x.float()

    def fixed(self, x: Tensor, rows: Tensor, seed: int) -> Tensor:
        """Maps rows to model values, uint8 if binary; noise depends on `seed` and row ids."""
        u = row_noise(rows, x.shape[1:], seed) if self.noisy else None
        return self(x, u).to(torch.uint8 if self.binary else torch.float32)

    def inverse(self, x: Tensor) -> Tensor:
        """Maps model values [..., *E] back to the original units, as for pictures."""
        return x

    def log_slope(self) -> float | Tensor:
        """Returns the log-derivative of T, a constant, in nats: one for all entries, or [*E]."""
        return 0.0

    def log_jacobian(self, data_shape: Sequence[int]) -> float:
        """Returns the log-Jacobian of T, in nats per datum of shape ``data_shape``."""
        slope = torch.as_tensor(self.log_slope(), dtype=torch.float64)
        return slope.expand(tuple(data_shape)).sum().item()


@dataclass(frozen=True)
class Identity(Transform):
    """The values as they are, in float32: continuous data, counts, binary data."""


@dataclass(frozen=True)
class Threshold(Transform):
    """1 where x >= ``at``, otherwise 0: deterministic binary data.

    ``make_transform`` sets ``at = (levels - 1) / 2``, half of the brightest value. For 256 levels
    that is 127.5, so 128 and above become 1: the same set of pixels as x / 255 >= 0.5. For the 17
    levels 0..16 it is 8, and 8 becomes 1.

    The map cannot be undone, so there is no Jacobian: the likelihood is a probability of the
    binary image, and its nats and bits are not those of the grey image.

    Args:
        at: The smallest original value that becomes 1.
        top: The original value that a 1 stands for in pictures.
    """

    at: float
    top: float = 1.0

    binary = True

    def _map(self, x: Tensor, u: Any) -> Tensor:
        return (x >= self.at).float()

    def inverse(self, x: Tensor) -> Tensor:
        """Maps a value, or a mean in [0, 1], to [0, top]."""
        return x * self.top


@dataclass(frozen=True)
class _Grey(Transform):
    """A transform of the grey values 0, 1, ..., levels - 1."""

    levels: int

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(f"expected at least 2 grey levels, got levels={self.levels}")

    def inverse(self, x: Tensor) -> Tensor:
        """Maps a value, or a mean in [0, 1], to [0, levels - 1]."""
        return x * (self.levels - 1)


@dataclass(frozen=True)
class Binarise(_Grey):
    r"""A draw from :math:`\mathrm{Bernoulli}(x / (\mathrm{levels} - 1))`, one per pixel.

    Static: drawn once per row from the seed, in training as well. Dynamic: drawn anew at every
    visit in training, and once per row from the seed for evaluation. As for ``Threshold`` there
    is no Jacobian: the likelihood is a probability of the binary image.

    Source: R. Salakhutdinov and I. Murray, "On the quantitative analysis of deep belief
    networks", ICML 2008 (static); Y. Burda, R. Grosse and R. Salakhutdinov, "Importance weighted
    autoencoders", ICLR 2016 (dynamic).

    Args:
        levels: The number of grey levels.
        dynamic: Whether training redraws at every visit.
    """

    dynamic: bool

    noisy = True
    binary = True

    @property
    def fresh(self) -> bool:  # type: ignore[override]
        """Whether training redraws the noise at each visit."""
        return self.dynamic

    def _map(self, x: Tensor, u: Any) -> Tensor:
        return (u < x.float() / (self.levels - 1)).float()


@dataclass(frozen=True)
class Dequantise(_Grey):
    r"""Uniform dequantisation, :math:`T(x, u) = (x + u) / \mathrm{levels}` in (0, 1).

    The log-Jacobian is :math:`-D \log \mathrm{levels}`. By Jensen's inequality the expected log
    density of the noisy data, in original units, is a lower bound on the log probability of the
    discrete data, so the bits per dimension are an upper bound on the discrete ones.

    Source: L. Theis, A. van den Oord and M. Bethge, "A note on the evaluation of generative
    models", ICLR 2016, section 3.1.

    Args:
        levels: The number of grey levels.
    """

    noisy = True
    fresh = True

    def _map(self, x: Tensor, u: Any) -> Tensor:
        # float32 rounding can reach the next bin, and 0 and 1, where a logit is infinite.
        low, edge = x.float(), 3 * 2.0**-24
        value = (low + u).clamp(low * (1 + edge), (low + 1) * (1 - edge))
        return (value / self.levels).clamp(2.0**-32, 1 - 2.0**-24)

    def inverse(self, x: Tensor) -> Tensor:
        """Maps a value in (0, 1) to the grey level of its bin."""
        return (x * self.levels).floor().clamp(0, self.levels - 1)

    def log_slope(self) -> float:
        """See ``Transform``."""
        return -math.log(self.levels)


@dataclass(frozen=True)
class Rescale(_Grey):
    r"""Grey values without noise, :math:`T(x) = x / (\mathrm{levels} - 1)` in [0, 1].

    The log-Jacobian is :math:`-D \log(\mathrm{levels} - 1)`. The values stay on a lattice, so a
    flexible density has no bound: it can grow a spike on each lattice point and its bits per
    dimension mean nothing then. Use ``Dequantise`` where densities are compared.

    Args:
        levels: The number of grey levels.
    """

    def _map(self, x: Tensor, u: Any) -> Tensor:
        return x.float() / (self.levels - 1)

    def log_slope(self) -> float:
        """See ``Transform``."""
        return -math.log(self.levels - 1)


@dataclass(frozen=True, eq=False)
class Standardise(Transform):
    r"""Each column to mean 0 and deviation 1, :math:`T(x) = (x - m) / s`.

    The log-Jacobian is :math:`-\sum_d \log s_d`.

    Args:
        mean: The means m, [*E].
        std: The standard deviations s > 0, [*E].

    Raises:
        ValueError: If a deviation is 0 or NaN; the message names the columns.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        constant = (~(self.std.flatten() > 0)).nonzero().flatten().tolist()
        if constant:
            columns = ", ".join(map(str, constant[:10])) + (", ..." if len(constant) > 10 else "")
            raise ValueError(
                f"expected every column to vary, got standard deviation 0, or no value, in "
                f"{len(constant)} of {self.std.numel()}: {columns} (from 0); remove these columns"
            )

    @classmethod
    def fit(cls, x: Tensor | Mapped) -> Standardise:
        """Fits the transform to rows ``x`` [N, *E]: deviations divide by N; NaN is left out."""
        total, squares = torch.zeros(2, *x.shape[1:], dtype=torch.float64, device=x.device)
        count, low, high = torch.zeros_like(total), total + math.inf, total - math.inf
        for part in x.split(CHUNK):
            count += (~part.isnan()).sum(0)
            total += part.double().nansum(0)
            low = torch.minimum(low, part.double().nan_to_num(math.inf).amin(0))
            high = torch.maximum(high, part.double().nan_to_num(-math.inf).amax(0))
        for part in x.split(CHUNK):
            squares += (part.double() - total / count).square().nansum(0)
        # A constant column can leave rounding noise in place of an exact 0.
        std = (squares / count).sqrt().masked_fill(low == high, 0.0)
        return cls((total / count).float(), std.float())

    def _map(self, x: Tensor, u: Any) -> Tensor:
        return (x.float() - self.mean.to(x.device)) / self.std.to(x.device)

    def inverse(self, x: Tensor) -> Tensor:
        """See ``Transform``."""
        return x * self.std.to(x.device) + self.mean.to(x.device)

    def log_slope(self) -> Tensor:
        """See ``Transform``."""
        return -self.std.double().log()


def default_transform(support: constraints.Constraint, levels: int | None, ndim: int) -> str:
    """Returns the name of the transform from raw data [N, *E] to the support of a likelihood."""
    if support is constraints.boolean and levels not in (2, None):
        return "threshold"
    if support.is_discrete or levels == 2:
        return "none"
    if levels is not None:
        return "dequantise"
    return "standardise" if ndim == 2 and is_whole_line(support) else "none"


def is_whole_line(support: constraints.Constraint) -> bool:
    """Returns whether a support holds numbers of either sign."""
    return bool(support.check(torch.tensor([-10.0, 10.0])).all())


def make_transform(name: str, x: Tensor | Mapped, levels: int | None) -> Transform:
    """Makes the transform called ``name`` for the data ``x``.

    Args:
        name: "none", "threshold", "static" or "dynamic" (binarisation), "dequantise", "rescale"
            or "standardise".
        x: The original values of the training part, [N, *E].
        levels: The number of grey levels, or None for continuous data and counts.

    Raises:
        ValueError: If the name is unknown, or needs grey levels and there are none.
    """
    if name not in NAMES:
        hint = closest(name, NAMES)
        raise ValueError(f"expected a transform among {', '.join(NAMES)}, got {name!r}{hint}")
    if name in ("none", "standardise"):
        return Identity() if name == "none" else Standardise.fit(x)
    if levels is None:
        raise ValueError(
            f"transform {name!r} needs data with grey levels, and this data has none; "
            "use 'none' or 'standardise'"
        )
    if name in BINARY and levels > 2 and isinstance(x, Tensor) and x.max() == 1:
        warnings.warn(
            f"no value is above 1, and grey values go to {levels - 1}: {name!r} makes "
            "the images black: store images of 0 and 1 as bool",
            stacklevel=2,
        )
    if name == "threshold":
        return Threshold((levels - 1) / 2, top=levels - 1)
    if name in BINARY[1:]:
        return Binarise(levels, dynamic=name == "dynamic")
    return Dequantise(levels) if name == "dequantise" else Rescale(levels)


def declare(transform: Transform) -> dict[str, Any]:
    """Returns the class and numbers of a transform, for JSON; ``restore`` makes it from them."""
    values = {f.name: getattr(transform, f.name) for f in fields(transform)}  # type: ignore[arg-type]
    plain = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in values.items()}
    return {"class": type(transform).__name__, **plain}


def restore(declaration: Mapping[str, Any]) -> Transform:
    """Makes the transform that ``declare`` described.

    Raises:
        ValueError: If the class is not one of this module.
    """
    known: tuple[Any, ...] = (Identity, Threshold, Binarise, Dequantise, Rescale, Standardise)
    values = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in declaration.items()}
    name = values.pop("class", None)
    for cls in known:
        if cls.__name__ == name:
            return cls(**values)
    raise ValueError(f"expected a transform of pyro_vae.data, got {name!r}")


def row_noise(rows: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """Draws uniform noise in [0, 1) that depends on the seed and the row's id only.

    Each row has its own stream of the counter-based generator Philox, with (seed, id) for a key,
    so its noise does not depend on the order, the subset or the batch that it is in.

    Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        rows: The ids of the rows, int64 [N].
        shape: The shape of one datum.
        seed: The seed, 0 or more.

    Returns:
        The noise, float32 [N, *shape], on the device of ``rows``.
    """
    noise = np.empty((len(rows), *shape), dtype=np.float32)
    for row, out in zip(rows.tolist(), noise):
        key = np.array([seed, row], dtype=np.uint64)
        out[...] = np.random.Generator(np.random.Philox(key=key)).random(shape, np.float32)
    return torch.from_numpy(noise).to(rows.device)
