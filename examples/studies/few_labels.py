"""Digits with few labels: the class summed out, with and without a weight on the labels.

python examples/studies/few_labels.py --root data       # MNIST, 100 labels; writes a picture
python examples/studies/few_labels.py --data digits --epochs 60    # minutes
python examples/studies/few_labels.py --smoke           # bundled digits, seconds

One model of p(x, y), whose classifier is its own p(y | x): there is no network for it. Rows are
judged without their labels.

Kingma, Rezende, Mohamed and Welling. Semi-supervised learning with deep generative models. 2014.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae import build, class_probabilities, fit, importance_sampling, plots
from pyro_vae.data import load_data


def few(labels: Tensor, per_class: int) -> Tensor:
    """The labels of the first rows of each class; -1 for all other rows."""
    rank = torch.nn.functional.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
    return torch.where(rank <= per_class, labels, -1)


def main(
    smoke: bool = False,
    data: str = "MNIST",
    root: str = "data",
    rows: int = 10_000,
    per_class: int = 10,
    epochs: int = 20,
    weights: tuple[float, ...] = (0.0, 50.0),
    out: str = "few_labels.png",
) -> float:
    """Trains a model for each weight; returns the accuracy of the last on test data."""
    if smoke:
        warnings.filterwarnings("ignore", message="posterior collapse")  # so few epochs
    limit, name = (200, "digits") if smoke else (rows, data)
    parts = load_data(name, root=root, transform="dynamic", limit=limit)
    test = parts.test.subset(torch.arange(min(1000, len(parts.test)))).fixed()
    x, truth = test.batch(torch.arange(len(test)))[0], test.labels
    wide: Any = {"class_path": "MLP", "init_args": {"hidden": [200], "activation": "softplus"}}
    for weight in weights:
        torch.manual_seed(0)
        vae = build(
            parts.train.data_shape, 20, encoder=wide, decoder=wide, classes=10, label_weight=weight
        )
        train = replace(parts.train, labels=few(parts.train.labels, per_class)).one_hot()
        start = time.perf_counter()
        fit(vae, train, epochs=2 if smoke else epochs, batch_size=100, progress=False)
        seconds = time.perf_counter() - start
        vae.eval()
        share, stderr, _ = class_probabilities(
            vae, x, estimator=importance_sampling, num_samples=5 if smoke else 50
        )
        right = (share.argmax(1) == truth).double()
        log_share = share.gather(1, truth[:, None]).clamp(min=1e-12).log().mean()
        bound = importance_sampling(vae, x, num_samples=5 if smoke else 50)
        print(
            f"label_weight {weight:g}: accuracy {right.mean():.3f} +- "
            f"{right.std() / len(right) ** 0.5:.3f}, log p(y | x) {log_share:.3f}, log p(x) at "
            f"least {bound.mean():.2f} +- {bound.mean_stderr()[1]:.2f}, {seconds:.0f} s",
            flush=True,
        )
    y = torch.arange(10).repeat_interleave(10)
    with torch.no_grad():
        plots.save(plots.images(vae.sample(100, y, mean=True), "ten of each class"), out)
    return right.mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few rows and epochs")
    parser.add_argument("--data", default="MNIST", help="name of a data set with ten classes")
    parser.add_argument("--root", default="data", help="folder of MNIST")
    parser.add_argument("--rows", type=int, default=10_000, help="training rows")
    parser.add_argument("--per_class", type=int, default=10, help="labels of each class")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--weights", type=float, nargs="+", default=(0.0, 50.0))
    parser.add_argument("--out", default="few_labels.png", help="picture to write")
    main(**vars(parser.parse_args()))
