"""One step: its loss and gradient, eager or compiled, and the watch over what is not finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyro_vae.compiling import CannotCompile, compiled
from pyro_vae.densities import densities
from pyro_vae.objectives import Objective
from pyro_vae.training.evaluation import cast, first_weight, forked, programs
from pyro_vae.training.rows import Rows

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["CompiledStep", "EagerStep", "StepLoss", "Watch"]

Outcome = tuple[Tensor, Tensor, Tensor | None]  # loss, terms, loss of a second player


class StepLoss(nn.Module):
    """From the indices of a batch to its loss: what Fabric wraps.

    Indices go in, not the rows, so that mixed precision does not round the data.
    """

    def __init__(self, vae: nn.Module, objective: Objective, rows: Rows) -> None:
        super().__init__()
        self.vae, self.objective, self.rows = vae, objective, rows
        self.weight = (first_weight(vae),)  # in a tuple, for it is registered already
        self.observed: list[str] = []
        self.latent: list[str] = []

    def forward(self, index: Tensor) -> Outcome:
        """Loss and terms of the rows at `index` [B]."""
        return self.of(*self.batch(index))

    def batch(self, index: Tensor) -> tuple[Tensor, ...]:
        """x, and y if there is one, of the rows at `index` [B]."""
        x, y = cast(self.rows.batch(index), self.weight[0])
        return (x,) if y is None else (x, y)

    def of(self, x: Tensor, y: Tensor | None = None) -> Outcome:
        """Loss and terms of a batch.

        Args:
            x: Data [B, *E].
            y: What is conditioned on [B, C], or None.

        Returns:
            The loss per datum in nats, to be differentiated; without gradients, sums over the
            batch of the objective, the reconstruction and each latent site's KL; and the loss
            of the objective's second player, or None.
        """
        K = self.objective.num_particles
        d = densities(*programs(self.vae), x, y, num_particles=K)
        loss = self.objective.reduce(d) / (d.scale * len(x))
        with torch.no_grad():
            sums = [-loss * len(x), d.log_likelihood.mean(0).sum()]
            terms = torch.stack(sums + [kl.sum() for kl in d.kl().values()])
        self.observed, self.latent = list(d.observed), list(d.sites)
        second = self.objective.adversary_loss(d) if self.objective.has_adversary else None
        return loss, terms, second


class EagerStep:
    """Leaves the gradient of a batch's loss in the parameters, by running the programs."""

    def __init__(self, fabric: Fabric, loss: StepLoss) -> None:
        self.fabric, self.loss = fabric, loss

    def __call__(self, index: Tensor) -> Outcome:
        """Loss and terms of the rows at `index` [B]."""
        with self.fabric.autocast():
            loss, terms, second = self.loss(index)
        self.fabric.backward(loss)
        return loss.detach(), terms, second


class CompiledStep:
    """The same from one compiled function, for batches of one size.

    Args:
        fabric: For its precision.
        loss: The module that is compiled, with its gradient.
        index: Of the rows of a batch [B], the size of all later ones.

    Raises:
        CannotCompile: If the vae, the objective or this machine does not allow it.
    """

    def __init__(self, fabric: Fabric, loss: StepLoss, index: Tensor) -> None:
        if loss.objective.has_adversary:
            name = type(loss.objective).__name__
            raise CannotCompile(f"{name} trains a second player beside the model")
        if getattr(fabric.strategy.precision, "scaler", None) is not None:
            raise CannotCompile("precision 16-mixed scales its gradients")
        self.loss = loss
        self.parameters = [p for p in loss.vae.parameters() if p.requires_grad]
        with forked(index.device):  # looking at a batch may draw its noise
            example = loss.batch(index)
        with fabric.autocast():
            self.step = compiled(LossAndGradient(loss), *example)

    def __call__(self, index: Tensor) -> Outcome:
        """Loss and terms of the rows at `index` [B]."""
        loss, terms, gradient = self.step(*self.loss.batch(index))
        for parameter, slope in zip(self.parameters, gradient):
            parameter.grad = slope
        return loss, terms, None


class LossAndGradient(nn.Module):
    def __init__(self, loss: StepLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *batch: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        loss, terms, _ = self.loss.of(*batch)
        parameters = [p for p in self.loss.vae.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach(), terms, list(gradient)


class Watch:
    """Finds the first step whose loss is not finite.

    On the CPU each step is checked before its update. Elsewhere that would make every step
    wait: the first bad one is kept on the device, until `check` looks.
    """

    def __init__(self, module: StepLoss, device: torch.device) -> None:
        self.module = module
        self.at_once = device.type == "cpu"
        self.step = torch.tensor(-1, device=device)
        self.terms: Tensor | None = None

    def see(self, step: int, loss: Tensor, terms: Tensor) -> None:
        """Looks at a step's loss and terms."""
        if self.at_once:
            if not math.isfinite(loss.item()):
                raise self._error(step, terms)
            return
        bad = ~loss.detach().isfinite() & (self.step < 0)
        self.step = torch.where(bad, step, self.step)
        self.terms = torch.where(bad, terms, terms if self.terms is None else self.terms)

    def check(self) -> None:
        """Raises a FloatingPointError if there has been a bad step; waits for the device."""
        if self.terms is not None and int(self.step) >= 0:
            raise self._error(int(self.step), self.terms)

    def gradient_error(self, step: int) -> FloatingPointError:
        """What to raise where a finite loss has a gradient that is not."""
        parameters = self.module.vae.named_parameters()
        bad = [n for n, p in parameters if p.grad is not None and not p.grad.isfinite().all()]
        names = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        return FloatingPointError(
            f"step {step}: the gradient of {names} is not finite, though the loss is; lower lr, "
            "or look for a function whose derivative is infinite"
        )

    def _error(self, step: int, terms: Tensor) -> FloatingPointError:
        _, reconstruction, *kls = terms.isfinite().tolist()
        sites = [site for site, finite in zip(self.module.latent, kls) if not finite]
        sites = sites if reconstruction else [*self.module.observed, *sites]
        what = f"log density of site {', '.join(map(repr, sites))}" if sites else "objective"
        return FloatingPointError(
            f"step {step}: the {what} is not finite; lower lr, set clip_norm, or look for "
            "extreme data"
        )
