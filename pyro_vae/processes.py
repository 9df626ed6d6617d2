"""Work in other processes, through files of a folder."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, TypeVar

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from pyro_vae.runtime import threads

__all__ = ["check_processes", "in_processes"]

T = TypeVar("T")


def check_processes(number: int, device: str) -> None:
    """Refuses more processes than this machine has devices of a kind for, "cpu" or "cuda"."""
    most = torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1
    if not most:
        raise ValueError("accelerator cuda was asked for; this machine has no GPU that torch sees")
    if number > most:
        what = "GPU(s)" if device == "cuda" else "processor(s)"
        raise ValueError(
            f"devices={number} were asked for; this machine has {most} {what}: give no more"
        )


def _send(path: Path, value: Any) -> None:
    """Leaves a value in a file: that does not fill up as a pipe does, and needs no shared memory.

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
    """What `function` returns for each of `parts`, each in a process and on a device of its own.

    Args:
        function: From the top of a module.
        parts: Its argument in each process; their tensors are moved to its device.
        device: "cpu" or "cuda".
        indices: Of the GPUs; the first ones if None.
        meanwhile: What this process does while the others work, and counts as one of them.

    Raises:
        ValueError: If there are more processes than devices, or something cannot be sent.
        ChildProcessError: If a process died, as for want of memory.
        Exception: The first that `function` raised.
    """
    number = len(parts) + (meanwhile is not None)
    check_processes(number, device)
    share = max(1, torch.get_num_threads() // number)
    matmul = torch.get_float32_matmul_precision()
    places = [device if device == "cpu" else f"{device}:{i}" for i in indices or range(len(parts))]
    others = set(multiprocessing.active_children())
    with TemporaryDirectory() as name:
        folder = Path(name)
        _send(folder / "function", function)
        for i, part in enumerate(parts):
            _send(folder / f"part{i}", part)
        given = folder, places, share, matmul
        try:
            started = start_processes(_work, given, nprocs=len(parts), join=False)
            if meanwhile is not None:
                with threads(share):
                    meanwhile()
            while not started.join():
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise _first_error(folder, error) from error
        finally:
            for process in set(multiprocessing.active_children()) - others:
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
    except Exception:  # of a kind that cannot be sent
        return RuntimeError(str(error))


def _work(number: int, folder: Path, places: list[str], threads: int, matmul: str) -> None:
    """Leaves what the function returns for one part, or its error, if that is the first."""
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul)
    try:
        here = torch.device(places[number])
        if here.type == "cuda":
            torch.cuda.set_device(here)
        function, part = _receive(folder / "function"), _receive(folder / f"part{number}", here)
        _send(folder / f"result{number}", function(part))
    except Exception as error:
        with suppress(FileExistsError), open(folder / "error", "xb") as file:
            pickle.dump(error, file)
        raise


def _end_with_parent() -> None:
    """Ends this process with the one that started it, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
