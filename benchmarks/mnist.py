"""784-500-20 on threshold-binarised MNIST beside published bounds; its log p(x) with its error.

python benchmarks/mnist.py --root data [--epochs 50] [--latent_dim 20] [--run runs/mnist-bound]

Published (50,000 / 10,000 images, batch 250, Adam, one draw): -92.15 at epoch 10, -84.71 at
epoch 50, -82.92 at epoch 150. Ours is Adam with a cosine schedule, trained on the first 50,000
images of MNIST's training part and validated on the last 10,000.
"""

from __future__ import annotations

import argparse

import torch

from pyro_vae import build, fit, importance_sampling
from pyro_vae.data import Data, Threshold
from pyro_vae.data.readers import read_named

PUBLISHED = {1: -113.18, 10: -92.15, 50: -84.71, 100: -83.63, 150: -82.92}


def split(root: str) -> tuple[Data, Data, Data]:
    """The first 50,000, the next 10,000, and the test images, thresholded."""
    parts = read_named("MNIST", root).values()
    train, test = (part.with_transform(Threshold(127.5, 255)) for part in parts)
    return train.subset(torch.arange(50_000)), train.subset(torch.arange(50_000, 60_000)), test


def main() -> None:
    """Trains and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--latent_dim", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--images", type=int, default=1000, help="test images for log p(x)")
    parser.add_argument("--run")
    arguments = parser.parse_args()
    train, validation, test = split(arguments.root)
    torch.manual_seed(0)
    vae = build((1, 28, 28), arguments.latent_dim)
    history = fit(
        vae,
        train,
        epochs=arguments.epochs,
        batch_size=250,
        lr=arguments.lr,
        schedule={"CosineAnnealingLR": {"T_max": arguments.epochs}},
        validation=validation,
        run=arguments.run,
    )
    print("epoch  ours (training, validation)  published (validation)")
    for row in history.rows:
        if (epoch := row["epoch"]) in PUBLISHED:
            ours = f"{row['elbo']:9.2f} {row['validation_elbo']:9.2f}"
            print(f"{epoch:5d} {ours} {PUBLISHED[epoch]:22.2f}")
    x, _ = test.fixed().batch(torch.arange(arguments.images))
    evidence = importance_sampling(vae.model, vae.guide, x, num_samples=5000)
    print(f"test, encoder as proposal, K = 5000: {evidence}")


if __name__ == "__main__":
    main()
