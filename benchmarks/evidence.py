"""Every estimator of log p(x) on trained models: error against cost; docs/figures.py draws it.

python benchmarks/evidence.py RUN [RUN ...] --root data [--images 200] [--out results]

RUN is a folder of `pyro-vae train` or `benchmarks/mnist.py` on thresholded MNIST. The reference
is a long annealed importance sampling from the fitted proposal, of another seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from pyro_vae import load
from pyro_vae.data import load_data
from pyro_vae.estimators import (
    Evidence,
    annealed_importance_sampling,
    importance_sampling,
    log_evidence,
    refined_importance_sampling,
)

Row = dict[str, float | str]
ais = annealed_importance_sampling
METHODS: dict[str, Callable[..., Evidence]] = {
    **{
        f"encoder, K = {k}": partial(importance_sampling, num_samples=k)
        for k in (50, 500, 5000, 50_000)
    },
    **{
        f"refined, K = {k}": partial(refined_importance_sampling, num_samples=k)
        for k in (1000, 4000)
    },
    "AIS, prior": partial(ais, start="prior", num_temperatures=1000, num_chains=16),
    "AIS, encoder": partial(ais, start="guide", num_temperatures=100, num_chains=16),
    "AIS, refined": partial(ais, start="refined", num_temperatures=20, num_chains=64),
    "log_evidence": log_evidence,
}
REFERENCE = partial(ais, start="refined", num_temperatures=50, num_chains=128, seed=1)


def measure(run: str, x: torch.Tensor, rows: list[Row]) -> Iterator[Row]:
    """A row for each method that has none yet: value, error, share reliable, seconds."""
    done = {row["method"] for row in rows if row["run"] == run}
    if set(METHODS) <= done:
        return
    vae = load(run)
    start = time.perf_counter()
    reference = REFERENCE(vae.model, vae.guide, x)
    print(f"{run}: reference {reference} in {time.perf_counter() - start:.0f} s", flush=True)
    for name, method in METHODS.items():
        if name in done:
            continue
        start = time.perf_counter()
        evidence = method(vae.model, vae.guide, x)
        seconds = time.perf_counter() - start
        error = evidence.log_prob - reference.log_prob
        both = (evidence.stderr**2 + reference.stderr**2).sqrt()
        yield {
            "run": run,
            "method": name,
            "log p(x)": evidence.mean(),
            "Monte Carlo se": evidence.mean_stderr()[0],
            "bias": error.mean().item(),
            "rms": error.pow(2).mean().sqrt().item(),
            "worst": error[error.abs().argmax()].item(),
            "within 2 se": (error.abs() < 2 * both).double().mean().item(),
            "reliable": evidence.verdict.count("reliable") / len(x),
            "seconds": seconds,
        }


def main() -> None:
    """Measures all runs, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--root", default="data")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--out", default="results")
    arguments = parser.parse_args()
    test = load_data("MNIST", root=arguments.root, transform="threshold").test.fixed()
    x, _ = test.batch(torch.arange(arguments.images))
    out = Path(arguments.out)
    out.mkdir(exist_ok=True)
    found = out / "evidence.json"  # kept after each method: a second call goes on from there
    rows = json.loads(found.read_text()) if found.exists() else []
    for run in arguments.runs:
        for row in measure(run, x, rows):
            rows.append(row)
            print(row, flush=True)
            found.write_text(json.dumps(rows, indent=1))
    table = Table(*rows[0], title=f"{arguments.images} test images, nats per image")
    for row in rows:
        table.add_row(*(v if isinstance(v, str) else f"{v:.3f}" for v in row.values()))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
