"""A step of `fit` beside a hand-written PyTorch step, interleaved in one process.

784-500 tanh-20, Bernoulli, one sample, batch 100, fused Adam. Prints milliseconds a step and
their ratio: medians over epochs, which alternate.

    python benchmarks/training_step.py [threads]
"""

from __future__ import annotations

import sys
import time
import warnings
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from pyro_vae import likelihoods, networks, posteriors, priors
from pyro_vae.training import State, fit
from pyro_vae.vae import VAE

ROWS, BATCH, EPOCHS = 6000, 100, 15


class ByHand:
    """The same VAE without any library, and its training."""

    def __init__(self) -> None:
        self.encoder = nn.Sequential(nn.Linear(784, 500), nn.Tanh(), nn.Linear(500, 40))
        self.decoder = nn.Sequential(nn.Linear(20, 500), nn.Tanh(), nn.Linear(500, 784))
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def epoch(self, x: Tensor) -> float:
        began, total = time.perf_counter(), 0.0
        for index in torch.randperm(len(x)).split(BATCH):
            total += self.step(x[index])
        return (time.perf_counter() - began) / (len(x) / BATCH)

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


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((ROWS, 784), 0.2))
    encoder = networks.MLP(784, posteriors.DiagonalNormal.num_params(20))
    posterior = posteriors.DiagonalNormal(encoder, 20)
    likelihood = likelihoods.Bernoulli(networks.MLP(20, (784,)), (784,))
    vae, hand = VAE(priors.StandardNormal(20), likelihood, posterior), ByHand()
    ours: list[float] = []
    theirs: list[float] = []

    def alternate(state: State) -> None:
        ours.append(state.metrics["seconds"] / (ROWS / BATCH))
        theirs.append(hand.epoch(x))

    warnings.simplefilter("ignore", UserWarning)  # random pixels have nothing to encode
    fit(vae, x, epochs=EPOCHS, batch_size=BATCH, progress=False, callbacks=[alternate])
    fitted, by_hand = median(ours[2:]), median(theirs[2:])
    print(f"fit {fitted * 1e3:.2f} ms, by hand {by_hand * 1e3:.2f} ms, {fitted / by_hand:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
