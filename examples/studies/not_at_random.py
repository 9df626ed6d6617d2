"""Imputes values that are missing because they are large, by a hand-written Pyro model.

python examples/studies/not_at_random.py
python examples/studies/not_at_random.py --smoke

In two columns of five every value above the mean is missing. A VAE of the observed entries takes
them as missing at random, and imputes values that are far too low. The program below is
not-MIWAE: it adds why they are missing, p(mask | x), with a logistic curve for each column that
rises with the value ("self-masking known"). The missing values are latents. The guide draws them
from the model's own p(x | z), so their densities cancel. IWAE, `log_evidence` and `impute` take
the program as any other. It prints the root mean squared error of the missing values. Data and
model are linear.

Ipsen, Mattei and Frellsen. not-MIWAE: deep generative modelling with missing not at random data.
2021.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae import VAE, Imputation, build, fit, impute
from pyro_vae.objectives import IWAE


class SelfMasking(nn.Module):
    """A VAE, and the probability that a value is missing given the value itself.

    The curves start steep. There is no `initialise`, because that of the VAE would start at the
    mean of what is observed. From there, or from flat curves, values look missing at random, and
    training may stay there.
    """

    def __init__(self, vae: VAE, columns: Tensor) -> None:
        super().__init__()
        self.vae, self.columns = vae, columns.nonzero()[:, 0].tolist()
        self.steepness = nn.Parameter(torch.full((len(self.columns),), 3.0))
        self.threshold = nn.Parameter(torch.zeros(len(self.columns)))

    def model(self, x: Tensor) -> None:
        """Draws z, x given z, and which entries of x are missing given x."""
        pyro.module("self", self)
        with pyro.plate("data", len(x), dim=-1):
            p = self.vae.likelihood(pyro.sample("z", self.vae.prior()))
            pyro.sample("x", self.vae.likelihood.observed(p), obs=x)
            whole = torch.where(x.isnan(), pyro.sample("x_missing", p), x)[..., self.columns]
            logits = softplus(self.steepness) * (whole - self.threshold)
            mask = x.isnan()[..., self.columns].to(x.dtype)
            pyro.sample("mask", dist.Bernoulli(logits=logits).to_event(1), obs=mask)

    def guide(self, x: Tensor) -> None:
        """Draws z from q(z | observed entries), and the missing entries from p(x | z)."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.vae.encode(x))
            pyro.sample("x_missing", self.vae.likelihood(z))


def normal(
    data_dim: int,
    latent_dim: int,
    hidden: Sequence[int] = (),
    scale: str = "learned",
    min_scale: float = 0.01,
) -> VAE:
    """Builds probabilistic PCA, or a network for its linear map, for incomplete rows."""
    return build(
        data_dim, latent_dim, missing=True,
        likelihood={"Normal": {"scale": scale, "min_scale": min_scale}},
        encoder={"class_path": "MLP", "init_args": {"hidden": [128, 128]}},
        decoder={"class_path": "MLP", "init_args": {"hidden": list(hidden)}},
    )  # fmt: skip


def large_missing(full: Tensor) -> Tensor:
    """Removes the values above their column's mean, in the first half of the columns."""
    x = full.clone()
    half = full.shape[1] // 2
    x[:, :half] = x[:, :half].masked_fill(x[:, :half] > full[:, :half].mean(0), torch.nan)
    return x


def error(found: Tensor, full: Tensor, x: Tensor) -> float:
    """Returns the root mean squared error of the missing values."""
    return (found - full)[x.isnan()].square().mean().sqrt().item()


def imputed(
    program: nn.Module,
    x: Tensor,
    epochs: int,
    lr: float = 1e-2,
    seed: int = 0,
    compile: bool | None = None,
    batch_size: int = 100,
    decay: bool = True,
) -> Imputation:
    """Trains the program by IWAE, and imputes the missing values."""
    options = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "progress": False}
    options |= {"seed": seed, "compile": compile}
    options["schedule"] = {"CosineAnnealingLR": {"T_max": epochs}} if decay else None
    fit(program, x, IWAE(num_particles=20), **options)
    return impute(program, x, num_draws=1, num_samples=2000, proposal="guide")


def main(smoke: bool = False) -> dict[str, float]:
    """Returns the errors of three ways to fill in the missing values."""
    torch.manual_seed(0)
    rows, epochs = (100, 2) if smoke else (1000, 200)
    full = torch.randn(rows, 2) @ torch.randn(2, 5) + 0.3 * torch.randn(rows, 5)
    full = (full - full.mean(0)) / full.std(0)
    x = large_missing(full)
    vae = normal(5, 2)
    return {
        "column means": error(x.nanmean(0).expand_as(x), full, x),
        "at random": error(imputed(normal(5, 2), x, epochs).mean, full, x),
        "self-masking known": error(
            imputed(SelfMasking(vae, x.isnan().any(0)), x, epochs).mean, full, x
        ),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true", help="a short run, as a test")
    for name, value in main(parser.parse_args().smoke).items():
        print(f"{name}: {value:.3f}")
