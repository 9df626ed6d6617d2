"""Trains every pair of a prior and a likelihood, and prints a table of their log p(x).

python examples/swap_components.py            # bundled digits, about three minutes
python examples/swap_components.py --smoke

Bernoulli gives the probability of binary pixels. The others give densities or probabilities of
grey pixels. So compare only rows with the same entry in the column "data".
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

from pyro_vae import build, fit, importance_sampling
from pyro_vae.data import load_data

PRIORS = [
    "StandardNormal",
    {"class_path": "MixtureOfGaussians", "init_args": {"num_components": 10}},
    {"class_path": "VampPrior", "init_args": {"num_components": 50}},
]
LIKELIHOODS = [
    ("Bernoulli", "threshold"),
    ("ContinuousBernoulli", "dequantise"),
    ({"class_path": "Normal", "init_args": {"scale": "learned"}}, "dequantise"),
    ({"class_path": "DiscretizedLogistic", "init_args": {"levels": 17}}, "none"),
    ({"class_path": "Categorical", "init_args": {"levels": 17}}, "none"),
]


def main(smoke: bool = False) -> list[dict[str, str]]:
    """Trains every pair and returns the rows of the table."""
    rows = []
    for likelihood, transform in LIKELIHOODS:
        data = load_data("digits", transform=transform, limit=100 if smoke else None)
        x, _ = data.test.fixed().batch(torch.arange(len(data.test)))
        for prior in PRIORS:
            torch.manual_seed(0)
            vae = build(data.train.data_shape, 8, prior=prior, likelihood=likelihood)
            options = {"epochs": 1 if smoke else 60, "batch_size": 64, "lr": 2e-3}
            fit(vae, data.train, validation=data.validation, progress=False, **options)
            evidence = importance_sampling(vae, x, num_samples=50 if smoke else 1000)
            monte_carlo, over_data = evidence.mean_stderr()
            bits = data.test.bits_per_dim(evidence.log_prob).mean()
            rows.append(
                {
                    "data": transform,
                    "likelihood": type(vae.likelihood).__name__,
                    "prior": type(vae.prior).__name__,
                    "log p(x) at least": f"{evidence.mean():.2f}",
                    "+- (Monte Carlo)": f"{monte_carlo:.2f}",
                    "+- (data)": f"{over_data:.2f}",
                    "bits per pixel": f"{bits:.3f}",
                }
            )
    show(rows)
    return rows


def show(rows: list[dict[str, str]]) -> None:
    """Prints the table."""
    table = Table(*rows[0], title="digits, 180 test images, nats per image")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one epoch on 100 images")
    main(parser.parse_args().smoke)
