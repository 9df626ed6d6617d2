"""Tests of a guide's uncertainty by simulation, and of how low or different log p(x) is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import torch
from scipy.special import stdtr
from torch import Tensor

from pyro_vae.arguments import as_rows, check_real, check_whole, takes_vae
from pyro_vae.densities import (
    Program,
    draw_data,
    draw_latents,
    evaluating,
    log_joint,
    summed_values,
)

CHUNK_ROWS = 10_000  # rows, draws times data, that the programs see at once


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranks of exact posterior draws among the guide's draws; uniform if the guide is exact.

    Attributes:
        ranks: Ranks of z* among the K draws, from 0 to K [N, D + 1]; the last column is that of
            log p(x*, z*), which shows wrong correlations too.
        names: Names of the columns, such as "z 0".
        num_draws: Draws K of the guide.
        uniforms: The ranks as numbers in (0, 1), with uniform noise within each step [N, D + 1].
        statistic: Kolmogorov-Smirnov distances of the ranks from uniform [D + 1].
        p_value: Probabilities of distances as large, were the guide exact [D + 1].
    """

    ranks: Tensor
    names: tuple[str, ...]
    num_draws: int
    uniforms: Tensor
    statistic: Tensor
    p_value: Tensor

    def coverage(self, level: float = 0.9) -> Tensor:
        """Returns the share of exact draws inside the guide's central `level` interval [D + 1].

        Below `level` the guide is too narrow, above it too wide.

        Raises:
            ValueError: If `level` is not between 0 and 1.
        """
        check_real(above=0, level=level)
        if level >= 1:
            raise ValueError(f"level must be below 1; got {level}")
        return ((self.uniforms - 0.5).abs() < level / 2).double().mean(0)

    @property
    def worst(self) -> str:
        """Name of the column with the largest distance."""
        return self.names[int(self.statistic.argmax())]

    def __repr__(self) -> str:
        at = self.names.index(self.worst)
        return (
            f"Calibration({len(self.ranks)} simulated data: worst is {self.worst!r}, p = "
            f"{self.p_value[at].item():.2g}, its 90 % intervals hold "
            f"{100 * self.coverage()[at].item():.0f} %)"
        )


@takes_vae
def calibration(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_data: int = 1000,
    num_draws: int = 99,
    seed: int = 0,
) -> Calibration:
    r"""Runs simulation-based calibration of a guide.

    Data x* are simulated from the model with latents z*, so that z* is one exact draw of
    p(z | x*). Among K draws of an exact guide its rank is uniform,

    .. math:: z^*, x^* \sim p(x, z), \quad z_k \sim q(z \mid x^*), \quad
        r_d = \#\{k : z_{kd} < z^*_d\} \sim \mathrm{Uniform}\{0, \dots, K\}

    A guide that is too narrow has too many ranks at both ends. The cost is K draws of the guide
    and K densities of the model for each datum. The test says nothing of data that the model
    would not draw.

    Args:
        model: Pyro model, as in `log_evidence`; its one observed site must be x.
        guide: Pyro guide.
        x: Data [N, *E], whose values are replaced by simulated ones, row by row in turn; their
            shape, type and missing entries (NaN) stay.
        y: Condition of each datum [N, C], or None.
        num_data: Data to draw; the rows of `y` are used in turn.
        num_draws: Draws K of the guide for each.
        seed: Seed of the data and the draws.

    Raises:
        ValueError: If a number is not whole, or the model observes anything but x.

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman. Validating Bayesian inference algorithms
        with simulation-based calibration. 2018.
        Modrak et al. Simulation-based calibration checking for Bayesian computation: the choice
        of test quantities shapes sensitivity. 2023 (the rank of the joint density).
    """
    from scipy.stats import kstest

    check_whole(num_data=num_data, num_draws=num_draws)
    check_whole(0, seed=seed)
    owner = getattr(model, "__self__", None)
    x = as_rows("x", x, missing=getattr(owner, "missing", True))  # own programs may take NaN
    if summed := list(summed_values(model, x[:1], None if y is None else y[:1])):
        raise ValueError(f"calibration takes no model with latents that are summed out: {summed}")
    rows = torch.arange(num_data) % len(x)
    parts = []
    with (
        evaluating(model, guide, seed=seed, device=x.device),
        pyro.validation_enabled(False),
    ):
        for index in rows.to(x.device).split(max(1, CHUNK_ROWS // num_draws)):
            y_rows = None if y is None else y[index]
            names, *found = _ranks(model, guide, x[index], y_rows, num_draws)
            parts.append(found)
    ranks, uniforms = (torch.cat(part).cpu() for part in zip(*parts))
    tests = [kstest(column, "uniform") for column in uniforms.T.numpy()]
    statistic, p_value = torch.tensor([(test.statistic, test.pvalue) for test in tests]).T
    return Calibration(ranks, names, num_draws, uniforms, statistic, p_value)


def _ranks(
    model: Program, guide: Program, x: Tensor, y: Tensor | None, num_draws: int
) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Returns names of the columns, ranks, and the ranks as uniform numbers, of new data."""
    simulated, exact = draw_data(model, x, y)
    draws, _ = draw_latents(guide, simulated, y, num_particles=num_draws)
    both = []
    for latents in (draws, exact):
        columns = [latents[name].reshape(len(latents[name]), len(x), -1) for name in exact]
        log_prob = log_joint(model, simulated, y, latents).unsqueeze(-1)
        both.append(torch.cat([*columns, log_prob], -1).double())
    values, truth = both
    names = tuple(
        f"{name} {d}" for name, part in zip(exact, columns) for d in range(part.shape[-1])
    )
    below, ties = (values < truth).sum(0), (values == truth).sum(0)
    ranks = below + (torch.rand_like(truth[0]) * (ties + 1)).long()
    uniforms = (ranks + torch.rand_like(truth[0])) / (num_draws + 1)
    return (*names, "log p(x, z)"), ranks, uniforms


def p_values(log_prob: Tensor, among: Tensor) -> Tensor:
    r"""Returns the p-values of low log p(x) of rows among other rows.

    .. math:: p_n = \frac{1 + \#\{m : \ell_m \le \ell_n\}}{1 + M}

    Uniform on 1/(M+1), ..., 1 for a row from the same distribution as the others. Take rows drawn
    from the model to test for data of the model, held-out rows to test for data like those trained
    on. The least p-value is 1/(M+1).

    Args:
        log_prob: log p(x) of the rows [N], nats.
        among: log p(x) of the other rows [M], by the same estimator.

    Returns:
        The p-values [N]; NaN for a row whose log p(x) is NaN.

    References:
        Phipson and Smyth. Permutation p-values should never be zero. 2010.
    """
    ordered = among.double().sort().values
    values = log_prob.double().to(ordered.device)
    below = torch.searchsorted(ordered, values, right=True)
    return ((1 + below).double() / (1 + len(among))).where(~values.isnan(), torch.nan)


@dataclass(frozen=True)
class Difference:
    """The mean difference in log p(x) between two models, of one or several seeds each.

    Attributes:
        mean: First minus second model, nats per datum.
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
        """Both errors combined; the error over data alone where a model has one seed."""
        seeds = 0.0 if math.isnan(self.stderr_seeds) else self.stderr_seeds
        return math.hypot(self.stderr_data, seeds)

    @property
    def p_worse(self) -> float:
        """Probability that the first model is worse, P(T < -mean / stderr) of Student's t."""
        if self.stderr == 0:
            return float(self.mean < 0) if self.mean else 0.5
        return float(stdtr(self.freedom, -self.mean / self.stderr))


def paired_difference(first: Tensor, second: Tensor) -> Difference:
    r"""Compares two models on the same data.

    .. math:: \widehat{\mathrm{Var}} = \frac{\mathrm{Var}_n(\bar\ell_{1n} - \bar\ell_{2n})}{N}
        + \frac{\mathrm{Var}_s(\bar\ell_{1s})}{S_1} + \frac{\mathrm{Var}_s(\bar\ell_{2s})}{S_2}

    where a bar averages over the index left out, with the degrees of freedom of Welch.

    Args:
        first: log p(x) of the same data by each replica of a model [S1, N].
        second: log p(x) by each replica of another model [S2, N].

    Raises:
        ValueError: If their shapes do not fit.

    References:
        Welch. The generalization of Student's problem when several different population
        variances are involved. 1947.
    """
    if first.ndim != 2 or first.shape[1:] != second.shape[1:] or first.shape[1] < 2:
        raise ValueError(
            "expected log p(x) of the same data, two or more, by replicas of two models, "
            f"[S1, N] and [S2, N]; got {list(first.shape)} and {list(second.shape)}"
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
