"""Compares likelihoods for the grey values of MNIST, where log p(x) can be compared.

python examples/studies/likelihoods_mnist.py --root data  # 12 epochs: a quarter of an hour
python examples/studies/likelihoods_mnist.py --root data --epochs 100 --images 1000
python examples/studies/likelihoods_mnist.py --smoke  # bundled digits, seconds

log p(x) may be one of four things:

- the probability of a binary image (a pixel is 1 from half the brightest value on);
- the probability of a grey image of 256 levels;
- the density of a grey image with uniform noise, (x + u) / 256. If the transform's log-Jacobian
  is added, its mean is a lower bound on the log probability of the grey image;
- the density of grey values without noise, x / 255. They lie on a lattice, where a density has no
  bound: it grows a spike at black, and its bits can fall below zero, which no code can reach.

Compare models only within one of these, with one exception: a density with noise bounds the
probability of a grey image from below. Table and figures are written after each model. If you
run the command again, it goes on where it stopped.

The networks are 784-500-500-20 with ReLU, as in Loaiza-Ganem and Cunningham. The continuous
Bernoulli. 2019. The published bounds 1007, 3121 and 1891 are from its poster. For 1007 the
parameter was kept between 1e-4 and 1 - 1e-4, so the density at black is at most 9; here it is
free. For 1891 the Normal's scale is not stated. The bounds of scale 1 and learned scale are from
Rybkin, Daniilidis and Levine. Simple and effective VAE training with calibrated decoders. 2021.
They are of another network, without noise. For the noise see Theis, van den Oord and Bethge. A
note on the evaluation of generative models. 2016.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from printing import numbers, study_options, verdicts
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.utils import make_grid

from pyro_vae import VAE, build, fit, log_evidence, plots
from pyro_vae.data import Data, Splits, load_data
from pyro_vae.estimators import evidence_lower_bound
from pyro_vae.networks import MLP
from pyro_vae.objectives import ELBO, Linear

BINARY, MASS = "probability of a binary image", "probability of a grey image"
DENSITY, LATTICE = "density with noise", "density without noise"
TRANSFORMS = {BINARY: "threshold", MASS: "none", DENSITY: "dequantise", LATTICE: "rescale"}
Declared = dict[str, Any]


class GreyMLP(MLP):
    """An MLP that sees grey levels as numbers from 0 to 1."""

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        hidden: tuple[int, ...] = (500, 500),
        activation: str = "relu",
        levels: int = 256,
    ) -> None:
        super().__init__(in_shape, out_shape, hidden, activation)
        self.top = levels - 1

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        """The layers of the MLP."""
        return super().body(x / self.top, y)


def declared(name: str, **options: Any) -> Declared:
    """Returns a class and its options as `build` takes them."""
    return {"class_path": name, "init_args": options}


def models(levels: int | None, scale: float) -> list[tuple[str, str, Declared, float | None]]:
    """Returns what log p(x) is, the likelihood's name and declaration, a published bound."""
    logistic = declared("DiscretizedLogistic", levels=levels)
    fixed, learned, predicted = (
        declared("Normal", scale=scale, mean="sigmoid", min_scale=0.004)  # of a grey level
        for scale in (scale, "learned", "predicted")
    )
    narrow = declared("StudentT", scale="predicted", mean="sigmoid", min_scale=1e-4)
    return [
        (BINARY, "Bernoulli", declared("Bernoulli"), None),
        (MASS, "discretised logistic", logistic, None),
        (DENSITY, f"Normal, scale {scale:g}", fixed, -740.5),
        (DENSITY, "Normal, learned scale", learned, 896.1),
        (DENSITY, "Normal, predicted scale", predicted, 1891.0),
        (DENSITY, "continuous Bernoulli", declared("ContinuousBernoulli"), 1007.0),
        (DENSITY, "Beta", declared("Beta"), 3121.0),
        (DENSITY, "Student's t, predicted scale", narrow, None),
        (LATTICE, "Student's t, predicted scale", narrow, None),
    ]


def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains and judges each model, writes the table and the figures, and returns the rows."""
    grey = load_data("digits" if arguments.smoke else "MNIST", root=arguments.root)
    rows, pictures = [], {}
    scale = 0.2 if arguments.smoke else 1.0  # all of digits' variance is below 1
    for kind, name, likelihood, published in models(grey.train.levels, scale):
        data = grey.with_transform(TRANSFORMS[kind])
        vae, seconds = trained(likelihood, data, f"{kind}, {name}", arguments)
        row = {"log p(x) is the": kind, "likelihood": name, **judged(vae, data.test, arguments)}
        row |= {"published bound": None if arguments.smoke else published, "seconds": seconds}
        rows.append(row)
        pictures[f"{name}\n({kind})"] = sampled(vae, data.test, arguments.seed)
        report(rows, arguments)
        plots.save(bits(rows), f"{arguments.out}/bits.svg")
        plots.save(gallery(pictures, grey.train.levels - 1), f"{arguments.out}/samples.png")
    return rows


def trained(
    likelihood: Declared, data: Splits, name: str, arguments: argparse.Namespace
) -> tuple[VAE, int]:
    """Trains the VAE; returns it with its best weights, and the seconds of the training."""
    network: Declared = declared("MLP", hidden=[500, 500], activation="relu")
    grey = declared("GreyMLP", levels=data.train.levels)
    torch.manual_seed(arguments.seed)
    vae: Any = build(
        data.train.data_shape,
        latent_dim=4 if arguments.smoke else 20,
        likelihood=likelihood,
        encoder=grey if data.transform == "none" else network,
        decoder=network,
    )
    if likelihood["init_args"].get("scale") == "learned":  # changes slowly: start near the end
        torch.nn.init.constant_(vae.likelihood.raw_scale, -2.0)
    history = fit(
        vae,
        data.train,
        ELBO(beta=Linear(length=arguments.epochs / 2, unit="epoch")),  # else all units collapse
        run=f"{arguments.out}/{name}",
        resume=True,
        epochs=arguments.epochs,
        batch_size=20 if arguments.smoke else 100,
        schedule=declared("CosineAnnealingLR", T_max=arguments.epochs),
        clip_norm=1000.0,  # a narrow density has steep gradients
        validation=data.validation,
        compile=arguments.compile,
        seed=arguments.seed,
        progress=not arguments.smoke,
    )
    return vae.eval(), round(sum(history["seconds"]))


def judged(vae: VAE, test: Data, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns log p(x) of test images, as the model gives it and per grey level."""
    test = test.subset(torch.arange(arguments.images)).fixed()
    x, _ = test.batch(torch.arange(len(test)))
    bound = evidence_lower_bound(vae.model, vae.guide, x, num_samples=100)
    evidence = log_evidence(vae.model, vae.guide, x)
    return {
        "ELBO": bound.elbo.mean().item(),
        **numbers(evidence),
        "per grey level": None if test.transform.binary else evidence.mean() + test.log_jacobian,
        "bits per pixel": test.bits_per_dim(evidence.log_prob).mean().item(),
        "verdict": verdicts(evidence),
    }


@torch.no_grad()
def sampled(vae: VAE, test: Data, seed: int) -> Tensor:
    """Returns ten means E[x | z], and ten draws of x at the same z, in grey levels."""
    both = []
    for mean in (True, False):
        torch.manual_seed(seed)
        both.append(vae.sample(10, mean=mean))
    return test.transform.inverse(torch.cat(both))


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Writes and prints the table, with a line between rows that do not compare."""
    name = "digits" if arguments.smoke else "MNIST"
    title = f"{arguments.images} test images of {name}, nats per image, {arguments.epochs} epochs"
    settings = {name: getattr(arguments, name) for name in ("epochs", "seed")}
    table = {**settings, "title": title, "rows": rows}
    Path(arguments.out, "table.json").write_text(json.dumps(table, indent=1))
    shown = Table(*rows[0], title=title)
    for row, after in zip(rows, [*rows[1:], rows[0]]):
        last = row["log p(x) is the"] != after["log p(x) is the"]
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()]
        shown.add_row(*cells, end_section=last)
    Console(width=170).print(shown)


@plots.style()
def bits(rows: list[dict[str, Any]]) -> Figure:
    """Draws bits per pixel of each model, coloured by what its log p(x) is."""
    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    ax = figure.subplots()
    for kind, colour in zip(TRANSFORMS, plots.PALETTE):
        known = [
            (r["bits per pixel"], i) for i, r in enumerate(rows) if r["log p(x) is the"] == kind
        ]
        if known:
            ax.plot(*zip(*known), "o", ms=6, color=colour, label=kind)
    for side, limit in ((0, "no code can be shorter"), (8, "a raw pixel")):
        ax.axvline(side, color="#666666", lw=0.8, ls="--", zorder=0)
        ax.text(side, 1.01, limit, transform=ax.get_xaxis_transform(), ha="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [row["likelihood"] for row in rows])
    ax.set(xlabel="bits per pixel, further left is better", ylim=(len(rows) - 0.5, -0.5))
    ax.grid(axis="y", lw=0.4)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


@plots.style()
def gallery(pictures: dict[str, Tensor], top: float) -> Figure:
    """Draws a row for each model: ten means and ten draws of x."""
    figure = Figure(figsize=(11, 0.62 * len(pictures) + 0.4), layout="constrained")
    grid = figure.subplots(len(pictures), 2, squeeze=False)
    for (left, right), (name, x) in zip(grid, pictures.items()):
        for ax, part in ((left, x[:10]), (right, x[10:])):
            strip = make_grid(part, nrow=10, padding=1, pad_value=top / 2)[0]
            ax.imshow(strip.tolist(), cmap="gray", vmin=0, vmax=top)
            ax.set(xticks=[], yticks=[])
        left.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    grid[0][0].set_title("E[x | z], z from the prior")
    grid[0][1].set_title("x drawn at the same z")
    return figure


if __name__ == "__main__":
    given = {"epochs": 12, "images": 100, "out": "runs/likelihoods_mnist"}
    options = study_options(__doc__, **given).parse_args()
    if options.smoke:
        options.epochs, options.images = 4, 3
    main(options)
