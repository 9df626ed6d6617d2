"""Importance sampling at K = 5000 beside plain torch, interleaved in one run: ratios of time.

python benchmarks/importance.py [--images 20] [--repeats 7]
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vae import VAE, build, importance_sampling

K, CHUNK = 5000, 1000


@torch.no_grad()
def plain_torch(vae: VAE, x: Tensor) -> Tensor:
    """What one writes by hand: per image, chunks of draws, one logsumexp."""
    encoder, decoder = vae.posterior.encoder, vae.likelihood.decoder
    out = []
    for row in x:
        loc, raw = encoder.output(encoder.hidden(row.flatten())).chunk(2)
        scale = 1e-4 + F.softplus(raw)
        weights = []
        for _ in range(K // CHUNK):
            eps = torch.randn(CHUNK, len(loc))
            z = loc + scale * eps
            log_q = (-0.5 * eps**2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
            log_p = (-0.5 * z**2 - 0.5 * math.log(2 * math.pi)).sum(-1)
            logits = decoder.output(decoder.hidden(z))
            pixels = row.flatten().expand(CHUNK, -1)
            log_x = -F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(-1)
            weights.append(log_x + log_p - log_q)
        out.append(torch.cat(weights).logsumexp(0) - math.log(K))
    return torch.stack(out)


def main() -> None:
    """Checks that both give the same numbers, then times them in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    vae = build((1, 28, 28), 20)
    with torch.no_grad():
        vae.likelihood.decoder.output.weight.mul_(0.1)  # steady weights, so that means compare
    x = (torch.rand(arguments.images, 1, 28, 28) > 0.8).float()
    candidates: dict[str, Callable[[], Tensor]] = {
        "plain torch": lambda: plain_torch(vae, x),
        "pyro_vae": lambda: importance_sampling(vae.model, vae.guide, x, num_samples=K).log_prob,
    }
    means = {name: run().mean().item() for name, run in candidates.items()}
    evidence = importance_sampling(vae.model, vae.guide, x, num_samples=K)
    error = 2**0.5 * evidence.mean_stderr()[0]
    assert abs(means["plain torch"] - means["pyro_vae"]) < 5 * error, (means, error)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(arguments.repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["plain torch"])
    print(f"{torch.get_num_threads()} threads, {arguments.images} images, K = {K}")
    for name, times in seconds.items():
        rate = arguments.images * K / statistics.median(times) / 1e6
        ratio = statistics.median(times) / base
        print(f"{name:12} {ratio:.3f} of plain torch, {rate:.3f} M samples x images / s")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
