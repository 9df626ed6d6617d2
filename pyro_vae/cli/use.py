"""Commands that use a finished run: figures, samples, codes."""

from __future__ import annotations

import io
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jsonargparse import Namespace
from torch import Tensor

from pyro_vae import config, plots
from pyro_vae.arguments import check_whole
from pyro_vae.classes import ClassVAE
from pyro_vae.cli.folder import load_run, own_rows, pairs, read_table
from pyro_vae.cli.parts import draw_parts, unit_kl, unit_names
from pyro_vae.data import Data, Splits
from pyro_vae.distributions import Joint
from pyro_vae.files import write
from pyro_vae.generators import forked
from pyro_vae.vae import VAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["destination", "draw", "encode", "followed", "plot", "sample"]


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
    vae = config.load(options.run)
    rows = own_rows(options.run, options.file, vae)
    with torch.no_grad():
        q = [vae.encode(x, y) for x, y in pairs(rows)]
        means = torch.cat([d.mean for d in q]).numpy()
        scales = torch.cat([d.stddev for d in q]).numpy()
    if out.suffix == ".npz":
        write(out, _archive(mean=means, scale=scales))
    else:
        head = [f"{kind}{d}" for kind in ("mean", "scale") for d in range(means.shape[1])]
        both = np.concatenate([means, scales], 1)
        text = io.StringIO()
        np.savetxt(text, both, "%.9g", ",", header=",".join(head), comments="")
        write(out, text.getvalue())
    print(f"means and scales of {len(rows)} rows in {out}")


def destination(
    out: str | None, default: Path, suffixes: tuple[str, ...], source: str | None = None
) -> Path:
    """The file that a command writes, known to be one before there is anything to write.

    Args:
        out: What was asked for, or None.
        default: What is taken then.
        suffixes: Endings that it may have.
        source: What the command reads.

    Raises:
        ValueError: If the ending is another, its folder is missing, or it is the source itself.
    """
    path = default if out is None else Path(out)
    if path.suffix not in suffixes:
        raise ValueError(f"out must end in {' or '.join(suffixes)}; got {out!r}")
    if not path.parent.is_dir():
        raise ValueError(f"out must be in a folder that exists; there is no {path.parent}")
    if source is not None and path.exists() and path.samefile(source):
        raise ValueError(f"out must not be the input; {path} would be overwritten: name another")
    return path


def plot(options: Namespace) -> None:
    """The figures of a run again."""
    vae, splits = load_run(options.run, options.data_root)
    draw(Path(options.run), vae, splits, read_table(options.run, "metrics.csv"))
    print(f"figures in {Path(options.run) / 'figures'}")


def draw(folder: Path, vae: VAE, splits: Splits, rows: list[Any]) -> None:
    """Curves, latent scatter, samples and reconstructions, of validation data."""
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    data = splits.validation
    data = data.subset(torch.arange(min(len(data), 2000))).fixed()
    x, y = data.batch(torch.arange(len(data)))
    with forked(torch.device("cpu"), 0), torch.no_grad():
        means = torch.cat([vae.encode(*pair).mean for pair in pairs(data)])
        classes = condition(splits.train, 100, None, vae)
        draws = {mean: vae.sample(100, classes, mean=mean) for mean in (False, True)}
        again = vae.reconstruct(x[:30], None if y is None else y[:30])
    plots.save(plots.curves(rows), str(figures / "curves.png"))
    plots.save(plots.latent(means, data.labels, unit_names(vae)), str(figures / "latent.png"))
    draw_parts(folder, vae, len(data))
    back = data.transform.inverse
    if x.ndim != 4:
        plots.save(_columns(vae, splits.train), str(figures / "samples.png"))
        return
    shown = {
        "samples": plots.images(back(draws[False]), "draws of x", limits(data)),
        "sample_means": plots.images(back(draws[True]), "E[x | z] of drawn z", limits(data)),
        "reconstructions": plots.reconstructions(back(x[:30]), back(again), limits(data)),
    }
    if isinstance(vae, ClassVAE):
        shown["classes"] = _of_each_class(vae, data)
    kl = unit_kl(vae, data)
    if kl is not None:
        shown["traversals"] = traversal(vae, data, kl)
    for name, figure in shown.items():
        plots.save(figure, str(figures / f"{name}.png"))


def _archive(**arrays: Any) -> bytes:
    """The content of an .npz file."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _columns(vae: VAE, data: Data) -> Figure:
    """Columns of rows of a table beside those of as many draws, in the units of the file."""
    data = data.subset(torch.arange(min(len(data), 2000))).fixed()
    with forked(torch.device("cpu"), 0), torch.no_grad():
        draws = vae.sample(len(data), condition(data, len(data), None, vae))
    back = data.transform.inverse
    rows = data.batch(torch.arange(len(data)))[0]
    return plots.columns(back(rows).flatten(1), back(draws).flatten(1), data.columns)


def traversal(vae: VAE, data: Data, kl: Tensor) -> Figure:
    """What each latent does to the first image, from -3 to 3; at most ten, of most KL.

    Layers below that of a latent follow it, at their mean given it.
    """
    x, y = data.batch(torch.zeros(1, dtype=torch.long))
    top, values = kl.argsort(descending=True)[:10], torch.linspace(-3, 3, 11)
    with torch.no_grad():
        z = vae.encode(x, y).mean.expand(len(top), len(values), -1).clone()
        z[torch.arange(len(top)), :, top] = values
        z = torch.stack([followed(vae.prior(y), *pair) for pair in zip(z, top.tolist())])
        again = None if y is None else y.expand(len(top), len(values), -1)
        images = data.transform.inverse(vae.likelihood(z, again).mean)
    names = [unit_names(vae)[unit] for unit in top]
    return plots.traversals(images, kl[top], values, limits=limits(data), dims=names)


def followed(prior: Any, z: Tensor, unit: int) -> Tensor:
    """`z` [T, D], the layers below that of `unit` at their mean given those above."""
    if not isinstance(prior, Joint):
        return z
    given, ends = prior.split(z), accumulate(prior.sizes.values())
    kept = list(prior.sizes)[sum(unit >= end for end in ends) :]
    return prior.draw(lambda name, fn: given[name] if name in kept else fn.mean)


def condition(data: Data, size: int, label: int | None, vae: VAE) -> Tensor | None:
    """`y` of `size` draws: of one class, of all in turn, or of the first rows of the data."""
    if isinstance(vae, ClassVAE):
        vae.check_labels(y := torch.full((size,), -1 if label is None else label))
        return y
    if data.y is None:
        if label is not None:
            raise ValueError("label needs a conditional model: train with --conditional true")
        return None
    if data.classes is None or data.y.shape[1] != data.classes:
        return data.y[torch.arange(size) % len(data)]
    if label is not None and not 0 <= label < data.classes:
        raise ValueError(f"label must be from 0 to {data.classes - 1}; got {label}")
    labels = torch.arange(size) % data.classes if label is None else torch.full((size,), label)
    return torch.eye(data.classes)[labels]


def _of_each_class(vae: ClassVAE, data: Data) -> Figure:
    """Ten images of each class in a row."""
    y = torch.arange(vae.classes).repeat_interleave(10)
    with forked(torch.device("cpu"), 0), torch.no_grad():
        means = data.transform.inverse(vae.sample(len(y), y, mean=True))
    names = [f"class {c}" for c in range(vae.classes)]
    return plots.image_rows(means.unflatten(0, (-1, 10)), names, "", limits(data))


def limits(data: Data) -> tuple[float, float] | None:
    """Values shown as black and white."""
    return None if data.levels is None else (0.0, float(data.levels - 1))
