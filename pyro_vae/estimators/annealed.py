"""log p(x) by annealed importance sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from pyro_vae.densities import Program
from pyro_vae.estimators.evidence import Evidence, summarise
from pyro_vae.estimators.refined import Fit, fit_proposal
from pyro_vae.estimators.run import estimator, map_targets
from pyro_vae.estimators.target import Target, gradients
from pyro_vae.estimators.values import summed

__all__ = [
    "Path",
    "Point",
    "STARTS",
    "Start",
    "annealed_importance_sampling",
    "check_path",
    "hmc_step",
    "make_start",
    "refined",
]

ACCEPTANCE = 0.65
GAIN = 0.7  # of the logarithm of a step size, for each move
PILOT_CHAINS = 16
STEEPNESS = 4.0  # of the sigmoid schedule
STARTS = ("prior", "guide", "refined")
GUIDE_DRAWS = 200  # behind the spread of the guide


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
    r"""log p(x) of each datum by annealed importance sampling.

    .. math:: \log p(x) \approx \log \frac1C \sum_{c=1}^C \exp \sum_{t=1}^T
        (\beta_t - \beta_{t-1}) \big( \log p(x, u_{c,t-1}) - \log q(u_{c,t-1}) \big)

    where the chain c starts at a draw of q and moves, at each temperature, by Hamiltonian Monte
    Carlo that leaves :math:`q^{1-\beta_t} p^{\beta_t}` as it is. The weights are unbiased for
    p(x) whatever the moves do; better moves and more temperatures lower their variance.

    Step sizes of each datum and temperature are set by 16 chains of a first pass, whose weights
    are thrown away, and then kept. Moves are preconditioned by the start's own covariance.

    From "guide" and "prior" hundreds of temperatures and more are needed, and the verdict is
    "lower bound"; from "refined", the proposal of `refined_importance_sampling`, twenty are
    enough, and the verdict is as there.

    Costs about (C + 16) T L evaluations of the model and its gradient for each datum.

    Args:
        model: Pyro model; see `refined_importance_sampling`.
        guide: Pyro guide.
        x: Data [N, *E].
        y: What is conditioned on [N, C], or None.
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
    parts = map_targets(
        partial(_estimate, num_chains=num_chains, start=start, steps=steps),
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


def _estimate(
    target: Target, num_chains: int, start: str, steps: tuple[int, int, str]
) -> Evidence:
    origin = make_start(start, target)
    weights = Path(origin, *steps).forward(num_chains)
    evidence = summarise(weights.cpu(), f"annealed, {start}", "lower bound")
    return evidence if origin.fit is None else origin.fit.judge(evidence, 0.1)


def check_path(start: str, schedule: str) -> None:
    """Raises a ValueError if there is no such path."""
    if start not in STARTS:
        raise ValueError(f"start must be one of {STARTS}; got {start!r}")
    if schedule not in ("sigmoid", "linear"):
        raise ValueError(f"schedule must be 'sigmoid' or 'linear'; got {schedule!r}")


class Path:
    """An annealed path from a start to the posteriors of B data.

    Args:
        start: Where it starts.
        num_temperatures: Steps T.
        num_leapfrog: Leapfrog steps of each move.
        schedule: "sigmoid" or "linear".
    """

    def __init__(
        self, start: Start, num_temperatures: int, num_leapfrog: int, schedule: str
    ) -> None:
        self.start, self.num_leapfrog = start, num_leapfrog
        self.betas = _betas(num_temperatures, schedule)
        self.step_sizes = self._tune()

    def forward(self, num_chains: int) -> Tensor:
        """Log weights [C, B] of chains from the start, unbiased for p(x)."""
        point = self.at(self.start.draw(num_chains))
        log_weights = torch.zeros_like(point.log_joint)
        for t in range(1, len(self.betas)):
            log_weights = log_weights + self._increment(point, t)
            if t < len(self.betas) - 1:
                point, _ = self._move(point, t, self.step_sizes[t])
        return log_weights

    def reverse(self, u: Tensor) -> Tensor:
        """Log weights [C, B] of chains back to the start, their inverses unbiased for 1 / p(x).

        From exact draws u [C, B, D] of the posterior.
        """
        point = self.at(u)
        log_weights = torch.zeros_like(point.log_joint)
        for t in range(len(self.betas) - 1, 0, -1):
            log_weights = log_weights + self._increment(point, t)
            if t > 1:
                point, _ = self._move(point, t - 1, self.step_sizes[t - 1])
        return log_weights

    def at(self, u: Tensor) -> Point:
        """Both log densities at `u`, and their gradients."""
        values, slopes = gradients(self.start.log_densities, u, self.start.target.draws_at_once)
        return Point(u, *values, *slopes)

    def _increment(self, point: Point, t: int) -> Tensor:
        change = self.betas[t] - self.betas[t - 1]
        gap = point.log_joint - point.log_start
        return change * torch.where(point.log_joint == -torch.inf, -torch.inf, gap)

    def _move(self, point: Point, t: int, step_size: Tensor) -> tuple[Point, Tensor]:
        return hmc_step(
            self.at,
            point,
            self.betas[t],
            step_size=step_size,
            scale_tril=self.start.scale_tril,
            num_leapfrog=self.num_leapfrog,
        )

    def _tune(self) -> Tensor:
        """Step sizes [T + 1, B] at which about 65 % of the moves are accepted."""
        target = self.start.target
        point = self.at(self.start.draw(PILOT_CHAINS))
        size = torch.full_like(target.scale[:, 0], target.dim**-0.25)
        sizes = [size]
        for t in range(1, len(self.betas)):
            sizes.append(size)
            point, probability = self._move(point, t, size)
            size = size * (GAIN * (probability.mean(0) - ACCEPTANCE)).exp()
        return torch.stack(sizes)


def _betas(num_temperatures: int, schedule: str) -> list[float]:
    """Inverse temperatures from 0 to 1."""
    t = torch.linspace(-1, 1, num_temperatures + 1, dtype=torch.float64)
    if schedule == "sigmoid":
        t = torch.sigmoid(STEEPNESS * t)
    return ((t - t[0]) / (t[-1] - t[0])).tolist()


@dataclass(frozen=True, eq=False)
class Point:
    """States of C chains for B data, and what is known there.

    Attributes:
        u: Where they are [C, B, D].
        log_start: Log density of the start [C, B].
        log_joint: log p(x, u) [C, B].
        slope_start: Gradient of the first [C, B, D].
        slope_joint: Gradient of the second [C, B, D].
    """

    u: Tensor
    log_start: Tensor
    log_joint: Tensor
    slope_start: Tensor
    slope_joint: Tensor

    def log_prob(self, beta: float) -> Tensor:
        """Log density between the two, (1 - beta) log start + beta log joint."""
        if beta == 1:
            return self.log_joint
        return (1 - beta) * self.log_start + beta * self.log_joint

    def slope(self, beta: float) -> Tensor:
        """Its gradient."""
        if beta == 1:
            return self.slope_joint
        return (1 - beta) * self.slope_start + beta * self.slope_joint

    def where(self, accepted: Tensor, other: Point) -> Point:
        """This point where `accepted` [C, B], the other elsewhere."""
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        masks = {2: accepted, 3: accepted.unsqueeze(-1)}
        return Point(*(torch.where(masks[a.ndim], a, b) for a, b in pairs))


def hmc_step(
    at: Callable[[Tensor], Point],
    point: Point,
    beta: float,
    *,
    step_size: Tensor,
    scale_tril: Tensor,
    num_leapfrog: int,
) -> tuple[Point, Tensor]:
    r"""One move that leaves the density at `beta` as it is.

    Leapfrog steps in coordinates whitened by A, :math:`u = A v`, with unit mass, then
    acceptance by chain and datum. A proposal whose energy is not a number is rejected.

    Args:
        at: Evaluates a position.
        point: Where the chains are.
        beta: Inverse temperature.
        step_size: Of each datum [B].
        scale_tril: A [B, D, D].
        num_leapfrog: Leapfrog steps.

    Returns:
        Where they are then, and the probability of acceptance [C, B].

    References:
        Neal. MCMC using Hamiltonian dynamics. 2011.
    """
    size = step_size.unsqueeze(-1)
    momentum = torch.randn_like(point.u)
    moved, speed = point, momentum + size / 2 * _white(point.slope(beta), scale_tril)
    for step in range(num_leapfrog):
        moved = at(moved.u + size * torch.einsum("bij,kbj->kbi", scale_tril, speed))
        last = step == num_leapfrog - 1
        speed = speed + (size / 2 if last else size) * _white(moved.slope(beta), scale_tril)
    gain = moved.log_prob(beta) - point.log_prob(beta)
    gain = gain + (momentum.pow(2) - speed.pow(2)).sum(-1) / 2
    probability = gain.nan_to_num(-torch.inf, torch.inf).clamp(max=0).exp()
    accepted = torch.rand_like(probability) < probability
    return moved.where(accepted, point), probability


def _white(slope: Tensor, scale_tril: Tensor) -> Tensor:
    return torch.einsum("bji,kbj->kbi", scale_tril, slope)


@dataclass(frozen=True, eq=False)
class Start:
    """A density to draw from and to score, beside that of the target.

    Attributes:
        target: The posteriors of B data.
        scale_tril: The metric of the moves [B, D, D], a rough factor of the covariance.
        draw: Draws [K, B, D] of a number K.
        log_densities: log density of the start and log p(x, u), each [K, B], of u [K, B, D].
        fit: The proposals that it is made of, if any.
    """

    target: Target
    scale_tril: Tensor
    draw: Callable[[int], Tensor]
    log_densities: Callable[[Tensor], tuple[Tensor, Tensor]]
    fit: Fit | None = None


def refined(fit: Fit) -> Start:
    """The proposals fitted to the posteriors, in the metric of their heaviest components."""
    target, q = fit.target, fit.proposal

    def log_densities(u: Tensor) -> tuple[Tensor, Tensor]:
        return q.log_prob(u), target.log_joint(u)

    return Start(target, q.scale_tril, q.draw, log_densities, fit)


def make_start(name: str, target: Target) -> Start:
    """The start of that name.

    Raises:
        ValueError: If the likelihood has no gradient, or the guide no density.
    """
    if name == "refined":
        return refined(fit_proposal(target))
    target.check_gradient()
    if name == "prior":

        def of_prior(u: Tensor) -> tuple[Tensor, Tensor]:
            log_prior, log_likelihood = target.log_prior(u)
            return log_prior, log_prior + log_likelihood

        scale_tril = torch.diag_embed(torch.ones_like(target.scale))
        return Start(target, scale_tril, lambda number: target.draw_prior(number)[0], of_prior)
    if not target.guide_is_density:
        raise ValueError("the guide is a Delta, which has no density: use start='refined'")
    spread = target.draw_guide(GUIDE_DRAWS).std(0)
    usable = (spread > 0) & spread.isfinite()
    scale_tril = torch.diag_embed(torch.where(usable, spread, torch.ones_like(spread)))

    def of_guide(u: Tensor) -> tuple[Tensor, Tensor]:
        return target.log_guide(u), target.log_joint(u)

    return Start(target, scale_tril, target.draw_guide, of_guide)
