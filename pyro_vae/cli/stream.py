"""Runs a model on the rows of a file in parts, which are kept on disk and finally joined."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import Namespace
from rich.progress import track
from torch import Tensor, nn

from pyro_vae import __version__
from pyro_vae.arguments import digest_of
from pyro_vae.data import Data
from pyro_vae.files import Locked, locked, write
from pyro_vae.processes import in_processes, uses_cuda
from pyro_vae.runtime import seed_of

Run = Callable[[int, Tensor], bytes]
Join = Callable[[list[Path], Path], str]
PART_ROWS = 1000  # rows of a part: the work that is lost if a process dies


def stream(options: Namespace, out: Path, number: int, key: str, run: Run, join: Join) -> None:
    """Makes all parts that do not exist yet, in this process or in several, and joins them.

    Parts lie in a hidden folder beside `out` until all of them exist. A part depends on its
    number alone, so an interrupted command goes on when it is given again, with the result of
    an uninterrupted one. Processes of this command each take the next part that none of them
    has taken. Processes that torchrun starts have a fixed share each; the one that finds all
    parts joins them.

    Args:
        options: The options of the command.
        out: The file that the command writes.
        number: The number of rows.
        key: A digest of all that the results depend on.
        run: Function from the number of a part and the positions of its rows to the content of
            its file; it must be picklable for several processes.
        join: Function from the files of all parts, in order, and the file to write, to the
            message of the command.
    """
    folder = out.with_name(f".{out.name}.{key[:16]}.parts")
    folder.mkdir(exist_ok=True)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    starts = range(0, max(1, number // PART_ROWS) * PART_ROWS, PART_ROWS)  # the last has the rest
    parts = [range(*ends) for ends in zip(starts, [*starts[1:], number])]
    paths = [folder / f"{part:08d}" for part in range(len(parts))]
    own = [*zip(paths, parts)][rank::world]
    with _note_kept_parts(paths), TemporaryDirectory() as taken:
        work = run, own, Path(taken)
        show_bar = options.get("progress", True) and rank == 0
        if (others := options.get("devices", 1) - 1) == 0:
            _make_parts(work, show_bar)
        else:
            device = "cuda" if uses_cuda(options.accelerator) else "cpu"
            run_here = partial(_make_parts, work, show_bar)
            in_processes(_make_parts, [work] * others, device, range(1, others + 1), run_here)
    if all(map(Path.exists, paths)):  # else the process that makes the last part joins
        with suppress(Locked), locked(folder / "lock"):
            if all(map(Path.exists, paths)):  # else another process has joined them meanwhile
                print(join(paths, out))
                for old in out.parent.glob(f".{glob.escape(out.name)}.*.parts"):
                    shutil.rmtree(old, ignore_errors=True)
                return
    print(f"this process has done its parts; the one that finds all of them there writes {out}")


def _make_parts(work: tuple[Run, list[tuple[Path, range]], Path], show_bar: bool = False) -> None:
    """Makes, in order, the parts that do not exist and that no other process has taken.

    Each is written to disk while the next one is made.
    """
    run, parts, taken = work
    with ThreadPoolExecutor(1) as writer:
        last: Future[Any] = writer.submit(int)
        for path, rows in track(parts, "rows, by the thousand", disable=not show_bar):
            if path.exists():
                continue
            try:
                (taken / path.name).touch(exist_ok=False)
            except FileExistsError:  # another process makes it
                continue
            content = run(int(path.name), torch.arange(rows.start, rows.stop))
            last.result()
            last = writer.submit(write, path, content)
        last.result()


@contextmanager
def _note_kept_parts(paths: list[Path]) -> Iterator[None]:
    """Adds to an error how many parts are kept; removes a folder that has none."""
    try:
        yield
    except (KeyboardInterrupt, OSError, ValueError, FloatingPointError) as error:
        if isinstance(error, FileNotFoundError) and not paths[0].parent.exists():
            return  # the same command, given twice, has joined all parts meanwhile
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
    """Returns the SHA-256 of weights, rows, options and the library's version."""
    weights = digest_of(*map(torch.atleast_1d, vae.state_dict().values()))
    text = f"{__version__} {PART_ROWS} {sorted(options.items())} {data.digest()} {weights}"
    return sha256(text.encode()).hexdigest()


def part_seed(seed: int, part: int) -> int:
    """Returns the seed of a part; that of the first part is `seed` itself."""
    return seed_of(seed, part) >> 1 if part else seed
