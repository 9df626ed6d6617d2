"""Compiled log densities, for what is evaluated again and again."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from pyro_vae.compiling import CannotCompile, Traced, compiled
from pyro_vae.densities import Latents, Program, log_joint

__all__ = ["CompiledJoint"]

USES = 8  # evaluations of one shape before it is compiled


class CompiledJoint:
    """`log_joint` without gradients, compiled for the shapes that come often.

    A model that cannot be compiled is run as it is, after one warning that says why.

    Args:
        uses: Evaluations of a shape after which it is compiled.
    """

    def __init__(self, uses: int = USES) -> None:
        self.uses, self.seen = uses, dict[object, int]()
        self.fast: dict[object, Traced] = {}

    def __call__(self, model: Program, x: Tensor, y: Tensor | None, latents: Latents) -> Tensor:
        """log p(x, z) [K, B] of given latents, by site [K, B, *event]."""
        inputs = [x, *([] if y is None else [y]), *latents.values()]
        key = tuple((part.shape, part.dtype) for part in inputs)
        if key in self.fast:
            return self.fast[key](*inputs)
        self.seen[key] = self.seen.get(key, 0) + 1
        if self.seen[key] == self.uses:
            module = _Joint(model, list(latents), conditioned=y is not None)
            try:
                self.fast[key] = compiled(module, *inputs)
            except CannotCompile as error:
                warnings.warn(f"compile: the model runs eagerly, for {error}", stacklevel=2)
                self.uses = 0  # never again
        return log_joint(model, x, y, latents)


class _Joint(nn.Module):
    """The log joint as a function of tensors; the module that the model is a method of."""

    def __init__(self, model: Program, sites: list[str], conditioned: bool) -> None:
        super().__init__()
        self.owner = (
            owner if isinstance(owner := getattr(model, "__self__", model), nn.Module) else None
        )
        self.model, self.sites, self.conditioned = model, sites, conditioned

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        y, values = (given[0], given[1:]) if self.conditioned else (None, given)
        return log_joint(self.model, x, y, dict(zip(self.sites, values, strict=True)))
