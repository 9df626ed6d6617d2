"""Memory and time of commands on files that grow, of one process and of two.

python benchmarks/scale.py [--most 1000000] [--out scale.json]

Rows of 100 numbers in an .npy file. Memory is the peak of a process above that of the same command
on a thousand rows, which holds the libraries and the model. `score` takes 8 draws of the encoder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS, FEW = 100, 1000
SCORE = ["--num_samples=8", "--chunk_size=8000", "--progress=false"]
MODEL = ["--likelihood=Normal", "--encoder.hidden=[64]", "--decoder.hidden=[64]", "--latent_dim=8"]
TRAIN = [*MODEL, "--epochs=1", "--batch_size=1000", "--progress=false", "--no-compile"]


def write_rows(path: Path, count: int) -> Path:
    """An array of rows with a few directions in common."""
    random = np.random.default_rng(0)
    directions = random.normal(size=(8, COLUMNS)).astype(np.float32)
    with path.open("wb") as file:
        head = {"descr": "<f4", "fortran_order": False, "shape": (count, COLUMNS)}
        np.lib.format.write_array_header_1_0(file, head)
        for done in range(0, count, 10_000):
            size = min(10_000, count - done)
            z, noise = random.normal(size=(size, 8)), random.normal(size=(size, COLUMNS))
            file.write((z @ directions + noise).astype(np.float32).tobytes())
    return path


def command(*arguments: str) -> tuple[float, float]:
    """Seconds of a command, and the peak of its memory in MB."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pyro_vae", *arguments], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"pyro-vae {' '.join(arguments)} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def measure(folder: Path, most: int) -> list[dict[str, Any]]:
    """A line for each command and size."""
    few = write_rows(folder / "few.npy", FEW)
    found: list[dict[str, Any]] = []
    sizes = [size for size in (10_000, 100_000, 1_000_000, 10_000_000) if size <= most]
    run = str(folder / "run")
    start, base = command("train", "--data", str(few), "--run", run, *TRAIN)
    for size in sizes:
        file = str(write_rows(folder / f"{size}.npy", size))
        trained = command("train", "--data", file, "--run", f"{run}-{size}", *TRAIN)
        found.append(line("train, one epoch", 1, size, trained, start, base))
        for name, options in (("score", SCORE), ("encode", ["--out", str(folder / "codes.npz")])):
            zero = command(name, run, str(few), *options)
            cost = command(name, run, file, *options)
            found.append(line(name, 1, size, cost, *zero))
        if size == sizes[min(1, len(sizes) - 1)]:
            zero = command("score", run, str(few), *SCORE, "--devices=2")
            cost = command("score", run, file, *SCORE, "--devices=2", "--seed=1")
            found.append(line("score", 2, size, cost, *zero))
        (folder / f"{size}.npy").unlink()
    return found


def line(
    what: str, processes: int, size: int, cost: tuple[float, float], start: float, base: float
) -> dict[str, Any]:
    """What was seen, above a command on a thousand rows."""
    seconds, memory = cost
    row = {
        "command": what,
        "processes": processes,
        "rows": size,
        "file, MB": size * COLUMNS * 4 / 1e6,
        "memory above, MB": round(memory - base),
        "seconds above": round(seconds - start, 1),
        "rows per second": round((size - FEW) / max(seconds - start, 1e-9)),
    }
    print(" | ".join(map(str, row.values())), flush=True)
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=1_000_000)
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.most)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(rows, indent=1))
