"""Time of an HMC step of annealed importance sampling beside a hand-written torch loop.

python benchmarks/annealed.py [--images 10] [--repeats 5]

The same model (784-500 tanh-20, Bernoulli), images, chains, temperatures and leapfrog steps, in
turn in one process; both count every chain's step, those of the pass that sets step sizes too.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vae import VAE, annealed_importance_sampling, build

CHAINS, PILOTS, TEMPERATURES, LEAPFROG = 64, 16, 20, 3


def by_hand(vae: VAE, x: Tensor, chains: int) -> Tensor:
    """AIS from the encoder, with one step size for all: what one writes for this model alone."""
    encoder, decoder = vae.posterior.encoder, vae.likelihood.decoder
    flat = x.flatten(1)
    with torch.no_grad():
        loc, raw = encoder.output(encoder.hidden(flat)).chunk(2, -1)
        scale = 1e-4 + F.softplus(raw)

    def densities(z: Tensor) -> tuple[Tensor, Tensor]:
        logits = decoder.output(decoder.hidden(z))
        pixels = flat.expand(len(z), -1, -1)
        log_x = -F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(-1)
        log_q = (-0.5 * ((z - loc) / scale) ** 2 - scale.log()).sum(-1)
        return log_x - 0.5 * (z**2).sum(-1), log_q

    def path(z: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        z = z.detach().requires_grad_()
        log_p, log_q = densities(z)
        mixed = beta * log_p + (1 - beta) * log_q
        (slope,) = torch.autograd.grad(mixed.sum(), z)
        return mixed.detach(), slope, (log_p - log_q).detach()

    z = loc + scale * torch.randn(chains, *loc.shape)
    weights, step = torch.zeros(chains, len(x)), 0.3
    betas = torch.linspace(0, 1, TEMPERATURES + 1).tolist()
    difference = path(z, 0.0)[2]
    for previous, beta in zip(betas, betas[1:]):
        weights = weights + (beta - previous) * difference
        start, slope, difference = path(z, beta)
        momentum = torch.randn_like(z)
        energy, position = start - 0.5 * (momentum**2).sum(-1), z
        for _ in range(LEAPFROG):
            momentum = momentum + 0.5 * step * scale * slope
            position = position + step * scale * momentum
            value, slope, moved = path(position, beta)
            momentum = momentum + 0.5 * step * scale * slope
        accept = torch.rand_like(value).log() < value - 0.5 * (momentum**2).sum(-1) - energy
        z = torch.where(accept.unsqueeze(-1), position, z)
        difference = torch.where(accept, moved, difference)
    return weights.logsumexp(0)


def main() -> None:
    """Times both in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    vae = build((1, 28, 28), 20).eval()
    x = (torch.rand(arguments.images, 1, 28, 28) > 0.8).float()
    candidates = {
        "by hand": lambda: by_hand(vae, x, CHAINS + PILOTS),
        "pyro_vae": lambda: annealed_importance_sampling(
            vae.model,
            vae.guide,
            x,
            start="guide",
            num_chains=CHAINS,
            num_temperatures=TEMPERATURES,
            num_leapfrog=LEAPFROG,
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(arguments.repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    steps = arguments.images * (CHAINS + PILOTS) * TEMPERATURES
    base = statistics.median(seconds["by hand"])
    for name, times in seconds.items():
        middle = statistics.median(times)
        each = middle / steps * 1e6
        print(f"{name:9} {each:.1f} us for a chain's HMC step, {middle / base:.3f} of by hand")


if __name__ == "__main__":
    main()
