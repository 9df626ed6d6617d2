"""The second player of an objective that has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pyro_vae.densities import densities
from pyro_vae.densities.evaluating import evaluating
from pyro_vae.objectives import Objective
from pyro_vae.training.dataset import Dataset, evenly_spaced
from pyro_vae.training.evaluation import cast, first_weight, programs
from pyro_vae.training.group import Group

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Adversary", "start"]

FIRST_ROWS = 2  # that tell the second player the sizes


def start(vae: nn.Module, objective: Objective, rows: Dataset, seed: int) -> None:
    """Makes the objective's second player, anew, for the latents of `vae`."""
    weight = first_weight(vae)
    index = evenly_spaced(len(rows), FIRST_ROWS).to(weight.device)
    with evaluating(*programs(vae), seed=seed, device=weight.device):
        d = densities(*programs(vae), *cast(rows.batch(index), weight))
    objective.start(d)


class Adversary:
    """The second player's optimiser, and its steps."""

    def __init__(self, fabric: Fabric, group: Group, objective: Objective) -> None:
        self.fabric, self.group = fabric, group
        optimizer = objective.adversary_optimizer()
        self.parameters = [p for part in optimizer.param_groups for p in part["params"]]
        self.optimizer: Any = fabric.setup_optimizers(optimizer)

    def step(self, loss: Tensor, weight: float) -> None:
        """One update against `loss`, which no parameter of the vae is in.

        Args:
            loss: Of this process's share of the batch.
            weight: Of the share in the batch's mean.
        """
        self.fabric.backward(loss)
        self.group.all_reduce_mean(weight, self.parameters)
        self.optimizer.step()
        self.optimizer.zero_grad()
