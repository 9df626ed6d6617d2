"""Learns the classes of digits from few labels, with and without a weight on the labels.

python examples/studies/few_labels.py --root data       # MNIST, 100 labels; writes a picture
python examples/studies/few_labels.py --data digits --epochs 60    # minutes
python examples/studies/few_labels.py --root data --protocol --compile  # Pyro's budget: a GPU
python examples/studies/few_labels.py --smoke           # bundled digits, seconds

The model is p(x, y), with unknown classes summed out, and its classifier is its own p(y | x).
With `--classifier` a network q(y | x) beside it learns the labels, and the model learns from it.
Test rows are judged without labels. `--protocol` takes the budget of Pyro's semi-supervised
example: 784-500-50, 50 epochs of 50,000 images in batches of 200. The best epoch is chosen by
validation, here by the bound of log p(x, y), in the example by accuracy. The example states
accuracies of .9319, .9437, .9487 and .9582 for 100, 600, 1000 and 3000 labels.

Kingma, Rezende, Mohamed and Welling. Semi-supervised learning with deep generative models. 2014.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from printing import show, study_options, with_error
from torch import Tensor

from pyro_vae import VAE, build, class_probabilities, fit, importance_sampling, plots
from pyro_vae.data import Splits, load_data

PROTOCOL = {"rows": 50_000, "hidden": 500, "latent_dim": 50, "batch_size": 200, "epochs": 50}
PROTOCOL |= {"lr": 0.00042, "beta1": 0.95, "images": 10_000, "labels": [100, 600, 1000, 3000]}
SMOKE = {"data": "digits", "rows": 200, "epochs": 2, "draws": 5}


def few(labels: Tensor, number: int) -> Tensor:
    """Keeps `number` labels, those of the first rows of each of ten classes; -1 elsewhere."""
    rank = torch.nn.functional.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
    return torch.where(rank <= number // 10, labels, -1)


def main(options: argparse.Namespace) -> None:
    """Trains and judges a model for each number of labels and weight; prints the table."""
    if options.smoke:
        warnings.filterwarnings("ignore", message="posterior collapse")  # so few epochs
    parts = load_data(options.data, root=options.root, transform="dynamic", limit=options.rows)
    rows = []
    for number in options.labels:
        for weight in options.weights:
            start = time.perf_counter()
            vae = trained(parts, number, weight, options)
            seconds = time.perf_counter() - start
            row = {"labels": number, "label_weight": weight, **judged(vae, parts, options)}
            rows.append(row | {"seconds": round(seconds)})
            print(rows[-1], flush=True)
    show(rows, f"{options.rows} rows, {options.epochs} epochs, nats per row", width=130)
    if options.table:
        with open(options.table, "w") as file:
            json.dump({"options": vars(options), "rows": rows}, file, indent=1)
    y = torch.arange(10).repeat_interleave(10)
    with torch.no_grad():
        drawn = vae.sample(100, y, mean=True)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    plots.save(plots.images(drawn, "ten of each class"), options.out)


def trained(parts: Splits, number: int, weight: float, options: argparse.Namespace) -> VAE:
    """Trains a VAE of ten classes of which `number` labels are known."""
    torch.manual_seed(options.seed)
    init = {"hidden": [options.hidden], "activation": "softplus"}
    wide: Any = {"class_path": "MLP", "init_args": init}
    train = replace(parts.train, labels=few(parts.train.labels, number))
    sizes: Any = parts.train.data_shape, options.latent_dim
    labels: Any = {"label_weight": weight, "classifier": options.classifier}
    vae = build(*sizes, encoder=wide, decoder=wide, classes=10, **labels)
    betas = [options.beta1, 0.999]
    fit(
        vae,
        train.one_hot(),
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        optimizer={"class_path": "Adam", "init_args": {"betas": betas}},
        validation=parts.validation.fixed().one_hot() if options.protocol else None,
        compile=options.compile,
        progress=False,
    )
    return vae.eval()


@torch.no_grad()
def judged(vae: Any, parts: Splits, options: argparse.Namespace) -> dict[str, str]:
    """Returns accuracy, log p(y | x) and log p(x) of test rows, with standard errors."""
    test = parts.test.subset(torch.arange(min(options.images, len(parts.test)))).fixed()
    x, truth = test.batch(torch.arange(len(test)))[0], test.labels
    way: Any = {"estimator": importance_sampling, "num_samples": options.draws}
    share, _, _ = class_probabilities(vae, x, **way)
    right = (share.argmax(1) == truth).double()
    log_share = share.gather(1, truth[:, None])[:, 0].clamp(min=1e-12).log()
    bound = importance_sampling(vae, x, num_samples=options.draws).log_prob
    names = {"accuracy": right, "log p(y | x)": log_share, "log p(x), at least": bound}
    if options.classifier:
        names = {"of q": (vae.classify(x).probs.argmax(1) == truth).double()} | names
    return {name: with_error(values, 3) for name, values in names.items()}


if __name__ == "__main__":
    parser = study_options(__doc__, epochs=20, images=1000, out="few_labels.png")
    parser.add_argument("--protocol", action="store_true", help="the budget of Pyro's example")
    parser.add_argument("--data", default="MNIST", help="name of a data set with ten classes")
    parser.add_argument("--rows", type=int, default=10_000, help="training rows")
    parser.add_argument("--labels", type=int, nargs="+", default=[100], help="how many are known")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 50.0])
    parser.add_argument("--classifier", action="store_true", help="a network q(y | x) too")
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--beta1", type=float, default=0.9, help="of Adam")
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--latent_dim", type=int, default=20)
    parser.add_argument("--draws", type=int, default=50, help="of the encoder, for each class")
    parser.add_argument("--table", help="JSON file for the table")
    given = parser.parse_args()
    parser.set_defaults(**(PROTOCOL if given.protocol else SMOKE if given.smoke else {}))
    main(parser.parse_args())
