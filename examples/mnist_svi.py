"""Trains a VAE on binarised MNIST by plain `pyro.infer.SVI`, and estimates its log p(x).

python examples/mnist_svi.py --root data            # downloads MNIST if it is missing
python examples/mnist_svi.py --smoke                # bundled digits, a few seconds
"""

from __future__ import annotations

import argparse

import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO

from pyro_vae import VAE, importance_sampling
from pyro_vae.data import epoch_order, load_data
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.networks import MLP
from pyro_vae.posteriors import DiagonalNormal
from pyro_vae.priors import StandardNormal


def main(arguments: argparse.Namespace) -> float:
    """Trains, prints the bound of each epoch, and returns the mean log p(x) of test data."""
    pyro.set_rng_seed(arguments.seed)
    name = "digits" if arguments.smoke else "MNIST"
    data = load_data(name, root=arguments.root, transform="threshold")
    epochs, rows = (2, 20) if arguments.smoke else (arguments.epochs, 200)

    shape, latent_dim = tuple(data.train.data_shape), arguments.latent_dim
    encoder = MLP(shape, DiagonalNormal.num_params(latent_dim), hidden=(500,))
    decoder = MLP(latent_dim, shape, hidden=(500,))
    vae = VAE(
        prior=StandardNormal(latent_dim),
        likelihood=Bernoulli(decoder, shape),
        posterior=DiagonalNormal(encoder, latent_dim),
    )

    optimizer = pyro.optim.Adam({"lr": 1e-3})
    svi = SVI(vae.model, vae.guide, optimizer, loss=TraceMeanField_ELBO())
    for epoch in range(epochs):
        losses = [
            svi.step(data.train.batch(index)[0])
            for index in epoch_order(len(data.train), arguments.seed, epoch).split(100)
        ]
        print(f"epoch {epoch + 1}: ELBO {-sum(losses) / len(data.train):.2f} nats per image")

    x, _ = data.test.fixed().batch(torch.arange(rows))
    evidence = importance_sampling(vae.model, vae.guide, x, num_samples=1000)
    print(f"test images: {evidence}")
    return evidence.mean()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data", help="folder of MNIST")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--latent_dim", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="bundled digits, two epochs")
    main(parser.parse_args())
