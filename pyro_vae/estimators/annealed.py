"""Annealed importance sampling of log p(x), and bounds from both sides on simulated data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor

from pyro_vae.arguments import check_choice
from pyro_vae.densities import Program, log_mean_exp, summed_values
from pyro_vae.estimators.evidence import Evidence, summarise
from pyro_vae.estimators.hmc import STEP_SIZE_GAIN, TARGET_ACCEPTANCE, Point, hmc_step
from pyro_vae.estimators.refined import Fit, fit_proposal
from pyro_vae.estimators.run import estimator, map_targets, summed
from pyro_vae.estimators.target import Target, gradients

PILOT_CHAINS = 16  # chains that tune the step sizes
STEEPNESS = 4.0  # of the sigmoid schedule
STARTS = ("prior", "guide", "refined")
GUIDE_DRAWS = 200  # draws from which the guide's spread is estimated


@estimator
@summed
def annealed_importance_sampling(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_temperatures: int = 20,
    num_chains: int = 64,
    num_leapfrog: int = 3,
    start: str = "refined",
    schedule: str = "sigmoid",
    chunk_size: int | None = None,
    compile: bool = False,
    devices: int = 1,
    seed: int | None = 0,
    progress: bool = False,
) -> Evidence:
    r"""Estimates log p(x) of each datum by annealed importance sampling.

    .. math:: \log p(x) \approx \log \frac1C \sum_{c=1}^C \exp \sum_{t=1}^T
        (\beta_t - \beta_{t-1}) \big( \log p(x, u_{c,t-1}) - \log q(u_{c,t-1}) \big)

    where the chain c starts at a draw of q and moves, at each temperature, by Hamiltonian Monte
    Carlo that leaves :math:`q^{1-\beta_t} p^{\beta_t}` invariant. The weights are unbiased for
    p(x) whatever the moves are; better moves and more temperatures lower their variance.

    A first pass of 16 chains, whose weights are thrown away, sets the step size of each datum and
    temperature. Moves are preconditioned by the covariance of the start.

    The starts "guide" and "prior" need hundreds of temperatures or more, and their verdict is
    "lower bound". For "refined", the proposal of `refined_importance_sampling`, twenty are enough,
    and the verdict is as there.

    Costs about (C + 16) T L evaluations of the model and its gradient for each datum.

    Args:
        model: Pyro model; see `refined_importance_sampling`.
        guide: Pyro guide.
        x: Data [N, *E].
        y: Condition of each datum [N, C], or None.
        num_temperatures: Steps T of the path.
        num_chains: Chains C for each datum.
        num_leapfrog: Leapfrog steps L of each move.
        start: Where the path starts: "prior", "guide" or "refined".
        schedule: Inverse temperatures: "linear", or "sigmoid", closer near both ends.
        chunk_size: As in `log_evidence`.
        compile: As in `log_evidence`.
        devices: As in `log_evidence`.
        seed: As in `log_evidence`.
        progress: As in `log_evidence`.

    Returns:
        Evidence of N data, in nats; its samples are the chains.

    Raises:
        ValueError: If a number is below one, a name is unknown, a latent is discrete, the
            likelihood has no gradient, or the programs have no weight per datum.

    References:
        Neal. Annealed importance sampling. 2001.
        Wu, Burda, Salakhutdinov and Grosse. On the quantitative analysis of decoder-based
        generative models. 2017.
    """
    check_path(start, schedule)
    steps = (num_temperatures, num_leapfrog, schedule)
    estimate = partial(_estimate, num_chains=num_chains, start=start, steps=steps)
    options = chunk_size, compile, devices, seed, progress
    return Evidence.cat(map_targets(estimate, model, guide, x, y, *options))


def _estimate(
    target: Target, num_chains: int, start: str, steps: tuple[int, int, str]
) -> Evidence:
    origin = make_start(start, target)
    weights = Path(origin, *steps).forward(num_chains)
    evidence = summarise(weights.cpu(), f"annealed, {start}", "lower bound")
    return evidence if origin.fit is None else origin.fit.judge(evidence, 0.1)


def check_path(start: str, schedule: str) -> None:
    """Raises a ValueError if the start or the schedule is unknown."""
    check_choice(STARTS, start=start)
    check_choice(("sigmoid", "linear"), schedule=schedule)


class Path:
    """An annealed path of T temperatures from a start to the posteriors of B data.

    Attributes:
        betas: Inverse temperatures from 0 to 1 [T + 1].
        step_sizes: Step sizes of the moves [T + 1, B], at which about 65 % are accepted.
    """

    def __init__(
        self, start: Start, num_temperatures: int, num_leapfrog: int, schedule: str
    ) -> None:
        self.start, self.num_leapfrog = start, num_leapfrog
        t = torch.linspace(-1, 1, num_temperatures + 1, dtype=torch.float64)
        t = torch.sigmoid(STEEPNESS * t) if schedule == "sigmoid" else t
        self.betas = ((t - t[0]) / (t[-1] - t[0])).tolist()
        self.step_sizes = self._tune_step_sizes()

    def _tune_step_sizes(self) -> Tensor:
        target, point = self.start.target, self.evaluate(self.start.draw(PILOT_CHAINS))
        size = torch.full_like(target.scale[:, 0], target.dim**-0.25)
        sizes = [size]
        for t in range(1, len(self.betas)):
            sizes.append(size)
            point, probability = self._move(point, t, size)
            size = size * (STEP_SIZE_GAIN * (probability.mean(0) - TARGET_ACCEPTANCE)).exp()
        return torch.stack(sizes)

    def forward(self, num_chains: int) -> Tensor:
        """Returns log weights [C, B] of chains from the start, unbiased for p(x)."""
        return self._weights(self.start.draw(num_chains), range(1, len(self.betas)), 0)

    def reverse(self, u: Tensor) -> Tensor:
        """Returns log weights [C, B] of chains from the posterior back to the start.

        The chains begin at exact draws u [C, B, D]; inverse weights are unbiased for 1 / p(x).
        """
        return self._weights(u, range(len(self.betas) - 1, 0, -1), 1)

    def _weights(self, u: Tensor, steps: Iterable[int], lag: int) -> Tensor:
        point = self.evaluate(u)
        log_weights = torch.zeros_like(point.log_joint)
        for t in steps:
            gap = point.log_joint - point.log_start
            gap = torch.where(point.log_joint == -torch.inf, -torch.inf, gap)
            log_weights = log_weights + (self.betas[t] - self.betas[t - 1]) * gap
            if 0 < t - lag < len(self.betas) - 1:
                point, _ = self._move(point, t - lag, self.step_sizes[t - lag])
        return log_weights

    def evaluate(self, u: Tensor) -> Point:
        """Returns both log densities at `u`, and their gradients."""
        values, grads = gradients(self.start.log_densities, u, self.start.target.draws_at_once)
        return Point(u, *values, *grads)

    def _move(self, point: Point, t: int, step_size: Tensor) -> tuple[Point, Tensor]:
        return hmc_step(
            self.evaluate,
            point,
            self.betas[t],
            step_size=step_size,
            scale_tril=self.start.scale_tril,
            num_leapfrog=self.num_leapfrog,
        )


@dataclass(frozen=True, eq=False)
class Start:
    """The density at which a path starts, and the target where it ends.

    Attributes:
        target: The posteriors of B data.
        scale_tril: The metric of the moves [B, D, D], a rough factor of the covariance.
        draw: Function from a number K to draws [K, B, D].
        log_densities: Function from u [K, B, D] to log densities of the start and log p(x, u).
        fit: The proposals that the start is made of, if any.
    """

    target: Target
    scale_tril: Tensor
    draw: Callable[[int], Tensor]
    log_densities: Callable[[Tensor], tuple[Tensor, Tensor]]
    fit: Fit | None = None


def refined_start(fit: Fit) -> Start:
    """Returns the start at fitted proposals, in the metric of their heaviest components."""
    target, q = fit.target, fit.proposal
    return Start(target, q.scale_tril, q.draw, lambda u: (q.log_prob(u), target.log_joint(u)), fit)


def make_start(name: str, target: Target) -> Start:
    """Returns the start of that name.

    Raises:
        ValueError: If the likelihood has no gradient, or the guide no density.
    """
    if name == "refined":
        return refined_start(fit_proposal(target))
    target.check_gradient()
    if name == "prior":
        both = attrgetter("log_prior", "log_joint")
        return Start(
            target,
            torch.diag_embed(torch.ones_like(target.scale)),
            lambda number: target.draw_prior(number)[0],
            lambda u: both(target.run_model(u)),
        )
    if not target.guide_has_density:
        raise ValueError("the guide is a Delta, which has no density: use start='refined'")
    spread = target.draw_guide(GUIDE_DRAWS).std(0)
    spread = torch.where((spread > 0) & spread.isfinite(), spread, 1.0)
    return Start(
        target,
        torch.diag_embed(spread),
        target.draw_guide,
        lambda u: (target.log_guide(u), target.log_joint(u)),
    )


@dataclass(frozen=True, eq=False)
class Bracket:
    """Bounds of log p(x) of simulated data; on the CPU, in nats.

    Attributes:
        lower: Lower bounds [N], from chains to the posterior; on average not above log p(x).
        upper: Upper bounds [N], from chains that start in it; on average not below log p(x).
        x: The data [N, *E].
    """

    lower: Tensor
    upper: Tensor
    x: Tensor

    def __len__(self) -> int:
        return len(self.lower)

    @property
    def gap(self) -> Tensor:
        """Upper minus lower [N]; negative for single data by chance, not on average."""
        return self.upper - self.lower

    def mean(self) -> tuple[float, float, float]:
        """Returns the averages of lower, upper and gap over data."""
        lower, upper, gap = (v.mean().item() for v in (self.lower, self.upper, self.gap))
        return lower, upper, gap

    def mean_stderr(self) -> tuple[float, float, float]:
        """Returns the standard errors over data of these averages; NaN for one datum."""
        n = len(self)
        columns = self.lower, self.upper, self.gap
        lower, upper, gap = (v.std().item() / n**0.5 if n > 1 else math.nan for v in columns)
        return lower, upper, gap

    def __repr__(self) -> str:
        (lower, upper, gap), errors = self.mean(), self.mean_stderr()
        return (
            f"Bracket(log p(x) in [{lower:.2f}, {upper:.2f}], gap {gap:.3f} +- {errors[2]:.3f}, "
            f"{len(self)} data)"
        )


@estimator
def bidirectional(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_data: int | None = None,
    num_temperatures: int = 20,
    num_chains: int = 64,
    num_leapfrog: int = 3,
    start: str = "refined",
    schedule: str = "sigmoid",
    chunk_size: int | None = None,
    devices: int = 1,
    seed: int | None = 0,
    progress: bool = False,
) -> Bracket:
    r"""Bounds the error of annealed importance sampling by bidirectional Monte Carlo.

    Data are simulated from the model, so that one exact draw of each posterior is known: the
    latents that made the datum. Chains from the start give a lower bound on average, chains
    from that draw back to the start an upper one,

    .. math:: \mathbb{E} \log \frac1C \sum_c w_c \le \log p(x) \le
        \mathbb{E} \Big[ -\log \frac1C \sum_c \frac{1}{\tilde w_c} \Big]

    and the gap bounds the error of both. It says nothing of real data that the model would not
    simulate.

    Costs about (2 C + 16) T L evaluations of the model and its gradient for each datum, and the
    fit where the start is "refined".

    Args:
        model: Pyro model; see `refined_importance_sampling`. Its one observed site must be x.
        guide: Pyro guide.
        x: Data [N, *E], of which only shape and missing entries count: the values are simulated.
        y: Condition of each datum [N, C], or None.
        num_data: Number of data to simulate, from the rows of x and y in turn; N if None.
        num_temperatures: As in `annealed_importance_sampling`.
        num_chains: Chains C each way.
        num_leapfrog: Leapfrog steps of each move.
        start: "prior", "guide" or "refined".
        schedule: "linear" or "sigmoid".
        chunk_size: As in `log_evidence`.
        devices: As in `log_evidence`.
        seed: As in `log_evidence`.
        progress: As in `log_evidence`.

    Raises:
        ValueError: As `annealed_importance_sampling`, or if the model observes anything but x.

    References:
        Grosse, Ghahramani and Adams. Sandwiching the marginal likelihood using bidirectional
        Monte Carlo. 2015.
    """
    if values := summed_values(model, x, y):
        raise ValueError(
            "bidirectional takes no model with discrete latents to be summed out, here "
            f"{sorted(values)}: give it one at a value, by pyro.condition"
        )
    check_path(start, schedule)
    count = len(x) if num_data is None else num_data
    rows = torch.arange(count, device=x.device) % len(x)
    steps = (num_temperatures, num_leapfrog, schedule)
    bracket = partial(_bracket, num_chains=num_chains, start=start, steps=steps)
    run = partial(map_targets, bracket, chunk_size=chunk_size, compile=False, devices=devices)
    inputs = model, guide, x[rows], None if y is None else y[rows]
    parts = run(*inputs, seed=seed, progress=progress)
    columns = zip(*((part.lower, part.upper, part.x) for part in parts))
    return Bracket(*(torch.cat(column) for column in columns))


def _bracket(
    template: Target, num_chains: int, start: str, steps: tuple[int, int, str]
) -> Bracket:
    target, exact = template.simulated()
    path = Path(make_start(start, target), *steps)
    lower = log_mean_exp(path.forward(num_chains))
    upper = -log_mean_exp(-path.reverse(exact.expand(num_chains, -1, -1)))
    return Bracket(lower.cpu(), upper.cpu(), target.x.cpu())
