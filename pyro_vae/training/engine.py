"""Lightning Fabric, on one device or in several processes, without its traces on this one."""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pyro_vae.generators import alone
from pyro_vae.processes import Exchange, check_processes
from pyro_vae.training.group import Group

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Engine", "is_first_process", "uses_cuda"]

LARGE = 10_000_000  # products of numbers in a layer that are worth a second thread
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
Function = Callable[["Fabric", Group, Any], Any]  # what runs on each device, given a task


def is_first_process() -> bool:
    """Whether this process speaks and writes for all: one of torchrun's, or the only one."""
    return not _joins() or os.environ["RANK"] == "0"


def _joins() -> bool:
    """Whether torchrun, or `fabric run`, started this process beside others."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_torchelastic_launched()
        and int(os.environ["WORLD_SIZE"]) > 1
    )


def uses_cuda(accelerator: str) -> bool:
    """Whether an accelerator of this name is a GPU: "auto" is, where there is one."""
    return accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available())


@dataclass(frozen=True)
class Engine:
    """Where a function runs: here, or in a process for each device.

    Attributes:
        accelerator: "cpu", "cuda" or "auto".
        devices: How many, or their indices; under torchrun it says how many.
        precision: Of the Fabric that the function is given.
        loggers: Of that of the first process.

    Raises:
        ValueError: If `precision` or a device is unknown, or torchrun started other numbers.
    """

    accelerator: str
    devices: int | list[int]
    precision: str
    loggers: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ValueError(f"precision must be one of {known}; got {self.precision!r}")
        if self._local < 1:
            raise ValueError(
                "devices must be their number, at least 1, or a list of their indices; "
                f"got {self.devices!r}"
            )
        check_processes(self._local, "cuda" if self.on_cuda else "cpu")
        if _joins() and self._local not in (1, int(os.environ["LOCAL_WORLD_SIZE"])):
            raise ValueError(
                f"devices={self.devices!r}, but {os.environ['LOCAL_WORLD_SIZE']} processes were "
                "started on this host: leave devices out"
            )

    @property
    def size(self) -> int:
        """The number of processes, on all hosts."""
        return int(os.environ["WORLD_SIZE"]) if _joins() else self._local

    @property
    def spawns(self) -> bool:
        """Whether the function runs in processes that are started for it."""
        return self.size > 1 and not _joins()

    def threads(self, vae: nn.Module, rows: int) -> int:
        """How many each process trains on; one where sharing the work costs more than it spares.

        A second thread halves the time of large products on a machine that is free, and makes
        small ones wait wherever its processors are busy.

        Args:
            vae: Of which the largest weight counts; those of convolutions are used again and
                again, and always large.
            rows: Of a step, on all devices together.
        """
        share = self.size if self.spawns else 1
        most = max(1, torch.get_num_threads() // share)
        weights = [p for p in vae.parameters() if p.ndim > 1]
        large = any(p.ndim > 2 or p.numel() * rows >= LARGE * self.size for p in weights)
        return most if large or self.on_cuda else 1

    @property
    def _local(self) -> int:
        if not isinstance(self.devices, list):
            return self.devices if type(self.devices) is int else 0
        whole = all(type(index) is int and index >= 0 for index in self.devices)
        return len(self.devices) if whole and len({*self.devices}) == len(self.devices) else 0

    @property
    def on_cuda(self) -> bool:
        """Whether the devices are GPUs."""
        return uses_cuda(self.accelerator)

    def run(self, function: Function, task: Any) -> Any:
        """What `function(fabric, group, task)` returns in the first process.

        Of several threads one runs at a time: the others wait.

        Raises:
            ValueError: If processes are started and something in `task` cannot be sent to them.
            Exception: The first that `function` raised, in whichever process.
        """
        with alone:
            return self._spawn(function, task) if self.spawns else self._here(function, task)

    def _here(self, function: Function, task: Any) -> Any:
        group, index = Group(), self.devices
        if _joins():
            host = int(os.environ["LOCAL_WORLD_SIZE"])
            joined = self._fabric(strategy="ddp", devices=host, num_nodes=self.size // host)
            with _untouched():
                _hush()
                joined.launch()
            group, index = _group(joined), _index(joined.device)
            atexit.register(_leave)
        result = function(self._single(group, index), group, task)
        if group.size > 1:
            torch.distributed.barrier()  # nobody ends while another still uses the connection
        return result

    def _single(self, group: Group, index: int | list[int]) -> Fabric:
        """A Fabric of one device: gradients are reduced by the group, not by its hooks."""
        loggers = list(self.loggers) if group.rank == 0 else []
        return self._fabric(
            devices=index if self.on_cuda else 1, precision=self.precision, loggers=loggers
        )

    def _fabric(self, **options: Any) -> Fabric:
        with _untouched():
            from lightning_fabric import Fabric

            _hush()
            accelerator = "cuda" if self.on_cuda else self.accelerator
            return Fabric(accelerator="cpu" if accelerator == "auto" else accelerator, **options)

    def _spawn(self, function: Function, task: Any) -> Any:
        from lightning_fabric.plugins.environments import LightningEnvironment

        fabric = self._fabric(
            strategy="ddp_spawn",
            devices=self.devices if self.on_cuda else self._local,
            plugins=LightningEnvironment(),
        )
        with TemporaryDirectory() as folder, _untouched():
            exchange = Exchange(folder)
            matmul = torch.get_float32_matmul_precision()
            exchange.send("task", (self, function, task, matmul))
            with exchange.waiting():
                launcher: Any = fabric.strategy.launcher
                launcher.launch(_in_process, fabric, exchange)
            return exchange.receive("result")


def _in_process(fabric: Fabric, exchange: Exchange) -> None:
    _hush()
    if fabric.global_rank > 0:
        warnings.simplefilter("ignore")
    with exchange.working():
        fabric.strategy.setup_environment()
        engine, function, task, matmul = exchange.receive("task")
        torch.set_float32_matmul_precision(matmul)
        group = _group(fabric)
        result = function(engine._single(group, _index(fabric.device)), group, task)
        if group.rank == 0:
            exchange.send("result", result)
        torch.distributed.barrier()  # nobody leaves while another still uses the connection
        torch.distributed.destroy_process_group()  # spawned processes run no exit handlers


def _leave() -> None:
    """Ends the connection of processes that torchrun started, before their threads are gone."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _group(fabric: Fabric) -> Group:
    return Group(fabric.global_rank, fabric.world_size, fabric.device)


def _index(device: torch.device) -> list[int]:
    return [device.index or 0]


def _hush() -> None:
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)


@contextmanager
def _untouched() -> Iterator[None]:
    """Puts the environment, warning filters and Fabric's logger back as they were.

    Inside, nothing is known of `fabric run`, whose options would contradict ours.
    """
    logger = logging.getLogger("lightning_fabric")
    before = logger.handlers[:], logger.level, logger.propagate
    environment = dict(os.environ)
    for name in environment:
        if name.startswith("LT_"):
            del os.environ[name]
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
