"""Held-out log p of cells by their counts, with totals free, integrated or given.

python benchmarks/counts.py smfish.h5ad [--epochs 200] [--rows 906] [--library none] [--scvi]

An 80/20 split by `RandomState(0).permutation`. Beside the VAEs: independent Poisson and negative
binomial counts, and the latter given the total of each cell. With `--scvi`, where scvi-tools is
installed, its model as well, given the total: by its own estimate and by `log_evidence`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.distributions import NegativeBinomial, Poisson

import pyro_vae
from pyro_vae.data.splits import read_rows
from pyro_vae.estimators import annealed_importance_sampling

ANNEALED = 31  # cells of which log p is found by annealing too


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


def vae(library: str, train: Tensor, epochs: int) -> Any:
    torch.manual_seed(0)
    network = {"MLP": {"hidden": [128]}}
    made = pyro_vae.build(
        (train.shape[1],), 10, posterior="FullNormal", encoder=network, decoder=network,
        likelihood={"NegativeBinomial": {"library": library}},
    )  # fmt: skip
    held = len(train) // 10
    pyro_vae.fit(
        made, train[held:], epochs=epochs, batch_size=128, lr=2e-3, patience=20,
        validation=train[:held], progress=False, accelerator="cpu",
    )  # fmt: skip
    return made.eval()


class Scvi(nn.Module):
    """A trained model of scvi-tools as Pyro programs; of negative binomial counts, one batch."""

    def __init__(self, trained: Any) -> None:
        super().__init__()
        self.module, self.latent_dim = trained.module, trained.module.n_latent

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        normal = dist.Normal(torch.zeros(self.latent_dim), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal)
            log_total = x.sum(1, keepdim=True).log().expand(*z.shape[:-1], 1)
            flat, totals = z.reshape(-1, self.latent_dim), log_total.reshape(-1, 1)
            _, _, mean, _ = self.module.decoder("gene", flat, totals, torch.zeros_like(totals))
            log_mean = (mean + 1e-8).log().reshape(*z.shape[:-1], -1)  # which is theirs
            shape = self.module.px_r
            counts = dist.NegativeBinomial(shape.exp(), logits=log_mean - shape)
            pyro.sample("x", counts.to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        q, _ = self.module.z_encoder(x.log1p(), torch.zeros_like(x[:, :1]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(q.loc, q.scale).to_event(1))


def scvi_rows(train: Tensor, test: Tensor) -> tuple[Tensor, Any, Any]:
    """log p of cells by scvi-tools' own estimate; of its decoder by `log_evidence`, and of some
    cells by annealing.
    """
    import anndata
    import scvi

    scvi.settings.seed = 0
    data = anndata.AnnData(train.numpy())
    scvi.model.SCVI.setup_anndata(data)
    trained = scvi.model.SCVI(data, gene_likelihood="nb")  # 10 latents, 128 hidden units
    trained.train(accelerator="cpu", enable_progress_bar=False)  # 400 epochs, as it does unasked
    held = anndata.AnnData(test.numpy())
    own = trained.get_marginal_ll(held, n_mc_samples=1000, return_mean=False)
    program = Scvi(trained).eval()
    annealed = annealed_importance_sampling(program, test[:ANNEALED])
    return torch.as_tensor(own).double(), pyro_vae.log_evidence(program, test), annealed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--rows", type=int, default=906)
    parser.add_argument("--library", nargs="*", default=["none", "latent", "observed"])
    parser.add_argument("--scvi", action="store_true")
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
    for library in options.library:
        start = time.perf_counter()
        made = vae(library, train.float(), options.epochs)
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
    if options.scvi:
        start = time.perf_counter()
        own, found, annealed = scvi_rows(train.float(), test.float())
        monte_carlo, data = found.mean_stderr()
        reliable = found.verdict.count("reliable") / len(found)
        print(f"| scVI's own estimate, given the total | {own.mean():.2f} | +- {data:.2f} |")
        print(
            f"| scVI's decoder, given the total | {found.mean():.2f} +- {monte_carlo:.2f} | "
            f"+- {data:.2f} | | {reliable:.2f} | {time.perf_counter() - start:.0f} |"
        )
        print(
            f"scVI's decoder, {ANNEALED} cells: by annealing {annealed.mean():.2f} +- "
            f"{annealed.mean_stderr()[0]:.2f}, {found.log_prob[:ANNEALED].mean():.2f} above"
        )


if __name__ == "__main__":
    main()
