"""Kills trainings at random moments, the first one inside a checkpoint write, and resumes them.

Each resumed run must end with the weights, the metrics and the table of a callback of the unbroken
one, bit for bit.

    python benchmarks/kill.py [kills] [seed]
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pyro_vae import build, fit
from pyro_vae.cli.figures import KlParts
from pyro_vae.data import load_data
from pyro_vae.training import run_folder

IMPORTED = ("pyro_vae.config", "safetensors.torch", "sklearn.datasets", "torch._dynamo")
BROKEN = 9  # the checkpoint whose write is broken off


def train(run: Path, dies_in_write: bool) -> None:
    """A training from its start or its last checkpoint; a checkpoint every other step."""
    torch.set_num_threads(1)
    data = load_data("digits", transform="dynamic", limit=500)
    torch.manual_seed(0)
    vae = build((1, 8, 8), latent_dim=5, prior={"class_path": "VampPrior"})
    if dies_in_write:
        break_off()
    fit(
        vae,
        data.train,
        run=run,
        resume=True,
        epochs=8,
        batch_size=99,
        validation=data.validation,
        checkpoint_every=2,
        callbacks=[KlParts(run, data.validation)],
        accelerator="cpu",
        progress=False,
    )


def break_off() -> None:
    """Makes this process kill itself when half of a checkpoint's file is written."""
    write, count = run_folder.write, [0]

    def half(path: Path, content: Any) -> None:
        count[0] += path.suffix == ".safetensors"
        if count[0] == BROKEN:
            path.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    run_folder.write = half


def start(context: Any, run: Path, dies_in_write: bool = False) -> Any:
    process = context.Process(target=train, args=(run, dies_in_write))
    process.start()
    while process.is_alive() and not (run / "run.json").exists():
        time.sleep(0.001)
    return process


def outcome(run: Path) -> tuple[list[dict[str, torch.Tensor]], list[Any]]:
    """Weights of the best epoch and of the last, and the tables but for their seconds."""
    tables: list[Any] = []
    for name in ("metrics.csv", "parts.csv"):
        with (run / name).open() as file:
            rows = csv.DictReader(file)
            tables += [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return [run_folder.load_weights(run, which) for which in ("best", "last")], tables


def same(first: Any, second: Any) -> bool:
    pairs = [(a[name], b[name]) for a, b in zip(first[0], second[0]) for name in a]
    return first[1] == second[1] and all(torch.equal(*pair) for pair in pairs)


def left_behind(run: Path) -> tuple[int, bool]:
    """Steps that are kept of a run, and whether a checkpoint is half written."""
    pointers, folder = run / run_folder.POINTERS, run / "checkpoints"
    known = json.loads(pointers.read_text()) if pointers.exists() else {"last": None}
    half = any(path.name not in known.values() for path in folder.glob("step-*"))
    return int(known["last"].split("-")[1]) if known["last"] else 0, half


def killed(process: Any, run: Path, after: int, within: float) -> bool:
    """Kills a training at some moment after a step; whether that was before its end."""
    while process.is_alive() and left_behind(run)[0] < after:
        time.sleep(0.001)
    process.join(random.uniform(0, within))
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def main(kills: int = 60, seed: int = 0) -> int:
    """The number of runs that did not end as the unbroken one.

    Every third run is killed twice, the second time when it has been resumed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    random.seed(seed)
    bad = runs = hit = writes = 0
    with TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        process, began = start(context, whole), time.monotonic()
        process.join()
        unbroken, (steps, _) = outcome(whole), left_behind(whole)
        step = (time.monotonic() - began) / steps
        while hit < kills:
            run, told = Path(name) / f"run-{runs}", []
            for after in sorted(random.choices(range(steps - 4), k=2 if runs % 3 == 2 else 1)):
                process = start(context, run, dies_in_write=not runs)
                hit += killed(process, run, after if runs else steps, 4 * step)
                kept, half = left_behind(run)
                writes += half
                how = "ended before" if process.exitcode == 0 else "killed"
                told.append(f"{how}{' in a write' * half}, {kept} steps kept")
            resumed = start(context, run)
            resumed.join()
            good = resumed.exitcode == 0 and same(outcome(run), unbroken)
            runs, bad = runs + 1, bad + (not good)
            print(f"{runs}: {'; '.join(told)}: {'same' if good else 'OTHER'}", flush=True)
    print(
        f"{runs - bad} of {runs} resumed runs end as the unbroken one; of {hit} kills {writes} "
        "were in a write"
    )
    return bad


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])) > 0)
