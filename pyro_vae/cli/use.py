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

from pyro_vae import config, estimators, plots
from pyro_vae.arguments import check_whole
from pyro_vae.classes import ClassVAE
from pyro_vae.cli.figures import condition, limits
from pyro_vae.cli.folder import destination, load_run, own_rows, placed, schema_of
from pyro_vae.cli.stream import Job, key_of, part_seed, stream
from pyro_vae.data import Data, read_rows
from pyro_vae.data.mapped import npy
from pyro_vae.data.schema import Cells
from pyro_vae.data.tables import label_cells
from pyro_vae.files import as_csv, write
from pyro_vae.runtime import forked
from pyro_vae.vae import VAE

__all__ = ["classify", "encode", "impute", "sample"]

WAY = ("chunk_size", "compile")


def sample(options: Namespace) -> None:
    """Draws of a run's model: an .npz file, and a picture where they are images."""
    check_whole(size=options.size)
    check_whole(0, seed=options.seed)
    vae, splits = load_run(options.run, options.data_root)
    schema = splits.train.schema
    ending = ".npz" if schema is None else ".csv"
    out = destination(options.out, Path(options.run) / f"samples{ending}", (ending,))
    y = condition(splits.train, options.size, options.label, vae)
    with forked(torch.device("cpu"), options.seed), torch.no_grad():
        x = splits.train.transform.inverse(vae.sample(options.size, y, mean=options.mean))
    if splits.train.levels is not None and bool((x == x.round()).all()):
        x = x.to(torch.uint8)  # as the data were, so that other commands read it
    write(out, _archive(x=x.numpy()) if schema is None else schema.csv(x))
    if x.ndim == 4:
        plots.save(plots.images(x, limits=limits(splits.train)), str(out.with_suffix(".png")))
    print(f"{len(x)} samples in {out}")


def encode(options: Namespace) -> None:
    """Posterior means and scales of the rows of a file, in its order."""
    default = Path(options.file).with_suffix(".encoded.npz")
    out = destination(options.out, default, (".npz", ".csv"), options.file)
    stream(encoding(options), options, out)


def encoding(options: Namespace) -> Job:
    """The encoding of a file: means and scales of each row, float32."""
    vae = config.load(options.run)
    data = own_rows(options.run, options.file, vae)

    def run(part: int, rows: Tensor) -> bytes:
        with torch.no_grad():
            q = vae.encode(*data.batch(rows))
            codes = torch.cat([q.mean, q.stddev], 1)
        file = io.BytesIO()
        np.save(file, codes.numpy())
        return file.getvalue()

    return Job(len(data), partial(key_of, vae, data, {}), run, _codes)


def _codes(parts: list[Path], out: Path) -> str:
    """Writes the means and scales of all parts; what is to be said of them."""
    shapes = [np.load(part, mmap_mode="r").shape for part in parts]
    rows, width = sum(rows for rows, _ in shapes), shapes[0][1] // 2

    def archive(file: IO[bytes]) -> None:
        with ZipFile(file, "w") as made:
            for i, name in enumerate(("mean", "scale")):
                half = slice(i * width, (i + 1) * width)
                with made.open(f"{name}.npy", "w", force_zip64=True) as array:
                    array.writelines(npy((np.load(p)[:, half] for p in parts), (rows, width)))

    def table(file: IO[bytes]) -> None:
        head = [f"{kind}{d}" for kind in ("mean", "scale") for d in range(width)]
        file.write((",".join(head) + "\n").encode())
        for part in parts:
            np.savetxt(file, np.load(part), "%.9g", ",")

    write(out, archive if out.suffix == ".npz" else table)
    return f"means and scales of {rows} rows in {out}"


def impute(options: Namespace) -> None:
    """The file with what is missing filled in: by its mean (median of whole numbers), and draws.

    Observed values are those of the file; the others are in its units.
    """
    check_whole(0, draws=options.draws)
    source = Path(options.file)
    suffix = source.suffix if schema_of(options.run) is None else ".csv"
    if suffix not in (".csv", ".npy", ".npz"):
        raise ValueError(f"expected a .csv, .npy or .npz file to impute; got {source}")
    default = source.with_suffix(f".imputed{suffix}")
    out = destination(options.out, default, (suffix,), options.file)
    stream(imputation(options), options, out)


def imputation(options: Namespace) -> Job:
    """The imputation of a file: of each row the best values, and draws [1 + R, n, *E]."""
    vae = config.load(options.run)
    vae, rows = placed(vae, own_rows(options.run, options.file, vae), options.accelerator)
    schema = rows.schema
    given = read_rows(options.file) if schema is None else rows

    def join(parts: list[Path], out: Path) -> str:
        beside = {} if schema is None else label_cells(Path(options.file), schema)
        names = [f"{out.stem}-{i:0{len(str(options.draws))}d}" for i in range(options.draws + 1)]
        for i, name in enumerate([out.stem, *names[1:]]):
            each = (_of_part(part, "x")[i] for part in parts)
            path = out.with_name(f"{name}{out.suffix}")
            write(path, _content(given, each, out.suffix, beside))
        verdicts = Counter(word for part in parts for word in _of_part(part, "verdict"))
        words = ", ".join(f"{n} {word}" for word, n in verdicts.items())
        draws = f" and {options.draws} files of draws beside it" if options.draws else ""
        share = f"{rows.missing_share:.1%} of the values of {len(rows)} rows filled in"
        return f"{share} ({words}): {out}{draws}"

    result = {name: options[name] for name in (*WAY, "draws", "seed")}
    key = partial(key_of, vae, rows, result)
    return Job(len(rows), key, partial(imputed, vae, rows, given, options), join)


def imputed(
    vae: VAE, rows: Data, given: Data, options: Namespace, part: int, index: Tensor
) -> bytes:
    """A part of the rows given, filled in: x [1 + R, n, *E], and the verdict of each."""
    schema = rows.schema
    whole = vae.likelihood.support.is_discrete  # of which a mean is none
    found = estimators.impute(
        vae,
        *rows.batch(index),
        num_draws=max(options.draws, 100 if whole or schema is not None else 1),
        seed=part_seed(options.seed, part),
        **{name: options[name] for name in WAY},
    )
    best = found.median if whole else found.mean
    best = best if schema is None else schema.centre(found.draws, found.mean)
    filled = torch.cat([best.unsqueeze(0), found.draws[: options.draws]])
    some = given.subset(index)
    values = torch.stack([_complete(some, rows, each) for each in filled])
    return _archive(x=values.numpy(), verdict=np.array(found.verdict))


def classify(options: Namespace) -> None:
    """The class of each row of a file, probabilities, standard error and verdict, as CSV."""
    default = Path(options.file).with_suffix(".classes.csv")
    out = destination(options.out, default, (".csv",), options.file)
    vae = config.load(options.run)
    if not isinstance(vae, ClassVAE):
        raise ValueError(f"{options.run} has no classes: train with --classes, a number of them")
    data = own_rows(options.run, options.file, vae)
    x, _ = data.batch()
    way: dict[str, Any] = {"seed": options.seed, "progress": options.progress}
    if options.num_samples is not None:
        way |= {"estimator": estimators.importance_sampling, "num_samples": options.num_samples}
    found = estimators.class_probabilities(vae, x, **way)
    best = found.probabilities.argmax(1)
    errors = found.stderr.gather(1, best.unsqueeze(1))
    numbers = torch.cat([found.probabilities, errors], 1).tolist()
    lines = [
        [n, cls, *(f"{p:.6f}" for p in row), verdict]
        for n, (cls, row, verdict) in enumerate(zip(best.tolist(), numbers, found.verdict))
    ]
    names = [f"p{c}" for c in range(vae.classes)]
    write(out, as_csv([["row", "class", *names, "stderr", "verdict"], *lines]))
    print(f"classes of {len(x)} rows in {out}, {_right(best, data.labels)}")


def _of_part(part: Path, name: str) -> np.ndarray:
    with np.load(part) as file:
        found: np.ndarray = file[name]
    return found


def _complete(given: Data, rows: Data, values: Tensor) -> Tensor:
    """The rows `given` with what is missing filled in from model values [n, *E]."""
    filled = rows.transform.inverse(values.cpu())
    if given.columns is not None and rows.columns is not None:
        filled = filled[:, [rows.columns.index(name) for name in given.columns]]
    x = given.x[:].cpu()
    return torch.where(x.isnan(), filled.to(x.dtype), x)


def _content(
    given: Data, parts: Iterable[np.ndarray], suffix: str, beside: Cells
) -> str | bytes | Iterable[bytes]:
    """A file like `given` of rows that come in parts.

    The cells `beside` are those of labels, of a table with a schema.
    """
    if suffix == ".npy":
        return npy(parts, given.x.shape)
    x = np.concatenate(list(parts))
    if given.schema is not None:
        return given.schema.csv(torch.from_numpy(x), beside)
    if suffix == ".csv":
        return _table(given, x)
    arrays: dict[str, Any] = {"x": x, "y": given.y, "labels": given.labels}
    return _archive(**{name: part for name, part in arrays.items() if part is not None})


def _table(given: Data, x: np.ndarray) -> str:
    """Rows as a table with the names of its columns; labels, if there are any, in the last."""
    lines = [[str(value) for value in row] for row in x]  # the fewest digits that give it again
    if given.labels is not None:
        lines = [[*line, str(label)] for line, label in zip(lines, given.labels.tolist())]
    if given.columns is not None:
        lines.insert(0, [*given.columns, *([] if given.labels is None else ["label"])])
    return as_csv(lines)


def _right(found: Tensor, labels: Tensor | None) -> str:
    """How many of the known labels were found."""
    if labels is None or not bool((labels >= 0).any()):
        return "no label known"
    known = labels >= 0
    share = (found == labels)[known].double().mean()
    return f"{share:.1%} of {int(known.sum())} known labels found"


def _archive(**arrays: Any) -> bytes:
    """The content of an .npz file."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()
