"""Commands that use a finished run: draws, codes, missing values, classes."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from jsonargparse import Namespace
from torch import Tensor

from pyro_vae import config, estimators, plots
from pyro_vae.arguments import check_whole
from pyro_vae.classes import ClassVAE
from pyro_vae.cli.figures import condition, limits
from pyro_vae.cli.folder import destination, load_run, own_rows, placed
from pyro_vae.cli.stream import Job, key_of, stream
from pyro_vae.data import Data, read_rows
from pyro_vae.data.schema import Cells
from pyro_vae.data.tables import label_cells
from pyro_vae.files import write
from pyro_vae.generators import forked
from pyro_vae.vae import VAE

__all__ = ["classify", "encode", "impute", "sample"]


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
    write(out, _archive(x=x.numpy()) if schema is None else schema.csv(x))
    if x.ndim == 4:
        plots.save(plots.images(x, limits=limits(splits.train)), str(out.with_suffix(".png")))
    print(f"{len(x)} samples in {out}")


def encode(options: Namespace) -> None:
    """Posterior means and scales of the rows of a file, in its order."""
    out = destination(
        options.out, Path(options.file).with_suffix(".encoded.npz"), (".npz", ".csv"), options.file
    )
    join = _codes_archive if out.suffix == ".npz" else _codes_table
    said = stream(encoding, options, out, lambda parts: join(parts, out))
    print(said or f"the rows of this process are encoded; the others' are not all, for {out}")


def encoding(options: Namespace) -> Job:
    """The encoding of a file: means and scales of each row, float32."""
    vae = config.load(options.run)
    data = own_rows(options.run, options.file, vae)

    def run(part: int, rows: Tensor) -> bytes:
        with torch.no_grad():
            q = vae.encode(*data.batch(rows))
        file = io.BytesIO()
        np.save(file, torch.cat([q.mean, q.stddev], 1).numpy())
        return file.getvalue()

    return Job(len(data), key_of(vae, data, {}), run)


def _codes_archive(parts: list[Path], out: Path) -> str:
    """Writes `mean` and `scale` [N, D] of all parts."""
    rows, width = _codes_shape(parts)
    whole = parts[0].with_name("whole.npz")
    with ZipFile(whole, "w") as archive:
        for i, name in enumerate(("mean", "scale")):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                head = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
                np.lib.format.write_array_header_1_0(file, head)
                for part in parts:
                    file.write(np.load(part)[:, i * width : (i + 1) * width].tobytes())
    with whole.open("rb") as file:
        write(out, iter(lambda: file.read(2**20), b""))
    return f"means and scales of {rows} rows in {out}"


def _codes_table(parts: list[Path], out: Path) -> str:
    """Writes a table of all parts."""
    rows, width = _codes_shape(parts)

    def blocks() -> Iterator[bytes]:
        head = [f"{kind}{d}" for kind in ("mean", "scale") for d in range(width)]
        yield (",".join(head) + "\n").encode()
        for part in parts:
            file = io.BytesIO()
            np.savetxt(file, np.load(part), "%.9g", ",")
            yield file.getvalue()

    write(out, blocks())
    return f"means and scales of {rows} rows in {out}"


def _codes_shape(parts: list[Path]) -> tuple[int, int]:
    """The number of rows, and of latents."""
    shapes = [np.load(part, mmap_mode="r").shape for part in parts]
    return sum(rows for rows, _ in shapes), shapes[0][1] // 2


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
    labels = {} if rows.schema is None else label_cells(source)
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
        write(path, _content(given, rows, draw, out.suffix, labels))
    best = found.median if _whole(vae) else found.mean
    if rows.schema is not None:
        best = rows.schema.centre(found.draws, found.mean)
    write(out, _content(given, rows, best, out.suffix, labels))
    verdicts = ", ".join(f"{n} {word}" for word, n in Counter(found.verdict).items())
    share = x.isnan().double().mean().item()
    beside = f" and {options.draws} files of draws beside it" if options.draws else ""
    print(f"{share:.1%} of the values of {len(rows)} rows filled in ({verdicts}): {out}{beside}")


def classify(options: Namespace) -> None:
    """The class of each row of a file, probabilities, standard error and verdict, as CSV."""
    out = destination(
        options.out, Path(options.file).with_suffix(".classes.csv"), (".csv",), options.file
    )
    vae = config.load(options.run)
    if not isinstance(vae, ClassVAE):
        raise ValueError(f"{options.run} has no classes: train with --classes, a number of them")
    x, _ = (data := own_rows(options.run, options.file, vae)).batch(torch.arange(len(data)))
    way: dict[str, Any] = {"seed": options.seed, "progress": options.progress}
    if options.num_samples is not None:
        way |= {"estimator": estimators.importance_sampling, "num_samples": options.num_samples}
    found = estimators.class_probabilities(vae, x, **way)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f"p{c}" for c in range(vae.classes)]
    writer.writerow(["row", "class", *names, "stderr", "verdict"])
    best = found.probabilities.argmax(1)
    errors = found.stderr.gather(1, best.unsqueeze(1))[:, 0]
    for n, share in enumerate(found.probabilities.tolist()):
        shares = [f"{p:.6f}" for p in share]
        writer.writerow([n, int(best[n]), *shares, f"{errors[n]:.6f}", found.verdict[n]])
    write(out, text.getvalue())
    print(f"classes of {len(x)} rows in {out}, {_right(best, data.labels)}")


def _whole(vae: VAE) -> bool:
    """Whether its data are whole numbers, of which a mean is none."""
    return vae.likelihood.support.is_discrete


def _content(given: Data, rows: Data, values: Tensor, suffix: str, beside: Cells) -> str | bytes:
    """A file like `given`, what is missing from it filled in from `values` of `rows`.

    The cells `beside` are those of labels, of a table with a schema.
    """
    filled = rows.transform.inverse(values.cpu())
    if given.columns is not None and rows.columns is not None:
        filled = filled[:, [rows.columns.index(name) for name in given.columns]]
    complete = torch.where(given.x[:].isnan(), filled.to(given.x.dtype), given.x[:])
    if rows.schema is not None:
        return rows.schema.csv(complete, beside)
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
