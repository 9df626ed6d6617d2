"""Estimates log p(x) of a hand-written Pyro model and guide.

Nothing of the model comes from pyro_vae. Any program will do whose sites are inside a plate
"data". This one is probabilistic PCA. Its log p(x) is known, so the estimate can be checked.

python examples/own_program.py

Tipping and Bishop. Probabilistic principal component analysis. 1999.
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_vae import importance_sampling

D, E = 2, 7  # latent size, data size


def model(x: Tensor) -> None:
    """Draws z ~ N(0, I) and x ~ N(W z + b, sigma^2 I)."""
    weight = pyro.param("weight", lambda: 0.1 * torch.randn(D, E))
    bias = pyro.param("bias", torch.zeros(E))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight + bias, scale).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    """Draws z from q(z | x), a Normal with mean A x + a and a diagonal covariance."""
    slope = pyro.param("slope", lambda: 0.1 * torch.randn(E, D))
    start = pyro.param("start", torch.zeros(D))
    spread = pyro.param("spread", torch.ones(D), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x @ slope + start, spread).to_event(1))


def exact_log_prob(x: Tensor) -> Tensor:
    """Returns log N(x; b, W'W + sigma^2 I)."""
    weight, bias, scale = (pyro.param(name).detach() for name in ("weight", "bias", "scale"))
    covariance = weight.T @ weight + scale**2 * torch.eye(E)
    return dist.MultivariateNormal(bias, covariance).log_prob(x)


def main(smoke: bool = False) -> float:
    """Trains by SVI; returns the largest error of log p(x) in standard errors."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x = torch.randn(500, D) @ torch.randn(D, E) + 0.3 * torch.randn(500, E)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(50 if smoke else 1500):
        svi.step(x)

    evidence = importance_sampling(model, guide, x[:20], num_samples=1000)
    exact = exact_log_prob(x[:20])
    error = (evidence.log_prob - exact) / evidence.stderr
    print(evidence)
    print(f"exact mean {exact.mean():.4f}, estimated {evidence.mean():.4f}")
    print(f"largest error {error.abs().max():.1f} standard errors")
    return error.abs().max().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="50 steps")
    main(parser.parse_args().smoke)
