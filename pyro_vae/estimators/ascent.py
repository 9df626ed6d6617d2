"""Gradient ascent of many small problems at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["ascend"]

DECAYS = (0.9, 0.999)


def ascend(
    parameters: Sequence[Tensor],
    slopes: Callable[[], Sequence[Tensor]],
    *,
    num_steps: int,
    lr: float,
    eps: float,
) -> None:
    """Moves `parameters` in place by Adam, its step falling to zero as a half cosine.

    Adam works element by element, so that each datum goes its own way. A slope that is not a
    number stands for none. Written out because `torch.optim` takes seconds to import.

    Args:
        parameters: What is moved; no gradient is recorded.
        slopes: The gradients there, called once a step.
        num_steps: Steps.
        lr: The first step's size.
        eps: Slopes below it are followed in proportion, those above it by their sign alone.

    References:
        Kingma and Ba. Adam: a method for stochastic optimization. 2015.
    """
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in range(num_steps):
        rate = lr * (1 + math.cos(math.pi * step / num_steps)) / 2
        unbias = [1 / (1 - decay ** (step + 1)) for decay in DECAYS]
        for i, slope in enumerate(slopes()):
            slope = slope.nan_to_num(0.0, 0.0, 0.0)
            first[i].lerp_(slope, 1 - DECAYS[0])
            second[i].lerp_(slope.square(), 1 - DECAYS[1])
            scale = (second[i] * unbias[1]).sqrt() + eps
            parameters[i].add_(first[i] * unbias[0] / scale, alpha=rate)
