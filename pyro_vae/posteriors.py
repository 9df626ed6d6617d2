"""Amortised posteriors: x -> q(z | x)."""

from __future__ import annotations

from abc import abstractmethod

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae import distributions
from pyro_vae.arguments import ReprModule, as_shape, check_real, check_whole
from pyro_vae.distributions import Flow, make_flow

__all__ = ["DiagonalNormal", "FlowPosterior", "FullNormal", "Posterior"]


class Posterior(ReprModule):
    """A reparameterised distribution over latents z [D] for data x [*S, *E].

    A subclass says how many raw numbers its encoder must give (`num_params`) and builds the
    distribution from them in `forward`; every option has a default. See `DiagonalNormal` for
    an example.

    Data with a root mean square above one (counts, grey levels) are divided by it before the
    encoder sees them; `initialise` measures it.

    Args:
        encoder: Network from a datum (and `y`) to `num_params(latent_dim)` raw numbers.
        latent_dim: Latent size D.
    """

    def __init__(self, encoder: nn.Module, latent_dim: int) -> None:
        super().__init__()
        check_whole(latent_dim=latent_dim)
        self.encoder, self.latent_dim = encoder, latent_dim
        self.input_scale = nn.Buffer(torch.ones(()))

    @classmethod
    @abstractmethod
    def num_params(cls, latent_dim: int) -> int:
        """Returns how many raw numbers the encoder must return."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns q(z | x, y), batch *S, event (D,)."""

    def raw(self, x: Tensor, y: Tensor | None, count: int | None = None) -> Tensor:
        """Returns the encoder's output for `x`, in single precision or better.

        Raises:
            ValueError: If `count` is given and the encoder returns another number of them.
        """
        raw = self.encoder(x / self.input_scale, y)
        if count is not None and raw.shape[-1] != count:
            raise ValueError(
                f"posterior {type(self).__name__} of {self.latent_dim} latents needs an encoder "
                f"of {count} outputs; got {raw.shape[-1]}: give it out_shape "
                f"{type(self).__name__}.num_params({self.latent_dim})"
            )
        return raw.float() if raw.dtype in (torch.float16, torch.bfloat16) else raw

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Sets the input scale to the root mean square of data `x` [N, *E], but at least 1."""
        self.input_scale.copy_(x.double().pow(2).mean().sqrt().clamp(min=1))


class DiagonalNormal(Posterior):
    r"""Diagonal Normal, :math:`q(z \mid x) = \mathcal{N}(z; \mu(x), \sigma^2(x))`.

    .. math:: \sigma = \texttt{min\_scale} + \mathrm{softplus}(s(x))

    Args:
        encoder: Network to 2 D raw numbers, mean and s.
        latent_dim: Latent size D.
        min_scale: Floor of the standard deviation.

    References:
        Kingma and Welling. Auto-encoding variational Bayes. 2013.
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, min_scale: float = 1e-4) -> None:
        super().__init__(encoder, latent_dim)
        check_real(0, min_scale=min_scale)
        self.min_scale = min_scale

    @classmethod
    def num_params(cls, latent_dim: int) -> int:
        """Returns 2 D, for the mean and scale of each dimension."""
        return 2 * latent_dim

    def forward(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns N(mu, sigma^2)."""
        loc, scale = self.raw(x, y, 2 * self.latent_dim).chunk(2, -1)
        return dist.Normal(loc, self.min_scale + F.softplus(scale)).to_event(1)


class FullNormal(Posterior):
    r"""Normal with a full covariance, :math:`q(z \mid x) = \mathcal{N}(z; \mu, L L^\top)`.

    The diagonal of L is min_scale + softplus; its KL to a diagonal Normal is analytic.

    Args:
        encoder: Network to D + D (D + 1) / 2 raw numbers.
        latent_dim: Latent size D.
        min_scale: Floor of the diagonal of the Cholesky factor.
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, min_scale: float = 1e-4) -> None:
        super().__init__(encoder, latent_dim)
        check_real(0, min_scale=min_scale)
        self.min_scale = min_scale

    @classmethod
    def num_params(cls, latent_dim: int) -> int:
        """Returns the size of mean and Cholesky factor together."""
        return latent_dim + latent_dim * (latent_dim + 1) // 2

    def forward(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns N(mu, L L')."""
        D = self.latent_dim
        raw = self.raw(x, y, self.num_params(D))
        loc, diagonal, below = raw.split([D, D, D * (D - 1) // 2], -1)
        rows, columns = torch.tril_indices(D, D, -1, device=loc.device)
        tril = torch.diag_embed(self.min_scale + F.softplus(diagonal))
        tril[..., rows, columns] = below
        return distributions.FullNormal(loc, scale_tril=tril)


class FlowPosterior(Posterior):
    """A normalising flow over z conditioned on the encoder's output, from zuko.

    Args:
        encoder: Network to `context` raw numbers, on which the flow is conditioned.
        latent_dim: Latent size D.
        flow: Name of a zuko flow; autoregressive ones become coupling flows, fast both ways.
        transforms: Number of transforms.
        hidden: Widths of their networks.
        context: Length of the encoder's output.

    References:
        Rezende and Mohamed. Variational inference with normalizing flows. 2015.
        Rozet et al. Zuko: normalizing flows in PyTorch. 2022.
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent_dim: int,
        flow: str = "MAF",
        transforms: int = 3,
        hidden: tuple[int, ...] = (64, 64),
        context: int = 64,
    ) -> None:
        super().__init__(encoder, latent_dim)
        check_whole(transforms=transforms, context=context)
        self.context = context
        hidden = as_shape("hidden", hidden) if hidden else ()
        self.flow = make_flow(flow, latent_dim, context, transforms=transforms, hidden=hidden)

    @classmethod
    def num_params(cls, latent_dim: int, context: int = 64) -> int:
        """Returns the length of the context."""
        return context

    def forward(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns the flow given the encoder's output."""
        return Flow(self.flow(self.raw(x, y, self.context)))
