"""The numbers of a training."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from torch import Tensor

from pyro_vae.objectives import Objective
from pyro_vae.training.optimizers import OptimizerSpec, ScheduleSpec, spec_name

__all__ = ["Settings", "describe_objective"]


@dataclass(frozen=True)
class Settings:
    """What `fit` was asked to do; checked when made."""

    epochs: int
    batch_size: int
    optimizer: OptimizerSpec
    lr: float
    schedule: ScheduleSpec | None
    clip_norm: float | None
    patience: int | None
    precision: str
    seed: int
    checkpoint_every: int | None
    compile: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number, 0 or more; got {self.seed!r}")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite; got {value!r}")

    def record(self, objective: Objective) -> dict[str, Any]:
        """As a run records it."""
        return {
            **asdict(self),
            "optimizer": spec_name(self.optimizer),
            "schedule": spec_name(self.schedule),
            "objective": describe_objective(objective),
        }


def describe_objective(objective: Objective) -> dict[str, Any]:
    """Class and arguments, as far as attributes of the same names tell."""
    objective.at(0)
    names = inspect.signature(type(objective)).parameters
    values = {name: getattr(objective, name) for name in names if hasattr(objective, name)}
    arguments = {name: _plain(value) for name, value in (values | objective.schedules).items()}
    return {"class_path": type(objective).__name__, "init_args": arguments}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {"class_path": type(value).__name__, "init_args": asdict(value)}
    return type(value).__name__
