"""log p(x) that says how far it can be trusted."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from pyro_vae.densities import NotSimulated, Program
from pyro_vae.estimators.audit import Audit, kept_audit
from pyro_vae.estimators.batches import map_targets
from pyro_vae.estimators.bound import lower_bound
from pyro_vae.estimators.escalating import escalate
from pyro_vae.estimators.evidence import Evidence
from pyro_vae.estimators.given import estimator
from pyro_vae.estimators.target import ROWS, Target

__all__ = ["log_evidence"]

REGRET_DRAWS = 16  # of the guide, behind its ELBO


@estimator
def log_evidence(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    tolerance: float = 0.05,
    budget: int | None = None,
    audit: bool | Audit = True,
    chunk_size: int | None = None,
    compile: bool = False,
    devices: int = 1,
    seed: int | None = 0,
    progress: bool = False,
) -> Evidence:
    """log p(x) of each datum, with an error below `tolerance` or a word that it is not.

    A proposal is fitted to each datum's posterior (`refined_importance_sampling`). A pilot of
    400 draws, and short walks through the posterior, say how many fresh draws the tolerance
    needs, 1000 to 8000. Where these are not enough, the proposal gets up to 24 more components,
    and up to 64,000 draws; where that is not enough, annealed importance sampling starts from
    it with 384 chains. No draw that chose the number of draws is scored.

    "reliable" means: a standard error below the tolerance, a k-hat below 0.6 (and below its
    published threshold), a search for modes that ended, no part of the posterior that draws of
    the prior found and the estimate did not, and an `audit` that passed: on data simulated from
    the model, whose latents are known, what is called reliable deserves it. All else is
    "doubtful", and the value is the best estimate reached.

    Args:
        model: Pyro model of (x) or (x, y), all its sites inside one plate "data", its latents
            continuous, on any support that is fixed; or a VAE, which stands for its model and
            guide: log_evidence(vae, x, y).
        guide: Pyro guide of the same arguments.
        x: Data [N, *E], a tensor, array, frame or list; as is y.
        y: What is conditioned on [N, C], or None.
        tolerance: Largest standard error, in nats.
        budget: Most evaluations of the model, with or without gradient, for one datum; all that
            the steps above may need (about 100,000) if None. The fit and the first draws need
            some 5000. What further modes of a datum cost is not counted.
        audit: An `Audit` of these programs; or whether to make one, of 24 to 64 simulated data,
            an eighth of N in between. It is kept for the weights of a model and guide that are
            methods of a torch module. A model that observes anything but x cannot be audited,
            which the result says.
        chunk_size: Draws times data that the model sees at once.
        compile: Whether to compile log p(x, u) and its gradient: some seconds, once for each
            shape that comes often; the result is the same to rounding.
        devices: Processes that share the data, as in `importance_sampling`.
        seed: Of the draws.
        progress: Whether to show a progress bar.

    Returns:
        Evidence of N data, in nats, with the method and the verdict of each, and the audit. Its
        extra "regret" is log p(x) less the guide's ELBO, from 16 draws: KL(q(z | x) || p(z | x)),
        what amortised inference costs this datum. It is large for data unlike those trained on.

    Raises:
        ValueError: If the tolerance is not positive, the budget is below the least, a latent is
            discrete, the likelihood has no gradient, or the programs have no weight per datum.

    References:
        Burda, Grosse and Salakhutdinov. Importance weighted autoencoders. 2016.
        Xiao, Yan and Amit. Likelihood regret: an out-of-distribution detection score for
        variational auto-encoder. 2020.
        Wu, Burda, Salakhutdinov and Grosse. On the quantitative analysis of decoder-based
        generative models. 2017.
    """
    limit = math.inf if budget is None else budget
    options: dict[str, Any] = {
        "chunk_size": chunk_size,
        "seed": seed,
        "devices": devices,
        "progress": progress,
    }
    parts = map_targets(
        partial(_estimate, tolerance=tolerance, budget=limit),
        model,
        guide,
        x,
        y,
        compile=compile,
        **options,
    )
    evidence = Evidence.cat(parts)
    bound = lower_bound(
        model, guide, x, y, num_samples=REGRET_DRAWS, chunk_size=chunk_size or ROWS, seed=seed
    )
    evidence = replace(evidence, extras={"regret": evidence.log_prob - bound.elbo})
    if audit is False or "reliable" not in evidence.verdict:
        return evidence
    if audit is not True:
        return audit.applied(evidence)
    try:
        made = kept_audit(model, guide, x, y, tolerance=tolerance, budget=budget, **options)
    except NotSimulated as error:
        return replace(evidence, audit=f"none: {error}")
    return made.applied(evidence)


def _estimate(target: Target, tolerance: float, budget: float) -> Evidence:
    return escalate(target, tolerance, budget).evidence
