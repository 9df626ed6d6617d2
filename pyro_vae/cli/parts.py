"""The parts of the KL of a run: after each epoch, in its table, and as figures."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent

from pyro_vae import plots
from pyro_vae.classes import ClassVAE
from pyro_vae.cli.folder import home, read_table
from pyro_vae.data import Data
from pyro_vae.densities import densities
from pyro_vae.files import reading, write
from pyro_vae.generators import forked
from pyro_vae.metrics import Decomposition, active_units, elbo_decomposition
from pyro_vae.training import State
from pyro_vae.vae import VAE

__all__ = [
    "NAMES",
    "KlParts",
    "decompose",
    "draw_parts",
    "layer_lines",
    "shown_terms",
    "unit_kl",
    "unit_names",
]

TERMS = ("mutual_information", "total_correlation", "dimension_wise_kl")
NAMES = {
    "mutual_information": "mutual information",
    "aggregate_kl": "KL(q(z) || p(z))",
    "total_correlation": "total correlation",
    "dimension_wise_kl": "dimension-wise KL",
}


def shown_terms(factorises: bool) -> tuple[str, ...]:
    """The parts of the KL that mean something: of one that factorises, or of any prior."""
    return TERMS if factorises else ("mutual_information", "aggregate_kl")


def decompose(vae: VAE, data: Data, num_rows: int) -> Decomposition | None:
    """Parts of the KL against the aggregate posterior of all `data`, drawn from `num_rows`.

    None where there are none: a posterior without densities of single dimensions, such as a
    flow, a prior that depends on `y`, several layers, or a class that is summed out.
    """
    if len(vae.sizes) > 1 or isinstance(vae, ClassVAE):
        return None
    x, y = data.to(home(vae)).batch(torch.arange(len(data)))
    try:
        with torch.no_grad():
            posterior, prior = vae.encode(x, y), vae.prior()
        return elbo_decomposition(posterior, prior, num_rows=min(len(data), num_rows))
    except ValueError:
        return None


def unit_kl(vae: VAE, data: Data) -> Tensor | None:
    """KL(q(z_d | x) || p(z_d)) averaged over `data` [D], or None where dimensions depend."""
    x, y = data.to(home(vae)).batch(torch.arange(len(data)))
    with forked(x.device, 0), torch.no_grad():
        try:
            kl = densities(vae.model, vae.guide, x, y).kl_by_dimension()
        except ValueError:
            return None
    return torch.cat([kl[site].mean(0) for site in vae.sizes])


def unit_names(vae: VAE) -> list[str]:
    """Names of all units: z0, z1, ..., or z1[0], ..., z2[0], ... in several layers."""
    (first, size), *others = vae.sizes.items()
    if not others:
        return [f"{first}{d}" for d in range(size)]
    return [f"{site}[{d}]" for site, size in vae.sizes.items() for d in range(size)]


def layer_lines(vae: VAE, data: Data) -> dict[str, str]:
    """KL and active units of each layer of several, for a table."""
    if len(vae.sizes) == 1:
        return {}
    x, y = data.to(home(vae)).batch(torch.arange(len(data)))
    with forked(x.device, 0), torch.no_grad():
        kl = densities(vae.model, vae.guide, x, y).kl()
        means = vae.encode(x, y).mean.split(list(vae.sizes.values()), -1)
    return {
        f"{site}": f"KL {kl[site].mean():.2f}, {int(active_units(mean).sum())} of "
        f"{mean.shape[-1]} units active"
        for site, mean in zip(vae.sizes, means)
    }


class KlParts:
    """A callback of `fit`: parts of the KL, and KL of each unit, a row of parts.csv an epoch.

    Args:
        folder: The run folder.
        data: Validation rows; at most 2000 are used.
    """

    def __init__(self, folder: Path, data: Data) -> None:
        self.path = folder / "parts.csv"
        self.data = data.subset(torch.arange(min(len(data), 2000))).fixed()
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            rows = read_table(folder, self.path.name)
            self.rows = [{**row, "epoch": int(row["epoch"] or 0)} for row in rows]

    def __call__(self, state: State) -> None:
        """Measures, and writes all epochs so far."""
        vae: VAE = state.vae  # type: ignore[assignment]
        training = vae.training
        parts = decompose(vae.eval(), self.data, num_rows=200)
        kl = unit_kl(vae, self.data)
        vae.train(training)
        if parts is None and (kl is None or len(vae.sizes) == 1):
            return
        row = {"epoch": state.epoch}
        row |= {} if parts is None else {name: getattr(parts, name).value for name in TERMS}
        each = [] if kl is None else kl.tolist()
        row |= {f"kl_{name}": value for name, value in zip(unit_names(vae), each)}
        # a resumed run measures the epochs after its checkpoint again
        self.rows = [*(old for old in self.rows if old["epoch"] < state.epoch), row]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write(self.path, text.getvalue())


def draw_parts(folder: Path, vae: VAE, num_data: int) -> None:
    """Figures of parts.csv, where there is one: parts of the KL, and KL of each dimension.

    Args:
        folder: The run folder.
        vae: Its VAE, whose prior may factorise.
        num_data: Data of q(z), whose logarithm the mutual information cannot pass.
    """
    path = folder / "parts.csv"
    if not path.exists():
        return
    with reading(path):
        rows = read_table(folder, path.name)
        if len(vae.sizes) == 1:
            with torch.no_grad():
                prior = vae.prior()
            factorises = isinstance(prior, Independent) and not prior.base_dist.event_shape
            _draw_parts(rows, folder / "figures", factorises, math.log(num_data))
        _draw_units(rows, folder / "figures")


def _draw_parts(
    rows: list[dict[str, float | None]], figures: Path, factorises: bool, ceiling: float
) -> None:
    epochs = torch.tensor([row["epoch"] for row in rows])
    parts = {name: torch.tensor([row[name] for row in rows]) for name in TERMS}
    parts["aggregate_kl"] = parts["total_correlation"] + parts["dimension_wise_kl"]
    shown = {NAMES[name]: parts[name] for name in shown_terms(factorises)}
    shown["log N, ceiling of the first"] = torch.full_like(epochs, ceiling)
    plots.save(plots.terms(epochs, shown), str(figures / "parts.png"))


def _draw_units(rows: list[dict[str, float | None]], figures: Path) -> None:
    units = [key for key in rows[0] if key.startswith("kl_z")]
    if units:
        epochs = torch.tensor([row["epoch"] for row in rows])
        kl = torch.tensor([[row[unit] for unit in units] for row in rows])
        names = [unit.removeprefix("kl_") for unit in units]
        plots.save(plots.unit_kl(epochs, kl, names), str(figures / "unit_kl.png"))
