"""Models whose log p(x) is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae import likelihoods, networks, posteriors, priors
from pyro_vae.vae import VAE

Program = Callable[..., Any]


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

    def guide(self, shift: float = 0.0, width: float = 1.0) -> Program:
        """A guide of `proposal`, as a plain Pyro program."""

        def guide(x: Tensor, y: Tensor | None = None) -> Tensor:
            with pyro.plate("data", len(x), dim=-1):
                return pyro.sample("z", self.proposal(x, y, shift, width))

        return guide


def two_sites(reverse: bool) -> tuple[Program, Program, Program]:
    """z2 ~ N(0, 1), z1 ~ N(a z2, s), x ~ N(c z1, t): model, exact guide, log p(x).

    The guide draws z2 first, as the model does, or z1 if `reverse`.
    """
    a, s, c, t = 0.8, 0.6, 1.3, 0.5

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(a * z2, s))
            pyro.sample("x", dist.Normal(c * z1, t), obs=x)

    first = a**2 + s**2  # variance of z1
    variance = 1 / (1 / first + c**2 / t**2)

    def bottom_up(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(variance * c * x / t**2, variance**0.5))
            pyro.sample("z2", dist.Normal(a * z1 / first, s / first**0.5))

    noise = c**2 * s**2 + t**2  # variance of x given z2
    top = 1 / (1 + (a * c) ** 2 / noise)
    middle = 1 / (1 / s**2 + c**2 / t**2)

    def top_down(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(top * a * c * x / noise, top**0.5))
            z1 = middle * (a * z2 / s**2 + c * x / t**2)
            pyro.sample("z1", dist.Normal(z1, middle**0.5))

    evidence = dist.Normal(0.0, (c**2 * first + t**2) ** 0.5).log_prob
    return model, bottom_up if reverse else top_down, evidence
