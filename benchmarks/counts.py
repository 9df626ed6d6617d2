"""Held-out log p of cells by their counts, with totals free, integrated or given.

python benchmarks/counts.py smfish.h5ad [--epochs 200] [--rows 906]

An 80/20 split by `RandomState(0).permutation`. Beside the VAEs: independent Poisson and negative
binomial counts, and the latter given the total of each cell.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributions import NegativeBinomial, Poisson

import pyro_vae
from pyro_vae.data.splits import read_rows


def independent(train: Tensor, test: Tensor, given: bool) -> Tensor:
    """log p [N] of independent negative binomial counts, fitted by maximum likelihood."""
    share = train.sum(0) / train.sum()
    raw = torch.zeros(2, train.shape[1], dtype=torch.float64)
    raw[0] = (share if given else train.mean(0)).log()
    raw.requires_grad_()

    def log_prob(x: Tensor) -> Tensor:
        log_mean = raw[0] + (x.sum(1, keepdim=True).log() if given else 0)
        return NegativeBinomial(raw[1].exp(), logits=log_mean - raw[1]).log_prob(x).sum(1)

    optimizer = torch.optim.LBFGS([raw], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -log_prob(train).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_prob(test).detach()


def vae(library: str, train: Tensor, test: Tensor, epochs: int, **options: Any) -> Any:
    torch.manual_seed(0)
    made = pyro_vae.build(
        (train.shape[1],), 10, posterior="FullNormal",
        encoder={"class_path": "MLP", "init_args": {"hidden": [128]}},
        decoder={"class_path": "MLP", "init_args": {"hidden": [128]}},
        likelihood={
            "class_path": "NegativeBinomial", "init_args": {"library": library, **options}
        },
    )  # fmt: skip
    held = len(train) // 10
    pyro_vae.fit(
        made, train[held:], epochs=epochs, batch_size=128, lr=2e-3, patience=20,
        validation=train[:held], progress=False, accelerator="cpu",
    )  # fmt: skip
    return made.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--rows", type=int, default=906)
    options = parser.parse_args()
    rows = read_rows(options.file)
    order = np.random.RandomState(0).permutation(len(rows.x))
    cut = round(0.8 * len(order))
    train, test = (rows.x[index].double() for index in (order[:cut], order[cut:]))
    test = test[: options.rows]
    labels = rows.labels[order[cut:]][: options.rows]
    print("| model | log p of a cell (nats) | | adjusted Rand index | reliable | s |")
    print("|---|---|---|---|---|---|")
    poisson = Poisson(train.mean(0).clamp(min=1e-3)).log_prob(test).sum(1)
    for name, found in (
        ("independent Poisson", poisson),
        ("independent negative binomial", independent(train, test, False)),
        ("independent negative binomial, given the total", independent(train, test, True)),
    ):
        print(f"| {name} | {found.mean():.2f} | +- {found.std() / len(found) ** 0.5:.2f} |")
    for library in ("none", "latent", "observed"):
        start = time.perf_counter()
        made = vae(library, train.float(), test.float(), options.epochs)
        found = pyro_vae.log_evidence(made, test.float())
        codes = made.encode(train.float()).mean.detach().numpy()
        mixture = GaussianMixture(int(labels.max()) + 1, random_state=0, n_init=3).fit(codes)
        held = made.encode(test.float()).mean.detach().numpy()
        index = adjusted_rand_score(labels.numpy(), mixture.predict(held))
        reliable = found.verdict.count("reliable") / len(found)
        monte_carlo, data = found.mean_stderr()
        print(
            f"| VAE, {library!r} total | {found.mean():.2f} +- {monte_carlo:.2f} | +- {data:.2f} "
            f"| {index:.2f} | {reliable:.2f} | {time.perf_counter() - start:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
