"""Estimates of log p(x) with a verdict on how far to trust them, and the audit behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pyro_vae.arguments import digest_of
from pyro_vae.densities import NotSimulated, Program, summed_values
from pyro_vae.estimators.escalating import escalate
from pyro_vae.estimators.evidence import Evidence
from pyro_vae.estimators.importance import unchecked_lower_bound
from pyro_vae.estimators.run import estimator, for_each_value, map_targets, summed
from pyro_vae.estimators.target import CHUNK_ROWS, Target

REGRET_DRAWS = 16  # draws of the guide, from which its ELBO is estimated
LARGEST_GAP = 0.3  # nats by which one exact draw may raise the estimate of a reliable datum
GAP_FACTOR = 4.0  # largest average gap of reliable data, in units of the squared tolerance
LEAST_AUDITED, MOST_AUDITED, ROWS_PER_AUDITED = 24, 64, 8  # simulated data: N / 8, from 24 to 64


@estimator
@summed
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
    """Estimates log p(x) of each datum to within `tolerance`, or says that it did not.

    A proposal is fitted to each datum's posterior (`refined_importance_sampling`). A pilot of
    400 draws, and short walks through the posterior, say how many fresh draws the tolerance
    needs, 1000 to 8000. Where these are not enough, the proposal is mixed with a longer fit; then
    it gets up to 24 more components, and up to 64,000 draws; where that is not enough, annealed
    importance sampling starts from it with 384 chains. No draw that chose the number of draws is
    scored.

    "reliable" means: a standard error below the tolerance, a k-hat below 0.6 (and below its
    published threshold), a search for modes that ended, no part of the posterior that draws of
    the prior found and the estimate did not, and an `audit` that passed: it checks, on data
    simulated from the model with known latents, that reliable estimates are so. All else is
    "doubtful", and the value is the best estimate reached.

    Args:
        model: Pyro model called with (x) or (x, y), all its sites inside one plate "data", its
            latents continuous, on any support that is fixed; or a VAE, which stands for its model
            and guide: log_evidence(vae, x, y).
        guide: Pyro guide called with the same arguments.
        x: Data [N, *E], a tensor, array, frame or list; as is y.
        y: Condition of each datum [N, C], or None.
        tolerance: Largest standard error, in nats.
        budget: Most evaluations of the model, with or without gradient, for one datum; all that
            the steps above may need (about 100,000) if None. The fit and the first draws need
            some 5000. The cost of further modes of a datum is not counted.
        audit: An `Audit` of these programs; or whether to make one, of N / 8 simulated data, but
            from 24 to 64. If model and guide are methods of a torch module, it is kept while the
            weights are the same. A model that observes anything but x cannot be audited, which
            the result says.
        chunk_size: Draws times data that the model sees at once; of the result it changes only
            the noise.
        compile: Whether to compile log p(x, u) and its gradient: some seconds, once for each
            shape that comes often; the result is the same to rounding.
        devices: Processes that share the data, on CPUs or on the first GPUs, as x is; the result
            is that of one process. They are started anew: a script must call under
            `if __name__ == "__main__":`, with methods of a module that can be pickled.
        seed: Seed of the draws.
        progress: Whether to show a progress bar.

    Returns:
        Evidence of N data, in nats, with the method and the verdict of each, and the audit. Its
        extra "regret" is log p(x) minus the guide's ELBO, from 16 draws: KL(q(z | x) || p(z | x)),
        the cost of amortised inference here. It is large for data unlike those trained on.

    Raises:
        ValueError: If the tolerance is not positive, the budget is too small, a latent is
            discrete, the likelihood has no gradient, or the programs have no weight per datum.

    Example:
        >>> vae = build(3, latent_dim=2)
        >>> log_evidence(vae, torch.ones(5, 3)).verdict[0]
        'reliable'

    References:
        Burda, Grosse and Salakhutdinov. Importance weighted autoencoders. 2016.
        Xiao, Yan and Amit. Likelihood regret: an out-of-distribution detection score for
        variational auto-encoder. 2020.
        Wu, Burda, Salakhutdinov and Grosse. On the quantitative analysis of decoder-based
        generative models. 2017.
    """
    if not isinstance(audit, bool | Audit):
        raise ValueError(f"audit must be True, False or an Audit; got {audit!r}")
    inputs = model, guide, x, y
    estimate = partial(escalate, tolerance=tolerance, budget=budget)
    parts = map_targets(estimate, *inputs, chunk_size, compile, devices, seed, progress)
    evidence = Evidence.cat(parts)
    rows = chunk_size or CHUNK_ROWS
    bound = unchecked_lower_bound(*inputs, num_samples=REGRET_DRAWS, chunk_size=rows, seed=seed)
    evidence = replace(evidence, extras={"regret": evidence.log_prob - bound.elbo})
    if audit is False or "reliable" not in evidence.verdict:
        return evidence
    options: dict[str, Any]
    options = {"chunk_size": chunk_size, "devices": devices, "seed": seed, "progress": progress}
    options |= {"tolerance": tolerance, "budget": budget}
    try:
        used = kept_audit(*inputs, **options) if audit is True else audit
    except NotSimulated as error:
        return replace(evidence, audit=f"none: {error}")
    verdict = evidence.verdict if used.passed else ["doubtful"] * len(evidence)
    return replace(evidence, verdict=verdict, audit=str(used))


@dataclass(frozen=True, eq=False)
class Audit:
    """Estimates of log p(x*) for simulated data x*, whose latents z* are known.

    Attributes:
        evidence: Estimates of log p(x*), without z* [N].
        upper: Estimates with z* in the place of one draw [N]: on average not below log p(x*).
        tolerance: Largest standard error of a reliable datum.
    """

    evidence: Evidence
    upper: Tensor
    tolerance: float

    @classmethod
    def cat(cls, parts: Sequence[Audit]) -> Audit:
        """Joins the audits of all simulated data."""
        evidence = Evidence.cat([part.evidence for part in parts])
        return cls(evidence, torch.cat([part.upper for part in parts]), parts[0].tolerance)

    def __len__(self) -> int:
        return len(self.upper)

    @property
    def gap(self) -> Tensor:
        """Upper minus lower [N], the nats that the exact draw adds."""
        return self.upper - self.evidence.log_prob

    @property
    def reliable(self) -> Tensor:
        """Whether the estimate is called reliable [N], before this audit."""
        return torch.tensor([verdict == "reliable" for verdict in self.evidence.verdict])

    @property
    def passed(self) -> bool:
        """Whether the estimates called reliable are so.

        Among them no exact draw may raise the estimate by more than 0.3 nats. Their gap, which
        is on average the true variance of the estimates, must average less than four times the
        squared tolerance. And they must be most of the data, for a few may be reliable by
        chance.
        """
        gap = self.gap[self.reliable]
        most = len(gap) > len(self) / 2
        return bool(
            most and gap.mean() < GAP_FACTOR * self.tolerance**2 and (gap <= LARGEST_GAP).all()
        )

    def __str__(self) -> str:
        gap = self.gap[self.reliable]
        return (
            f"{'passed' if self.passed else 'FAILED'}: of {len(self)} simulated data "
            f"{len(gap)} reliable, {int((gap > LARGEST_GAP).sum())} of them beyond reach, "
            f"gap {gap.mean() if len(gap) else 0:.3f}"
        )

    def __repr__(self) -> str:
        return f"Audit({self})"


@estimator
def audit(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_data: int = 64,
    tolerance: float = 0.05,
    budget: int | None = None,
    chunk_size: int | None = None,
    devices: int = 1,
    seed: int | None = 0,
    progress: bool = False,
) -> Audit:
    r"""Checks `log_evidence` on data drawn from the model itself, whose latents are known.

    For data x* simulated with latents z*, z* is an exact draw of p(z | x*). The proposal is
    fitted to x* as to any datum, without z*. Then

    .. math:: \log \frac1K \sum_{k=1}^K w_k \quad\text{and}\quad
        \log \frac1K \Big( \sum_{k=1}^{K-1} w_k + w^* \Big),
        \qquad w^* = \frac{p(x^*, z^*)}{q(z^*)}

    are on average not above and not below log p(x*). Where the proposal covers the posterior
    they agree. Where it misses a mode or a tail, some z* lie there and w* is astronomical.

    The audit shows what goes wrong on data that the model would draw. It cannot show what goes
    wrong on other data.

    Args:
        model: As in `log_evidence`. Its one observed site must be x. A discrete latent that is
            summed out, such as a class, is held at each of its values; y must be None then.
        guide: As in `log_evidence`.
        x: Data [N, *E], of which only shape and missing entries count: the values are simulated.
        y: Condition of each datum [N, C], or None; its rows are used in turn.
        num_data: Data to simulate, at each of these values. A failure on a share s of them is
            missed with probability (1 - s)^num_data.
        tolerance: As in `log_evidence`.
        budget: As in `log_evidence`.
        chunk_size: As in `log_evidence`.
        devices: As in `log_evidence`.
        seed: As in `log_evidence`.
        progress: As in `log_evidence`.

    Raises:
        ValueError: As `log_evidence`, or if the model observes anything but x, or has both a
            discrete latent and a y.

    References:
        Grosse, Ghahramani and Adams. Sandwiching the marginal likelihood using bidirectional
        Monte Carlo. 2015.
        Cusumano-Towner and Mansinghka. AIDE: an algorithm for measuring the accuracy of
        probabilistic inference algorithms. 2017.
    """
    if values := summed_values(model, x, y):
        if y is not None:
            raise ValueError(f"audit holds {sorted(values)} at each value: expected no y, got one")
        each = partial(audit, num_data=num_data, tolerance=tolerance, budget=budget)
        each = partial(each, chunk_size=chunk_size, devices=devices)
        parts = for_each_value(each, values, model, guide, x, y, seed=seed, progress=progress)
        return Audit.cat(parts)
    rows = (torch.arange(num_data, device=x.device) * max(1, len(x) // num_data)) % len(x)
    estimate = partial(_audit_target, tolerance=tolerance, budget=budget)
    run = partial(map_targets, estimate, chunk_size=chunk_size, compile=False, devices=devices)
    inputs = model, guide, x[rows], None if y is None else y[rows]
    seed = None if seed is None else seed + 1
    return Audit.cat(run(*inputs, seed=seed, progress=progress, title="audit"))


def _audit_target(template: Target, tolerance: float, budget: int | None) -> Audit:
    target, exact = template.simulated()
    evidence = escalate(target, tolerance, budget, exact)
    number, log_exact = evidence.num_samples, evidence.extras["exact"] - evidence.num_samples.log()
    upper = torch.logaddexp(evidence.log_prob + torch.log1p(-1 / number), log_exact)
    return Audit(replace(evidence, extras={}), upper, tolerance)


AUDITS: WeakKeyDictionary[nn.Module, tuple[Any, Audit]] = WeakKeyDictionary()


def kept_audit(
    model: Program, guide: Program, x: Tensor, y: Tensor | None, **options: Any
) -> Audit:
    """Returns an audit of a size that suits x, or the module's last one if it still applies."""
    num_data = min(max(len(x) // ROWS_PER_AUDITED, LEAST_AUDITED), MOST_AUDITED)
    owner, other = (getattr(program, "__self__", None) for program in (model, guide))
    if not isinstance(owner, nn.Module) or id(owner) != id(other):
        return audit(model, guide, x, y, num_data=num_data, **options)
    state = [torch.atleast_1d(p) for p in owner.state_dict().values() if isinstance(p, Tensor)]
    names = [getattr(program, "__name__", "") for program in (model, guide)]
    asked = [options[name] for name in ("tolerance", "budget", "seed")]
    key = (digest_of(*state, x.isnan(), y), x.shape[1:], x.dtype, *names, *asked)
    if owner not in AUDITS or AUDITS[owner][0] != key or len(AUDITS[owner][1]) < num_data:
        AUDITS[owner] = key, audit(model, guide, x, y, num_data=num_data, **options)
    return AUDITS[owner][1]
