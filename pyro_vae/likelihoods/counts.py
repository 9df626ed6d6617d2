"""Likelihoods of counts."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae import distributions
from pyro_vae.arguments import check_real
from pyro_vae.distributions import OfTotal
from pyro_vae.likelihoods.base import Likelihood

__all__ = ["NegativeBinomial", "Poisson"]

LIBRARIES = ("none", "observed", "latent")
DISPERSIONS = ("gene", "cell", "shared")
GATE = -2.0  # first log odds of a zero that is none of the counts


class Counts(Likelihood):
    r"""Counts with mean exp(raw), or with a total l that is shared out.

    .. math:: \mathbb{E}[x_g \mid z] = \exp(f_g(z)) \quad\text{or}\quad
        \mathbb{E}[x_g \mid z, l] = l \cdot \mathrm{softmax}(f(z))_g

    With `library="observed"` l is the sum of x itself, and log p(x) is that of x given its sum:
    it does not compare with others. With `library="latent"` l is a latent of each datum, site
    "library" of the model, LogNormal with the mean and spread of the log totals of the training
    data; its guide is a LogNormal about the total of x. The encoder sees log(1 + x).
    """

    support = constraints.nonnegative_integer
    support_name = "{0, 1, 2, ...}"
    remedy = "counts must be whole and not negative"
    before: ClassVar[dict[str, Any]] = {"log_inputs": False}
    num_rates = 1  # raw parameters of each count, but for the log odds of a zero
    log_total: Tensor  # mean and spread of log totals [2]

    def __init__(
        self,
        decoder: nn.Module,
        data_shape: tuple[int, ...],
        zero_inflated: bool = False,
        library: str = "none",
        log_inputs: bool = True,
    ) -> None:
        super().__init__(decoder, data_shape)
        _check_name("library", library, LIBRARIES)
        self.zero_inflated, self.library, self.log_inputs = zero_inflated, library, log_inputs
        self.of = "its total" if library == "observed" else ""
        if library != "none":
            self.register_buffer("log_total", torch.tensor([0.0, 1.0]))
        if library == "latent":
            self.raw_guide = nn.Parameter(torch.zeros(3))  # shift, spread, spread of few counts

    def inputs(self, x: Tensor) -> Tensor:
        """log(1 + x), and the mask where entries may be missing."""
        return super().inputs(x.log1p() if self.log_inputs else x)

    def check(self, x: Tensor) -> None:
        """Raises a ValueError if `x` is outside the support, or a total to be given is zero."""
        super().check(x)
        if self.library != "observed":
            return
        total = x.flatten(x.ndim - len(self.data_shape)).sum(-1)
        for bad, what in ((total.isnan(), "lack values"), (total == 0, "are all zero")):
            if bool(bad.any()):
                raise ValueError(
                    'library="observed" needs counts and their total in every row; '
                    f'{int(bad.sum())} row(s) {what}: remove them, or take library="latent"'
                )

    def latents(self) -> dict[str, Distribution]:
        """The total of each datum, where it is a latent of the model."""
        if self.library != "latent":
            return {}
        return {"library": dist.LogNormal(*self.log_total)}

    def propose(self, x: Tensor) -> dict[str, Distribution]:
        """The guide of `latents`, from data `x` [B, *E]."""
        if self.library != "latent":
            return {}
        total = x.nan_to_num(0).flatten(1).sum(1)
        shift, spread, few = self.raw_guide
        scale = F.softplus(spread - 3) + F.softplus(few) / (1 + total).sqrt()
        return {"library": dist.LogNormal((1 + total).log() + shift, scale)}

    def forward(
        self, z: Tensor, y: Tensor | None = None, library: Tensor | None = None
    ) -> Distribution:
        """Counts given z, y and the total [*S] where it is a latent."""
        raw = list(self.raw(z, y, self.num_rates + self.zero_inflated))
        log_gate = raw.pop() if self.zero_inflated else None
        log_rate, *rest = raw
        if self.library == "none":
            return self._made(log_rate, rest, log_gate)
        of_total = partial(self._made, self._log_share(log_rate), rest, log_gate)
        if library is not None:
            return of_total(library)
        return OfTotal(of_total, dist.LogNormal(*self.log_total).expand(z.shape[:-1]))

    def shares(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """The expected share of each count in the total [*S, *E]."""
        return self._log_share(self.raw(z, y, self.num_rates + self.zero_inflated)[0]).exp()

    def raw_start(self, x: Tensor) -> Tensor:
        """Log of the mean, and few zeros beyond those of the counts."""
        start = [x.mean(0).clamp(min=0.01).log()]
        start += [torch.zeros_like(start[0])] * (self.num_rates - 1)
        start += [torch.full_like(start[0], GATE)] if self.zero_inflated else []
        return torch.cat(start)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Measures the totals of training data `x` [N, *E] too."""
        super().initialise(x)
        if self.library != "none":
            total = x.flatten(1).sum(1).clamp(min=1)
            spread = total.log().std() if len(total) > 1 else torch.ones(())
            self.log_total.copy_(torch.stack([total.log().mean(), spread.clamp(min=0.01)]))

    def _log_share(self, log_rate: Tensor) -> Tensor:
        first = log_rate.ndim - len(self.data_shape)
        return log_rate.flatten(first).log_softmax(-1).view_as(log_rate)

    def _made(
        self,
        log_rate: Tensor,
        rest: list[Tensor],
        log_gate: Tensor | None,
        total: Tensor | None = None,
    ) -> Distribution:
        """Counts of their rates, or of their shares in a total [*S]."""
        if total is not None:
            log_rate = log_rate + total.log()[(...,) + (None,) * len(self.data_shape)]
        each = self.counts(log_rate, *rest)
        if log_gate is not None:
            each = dist.ZeroInflatedDistribution(each, gate_logits=log_gate)
        return each.to_event(len(self.data_shape))

    @abstractmethod
    def counts(self, log_rate: Tensor, *rest: Tensor) -> Any:
        """Counts of each entry, of mean exp(log_rate)."""


class Poisson(Counts):
    """Poisson counts.

    Args:
        decoder: Network to the log rate.
        data_shape: Shape of one datum.
        zero_inflated: Whether some zeros are none of the counts, by log odds of the decoder's.
        library: "none", "observed" (the total of x is given) or "latent"; see above.
        log_inputs: Whether the encoder sees log(1 + x) and not x.
    """

    @classmethod
    def num_params(cls, zero_inflated: bool = False) -> int:
        """The log rate, and the log odds of a zero if inflated."""
        return 1 + zero_inflated

    def counts(self, log_rate: Tensor, *rest: Tensor) -> Any:
        """Poisson by its log rate."""
        return distributions.Poisson(log_rate)


class NegativeBinomial(Counts):
    r"""Overdispersed counts, with mean m and dispersion r.

    .. math:: \mathrm{Var}[x \mid z] = m + m^2 / r

    Args:
        decoder: Network to the log mean, and the raw dispersion if it is that of a cell.
        data_shape: Shape of one datum.
        min_dispersion: Floor of r.
        zero_inflated: Whether some zeros are none of the counts, by log odds of the decoder's.
        dispersion: "gene", one r for each entry of a datum; "cell", from z for each entry of
            each datum; or "shared", one for all.
        library: "none", "observed" (the total of x is given) or "latent"; see above.
        log_inputs: Whether the encoder sees log(1 + x) and not x.

    References:
        Lopez et al. Deep generative modeling for single-cell transcriptomics. 2018.
    """

    before: ClassVar[dict[str, Any]] = {**Counts.before, "dispersion": "cell"}

    def __init__(
        self,
        decoder: nn.Module,
        data_shape: tuple[int, ...],
        min_dispersion: float = 1e-3,
        zero_inflated: bool = False,
        dispersion: str = "gene",
        library: str = "none",
        log_inputs: bool = True,
    ) -> None:
        super().__init__(decoder, data_shape, zero_inflated, library, log_inputs)
        check_real(0, min_dispersion=min_dispersion)
        _check_name("dispersion", dispersion, DISPERSIONS)
        self.min_dispersion, self.dispersion = min_dispersion, dispersion
        if dispersion == "cell":
            self.num_rates = 2
        else:
            shape = self.data_shape if dispersion == "gene" else ()
            self.raw_dispersion = nn.Parameter(torch.zeros(shape))

    @classmethod
    def num_params(cls, zero_inflated: bool = False, dispersion: str = "gene") -> int:
        """Log mean, dispersion if that of a cell, and log odds of a zero if inflated."""
        return 1 + (dispersion == "cell") + zero_inflated

    def counts(self, log_rate: Tensor, *rest: Tensor) -> Any:
        """Negative binomial by log mean and dispersion."""
        raw = rest[0] if rest else self.raw_dispersion
        r = self.min_dispersion + F.softplus(raw)
        return dist.NegativeBinomial(r.expand(log_rate.shape), logits=log_rate - r.log())

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Dispersions that match mean and variance of training data `x` [N, *E] too."""
        super().initialise(x)
        if self.dispersion != "cell" and len(x) > 1:
            mean, variance = x.mean(0), x.var(0)
            r = (mean.square() / (variance - mean).clamp(min=1e-6)).clamp(0.05, 50)
            r = r if self.dispersion == "gene" else r.log().mean().exp()
            self.raw_dispersion.copy_(r.expm1().log())


def _check_name(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
