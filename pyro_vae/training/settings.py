"""The settings of a training."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from torch import Tensor

from pyro_vae.arguments import check_real, check_whole
from pyro_vae.objectives import Objective
from pyro_vae.training.optimizers import OptimizerSpec, ScheduleSpec, spec_name

__all__ = ["Settings", "describe_objective"]


@dataclass(frozen=True)
class Settings:
    """The arguments of `fit` that a run records; checked when made."""

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
        check_whole(epochs=self.epochs, batch_size=self.batch_size)
        check_whole(optional=True, patience=self.patience, checkpoint_every=self.checkpoint_every)
        check_whole(0, seed=self.seed)
        check_real(above=0, lr=self.lr)
        check_real(above=0, optional=True, clip_norm=self.clip_norm)

    def record(self, objective: Objective) -> dict[str, Any]:
        """As a run records it."""
        return {
            **asdict(self),
            "optimizer": spec_name(self.optimizer),
            "schedule": spec_name(self.schedule),
            "objective": describe_objective(objective),
        }


def describe_objective(objective: Objective) -> dict[str, Any]:
    """Class and arguments; these are read from attributes named like them."""
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
