"""What is measured between epochs: the validation bound and the active units."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.densities import Program, evaluating, run_program
from pyro_vae.densities.programs import is_random
from pyro_vae.estimators.importance import lower_bound
from pyro_vae.processes import Group
from pyro_vae.runtime import forked
from pyro_vae.training.dataset import Dataset, fetch, fetch_few

__all__ = ["Evaluator"]

CHUNK = 1000  # rows at once
UNIT_ROWS = 1000  # that the active units are counted on
ACTIVE = 0.01  # least variance over data of an active unit's posterior mean


class Evaluator:
    """Measures a vae between epochs; generators and modes are left as they were.

    The noise of rows and the draws are of `seed`, the same at every call. All processes of the
    group call each method.

    Attributes:
        weight: A parameter; the others, and the data, have its device and type.
    """

    def __init__(
        self, vae: Any, train: Dataset, validation: Dataset | None, seed: int, group: Group
    ) -> None:
        self.programs: tuple[Program, Program] = vae.model, vae.guide
        self.seed, self.group = seed, group
        self.weight = next(p for p in vae.parameters() if p.is_floating_point())
        self.device = self.weight.device
        with forked(self.device):
            self.validation = None if validation is None else validation.fixed(seed)
            fixed = train.fixed(seed) if self.validation is None else self.validation
        self.unit_rows = fetch_few(fixed, UNIT_ROWS, self.weight)

    def bound(self) -> dict[str, float | None]:
        """Mean beta = 1 ELBO, reconstruction and KL of the validation rows, in nats."""
        names = ("elbo", "reconstruction", "kl")
        if self.validation is None:
            return {f"validation_{name}": None for name in names}
        values = torch.zeros(3, len(self.validation), dtype=torch.float64)
        chunks = list(enumerate(torch.arange(len(values[0])).split(CHUNK)))
        for i, rows in chunks[self.group.rank :: self.group.size]:  # this rank's share
            x, *y = fetch(self.validation, rows.to(self.device), self.weight)
            bound = lower_bound(*self.programs, x, y[0] if y else None, seed=self.seed + i)
            values[:, rows] = torch.stack([getattr(bound, name) for name in names])
        (total,) = self.group.all_reduce_mean(1.0, (), values.to(self.device))
        return {f"validation_{name}": each.mean().item() for name, each in zip(names, total)}

    def active_units(self) -> dict[str, tuple[int, int]]:
        r"""How many units of each latent site vary with x, and how many it has.

        A unit is active where :math:`\mathrm{Var}_x(E_q[z_d \mid x]) > 0.01`, over 1000 rows;
        what a site is given of other sites is at its mean. Empty for fewer than two rows, or if
        a site's distribution in the guide has no mean.

        References:
            Burda, Grosse and Salakhutdinov. Importance weighted autoencoders. 2016.
        """
        x, *y = (part.to(self.weight) for part in self.unit_rows)
        if len(x) < 2:
            return {}
        at_means, guide = AtMeans(), self.programs[1]
        with evaluating(guide, seed=self.seed, device=self.device):
            try:
                run_program(guide, x, y[0] if y else None, 1, at_means)
            except NotImplementedError:
                return {}
        means = {name: mean.reshape(len(x), -1) for name, mean in at_means.means.items()}
        active = {name: mean.var(0) > ACTIVE for name, mean in means.items()}
        return {name: (int(units.sum()), len(units)) for name, units in active.items()}


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
