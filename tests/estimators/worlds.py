"""Programs whose log p(x) is known, in closed form or by quadrature; guides that are not exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

Program = Callable[..., None]


@dataclass(eq=False)
class World:
    """A model, a guide, data [N, *E] and their log p(x) [N]."""

    model: Program
    guide: Program
    x: Tensor
    truth: Tensor


def data(size: int) -> pyro.plate:
    return pyro.plate("data", size, dim=-1)


def quadrature(log_density: Callable[[Tensor], Tensor], low: float, high: float) -> Tensor:
    grid = torch.linspace(low, high, 100_001)
    return log_density(grid).logsumexp(0) + math.log((high - low) / (len(grid) - 1))


def linear(
    sigma: float = 0.5,
    shift: float = 0.0,
    width: float = 1.0,
    latent_dim: int = 3,
    data_dim: int = 5,
    num_data: int = 13,
) -> World:
    """x = z W + sigma * noise; the guide is the exact mean and diagonal, moved and stretched."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(latent_dim, data_dim, generator=generator, dtype=torch.float64)
    covariance = (torch.eye(latent_dim, dtype=W.dtype) + W @ W.T / sigma**2).inverse()
    evidence = dist.MultivariateNormal(
        torch.zeros(data_dim, dtype=W.dtype),
        W.T @ W + sigma**2 * torch.eye(data_dim, dtype=W.dtype),
    )
    noise = torch.randn(num_data, data_dim, generator=generator, dtype=W.dtype)
    x = noise @ evidence.scale_tril.T

    def model(x: Tensor) -> None:
        with data(len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.to(x), sigma).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        scale = covariance.diagonal().sqrt().to(x)
        loc = x @ (W.T @ covariance / sigma**2).to(x) + shift * scale
        with data(len(x)):
            pyro.sample("z", dist.Normal(loc, width * scale).to_event(1))

    return World(model, guide, x, evidence.log_prob(x))


def square(latent_dim: int = 1, num_data: int = 13, sigma: float = 0.2) -> World:
    """x = z^2 + noise in each dimension: 2^D modes, of which the guide knows one."""
    x = torch.linspace(-0.3, 4.0, num_data * latent_dim).view(-1, latent_dim)
    prior = dist.Normal(torch.zeros(latent_dim), 1.0)

    def model(x: Tensor) -> None:
        with data(len(x)):
            z = pyro.sample("z", prior.to_event(1))
            pyro.sample("x", dist.Normal(z.square(), sigma).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with data(len(x)):
            pyro.sample("z", dist.Normal(x.clamp(min=0.01).sqrt(), 0.1).to_event(1))

    def log_density(z: Tensor) -> Tensor:
        log_prior = dist.Normal(0.0, 1.0).log_prob(z)
        return (log_prior + dist.Normal(z.square(), sigma).log_prob(x.view(-1, 1))).T

    return World(model, guide, x, quadrature(log_density, -8.0, 8.0).view(x.shape).sum(-1))


def three_modes() -> World:
    """A mixture prior under a weak likelihood; the guide knows one component."""
    means = torch.tensor([[-4.0, 0.0], [4.0, 1.0], [0.0, 5.0]])
    weights = dist.Categorical(torch.tensor([0.2, 0.5, 0.3]))
    W = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.3, 1.0]])
    covariance = 0.09 * W.T @ W + 9.0 * torch.eye(3)
    evidence = dist.MixtureSameFamily(weights, dist.MultivariateNormal(means @ W, covariance))
    prior = dist.MixtureSameFamily(weights, dist.Normal(means, 0.3).to_event(1))

    def model(x: Tensor) -> None:
        with data(len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z @ W, 3.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with data(len(x)):
            pyro.sample("z", dist.Normal(means[0], 0.3).to_event(1))

    x = evidence.sample(torch.Size((13,)))
    return World(model, guide, x, evidence.log_prob(x))


def bernoulli() -> World:
    """Two latents, eleven binary pixels through a sine."""
    A = 2 * torch.randn(2, 11)

    def logits(z: Tensor) -> Tensor:
        return z.sin() @ A + z @ A / 3

    def model(x: Tensor) -> None:
        with data(len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=logits(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with data(len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 0.5).to_event(1))

    x = dist.Bernoulli(logits=logits(torch.randn(13, 2))).sample()
    axis = torch.linspace(-7, 7, 401)
    z = torch.cartesian_prod(axis, axis)
    log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1, keepdim=True)
    log_likelihood = logits(z) @ x.T + torch.nn.functional.logsigmoid(-logits(z)).sum(-1)[:, None]
    cell = 2 * math.log((axis[1] - axis[0]).item())
    return World(model, guide, x, (log_prior + log_likelihood).logsumexp(0) + cell)


def gamma_poisson() -> World:
    """A positive latent."""

    def model(x: Tensor) -> None:
        with data(len(x)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 0.5))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x: Tensor) -> None:
        with data(len(x)):
            pyro.sample("rate", dist.LogNormal((x + 0.5).log(), 0.2))

    x = torch.arange(17.0)
    return World(model, guide, x, dist.GammaPoisson(torch.tensor(2.0), 0.5).log_prob(x))


def dirichlet_multinomial(
    parts: Sequence[float] = (0.8, 1.5, 2.0, 0.9), of_guide: float = 1.0
) -> World:
    """A latent in the simplex."""
    concentration = torch.tensor(parts)

    def model(x: Tensor) -> None:
        with data(len(x)):
            p = pyro.sample("p", dist.Dirichlet(concentration))
            pyro.sample("x", dist.Multinomial(7, probs=p), obs=x)

    def guide(x: Tensor) -> None:
        with data(len(x)):
            pyro.sample("p", dist.Dirichlet(of_guide + x))

    evidence = dist.DirichletMultinomial(concentration, total_count=7)
    x = evidence.sample(torch.Size((13,)))
    return World(model, guide, x, evidence.log_prob(x))


def funnel() -> World:
    """Two sites, the second's scale set by the first; the guide draws them in their order."""

    def model(x: Tensor) -> None:
        with data(len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(torch.zeros(()), a.exp()))
            pyro.sample("x", dist.Normal(b, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with data(len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("b", dist.Normal(0.8 * x + 0.1 * a, 0.4))

    x = torch.linspace(-3, 4, 13)

    def log_density(a: Tensor) -> Tensor:
        scale = (a.exp().square() + 0.25).sqrt()
        return (dist.Normal(0.0, 1.0).log_prob(a) + dist.Normal(0.0, scale).log_prob(x[:, None])).T

    return World(model, guide, x, quadrature(log_density, -10.0, 10.0))


WORLDS = {
    world.__name__: world
    for world in (
        linear,
        square,
        three_modes,
        bernoulli,
        gamma_poisson,
        dirichlet_multinomial,
        funnel,
    )
}


def misses(log_prob: Tensor, stderr: Tensor, truth: Tensor) -> float:
    """Largest error in standard errors, with 1e-3 nats for the quadrature."""
    return ((log_prob - truth).abs() / (stderr + 1e-3)).max().item()
