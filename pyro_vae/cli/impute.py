"""Files with their missing values filled in."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from torch import Tensor

from pyro_vae import config, estimators
from pyro_vae.arguments import check_whole
from pyro_vae.cli.folder import own_rows, placed
from pyro_vae.cli.use import destination
from pyro_vae.data import Data, read_rows
from pyro_vae.files import write
from pyro_vae.vae import VAE

__all__ = ["impute"]


def impute(options: Namespace) -> None:
    """The file with what is missing filled in: by its mean (median of whole numbers), and draws.

    Observed values are those of the file; the others are in its units.
    """
    check_whole(0, draws=options.draws)
    source = Path(options.file)
    vae = config.load(options.run)
    vae, rows = placed(vae, own_rows(options.run, options.file, vae), options.accelerator)
    suffix = source.suffix if rows.schema is None else ".csv"
    default = source.with_suffix(f".imputed{suffix}")
    out = destination(options.out, default, (suffix,), options.file)
    if suffix not in (".csv", ".npy", ".npz"):
        raise ValueError(f"expected a .csv, .npy or .npz file to impute; got {source}")
    given = read_rows(source) if rows.schema is None else rows
    x, y = rows.batch(torch.arange(len(rows)))
    found = estimators.impute(
        vae,
        x,
        y,
        num_draws=max(options.draws, 100 if _whole(vae) or rows.schema is not None else 1),
        **{name: options[name] for name in ("chunk_size", "compile", "devices", "seed")},
        progress=options.progress,
    )
    for i, draw in enumerate(found.draws[: options.draws], start=1):
        path = out.with_name(f"{out.stem}-{i:0{len(str(options.draws))}d}{out.suffix}")
        write(path, _content(given, rows, draw, out.suffix))
    best = found.median if _whole(vae) else found.mean
    if rows.schema is not None:
        best = rows.schema.centre(found.draws, found.mean)
    write(out, _content(given, rows, best, out.suffix))
    verdicts = ", ".join(f"{n} {word}" for word, n in Counter(found.verdict).items())
    share = x.isnan().double().mean().item()
    beside = f" and {options.draws} files of draws beside it" if options.draws else ""
    print(f"{share:.1%} of the values of {len(rows)} rows filled in ({verdicts}): {out}{beside}")


def _whole(vae: VAE) -> bool:
    """Whether its data are whole numbers, of which a mean is none."""
    return vae.likelihood.support.is_discrete


def _content(given: Data, rows: Data, values: Tensor, suffix: str) -> str | bytes:
    """A file like `given`, what is missing from it filled in from `values` of `rows`."""
    filled = rows.transform.inverse(values.cpu())
    if given.columns is not None and rows.columns is not None:
        filled = filled[:, [rows.columns.index(name) for name in given.columns]]
    complete = torch.where(given.x.isnan(), filled.to(given.x.dtype), given.x)
    if rows.schema is not None:
        return rows.schema.csv(complete)
    x = complete.numpy()
    if suffix == ".csv":
        return _table(given, x)
    file = io.BytesIO()
    parts: dict[str, Any] = {"x": x, "y": given.y, "labels": given.labels}
    if suffix == ".npy":
        np.save(file, x)
    else:
        np.savez(file, **{name: part for name, part in parts.items() if part is not None})
    return file.getvalue()


def _table(given: Data, x: np.ndarray) -> str:
    """Rows as a table with the names of its columns; labels, if there are any, in the last."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rows = [[str(value) for value in row] for row in x]  # the fewest digits that give it again
    if given.columns is not None:
        writer.writerow([*given.columns, *([] if given.labels is None else ["label"])])
    if given.labels is not None:
        rows = [[*row, str(label)] for row, label in zip(rows, given.labels.tolist())]
    writer.writerows(rows)
    return text.getvalue()
