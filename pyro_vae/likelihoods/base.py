"""The base class of likelihoods: shapes, support, and a start at the average datum."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae.arguments import ReprModule, as_shape, check_finite
from pyro_vae.distributions import Incomplete

LARGEST_FLOAT = torch.finfo(torch.float32).max


class Likelihood(ReprModule):
    """A distribution over data x [*S, *E] for latents z [*S, D].

    A subclass says how many raw parameters it needs per channel (`num_params`), what data it
    supports (`support` and its name in words), builds the distribution from `self.raw(z, y)`
    in `forward`, and returns from `raw_start` the raw parameters of the average datum. Every
    option has a default. See `Bernoulli` for an example.

    `inputs` returns what an encoder sees of the data, and `input_shape` the shape of that.
    Where `missing` is true, NaN in the data stands for a missing entry.

    Args:
        decoder: Network from z (and `y`) to raw parameters (num_params * C, *rest), where the
            datum has shape (C, *rest).
        data_shape: Shape of one datum.
    """

    support: constraints.Constraint = constraints.interval(-LARGEST_FLOAT, LARGEST_FLOAT)
    support_name = "finite numbers"
    remedy = "remove them"
    missing = False
    old_defaults: ClassVar[dict[str, Any]] = {}  # of runs from before an option
    conditioned_on = ""  # what log p(x) is conditioned on besides y, in words

    def __init__(self, decoder: nn.Module, data_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.decoder = decoder
        self.data_shape = as_shape("data_shape", data_shape)

    @classmethod
    def num_params(cls) -> int:
        """Returns the number of raw parameters per channel."""
        return 1

    @classmethod
    def out_shape(cls, data_shape: tuple[int, ...], **options: Any) -> tuple[int, ...]:
        """Returns the shape of the decoder's output for a datum of this shape."""
        taken = inspect.signature(cls.num_params).parameters
        count = cls.num_params(**{k: v for k, v in options.items() if k in taken})
        return (count * data_shape[0], *data_shape[1:])

    @abstractmethod
    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns p(x | z, y), batch *S, event *E; draws of `latents` are keyword arguments."""

    @classmethod
    def input_shape(cls, data_shape: tuple[int, ...], missing: bool = False) -> tuple[int, ...]:
        """Returns the shape of `inputs` for one datum of this shape."""
        first, *rest = data_shape
        return (2 * first if missing else first, *rest)

    def inputs(self, x: Tensor) -> Tensor:
        """Returns what an encoder sees of `x` [*S, *E]: x, with a mask if entries may be missing.

        Missing entries become 0, and the mask (1 where observed) is joined to x along the first
        dimension of a datum.
        """
        if not self.missing:
            return x
        observed = ~x.isnan()
        filled = torch.where(observed, x, torch.zeros_like(x))
        return torch.cat([filled, observed.to(x.dtype)], x.ndim - len(self.data_shape))

    def latents(self) -> dict[str, Distribution]:
        """Returns the priors of the latents, besides z, that each datum has, by site."""
        return {}

    def propose(self, x: Tensor) -> dict[str, Distribution]:
        """Returns the guide of `latents` by site, batch [*S], from data `x` [*S, *E]."""
        return {}

    @property
    def measure(self) -> list[bool | float]:
        """What log p is of: True for a mass, False for a density, or the width of an interval."""
        width = getattr(self, "resolution", None)
        return width if isinstance(width, list) else [width or bool(self.support.is_discrete)]

    def observed(self, p: Distribution) -> Distribution:
        """Returns p(x | z), or its marginal over the entries that are not missing."""
        return Incomplete(p) if self.missing else p

    @abstractmethod
    def raw_start(self, x: Tensor) -> Tensor:
        """Returns the raw parameters [k * C, *rest] to start from, for data `x` [N, C, *rest]."""

    def decoded(self, z: Tensor, y: Tensor | None, channels: int) -> Tensor:
        """Returns the decoder's output [*S, channels, *rest], in single precision at least."""
        raw = self.decoder(z, y)
        raw = raw.float() if raw.dtype in (torch.float16, torch.bfloat16) else raw
        expected = (channels, *self.data_shape[1:])
        if raw.shape[raw.ndim - len(expected) :] != expected:
            raise ValueError(
                f"decoder gives {tuple(raw.shape[z.ndim - 1 :])}, which does not fit data of "
                f"shape {self.data_shape}: its out_shape must be {expected}, by num_params"
            )
        return raw

    def raw(self, z: Tensor, y: Tensor | None, count: int = 1) -> Tensor:
        """Returns the decoder's output as P = count raw parameters, [P, *S, C, *rest]."""
        channels, *rest = self.data_shape
        raw = self.decoded(z, y, count * channels)
        channel = raw.ndim - len(self.data_shape)
        parts = raw.unflatten(channel, (count, channels)).movedim(channel, 0)
        return parts if rest else parts.contiguous()  # torch is slow on short strided rows

    def check(self, x: Tensor) -> None:
        """Raises a ValueError if `x` is outside the support."""
        if tuple(x.shape[x.ndim - len(self.data_shape) :]) != self.data_shape:
            raise ValueError(
                f"likelihood {type(self).__name__} was built for data of shape "
                f"{self.data_shape}; got {tuple(x.shape[1:])}"
            )
        if not self.missing and bool(x.isnan().any()):
            check_finite("data", x, self.missing)
        if not bool((self.support.check(x) | x.isnan()).all()):
            seen = x[~x.isnan()]
            raise ValueError(
                f"likelihood {type(self).__name__} needs data in {self.support_name}; got values "
                f"in [{seen.min().item():g}, {seen.max().item():g}]: {self.remedy}"
            )

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Sets the decoder's output bias so that it starts at the average of `x` [N, *E]."""
        bias = getattr(self.decoder, "output_bias", None)
        if bias is None:
            return
        if bias.shape[1:] != self.data_shape[1:]:  # one bias for all positions of a channel
            x = x.movedim(1, -1).flatten(0, -2)[(...,) + (None,) * (bias.ndim - 1)]
        start = self.raw_start(x)
        bias[: len(start)] = start.to(bias)
