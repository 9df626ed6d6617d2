"""How two models differ in log p(x), beside what data and seeds do to it by chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.special import stdtr
from torch import Tensor

__all__ = ["Difference", "paired_difference"]


@dataclass(frozen=True)
class Difference:
    """The mean difference of log p(x) of two models, each trained from one seed or several.

    Attributes:
        mean: First less second, nats per datum.
        stderr_data: Its standard error over data, Monte Carlo error included.
        stderr_seeds: Its standard error over seeds; NaN where a model has one seed.
        freedom: Degrees of freedom of both errors together.
    """

    mean: float
    stderr_data: float
    stderr_seeds: float
    freedom: float

    @property
    def stderr(self) -> float:
        """Both errors together; that over data alone where a model has one seed."""
        seeds = 0.0 if math.isnan(self.stderr_seeds) else self.stderr_seeds
        return math.hypot(self.stderr_data, seeds)

    @property
    def p_worse(self) -> float:
        """Probability that the first is the worse, P(T < -mean / stderr) of Student's t."""
        if self.stderr == 0:
            return float(self.mean < 0) if self.mean else 0.5
        return float(stdtr(self.freedom, -self.mean / self.stderr))


def paired_difference(first: Tensor, second: Tensor) -> Difference:
    r"""Compares two models on the same data.

    .. math:: \widehat{\mathrm{Var}} = \frac{\mathrm{Var}_n(\bar\ell_{1n} - \bar\ell_{2n})}{N}
        + \frac{\mathrm{Var}_s(\bar\ell_{1s})}{S_1} + \frac{\mathrm{Var}_s(\bar\ell_{2s})}{S_2}

    with averages over the index left out, and the degrees of freedom of Welch.

    Args:
        first: log p(x) by each replica of a model, of the same data [S1, N].
        second: That of another model [S2, N].

    Raises:
        ValueError: If their shapes do not fit.

    References:
        Welch. The generalization of Student's problem when several different population
        variances are involved. 1947.
    """
    if first.ndim != 2 or first.shape[1:] != second.shape[1:]:
        raise ValueError(
            "expected log p(x) of the same data by replicas of two models, [S1, N] and [S2, N]; "
            f"got {list(first.shape)} and {list(second.shape)}"
        )
    first, second = first.double(), second.double()
    each = first.mean(0) - second.mean(0)
    parts = [(each.var().item() / len(each), len(each) - 1)]
    seeds = [(values.mean(1), len(values)) for values in (first, second)]
    several = all(size > 1 for _, size in seeds)
    if several:
        parts += [(values.var().item() / size, size - 1) for values, size in seeds]
    total = sum(variance for variance, _ in parts)
    small = sum(variance**2 / freedom for variance, freedom in parts)
    return Difference(
        each.mean().item(),
        math.sqrt(parts[0][0]),
        math.sqrt(total - parts[0][0]) if several else math.nan,
        total**2 / small if small else math.inf,
    )
