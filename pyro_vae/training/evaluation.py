"""What is measured between epochs: the validation bound and the active units."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.densities import (
    Densities,
    OwnParameters,
    Program,
    densities,
    evaluating,
    run_program,
)
from pyro_vae.densities.programs import is_random
from pyro_vae.estimators.importance import lower_bound
from pyro_vae.generators import forked
from pyro_vae.training.dataset import Dataset, evenly_spaced
from pyro_vae.training.engine import Group

__all__ = ["Evaluator", "cast", "first_weight", "programs"]

CHUNK = 1000  # rows at once
INITIAL_ROWS = 10_000  # that `vae.initialise` sees
UNIT_ROWS = 1000  # that the active units are counted on
ACTIVE = 0.01  # least variance over data of an active unit's posterior mean


def programs(vae: Any) -> tuple[Program, Program]:
    """The model and guide of a vae."""
    return vae.model, vae.guide


def first_weight(vae: nn.Module) -> Tensor:
    """A parameter of floating type, for the others' device and type."""
    return next(p for p in vae.parameters() if p.is_floating_point())


def cast(batch: tuple[Tensor, Tensor | None], weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """x and y on the device and in the type of `weight`."""
    x, y = batch
    device, dtype = weight.device, weight.dtype
    return x.to(device, dtype), None if y is None else y.to(device, dtype)


class Evaluator:
    """Measures a vae between epochs; generators and modes are left as they were.

    Args:
        vae: A module with `model` and `guide`.
        train: The training rows.
        validation: Rows for the bound, or None.
        seed: Of the rows' noise and of the draws, the same at every call.
        group: The processes that share the work; all of them call each method.
    """

    def __init__(
        self, vae: nn.Module, train: Dataset, validation: Dataset | None, seed: int, group: Group
    ) -> None:
        self.vae, self.seed, self.group = vae, seed, group
        self.device = first_weight(vae).device
        self.train = train
        with forked(self.device):
            self.validation = None if validation is None else validation.fixed(seed)
            fixed = train.fixed(seed) if self.validation is None else self.validation
        self.unit_rows = fixed.batch(self._index(len(fixed), UNIT_ROWS))

    def initial_data(self) -> Tensor:
        """Training data for `vae.initialise`."""
        with forked(self.device):
            fixed = self.train.fixed(self.seed)
        index = self._index(len(fixed), INITIAL_ROWS)
        return cast(fixed.batch(index), first_weight(self.vae))[0]

    def first_densities(self) -> Densities:
        """The densities of two training rows, for their sizes."""
        rows = cast(self.train.batch(self._index(len(self.train), 2)), first_weight(self.vae))
        with evaluating(*programs(self.vae), seed=self.seed, device=self.device):
            return densities(*programs(self.vae), *rows)

    def bound(self) -> dict[str, float | None]:
        """Mean beta = 1 ELBO, reconstruction and KL of the validation rows, in nats."""
        names = ("elbo", "reconstruction", "kl")
        if self.validation is None:
            return {f"validation_{name}": None for name in names}
        values = torch.zeros(3, len(self.validation), dtype=torch.float64)
        for i, rows in self.group.local_items(
            list(enumerate(torch.arange(len(values[0])).split(CHUNK)))
        ):
            batch = self.validation.batch(rows.to(self.device))
            x, y = cast(batch, first_weight(self.vae))
            bound = lower_bound(*programs(self.vae), x, y, seed=self.seed + i)
            values[:, rows] = torch.stack([getattr(bound, name) for name in names])
        means = [value.mean().item() for value in self.group.all_reduce(values)]
        return {f"validation_{name}": mean for name, mean in zip(names, means)}

    def active_units(self) -> tuple[int, int] | None:
        """How many latent units vary with x, and how many there are: of `active_by_site`."""
        sites = self.active_by_site()
        if sites is None:
            return None
        active, total = zip(*sites.values())
        return sum(active), sum(total)

    def active_by_site(self) -> dict[str, tuple[int, int]] | None:
        r"""How many units of each latent site vary with x, and how many it has.

        A unit is active where :math:`\mathrm{Var}_x(E_q[z_d \mid x]) > 0.01`, over 1000 rows;
        what a site is given of other sites is at its mean. None for fewer than two rows, or if
        a site's distribution in the guide has no mean.

        References:
            Burda, Grosse and Salakhutdinov. Importance weighted autoencoders. 2016.
        """
        x, y = cast(self.unit_rows, first_weight(self.vae))
        if len(x) < 2:
            return None
        at_means, (model, guide) = AtMeans(), programs(self.vae)
        with evaluating(model, guide, seed=self.seed, device=self.device), OwnParameters():
            try:
                run_program(guide, x, y, 1, at_means)
            except NotImplementedError:
                return None
        means = {name: mean.reshape(len(x), -1) for name, mean in at_means.means.items()}
        active = {name: mean.var(0) > ACTIVE for name, mean in means.items()}
        return {name: (int(units.sum()), len(units)) for name, units in active.items()}

    def _index(self, num_rows: int, at_most: int) -> Tensor:
        return evenly_spaced(num_rows, at_most).to(self.device)


class AtMeans(Messenger):
    """Gives each site of a guide its mean, [1, B, *event], and keeps it by name."""

    def __init__(self) -> None:
        super().__init__()
        self.means: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        summed = msg["infer"].get("enumerate") == "parallel"  # it has no units
        if msg["is_observed"] or not is_random(msg) or summed:
            return
        self.means[msg["name"]] = msg["fn"].mean
        if msg["fn"].has_rsample:
            msg["value"] = self.means[msg["name"]]
