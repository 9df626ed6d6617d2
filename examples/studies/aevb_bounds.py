"""Reproduces figures of "Auto-encoding variational Bayes" in fewer training samples.

python examples/studies/aevb_bounds.py --root data  # about 20 minutes on one core
python examples/studies/aevb_bounds.py --root data --epochs 2000  # the published number of samples
python examples/studies/aevb_bounds.py --root data --frey FREY.npz  # uint8 images x [1965, 28, 20]
python examples/studies/aevb_bounds.py --smoke  # bundled digits, seconds

1. The lower bound on MNIST for 3 to 200 latents and 500 hidden units (figure 2 of the paper),
   beside the published bounds after 1e7 and 1e8 training samples.
2. log p(x) for 3 latents and 100 hidden units, learned from 1000 and from 50,000 images (figure
   3). It is estimated by `log_evidence`, in the paper with Hamiltonian Monte Carlo.
3. The bound of a Gaussian decoder with 200 hidden units, a mean in (0, 1) and a predicted
   standard deviation. The paper's Frey Face comes with no library. Without --frey the images are
   scikit-learn's 8 x 8 digits, for which no value is published.

The networks, batches of 100 and one draw of z are as in the paper. The paper trains with Adagrad
and weight decay. Here it is Adam with a learning rate that falls to zero by a cosine, and the
best epoch by validation images is kept. The paper does not say whether MNIST was binarised. Here
it is, dynamically: a pixel is a fresh Bernoulli draw at each visit, which in expectation is the
cross-entropy of grey pixels.

Kingma and Welling. Auto-encoding variational Bayes. 2013. Its values were read off figures 2, 3.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from printing import show, study_options, with_error, with_errors

from pyro_vae import VAE, build, fit, log_evidence, plots
from pyro_vae.data import Data, Splits, load_data
from pyro_vae.estimators import evidence_lower_bound
from pyro_vae.training import History

# latents: bound of test images after 1e7 and 1e8 training samples, of training images after 1e8
MNIST = {
    3: (-138.0, -133.4, -130.3),
    5: (-124.1, -119.2, -116.5),
    10: (-108.5, -103.7, -100.6),
    20: (-104.7, -100.2, -98.2),
    200: (-103.9, -100.3, -98.4),
}
FREY = {
    2: (819.0, 872.0, 934.0),
    5: (1041.0, 1116.0, 1232.0),
    10: (1174.0, 1310.0, 1465.0),
    20: (1200.0, 1314.0, 1487.0),
}
# training images: log p(x) after 1e7 and 6e7 training samples
MARGINAL = {
    1000: {"training": (-114.5, -109.1), "test": (-142.9, -143.2)},
    50_000: {"training": (-135.5, -131.0), "test": (-142.3, -138.1)},
}
GAUSSIAN = {"class_path": "Normal", "init_args": {"scale": "predicted", "mean": "sigmoid"}}
SHOWN = {
    "test bound": ("here, 1e6 samples seen", "o", 7),
    "published test, 1e8": ("published, 1e8", "s", 4),
    "published test, 1e7": ("published, 1e7", "D", 4),
}
Row = dict[str, str]


def train(
    name: str, data: Data, held: Data, sizes: tuple[int, int], epochs: int, options: dict[str, Any]
) -> tuple[VAE, History]:
    """Trains a VAE of these latents and hidden units; returns it and its history."""
    torch.manual_seed(options["seed"])
    network = {"class_path": "MLP", "init_args": {"hidden": [sizes[1]]}}
    likelihood = "Bernoulli" if data.transform.binary else GAUSSIAN
    parts: dict[str, Any] = {"likelihood": likelihood, "encoder": network, "decoder": network}
    vae = build(data.data_shape, sizes[0], **parts)
    options = {**options, "run": Path(options["run"]) / name}
    schedule = {"class_path": "CosineAnnealingLR", "init_args": {"T_max": epochs}}
    return vae, fit(vae, data, epochs=epochs, schedule=schedule, validation=held, **options)


def bounds(
    data: Splits, known: dict[int, Any], hidden: int, epochs: int, options: dict[str, Any]
) -> list[Row]:
    """Trains a VAE for each number of latents; returns the rows of the table."""
    x, _ = data.test.fixed().batch(torch.arange(len(data.test)))
    rows = []
    for latents, published in known.items():
        name, sizes = f"{data.transform}-{latents}", (latents, hidden)
        vae, history = train(name, data.train, data.validation, sizes, epochs, options)
        best = max(history.rows, key=lambda row: row["validation_elbo"])
        elbo = evidence_lower_bound(vae.model, vae.guide, x).elbo
        rows.append(
            {
                "latents": str(latents),
                "samples": f"{len(history) * len(data.train):.1e}",
                "training bound": f"{best['elbo']:.1f}",
                "test bound": with_error(elbo, 1),
                "published test, 1e7": str(published[0]) if published else "-",
                "published test, 1e8": str(published[1]) if published else "-",
            }
        )
    return rows


def marginal(data: Splits, epochs: int, images: int, options: dict[str, Any]) -> list[Row]:
    """Estimates log p(x) of training and test images for each number of training images."""
    rows = []
    held = data.validation.subset(torch.arange(min(1000, len(data.validation))))
    for size, known in MARGINAL.items():
        part = data.train.subset(torch.arange(min(size, len(data.train))))
        passes = epochs * (25 if size == 1000 else 1)
        vae, history = train(f"marginal-{size}", part, held, (3, 100), passes, options)
        for name, chosen in {"training": part, "test": data.test}.items():
            x, _ = chosen.fixed().batch(torch.arange(images))
            evidence = log_evidence(vae.model, vae.guide, x)
            rows.append(
                {
                    "training images": str(len(part)),
                    "samples": f"{len(history) * len(part):.1e}",
                    "of": f"{images} {name} images",
                    "log p(x)": with_errors(evidence),
                    "reliable": str(evidence.verdict.count("reliable")),
                    "published, 1e7": str(known[name][0]) if part.name == "MNIST" else "-",
                    "published, 6e7": str(known[name][1]) if part.name == "MNIST" else "-",
                }
            )
    return rows


@plots.style()
def draw(rows: list[Row]) -> Figure:
    """Draws the bound for each number of latents, beside the published bounds if any."""
    figure = Figure(figsize=(6.5, 2.4), layout="constrained")
    ax = figure.subplots()
    for column, (name, marker, size) in SHOWN.items():
        known = [
            (float(row[column].split()[0]), i) for i, row in enumerate(rows) if row[column] != "-"
        ]
        if known:
            ax.plot(*zip(*known), marker, ms=size, label=name)
    ax.set_yticks(range(len(rows)), [f"{row['latents']} latents" for row in rows])
    ax.set(
        xlabel="ELBO of test images, nats, further right is better", ylim=(len(rows) - 0.5, -0.5)
    )
    ax.grid(axis="y", lw=0.4)
    figure.legend(loc="outside upper center", ncols=len(SHOWN))
    return figure


def main(arguments: argparse.Namespace) -> None:
    """Trains all models; prints and writes the tables, and draws the first one."""
    smoke, out, epochs = arguments.smoke, Path(arguments.out), arguments.epochs
    if smoke:
        epochs, arguments.images = 4, 7
    options = {
        "run": out,
        "batch_size": 100,
        "lr": arguments.lr,
        "seed": arguments.seed,
        "compile": arguments.compile,
        "resume": True,
        "progress": not smoke,
    }
    mnist = load_data("digits" if smoke else "MNIST", root=arguments.root, transform="dynamic")
    faces = load_data(arguments.frey or "digits", transform="dequantise")
    known: dict[int, Any] = {3: (), 5: ()} if smoke else MNIST
    gaussian: dict[int, Any] = (
        FREY if arguments.frey else dict.fromkeys((2, 5) if smoke else FREY, ())
    )
    tables: dict[str, list[Row]] = {}
    tables["bound; +- over images"] = bounds(mnist, known, 500, epochs, options)
    plots.save(draw(tables["bound; +- over images"]), str(out / "bound.svg"))
    title = "log p(x); +- Monte Carlo +- over images"
    tables[title] = marginal(mnist, epochs, arguments.images, options)
    title = "bound of a Gaussian decoder; +- over images"
    tables[title] = bounds(faces, gaussian, 200, 10 * epochs, options)
    (out / "table.json").write_text(json.dumps(tables, indent=1))
    for title, rows in tables.items():
        show(rows, f"nats per image: {title}", width=130)
    print(f"tables and figure in {out}")


if __name__ == "__main__":
    parser = study_options(__doc__, epochs=30, images=1000, out="runs/aevb_bounds")
    parser.add_argument("--frey", help="images for the Gaussian decoder, .npz or a folder")
    parser.add_argument("--lr", type=float, default=3e-3)
    main(parser.parse_args())
