"""Judges an estimator of log p(x) on the reference set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.reference.functions import functions
from benchmarks.reference.store import Problem, declarations, load

__all__ = ["Outcome", "judge", "table"]

FALSE = 5.0  # standard errors from the truth at which a trusted row is false
ROUNDING = 1e-3  # nats that no estimator is blamed for
HEAD = (
    "| model | kind | latents | data | bias | rms | within 2 se | of those relied on | reliable "
    "| false | seconds |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an estimator said of a model's data, and the truth; rows [N], nats.

    An estimator that raised an error has no rows, and its `refusal` says why.
    """

    name: str
    kind: str
    latents: int
    num_data: int
    seconds: float
    error: np.ndarray  # estimate less truth
    stderr: np.ndarray  # the estimate's own
    truth_stderr: np.ndarray
    reliable: np.ndarray
    refusal: str = ""

    @property
    def noise(self) -> np.ndarray:
        """Standard error of `error`."""
        return np.hypot(self.stderr, self.truth_stderr)

    @property
    def covered(self) -> np.ndarray:
        """Rows within two standard errors."""
        return np.abs(self.error) <= 2 * self.noise + ROUNDING

    @property
    def false(self) -> np.ndarray:
        """Rows that are relied on, and off by more than five standard errors."""
        return self.reliable & ~(np.abs(self.error) <= FALSE * self.noise + ROUNDING)

    def line(self) -> str:
        """A line of the table."""
        start = f"| {self.name} | {self.kind} | {self.latents or ''} | {self.num_data} |"
        if not len(self.error):
            return f"{start} {self.refusal} | | | | | | {self.seconds:.0f} |"
        return (
            f"{start} {self.error.mean():.3f} | {np.sqrt(np.mean(self.error**2)):.3f} | "
            f"{share(self.covered)} | {share(self.covered[self.reliable])} | "
            f"{share(self.reliable)} | {self.false.sum()} | {self.seconds:.0f} |"
        )


def judge(
    estimate: Callable[..., Any],
    names: Iterable[str] | None = None,
    numpy: bool = False,
    problem: Callable[[str], Problem] = load,
) -> list[Outcome]:
    """Runs an estimator on models of the set, all of them if no names are given.

    Args:
        estimate: Of (model, guide, x), or if `numpy` of the three functions of `functions`;
            it gives log p(x) [N], standard errors [N] and verdicts [N], as a tuple or as
            attributes log_prob, stderr and verdict. A verdict is "reliable" or True where the
            estimator vouches for a row; None vouches for all of them.
        names: Of models.
        numpy: Which of the two.
        problem: Gives a model by name; the stored one if not said.
    """
    return [_judge(estimate, problem(name), numpy) for name in names or declarations()]


def _judge(estimate: Callable[..., Any], problem: Problem, numpy: bool) -> Outcome:
    program, facts = problem.program, problem.declaration
    start = time.perf_counter()
    try:
        if numpy:
            found = estimate(*functions(program, problem.x))
        else:
            found = estimate(program.model, program.guide, problem.x)
        log_prob, stderr, verdict = _parts(found, len(problem.x))
        refusal = ""
    except Exception as error:  # whatever an estimator raises counts as no answer
        log_prob = stderr = verdict = np.zeros(0)
        refusal = f"{type(error).__name__}: {error}".split("\n")[0][:80].replace("|", "/")
    seconds = time.perf_counter() - start
    size = len(log_prob)
    return Outcome(
        problem.name,
        facts["kind"],
        facts["latents"],
        facts["data"],
        seconds,
        log_prob - problem.log_prob.numpy()[:size],
        stderr,
        problem.stderr.numpy()[:size],
        verdict.astype(bool),
        refusal,
    )


def _parts(found: Any, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log p(x), standard errors, and whether each row is vouched for."""
    parts = (found.log_prob, found.stderr, found.verdict) if hasattr(found, "verdict") else found
    log_prob, stderr = (np.asarray(torch.as_tensor(p), dtype=np.float64) for p in parts[:2])
    verdict = [True] * size if parts[2] is None else parts[2]
    trusted = np.array([v == "reliable" if isinstance(v, str) else bool(v) for v in verdict])
    for part in (log_prob, stderr, trusted):
        if part.shape != (size,):
            raise ValueError(f"expected {size} rows, got shape {part.shape}")
    return log_prob, stderr, trusted


def total(outcomes: Iterable[Outcome], name: str) -> Outcome:
    """The rows of several models as those of one."""
    parts = list(outcomes)
    arrays = ("error", "stderr", "truth_stderr", "reliable")
    joined = {n: np.concatenate([getattr(part, n) for part in parts]) for n in arrays}
    refused = sum(part.num_data for part in parts if not len(part.error))
    return Outcome(
        name,
        f"{refused} rows refused" if refused else "",
        0,
        sum(part.num_data for part in parts),
        sum(part.seconds for part in parts),
        **joined,
        refusal="none",
    )


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a line for each model, for each kind, and for all."""
    kinds = dict.fromkeys(outcome.kind for outcome in outcomes)
    sums = [total([o for o in outcomes if o.kind == kind], f"**{kind}**") for kind in kinds]
    every = total(outcomes, "**all**")
    return "\n".join([HEAD, *(outcome.line() for outcome in [*outcomes, *sums, every])])


def share(rows: np.ndarray) -> str:
    """The share of rows that are so."""
    return f"{np.mean(rows):.2f}" if len(rows) else "-"
