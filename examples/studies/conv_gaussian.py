"""Compares five choices of sigma in the Gaussian decoder of a convolutional VAE.

python examples/studies/conv_gaussian.py --data SVHN --limit 60000  # by torchvision
python examples/studies/conv_gaussian.py --data FOLDER  # any images of one size
python examples/studies/conv_gaussian.py --smoke  # drawn images, seconds

The encoder has convolutions of stride 2 with 32, 64 and 128 channels and a dense layer of 1024.
The decoder goes back by transposed convolutions to 128, 64 and 3 channels. The likelihood is
p(x | z) = N(x; mu(z), sigma^2) with x = (pixel + noise) / 256. So log p(x) is a density that
bounds the probability of the 8-bit image.

sigma = 1 is the mean squared error that most code minimises. Its means look well, but a draw of x
is noise, and log p(x) is that of a model of noise. The best single sigma is known,

    sigma^2 = E || x - mu(z) ||^2 / D,        z from q(z | x), x from the training images,

It can be set after each epoch (a callback below), set once at the end, or learned as a parameter,
which comes to the same value. The paper takes it over each batch; then p(x) is no density of x.
Batch norm is an option. Evaluation always uses its running averages, so log p(x) of an image
does not depend on the other images. The table is written after each model. If you run the
command again, it goes on where it stopped.

Rybkin, Daniilidis and Levine. Simple and effective VAE training with calibrated decoders. 2021.
Its bounds on -log p(x), of SVHN at 28 x 28 with other networks, are 2184 for sigma 1, -3349 for
a learned and -3333 for an optimal sigma (of the batch).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from printing import numbers, show, study_options, verdicts
from torch import Tensor

from pyro_vae import build, fit, log_evidence, metrics
from pyro_vae.data import Data, Splits, load_data
from pyro_vae.estimators import evidence_lower_bound
from pyro_vae.objectives import ELBO, Linear
from pyro_vae.training import History, State

MODELS: dict[str, dict[str, Any]] = {
    "sigma 1": {"scale": 1.0},
    "sigma learned, at least 0.3": {"scale": "learned", "min_scale": 0.3},
    "sigma learned": {"scale": "learned", "min_scale": 0.001},
    "sigma learned, batch norm": {"scale": "learned", "min_scale": 0.001},
    "sigma optimal": {"scale": 1.0},
}


def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains and judges each model, writes the table, and returns its rows."""
    data = load_data(
        arguments.data, root=arguments.root, transform="dequantise", limit=arguments.limit
    )
    train, _ = data.train.fixed().batch(torch.arange(min(1000, len(data.train))))
    rows: list[dict[str, Any]] = []
    for name, options in MODELS.items():
        vae, history = trained(name, options, data, train, arguments)
        rows.append({"model": name, **judged(vae, data.test, train, arguments)})
        rows[-1]["seconds"] = round(sum(history["seconds"]))
        if name == "sigma 1":
            vae.likelihood.fixed_scale.copy_(optimal_sigma(vae, train))
            row = {"model": "... then optimal", **judged(vae, data.test, train, arguments)}
            rows.append({**row, "seconds": 0})
        report(rows, arguments)
    return rows


def trained(
    name: str, options: dict[str, Any], data: Splits, train: Tensor, arguments: argparse.Namespace
) -> tuple[Any, History]:
    """Trains the VAE; returns it with the weights of its best validation bound."""
    network = {
        "hidden": [128 if arguments.smoke else 1024],
        "norm": "batch" if "batch norm" in name else arguments.norm,
    }
    torch.manual_seed(arguments.seed)
    vae: Any = build(
        data.train.data_shape,
        latent_dim=4 if arguments.smoke else 32,
        likelihood={"Normal": {"mean": "sigmoid", **options}},
        encoder={"Conv": {"channels": [32, 64, 128], **network}},
        decoder={"ConvTranspose": {"channels": [128, 128, 64], **network}},
    )
    if options["scale"] == "learned":  # sigma changes slowly: start near where it ends
        start = -6.0 if options["min_scale"] > 0.1 else -2.0
        torch.nn.init.constant_(vae.likelihood.raw_scale, start)

    def set_sigma(_: State) -> None:
        vae.likelihood.fixed_scale.copy_(optimal_sigma(vae, train))

    history = fit(
        vae,
        data.train,
        ELBO(beta=Linear(length=arguments.epochs / 2, unit="epoch")),
        run=f"{arguments.out}/{name}",
        resume=True,
        epochs=arguments.epochs,
        batch_size=10 if arguments.smoke else 32,
        schedule={"class_path": "CosineAnnealingLR", "init_args": {"T_max": arguments.epochs}},
        validation=data.validation,
        compile=arguments.compile,
        seed=arguments.seed,
        callbacks=[set_sigma] if name == "sigma optimal" else [],
        progress=not arguments.smoke,
    )
    return vae.eval(), history


@torch.no_grad()
def optimal_sigma(vae: Any, x: Tensor) -> Tensor:
    """Returns the one sigma at which the bound of images x is highest."""
    vae.eval()
    z = vae.encode(x).sample()
    return (x - vae.likelihood(z).mean).pow(2).mean().sqrt()


def judged(vae: Any, test: Data, train: Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns log p(x) of test images in nats and bits, and sigma beside the optimal sigma."""
    test = test.subset(torch.arange(arguments.images)).fixed()
    x, _ = test.batch(torch.arange(len(test)))
    bound = evidence_lower_bound(vae.model, vae.guide, x, num_samples=20)
    evidence = log_evidence(vae.model, vae.guide, x, budget=arguments.budget)
    with torch.no_grad():
        means = vae.encode(train).mean
        sigma = vae.likelihood(means[:100]).base_dist.scale.mean().item()
    return {
        "sigma": sigma,
        "optimal sigma": optimal_sigma(vae, train).item(),
        "ELBO": bound.elbo.mean().item(),
        **numbers(evidence),
        "bits per dimension": test.bits_per_dim(evidence.log_prob).mean().item(),
        "verdict": verdicts(evidence),
        "active units": int(metrics.active_units(means).sum()),
    }


def drawn(folder: Path) -> str:
    """Writes a file of small images that fade from one colour to another."""
    generator = np.random.default_rng(0)
    first, last = generator.uniform(0, 255, (2, 300, 3, 1, 1))
    images = first + (last - first) * np.linspace(0, 1, 24) * np.ones((24, 1))
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "drawn.npy", images.astype(np.uint8))
    return str(folder / "drawn.npy")


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Writes and prints the table."""
    title = f"{arguments.images} test images of {arguments.data}, {arguments.epochs} epochs"
    settings = {
        name: getattr(arguments, name) for name in ("epochs", "limit", "norm", "budget", "seed")
    }
    table = {**settings, "title": title, "rows": rows}
    Path(arguments.out, "table.json").write_text(json.dumps(table, indent=1))
    show(rows, f"{title}; nats per image", width=170, digits=3)


if __name__ == "__main__":
    parser = study_options(__doc__, epochs=20, images=20, out="runs/conv_gaussian")
    parser.add_argument("--data", default="SVHN", help="SVHN, CIFAR10 or a folder of images")
    parser.add_argument("--limit", type=int, default=4000, help="largest part of the data")
    parser.add_argument("--norm", choices=["batch"], help="batch norm in all models")
    parser.add_argument("--budget", type=int, help="of log_evidence, decodings of an image")
    options = parser.parse_args()
    if options.smoke:
        options.epochs, options.images, options.budget = 8, 2, 5000
        options.data = drawn(Path(options.out))
    main(options)
