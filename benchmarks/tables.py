"""Cells hidden from two published tables, filled in beside the mean, the mode and chained ridge.

python benchmarks/tables.py DATA [--tables Wine Adult] [--shares 20 50] [--rows 2000]

DATA holds the folders Wine and Adult of HI-VAE (Nazabal et al. 2020): data.csv, data_types.csv and
MissingPP_1.csv, the cells to hide. As there the model is trained on the table with its holes, and
judged on the hidden cells: numbers by their root mean squared error over their range, categories
by their share of errors, ordered levels by their mean distance over their number. All methods
see all rows, and all are judged on the same `--rows` rows, spread over the table.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from torch import Tensor

from pyro_vae import build, fit, impute, log_conditional
from pyro_vae.data import Column, Schema, spread
from pyro_vae.data.schema import inferred
from pyro_vae.objectives import IWAE

NUMBERS = ("real", "pos", "count")
EPOCHS = {"Wine": 60, "Adult": 10}


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
    columns = {f"c{d}": [line[d] for line in cells] for d in range(len(types))}
    schema = Schema({n: kind(n, t, columns[n]) for (n, t) in zip(columns, types)})
    rows = schema.encode(columns)
    return rows, hidden & ~rows.isnan(), schema, types


def kind(name: str, declared: str, cells: list[str | None]) -> Column:
    """The type that the table declares; of numbers, what pyro_vae infers."""
    if declared in NUMBERS:
        return inferred(name, cells)
    levels = tuple(map(int, sorted({float(cell) for cell in cells if cell})))
    coded = "ordinal" if declared == "ordinal" else "binary" if len(levels) == 2 else "category"
    return Column(coded, levels)


def errors(
    found: Tensor, truth: Tensor, hidden: Tensor, types: list[str], schema: Schema
) -> dict[str, float]:
    """Mean error of the columns of each sort."""
    sorts: dict[str, list[float]] = {"number": [], "category": [], "ordinal": []}
    for d, (declared, column) in enumerate(zip(types, schema.columns.values())):
        a, b = found[hidden[:, d], d].double(), truth[hidden[:, d], d].double()
        if declared in NUMBERS:
            seen = truth[~truth[:, d].isnan(), d]
            error = (a - b).square().mean().sqrt() / (seen.max() - seen.min())
            sorts["number"].append(error.item())
        elif declared == "cat":
            sorts["category"].append((a.round() != b).double().mean().item())
        else:
            error = (a.round() - b).abs().mean() / len(column.categories)
            sorts["ordinal"].append(error.item())
    return {name: float(np.mean(values)) for name, values in sorts.items() if values}


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


def ours(x: Tensor, schema: Schema, shown: Tensor, epochs: int) -> tuple[Tensor, object]:
    """Columns under IWAE, on incomplete rows the objective of Mattei and Frellsen's MIWAE."""
    torch.manual_seed(0)
    network = {"class_path": "MLP", "init_args": {"hidden": [128, 128], "activation": "relu"}}
    vae = build(
        x.shape[1],
        10,
        likelihood=schema.likelihood,
        encoder=network,
        decoder=network,
        missing=True,
    )
    fit(vae, x, IWAE(num_particles=5), epochs=epochs, lr=2e-3, progress=False)
    start = time.perf_counter()
    found = impute(vae, x[shown], num_draws=100)
    print(f"  impute: {time.perf_counter() - start:.0f} s for {len(shown)} rows", flush=True)
    return schema.centre(found.draws, found.mean), vae


def by_column(vae: object, truth: Tensor, hidden: Tensor, types: list[str]) -> list[str]:
    """log p(x_c | what was seen of its row) of hidden cells, averaged over each column."""
    rows, columns = hidden.nonzero().T
    seen = ~hidden[rows]
    wanted = torch.zeros_like(seen)
    wanted[torch.arange(len(rows)), columns] = True
    cells = truth[rows].masked_fill(~(seen | wanted), torch.nan)
    found = log_conditional(vae, cells, seen, audit=False)
    lines = []
    for c, declared in enumerate(types):
        each = found.log_prob[columns == c]
        if len(each):
            error = each.std() / len(each) ** 0.5
            mean = f"{each.mean():.2f} +- {error:.2f} nats"
            lines.append(f"  column {c}, {declared}: {mean}, {len(each)} cells")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--tables", nargs="+", default=["Wine", "Adult"])
    parser.add_argument("--shares", nargs="+", type=int, default=[20, 50])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument(
        "--conditional", type=int, default=200, help="rows of log p(hidden | seen)"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for table in options.tables:
        for share in options.shares:
            truth, hidden, schema, types = load(options.data / table, share)
            x = truth.masked_fill(hidden, torch.nan)
            shown = spread(len(x), options.rows, 0)
            judged = truth, hidden & torch.zeros(len(x), 1).index_fill(0, shown, 1).bool(), types
            print(f"{table}, {share} %", flush=True)
            print("  mean, mode:", errors(mean_or_mode(x, types), *judged, schema), flush=True)
            start = time.perf_counter()
            print("  IterativeImputer:", errors(chained(x, schema), *judged, schema), flush=True)
            print(f"  {time.perf_counter() - start:.0f} s", flush=True)
            start = time.perf_counter()
            some, vae = ours(x, schema, shown, EPOCHS[table])
            found = x.clone()
            found[shown] = some
            print("  pyro_vae:", errors(found, *judged, schema), flush=True)
            print(f"  {time.perf_counter() - start:.0f} s, training included", flush=True)
            rows = shown[: options.conditional]
            given = log_conditional(vae, truth[rows], ~hidden[rows], audit=False)
            each = given.log_prob.sum().item() / hidden[rows].sum().item()
            print(f"  log p(hidden | seen): {each:.3f} nats a cell, {len(rows)} rows", flush=True)
            print(*by_column(vae, truth[rows], hidden[rows], types), sep="\n", flush=True)


if __name__ == "__main__":
    main()
