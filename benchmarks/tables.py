"""Cells hidden from two published tables, filled in beside the mean, the mode and chained ridge.

python benchmarks/tables.py DATA [--tables Wine Adult] [--shares 20 50] [--rows 300]

DATA holds the folders Wine and Adult of HI-VAE (Nazabal et al. 2020): data.csv, data_types.csv and
MissingPP_1.csv, the cells to hide. As there the model is trained on the table with its holes, and
judged on the hidden cells: numbers by their root mean squared error over their range, categories
by their share of errors, ordered levels by their mean distance over their number. All methods
see all rows, and all are judged on the same `--rows` rows, spread over the table. For each column
log p(hidden cell | seen cells of its row) of `--conditional` of these rows, beside log p of the
cell alone: the difference is what the row tells.
"""

from __future__ import annotations

import argparse
import csv
import resource
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from torch import Tensor

from pyro_vae import build, fit, impute, log_conditional, log_evidence
from pyro_vae.data import Column, Schema, spread
from pyro_vae.data.schema import infer_column
from pyro_vae.objectives import IWAE

NUMBERS = ("real", "pos", "count")
EPOCHS = {"Wine": 20, "Adult": 4}
NAMES = {
    "Wine": "fixed acidity, volatile acidity, citric acid, residual sugar, chlorides, free sulfur "
    "dioxide, total sulfur dioxide, density, pH, sulphates, alcohol, quality, colour",
    "Adult": "age, work class, final weight, education, marital status, occupation, relationship, "
    "race, sex, capital gain, capital loss, hours",
}


def load(folder: Path, share: int) -> tuple[Tensor, Tensor, Schema, list[str]]:
    """Complete rows as codes, which cells are hidden, the schema, and HI-VAE's types."""
    with (folder / "data.csv").open() as file:
        lines = list(csv.reader(file))
    with (folder / "data_types.csv").open() as file:
        types = [row["type"] for row in csv.DictReader(file)]
    hidden = torch.zeros(len(lines), len(types), dtype=torch.bool)
    places = np.loadtxt(folder / f"Missing{share}_1.csv", delimiter=",", dtype=int)
    hidden[places[:, 0] - 1, places[:, 1] - 1] = True
    cells = [[None if cell.lower() in ("", "nan") else cell for cell in line] for line in lines]
    names = NAMES[folder.name].split(", ")
    columns = {name: [line[d] for line in cells] for d, name in enumerate(names)}
    schema = Schema({n: kind(n, t, columns[n]) for (n, t) in zip(columns, types)})
    rows = schema.encode(columns)
    return rows, hidden & ~rows.isnan(), schema, types


def kind(name: str, declared: str, cells: list[str | None]) -> Column:
    """The type that the table declares; of numbers, what pyro_vae infers."""
    if declared in NUMBERS:
        return infer_column(name, cells)
    levels = tuple(map(int, sorted({float(cell) for cell in cells if cell})))
    coded = "ordinal" if declared == "ordinal" else "binary" if len(levels) == 2 else "category"
    return Column(coded, levels)


def errors(
    found: Tensor, truth: Tensor, hidden: Tensor, types: list[str], schema: Schema
) -> list[float]:
    """The error of each column."""
    each = []
    for d, (declared, column) in enumerate(zip(types, schema.columns.values())):
        a, b = found[hidden[:, d], d].double(), truth[hidden[:, d], d].double()
        if declared in NUMBERS:
            seen = truth[~truth[:, d].isnan(), d]
            error = (a - b).square().mean().sqrt() / (seen.max() - seen.min())
        elif declared == "cat":
            error = (a.round() != b).double().mean()
        else:
            error = (a.round() - b).abs().mean() / len(column.categories)
        each.append(error.item())
    return each


def by_sort(each: list[float], types: list[str]) -> dict[str, str]:
    """Mean error of the columns of each sort."""
    sorts = ["number" if declared in NUMBERS else declared for declared in types]
    pairs = {name: [e for e, sort in zip(each, sorts) if sort == name] for name in sorts}
    return {name: f"{np.mean(values):.4f}" for name, values in pairs.items()}


def mean_or_mode(x: Tensor, types: list[str]) -> Tensor:
    """Means of numbers, medians of ordered levels, modes of categories."""
    filled = x.clone()
    for d, declared in enumerate(types):
        seen = x[~x[:, d].isnan(), d]
        value = {"cat": seen.mode().values, "ordinal": seen.median()}.get(declared, seen.mean())
        filled[x[:, d].isnan(), d] = value
    return filled


def chained(x: Tensor, schema: Schema) -> Tensor:
    """scikit-learn's IterativeImputer on scaled numbers and one-hot categories."""
    parts, sizes = [], []
    for d, column in enumerate(schema.columns.values()):
        size = len(column.categories) if column.kind == "category" else 1
        values = x[:, d : d + 1]
        hot = (values == torch.arange(size)).float().masked_fill(values.isnan(), torch.nan)
        parts.append(hot if size > 1 else values)
        sizes.append(size)
    wide = torch.cat(parts, 1).double().numpy()
    mean, deviation = np.nanmean(wide, 0), np.nanstd(wide, 0)
    made = IterativeImputer(max_iter=5, random_state=0).fit_transform((wide - mean) / deviation)
    pieces = torch.from_numpy(made * deviation + mean).split(sizes, 1)
    found = [p.argmax(1) if p.shape[1] > 1 else p.squeeze(1) for p in pieces]
    return torch.stack([part.float() for part in found], 1)


def ours(
    x: Tensor, schema: Schema, shown: Tensor, epochs: int, options: dict[str, Any]
) -> tuple[Tensor, object]:
    """Columns under IWAE, on incomplete rows the objective of Mattei and Frellsen's MIWAE."""
    torch.manual_seed(0)
    network = {"MLP": {"hidden": [128], "activation": "relu"}}
    given = {"likelihood": schema.likelihood, "encoder": network, "decoder": network}
    vae = build(x.shape[1], 10, **given, missing=True)
    fit(vae, x, IWAE(num_particles=5), epochs=epochs, lr=2e-3, progress=False)
    start, before = time.perf_counter(), processor()
    found = impute(vae, x[shown], **options)
    clock, used = time.perf_counter() - start, processor() - before
    print(f"  impute: {used:.0f} s, {clock:.0f} by the clock, for {len(shown)} rows", flush=True)
    return schema.centre(found.draws, found.mean), vae


def processor() -> float:
    """Seconds of this process and of those that it started and that ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def by_column(vae: object, truth: Tensor, hidden: Tensor) -> list[str]:
    """log p(x_c | what was seen of its row) and log p(x_c) of hidden cells, by column."""
    rows, columns = hidden.nonzero().T
    seen = ~hidden[rows]
    wanted = torch.zeros_like(seen)
    wanted[torch.arange(len(rows)), columns] = True
    cells = truth[rows].masked_fill(~(seen | wanted), torch.nan)
    options = {"audit": False, "tolerance": 0.2}
    given = log_conditional(vae, cells, seen, **options)
    alone = log_evidence(vae, cells.masked_fill(~wanted, torch.nan), **options).log_prob
    lines = []
    for c in range(truth.shape[1]):
        each = given.log_prob[columns == c]
        error = each.std() / len(each) ** 0.5
        values = f"{alone[columns == c].mean():.2f} | {each.mean():.2f} +- {error:.2f}"
        lines.append(f"{values} | {len(each)} |")
    good = given.verdict.count("reliable") / len(rows)
    return [*lines, f"{given.mean():.3f} nats a cell, {len(rows)} cells, {good:.1%} reliable"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--tables", nargs="+", default=["Wine", "Adult"])
    parser.add_argument("--shares", nargs="+", type=int, default=[20, 50])
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--conditional", type=int, default=60, help="rows of log p by column")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--proposal", default="refined", help="of impute, or guide")
    parser.add_argument("--chunk_size", type=int, help="of impute")
    parser.add_argument("--devices", type=int, default=1, help="processes of impute")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for table in options.tables:
        for share in options.shares:
            compare(options.data / table, share, options)


def compare(folder: Path, share: int, options: argparse.Namespace) -> None:
    """One table with one share of hidden cells."""
    truth, hidden, schema, types = load(folder, share)
    x = truth.masked_fill(hidden, torch.nan)
    shown = spread(len(x), options.rows, 0)
    judged = truth, hidden & torch.zeros(len(x), 1).index_fill(0, shown, 1).bool(), types, schema
    print(f"{folder.name}, {share} %", flush=True)
    way = {"num_draws": options.draws, "proposal": options.proposal, "devices": options.devices}
    way["chunk_size"] = options.chunk_size
    filled, vae = ours(x, schema, shown, EPOCHS[folder.name], way)
    each = [
        errors(made, *judged)
        for made in (mean_or_mode(x, types), chained(x, schema), x.index_copy(0, shown, filled))
    ]
    for name, found in zip(("mean, mode", "IterativeImputer", "pyro_vae"), each):
        print(f"  {name}: {by_sort(found, types)}", flush=True)
    few = shown[: options.conditional]
    lines = by_column(vae, truth[few], hidden[few])
    for name, *found, line in zip(schema.columns, *each, lines):
        print(f"| {name} | {' | '.join(f'{e:.3f}' for e in found)} | {line}")
    print(f"  log p(hidden | seen): {lines[-1]}", flush=True)


if __name__ == "__main__":
    main()
