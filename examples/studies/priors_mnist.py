"""Compares four priors of one VAE on binarised MNIST by what each adds to log p(x).

python examples/studies/priors_mnist.py --root data  # 20 epochs: half an hour on one core
python examples/studies/priors_mnist.py --root data --epochs 2000 --warm_up 100 --patience 50 \
    --lr 5e-4 --images 10000                    # the published budget
python examples/studies/priors_mnist.py --smoke  # bundled digits, seconds

As published, the VAE is 784-300-300-40 with gated units, priors have 500 components, batches 100
images, and the weight of the KL rises from 0. Pixels are drawn from their grey values at every
visit ("dynamic"), or once from a seed ("drawn once": not the file of Larochelle and Murray). Both
have the same draws of the test images, so all differences are paired. log p(x) is by
`log_evidence`. The bound by 5000 draws of the encoder, which the papers report, stands beside it.
Tables and figures are written after each model. If you run the command again, it goes on where
it stopped.

Tomczak and Welling. VAE with a VampPrior. 2018. The published values are of a later rerun with
the same code and 5000 draws: Norouzi, Fleet and Norouzi. Exemplar VAE. 2020.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from printing import numbers, show, study_options, verdicts
from torch import Tensor
from torchvision.utils import make_grid

from pyro_vae import VAE, Evidence, build, fit, importance_sampling, log_evidence, metrics, plots
from pyro_vae.data import Splits, load_data
from pyro_vae.objectives import ELBO, Linear
from pyro_vae.training import History

RUNS = [
    ("StandardNormal", "dynamic"),
    ("MixtureOfGaussians", "dynamic"),
    ("VampPrior", "dynamic"),
    ("FlowPrior", "dynamic"),
    ("StandardNormal", "static"),
    ("VampPrior", "static"),
]
SHOWN = {"dynamic": "dynamic", "static": "drawn once"}
PUBLISHED = {("StandardNormal", "dynamic"): -84.45, ("VampPrior", "dynamic"): -82.43}


def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains and judges each model, writes tables and figures, and returns the rows."""
    rows, evidence, pictures = [], {}, {}
    for prior, transform in RUNS:
        name = f"{prior}, {SHOWN[transform]}"
        source = "digits" if arguments.smoke else "MNIST"
        data = load_data(source, root=arguments.root, transform=transform)
        vae, history = trained(prior, data, arguments)
        evidence[name], row = judged(vae, data, arguments)
        rows.append({"model": name, **row, "epochs": len(history)})
        rows[-1]["seconds"] = round(sum(history["seconds"]))
        if not arguments.smoke:
            rows[-1]["published"] = PUBLISHED.get((prior, transform))
        torch.manual_seed(arguments.seed)
        with torch.no_grad():
            pictures[name] = vae.sample(25, mean=True)
            if prior == "VampPrior":
                pictures[f"pseudo-inputs, {SHOWN[transform]}"] = vae.prior.inputs[:25]
        pairs = report(rows, evidence, arguments)
        plots.save(compared(rows, pairs), f"{arguments.out}/priors.svg")
        plots.save(gallery(pictures), f"{arguments.out}/samples.png")
    return rows


def trained(prior: str, data: Splits, arguments: argparse.Namespace) -> tuple[Any, History]:
    """Trains the VAE with this prior; returns it with its best weights by validation."""
    latent_dim, components = (4, 5) if arguments.smoke else (40, 500)
    mixture = prior in ("MixtureOfGaussians", "VampPrior")
    torch.manual_seed(arguments.seed)
    vae = build(
        data.train.data_shape,
        latent_dim,
        prior={prior: {"num_components": components} if mixture else {}},
        encoder={"GatedMLP": {"hidden": [300, 300]}},
        decoder={"GatedMLP": {"hidden": [300, 300]}},
    )
    # a short run gains from a falling learning rate; a long one keeps the rate and stops early
    falling = {"class_path": "CosineAnnealingLR", "init_args": {"T_max": arguments.epochs}}
    history = fit(
        vae,
        data.train,
        ELBO(beta=Linear(length=arguments.warm_up, unit="epoch")),
        run=f"{arguments.out}/{prior}-{data.transform}",
        resume=True,
        epochs=arguments.epochs,
        batch_size=100,
        lr=arguments.lr,
        schedule=None if arguments.patience else falling,
        validation=data.validation,
        patience=arguments.patience,
        compile=arguments.compile,
        seed=arguments.seed,
        progress=not arguments.smoke,
    )
    return vae.eval(), history


def judged(
    vae: VAE, data: Splits, arguments: argparse.Namespace
) -> tuple[Evidence, dict[str, Any]]:
    """Returns log p(x) of test images, and its row: mean, encoder's bound, active units."""
    test = data.test.fixed()
    x, _ = test.batch(torch.arange(arguments.images))
    evidence = log_evidence(vae.model, vae.guide, x)
    draws = 50 if arguments.smoke else 5000
    bound = importance_sampling(vae.model, vae.guide, x, num_samples=draws)
    with torch.no_grad():
        many, _ = test.batch(torch.arange(min(1000, len(test))))
        active = metrics.active_units(vae.encode(many).mean)
    return evidence, {
        **numbers(evidence),
        "verdict": verdicts(evidence),
        "encoder's bound": bound.mean(),
        "active units": int(active.sum()),
    }


def report(
    rows: list[dict[str, Any]], evidence: dict[str, Evidence], arguments: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """Writes and prints the tables of models and of differences; returns the differences."""
    title = f"{arguments.images} test images of digits, nats per image"
    if not arguments.smoke:
        title = (
            f"{arguments.images} test images of MNIST, nats per image; published: up to 2000 "
            "epochs, 10,000 images, encoder's bound"
        )
    pairs = {
        f"{b} less {a}": evidence[b].difference(evidence[a]) for a, b in combinations(evidence, 2)
    }
    settings = {
        name: getattr(arguments, name) for name in ("epochs", "warm_up", "patience", "lr", "seed")
    }
    table = {**settings, "title": title, "rows": rows, "differences": pairs}
    Path(arguments.out, "table.json").write_text(json.dumps(table, indent=1))
    show(rows, title, width=150)
    differences = [
        {"paired": name, "nats": f"{mean:+.2f}", "+- data": error}
        for name, (mean, error) in pairs.items()
    ]
    show(differences, "on the same images", width=150)
    return pairs


@plots.style()
def compared(rows: list[dict[str, Any]], pairs: dict[str, tuple[float, float]]) -> Figure:
    """Draws what each model adds to the log p(x) of the first, with two standard errors."""
    first, *others = (row["model"] for row in rows)
    figure = Figure(figsize=(6.5, 2.4), layout="constrained")
    ax = figure.subplots()
    for i, name in enumerate(others):
        gain, error = pairs[f"{name} less {first}"]
        colour = plots.PALETTE[name.endswith(SHOWN["static"])]
        ax.errorbar(gain, i, xerr=2 * error, color=colour, fmt="o", capsize=3)
    ax.axvline(0, color="#000000", lw=0.8, zorder=0)
    ax.set_yticks(range(len(others)), others)
    ax.set(xlabel=f"log p(x) less that of {first}: nats, 2 standard errors")
    ax.set_ylim(len(others), -1)
    return figure


def gallery(pictures: dict[str, Tensor]) -> Figure:
    """Draws 25 images of each model."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = list(figure.subplots(2, 4).flat)
    for ax, (name, x) in zip(axes, pictures.items()):
        ax.imshow(make_grid(x, nrow=5, padding=1, pad_value=0.5)[0].tolist(), cmap="gray")
        ax.set_title(name, fontsize=9)
    for ax in axes:
        ax.set_axis_off()
    figure.suptitle("E[x | z] of z drawn from the prior; pseudo-inputs", fontsize=10)
    return figure


if __name__ == "__main__":
    parser = study_options(__doc__, epochs=20, images=100, out="runs/priors_mnist")
    parser.add_argument("--warm_up", type=float, default=5, help="epochs until beta is 1")
    parser.add_argument("--patience", type=int, help="stop early, at a constant learning rate")
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    if options.smoke:
        options.epochs, options.warm_up, options.images = 2, 1, 3
    main(options)
