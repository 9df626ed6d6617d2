"""Work in other processes, through files of a folder; and the threads of each."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

__all__ = ["check_processes", "in_processes", "is_small", "threads"]

LARGE = 10_000_000  # multiplications in a layer that are worth a second thread
T = TypeVar("T")


def is_small(parameters: Iterable[Tensor], rows: int) -> bool:
    """Whether a second thread costs more than it helps.

    It saves a fifth to a third of the time of a small model on an idle machine. Beside other
    work it makes small operations ten times as slow.

    Args:
        parameters: Of a model, which is large if its largest weight times `rows` is, or if it
            has convolutions.
        rows: The rows of a step.
    """
    return all(p.ndim < 2 or (p.ndim == 2 and p.numel() * rows < LARGE) for p in parameters)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Has torch compute on so many threads of this process."""
    before = torch.get_num_threads()
    try:
        if number != before:
            torch.set_num_threads(number)
        yield
    finally:
        if number != before:
            torch.set_num_threads(before)


class Exchange:
    """Values and errors on their way between processes.

    Files do not fill up as pipes do, and need no shared memory.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def send(self, name: str, value: Any) -> None:
        """Leaves a value for others.

        Raises:
            ValueError: If it cannot be pickled.
        """
        try:
            torch.save(value, self.folder / name)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"several devices have a process each, and this cannot be sent there: {error}; "
                "use classes and functions from the top of a module, no lambdas"
            ) from error

    def receive(self, name: str, device: str | torch.device = "cpu") -> Any:
        """A value that was left, its tensors on a device."""
        return torch.load(self.folder / name, map_location=device, weights_only=False)

    @contextmanager
    def working(self) -> Iterator[None]:
        """For a process that works: its error is kept, if it is the first.

        It ends with the one that started it, however that ends.
        """
        Thread(target=_end_with_parent, daemon=True).start()
        try:
            yield
        except Exception as error:
            with suppress(FileExistsError), open(self.folder / "error", "xb") as file:
                pickle.dump(error, file)
            raise

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the one that starts them: raises their first error, and leaves none running."""
        others = set(multiprocessing.active_children())
        try:
            yield
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise self._first_error(error) from error
        finally:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()

    def _first_error(self, error: Exception) -> Exception:
        try:
            return pickle.loads((self.folder / "error").read_bytes())
        except FileNotFoundError:
            return ChildProcessError(
                f"a process ended by itself ({error}): a script that uses several devices must do "
                'so under if __name__ == "__main__", and the memory must suffice for all of them'
            )
        except Exception:  # of a kind that cannot be sent
            return RuntimeError(str(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def check_processes(number: int, device: str) -> None:
    """Refuses more processes than this machine has devices of a kind for, "cpu" or "cuda"."""
    most = torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1
    if number > most:
        what = "GPU(s)" if device == "cuda" else "processor(s)"
        raise ValueError(
            f"devices={number} were asked for; this machine has {most} {what}: give no more"
        )


def in_processes(
    function: Callable[..., T],
    parts: Sequence[Any],
    device: str,
    indices: Sequence[int] | None = None,
) -> list[T]:
    """What `function` returns for each of `parts`, each in a process and on a device of its own.

    Args:
        function: From the top of a module.
        parts: Its argument in each process; their tensors are moved to its device.
        device: "cpu" or "cuda".
        indices: Of the GPUs; the first ones if None.

    Raises:
        ValueError: If there are more parts than devices, or something cannot be sent.
        ChildProcessError: If a process died, as for want of memory.
        Exception: The first that `function` raised.
    """
    check_processes(len(parts), device)
    threads = max(1, torch.get_num_threads() // len(parts))
    matmul = torch.get_float32_matmul_precision()
    with TemporaryDirectory() as folder:
        exchange = Exchange(folder)
        exchange.send("function", function)
        for i, part in enumerate(parts):
            exchange.send(f"part{i}", part)
        places = [
            device if device == "cpu" else f"{device}:{i}" for i in indices or range(len(parts))
        ]
        with exchange.waiting():
            start_processes(
                _work, (exchange, places, threads, matmul), nprocs=len(parts), start_method="spawn"
            )
        return [exchange.receive(f"result{i}") for i in range(len(parts))]


def _work(number: int, exchange: Exchange, places: list[str], threads: int, matmul: str) -> None:
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul)
    with exchange.working():
        here = torch.device(places[number])
        if here.type == "cuda":
            torch.cuda.set_device(here)
        function, part = exchange.receive("function"), exchange.receive(f"part{number}", here)
        exchange.send(f"result{number}", function(part))
