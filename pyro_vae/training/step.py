"""A training step: its loss and gradient, eager or traced, and a check that both are finite."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from itertools import zip_longest
from shutil import which
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_vae.compiling import CannotCompile, Traced, numbers_kept, one_line_errors
from pyro_vae.densities import Densities, OwnParameters, folds, registered_densities, summed_values
from pyro_vae.objectives import Objective
from pyro_vae.runtime import forked

PRECISIONS = {  # each precision of `fit`, with the type that autocast casts to
    "32-true": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "64-true": None,
}
MIN_TRACED_STEPS = 2000  # then a trace of up to a second pays: a step saves 0.8 ms
MIN_COMPILED_STEPS = 30_000  # then a compilation of 20 seconds pays: a step saves 0.7 ms more

Compile = bool | Literal["trace"]  # whether steps are compiled, traced or eager
Outcome = tuple[Tensor, Tensor, Densities | None]  # loss, terms, densities (see StepLoss)


@contextmanager
def _autocast(precision: str, device: str) -> Iterator[None]:
    """Turns on autocast for a mixed precision; makes new tensors double for "64-true"."""
    before = torch.get_default_dtype()
    try:
        if precision == "64-true":
            torch.set_default_dtype(torch.double)
        mixed = PRECISIONS[precision]
        # inside a caller's autocast, its cache would keep the weights of the first step
        with torch.autocast(device, mixed, cache_enabled=False) if mixed else nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


class StepLoss(nn.Module):
    """Computes the loss of a batch in a precision of `fit`."""

    def __init__(self, vae: nn.Module, objective: Objective, precision: str = "32-true") -> None:
        super().__init__()
        self.vae: Any = vae
        self.objective, self.precision = objective, precision
        self.observed: list[str] = []
        self.latent: list[str] = []

    def forward(self, x: Tensor, y: Tensor | None = None) -> Outcome:
        """Returns the loss of a batch in nats per datum, its terms, and the densities or None.

        The loss has a gradient. The terms have none: they are sums over the batch of the
        objective, of the reconstruction and of the KL of each latent site. The densities are
        returned if the objective takes a step of its own after the model's (`after_step`).
        """
        K = self.objective.num_particles
        # as in `densities`, without its checks of arguments, which no step needs
        with _autocast(self.precision, x.device.type), OwnParameters():
            d = registered_densities(self.vae.model, self.vae.guide, x, y, num_particles=K)
            loss = self.objective.reduce(d) / (d.scale * len(x))
            with torch.no_grad():
                sums = [-loss * len(x), d.log_likelihood.mean(0).sum()]
                terms = torch.stack(sums + [kl.sum() for kl in d.kl().values()])
        self.observed, self.latent = list(d.observed), list(d.sites)
        return loss, terms, d if self.objective.own_step else None


class TracedGradient:
    """Loss and gradient of batches of one size, by operations that were traced once.

    Args:
        loss: The loss, whose programs are traced.
        batch: A batch of the size of later ones.

    Raises:
        CannotCompile: If the vae or the objective does not allow it.
    """

    def __init__(self, loss: StepLoss, *batch: Tensor) -> None:
        if loss.objective.own_step:
            name = type(loss.objective).__name__
            raise CannotCompile(f"{name} trains a second player beside the model")
        if loss.precision == "16-mixed":
            raise CannotCompile("precision 16-mixed scales its gradients")
        for program in (loss.vae.model, loss.vae.guide):
            for look in (folds, summed_values):  # runs the programs once, which a trace cannot
                look(program, batch[0], batch[1] if len(batch) > 1 else None)
        self.loss = loss
        self.parameters = [p for p in loss.vae.parameters() if p.requires_grad]
        self.operations = Traced(LossAndGradient(loss), *batch)
        self._try(*batch)

    def __call__(self, *batch: Tensor) -> Outcome:
        """Leaves the gradient in the parameters; returns loss and terms as `StepLoss` does."""
        loss, terms, gradient = self.operations(*batch)
        for parameter, slope in zip(self.parameters, gradient):
            parameter.grad = slope
        return loss, terms, None

    def trains_the_same(self) -> bool:
        """Returns whether the trained parameters of the vae are those of the trace."""
        trained = (p for p in self.loss.vae.parameters() if p.requires_grad)
        return [*map(id, trained)] == [*map(id, self.parameters)]

    def compare(self, eager: Callable[..., Outcome], *batch: Tensor) -> tuple[Outcome, bool]:
        """Takes the gradient both ways with the same noise, and leaves that of `eager`.

        Returns:
            What `eager` returns, and whether terms, gradient and buffers agree up to rounding.
        """
        traced = self._try(*batch)
        outcome = eager(*batch)
        gradient = [p.grad for p in self.loss.vae.parameters() if p.requires_grad]
        tolerance = 1e-3 if PRECISIONS[self.loss.precision] is None else 0.1
        pairs = zip_longest([outcome[1], *gradient, *self.loss.buffers()], traced)
        return outcome, all(_alike(a, b, tolerance) for a, b in pairs)

    def _try(self, *batch: Tensor) -> list[Tensor | None]:
        """Returns terms, gradient and buffers of a step, and takes its effects back."""
        kept = *self.loss.buffers(), *self.operations.graph.buffers()
        with numbers_kept(kept), forked(batch[0].device), one_line_errors("repeated"):
            _, terms, gradient = self.operations(*(part.clone() for part in batch))
            return [terms, *gradient, *(buffer.clone() for buffer in self.loss.buffers())]


def _alike(a: Tensor | None, b: Tensor | None, tolerance: float) -> bool:
    """Returns whether two tensors are both None, or differ by less than `tolerance` of a."""
    if a is None or b is None or a.shape != b.shape:
        return a is b
    if not a.numel() or not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    size = float(a.abs().nan_to_num().max())
    return torch.allclose(a, b, rtol=0, atol=tolerance * size, equal_nan=True)


def choose_compile(steps: int, objective: Objective, precision: str, on_cuda: bool) -> Compile:
    """Returns how to take steps if the user left `compile` open: by their planned number."""
    if steps < MIN_TRACED_STEPS or objective.own_step or precision == "16-mixed":
        return False
    compiler = find_spec("triton") if on_cuda else which(os.environ.get("CXX", "g++"))
    return "trace" if steps < MIN_COMPILED_STEPS or compiler is None else True


class LossAndGradient(nn.Module):
    """Computes loss, terms and gradient in one forward pass, which can be traced."""

    def __init__(self, loss: StepLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *batch: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Returns the loss and terms of `StepLoss`, and the gradient of each trained parameter."""
        loss, terms, _ = self.loss(*batch)
        parameters = [p for p in self.loss.vae.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach(), terms, list(gradient)


class Monitor:
    """Sums the terms of an epoch's steps, and detects values that are not finite.

    On a CPU the loss and gradient of every step are checked before its update. On a GPU this
    would wait for the device, so the first loss that is not finite is noted there, and only
    `raise_if_bad` reads it; that checks the weights instead of the gradients.

    Attributes:
        sums: The terms of the epoch's steps so far, float64; None before its first step.
    """

    def __init__(self, loss: StepLoss, device: torch.device) -> None:
        self.loss = loss
        self.every_step = device.type == "cpu"
        self.sums: Tensor | None = None
        self.bad_step = torch.full((), -1, device=device)  # first whose loss is not finite
        self.terms: Tensor | None = None  # the terms of that step

    def add(
        self,
        step: int,
        loss: Tensor,
        terms: Tensor,
        parameters: Iterable[nn.Parameter] = (),
        norm: Tensor | None = None,
    ) -> None:
        """Adds the terms of a step, and checks its loss and the gradient of `parameters`.

        Raises:
            FloatingPointError: On a CPU, if the loss, the gradient or its norm is not finite.
        """
        self.sums = terms.double() if self.sums is None else self.sums + terms
        if not self.every_step:
            is_first = ~loss.isfinite() & (self.bad_step < 0)
            self.bad_step = torch.where(is_first, step, self.bad_step)
            self.terms = terms if self.terms is None else torch.where(is_first, terms, self.terms)
            return
        if not math.isfinite(loss.item()):
            raise self._loss_error(step, terms)
        gradients = (p.grad for p in parameters if p.grad is not None)
        total: Any = sum(map(torch.sum, gradients)) if norm is None else norm
        if not math.isfinite(total):
            named = self.loss.vae.named_parameters()
            bad = [n for n, p in named if p.grad is not None and not p.grad.isfinite().all()]
            names = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
            raise FloatingPointError(
                f"step {step}: the gradient of {names} is not finite, though the loss is; lower "
                "lr, or look for a function whose derivative is infinite"
            )

    def raise_if_bad(self, step: int, weights: Iterable[Tensor] = ()) -> None:
        """Waits for the GPU; raises FloatingPointError if a loss or weight is not finite there."""
        if self.every_step:
            return
        if self.terms is not None and int(self.bad_step) >= 0:
            raise self._loss_error(int(self.bad_step), self.terms)
        if not all(bool(weight.isfinite().all()) for weight in weights):
            raise FloatingPointError(
                f"step {step}: weights are not finite, though all losses were: a gradient was "
                "not; lower lr, or look for a function whose derivative is infinite"
            )

    def _loss_error(self, step: int, terms: Tensor) -> FloatingPointError:
        _, reconstruction, *kls = terms.isfinite().tolist()
        sites = [site for site, finite in zip(self.loss.latent, kls) if not finite]
        sites = sites if reconstruction else [*self.loss.observed, *sites]
        what = f"log density of site {', '.join(map(repr, sites))}" if sites else "objective"
        return FloatingPointError(
            f"step {step}: the {what} is not finite; lower lr, set clip_norm, or look for "
            "extreme data"
        )
