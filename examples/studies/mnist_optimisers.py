"""Compares Adam, RMSprop, Adagrad and SGD with momentum on thresholded MNIST.

python examples/studies/mnist_optimisers.py --root data  # 4 x 150 epochs: 40 minutes on one core
python examples/studies/mnist_optimisers.py --root data --latent_dim 2
python examples/studies/mnist_optimisers.py --smoke  # bundled digits, seconds

The VAE is 784-500-20 with tanh, trained for 150 epochs in batches of 250 with one draw of z. It
is trained on the first 50,000 images of MNIST's training part and validated on its last 10,000,
as in the published study. There the learning rates are constant. Here they fall to zero by a
cosine. Their start was chosen by the validation bound after 6 epochs (RMSprop: 0.5, 1, 2, 4e-3;
Adagrad: 0.01, 0.02, 0.05; SGD: 0.002, 0.005, 0.02, 0.05, 0.1). For Adam (1, 2, 4, 8e-3) this chose
8e-3, whose 150 epochs ended at -83.09. So Adam has 2e-3, which a second whole run found better.
For SGD and Adagrad the norm of the gradient is clipped to 20, because the first steps are large:
without it SGD diverged from 0.03 on, and Adagrad's steps stay small after them. The weights of the
best epoch by validation images are kept.

If a run was interrupted, give the same command again: it goes on where it stopped. The row of an
optimiser is written to OUT/table.json as soon as it is done, the figure to OUT/bounds.svg.

The published values are from Peiyun Hu, mat-vae (write-up, figure 3), an implementation of
Kingma and Welling. Auto-encoding variational Bayes. 2013.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from printing import show, study_options, verdicts, with_error, with_errors

from pyro_vae import build, fit, log_evidence, plots
from pyro_vae.data import Data, load_data
from pyro_vae.estimators import evidence_lower_bound

MOMENTUM = {"class_path": "SGD", "init_args": {"momentum": 0.9}}
# the learning rate here, the published one, and other options of `fit`
OPTIMISERS: dict[str, tuple[float, float, dict[str, Any]]] = {
    "Adam": (2e-3, 1e-3, {"optimizer": "Adam"}),
    "RMSprop": (2e-3, 1e-3, {"optimizer": "RMSprop"}),
    "Adagrad": (0.02, 0.01, {"optimizer": "Adagrad", "clip_norm": 20.0}),
    "SGD": (0.05, 5e-4, {"optimizer": MOMENTUM, "clip_norm": 20.0}),
}
# validation bound of 20 latents after 150 epochs, nats per image
PUBLISHED = {"Adam": -82.92, "RMSprop": -86.53, "Adagrad": -89.48, "SGD": -89.93}


def split(root: str) -> tuple[Data, Data]:
    """Returns the first 50,000 thresholded images of MNIST's training part, and the rest."""
    parts = load_data("MNIST", root=root, transform="threshold")
    x = torch.cat([parts.train.x, parts.validation.x])
    order = torch.cat([parts.train.rows, parts.validation.rows]).argsort()
    first, last = (
        Data(x[index], transform=parts.train.transform, levels=256)
        for index in order.split(50_000)
    )
    return first, last


def study(
    name: str, train: Data, validation: Data, arguments: argparse.Namespace
) -> dict[str, str]:
    """Trains with one optimiser; returns its row of the table."""
    lr, published_lr, options = OPTIMISERS[name]
    torch.manual_seed(arguments.seed)
    vae = build(train.data_shape, arguments.latent_dim)
    history = fit(
        vae,
        train,
        epochs=arguments.epochs,
        batch_size=250,
        lr=lr,
        schedule={"class_path": "CosineAnnealingLR", "init_args": {"T_max": arguments.epochs}},
        validation=validation,
        run=Path(arguments.out) / name,
        resume=True,
        seed=arguments.seed,
        compile=arguments.compile,
        progress=not arguments.smoke,
        **options,
    )
    x, _ = validation.fixed().batch(torch.arange(len(validation)))
    bound = evidence_lower_bound(vae.model, vae.guide, x).elbo
    n = arguments.images
    evidence = log_evidence(vae.model, vae.guide, x[:n])
    gap = evidence.log_prob - bound[:n]
    known = arguments.latent_dim == 20 and not arguments.smoke
    return {
        "optimiser": name,
        "learning rate": f"{lr:g}",
        "validation bound": f"{history.rows[-1]['validation_elbo']:.2f} +- {stderr(bound):.2f}",
        "published (rate)": f"{PUBLISHED[name]:.2f} ({published_lr:g})" if known else "-",
        "best (epoch)": f"{bound.mean():.2f} ({history.best_epoch})",
        f"bound of {n}": with_error(bound[:n]),
        f"log p(x) of {n}": with_errors(evidence),
        "log p(x) - bound": with_error(gap),
        "verdicts": verdicts(evidence),
        "seconds": f"{sum(history['seconds']):.0f}",
    }


def stderr(values: torch.Tensor) -> float:
    """Returns the standard error of the mean over images."""
    return values.std().item() / len(values) ** 0.5


@plots.style()
def draw(rows: list[dict[str, str]], images: int) -> Figure:
    """Draws bounds and log p(x) of each optimiser, in nats per image."""
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    ax = figure.subplots()
    marks = {
        "published (rate)": ("o", "published bound"),
        "validation bound": ("s", "bound, all validation images"),
        f"bound of {images}": ("|", f"bound of {images} of them"),
        f"log p(x) of {images}": ("D", "their log p(x)"),
    }
    for i, (key, (marker, label)) in enumerate(marks.items()):
        known = [(float(row[key].split()[0]), y) for y, row in enumerate(rows) if row[key] != "-"]
        if known:
            look = {"color": plots.PALETTE[(6, 0, 6, 1)[i]], "ms": (5, 5, 9, 5)[i]}
            ax.plot(*zip(*known), marker, label=label, mfc=None if i else "none", **look)
    ax.set_yticks(range(len(rows)), [row["optimiser"] for row in rows])
    ax.invert_yaxis()
    ax.set(xlabel="nats per image, further right is better", ylim=(len(rows) - 0.5, -0.5))
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def main(arguments: argparse.Namespace) -> None:
    """Trains with each optimiser; writes and prints the table, and draws the figure."""
    smoke, out = arguments.smoke, Path(arguments.out)
    if smoke:
        arguments.epochs, arguments.images = 2, 7
        digits = load_data("digits", transform="threshold")
        train, validation = digits.train, digits.validation
    else:
        train, validation = split(arguments.root)
    out.mkdir(parents=True, exist_ok=True)
    title = (
        f"{'digits' if smoke else 'MNIST'}, {arguments.latent_dim} latents, {arguments.epochs} "
        f"epochs, nats per image; +- over {len(validation)} or {arguments.images} validation "
        "images; of log p(x), +- Monte Carlo +- over images"
    )
    rows: list[dict[str, str]] = []
    for name in OPTIMISERS:
        rows.append(study(name, train, validation, arguments))
        (out / "table.json").write_text(json.dumps({"title": title, "rows": rows}, indent=1))
        plots.save(draw(rows, arguments.images), str(out / "bounds.svg"))
    show(rows, title, width=150)
    print(f"table and figure in {out}")


if __name__ == "__main__":
    parser = study_options(__doc__, epochs=150, images=200, out="runs/mnist_optimisers")
    parser.add_argument("--latent_dim", type=int, default=20)
    main(parser.parse_args())
