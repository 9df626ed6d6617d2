"""Draws the figures of a run, and measures the parts of its KL after each epoch."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse import Namespace
from torch import Tensor
from torch.distributions import Independent

from pyro_vae import plots
from pyro_vae.classes import ClassVAE
from pyro_vae.cli.folder import class_names, load_run, read_table
from pyro_vae.data import Data, Splits
from pyro_vae.densities import densities
from pyro_vae.distributions import Joint
from pyro_vae.files import as_csv, reading, write
from pyro_vae.metrics import active_units, elbo_decomposition
from pyro_vae.runtime import forked
from pyro_vae.training import State
from pyro_vae.vae import VAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TERMS = ("mutual_information", "total_correlation", "dimension_wise_kl")
TITLES = {  # titles of the parts of the KL
    "mutual_information": "mutual information",
    "aggregate_kl": "KL(q(z) || p(z))",
    "total_correlation": "total correlation",
    "dimension_wise_kl": "dimension-wise KL",
}


def plot(options: Namespace) -> None:
    """Draws the figures of a run again."""
    vae, splits = load_run(options.run, options.data_root)
    draw(Path(options.run), vae, splits, read_table(options.run, "metrics.csv"))
    print(f"figures in {Path(options.run) / 'figures'}")


def draw(folder: Path, vae: VAE, splits: Splits, rows: list[Any]) -> None:
    """Draws curves, codes of validation data, samples, and what else fits the kind of data."""
    data = _first_rows(splits.validation)
    with torch.no_grad():
        means = vae.encode(*data.batch()).mean
        figures = {
            "curves": plots.curves(rows),
            "latent": plots.latent(means, data.labels, unit_names(vae), data.class_names),
            **_of_parts(folder, vae, len(data)),
            **(_of_images(vae, splits, data) if data.x.ndim == 4 else _of_tables(vae, splits)),
        }
    for name, figure in figures.items():
        save_figure(figure, folder / "figures" / name)


def _first_rows(data: Data) -> Data:
    """Returns the first 2000 rows at most, with their noise drawn once."""
    return data.subset(torch.arange(min(len(data), 2000))).fixed()


def _of_images(vae: VAE, splits: Splits, data: Data) -> dict[str, Figure]:
    """Makes figures of draws, reconstructions, and images of each class, component and latent."""
    x, y = data.batch()
    inverse, grey = data.transform.inverse, limits(data)
    with forked(torch.device("cpu"), 0):
        classes = condition(splits.train, 100, None, vae)
        draws = {mean: vae.sample(100, classes, mean=mean) for mean in (False, True)}
        reconstructed = vae.reconstruct(x[:30], None if y is None else y[:30])
    figures = {
        "samples": plots.images(inverse(draws[False]), "draws of x", grey),
        "sample_means": plots.images(inverse(draws[True]), "E[x | z] of drawn z", grey),
        "reconstructions": plots.reconstructions(inverse(x[:30]), inverse(reconstructed), grey),
    }
    if isinstance(vae, ClassVAE):
        each = torch.arange(vae.classes).repeat_interleave(10)
        with forked(torch.device("cpu"), 0):
            means = inverse(vae.sample(len(each), each, mean=True)).unflatten(0, (-1, 10))
        names = [f"class {c}" for c in range(vae.classes)]
        figures["classes"] = plots.image_rows(means, names, "", grey)
    inputs = getattr(vae.prior, "inputs", None)
    if inputs is not None and inputs.shape[1:] == x.shape[1:]:
        title = "pseudo-inputs of the prior"
        figures["pseudo_inputs"] = plots.images(inverse(inputs[:100]), title, grey)
    if (kl := unit_kl(vae, data)) is not None:
        figures["traversals"] = _traversal(vae, data, kl)
    return figures


def _of_tables(vae: VAE, splits: Splits) -> dict[str, Figure]:
    """Makes figures of the columns of training rows and of as many draws, in the file's units."""
    data = _first_rows(splits.train)
    with forked(torch.device("cpu"), 0):
        draws = vae.sample(len(data), condition(data, len(data), None, vae))
    rows, draws = (data.transform.inverse(x).flatten(1) for x in (data.batch()[0], draws))
    known = data.schema and {name: c.categories for name, c in data.schema.columns.items()}
    figures = {"samples": plots.columns(rows, draws, known or data.columns)}
    if rows.shape[1] > 1:
        figures["pairs"] = plots.pairs(rows, draws, known or data.columns)
    return figures


def save_figure(figure: Figure, path: Path) -> None:
    """Saves a figure with images as PNG, others as SVG, and removes the file of the other kind."""
    path.parent.mkdir(exist_ok=True)
    has_images = any(ax.images for ax in figure.axes)
    kind, other = (".png", ".svg") if has_images else (".svg", ".png")
    plots.save(figure, str(path.with_suffix(kind)))
    path.with_suffix(other).unlink(missing_ok=True)


def _traversal(vae: VAE, data: Data, kl: Tensor) -> Figure:
    """Draws how the first image changes as each latent goes from -3 to 3: the ten of most KL.

    Layers below that of the latent are at their mean given the layers above.
    """
    x, y = data.batch(torch.zeros(1, dtype=torch.long))
    top, values = kl.argsort(descending=True)[:10], torch.linspace(-3, 3, 11)
    z = vae.encode(x, y).mean.expand(len(top), len(values), -1).clone()
    z[torch.arange(len(top)), :, top] = values.to(z)
    z = torch.stack([lower_layers_at_mean(vae.prior(y), *pair) for pair in zip(z, top.tolist())])
    repeated = None if y is None else y.expand(len(top), len(values), -1)
    images = data.transform.inverse(vae.likelihood(z, repeated).mean)
    names = [unit_names(vae)[unit] for unit in top]
    return plots.traversals(images, kl[top], values, limits=limits(data), dims=names)


def lower_layers_at_mean(prior: Any, z: Tensor, unit: int) -> Tensor:
    """Returns `z` [T, D] with the layers below that of `unit` at their mean given those above."""
    if not isinstance(prior, Joint):
        return z
    layers, ends = prior.split(z), accumulate(prior.sizes.values())
    fixed = list(prior.sizes)[sum(unit >= end for end in ends) :]
    return prior.draw(lambda name, fn: layers[name] if name in fixed else fn.mean)


def condition(data: Data, size: int, label: str | None, vae: VAE) -> Tensor | None:
    """Returns `y` for `size` draws: of one class, of all in turn, or of the first rows."""
    summed = isinstance(vae, ClassVAE)
    if not summed and (data.y is None or data.y.shape[1] != data.classes):
        if label is not None:
            raise ValueError("label needs a model conditional on labels: train with --conditional")
        return None if data.y is None else data.y[torch.arange(size) % len(data)]
    count = vae.classes if isinstance(vae, ClassVAE) else data.classes or 0
    names = class_names(data.class_names, count)
    if label is not None and label not in names:
        some = ", ".join(names[:20]) + (", ..." if count > 20 else "")
        raise ValueError(f"label must be one of {some}; got {label}")
    if label is not None:
        labels = torch.full((size,), names.index(label))
    else:
        labels = torch.full((size,), -1) if summed else torch.arange(size) % count
    return labels if summed else torch.eye(count)[labels]


def limits(data: Data) -> tuple[float, float] | None:
    """Returns the values shown as black and white, or None if there are no grey levels."""
    return None if data.levels is None else (0.0, float(data.levels - 1))


def decompose(vae: VAE, data: Data, num_rows: int) -> dict[str, Any]:
    """Estimates the parts of the KL at `num_rows` of the rows; q(z) averages over all `data`.

    The result is {} where the parts are not defined: for a posterior without densities of single
    dimensions, such as a flow, a prior that depends on `y`, several layers, or summed-out classes.
    """
    if len(vae.sizes) > 1 or isinstance(vae, ClassVAE):
        return {}
    x, y = data.batch()
    try:
        with torch.no_grad():
            posterior, prior = vae.encode(x, y), vae.prior()
        parts = elbo_decomposition(posterior, prior, num_rows=min(len(data), num_rows))
    except ValueError:
        return {}
    return {
        **{name: getattr(parts, name).value for name in TITLES},
        **{f"stderr_{name}": getattr(parts, name).stderr_data for name in TITLES},
        "parts_rows": parts.num_data,
        "prior_factorises": parts.per_dimension is not None,
        "at_ceiling": parts.at_ceiling,
    }


def unit_kl(vae: VAE, data: Data) -> Tensor | None:
    """Returns KL(q(z_d | x) || p(z_d)) averaged over `data` [D]; None for dependent dimensions."""
    x, y = data.batch()
    with forked(x.device, 0), torch.no_grad():
        try:
            kl = densities(vae.model, vae.guide, x, y).kl_by_dimension()
        except ValueError:
            return None
    return torch.cat([kl[site].mean(0) for site in vae.sizes])


def unit_names(vae: VAE) -> list[str]:
    """Returns the names of all units: z0, z1, ..., or z1[0], ..., z2[0], ... in several layers."""
    form = "{}{}" if len(vae.sizes) == 1 else "{}[{}]"
    return [form.format(site, d) for site, size in vae.sizes.items() for d in range(size)]


def layer_lines(vae: VAE, data: Data) -> dict[str, str]:
    """Returns in words the KL and active units of each layer; {} for a single layer."""
    if len(vae.sizes) == 1:
        return {}
    x, y = data.batch()
    with forked(x.device, 0), torch.no_grad():
        kl = densities(vae.model, vae.guide, x, y).kl()
        means = vae.encode(x, y).mean.split(list(vae.sizes.values()), -1)
    return {
        f"{site}": f"KL {kl[site].mean():.2f}, {int(active_units(mean).sum())} of "
        f"{mean.shape[-1]} units active"
        for site, mean in zip(vae.sizes, means)
    }


class KlParts:
    """A callback of `fit` that writes the parts of the KL and the KL of each unit to parts.csv.

    Args:
        folder: The run folder.
        data: Validation rows; at most 2000 are used.
    """

    def __init__(self, folder: Path, data: Data) -> None:
        self.path = folder / "parts.csv"
        self.data = _first_rows(data)
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            rows = read_table(folder, self.path.name)
            self.rows = [{**row, "epoch": int(row["epoch"] or 0)} for row in rows]

    def __call__(self, state: State) -> None:
        """Measures this epoch, and writes all epochs so far."""
        vae: VAE = state.vae  # type: ignore[assignment]
        training, data = vae.training, self.data.to(next(vae.parameters()).device)
        parts = decompose(vae.eval(), data, num_rows=200)
        kl = unit_kl(vae, data)
        vae.train(training)
        if not parts and (kl is None or len(vae.sizes) == 1):
            return
        row = {"epoch": state.epoch, **{name: parts[name] for name in TERMS if parts}}
        each = [] if kl is None else kl.tolist()
        row |= {f"kl_{name}": value for name, value in zip(unit_names(vae), each)}
        # a resumed run measures the epochs after its checkpoint again
        self.rows = [*(old for old in self.rows if old["epoch"] < state.epoch), row]
        write(self.path, as_csv([row, *([old.get(name) for name in row] for old in self.rows)]))


def _of_parts(folder: Path, vae: VAE, num_data: int) -> dict[str, Figure]:
    """Makes figures of parts.csv, if it exists: parts of the KL, and KL of each dimension.

    q(z) averages over `num_data` rows, and the mutual information is at most their logarithm.
    """
    path = folder / "parts.csv"
    if not path.exists():
        return {}
    figures = {}
    with reading(path):
        rows = read_table(folder, path.name)
        epochs = torch.tensor([row["epoch"] for row in rows])
        if len(vae.sizes) == 1:
            parts = {TITLES[name]: torch.tensor([row[name] for row in rows]) for name in TERMS}
            prior = vae.prior()
            if not isinstance(prior, Independent) or prior.base_dist.event_shape:
                # the last two terms are no KL where the prior does not factorise; their sum is
                correlation, mismatch = (parts.pop(TITLES[name]) for name in TERMS[1:])
                parts[TITLES["aggregate_kl"]] = correlation + mismatch
            figures["parts"] = plots.terms(epochs, parts)
            ceiling = f"mutual information is at most log N = {math.log(num_data):.1f}"
            figures["parts"].supxlabel(ceiling, fontsize=8)
        if units := [key for key in rows[0] if key.startswith("kl_z")]:
            kl = torch.tensor([[row[unit] for unit in units] for row in rows])
            names = [unit.removeprefix("kl_") for unit in units]
            figures["unit_kl"] = plots.unit_kl(epochs, kl, names)
    return figures
