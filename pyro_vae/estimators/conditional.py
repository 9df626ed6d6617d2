"""Conditional probabilities under a model: of entries, columns and classes given the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.densities import Program, summed_values
from pyro_vae.estimators.evidence import Evidence, pareto_khat, worst_verdicts
from pyro_vae.estimators.log_evidence import log_evidence
from pyro_vae.estimators.proposal import mix
from pyro_vae.estimators.refined import Fit, fit_proposal
from pyro_vae.estimators.run import estimator, for_each_value, map_targets, summed
from pyro_vae.estimators.target import Target

LARGEST_KHAT = 0.6  # k-hat of a column's weights, above which the column gets draws of its own


@estimator
def log_conditional(
    model: Program,
    guide: Program,
    x: Tensor,
    given: Tensor,
    y: Tensor | None = None,
    **options: Any,
) -> Evidence:
    r"""Estimates log p(x[~given] | x[given]) of each datum, of some entries given others.

    .. math:: \log p(x_m \mid x_o) = \log p(x_m, x_o) - \log p(x_o)

    Args:
        model: As in `log_evidence`, of a VAE with missing=True, or of one's own that observes x
            as `distributions.Incomplete`.
        guide: Pyro guide called with the same arguments.
        x: Data [N, *E]; NaN entries belong to neither part.
        given: Which entries are conditioned on, bool [*E] or [N, *E].
        y: Condition of each datum [N, C], or None.
        options: As in `log_evidence`: tolerance, budget, audit, seed and others.

    Returns:
        Evidence of the difference, its standard error from both; "reliable" where both are.

    Raises:
        ValueError: As `log_evidence`; if `given` is not of the data's shape.
    """
    given = torch.as_tensor(given, device=x.device)
    if given.dtype != torch.bool or given.shape not in (x.shape, x.shape[1:]):
        raise ValueError(
            f"given must be bool, of shape {list(x.shape[1:])} or {list(x.shape)}; got "
            f"{str(given.dtype)[6:]} {list(given.shape)}"
        )
    both = torch.cat([x, torch.where(given, x, torch.nan)])
    twice = None if y is None else torch.cat([y, y])
    found = log_evidence(model, guide, both, twice, **options)
    rows = torch.arange(len(x))
    a, b = found.rows(rows), found.rows(rows + len(x))
    return Evidence(
        log_prob=a.log_prob - b.log_prob,
        stderr=torch.hypot(a.stderr, b.stderr),
        ess=torch.minimum(a.ess, b.ess),
        khat=torch.maximum(a.khat, b.khat),
        num_samples=torch.minimum(a.num_samples, b.num_samples),
        method=[f"{m} less {n}" for m, n in zip(a.method, b.method)],
        verdict=[
            "reliable" if v == w == "reliable" else "doubtful"
            for v, w in zip(a.verdict, b.verdict)
        ],
        extras={"missing": a.missing ^ b.missing},  # tells both sets of entries from others
        audit=a.audit,
    )


@estimator
def column_log_prob(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_samples: int = 2000,
    chunk_size: int | None = None,
    compile: bool = False,
    devices: int = 1,
    seed: int | None = 0,
    progress: bool = False,
) -> Tensor:
    r"""Estimates log p(x_c | other columns) of each value, which shows what makes a row odd.

    .. math:: \log p(x_c \mid x_{-c}) = \log p(x) - \log p(x_{-c}), \qquad
        p(x_{-c}) \approx \frac1K \sum_k \frac{w_k}{p(x_c \mid z_k)}

    with the weighted draws that give log p(x). This averages p(x_c | z) over draws weighted for
    the other columns, so that a log probability is never above 0. Where leaving a column out
    makes the k-hat of these weights larger than 0.6, the draws are from a mixture of the
    proposals for x and for the other columns. A VAE without missing=True has no proposal for
    the others: there, log p of an odd value may come out too high.

    Args:
        model: As in `log_evidence`, or a VAE; its one observed site is x, its entries independent
            given the latents. A model of one's own must accept NaN, unless it is a method of a
            module whose `missing` is False.
        guide: Pyro guide called with the same arguments.
        x: Data [N, *E].
        y: Condition of each datum [N, C], or None.
        num_samples: Weighted draws K.
        chunk_size: As in `log_evidence`.
        compile: As in `log_evidence`.
        devices: As in `log_evidence`.
        seed: As in `log_evidence`.
        progress: As in `log_evidence`.

    Returns:
        log p in nats [N, *E]; NaN where a value is missing.

    Raises:
        ValueError: As `refined_importance_sampling`; if the model observes anything but x, or the
            entries are not independent given the latents.

    References:
        Vehtari, Gelman and Gabry. Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC. 2017.
    """
    missing = getattr(getattr(model, "__self__", None), "missing", True)
    estimate = partial(_leave_out_each, num_samples=num_samples, missing=missing)
    run = partial(map_targets, estimate, chunk_size=chunk_size, compile=compile, devices=devices)
    found = _leave_one_out(model, guide, x, y, run=run, seed=seed, progress=progress).log_prob
    return (found[:, :1] - found[:, 1:]).view(x.shape).masked_fill(x.isnan().cpu(), math.nan)


@dataclass(frozen=True, eq=False)
class _LeaveOneOut:
    """log p(x), then log p(x_{-c}) without each entry c in turn; [N, 1 + C] on the CPU.

    At a value of a discrete latent, these are joint log densities with that value.
    """

    log_prob: Tensor

    def __len__(self) -> int:
        return len(self.log_prob)

    @classmethod
    def mixed(cls, parts: Sequence[_LeaveOneOut]) -> _LeaveOneOut:
        """Sums over the values of the discrete latent."""
        return cls(torch.stack([part.log_prob for part in parts]).logsumexp(0))

    def rows(self, index: Tensor) -> _LeaveOneOut:
        """Returns the numbers of some of the data."""
        return _LeaveOneOut(self.log_prob[index])

    def excluded(self, index: Tensor) -> _LeaveOneOut:
        """Returns the same with -inf for some data, which the model excludes."""
        return _LeaveOneOut(self.log_prob.index_fill(0, index, -math.inf))


@summed
def _leave_one_out(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    *,
    run: Callable[..., list[Tensor]],
    seed: int | None,
    progress: bool = False,
) -> _LeaveOneOut:
    return _LeaveOneOut(torch.cat(run(model, guide, x, y, seed=seed, progress=progress)))


def _leave_out_each(target: Target, num_samples: int, missing: bool) -> Tensor:
    """Returns the numbers of `_LeaveOneOut` for B data; `missing` tells if the model takes NaN."""
    fit = fit_proposal(target)
    runs = fit.weighted_runs(torch.cat([*fit.draws(num_samples)]), num_samples)
    weights, entries = zip(*((w.unsqueeze(-1), run.entry_log_prob()) for w, run in runs))
    whole = torch.cat(weights)
    rest = whole - torch.cat(entries).reshape(*whole.shape[:2], -1)  # one left out [K, B, C]
    found = torch.cat([whole.logsumexp(0), rest.logsumexp(0)], 1).cpu()
    khat = pareto_khat(rest.flatten(1).cpu()).view(found[:, 1:].shape)
    observed = ~target.x.isnan().reshape(len(found), -1).cpu()
    hard = ((khat > LARGEST_KHAT) & observed & missing).nonzero()
    for rows, entry in (pair.T for pair in hard.split(target.num_data) if len(hard)):
        log_conditional = _entry_log_prob(fit.rows(rows.to(whole.device)), entry, num_samples)
        found[rows, 1 + entry] = found[rows, 0] - log_conditional
    return found - math.log(num_samples)


def _entry_log_prob(fit: Fit, entry: Tensor, num_samples: int) -> Tensor:
    """Returns log p(x_c | the others) [M] of the entry c of each row, by index, on the CPU."""
    target = fit.target
    index: Any = (torch.arange(len(entry)), *torch.unravel_index(entry, target.x.shape[1:]))
    rest = fit_proposal(target.without_entries(index))
    mixture = mix([rest.proposal, fit.proposal], [-math.log(2)] * 2)
    both = replace(rest, proposal=mixture)
    draws, weights = map(torch.cat, zip(*both.weighted_draws(2 * num_samples)))
    runs = map(target.run_model, draws.split(target.draws_at_once))
    parts = [run.entry_log_prob()[:, *index] for run in runs]
    return ((weights + torch.cat(parts)).logsumexp(0) - weights.logsumexp(0)).cpu()


class ClassProbabilities(NamedTuple):
    """p(y | x) of each datum, on the CPU.

    Attributes:
        probabilities: Probabilities of the classes [N, C].
        stderr: Their Monte Carlo standard errors [N, C], by the delta method.
        verdict: The worst verdict, "reliable", "lower bound" or "doubtful", on log p(x, y) of each
            datum among the classes of probability above 0.001.
    """

    probabilities: Tensor
    stderr: Tensor
    verdict: list[str]


@estimator
def class_probabilities(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    site: str | None = None,
    estimator: Callable[..., Evidence] = log_evidence,
    seed: int | None = 0,
    **options: Any,
) -> ClassProbabilities:
    r"""Estimates the probabilities of the classes of each datum under the model itself.

    .. math:: p(y \mid x) = \frac{p(x, y)}{\sum_{y'} p(x, y')}

    Each log p(x, y) is an estimate of its own, so that the cost is that of `estimator` times
    the number of classes.

    Args:
        model: Pyro model with a discrete latent marked `infer={"enumerate": "parallel"}`; or a
            VAE, which stands for its model and guide: class_probabilities(vae, x).
        guide: Pyro guide called with the same arguments.
        x: Data [N, *E], a tensor, array, frame or list; as is y.
        y: Condition of each datum [N, C], or None.
        site: Name of the latent, needed if there are several: the others are summed out.
        estimator: Function that estimates log p(x, y); `importance_sampling` is faster, less sure.
        seed: Seed of the draws.
        options: Further arguments of the estimator.

    Returns:
        Probabilities [N, C], their standard errors [N, C], and the verdict of each datum. Classes
        are in the order of the latent's support.

    Raises:
        ValueError: If the model has no such latent, or several and none is named.

    Example:
        >>> vae = build(3, latent_dim=2, classes=7)
        >>> found = class_probabilities(vae, torch.ones(5, 3), estimator=importance_sampling)
        >>> found.probabilities.shape
        torch.Size([5, 7])
    """
    values = summed_values(model, x, y)
    if site is None and len(values) == 1:
        site = next(iter(values))
    if site not in values:
        raise ValueError(
            f"site must name a discrete latent with infer={{'enumerate': 'parallel'}}; the model "
            f"has {sorted(values) or 'none'}, got {site!r}"
        )
    parts = for_each_value(estimator, values, model, guide, x, y, seed=seed, **options)
    rows = values[site].reshape(len(values[site]), -1)
    first = (rows.unsqueeze(1) == rows).all(-1).int().argmax(1)  # first row of the same value
    classes = torch.unique(first, return_inverse=True)[1].cpu()
    joint, stderr = (torch.stack([getattr(p, n) for p in parts]) for n in ("log_prob", "stderr"))
    probability = (joint - joint.logsumexp(0)).exp()  # [J, N] of the J joint values
    member = torch.nn.functional.one_hot(classes).to(probability)  # [J, C]
    found = probability.T @ member
    slopes = (member.unsqueeze(1) - found) * (probability * stderr).unsqueeze(-1)  # [J, N, C]
    error = slopes.square().sum(0).sqrt()
    return ClassProbabilities(found, error, worst_verdicts(parts, probability))
