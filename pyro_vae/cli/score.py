"""Estimates log p(x) of the rows of a file, of a batch, or of a part of a run's data."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from torch import Tensor

from pyro_vae import config
from pyro_vae.arguments import as_tensor, check_options, check_whole
from pyro_vae.classes import ClassVAE
from pyro_vae.cli.folder import (
    as_trained,
    destination,
    load_run,
    load_with_record,
    load_with_rows,
    to_device,
)
from pyro_vae.cli.stream import key_of, part_seed, stream
from pyro_vae.data import Data, Splits, spread
from pyro_vae.data.tables import label_column, read_rows_of_table
from pyro_vae.densities import NotSimulated
from pyro_vae.estimators import Evidence, column_log_prob, importance_sampling, log_evidence
from pyro_vae.estimators.log_evidence import kept_audit
from pyro_vae.files import as_csv, write
from pyro_vae.metrics import p_values
from pyro_vae.runtime import forked
from pyro_vae.vae import VAE

Estimate = Callable[..., Evidence]
COMPUTE = ("chunk_size", "compile")
RESULT_OPTIONS = ("tolerance", "num_samples", "columns", "p_values", "seed", *COMPUTE)
NO_SCORES = {"log_prob": np.zeros(0), "stderr": np.zeros(0), "verdict": np.zeros(0, str)}
LOG_EVIDENCE_OPTIONS = tuple(inspect.signature(log_evidence).parameters)[4:]  # after y


def held_out(splits: Splits, part: str, limit: int | None) -> Data:
    """Returns at most `limit` rows from all over a part, with their noise drawn once."""
    data: Data = getattr(splits, part)
    return data.subset(spread(len(data), limit, splits.seed)).fixed(splits.seed)


def rows_of(splits: Splits, part: str, data: Data) -> str:
    """Returns in words which rows of a part `data` holds."""
    whole = len(getattr(splits, part))
    if len(data) == whole:
        return f"all {whole} rows of the {part} part"
    return f"{len(data)} of {whole} rows of the {part} part, spread over it (seed {splits.seed})"


def estimate(vae: VAE, data: Data, options: Namespace) -> Evidence:
    """Estimates log p(x) of all rows by `log_evidence`."""
    found: Evidence = config.call_with(log_evidence, vars(options), vae, *data.batch())
    return found


def in_data_units(evidence: Evidence, data: Data) -> Evidence:
    """Returns the evidence in the units of the data before their transform."""
    return replace(evidence, log_prob=evidence.log_prob + data.log_jacobians)


def by_column(vae: VAE, data: Data, **options: Any) -> Tensor:
    """Estimates log p(x_c | the other columns) [N, C] in the units of the data; NaN if missing.

    Raises:
        ValueError: If the data are no table.
    """
    if len(data.data_shape) != 1:
        raise ValueError("columns are those of tables: leave --columns out")
    found = column_log_prob(vae, *data.batch(), **options)
    return found + torch.as_tensor(data.transform.log_slope()).to(found)


def score(options: Namespace) -> None:
    """Writes log p(x), standard error and verdict of each row of a file, as CSV.

    With `--num_samples`, log p(x) is a lower bound from so many draws of the encoder.
    `--p_values` adds the rank of each row among held-out rows and among draws of the model;
    `--columns` adds log p of each value given the others of its row.
    """
    check_whole(0, p_values=options.p_values)
    out = destination(options.out, ".scores.csv", (".csv",), options.file)
    vae, data = load_with_rows(options)
    estimate = _estimator(vae, data, options)
    references = _reference_scores(vae, estimate, options)
    result = {"sums": True} | {name: options[name] for name in RESULT_OPTIONS}
    run = partial(_score_part, vae, data, options, estimate, references)
    stream(options, out, len(data), key_of(vae, data, result), run, join_scores)


def _estimator(vae: VAE, data: Data, options: Namespace) -> Estimate:
    """Returns the estimator of log p(x) for parts of the rows, with one audit for all parts."""
    work = {name: options[name] for name in COMPUTE}
    if options.num_samples is not None:
        return partial(importance_sampling, vae, num_samples=options.num_samples, **work)
    audit: Any = True  # one audit for each part
    if not isinstance(vae, ClassVAE):
        first = data.subset(torch.arange(min(len(data), 1000)))
        same = {name: options[name] for name in ("tolerance", "chunk_size", "seed")}
        with suppress(NotSimulated):
            audit = kept_audit(vae.model, vae.guide, *first.batch(), budget=None, **same)
    return partial(log_evidence, vae, tolerance=options.tolerance, audit=audit, **work)


def _reference_scores(vae: VAE, estimate: Estimate, options: Namespace) -> dict[str, Tensor]:
    """Estimates log p(x) of held-out rows and of as many draws of the model, for p-values."""
    if not options.p_values:
        return {}
    from pyro_vae.cli.figures import condition  # not above: it imports matplotlib

    _, splits = load_run(options.run, None)
    test = held_out(splits, "test", options.p_values)
    y = test.y if test.y is not None else condition(test, len(test), None, vae)
    with forked(torch.device("cpu"), options.seed), torch.no_grad():
        x = vae.cpu().sample(len(test), y)
    found = {}
    for i, (name, rows) in enumerate(
        {"p_held_out": test, "p_simulated": replace(test, x=x)}.items()
    ):
        rows = to_device(vae, rows, options.accelerator)[1]
        evidence = estimate(*rows.batch(), seed=part_seed(options.seed, 2**32 + i))
        found[name] = in_data_units(evidence, rows).log_prob
    return found


def _score_part(
    vae: VAE,
    data: Data,
    options: Namespace,
    estimate: Estimate,
    references: dict[str, Tensor],
    part: int,
    rows: Tensor,
) -> bytes:
    """Returns the lines of a part, below a line of sums for the averages over all parts."""
    seed, part_rows = part_seed(options.seed, part), data.subset(rows)
    work = {name: options[name] for name in COMPUTE}
    each = by_column(vae, part_rows, seed=seed, **work) if options.columns else None
    evidence = in_data_units(estimate(*part_rows.batch(), seed=seed), part_rows)
    ranks = {name: p_values(evidence.log_prob, other) for name, other in references.items()}
    value = evidence.log_prob.double()
    sums = {
        "rows": len(value),
        "log_prob": value.sum().item(),
        "square": (value**2).sum().item(),
        "variance": (evidence.stderr.double() ** 2).sum().item(),
        "annealed": sum(method.startswith("annealed") for method in evidence.method),
    }
    head = json.dumps([sums, Counter(evidence.verdict)])
    return f"{head}\n{csv_lines(rows, evidence, ranks, each, data, part == 0)}".encode()


def csv_lines(
    rows: Tensor,
    evidence: Evidence,
    ranks: dict[str, Tensor],
    each: Tensor | None,
    data: Data,
    first: bool,
) -> str:
    """Returns the CSV lines of the rows of a part, below the header if it is the first part."""
    names = data.columns or range(data.data_shape.numel())
    values = [] if each is None else list(each.T)
    heads = [f"log_prob of {name}" for name, _ in zip(names, values)]
    head = ["row", "log_prob", "stderr", "verdict", "method", *ranks, *heads]
    table = zip(
        rows.tolist(),
        _as_text(evidence.log_prob),
        _as_text(evidence.stderr),
        evidence.verdict,
        evidence.method,
        *map(_as_text, [*ranks.values(), *values]),
    )
    return as_csv([head, *table] if first else table)


def _as_text(values: Tensor) -> Iterator[str]:
    """Yields each value with six decimals, and "" for NaN."""
    return ("" if value != value else f"{value:.6f}" for value in values.tolist())


def join_scores(parts: list[Path], out: Path) -> str:
    """Writes the file from all parts; returns the message about it."""
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
    variance = max(0.0, sums["square"] / count - mean**2) / max(1, count - 1)
    spread = f" +- {math.sqrt(variance):.2f} (data)" if count > 1 else ""
    words = ", ".join(f"{n} of {count} {verdict}" for verdict, n in verdicts.items())
    words += f", {sums['annealed']} by AIS" if sums["annealed"] else ""
    return (
        f"log p(x) = {mean:.2f} +- {math.sqrt(sums['variance']) / count:.2f} (Monte Carlo)"
        f"{spread}, in the file's units; {words}; rows in {out}"
    )


class Scorer:
    """A function of a batch of rows that adds log p(x) of each row to the batch.

    Ray Data's `map_batches`, Dask's `map_partitions` and Spark's `mapInPandas` take it. It is
    small to send: it holds only the path of the run, which each process loads once. The noise of
    a row, and so its log p(x) within the standard error, depends on its place in the batch.

    Args:
        run: A run folder of `pyro-vae train`, which every machine can read.
        options: Options of `log_evidence`, such as `tolerance`.

    Raises:
        ValueError: If the folder holds no run, or one that is not complete.
    """

    def __init__(self, run: str | os.PathLike[str], **options: Any) -> None:
        check_options("log_evidence", options, LOG_EVIDENCE_OPTIONS)
        self.run, self.options = os.path.abspath(run), options
        self._loaded: Any = load_with_record(self.run)  # now, to see a broken run early

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_loaded": None}

    def __call__(self, batch: Any) -> Any:
        """Adds the columns "log_prob" (nats, in the data's own units), "stderr" and "verdict".

        Args:
            batch: A pandas frame, or a mapping of arrays: "x" [N, *E] (and "y" [N, C] or
                "labels" [N]), or the columns of a table by name. Other entries, such as ids or
                scalars, are passed on.

        Raises:
            ValueError: If the rows are not of the kind that the run was trained on.
        """
        is_mapping = isinstance(batch, Mapping)
        if not is_mapping and not hasattr(batch, "assign"):
            raise ValueError(
                "a batch must be a pandas frame or a mapping of arrays; got "
                f"{type(batch).__name__}"
            )
        columns = {k: v for k, v in batch.items() if _is_column(v)} if is_mapping else batch
        cells = columns.values() if is_mapping else [batch.index]
        scores = NO_SCORES
        if {*map(len, cells)} != {0}:
            vae, known = self._loaded = self._loaded or load_with_record(self.run)
            rows = as_trained(_rows(columns, known), known, vae)
            evidence = in_data_units(log_evidence(vae, *rows.batch(), **self.options), rows)
            log_prob, stderr = evidence.log_prob.numpy(), evidence.stderr.numpy()
            verdict = np.array(evidence.verdict)
            scores = {"log_prob": log_prob, "stderr": stderr, "verdict": verdict}
        return {**batch, **scores} if is_mapping else batch.assign(**scores)


def _rows(batch: Any, known: dict[str, Any]) -> Data:
    """Returns the rows of a batch, untransformed."""
    schema, names = known["schema"], known.get("rows", {}).get("columns")
    if isinstance(batch, Mapping) and "x" in batch and "x" not in (names or ()):
        labels = batch.get("labels") if known["conditional"] else None
        return Data(batch["x"], batch.get("y"), labels, name="the batch")
    cells = {str(name): batch[name] for name in batch}
    if len(cells) < len(list(batch)):
        raise ValueError(
            "the batch: expected columns of different names; got "
            f"{', '.join(map(str, batch))}: rename those that are there twice"
        )
    label = label_column("the batch", [*cells]) if known["conditional"] else []
    if names is not None and cells.keys() >= set(names):
        cells = {name: cells[name] for name in [*names, *label]}
    if len(lengths := {*map(len, cells.values())}) != 1:
        raise ValueError(
            "the batch: expected columns of one length; got "
            f"{', '.join(map(str, sorted(lengths))) or 'no column'}"
        )
    if schema is not None:
        import pandas as pd

        return read_rows_of_table(pd.DataFrame(cells), schema)
    columns = {name: _column(f"the batch: {name}", cell) for name, cell in cells.items()}
    labels = None
    for name in label:
        given = columns.pop(name).nan_to_num(nan=-1.0)
        whole = given.long()
        labels = whole if torch.equal(whole.float(), given) else given
    x = torch.stack([*columns.values()], 1)
    return Data(x, labels=labels, name="the batch", columns=tuple(columns))


def _is_column(cell: Any) -> bool:
    return hasattr(cell, "__len__") and not isinstance(cell, str) and getattr(cell, "ndim", 1) > 0


def _column(name: str, cell: Any) -> Tensor:
    """Returns a column as float32, also if it holds objects such as Decimals or texts."""
    if isinstance(getattr(cell, "dtype", None), np.dtypes.ObjectDType):
        with suppress(TypeError, ValueError):  # the next line raises a plainer error
            cell = np.asarray(cell, np.float64)
    return as_tensor(name, cell).float()
