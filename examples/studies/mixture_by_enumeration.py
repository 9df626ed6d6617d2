"""Sums out the discrete latent of a Gaussian mixture in two ways, and compares them.

python examples/studies/mixture_by_enumeration.py  # iris flowers, seconds; writes a figure
python examples/studies/mixture_by_enumeration.py --smoke

log p(x) = log sum_c p(c) p(x | c) is computed by `TraceEnum_ELBO`, which sums over the latent c,
and by `MixtureSameFamily`, which has no latent. Value and gradient are compared. The fit by
scikit-learn's EM stands beside them.

With a network q(c | x) as its guide, this is a VAE with a discrete latent. Its enumerated ELBO is
log p(x) - KL(q(c | x) || p(c | x)). For the exact posterior, the third way, this is log p(x).

Obermeyer et al. Tensor variable elimination for plated factor graphs. 2019.
"""

from __future__ import annotations

import argparse
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from sklearn.datasets import load_iris
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributions.constraints import lower_cholesky, simplex

from pyro_vae import plots

C = 3  # components


def parts(x: Tensor) -> tuple[dist.Categorical, dist.MultivariateNormal]:
    """Returns p(c) and, for each component, p(x | c); their parameters are learned."""
    weights = pyro.param("weights", x.new_ones(C) / C, constraint=simplex)
    loc = pyro.param("loc", lambda: x[torch.randperm(len(x))[:C]].clone())
    scale = pyro.param("scale", torch.eye(2).to(x).repeat(C, 1, 1), constraint=lower_cholesky)
    return dist.Categorical(weights), dist.MultivariateNormal(loc, scale_tril=scale)


def model(x: Tensor) -> None:
    """Draws c ~ Categorical(w) and x ~ N(mu_c, L_c L_c')."""
    component, normals = parts(x)
    with pyro.plate("data", len(x), dim=-1):
        c = pyro.sample("c", component, infer={"enumerate": "parallel"})
        normal = dist.MultivariateNormal(normals.loc[c], scale_tril=normals.scale_tril[c])
        pyro.sample("x", normal, obs=x)


def marginal(x: Tensor) -> None:
    """Draws x ~ sum_c w_c N(mu_c, L_c L_c')."""
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.MixtureSameFamily(*parts(x)), obs=x)


def posterior(x: Tensor) -> None:
    """Draws c from the exact p(c | x); a network in its place would be an encoder."""
    component, normals = parts(x)
    logits = component.logits + normals.log_prob(x[:, None])
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("c", dist.Categorical(logits=logits.detach()), infer={"enumerate": "parallel"})


def value_and_gradient(model: Any, guide: Any, loss: Any, x: Tensor) -> tuple[float, Tensor]:
    """Returns the mean bound in nats and its gradient by all unconstrained parameters."""
    leaves = [tensor for _, tensor in sorted(pyro.get_param_store().named_parameters())]
    value = -loss.differentiable_loss(model, guide, x) / len(x)
    return value.item(), torch.cat([g.flatten() for g in torch.autograd.grad(value, leaves)])


@plots.style()
def draw(x: Tensor) -> Figure:
    """Draws the fitted density and the data."""
    figure = Figure(figsize=(6, 4.4), layout="constrained")
    ax = figure.subplots()
    first, second = (torch.linspace(min(v) - 0.6, max(v) + 0.6, 150) for v in x.T.tolist())
    grid = torch.stack(torch.meshgrid(first, second, indexing="xy"), -1)
    density = dist.MixtureSameFamily(*parts(x)).log_prob(grid.to(x)).exp()
    filled = ax.contourf(first.tolist(), second.tolist(), density.tolist(), 12, cmap="Blues")
    figure.colorbar(filled, label="p(x), per square centimetre")
    ax.scatter(*x.T.tolist(), s=9, color=plots.PALETTE[1], linewidths=0)
    ax.set(xlabel="petal length, cm", ylabel="sepal width, cm")
    return figure


def main(smoke: bool = False, out: str = "mixture.png") -> float:
    """Fits by enumeration; returns the largest difference of values and gradients."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x = torch.as_tensor(load_iris().data)[:, [2, 1]]
    enumeration = TraceEnum_ELBO(max_plate_nesting=1)
    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.02}), enumeration)
    ways = {
        "c summed out by TraceEnum_ELBO": (model, svi.guide, enumeration),
        "c summed out by MixtureSameFamily": (marginal, svi.guide, Trace_ELBO()),
        "ELBO, guide p(c | x)": (model, posterior, enumeration),
    }
    worst = 0.0
    for when, steps in (("after one step", 1), ("after the fit", 20 if smoke else 500)):
        for _ in range(steps):
            svi.step(x)
        found = {name: value_and_gradient(*way, x) for name, way in ways.items()}
        value, gradient = next(iter(found.values()))
        print(f"{when}, largest element of the gradient {gradient.abs().max():.1e}")
        for name, (other, slope) in found.items():
            apart = (slope - gradient).abs().max().item()
            worst = max(worst, apart, abs(other - value))
            print(f"  {name:<34} {other:.6f} nats per flower, gradients {apart:.0e} apart")
    em = GaussianMixture(C, n_init=10, random_state=0).fit(x).score(x)
    print(f"  {'EM, the best of ten starts':<34} {em:.6f} nats per flower")
    plots.save(draw(x), out)
    return worst


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few steps")
    parser.add_argument("--out", default="mixture.png", help="picture to write")
    main(**vars(parser.parse_args()))
