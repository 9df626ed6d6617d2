"""Compares the errors of two estimates of log p(x) with what their weights say of them.

python examples/studies/trust_log_px.py --run RUN --root data  # a run of pyro-vae train on MNIST
python examples/studies/trust_log_px.py  # trains on bundled digits, two minutes
python examples/studies/trust_log_px.py --smoke

With the encoder as the proposal, the standard error and k-hat of an image say little of how many
nats are missing. With a proposal fitted to the image, they say it. The figure has four panels: for
both proposals, the error of each image against its standard error and against its k-hat. The
axes of error differ.
"""

from __future__ import annotations

import argparse

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae import Evidence, build, fit, load, plots
from pyro_vae.data import load_data
from pyro_vae.estimators import (
    annealed_importance_sampling,
    importance_sampling,
    refined_importance_sampling,
)
from pyro_vae.vae import VAE


def trained(arguments: argparse.Namespace) -> tuple[VAE, Tensor]:
    """Trains or loads a VAE; returns it and held-out images."""
    name = "MNIST" if arguments.run else "digits"
    data = load_data(name, root=arguments.root, transform="threshold")
    x, _ = data.test.fixed().batch(torch.arange(7 if arguments.smoke else arguments.images))
    if arguments.run:
        return load(arguments.run), x
    torch.manual_seed(0)
    vae = build((1, 8, 8), latent_dim=16)
    epochs = 2 if arguments.smoke else 200
    fit(vae, data.train, epochs=epochs, lr=2e-3, progress=not arguments.smoke)
    return vae.eval(), x


@plots.style()
def draw(estimates: dict[str, Evidence], reference: Evidence) -> Figure:
    """Draws the error of each image's estimate against what the weights say of it."""
    figure = Figure(figsize=(7, 5.4), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for row, colour, (name, found) in zip(axes, (1, 0), estimates.items()):
        error = (found.log_prob - reference.log_prob).tolist()
        for ax, values in zip(row, (found.stderr, found.khat)):
            ax.axhline(0, color="0.6", lw=1, zorder=0)
            ax.scatter(values.tolist(), error, s=10, color=plots.PALETTE[colour], linewidths=0)
            ax.set_title(name)
        edge = torch.logspace(*found.stderr.log10().aminmax(), 50)
        row[0].fill_between(edge, -2 * edge, 2 * edge, color="0.9", lw=0, zorder=0)
        row[0].text(0.02, 0.02, "grey: 2 standard errors", transform=row[0].transAxes)
        row[0].set(xscale="log", xlabel="standard error, nats")
        row[0].xaxis.set_minor_formatter("")
        row[0].set_ylabel("estimate less log p(x), nats")
        threshold = found.khat_threshold[0].item()
        row[1].axvline(threshold, color="0.5", ls=":")
        row[1].text(threshold, 1, " threshold", color="0.4", va="top",
            transform=row[1].get_xaxis_transform())  # fmt: skip
        row[1].set_xlabel("k-hat")
    return figure


def main(arguments: argparse.Namespace) -> dict[str, float]:
    """Estimates log p(x), draws the figure, and returns the mean shortfall of each proposal."""
    vae, x = trained(arguments)
    k = 200 if arguments.smoke else 5000
    estimates = {
        f"{k} draws of the encoder": importance_sampling(vae.model, vae.guide, x, num_samples=k),
        "1000 draws of the fitted proposal": refined_importance_sampling(vae.model, vae.guide, x),
    }
    chains, temperatures = (16, 5) if arguments.smoke else (128, 50)
    path = {"start": "refined", "num_chains": chains, "num_temperatures": temperatures}
    reference = annealed_importance_sampling(vae.model, vae.guide, x, **path, seed=1)
    print(f"reference: {reference}")
    shortfall = {}
    for name, evidence in estimates.items():
        missing = reference.log_prob - evidence.log_prob
        shortfall[name] = missing.mean().item()
        good = evidence.khat < evidence.khat_threshold
        print(
            f"{name}: {missing.mean():.3f} nats missing on average, {missing.max():.2f} on one "
            f"image; among {int(good.sum())} of {len(x)} images with a good k-hat "
            f"{missing[good].mean():.3f}"
        )
    plots.save(draw(estimates, reference), arguments.out)
    print(f"figure in {arguments.out}")
    return shortfall


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", help="run folder of a model of thresholded MNIST")
    parser.add_argument("--root", default="data", help="folder of MNIST")
    parser.add_argument("--images", type=int, default=180)
    parser.add_argument("--out", default="trust_log_px.svg")
    parser.add_argument("--smoke", action="store_true", help="a few images, little work")
    main(parser.parse_args())
