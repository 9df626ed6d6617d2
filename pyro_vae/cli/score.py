"""log p(x) of each row of a file, written as it is found."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor

from pyro_vae import config
from pyro_vae.arguments import check_whole
from pyro_vae.classes import ClassVAE
from pyro_vae.cli.folder import destination, load_run, own_rows, placed
from pyro_vae.cli.judge import by_column, held_out, shifted
from pyro_vae.cli.stream import Job, key_of, part_seed, stream
from pyro_vae.data import Data
from pyro_vae.densities import NotSimulated
from pyro_vae.estimators import Evidence, importance_sampling, log_evidence
from pyro_vae.estimators.log_evidence import kept_audit
from pyro_vae.files import as_csv, write
from pyro_vae.metrics import p_values
from pyro_vae.runtime import forked
from pyro_vae.vae import VAE

__all__ = ["score"]

Estimate = Callable[[Data, int], Evidence]
WORK = ("chunk_size", "compile")
RESULT = ("tolerance", "num_samples", "columns", "p_values", "seed", *WORK)


def score(options: Namespace) -> None:
    """log p(x), standard error and verdict of each row of a file, as CSV.

    With `--num_samples` draws of the encoder, a lower bound; with `--p_values` the rank of each
    row among held-out rows and among rows that the model draws; with `--columns` also log p of
    each value given the others of its row.
    """
    check_whole(0, p_values=options.p_values)
    default = Path(options.file).with_suffix(".scores.csv")
    out = destination(options.out, default, (".csv",), options.file)
    stream(job(options), options, out)


def job(options: Namespace) -> Job:
    """The scoring of a file."""
    vae = config.load(options.run)
    vae, data = placed(vae, own_rows(options.run, options.file, vae), options.accelerator)
    estimate = estimator(vae, data, options)
    among = references(vae, estimate, options)
    result = {"sums": True} | {name: options[name] for name in RESULT}
    run = partial(scored, vae, data, options, estimate, among)
    return Job(len(data), partial(key_of, vae, data, result), run, joined)


def scored(
    vae: VAE,
    data: Data,
    options: Namespace,
    estimate: Estimate,
    among: dict[str, Tensor],
    part: int,
    rows: Tensor,
) -> bytes:
    """The lines of a part, below one of their sums."""
    seed, some = part_seed(options.seed, part), data.subset(rows)
    work = {name: options[name] for name in WORK}
    each = by_column(vae, some, seed=seed, **work) if options.columns else None
    evidence = estimate(some, seed)
    ranks = {name: p_values(evidence.log_prob, other) for name, other in among.items()}
    sums = json.dumps([sums_of(evidence), Counter(evidence.verdict)])
    return f"{sums}\n{lines(rows, evidence, ranks, each, data, part == 0)}".encode()


def estimator(vae: VAE, data: Data, options: Namespace) -> Estimate:
    """What gives log p(x) of some of the rows from a seed, held to one audit for all."""
    if options.num_samples is not None:
        draws = {name: options[name] for name in ("num_samples", *WORK)}
        return partial(estimated, partial(importance_sampling, **draws), vae)
    same: dict[str, Any] = {"tolerance": options.tolerance, "chunk_size": options.chunk_size}
    audit: Any = True  # for each part
    if not isinstance(vae, ClassVAE):
        first = data.subset(torch.arange(min(len(data), 1000)))
        with suppress(NotSimulated):
            audit = kept_audit(
                vae.model, vae.guide, *first.batch(), budget=None, seed=options.seed, **same
            )
    same |= {"audit": audit, "compile": options.compile}
    return partial(estimated, partial(log_evidence, **same), vae)


def estimated(estimate: Callable[..., Evidence], vae: VAE, rows: Data, seed: int) -> Evidence:
    """Evidence of rows, from a seed, in their own units."""
    return shifted(estimate(vae, *rows.batch(), seed=seed), rows)


def references(vae: VAE, estimate: Estimate, options: Namespace) -> dict[str, Tensor]:
    """log p(x) of held-out rows, and of as many that the model draws, where they are asked for."""
    if not options.p_values:
        return {}
    from pyro_vae.cli.figures import condition  # and with it what draws them

    _, splits = load_run(options.run, None)
    held = held_out(splits, "test", options.p_values)
    y = held.y if held.y is not None else condition(held, len(held), None, vae)
    with forked(torch.device("cpu"), options.seed), torch.no_grad():
        x = vae.cpu().sample(len(held), y)
    found = {"p_held_out": held, "p_simulated": replace(held, x=x)}
    found = {name: placed(vae, rows, options.accelerator)[1] for name, rows in found.items()}
    return {
        name: estimate(rows, part_seed(options.seed, 2**32 + i)).log_prob
        for i, (name, rows) in enumerate(found.items())
    }


def lines(
    rows: Tensor,
    evidence: Evidence,
    ranks: dict[str, Tensor],
    each: Tensor | None,
    data: Data,
    first: bool,
) -> str:
    """Lines of the CSV for the rows of a part, under its head where it is the first."""
    names = data.columns or range(data.data_shape.numel())
    heads = [f"log_prob of {name}" for name in names] if each is not None else []
    head = ["row", "log_prob", "stderr", "verdict", "method", *ranks, *heads]
    table = zip(
        rows.tolist(),
        numbers(evidence.log_prob),
        numbers(evidence.stderr),
        evidence.verdict,
        evidence.method,
        *(numbers(rank) for rank in ranks.values()),
        *(() if each is None else map(numbers, each.T)),
    )
    return as_csv([head, *table] if first else table)


def numbers(values: Tensor) -> Iterator[str]:
    """Each with six decimals; nothing for NaN."""
    return ("" if value != value else f"{value:.6f}" for value in values.tolist())


def sums_of(evidence: Evidence) -> dict[str, float]:
    """What averages over all parts are made of."""
    value, variance = evidence.log_prob.double(), evidence.stderr.double() ** 2
    return {
        "rows": len(value),
        "log_prob": value.sum().item(),
        "square": (value**2).sum().item(),
        "variance": variance.sum().item(),
        "annealed": sum(method.startswith("annealed") for method in evidence.method),
    }


def joined(parts: list[Path], out: Path) -> str:
    """Writes the file of all parts; what is to be said of it."""
    sums, verdicts = Counter[str](), Counter[str]()

    def blocks() -> Iterator[bytes]:
        for part in parts:
            head, _, below = part.read_bytes().partition(b"\n")
            for total, more in zip((sums, verdicts), json.loads(head)):
                total.update(more)
            yield below

    write(out, blocks())
    count = sums["rows"]
    mean = sums["log_prob"] / count
    spread = math.sqrt(max(0.0, sums["square"] / count - mean**2) / max(1, count - 1))
    words = ", ".join(f"{n} of {count} {verdict}" for verdict, n in verdicts.items())
    words += f", {sums['annealed']} by AIS" if sums["annealed"] else ""
    return (
        f"log p(x) = {mean:.2f} +- {math.sqrt(sums['variance']) / count:.2f} (Monte Carlo) "
        f"+- {spread:.2f} (data), in the file's units; {words}; rows in {out}"
    )
