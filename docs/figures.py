"""Draws the figures of the pages, from models of bundled digits with two latents.

python docs/figures.py              # two minutes; posterior.png and priors.png too
python docs/figures.py --evidence   # evidence.svg alone, from results/evidence.json
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae import VAE, build, fit, plots
from pyro_vae.data import load_data
from pyro_vae.estimators import evidence_lower_bound

HERE = Path(__file__).parent
DATA = load_data("digits", transform="threshold")
LABELS = {  # of a method: its name in the figure, and where that stands
    "encoder, K = 50": ("50 draws of\nthe encoder", (0, 7)),
    "encoder, K = 500": ("500", (0, 7)),
    "encoder, K = 5000": ("5000", (0, 7)),
    "encoder, K = 50000": ("50,000", (0, 7)),
    "AIS, prior": ("annealed from\nthe prior", (0, 7)),
    "AIS, encoder": ("annealed from\nthe encoder", (0, 7)),
    "AIS, refined": ("annealed from the fitted proposal", (8, -4)),
    "log_evidence": ("log_evidence", (9, -4)),
}
PRIORS = ("StandardNormal", "MixtureOfGaussians", "VampPrior", "FlowPrior")


def trained(prior: str) -> VAE:
    """A VAE of two latents."""
    torch.manual_seed(0)
    options = {"num_components": 50} if prior == "VampPrior" else {}
    declared = {"class_path": prior, "init_args": options}
    mlp = {"class_path": "MLP", "init_args": {"hidden": [200, 200], "activation": "relu"}}
    vae = build((1, 8, 8), 2, prior=declared, encoder=mlp, decoder=mlp)
    fit(vae, DATA.train, epochs=150, validation=DATA.validation, progress=False)
    return vae.eval()


def grid(centre: Tensor, half: float, points: int) -> tuple[Tensor, Tensor, Tensor]:
    """A square grid [points^2, 2] around `centre`, and its two axes."""
    first, second = (torch.linspace(-half, half, points) + c for c in centre)
    return torch.cartesian_prod(first, second), first, second


@plots.style()
@torch.no_grad()
def posteriors(vae: VAE, rows: Tensor) -> Figure:
    """p(z | x), coloured, and q(z | x), lines, of a few test images.

    log p(x) and the KL are by quadrature, the ELBO by 20,000 draws.
    """
    x, _ = DATA.test.fixed().batch(rows)
    bound = evidence_lower_bound(vae.model, vae.guide, x, num_samples=20_000)
    figure = Figure(figsize=(5.4, 6.2), layout="constrained")
    for i, ax in enumerate(figure.subplots(2, 2).flat):

        def log_joint(z: Tensor, datum: Tensor = x[i]) -> Tensor:
            return (vae.prior().log_prob(z) + vae.likelihood(z).log_prob(datum)).double()

        q = vae.encode(x[i])
        z, *_ = grid(torch.zeros(2), 8.0, 801)
        joint = log_joint(z)
        log_px = joint.logsumexp(0) + 2 * math.log(16 / 800)
        half = 6 * q.stddev.max().item()
        middle = (q.mean + joint.softmax(0).float() @ z) / 2  # of the encoder and the posterior
        z, first, second = grid(middle, half, 201)
        log_q, log_posterior = q.log_prob(z).double(), log_joint(z) - log_px
        kl = (log_q.exp() * (log_q - log_posterior)).sum() * (half / 100) ** 2
        ax.contourf(first, second, log_posterior.exp().view(201, 201).T, 12, cmap="Blues")
        height = (log_q - log_q.max()).exp().view(201, 201).T
        ax.contour(
            first, second, height, [0.05, 0.3, 0.7], colors=plots.PALETTE[1], linewidths=0.9
        )
        ax.set_title(
            f"log p(x) = {log_px:.2f}\nELBO = {bound.elbo[i]:.2f}\nKL(q ‖ p(z | x)) = {kl:.2f}",
            fontsize=9,
        )
        ax.set(xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
    return figure


@plots.style()
@torch.no_grad()
def priors(models: dict[str, VAE]) -> Figure:
    """log p(z) of each prior, with the posterior means of the training data."""
    x, _ = DATA.train.fixed().batch(torch.arange(len(DATA.train)))
    figure = Figure(figsize=(5.4, 5.4), layout="constrained")
    for ax, (name, vae) in zip(figure.subplots(2, 2).flat, models.items()):
        means = vae.encode(x).mean
        z, first, second = grid(torch.zeros(2), means.abs().max().item() * 1.1, 201)
        density = vae.prior().log_prob(z).view(201, 201).T.clamp(min=-9)
        filled = ax.contourf(first, second, density, torch.linspace(-9, 0, 19), cmap="Blues")
        ax.scatter(*means.T, s=2, color=plots.PALETTE[1], alpha=0.5, linewidths=0)
        ax.set(title=name, xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
    figure.colorbar(filled, ax=figure.axes, shrink=0.5, label="log p(z), nats", extend="both")
    return figure


@plots.style()
def evidence() -> Figure:
    """Error of log p(x) against its cost, of one of the models of the results."""
    rows = json.loads((HERE.parent / "results/evidence.json").read_text())
    rows = [row for row in rows if row["run"].endswith("500-20")]
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    ax = figure.subplots()
    families = {"encoder": ("o-", 1, 6), "AIS": ("s", 6, 5), "log_evidence": ("*", 0, 14)}
    for family, (look, colour, size) in families.items():
        mine = [row for row in rows if row["method"].startswith(family)]
        seconds, error = ([row[name] for row in mine] for name in ("seconds", "rms"))
        ax.loglog(seconds, error, look, color=plots.PALETTE[colour], ms=size)
        for x, y, row in zip(seconds, error, mine):
            label, offset = LABELS[row["method"]]
            ink = {"color": plots.PALETTE[colour], "fontsize": 10}
            side = {"ha": "center" if offset[1] > 0 else "left"}
            ax.annotate(label, (x, y), offset, textcoords="offset points", **ink, **side)
    ax.annotate(
        "cheaper and\nmore exact", (0.02, 0.03), (0.1, 0.13), "axes fraction", color="0.4",
        fontsize=10, arrowprops={"arrowstyle": "->", "color": "0.4"},
    )  # fmt: skip
    ax.set_xlabel("seconds for 200 images of MNIST, two cores", fontsize=10)
    ax.set_ylabel("error of log p(x)\nof one image, nats", fontsize=10)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ax.tick_params(labelsize=10)
    ax.minorticks_off()
    ax.set(xlim=(0.02, 900), ylim=(0.03, 10))
    return figure


if __name__ == "__main__":
    plots.save(evidence(), str(HERE / "evidence.svg"))
    if "--evidence" in sys.argv:
        sys.exit()
    models = {prior: trained(prior) for prior in PRIORS}
    plots.save(
        posteriors(models["StandardNormal"], torch.tensor([0, 3, 11, 40])),
        str(HERE / "posterior.png"),
    )
    plots.save(priors(models), str(HERE / "priors.png"))
