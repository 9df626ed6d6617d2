"""Commands that use a finished run: draws, codes, missing values, classes."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile

import numpy as np
import torch
from jsonargparse import Namespace
from torch import Tensor

from pyro_vae import estimators, plots
from pyro_vae.arguments import check_whole
from pyro_vae.classes import ClassVAE
from pyro_vae.cli.figures import condition, limits
from pyro_vae.cli.folder import class_names, destination, load_run, load_with_rows, read_record
from pyro_vae.cli.score import COMPUTE
from pyro_vae.cli.stream import key_of, part_seed, stream
from pyro_vae.data import Data, read_rows
from pyro_vae.data.mapped import npy
from pyro_vae.data.tables import own_cells
from pyro_vae.files import as_csv, write
from pyro_vae.runtime import forked
from pyro_vae.vae import VAE


def sample(options: Namespace) -> None:
    """Writes draws of a run's model to an .npz or .csv file, and a picture if they are images."""
    check_whole(size=options.size)
    check_whole(0, seed=options.seed)
    vae, splits = load_run(options.run, options.data_root)
    schema = splits.train.schema
    ending = ".npz" if schema is None else ".csv"
    out = destination(options.out, Path(options.run) / f"samples{ending}", (ending,))
    y = condition(splits.train, options.size, options.label, vae)
    with forked(torch.device("cpu"), options.seed), torch.no_grad():
        x = splits.train.transform.inverse(vae.sample(options.size, y, mean=options.mean))
    x = x if schema is None else schema.rounded(x)
    if splits.train.levels is not None and bool((x == x.round()).all()):
        x = x.to(torch.uint8)  # like the data, so that other commands read it
    write(out, _npz(x=x.numpy()) if schema is None else schema.csv(x))
    if x.ndim == 4:
        plots.save(plots.images(x, limits=limits(splits.train)), str(out.with_suffix(".png")))
    print(f"{len(x)} samples in {out}")


def encode(options: Namespace) -> None:
    """Writes posterior means and scales of the rows of a file, in its order."""
    out = destination(options.out, ".encoded.npz", (".npz", ".csv"), options.file)
    vae, data = load_with_rows(options)

    def run(part: int, rows: Tensor) -> bytes:
        with torch.no_grad():
            q = vae.encode(*data.batch(rows))
            codes = torch.cat([q.mean, q.stddev], 1)
        return b"".join(npy([codes.numpy()], codes.shape))

    stream(options, out, len(data), key_of(vae, data, {}), run, _join_codes)


def _join_codes(parts: list[Path], out: Path) -> str:
    """Writes the means and scales of all parts; returns the message about them."""
    shapes = [np.load(part, mmap_mode="r").shape for part in parts]
    rows, width = sum(rows for rows, _ in shapes), shapes[0][1] // 2

    def archive(file: IO[bytes]) -> None:
        with ZipFile(file, "w") as zip_file:
            for i, name in enumerate(("mean", "scale")):
                half = slice(i * width, (i + 1) * width)
                with zip_file.open(f"{name}.npy", "w", force_zip64=True) as array:
                    array.writelines(npy((np.load(p)[:, half] for p in parts), (rows, width)))

    def table(file: IO[bytes]) -> None:
        head = [f"{kind}{d}" for kind in ("mean", "scale") for d in range(width)]
        file.write((",".join(head) + "\n").encode())
        for part in parts:
            np.savetxt(file, np.load(part), "%.9g", ",")

    write(out, archive if out.suffix == ".npz" else table)
    return f"means and scales of {rows} rows in {out}"


def impute(options: Namespace) -> None:
    """Writes a file with missing values filled in by means (medians if whole), and files of draws.

    Observed values stay as they are; the others are in the units of the file, and in a table
    rounded to their column's resolution.
    """
    check_whole(0, draws=options.draws)
    check_whole(optional=True, num_samples=options.num_samples)
    source = Path(options.file)
    arrays = source.suffix in (".npy", ".npz") or read_record(options.run)["schema"] is None
    suffix = source.suffix if arrays else ".csv"
    if suffix not in (".csv", ".npy", ".npz"):
        raise ValueError(f"expected a .csv, .npy or .npz file to impute; got {source}")
    out = destination(options.out, f".imputed{suffix}", (suffix,), options.file)
    vae, rows = load_with_rows(options)
    schema = rows.schema
    original = read_rows(options.file) if schema is None else rows

    def join(parts: list[Path], out: Path) -> str:
        width = len(str(options.draws))
        own = own_cells(source, schema, original.columns is not None) if suffix == ".csv" else None
        for i in range(options.draws + 1):
            name = f"{out.stem}-{i:0{width}d}" if i else out.stem
            each = (_load_part(part, "x")[i] for part in parts)
            write(out.with_name(f"{name}{suffix}"), _file_content(original, each, suffix, own))
        verdicts = Counter(word for part in parts for word in _load_part(part, "verdict"))
        words = ", ".join(f"{n} {word}" for word, n in verdicts.items())
        draws = f" and {options.draws} files of draws beside it" if options.draws else ""
        share = f"{rows.missing_share:.1%} of the values of {len(rows)} rows filled in"
        return f"{share} ({words}): {out}{draws}"

    result = {name: options[name] for name in (*COMPUTE, "draws", "num_samples", "seed")}
    run = partial(_impute_part, vae, rows, original, options)
    stream(options, out, len(rows), key_of(vae, rows, result), run, join)


def _impute_part(
    vae: VAE, rows: Data, original: Data, options: Namespace, part: int, index: Tensor
) -> bytes:
    """Returns n rows filled in, x [1 + R, n, *E]: the best values, then R draws; and verdicts."""
    schema = rows.schema
    is_discrete = vae.likelihood.support.is_discrete  # then a mean may be no possible value
    work: dict[str, Any] = {name: options[name] for name in COMPUTE}
    if options.num_samples is not None:
        work |= {"proposal": "guide", "num_samples": options.num_samples}
    found = estimators.impute(
        vae,
        *rows.batch(index),
        num_draws=max(options.draws, 100 if is_discrete or schema is not None else 1),
        seed=part_seed(options.seed, part),
        **work,
    )
    centre = found.median if is_discrete else found.mean
    best = centre if schema is None else schema.centre(found.draws, found.mean)
    filled = torch.cat([best.unsqueeze(0), found.draws[: options.draws]])
    x = original.subset(index).x[:].cpu()
    filled = rows.transform.inverse(filled.cpu())
    filled = filled if schema is None else schema.rounded(filled)
    if original.columns is not None and rows.columns is not None:
        filled = filled[..., [rows.columns.index(name) for name in original.columns]]
    values = torch.where(x.isnan(), filled.to(x.dtype), x)
    return _npz(x=values.numpy(), verdict=np.array(found.verdict))


def classify(options: Namespace) -> None:
    """Writes the class of each row of a file, probabilities, error and verdict, as CSV."""
    out = destination(options.out, ".classes.csv", (".csv",), options.file)
    vae, data = load_with_rows(options)
    if not isinstance(vae, ClassVAE):
        raise ValueError(f"{options.run} has no classes: train with --classes, a number of them")
    x, _ = data.batch()
    method: dict[str, Any] = {"seed": options.seed, "progress": options.progress}
    if options.num_samples is not None:
        method |= {"estimator": estimators.importance_sampling, "num_samples": options.num_samples}
    found = estimators.class_probabilities(vae, x, **method)
    best = found.probabilities.argmax(1)
    errors = found.stderr.gather(1, best.unsqueeze(1))
    numbers = torch.cat([found.probabilities, errors], 1).tolist()
    names = class_names(read_record(options.run)["class_names"], vae.classes)
    lines = [
        [n, names[cls], *(f"{p:.6f}" for p in row), verdict]
        for n, (cls, row, verdict) in enumerate(zip(best.tolist(), numbers, found.verdict))
    ]
    head = ["row", "class", *(f"p{name}" if name.isdecimal() else f"p_{name}" for name in names)]
    write(out, as_csv([[*head, "stderr", "verdict"], *lines]))
    accuracy = "no label known"
    if data.labels is not None and bool((known := data.labels >= 0).any()):
        share = (best == data.labels)[known].double().mean()
        accuracy = f"{share:.1%} of {int(known.sum())} known labels found"
    print(f"classes of {len(x)} rows in {out}, {accuracy}")


def _load_part(part: Path, name: str) -> np.ndarray:
    with np.load(part) as file:
        found: np.ndarray = file[name]
    return found


def _file_content(
    original: Data,
    parts: Iterable[np.ndarray],
    suffix: str,
    own: tuple[list[str], list[Any]] | None,
) -> str | bytes | Iterable[bytes]:
    """A file as that of the rows given, of rows that come in parts.

    A table has its own cells, in columns below their names, but for those that are empty.
    """
    if suffix == ".npy":
        return npy(parts, original.x.shape)
    x = np.concatenate(list(parts))
    if own is not None:
        names, columns = own
        schema = original.schema
        made: Any = x.T if schema is None else schema.decode(torch.from_numpy(x)).values()
        filled = [
            [new if old is None else old for old, new in zip(*pair)] for pair in zip(columns, made)
        ]
        rows = zip(*filled, *columns[len(filled) :])
        return as_csv([names, *rows] if names else rows)
    arrays: dict[str, Any] = {"x": x, "y": original.y, "labels": original.labels}
    return _npz(**{name: part for name, part in arrays.items() if part is not None})


def _npz(**arrays: Any) -> bytes:
    """Returns the content of an .npz file."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()
