"""log p(x), by as much work as each datum needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyro_vae.densities import Program
from pyro_vae.estimators.annealed import PILOT_CHAINS, Path
from pyro_vae.estimators.batches import map_targets
from pyro_vae.estimators.evidence import Evidence
from pyro_vae.estimators.importance import summarise
from pyro_vae.estimators.refined import Fit, fit_cost, fit_proposal
from pyro_vae.estimators.starts import Refined
from pyro_vae.estimators.target import Target

__all__ = ["log_evidence"]


def log_evidence(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    tolerance: float = 0.05,
    budget: int | None = None,
    chunk_size: int | None = None,
    compile: bool = False,
    devices: int = 1,
    seed: int | None = 0,
    progress: bool = False,
) -> Evidence:
    """log p(x) of each datum, with an error below `tolerance` or a word that it is not.

    A proposal is fitted to each datum's posterior (`refined_importance_sampling`) and scored
    with 1000 fresh draws. Data whose standard error or k-hat does not pass then get 4000, then
    16,000 draws, then annealed importance sampling from that proposal with 64 and with 256
    chains, each time with fresh ones, until they pass or the budget ends.

    "reliable" means a standard error below the tolerance, a k-hat below the published
    threshold, and no part of the posterior that draws of the prior found and the estimate did
    not; all else is "doubtful". The value of a doubtful datum is the best that was had.

    Args:
        model: Pyro model of (x) or (x, y), all its sites inside one plate "data", its latents
            continuous, on any support that is fixed.
        guide: Pyro guide of the same arguments.
        x: Data [N, *E].
        y: What is conditioned on [N, C], or None.
        tolerance: Largest standard error, in nats.
        budget: Most evaluations of the model, with or without gradient, for one datum; all that
            the steps above may need (about 45,000) if None. The fit and the first draws need
            some 4000. What further modes of a datum cost is not counted.
        chunk_size: Draws times data that the model sees at once.
        compile: Whether to compile log p(x, u) and its gradient: some seconds, once for each
            shape that comes often; the result is the same to rounding.
        devices: Processes that share the data, as in `importance_sampling`.
        seed: Of the draws.
        progress: Whether to show a progress bar.

    Returns:
        Evidence of N data, in nats, with the method and the verdict of each.

    Raises:
        ValueError: If the tolerance is not positive, the budget is below the least, a latent is
            discrete, the likelihood has no gradient, or the programs have no weight per datum.

    References:
        Burda, Grosse and Salakhutdinov. Importance weighted autoencoders. 2016.
        Wu, Burda, Salakhutdinov and Grosse. On the quantitative analysis of decoder-based
        generative models. 2017.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, in nats; got {tolerance}")
    limit = math.inf if budget is None else budget
    parts = map_targets(
        partial(_escalate, tolerance=tolerance, budget=limit),
        model,
        guide,
        x,
        y,
        chunk_size=chunk_size,
        seed=seed,
        devices=devices,
        progress=progress,
        compile=compile,
    )
    return Evidence.cat(parts)


@dataclass(frozen=True)
class Draws:
    """Importance sampling from the fitted proposal."""

    number: int

    @property
    def cost(self) -> int:
        """Evaluations of the model for one datum."""
        return self.number

    def __call__(self, fit: Fit, tolerance: float) -> Evidence:
        """Evidence from fresh draws."""
        return fit.importance_sampling(self.number, tolerance)


@dataclass(frozen=True)
class Chains:
    """Annealed importance sampling from the fitted proposal."""

    number: int
    temperatures: int = 20
    leapfrog: int = 3

    @property
    def cost(self) -> int:
        """Evaluations of the model for one datum."""
        return (self.number + PILOT_CHAINS) * self.temperatures * self.leapfrog

    def __call__(self, fit: Fit, tolerance: float) -> Evidence:
        """Evidence from fresh chains."""
        path = Path(Refined(fit), self.temperatures, self.leapfrog, "sigmoid")
        weights = path.forward(self.number).cpu()
        return fit.judge(summarise(weights, "annealed, refined", "doubtful"), tolerance)


FIRST = Draws(1000)
LADDER: tuple[Draws | Chains, ...] = (Draws(4000), Draws(16_000), Chains(64), Chains(256))


def _escalate(target: Target, tolerance: float, budget: float) -> Evidence:
    spent = fit_cost(target.dim) + FIRST.cost
    if spent > budget:
        raise ValueError(
            f"budget must be at least {spent} evaluations of the model for each datum, at "
            f"{target.dim} latent dimensions; got {budget}: raise it, or use importance_sampling"
        )
    fit = fit_proposal(target)
    evidence = FIRST(fit, tolerance)
    for rung in LADDER:
        doubtful = [i for i, verdict in enumerate(evidence.verdict) if verdict == "doubtful"]
        if doubtful and spent + rung.cost <= budget:
            spent += rung.cost
            rows = torch.tensor(doubtful)
            evidence = _update(evidence, rows, rung(fit.rows(rows.to(target.x.device)), tolerance))
    return evidence


def _update(old: Evidence, rows: Tensor, new: Evidence) -> Evidence:
    """The old evidence with that of `rows` replaced, unless what was there looks better."""
    before = old.rows(rows)
    better = (before.khat < before.khat_threshold) & (before.stderr < new.stderr)
    passed = torch.tensor([verdict == "reliable" for verdict in new.verdict])
    index = torch.arange(len(old))
    index[rows] = torch.where(passed | ~better, len(old) + torch.arange(len(rows)), rows)
    return Evidence.cat([old, new]).rows(index)
