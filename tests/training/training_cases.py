"""Small VAEs and data for the tests of training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from pyro_vae import likelihoods, networks, posteriors, priors
from pyro_vae.vae import VAE

QUIET = {"progress": False, "accelerator": "cpu"}


def make_vae(seed: int = 0) -> VAE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = networks.MLP(7, posteriors.DiagonalNormal.num_params(3), (11,))
        decoder = networks.MLP(3, (7,), (11,))
    return VAE(
        priors.StandardNormal(3),
        likelihoods.Bernoulli(decoder, (7,)),
        posteriors.DiagonalNormal(encoder, 3),
    )


def make_data(num_rows: int = 53, seed: int = 1) -> Tensor:
    """Rows of two kinds, so that there is something to encode."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.rand(num_rows, 1, generator=generator) < 0.5
    rate = torch.where(kind, torch.linspace(0.05, 0.95, 7), torch.linspace(0.95, 0.05, 7))
    return torch.bernoulli(rate, generator=generator)


def weights(vae: torch.nn.Module) -> dict[str, Any]:
    return copy.deepcopy(vae.state_dict())


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second


class Noisy:
    """Grey values that are binarised anew at each visit."""

    def __init__(self, probabilities: Tensor) -> None:
        self.probabilities = probabilities

    def __len__(self) -> int:
        return len(self.probabilities)

    def batch(self, index: Tensor) -> tuple[Tensor, None]:
        p = self.probabilities[index]
        return (torch.rand(p.shape) < p).to(p.dtype), None

    def fixed(self, seed: int) -> Noisy:
        torch.manual_seed(seed)
        return Noisy((torch.rand(self.probabilities.shape) < self.probabilities).float())

    def to(self, device: torch.device) -> Noisy:
        return Noisy(self.probabilities.to(device))

    def digest(self) -> str:
        return str(self.probabilities.double().sum().item())


class Stop(Exception):
    """Raised to break a training off."""


def noisy_data(num_rows: int = 53) -> Noisy:
    return Noisy(0.1 + 0.8 * make_data(num_rows))
