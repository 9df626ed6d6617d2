"""Memory and time of commands on files that grow, of one process and of two.

python benchmarks/scale.py [--sizes 10000 100000 1000000] [--columns 100] [--out scale.json]

Rows of numbers in an .npy file. Memory is the peak of a process above that of the same command on
a thousand rows, which holds the libraries and the model. Seconds are those of the wall and, of all
its processes together, of a processor. `score` takes 8 draws of the encoder.
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

FEW = 1000
Cost = tuple[float, float, float]  # seconds of the wall, of processors, MB at the peak
SCORE = ["--num_samples=8", "--chunk_size=8000", "--progress=false"]
MODEL = ["--likelihood=Normal", "--encoder.hidden=[64]", "--decoder.hidden=[64]", "--latent_dim=8"]
TRAIN = [*MODEL, "--epochs=1", "--batch_size=1000", "--progress=false", "--no-compile"]


def write_rows(path: Path, count: int, columns: int) -> Path:
    """An array of rows with a few directions in common."""
    random = np.random.default_rng(0)
    directions = random.normal(size=(8, columns)).astype(np.float32)
    rows = np.lib.format.open_memmap(path, "w+", "<f4", (count, columns))
    for done in range(0, count, 10_000):
        part = rows[done : done + 10_000]
        part[:] = random.normal(size=(len(part), 8)) @ directions + random.normal(size=part.shape)
    rows.flush()
    return path


def command(*arguments: str) -> Cost:
    """What a command costs, with the processes that it starts."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pyro_vae", *arguments], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"pyro-vae {' '.join(arguments)} failed")
    processor = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - began, processor, usage.ru_maxrss / 1024


def measure(folder: Path, sizes: list[int], columns: int) -> list[dict[str, Any]]:
    """A line for each command and size."""
    files = {
        size: str(write_rows(folder / f"{size}.npy", size, columns)) for size in (FEW, *sizes)
    }
    run = str(folder / "run")

    def train(file: str) -> Cost:
        return command("train", "--data", file, "--run", f"{run}{Path(file).stem}", *TRAIN)

    trained = train(files[FEW])
    run_of_few = f"{run}{FEW}"

    def score(file: str, *more: str) -> Cost:
        return command("score", run_of_few, file, *SCORE, *more)

    def encode(file: str) -> Cost:
        return command("encode", run_of_few, file, "--out", str(folder / "codes.npz"))

    found: list[dict[str, Any]] = []
    base = score(files[FEW])
    found += [line("score", 1, size, score(files[size]), base) for size in sizes]
    base = score(files[FEW], "--devices=2")
    both = score(files[sizes[-1]], "--devices=2", "--seed=1")
    found.append(line("score", 2, sizes[-1], both, base))
    found += [line("train, one epoch", 1, size, train(files[size]), trained) for size in sizes]
    base = encode(files[FEW])
    return found + [line("encode", 1, size, encode(files[size]), base) for size in sizes]


def line(what: str, processes: int, size: int, cost: Cost, base: Cost) -> dict[str, Any]:
    """What was seen, above a command on a thousand rows."""
    seconds, processor, memory = (total - start for total, start in zip(cost, base))
    row = {
        "command": what,
        "processes": processes,
        "rows": size,
        "memory above, MB": round(memory),
        "seconds above": round(seconds, 1),
        "processor seconds above": round(processor, 1),
        "microseconds of a processor a row": round(processor / (size - FEW) * 1e6, 1),
    }
    print(" | ".join(map(str, row.values())), flush=True)
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.sizes, arguments.columns)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(rows, indent=1))
