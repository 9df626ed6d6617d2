"""Rows of a file through a run in parts: kept as they are made, joined when all are there."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from rich.progress import track
from torch import Tensor, nn

from pyro_vae.data import Data
from pyro_vae.files import write
from pyro_vae.processes import in_processes
from pyro_vae.training.engine import uses_cuda

__all__ = ["Job", "key_of", "part_seed", "stream"]

ROWS = 1000  # of a part: what is lost when a process dies


@dataclass(frozen=True)
class Job:
    """What is done with the rows of a file.

    Attributes:
        number: Of rows.
        key: What gives a digest of all that the results depend on.
        run: From the number of a part and the positions of its rows to what is kept of it.
        join: From the files of all parts, in order, and the file to write, to what the command
            has to say.
    """

    number: int
    key: Callable[[], str]
    run: Callable[[int, Tensor], bytes]
    join: Callable[[list[Path], Path], str]

    def parts(self) -> list[slice]:
        """Its parts: a thousand rows each, and what is left over in the last one."""
        starts = range(0, max(1, self.number // ROWS) * ROWS, ROWS)
        ends = [*starts[1:], self.number]
        return [slice(start, end) for start, end in zip(starts, ends)]


def stream(make: Callable[[Namespace], Job], options: Namespace, out: Path) -> None:
    """Makes all parts that are not there yet, of this process or of several, and joins them.

    Parts lie in a hidden folder beside `out` until all of them are there. A part depends on its
    number alone, so that a command that was broken off goes on when it is given again, with the
    result of one that was not. Processes that torchrun starts share the parts through that
    folder; the one that finds all of them there joins them.

    Args:
        make: From the options to the job; from the top of a module.
        options: Of the command.
        out: The file that it writes.
    """
    job = make(options)
    folder = out.with_name(f".{out.name}.{job.key()[:16]}.parts")
    folder.mkdir(exist_ok=True)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    devices = options.get("devices", 1)
    paths = [folder / f"{part:08d}" for part in range(len(job.parts()))]
    with keeping(paths):
        if devices == 1:
            _make_parts(make, options, paths, world, rank, job)
        else:
            work = partial(_make_parts, make, options, paths, devices)
            device = "cuda" if uses_cuda(options.accelerator) else "cpu"
            in_processes(work, range(devices), device)
    if not all(path.exists() for path in paths):
        print(f"this process has done its parts; those of others are not all there, for {out}")
        return
    print(job.join(paths, out))
    for old in out.parent.glob(f".{glob.escape(out.name)}.*.parts"):
        shutil.rmtree(old, ignore_errors=True)


def _make_parts(
    make: Callable[[Namespace], Job],
    options: Namespace,
    paths: list[Path],
    world: int,
    rank: int,
    job: Job | None = None,
) -> None:
    """Makes those parts that are not there yet, of every `world` parts the one of this rank."""
    job = job or make(options)
    shown = options.get("progress", True) and rank == 0
    parts, own = job.parts(), range(len(paths))[rank::world]
    left = [k for k in own if not paths[k].exists()]
    for k in track(left, "rows, by the thousand", disable=not shown):
        write(paths[k], job.run(k, torch.arange(parts[k].start, parts[k].stop)))


@contextmanager
def keeping(paths: list[Path]) -> Iterator[None]:
    """Says of what went wrong how much is kept; a folder without parts is removed."""
    try:
        yield
    except (KeyboardInterrupt, OSError, ValueError, FloatingPointError) as error:
        done = sum(path.exists() for path in paths)
        kept = f"{done} of {len(paths)} parts are kept: the same command goes on from there"
        if not done:
            with suppress(OSError):  # not empty: another process has begun
                paths[0].parent.rmdir()
            raise
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"; {kept}") from None
        raise ValueError(f"{error}; {kept}") from error


def key_of(vae: nn.Module, data: Data, options: dict[str, Any]) -> str:
    """The SHA-256 of weights, rows and options, which results depend on."""
    sha = hashlib.sha256(f"{ROWS} {sorted(options.items())} {data.digest()}".encode())
    for name, weight in vae.state_dict().items():
        sha.update(name.encode())
        sha.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def part_seed(seed: int, part: int) -> int:
    """The seed of a part; that of the first is the seed itself."""
    if part == 0:
        return seed
    return int(np.random.SeedSequence([seed, part]).generate_state(1, np.uint64)[0] >> 1)
