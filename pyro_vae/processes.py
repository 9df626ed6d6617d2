"""Runs work on one device, or in several processes, which may share a training."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from pyro_vae.runtime import is_small, process_lock, seed_of, threads

T = TypeVar("T")
Function = Callable[["Group"], Any]  # what each process runs on its device


def uses_cuda(accelerator: str) -> bool:
    """Returns whether an accelerator of this name is a GPU: "auto" is one if torch finds it."""
    return accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available())


def check_processes(number: int, device: str) -> None:
    """Raises ValueError for more processes than this machine has devices, "cpu" or "cuda"."""
    available = torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1
    if not available:
        raise ValueError("accelerator cuda was asked for; this machine has no GPU that torch sees")
    if number > available:
        what = "GPU(s)" if device == "cuda" else "processor(s)"
        raise ValueError(
            f"devices={number} were asked for; this machine has {available} {what}: give no more"
        )


def _send(path: Path, value: Any) -> None:
    """Writes a value to a file, which cannot fill up as a pipe does, and needs no shared memory.

    Raises:
        ValueError: If it cannot be pickled.
    """
    try:
        torch.save(value, path)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"several devices have a process each, and this cannot be sent there: {error}; "
            "use classes and functions from the top of a module, no lambdas"
        ) from error


def _receive(path: Path, device: str | torch.device = "cpu") -> Any:
    return torch.load(path, map_location=device, weights_only=False)


def in_processes(
    function: Callable[..., T],
    parts: Sequence[Any],
    device: str,
    indices: Sequence[int] | None = None,
    meanwhile: Callable[[], Any] | None = None,
) -> list[T]:
    """Calls a function on each of `parts`, in processes with a device each; returns the results.

    Args:
        function: A function from the top of a module.
        parts: The argument of each process; its tensors are moved to the device of the process.
        device: "cpu" or "cuda".
        indices: Indices of the GPUs; the first ones if None.
        meanwhile: A function that this process calls while the others work; it counts as one.

    Raises:
        ValueError: If there are more processes than devices, or something cannot be sent.
        ChildProcessError: If a process died, for example for lack of memory.
        Exception: The first that `function` raised.
    """
    number = len(parts) + (meanwhile is not None)
    check_processes(number, device)
    num_threads = max(1, torch.get_num_threads() // number)
    matmul = torch.get_float32_matmul_precision()
    devices = [
        device if device == "cpu" else f"{device}:{i}" for i in indices or range(len(parts))
    ]
    before = set(multiprocessing.active_children())
    with TemporaryDirectory() as name:
        folder = Path(name)
        _send(folder / "function", function)
        for i, part in enumerate(parts):
            _send(folder / f"part{i}", part)
        arguments = folder, devices, num_threads, matmul
        try:
            processes = start_processes(_run_part, arguments, nprocs=len(parts), join=False)
            if meanwhile is not None:
                with threads(num_threads):
                    meanwhile()
            while not processes.join():
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise _first_error(folder, error) from error
        finally:
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
        return [_receive(folder / f"result{i}") for i in range(len(parts))]


def _first_error(folder: Path, error: Exception) -> Exception:
    try:
        return pickle.loads((folder / "error").read_bytes())
    except FileNotFoundError:
        return ChildProcessError(
            f"a process ended by itself ({error}): a script that uses several devices must do so "
            'under if __name__ == "__main__", and the memory must suffice for all of them'
        )
    except Exception:  # the error cannot be unpickled
        return RuntimeError(str(error))


def _run_part(number: int, folder: Path, devices: list[str], threads: int, matmul: str) -> None:
    """Writes the function's result for one part to a file, or its error if it is the first."""
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul)
    try:
        device = torch.device(devices[number])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        function, part = _receive(folder / "function"), _receive(folder / f"part{number}", device)
        _send(folder / f"result{number}", function(part))
    except Exception as error:
        with suppress(FileExistsError), open(folder / "error", "xb") as file:
            pickle.dump(error, file)
        raise


def _end_with_parent() -> None:
    """Ends this process when the one that started it ends, in whatever way."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@dataclass(frozen=True)
class Group:
    """Processes that share each training step and then have the same weights; one by default.

    Attributes:
        rank: The number of this process, from 0.
        size: The number of processes.
        device: The device of this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def local_rows(self, index: Tensor) -> tuple[Tensor, float]:
        """Returns this rank's rows of a batch, in order, and their weight in the batch's mean.

        If a batch has fewer than two rows for each rank, every rank takes all of it.
        """
        if self.size == 1 or len(index) < 2 * self.size:
            return index, 1 / self.size
        rows = index.tensor_split(self.size)[self.rank]
        return rows, len(rows) / len(index)

    def seed(self, *numbers: int) -> int:
        """Returns a seed that differs between ranks."""
        return seed_of(*numbers, self.rank)

    def all_reduce_mean(
        self, weight: float, parameters: Sequence[nn.Parameter], *more: Tensor
    ) -> list[Tensor]:
        """Replaces gradients by their weighted sums over ranks; returns those of other tensors.

        `weight` is the weight of this rank. A missing gradient counts as zero. One all-reduce
        computes all of the sums.
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

    def broadcast(self, value: T) -> T:
        """Returns the value of rank 0."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        distributed.broadcast_object_list(values, device=self.device)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values

    @torch.no_grad()
    def broadcast_(self, *tensors: Tensor) -> None:
        """Overwrites tensors, in place, with those of rank 0."""
        if self.size > 1:
            for tensor, value in zip(tensors, self.broadcast([t.cpu() for t in tensors])):
                tensor.copy_(value)


def is_first_process() -> bool:
    """Returns whether this process prints and writes files: rank 0 under torchrun, or alone."""
    return not _under_torchrun() or os.environ["RANK"] == "0"


def _under_torchrun() -> bool:
    return (
        distributed.is_available()
        and distributed.is_torchelastic_launched()
        and int(os.environ["WORLD_SIZE"]) > 1
    )


class Engine:
    """Runs a function here, or in a process for each device.

    Args:
        accelerator: "cpu", "cuda" or "auto".
        devices: Number of devices, or their indices; torchrun decides if it started processes.

    Attributes:
        on_cuda: Whether the devices are GPUs.
        size: The number of processes, on all hosts.
        spawns: Whether the function runs in processes that are started for it.

    Raises:
        ValueError: If an accelerator or a device is unknown, or torchrun started another number.
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
        self.on_cuda, launched, size = uses_cuda(accelerator), _under_torchrun(), len(self.indices)
        self._device_type, self._backend = ("cuda", "nccl") if self.on_cuda else ("cpu", "gloo")
        check_processes(size, self._device_type)
        if self.on_cuda and (count := torch.cuda.device_count()) <= max(self.indices):
            raise ValueError(
                f"devices={devices!r}, but the GPUs of this machine are 0 to {count - 1}"
            )
        if launched and size not in (1, int(os.environ["LOCAL_WORLD_SIZE"])):
            raise ValueError(
                f"devices={devices!r}, but {os.environ['LOCAL_WORLD_SIZE']} processes were "
                "started on this host: leave devices out"
            )
        self.size = int(os.environ["WORLD_SIZE"]) if launched else size
        self.spawns = self.size > 1 and not launched

    def threads(self, vae: nn.Module, rows: int) -> int:
        """Returns the threads of each process, given the rows of a step of all processes."""
        share = self.size if self.spawns else 1
        small = not self.on_cuda and is_small(vae.parameters(), rows // self.size)
        return 1 if small else max(1, torch.get_num_threads() // share)

    def run(self, function: Function) -> Any:
        """Calls `function(group)` in each process; returns the result of the first process.

        Other threads of this process that call it wait.

        Raises:
            ValueError: If processes are started and `function` cannot be sent to them.
            Exception: The first that `function` raised, in whichever process.
        """
        with process_lock:
            if self.size == 1:
                return function(Group(device=self._device(self.indices[0])))
            if self.spawns:
                work = partial(_run_in_process, self, function)
                indices = self.indices if self.on_cuda else None
                with TemporaryDirectory() as folder:
                    parts = [(f"file://{folder}/store", *part) for part in enumerate(self.indices)]
                    return in_processes(work, parts, self._device_type, indices)[0]
            if os.environ.get("MASTER_PORT") == "0":
                raise ValueError(
                    "torchrun left MASTER_PORT at 0, where the processes cannot meet: give "
                    "--master-port a free port, or --standalone on one host"
                )
            if not distributed.is_initialized():
                distributed.init_process_group(self._backend)
                atexit.register(_close_connection)
            return self._run_connected(function, int(os.environ["LOCAL_RANK"]))

    def _run_connected(self, function: Function, index: int) -> Any:
        device = self._device(index)
        if self.on_cuda:
            torch.cuda.set_device(device)
        result = function(Group(distributed.get_rank(), self.size, device))
        distributed.barrier()  # nobody ends while another still uses the connection
        return result

    def _device(self, index: int) -> torch.device:
        return torch.device("cuda", index) if self.on_cuda else torch.device("cpu")


def _run_in_process(engine: Engine, function: Function, part: tuple[str, int, int]) -> Any:
    store, rank, index = part
    if rank > 0:
        warnings.simplefilter("ignore")
    distributed.init_process_group(
        engine._backend, init_method=store, rank=rank, world_size=engine.size
    )
    result = engine._run_connected(function, index)
    distributed.destroy_process_group()  # spawned processes run no exit handlers
    return result if rank == 0 else None


def _close_connection() -> None:
    """Closes the connection of processes that torchrun started, before their threads end."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
