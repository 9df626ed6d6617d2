"""Trains five objectives on drawn sprites and measures how well each disentangles.

python examples/studies/disentangle_sprites.py  # three seeds, about a quarter of an hour
python examples/studies/disentangle_sprites.py --smoke

Errors are standard errors over seeds. Disentanglement is measured on all 3072 images, log p(x)
on 50 test images. The traversals are written to traversals.png.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyro_vae import VAE, build, fit, log_evidence, plots
from pyro_vae.data import Sprites
from pyro_vae.densities import densities
from pyro_vae.metrics import dci, elbo_decomposition, factor_vae_score, mig
from pyro_vae.objectives import ELBO, BetaTC, FactorVAE, HierarchicallyFactorized, Objective

GRID = Sprites(shapes=3, scales=4, orientations=1, xs=16, ys=16, size=32)  # 3072 images
FACTORS, COLUMNS = ("shape", "scale", "x", "y"), [0, 1, 3, 4]
LATENTS = 6
MLP = {"class_path": "MLP", "init_args": {"hidden": [256, 256], "activation": "relu"}}


def objectives() -> dict[str, Objective]:
    """Returns one objective of each kind, by name."""
    return {
        "VAE": ELBO(),
        "beta-VAE (4)": ELBO(beta=4.0),
        "BetaTC (6)": BetaTC(beta=6.0),
        "HF (6, 3)": HierarchicallyFactorized([[0, 1, 2], [3, 4, 5]], beta=6.0, gamma=3.0),
        "FactorVAE (10)": FactorVAE(10.0, width=256, layers=3, adversary_lr=5e-4),
    }


def split() -> tuple[Tensor, Tensor]:
    """Returns the rows of the grid to train on and those to test on."""
    order = torch.randperm(len(GRID), generator=torch.Generator().manual_seed(0))
    return order[300:], order[:300]


def measure(vae: VAE, smoke: bool) -> dict[str, float]:
    """Returns every column of the table for one model."""
    rows = torch.arange(0, len(GRID), 23 if smoke else 1)
    factors = GRID.factors(rows)[:, COLUMNS]
    with torch.no_grad():
        posterior = vae.encode(GRID.draw(rows).float())
    parts = elbo_decomposition(posterior, vae.prior())
    trees, votes = (2, 50) if smoke else (30, 2000)
    x = GRID.draw(split()[1][: 5 if smoke else 50]).float()
    evidence = log_evidence(vae.model, vae.guide, x)
    scores = dci(posterior.mean, factors, FACTORS, num_trees=trees)
    return {
        "MIG": mig(posterior, factors, FACTORS).value,
        "FactorVAE score": factor_vae_score(posterior.mean, factors, num_votes=votes).value,
        "DCI": scores.disentanglement,
        "TC": parts.total_correlation.value,
        "KL": parts.kl.value,
        "log p(x)": evidence.mean(),
    }


def traverse(vae: VAE) -> tuple[Tensor, list[str]]:
    """Moves each of the three latents of largest KL from -2 to 2, and decodes one image."""
    x = GRID.draw(torch.arange(1672, 3000, 13)).float()
    with torch.no_grad():
        posterior, values = vae.encode(x), torch.linspace(-2, 2, 9)
        kl = densities(vae.model, vae.guide, x).kl_by_dimension()["z"].mean(0)
        top = kl.argsort(descending=True)[:3]
        z = posterior.mean[:1].expand(3, len(values), LATENTS).clone()
        z[torch.arange(3), :, top] = values
        return vae.likelihood(z).mean, [f"z{d}, {kl[d]:.1f} nats" for d in top]


def cell(values: Tensor) -> str:
    """Formats the mean over seeds, with its standard error if there are several."""
    mean, count = f"{values.mean():.2f}", len(values)
    return mean if count == 1 else f"{mean} +- {values.std() / count**0.5:.2f}"


def main(smoke: bool = False) -> None:
    """Trains each objective from several seeds, and prints the table."""
    data = GRID.data().subset(split()[0])
    drawn: list[tuple[Tensor, list[str]]] = []
    table = Table("objective", "MIG", "FactorVAE score", "DCI", "TC", "KL", "log p(x)")
    for name in objectives():
        found = []
        for seed in range(1 if smoke else 3):
            torch.manual_seed(seed)
            vae = build((1, 32, 32), LATENTS, encoder=MLP, decoder=MLP)
            options = {"batch_size": 64, "lr": 3e-3, "seed": seed, "progress": False}
            fit(vae, data, objectives()[name], epochs=3 if smoke else 60, **options)
            found.append(list(measure(vae, smoke).values()))
            if seed == 0 and name in ("VAE", "BetaTC (6)"):
                images, names = traverse(vae)
                drawn.append((images, [f"{name}: {row}" for row in names]))
        table.add_row(name, *map(cell, torch.tensor(found).T))
    Console(width=110).print(table)
    images = torch.cat([part for part, _ in drawn])
    names = [name for _, part in drawn for name in part]
    title = "each latent by itself, from -2 to 2"
    plots.save(plots.image_rows(images, names, title, (0, 1)), "traversals.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two epochs of a few images")
    main(parser.parse_args().smoke)
