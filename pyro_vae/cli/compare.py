"""Compares runs on the same rows: paired differences of log p(x) with their errors."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from pyro_vae.cli.folder import load_run, to_device
from pyro_vae.cli.report import declaration
from pyro_vae.cli.score import estimate, held_out, in_data_units, rows_of
from pyro_vae.data import Splits
from pyro_vae.estimators import Evidence
from pyro_vae.metrics import Difference, paired_difference
from pyro_vae.training import read_run
from pyro_vae.vae import VAE


def compare(options: Namespace) -> None:
    """Prints log p(x) of each run on the same rows, and paired differences with their errors."""
    options.progress &= not options.json
    if len(set(options.runs)) < 2:
        raise ValueError("compare needs two runs or more; for one: pyro-vae evaluate RUN")
    models = {run: replicas(run) for run in options.runs}
    loaded = {run: load_run(run, options.data_root) for runs in models.values() for run in runs}
    first, *others = loaded
    for run in others:
        check_comparable(first, run, loaded, options.part)
    if min(options.limit or 2, len(getattr(loaded[first][1], options.part))) < 2:
        raise ValueError("compare needs two rows or more, for the error of a difference")
    by_run: dict[str, Evidence] = {}
    for run, (vae, splits) in loaded.items():
        splits = replace(splits, seed=loaded[first][1].seed)  # for the same rows and noise
        rows = held_out(splits, options.part, options.limit)
        vae, data = to_device(vae, rows, options.accelerator)
        by_run[run] = in_data_units(estimate(vae, data, options), data)
    by_model = {model: [by_run[run] for run in runs] for model, runs in models.items()}
    tables = {
        model: declaration(Path(run), read_run(run), loaded[run][0])
        for model, (run, *_) in models.items()
    }
    differs = differing({model: own["Model"] | own["Training"] for model, own in tables.items()})
    numbers = comparison(by_model, rows_of(splits, options.part, rows)) | {"differs": differs}
    if options.json:
        print(json.dumps(numbers, indent=1))
        return
    option_table = Table("", *models, title="what differs between them")
    for name, values in differs.items():
        option_table.add_row(name, *values.values())
    for table in (ranking(numbers), *([option_table] if differs else []), differences(numbers)):
        Console().print(table)
    for (a, b), difference in paired_differences(by_model).items():
        print(which_is_better(a, b, difference))


def replicas(run: str) -> list[str]:
    """Returns the runs in a folder of `train --seeds`; of any other folder, the folder itself."""
    runs = [] if (Path(run) / "run.json").exists() else sorted(Path(run).glob("seed-*"))
    return [str(path) for path in runs] or [run]


def check_comparable(
    first_run: str, run: str, loaded: dict[str, tuple[VAE, Splits]], part: str
) -> None:
    """Raises ValueError if the log p(x) of two runs are not of the same quantity."""
    first, data = (getattr(loaded[name][1], part) for name in (first_run, run))
    if data.digest() != first.digest():
        raise ValueError(
            f"{run} and {first_run} have other rows, or other values missing: train both on the "
            "same split"
        )
    if data.transform.binary != first.transform.binary:
        raise ValueError(
            f"{run} and {first_run} do not compare: one models binarised data, the other does not"
        )
    conditions = {name: vae.likelihood.conditioned_on for name, (vae, _) in loaded.items()}
    if conditions[run] != conditions[first_run]:
        what = ", ".join(
            f"{name} log p(x{' | ' + of if of else ''})" for name, of in conditions.items()
        )
        raise ValueError(f"{run} and {first_run} do not compare: {what}")
    masses = [
        vae.likelihood.measure if splits.transform != "dequantise" else [True]
        for vae, splits in (loaded[run], loaded[first_run])
    ]
    one, other = (mass * (data.data_shape.numel() // len(mass)) for mass in masses)
    if one != other:
        raise ValueError(
            f"{run} and {first_run} do not compare: one gives the probability of whole numbers "
            "or intervals, the other a density; train the second on dequantised data, or give "
            "columns the same resolution"
        )


def differing(declared: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Returns the options in which runs differ, each with its value in each run."""
    names = dict.fromkeys(name for options in declared.values() for name in options)
    each = {name: {run: declared[run].get(name, "") for run in declared} for name in names}
    return {name: values for name, values in each.items() if len(set(values.values())) > 1}


def paired_differences(models: dict[str, list[Evidence]]) -> dict[tuple[str, str], Difference]:
    """Returns the paired difference of each two models, over all replicas of each."""
    each = {name: torch.stack([e.log_prob for e in runs]) for name, runs in models.items()}
    return {(a, b): paired_difference(each[a], each[b]) for a, b in combinations(each, 2)}


def ranking(numbers: dict[str, Any]) -> Table:
    """Makes the table of models, from the best, with their errors over data and over seeds."""
    title = f"nats per datum, of {numbers['rows_of']}"
    table = Table("", "run", "log p(x), in the units of the data", "verdict", title=title)
    for rank, name in enumerate(numbers["ranks"], start=1):
        run = numbers["runs"][name]
        value = (
            f"{run['log_prob']:.2f} +- {run['stderr_monte_carlo']:.2g} (Monte Carlo) "
            f"+- {run['stderr_data']:.2g} (data)"
        )
        if len(seeds := run["seeds"]) > 1:
            deviation = torch.tensor(seeds).std().item()
            value = f"{run['log_prob']:.2f}, of {len(seeds)} seeds that deviate by {deviation:.2f}"
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in run["verdicts"].items())
        table.add_row(str(rank), name, value, verdicts)
    return table


def differences(numbers: dict[str, Any]) -> Table:
    """Makes the table of differences of each two models, with errors and P(first is worse)."""
    table = Table("first less second", title="paired differences, nats, +- over data")
    for name in ("difference", "+- over seeds", "P(first is worse)"):
        table.add_column(name, no_wrap=True)
    for d in numbers["differences"]:
        seeds = "unknown" if d["stderr_seeds"] is None else f"{d['stderr_seeds']:.3f}"
        value = f"{d['difference']:.3f} +- {d['stderr_data']:.3f}"
        table.add_row(f"{d['first']} - {d['second']}", value, seeds, f"{d['p_worse']:.2g}")
    return table


def which_is_better(a: str, b: str, d: Difference) -> str:
    """Returns in words which of two models is better, if 95 % sure by Student's t."""
    by = f"{abs(d.mean):.2f} +- {d.stderr:.2g} nats per datum"
    if not abs(d.p_worse - 0.5) > 0.475:
        return f"{a} and {b} are not told apart: they differ by {by}"
    better, worse = (a, b) if d.mean > 0 else (b, a)
    return f"{better} is better than {worse} by {by}"


def comparison(models: dict[str, list[Evidence]], where: str) -> dict[str, Any]:
    """Returns the numbers that `compare` prints, for JSON."""
    runs: dict[str, dict[str, Any]] = {
        model: {
            "log_prob": sum(evidence.mean() for evidence in runs) / len(runs),
            **dict(zip(("stderr_monte_carlo", "stderr_data"), runs[0].mean_stderr())),
            "seeds": [evidence.mean() for evidence in runs],
            "verdicts": dict(Counter(Evidence.cat(runs).verdict)),
        }
        for model, runs in models.items()
    }
    pairs = [
        {
            "first": a,
            "second": b,
            "difference": d.mean,
            "stderr": d.stderr,
            "stderr_data": d.stderr_data,
            "stderr_seeds": None if math.isnan(d.stderr_seeds) else d.stderr_seeds,
            "p_worse": d.p_worse,
        }
        for (a, b), d in paired_differences(models).items()
    ]
    ranks = sorted(runs, key=lambda model: -runs[model]["log_prob"])
    return {"rows_of": where, "ranks": ranks, "runs": runs, "differences": pairs}
