"""Models whose log p(x) is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae import likelihoods, networks, posteriors, priors
from pyro_vae.vae import VAE

Guide = Callable[..., Tensor]


def linear_vae(prior: priors.Prior, data_dim: int, sigma: float, condition_dim: int = 0) -> VAE:
    """x = W z + V y + b + sigma * noise, with W, V and b drawn, under any prior."""
    (latent_dim,) = prior().event_shape
    decoder = networks.MLP(latent_dim, data_dim, hidden=(), condition_dim=condition_dim)
    torch.nn.init.normal_(decoder.output.weight)
    torch.nn.init.normal_(decoder.output.bias)
    encoder = networks.MLP(data_dim, 2 * latent_dim, (5,), condition_dim=condition_dim)
    return VAE(
        prior,
        likelihoods.Normal(decoder, (data_dim,), scale=sigma),
        posteriors.DiagonalNormal(encoder, latent_dim),
    )


@dataclass
class LinearGaussian:
    """The linear VAE under N(0, I), with its posterior and its evidence."""

    vae: VAE
    sigma: float

    @classmethod
    def draw(
        cls, latent_dim: int = 2, data_dim: int = 5, sigma: float = 0.7, condition_dim: int = 0
    ) -> LinearGaussian:
        vae = linear_vae(priors.StandardNormal(latent_dim), data_dim, sigma, condition_dim)
        return cls(vae, sigma)

    @property
    def weight(self) -> Tensor:
        """W [F, D]."""
        linear = self.vae.likelihood.decoder.output
        return linear.weight.detach()[:, : self.vae.posterior.latent_dim]

    def offset(self, y: Tensor | None = None) -> Tensor:
        """V y + b [*B, F]."""
        linear = self.vae.likelihood.decoder.output
        bias = linear.bias.detach()
        if y is None:
            return bias
        return bias + y @ linear.weight.detach()[:, self.vae.posterior.latent_dim :].T

    def log_evidence(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(x | y) [B]."""
        noise = self.sigma**2 * torch.eye(x.shape[-1])
        covariance = self.weight @ self.weight.T + noise
        return dist.MultivariateNormal(self.offset(y), covariance).log_prob(x)

    def posterior(self, x: Tensor, y: Tensor | None = None) -> dist.MultivariateNormal:
        """p(z | x, y), batch [B]."""
        W = self.weight
        precision = torch.eye(W.shape[1]) + W.T @ W / self.sigma**2
        loc = (x - self.offset(y)) @ W @ precision.inverse() / self.sigma**2
        return dist.MultivariateNormal(loc, precision_matrix=precision)

    def proposal(
        self, x: Tensor, y: Tensor | None = None, shift: float = 0.0, width: float = 1.0
    ) -> dist.MultivariateNormal:
        """The posterior, `shift` away and `width` times as wide."""
        exact = self.posterior(x, y)
        return dist.MultivariateNormal(exact.loc + shift, scale_tril=width * exact.scale_tril)

    def guide(self, shift: float = 0.0, width: float = 1.0) -> Guide:
        """A guide of `proposal`, as a plain Pyro program."""

        def guide(x: Tensor, y: Tensor | None = None) -> Tensor:
            with pyro.plate("data", len(x), dim=-1):
                return pyro.sample("z", self.proposal(x, y, shift, width))

        return guide
