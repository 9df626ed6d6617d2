"""log p(x, z) at given latents, compiled for the shapes that come often."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.compiling import CannotCompile, Traced, compiled
from pyro_vae.densities import Latents, Program, log_joint
from pyro_vae.estimators.target import Target, gradients

__all__ = ["CompiledJoint", "CompiledTarget"]

USES = 20  # evaluations of one shape before it is compiled
MOST = 3  # shapes that are compiled: the others are rare


class Frequent:
    """A function of tensors, compiled for the shapes that come often.

    What cannot be compiled is run as it is, after one warning that says why.

    Args:
        uses: Evaluations of a shape after which it is compiled.
    """

    def __init__(self, uses: int = USES) -> None:
        self.uses, self.most = uses, MOST
        self.seen: dict[object, int] = {}
        self.fast: dict[object, Traced] = {}

    def get(self, kind: object, make: Callable[[], nn.Module], *inputs: Tensor) -> Traced | None:
        """The compiled module for these inputs, if it is there or time to make it.

        Args:
            kind: What tells modules for inputs of the same shapes apart.
            make: Gives the module.
            inputs: Of its forward pass.
        """
        key = (kind, *((part.shape, part.dtype) for part in inputs))
        if key in self.fast or len(self.fast) >= self.most:
            return self.fast.get(key)
        self.seen[key] = self.seen.get(key, 0) + 1
        if self.seen[key] < self.uses:
            return None
        try:
            self.fast[key] = compiled(make(), *inputs)
        except CannotCompile as error:
            warnings.warn(f"compile: the model runs eagerly, for {error}", stacklevel=2)
            self.most = 0  # no other try
        return self.fast.get(key)


class CompiledJoint(Frequent):
    """`log_joint` without gradients, compiled for the shapes that come often."""

    def __call__(self, model: Program, x: Tensor, y: Tensor | None, latents: Latents) -> Tensor:
        """log p(x, z) [K, B] of given latents, by site [K, B, *event]."""
        inputs = [x, *([] if y is None else [y]), *latents.values()]
        fast = self.get(None, lambda: _Joint(model, list(latents), y is not None), *inputs)
        return log_joint(model, x, y, latents) if fast is None else fast(*inputs)


class _Joint(nn.Module):
    def __init__(self, model: Program, sites: list[str], conditioned: bool) -> None:
        super().__init__()
        self.owner = _owner(model)
        self.model, self.sites, self.conditioned = model, sites, conditioned

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        y, values = (given[0], given[1:]) if self.conditioned else (None, given)
        return log_joint(self.model, x, y, dict(zip(self.sites, values, strict=True)))


class CompiledTarget(Frequent):
    """`Target.log_joint`, its value and its gradient compiled for the shapes that come often.

    The supports of the sites must be the same for all data.
    """

    def __call__(self, target: Target, u: Tensor) -> Tensor:
        """log p(x, u) [K, B], differentiable in u alone."""
        inputs = [u.detach(), target.scale, target.x, *([] if target.y is None else [target.y])]
        slope = u.requires_grad and torch.is_grad_enabled()
        fast = self.get(slope, lambda: _TargetJoint(target, slope), *inputs)
        if fast is None:
            return target.run_log_joint(u)
        return _WithSlope.apply(u, *fast(*inputs)) if slope else fast(*inputs)


class _TargetJoint(nn.Module):
    """log p(x, u), and its slope if asked for, as functions of tensors alone."""

    def __init__(self, target: Target, slope: bool) -> None:
        super().__init__()
        self.owner, self.target, self.slope = _owner(target.model), target, slope

    def forward(self, u: Tensor, scale: Tensor, x: Tensor, *y: Tensor) -> Any:
        target = copy.copy(self.target)
        target.scale, target.x, target.y = scale, x, y[0] if y else None
        if not self.slope:
            return target.run_log_joint(u)
        (value,), (slope,) = gradients(lambda v: (target.run_log_joint(v),), u, len(u))
        return value, slope


class _WithSlope(torch.autograd.Function):
    """A value [K, B] whose gradient with respect to u [K, B, D] is known."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return outer[0].unsqueeze(-1) * slope, None, None


def _owner(model: Program) -> nn.Module | None:
    """The module that a program is, or is a method of: its parameters are inputs."""
    owner = getattr(model, "__self__", model)
    return owner if isinstance(owner, nn.Module) else None
