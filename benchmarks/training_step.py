"""A step of `fit` beside a hand-written PyTorch step, alternating in one process.

784-500 tanh-20, Bernoulli, one sample, batch 100, fused Adam. Prints milliseconds a step of
processor time (wall time for several threads) and their ratio: medians over steps.

    python benchmarks/training_step.py [threads]
"""

from __future__ import annotations

import sys
import time
import warnings
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from pyro_vae import likelihoods, networks, posteriors, priors
from pyro_vae.training import fit
from pyro_vae.training.rows import TensorRows
from pyro_vae.vae import VAE

ROWS, BATCH, EPOCHS = 30_000, 100, 3


class ByHand:
    """The same VAE without any library, and its training."""

    def __init__(self) -> None:
        self.encoder = nn.Sequential(nn.Linear(784, 500), nn.Tanh(), nn.Linear(500, 40))
        self.decoder = nn.Sequential(nn.Linear(20, 500), nn.Tanh(), nn.Linear(500, 784))
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def step(self, x: Tensor) -> float:
        loc, raw = self.encoder(x).chunk(2, -1)
        scale = softplus(raw)
        z = loc + scale * torch.randn_like(scale)
        kl = 0.5 * (loc**2 + scale**2 - 1) - scale.log()
        reconstruction = binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        loss = (reconstruction + kl.sum()) / len(x)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class Alternating(TensorRows):
    """Rows that make a hand-written step whenever `fit` asks for a batch."""

    def attach(self, threads: int) -> None:
        vars(self).update(hand=ByHand(), marks=[])
        vars(self)["clock"] = time.process_time if threads == 1 else time.perf_counter

    def to(self, device: torch.device) -> Alternating:
        return self

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        if len(index) == BATCH:
            began = self.clock()
            self.hand.step(self.x[index])
            self.marks.append((began, self.clock()))
        return super().batch(index)


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", UserWarning)  # random pixels have nothing to encode
    data = Alternating(torch.bernoulli(torch.full((ROWS, 784), 0.2)))
    data.attach(threads)
    encoder = networks.MLP(784, posteriors.DiagonalNormal.num_params(20))
    posterior = posteriors.DiagonalNormal(encoder, 20)
    likelihood = likelihoods.Bernoulli(networks.MLP(20, (784,)), (784,))
    vae = VAE(priors.StandardNormal(20), likelihood, posterior)
    fit(vae, data, epochs=EPOCHS, batch_size=BATCH, progress=False)
    by_hand = median(end - began for began, end in data.marks)
    fitted = median(b[0] - a[1] for a, b in pairwise(data.marks))
    print(f"fit {fitted * 1e3:.2f} ms, by hand {by_hand * 1e3:.2f} ms, {fitted / by_hand:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
