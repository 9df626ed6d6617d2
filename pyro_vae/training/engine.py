"""Where training runs: one device, or several processes and their collectives."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

from pyro_vae.processes import check_processes, in_processes
from pyro_vae.runtime import alone, is_small

__all__ = ["Engine", "Group", "is_first_process", "uses_cuda"]

T = TypeVar("T")
Function = Callable[["Group", Any], Any]  # what runs on each device, given a task


@dataclass(frozen=True)
class Group:
    """Processes that share each step and hold the same weights after it; one by default.

    Attributes:
        rank: The number of this process, from 0.
        size: The number of processes.
        device: The device of this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def local_rows(self, index: Tensor) -> tuple[Tensor, float]:
        """This rank's rows of a batch, in order, and their weight in the mean of the batch.

        Every rank takes a whole batch that has fewer than two rows for each.
        """
        if self.size == 1 or len(index) < 2 * self.size:
            return index, 1 / self.size
        rows = index.tensor_split(self.size)[self.rank]
        return rows, len(rows) / len(index)

    def seed(self, *numbers: int) -> int:
        """A seed that differs between ranks."""
        return int(np.random.SeedSequence([*numbers, self.rank]).generate_state(1, np.uint64)[0])

    def all_reduce_mean(
        self, weight: float, parameters: Sequence[nn.Parameter], *more: Tensor
    ) -> list[Tensor]:
        """Replaces gradients by their sums over the ranks, each times the weight of its rank.

        A missing gradient counts as zero. The sums of other tensors are returned; all of it in
        one all-reduce.
        """
        if self.size == 1:
            return list(more)
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        tensors: list[Any] = [*(p.grad for p in parameters), *more]
        flat = torch.cat([t.detach().flatten() for t in tensors]) * weight
        distributed.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        sums = [part.view_as(t).to(t.dtype) for part, t in zip(parts, tensors)]
        for p, gradient in zip(parameters, sums):
            p.grad = gradient
        return sums[len(parameters) :]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(tensor.device)

    def broadcast(self, value: T) -> T:
        """The value of rank 0."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        distributed.broadcast_object_list(values, device=self.device)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values

    def broadcast_(self, tensors: dict[str, Tensor]) -> None:
        """Overwrites tensors, in place, with those of rank 0."""
        if self.size == 1:
            return
        theirs = self.broadcast({name: tensor.cpu() for name, tensor in tensors.items()})
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(theirs[name])


def is_first_process() -> bool:
    """Whether this process prints and writes files: rank 0 under torchrun, or the only one."""
    return not _under_torchrun() or os.environ["RANK"] == "0"


def _under_torchrun() -> bool:
    """Whether torchrun started this process and others."""
    return (
        distributed.is_available()
        and distributed.is_torchelastic_launched()
        and int(os.environ["WORLD_SIZE"]) > 1
    )


def uses_cuda(accelerator: str) -> bool:
    """Whether an accelerator of this name is a GPU: "auto" is, where there is one."""
    return accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available())


class Engine:
    """Where a function runs: here, or in a process for each device.

    Args:
        accelerator: "cpu", "cuda" or "auto".
        devices: Their number, or their indices; torchrun decides where it started the processes.

    Attributes:
        on_cuda: Whether the devices are GPUs.
        size: The number of processes, on all hosts.
        spawns: Whether the function runs in processes that are started for it.

    Raises:
        ValueError: If an accelerator or a device is unknown, or torchrun started other numbers.
    """

    def __init__(self, accelerator: str, devices: int | list[int]) -> None:
        if accelerator not in ("auto", "cpu", "cuda", "gpu"):
            raise ValueError(f"accelerator must be 'cpu', 'cuda' or 'auto'; got {accelerator!r}")
        self.indices: Any = range(devices) if type(devices) is int else devices
        if (
            not isinstance(self.indices, list | range)
            or not self.indices
            or not all(type(index) is int and index >= 0 for index in self.indices)
            or len({*self.indices}) < len(self.indices)
        ):
            raise ValueError(
                "devices must be their number, at least 1, or a list of their indices; "
                f"got {devices!r}"
            )
        self.on_cuda, launched, here = uses_cuda(accelerator), _under_torchrun(), len(self.indices)
        self._kind, self._backend = ("cuda", "nccl") if self.on_cuda else ("cpu", "gloo")
        check_processes(here, self._kind)
        if self.on_cuda and (count := torch.cuda.device_count()) <= max(self.indices):
            raise ValueError(
                f"devices={devices!r}, but the GPUs of this machine are 0 to {count - 1}"
            )
        if launched and here not in (1, int(os.environ["LOCAL_WORLD_SIZE"])):
            raise ValueError(
                f"devices={devices!r}, but {os.environ['LOCAL_WORLD_SIZE']} processes were "
                "started on this host: leave devices out"
            )
        self.size = int(os.environ["WORLD_SIZE"]) if launched else here
        self.spawns = self.size > 1 and not launched

    def threads(self, vae: nn.Module, rows: int) -> int:
        """Threads of each process: one for a small model at these rows of a step, of all."""
        share = self.size if self.spawns else 1
        small = not self.on_cuda and is_small(vae.parameters(), rows // self.size)
        return 1 if small else max(1, torch.get_num_threads() // share)

    def run(self, function: Function, task: Any) -> Any:
        """Returns what `function(group, task)` returns in the first process.

        Threads of this process run one at a time.

        Raises:
            ValueError: If processes are started and something in `task` cannot be sent to them.
            Exception: The first that `function` raised, in whichever process.
        """
        with alone:
            if self.spawns:
                work = partial(_in_process, self, function, task)
                indices = self.indices if self.on_cuda else None
                with TemporaryDirectory() as folder:
                    parts = [(f"file://{folder}/store", *part) for part in enumerate(self.indices)]
                    return in_processes(work, parts, self._kind, indices)[0]
            if not _under_torchrun():
                return self._here(function, task, self.indices[0])
            if os.environ.get("MASTER_PORT") == "0":
                raise ValueError(
                    "torchrun left MASTER_PORT at 0, where the processes cannot meet: give "
                    "--master-port a free port, or --standalone on one host"
                )
            if not distributed.is_initialized():
                distributed.init_process_group(self._backend)
                atexit.register(_leave)
            return self._here(function, task, int(os.environ["LOCAL_RANK"]))

    def _here(self, function: Function, task: Any, index: int) -> Any:
        """Runs `function` in this process, which is connected if it is one of several."""
        device = self._device(index)
        if self.size == 1:
            return function(Group(device=device), task)
        if self.on_cuda:
            torch.cuda.set_device(device)
        group = Group(distributed.get_rank(), distributed.get_world_size(), device)
        result = function(group, task)
        distributed.barrier()  # nobody ends while another still uses the connection
        return result

    def _device(self, index: int) -> torch.device:
        return torch.device("cuda", index) if self.on_cuda else torch.device("cpu")


def _in_process(engine: Engine, function: Function, task: Any, part: tuple[str, int, int]) -> Any:
    """Runs `function` in a process that was started for it; returns the result of rank 0."""
    store, rank, index = part
    if rank > 0:
        warnings.simplefilter("ignore")
    distributed.init_process_group(
        engine._backend, init_method=store, rank=rank, world_size=engine.size
    )
    result = engine._here(function, task, index)
    distributed.destroy_process_group()  # spawned processes run no exit handlers
    return result if rank == 0 else None


def _leave() -> None:
    """Ends the connection of processes that torchrun started, before their threads are gone."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
