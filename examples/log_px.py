"""Estimates log p(x) of held-out images, with its error and a verdict on each estimate.

python examples/log_px.py            # bundled digits, two minutes
python examples/log_px.py --smoke

Importance weights of the encoder give a lower bound. Their standard error does not say how low
it is. `log_evidence` works on each image until its own checks pass. Annealed importance sampling
is another method, at many times the cost, to compare with.

Burda, Grosse and Salakhutdinov. Importance weighted autoencoders. 2016.
"""

from __future__ import annotations

import argparse

import torch

from pyro_vae import (
    annealed_importance_sampling,
    build,
    fit,
    importance_sampling,
    log_evidence,
)
from pyro_vae.data import load_data


def main(smoke: bool = False) -> dict[str, float]:
    """Trains a VAE and returns the mean log p(x) by each method."""
    data = load_data("digits", transform="threshold")
    x, _ = data.test.fixed().batch(torch.arange(7 if smoke else 50))
    torch.manual_seed(0)
    vae = build((1, 8, 8), latent_dim=16)
    fit(vae, data.train, epochs=2 if smoke else 200, lr=2e-3, progress=False)

    path = {"num_chains": 16, "num_temperatures": 5} if smoke else {}
    estimates = {
        "encoder, K = 1000": importance_sampling(vae, x, num_samples=1000),
        "log_evidence": log_evidence(vae, x),
        "annealed": annealed_importance_sampling(vae, x, start="refined", seed=1, **path),
    }
    for name, evidence in estimates.items():
        monte_carlo, over_data = evidence.mean_stderr()
        words = {word: evidence.verdict.count(word) for word in sorted({*evidence.verdict})}
        print(f"{name}: {evidence.mean():.2f} nats per image +- {monte_carlo:.2f} {words}")
    return {name: float(evidence.mean()) for name, evidence in estimates.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two epochs, seven images")
    main(parser.parse_args().smoke)
