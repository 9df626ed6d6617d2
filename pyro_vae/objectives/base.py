"""What every objective shares: the interface to SVI and to torch's optimisers."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import pyro.infer
import torch
from torch import Tensor, nn

from pyro_vae.densities import Densities, OwnParameters, Program, registered_densities

__all__ = ["Objective"]


class Objective(pyro.infer.ELBO, nn.Module):
    """A number per datum, in nats, to be made large.

    A subclass says in `bound` what is reported and, where the two differ, in `surrogate` what
    is differentiated; both see only `Densities`, so that they work with every model and guide
    whose sites are inside the plate "data". Weights that a schedule moves are buffers. `ELBO`
    is the one to read.

    An objective is the loss of `pyro.infer.SVI`, or gives a torch optimiser its
    `differentiable_loss`; a loss is minus the bound, summed over the batch, times the
    subsampling of the plate "data".

    Args:
        num_particles: Draws of z for each datum, K; the guide runs once for all.
    """

    batch_level = False  # True where the number needs the whole batch

    def __init__(self, num_particles: int = 1) -> None:
        nn.Module.__init__(self)
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1; got {num_particles}")
        pyro.infer.ELBO.__init__(
            self, num_particles=num_particles, max_plate_nesting=1, vectorize_particles=True
        )

    @abstractmethod
    def bound(self, d: Densities) -> Tensor:
        """The reported number for each datum [B], in nats, larger is better."""

    def surrogate(self, d: Densities) -> Tensor:
        """What is differentiated [B]; the bound, unless a subclass says otherwise."""
        return self.bound(d)

    def at(self, step: int) -> None:
        """Sets the weights that move to their values at optimisation step `step`."""

    def reduce(self, d: Densities) -> Tensor:
        """The loss of a batch: minus the bound in value, minus the surrogate in gradient."""
        self._check_scales(d)
        bound, surrogate = self.bound(d), self.surrogate(d)
        return -d.scale * (bound.detach() + surrogate - surrogate.detach()).sum()

    def loss(self, model: Program, guide: Program, x: Tensor, y: Tensor | None = None) -> float:
        """The loss, without gradients."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, x, y).item()

    def differentiable_loss(
        self, model: Program, guide: Program, x: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """The loss as a tensor, for a torch optimiser; Pyro's parameter store is left alone."""
        with OwnParameters():
            return self.reduce(self._densities(model, guide, x, y))

    def loss_and_grads(
        self, model: Program, guide: Program, x: Tensor, y: Tensor | None = None
    ) -> float:
        """The loss, after adding its gradients to the parameters: what SVI calls."""
        loss = self.reduce(self._densities(model, guide, x, y))
        loss.backward()
        return loss.item()

    def _densities(self, model: Program, guide: Program, x: Tensor, y: Tensor | None) -> Densities:
        return registered_densities(model, guide, x, y, num_particles=self.num_particles)

    def _check_scales(self, d: Densities) -> None:
        for name, scale in d.site_scales:
            if isinstance(scale, Tensor) or scale != d.scale:
                raise ValueError(
                    f"site {name!r} is scaled by {scale} inside the program; weights belong to "
                    "the objective: remove the scale and use, for example, ELBO(beta=...)"
                )

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("objectives work from densities(), not from single traces")
