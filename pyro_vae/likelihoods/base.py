"""What every likelihood shares: shapes, support, a start at the average datum."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae.arguments import as_shape

__all__ = ["Likelihood"]


class Finite(constraints.Constraint):
    """Numbers that are neither NaN nor infinite."""

    def check(self, value: Tensor) -> Tensor:
        """Whether each entry is finite."""
        return value.isfinite()


class Likelihood(nn.Module):
    """A distribution over data x [*S, *E] for latents z [*S, D].

    A subclass says how many raw parameters it needs per channel (`num_params`), what data it
    supports (`support` and its name in words), builds the distribution from `self.raw(z, y)`
    in `forward`, and says in `raw_start` which raw parameters give the average datum. Every
    option has a default. `Bernoulli` is the one to read.

    Args:
        decoder: Network from z (and `y`) to raw parameters (num_params * C, *rest), where the
            datum has shape (C, *rest).
        data_shape: Shape of one datum.
    """

    support: constraints.Constraint = Finite()
    support_name = "finite numbers"
    remedy = "remove them"

    def __init__(self, decoder: nn.Module, data_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.decoder = decoder
        self.data_shape = as_shape("data_shape", data_shape)

    @classmethod
    @abstractmethod
    def num_params(cls) -> int:
        """Raw parameters per channel."""

    @abstractmethod
    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """p(x | z, y), batch *S, event *E."""

    @abstractmethod
    def raw_start(self, x: Tensor) -> Tensor:
        """First raw parameters, [k * C, *rest], that give the average of `x` [N, C, *rest]."""

    def raw(self, z: Tensor, y: Tensor | None, count: int = 1) -> Tensor:
        """The decoder's output [*S, P * C, *rest] as P = count parameters, [P, *S, C, *rest]."""
        raw = self.decoder(z, y)
        raw = raw.float() if raw.dtype in (torch.float16, torch.bfloat16) else raw
        channel = raw.ndim - len(self.data_shape)
        channels, *rest = self.data_shape
        if raw.shape[channel:] != (count * channels, *rest):
            raise ValueError(
                f"decoder gives {tuple(raw.shape[z.ndim - 1 :])}, which does not fit data of "
                f"shape {self.data_shape}: its out_shape must be the data's, with "
                f"num_params = {count} times the channels"
            )
        return raw.unflatten(channel, (count, channels)).movedim(channel, 0)

    def check(self, x: Tensor) -> None:
        """Raises a ValueError if `x` is outside the support."""
        if tuple(x.shape[x.ndim - len(self.data_shape) :]) != self.data_shape:
            raise ValueError(
                f"likelihood {type(self).__name__} was built for data of shape "
                f"{self.data_shape}; got {tuple(x.shape[1:])}"
            )
        if not bool(self.support.check(x).all()):
            raise ValueError(
                f"likelihood {type(self).__name__} needs data in {self.support_name}; got values "
                f"in [{x.min().item():g}, {x.max().item():g}]: {self.remedy}"
            )

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Sets the decoder's output bias to the average of training data `x` [N, *E]."""
        bias = getattr(self.decoder, "output_bias", None)
        if bias is None:
            return
        if bias.shape[1:] != self.data_shape[1:]:  # one bias for all positions of a channel
            x = x.movedim(1, -1).flatten(0, -2)[(...,) + (None,) * (bias.ndim - 1)]
        start = self.raw_start(x)
        bias[: len(start)] = start.to(bias)
