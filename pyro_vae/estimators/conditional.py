"""log p of entries of a datum given others of its entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vae.densities import Program
from pyro_vae.estimators.diagnostics import pareto_khat
from pyro_vae.estimators.evidence import Evidence
from pyro_vae.estimators.log_evidence import log_evidence
from pyro_vae.estimators.proposal import joined
from pyro_vae.estimators.refined import Fit, fit_proposal
from pyro_vae.estimators.run import estimator, map_targets
from pyro_vae.estimators.target import Target
from pyro_vae.estimators.values import summed

__all__ = ["column_log_prob", "log_conditional"]

KHAT = 0.6  # of a column's weights, above which it gets draws of its own


@estimator
def log_conditional(
    model: Program,
    guide: Program,
    x: Tensor,
    given: Tensor,
    y: Tensor | None = None,
    **options: Any,
) -> Evidence:
    r"""log p(x[~given] | x[given]) of each datum: how probable were entries given others.

    .. math:: \log p(x_m \mid x_o) = \log p(x_m, x_o) - \log p(x_o)

    Args:
        model: As in `log_evidence`, of a VAE with missing=True, or of one's own that observes x
            as `distributions.Incomplete`.
        guide: Pyro guide of the same arguments.
        x: Data [N, *E]; NaN is missing from both.
        given: Which entries are conditioned on, bool [*E] or [N, *E].
        y: What is conditioned on [N, C], or None.
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
    return _less(found.rows(rows), found.rows(rows + len(x)))


def _less(a: Evidence, b: Evidence) -> Evidence:
    """The difference of two evidences of the same data, with the worse diagnostics of both."""
    good = [{v, w} == {"reliable"} for v, w in zip(a.verdict, b.verdict)]
    return Evidence(
        log_prob=a.log_prob - b.log_prob,
        stderr=torch.hypot(a.stderr, b.stderr),
        ess=torch.minimum(a.ess, b.ess),
        khat=torch.maximum(a.khat, b.khat),
        num_samples=torch.minimum(a.num_samples, b.num_samples),
        method=[f"{m} less {n}" for m, n in zip(a.method, b.method)],
        verdict=["reliable" if both else "doubtful" for both in good],
        extras={"missing": b.missing},
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
    r"""log p(x_c | the other columns) of each value: which of them make a row odd.

    .. math:: \log p(x_c \mid x_{-c}) = \log p(x) - \log p(x_{-c}), \qquad
        p(x_{-c}) \approx \frac1K \sum_k \frac{w_k}{p(x_c \mid z_k)}

    with the weighted draws that give log p(x): the average of p(x_c | z) over draws weighted for
    the other columns, so that it is never above 0 for a probability. Where leaving a column out
    makes the k-hat of these weights larger than 0.6, the draws are from a mixture of the proposals
    for x and for the other columns. A VAE without missing=True has no proposal for the others:
    there, log p of an odd value may come out too high.

    Args:
        model: As in `log_evidence`, or a VAE; its one observed site is x, its entries independent
            given the latents. One of one's own takes NaN, unless it is a method of a module whose
            `missing` is False.
        guide: Pyro guide of the same arguments.
        x: Data [N, *E].
        y: What is conditioned on [N, C], or None.
        num_samples: Weighted draws K.
        chunk_size: As in `log_evidence`.
        compile: As in `log_evidence`.
        devices: As in `log_evidence`.
        seed: As in `log_evidence`.
        progress: As in `log_evidence`.

    Returns:
        Nats [N, *E]; NaN where a value is missing.

    Raises:
        ValueError: As `refined_importance_sampling`; if the model observes anything but x, or the
            entries are not independent given the latents.

    References:
        Vehtari, Gelman and Gabry. Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC. 2017.
    """
    missing = getattr(getattr(model, "__self__", None), "missing", True)
    estimate = partial(_columns, num_samples=num_samples, missing=missing)
    run = partial(map_targets, estimate, chunk_size=chunk_size, compile=compile, devices=devices)
    found = _joined(run, model, guide, x, y, seed=seed, progress=progress)
    whole = found.whole.view(-1, *[1] * (x.ndim - 1))
    return (whole - found.rest).masked_fill(x.isnan().cpu(), math.nan)


@dataclass(frozen=True, eq=False)
class _Columns:
    """log p(x) [N], and log p(x_{-c}) of the other entries than each [N, *E]; on the CPU.

    Given a value of a discrete latent they are those of its joint density with the data.
    """

    whole: Tensor
    rest: Tensor

    def __len__(self) -> int:
        return len(self.whole)

    @classmethod
    def mixed(cls, parts: Sequence[_Columns]) -> _Columns:
        """Of the data alone, from those of each value."""
        both = [(part.whole, part.rest) for part in parts]
        return cls(*(torch.stack(each).logsumexp(0) for each in zip(*both)))

    def rows(self, index: Tensor) -> _Columns:
        """Those of some of the data."""
        return _Columns(self.whole[index], self.rest[index])

    def excluded(self, index: Tensor) -> _Columns:
        """The same, some of the data excluded by the model."""
        parts = (part.index_fill(0, index, -math.inf) for part in (self.whole, self.rest))
        return _Columns(*parts)


@summed
def _joined(
    run: Callable[..., list[_Columns]],
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    *,
    seed: int | None,
    progress: bool,
) -> _Columns:
    parts = run(model, guide, x, y, seed=seed, progress=progress)
    return _Columns(torch.cat([p.whole for p in parts]), torch.cat([p.rest for p in parts]))


def _columns(target: Target, num_samples: int, missing: bool) -> _Columns:
    """log p(x) and log p(x_{-c}) of B data; `missing` is whether the model takes NaN."""
    fit = fit_proposal(target)
    weights, without = _weights(fit, num_samples)
    whole, rest = weights.logsumexp(0).cpu(), without.logsumexp(0).cpu()
    khat = pareto_khat(without.flatten(1).cpu()).view(rest.shape)
    hard = ((khat > KHAT) & ~target.x.isnan().cpu() & missing).nonzero()
    for cells in hard.split(target.num_data) if len(hard) else ():
        given = _cells(fit.rows(cells[:, 0].to(weights.device)), cells[:, 1:], num_samples)
        rest[tuple(cells.T)] = whole[cells[:, 0]] - given
    number = math.log(num_samples)
    return _Columns(whole - number, rest - number)


def _weights(fit: Fit, num_samples: int) -> tuple[Tensor, Tensor]:
    """Log weights of fresh draws [K, B], and those for each entry left out [K, B, *E]."""
    runs = fit.weighed(fit.places(num_samples), num_samples)
    weights, entries = zip(*((weight, run.entry_log_prob()) for weight, run in runs))
    whole = torch.cat(weights)
    wide = whole.view(*whole.shape, *[1] * (entries[0].ndim - 2))
    return whole, wide - torch.cat(entries)


def _cells(fit: Fit, entries: Tensor, num_samples: int) -> Tensor:
    """log p(x_c | the others) [M] of one entry [M, *] of each row, on the CPU."""
    target, cell = fit.target, (torch.arange(len(entries)), *entries.T)
    rest = fit_proposal(target.without(cell))
    halves = joined([rest.proposal, fit.proposal], [-math.log(2)] * 2)
    both = replace(rest, proposal=halves)
    places, weights = both.draw_with_places(2 * num_samples)
    parts = [target.at(u).entry_log_prob()[:, *cell] for u in places.split(target.draws_at_once)]
    return ((weights + torch.cat(parts)).logsumexp(0) - weights.logsumexp(0)).cpu()
