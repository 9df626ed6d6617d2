"""Shows that latents of counts learn the totals of the rows unless a site of its own does.

python examples/studies/library_size.py              # a minute on one core
python examples/studies/library_size.py --smoke      # seconds

Simulated cells of three kinds differ in a few of fifty genes. The log of their totals has a
standard deviation of 1. With `library="none"` the latents learn the totals. With
`library="latent"` a site of its own explains the totals, and the latents tell the kinds apart.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from torch import Tensor

import pyro_vae

KINDS, GENES = 3, 50


def cells(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws counts [N, G], kinds [N] and log totals [N]."""
    torch.manual_seed(0)
    kind = torch.randint(KINDS, (number,))
    profile = torch.rand(GENES).repeat(KINDS, 1) + 0.2
    for k in range(KINDS):
        profile[k, 5 * k : 5 * k + 5] *= 3
    share = profile / profile.sum(1, keepdim=True)
    log_total = 4.5 + torch.randn(number)
    return torch.poisson(share[kind] * log_total.exp().unsqueeze(1)), kind, log_total


def study(library: str, x: Tensor, kind: Tensor, log_total: Tensor, epochs: int) -> None:
    """Trains a VAE; prints how well its latents predict totals and kinds."""
    torch.manual_seed(1)
    options = {"class_path": "NegativeBinomial", "init_args": {"library": library}}
    vae = pyro_vae.build((GENES,), 2, likelihood=options, posterior="FullNormal")
    pyro_vae.fit(vae, x, epochs=epochs, lr=2e-3, progress=False)
    codes = vae.eval().encode(x).mean.detach()
    design = torch.cat([codes, torch.ones(len(codes), 1)], 1)
    fitted = design @ torch.linalg.lstsq(design, log_total.unsqueeze(1)).solution
    correlation = torch.corrcoef(torch.stack([fitted.squeeze(1), log_total]))[0, 1]
    guess = GaussianMixture(KINDS, random_state=0, n_init=5).fit_predict(codes.double().numpy())
    index = adjusted_rand_score(kind.numpy(), guess)
    evidence = pyro_vae.log_evidence(vae, x[:50])
    print(
        f'library="{library}": correlation with log total {correlation:.2f}, adjusted Rand index '
        f"{index:.2f}, {evidence}"
    )


def main() -> None:
    """Runs the study without and with a latent total."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--epochs", type=int, default=100)
    arguments = parser.parse_args()
    x, kind, log_total = cells(200 if arguments.smoke else 1000)
    for library in ("none", "latent"):
        study(library, x, kind, log_total, 2 if arguments.smoke else arguments.epochs)


if __name__ == "__main__":
    main()
