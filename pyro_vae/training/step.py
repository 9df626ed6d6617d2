"""One step: its loss and gradient, eager or compiled, and the watch over what is not finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyro_vae.compiling import CannotCompile, compiled
from pyro_vae.densities import densities, folds
from pyro_vae.objectives import Objective
from pyro_vae.training.evaluation import cast, first_weight, programs
from pyro_vae.training.rows import Rows

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["CompiledStep", "EagerStep", "StepLoss", "Watch"]

Outcome = tuple[Tensor, Tensor, Tensor | None]  # loss, terms, loss of a second player


class StepLoss(nn.Module):
    """From a batch of rows to its loss."""

    def __init__(self, vae: nn.Module, objective: Objective, rows: Rows) -> None:
        super().__init__()
        self.vae, self.objective, self.rows = vae, objective, rows
        self.weight = (first_weight(vae),)  # in a tuple, for it is registered already
        self.observed: list[str] = []
        self.latent: list[str] = []

    def batch(self, index: Tensor) -> tuple[Tensor, ...]:
        """x, and y if there is one, of the rows at `index` [B]."""
        x, y = cast(self.rows.batch(index), self.weight[0])
        return (x,) if y is None else (x, y)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Outcome:
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

    def __call__(self, *batch: Tensor) -> Outcome:
        """Loss and terms of a batch x [B, *E], and y [B, C] if there is one."""
        with self.fabric.autocast():
            loss, terms, second = self.loss(*batch)
        self.fabric.backward(loss)
        return loss.detach(), terms, second


class CompiledStep:
    """The same from one compiled function, for batches of one size.

    Args:
        fabric: For its precision.
        loss: The module that is compiled, with its gradient.
        batch: x [B, *E], and y [B, C] if there is one, of the sizes of all later ones.

    Raises:
        CannotCompile: If the vae, the objective or this machine does not allow it.
    """

    def __init__(self, fabric: Fabric, loss: StepLoss, *batch: Tensor) -> None:
        if loss.objective.has_adversary:
            name = type(loss.objective).__name__
            raise CannotCompile(f"{name} trains a second player beside the model")
        if getattr(fabric.strategy.precision, "scaler", None) is not None:
            raise CannotCompile("precision 16-mixed scales its gradients")
        for program in programs(loss.vae):
            folds(program, batch[0], batch[1] if len(batch) > 1 else None)  # while it can be tried
        self.parameters = [p for p in loss.vae.parameters() if p.requires_grad]
        with fabric.autocast():
            self.step = compiled(LossAndGradient(loss), *batch)

    def __call__(self, *batch: Tensor) -> Outcome:
        """Loss and terms of a batch of these sizes."""
        loss, terms, gradient = self.step(*batch)
        for parameter, slope in zip(self.parameters, gradient):
            parameter.grad = slope
        return loss, terms, None


class LossAndGradient(nn.Module):
    def __init__(self, loss: StepLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *batch: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        loss, terms, _ = self.loss(*batch)
        parameters = [p for p in self.loss.vae.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach(), terms, list(gradient)


class Watch:
    """Adds up the terms of an epoch's steps, and finds the first whose loss is not finite.

    On the CPU each step is checked before its update. Elsewhere that would make every step
    wait: the first bad one is kept on the device, until `check` looks. All tensors stay where
    they are, so that a CUDA graph may hold `see`.

    Attributes:
        sums: Of the terms since they were last set to zero, float64; None before the first step.
    """

    def __init__(self, module: StepLoss, device: torch.device) -> None:
        self.module = module
        self.at_once = device.type == "cpu"
        self.step = torch.zeros((), dtype=torch.int64, device=device)  # that comes next
        self.bad = torch.full_like(self.step, -1)
        self.sums: Tensor | None = None
        self.terms: Tensor | None = None  # of the bad step

    def see(self, loss: Tensor, terms: Tensor) -> None:
        """Looks at the loss and terms of the next step."""
        if self.at_once:
            if not math.isfinite(loss.item()):
                raise self._error(int(self.step), terms)
        else:
            if self.terms is None:
                self.terms = terms.clone()
            bad = ~loss.detach().isfinite() & (self.bad < 0)
            self.bad.copy_(torch.where(bad, self.step, self.bad))
            self.terms.copy_(torch.where(bad, terms, self.terms))
        self.step += 1
        if self.sums is None:
            self.sums = torch.zeros_like(terms, dtype=torch.float64)
        self.sums += terms

    def begin(self, step: int | None = None, sums: Tensor | None = None) -> None:
        """Begins an epoch, or goes on at a step of one, with the sums so far."""
        if step is not None:
            self.step.fill_(step)
        if sums is not None:
            self.sums = sums.to(self.step.device)
        elif self.sums is not None:
            self.sums.zero_()

    def check(self) -> None:
        """Raises a FloatingPointError if there has been a bad step; waits for the device."""
        if self.terms is not None and int(self.bad) >= 0:
            raise self._error(int(self.bad), self.terms)

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
