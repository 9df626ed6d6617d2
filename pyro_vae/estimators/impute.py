"""Imputation of missing entries, given the observed ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import check_choice
from pyro_vae.densities import Program
from pyro_vae.estimators.evidence import Evidence, summarise
from pyro_vae.estimators.hmc import walk
from pyro_vae.estimators.refined import LOWEST, METHOD, Fit, fit_proposal
from pyro_vae.estimators.run import estimator, exact_without_data, map_targets, summed
from pyro_vae.estimators.target import ModelRun, Target
from pyro_vae.runtime import check_fits

TOLERANCE = 0.1  # largest standard error, in nats, of data that are called reliable


@dataclass(frozen=True, eq=False)
class Imputation:
    """N data with their missing entries drawn, on the CPU. Observed entries are as given.

    Attributes:
        draws: Completed data [R, N, *E]; the missing entries of a datum are drawn jointly, from
            their distribution given its observed ones.
        mean: Means [N, *E] of that distribution.
        stderr: Their Monte Carlo standard errors [N, *E]; 0 where observed.
        evidence: log p of the observed entries of each datum, with its errors and verdict.
    """

    draws: Tensor
    mean: Tensor
    stderr: Tensor
    evidence: Evidence

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def median(self) -> Tensor:
        """Medians [N, *E] of the draws."""
        return self.quantile(0.5)

    def quantile(self, q: float) -> Tensor:
        """Returns quantiles [N, *E] of the draws: 0.05 and 0.95 give an interval of 90 %."""
        return self.draws.double().quantile(q, 0).to(self.draws.dtype)

    @property
    def log_prob(self) -> Tensor:
        """log p of the observed entries [N], in nats."""
        return self.evidence.log_prob

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the weighted draws behind each datum [N]."""
        return self.evidence.ess

    @property
    def khat(self) -> Tensor:
        """Shape of the Pareto tail of the weights [N]."""
        return self.evidence.khat

    @property
    def verdict(self) -> list[str]:
        """The verdicts: "reliable", "doubtful" or, from draws of the guide, "lower bound"."""
        return self.evidence.verdict

    def to_inference_data(self) -> Any:
        """Returns ArviZ's InferenceData: `draws` in `posterior_predictive`, and the evidence."""
        found = self.evidence.to_inference_data()
        draws = {"x": self.draws[None].numpy()}
        found.add_groups(posterior_predictive=draws, dims={"x": ["row"]})
        return found

    @classmethod
    def cat(cls, parts: Sequence[Imputation]) -> Imputation:
        """Joins the data of all `parts`, in order."""
        return cls(
            torch.cat([part.draws for part in parts], 1),
            torch.cat([part.mean for part in parts]),
            torch.cat([part.stderr for part in parts]),
            Evidence.cat([part.evidence for part in parts]),
        )

    @classmethod
    def mixed(cls, parts: Sequence[Imputation]) -> Imputation:
        """Mixes imputations at the values c of a discrete latent, whose `log_prob` is log p(x, c).

        Each draw is one at a value that is itself drawn from p(c | x).
        """
        joint = torch.stack([part.log_prob for part in parts])
        probability = (joint - joint.logsumexp(0)).exp()  # [C, N]
        draws, event = parts[0].draws, [1] * (parts[0].mean.ndim - 1)
        value = torch.multinomial(probability.T, len(draws), True).T
        for c, part in enumerate(parts):
            draws = torch.where((value == c).view(*value.shape, *event), part.draws, draws)
        wide = probability.view(*probability.shape, *event).to(draws)
        means, errors = (torch.stack([getattr(p, k) for p in parts]) for k in ("mean", "stderr"))
        likeliest = means[probability.argmax(0), torch.arange(len(wide[0]))]
        mean = likeliest + (wide * (means - likeliest)).sum(0)  # exact where all agree
        probability_stderr = torch.stack([part.evidence.stderr for part in parts]).view(wide.shape)
        square = (wide * errors).square() + (wide * probability_stderr * (means - mean)).square()
        evidence = Evidence.mixed([part.evidence for part in parts])
        return cls(draws, mean, square.sum(0).sqrt().to(mean), evidence)

    def excluded(self, index: Tensor) -> Imputation:
        """Returns the imputations with some data marked as excluded by the model."""
        return replace(self, evidence=self.evidence.excluded(index))

    def rows(self, index: Tensor) -> Imputation:
        """Returns the imputations of some of the data, by their indices."""
        parts = self.draws[:, index], self.mean[index], self.stderr[index]
        return Imputation(*parts, self.evidence.rows(index))

    def __repr__(self) -> str:
        good = self.verdict.count("reliable")
        return f"Imputation({len(self.draws)} draws of {len(self)} data, {good} reliable)"


@estimator
@summed
def impute(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_draws: int = 100,
    num_samples: int = 2000,
    proposal: str = "refined",
    chunk_size: int | None = None,
    compile: bool = False,
    devices: int = 1,
    seed: int | None = 0,
    progress: bool = False,
) -> Imputation:
    r"""Draws missing entries (NaN in x) from their distribution given the observed ones.

    .. math:: p(x_m \mid x_o) = \int p(x_m \mid z) \, p(z \mid x_o) \, dz

    A proposal is fitted to the posterior of each datum and drawn from K times, as in
    `refined_importance_sampling`, with more components where these are not enough. R of these
    draws are picked in proportion to their weights, and the missing entries are drawn from
    p(x | z) there: independent draws, no chain, with the diagnostics of importance sampling. The
    mean is the weighted mean of all K. A discrete latent that is summed out, such as a class, is
    drawn from p(c | x_o) first, and the rest given it. The draws are valid if what is missing
    depends only on what was observed ("at random"), or if the model describes what goes missing.

    Args:
        model: Pyro model called with (x) or (x, y), as in `log_evidence`; or a VAE. A model
            of one's own observes x as `distributions.Incomplete`. If it has a latent site of the
            same name and "_missing", the values of that site are the missing entries.
        guide: Pyro guide called with the same arguments.
        x: Data [N, *E], NaN where missing.
        y: Condition of each datum [N, C], or None.
        num_draws: Draws R of each datum.
        num_samples: Weighted draws K behind them; 4 K where K are not enough.
        proposal: "refined", or "guide" to draw from the guide alone: faster, and never "reliable".
        chunk_size: As in `log_evidence`.
        compile: As in `log_evidence`.
        devices: As in `log_evidence`.
        seed: As in `log_evidence`.
        progress: As in `log_evidence`.

    Returns:
        Imputation of N data.

    Raises:
        ValueError: As `refined_importance_sampling`; if no site of the model observes x; if the
            draws do not fit in memory; if the model excludes a row.

    Example:
        >>> vae = build(3, latent_dim=2, missing=True)
        >>> found = impute(vae, torch.tensor([[1.0, 0.0, torch.nan]]), num_draws=7)
        >>> found.draws.shape
        torch.Size([7, 1, 3])

    References:
        Rubin. Using the SIR algorithm to simulate posterior distributions. 1988.
        Mattei and Frellsen. MIWAE: deep generative modelling and imputation of incomplete data
        sets. 2019.
    """
    check_choice(("refined", "guide"), proposal=proposal)
    check_fits(x.element_size() * num_draws * x.numel(), f"{num_draws} draws of all data")
    by_proposal = _impute_by_fit if proposal == "refined" else _impute_by_guide
    estimate = partial(by_proposal, num_draws=num_draws, num_samples=num_samples)
    options = chunk_size, compile, devices, seed, progress
    found = Imputation.cat(map_targets(estimate, model, guide, x, y, *options))
    return replace(found, evidence=exact_without_data(found.evidence, model, guide, x, y).of(x))


def _impute_by_fit(target: Target, num_draws: int, num_samples: int) -> Imputation:
    """Imputes B data, again with more components and 4 K draws where not reliable."""
    fit = fit_proposal(target)
    found, u, weights = _impute_by_draws(fit, num_samples, num_draws)
    short = [i for i, verdict in enumerate(found.verdict) if verdict != "reliable"]
    if not short:
        return found
    rows = torch.tensor(short, device=target.x.device)
    unreliable = fit.rows(rows)
    start = u[:, rows], weights[:, rows]
    visited = walk(unreliable.target, *start, scale_tril=unreliable.proposal.scale_tril)
    again, *_ = _impute_by_draws(unreliable.with_components(visited), 4 * num_samples, num_draws)
    index = torch.arange(len(found))
    index[short] = len(found) + torch.arange(len(short))
    return Imputation.cat([found, again]).rows(index)


def _impute_by_draws(
    fit: Fit, num_samples: int, num_draws: int
) -> tuple[Imputation, Tensor, Tensor]:
    """Imputes by K draws of a fitted proposal; returns also these and their log weights."""
    u = torch.cat([*fit.draws(num_samples)])
    weights, mean, stderr = _moments(fit.target, fit.weighted_runs(u, num_samples))
    evidence = fit.judge(summarise(weights.cpu(), METHOD, "doubtful"), TOLERANCE)
    draws = _resample(fit.target, u, weights, num_draws)
    return Imputation(draws, mean, stderr, evidence), u, weights


def _impute_by_guide(target: Target, num_draws: int, num_samples: int) -> Imputation:
    """Imputes B data by draws of the guide."""
    counts = torch.ones(num_samples).split(target.draws_at_once)
    draws = [target.draw_guide(len(count)) for count in counts]  # all at once do not fit in cache
    runs = zip(draws, map(target.run_model, draws))
    weighted = ((run.log_joint - target.log_guide(u), run) for u, run in runs)
    weights, mean, stderr = _moments(target, weighted)
    evidence = summarise(weights.cpu(), "importance sampling, guide", "lower bound")
    picked = _resample(target, torch.cat(draws), weights, num_draws)
    return Imputation(picked, mean, stderr, evidence)


def _resample(target: Target, draws: Tensor, weights: Tensor, num_draws: int) -> Tensor:
    """Completes data [R, B, *E] at R of the draws [K, B, D], picked in proportion to weights.

    Raises:
        ValueError: If all weights of a datum are zero.
    """
    if len(none := (weights == -torch.inf).all(0).nonzero()):
        raise ValueError(
            "what is missing cannot be imputed where log p(x) is -inf at all draws, as in a row "
            f"that begins {target.x[none[0, 0]].flatten()[:5].tolist()}: leave it out"
        )
    probability = torch.softmax(weights, 0)
    picked = torch.multinomial(probability.T, num_draws, True).T.unsqueeze(-1)
    parts = draws.take_along_dim(picked, 0).split(target.draws_at_once)
    return torch.cat([target.run_model(u).complete().cpu() for u in parts])


def _moments(
    target: Target, runs: Iterable[tuple[Tensor, ModelRun]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log weights [K, B]; means [B, *E] of completed data and their Monte Carlo errors.

    Each of `runs` is a run of the model with the log weights of its draws. Sums are kept in units
    of the largest weight so far.
    """
    weights: list[Tensor] = []
    centre, sums = target.scale, [target.scale.new_zeros(())] * 5
    largest = target.scale.new_full((target.num_data, 1), LOWEST)
    for weight, run in runs:
        data = run.complete().double().reshape(*weight.shape, -1)
        if not weights:
            centre = data[0]  # so that few digits cancel below
        weights.append(weight)
        before, largest = largest, torch.maximum(largest, weight.amax(0).unsqueeze(-1))
        w, shrink = (weight.unsqueeze(-1) - largest).exp(), (before - largest).exp()
        v = w * (data - centre)
        terms = zip(sums, (w, v, w * w, w * v, v * v), (1, 1, 2, 2, 2))
        sums = [total * shrink**power + term.sum(0) for total, term, power in terms]
    total, mean, squares, cross, square = sums
    mean = mean / total
    error = (square - 2 * mean * cross + mean.square() * squares).clamp(min=0).sqrt() / total
    missing = target.x.isnan()
    mean = torch.where(missing, (centre + mean).view(target.x.shape).to(target.x), target.x)
    error = error.view(mean.shape).to(mean).masked_fill(~missing, 0.0)
    return torch.cat(weights), mean.cpu(), error.cpu()
