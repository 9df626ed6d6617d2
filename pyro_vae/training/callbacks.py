"""What a callback sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["Callback", "State"]


@dataclass
class State:
    """Where training is, at the end of an epoch.

    Attributes:
        epoch: Epochs done.
        step: Optimisation steps done.
        vae: What is trained, with its weights at this moment.
        metrics: The row of this epoch, as in `History.rows`.
    """

    epoch: int
    step: int
    vae: nn.Module = field(repr=False)
    metrics: dict[str, Any]
    stopped: bool = field(default=False, init=False, repr=False)

    def stop(self) -> None:
        """Makes this epoch the last."""
        self.stopped = True


Callback = Callable[[State], Any]
