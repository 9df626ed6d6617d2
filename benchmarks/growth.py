"""How the cost of `fit` grows: batch, latent size, draws, rows on disk; and of an epoch's frame.

python benchmarks/growth.py [--threads 2] [--series rows] [--out growth.json]

Steps of a 784-500 tanh-D VAE: median over 60 steps, as a ratio to the first of each series. Rows
on disk are those of an .npy file of ten numbers each, visited in random order. The frame of an
epoch is its whole time (60,000 rows, validation on 10,000, metrics and checkpoint) by the sum of
its steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae import build, fit
from pyro_vae.data.mapped import mapped
from pyro_vae.objectives import ELBO, IWAE
from pyro_vae.training.dataset import TensorDataset

STEPS, SKIPPED, COLUMNS = 60, 10, 10
SERIES: dict[str, list[int]] = {
    "batch": [10, 32, 100, 320, 1000],
    "latent size": [2, 10, 50, 200],
    "draws": [1, 5, 50],
    "rows": [10_000, 100_000, 1_000_000, 10_000_000],
}


class Enough(Exception):
    """Ends a training."""


class Timed(TensorDataset):
    """Rows that note when a batch is asked for."""

    def attach(self, steps: float) -> Timed:
        vars(self).update(marks=[], steps=steps)
        return self

    def to(self, device: torch.device) -> Timed:
        return self

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        if len(self.marks) > self.steps:
            raise Enough
        self.marks.append(time.perf_counter())
        return super().batch(index)


def step_ms(rows: Timed, latent: int = 20, draws: int = 1, batch: int = 100) -> float:
    """Median milliseconds of a step."""
    hidden = {"class_path": "MLP", "init_args": {"hidden": [500]}}
    vae = build(rows.x.shape[1:], latent, encoder=hidden, decoder=hidden)
    vae.initialised.fill_(True)
    objective = ELBO() if draws == 1 else IWAE(draws)
    rows.attach(STEPS + SKIPPED)
    try:
        fit(vae, rows, objective, epochs=1000, batch_size=batch, progress=False)
    except Enough:
        pass
    return median(b - a for a, b in pairwise(rows.marks[SKIPPED:])) * 1e3


def pixels(count: int = 20_000) -> Timed:
    """Binary rows."""
    return Timed(torch.bernoulli(torch.full((count, 784), 0.2)))


def on_disk(path: Path, count: int) -> Timed:
    """Rows of an .npy file that stay there, which is written first."""
    random = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(path, "w+", "<f4", (count, COLUMNS))
    for done in range(0, count, 100_000):
        part = rows[done : done + 100_000]
        part[:] = random.random(part.shape, np.float32) < 0.2
    rows.flush()
    return Timed(mapped(path, torch.from_numpy, path.name))  # type: ignore[arg-type]


def grow(what: str, values: list[int]) -> list[dict[str, Any]]:
    """One series."""
    rows = []
    for value in values:
        if what == "rows":
            with tempfile.TemporaryDirectory() as folder:
                ms = step_ms(on_disk(Path(folder) / "rows.npy", value))
        elif what == "draws":
            ms = step_ms(pixels(), draws=value, batch=20)
        else:
            ms = step_ms(pixels(), **{{"batch": "batch", "latent size": "latent"}[what]: value})
        rows.append({"series": what, "value": value, "ms": ms})
        ratio = ms / rows[0]["ms"]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows[-1] |= {"ratio": ratio, "MB so far": memory}
        print(f"{what:12} {value:>10,}  {ms:8.2f} ms  {ratio:6.2f}  {memory:.0f} MB", flush=True)
    return rows


def frame() -> float:
    """An epoch's whole time by the sum of its steps."""
    train, validation = pixels(60_000).attach(float("inf")), pixels(10_000).x
    vae = build((784,), 20)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = {"epochs": 2, "batch_size": 100, "validation": validation, "progress": False}
        history = fit(vae, train, run=run, **options)
    steps = [b - a for a, b in pairwise(train.marks[-600:])]
    whole = history.rows[-1]["seconds"]
    print(f"frame of an epoch: {whole:.2f} s by {median(steps) * 600:.2f} s of steps")
    return whole / (sum(steps) * 600 / 599)


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """All series."""
    warnings.simplefilter("ignore", UserWarning)  # random pixels have nothing to encode
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = [row for what in arguments.series for row in grow(what, SERIES[what])]
    result = {"threads": arguments.threads, "rows": rows}
    if arguments.series == [*SERIES]:
        result["frame"] = frame()
        print(f"frame of an epoch: {result['frame']:.3f} of its steps")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--series", nargs="+", choices=SERIES, default=[*SERIES])
    parser.add_argument("--out", help="JSON file")
    main(parser.parse_args())
