"""log p(x) between two bounds, on data simulated from the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyro_vae.densities import Program, draw_data
from pyro_vae.estimators.annealed import Path, check_path, make_start
from pyro_vae.estimators.diagnostics import log_mean_exp
from pyro_vae.estimators.run import estimator, map_targets
from pyro_vae.estimators.target import Target
from pyro_vae.estimators.values import not_summed

__all__ = ["Bracket", "bidirectional"]


@dataclass(frozen=True, eq=False)
class Bracket:
    """Bounds of log p(x) of simulated data; on the CPU, in nats.

    Attributes:
        lower: From chains towards the posterior [N]; not above log p(x) on average.
        upper: From chains that start in it [N]; not below log p(x) on average.
        x: The data [N, *E].
    """

    lower: Tensor
    upper: Tensor
    x: Tensor

    def __len__(self) -> int:
        return len(self.lower)

    @property
    def gap(self) -> Tensor:
        """Upper less lower [N]; a datum's can be negative by chance, the mean's not."""
        return self.upper - self.lower

    def mean(self) -> tuple[float, float, float]:
        """Averages of lower, upper and gap over data."""
        lower, upper, gap = (v.mean().item() for v in (self.lower, self.upper, self.gap))
        return lower, upper, gap

    def mean_stderr(self) -> tuple[float, float, float]:
        """Their standard errors over data; NaN for one datum."""
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
@not_summed
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
    r"""How far annealed importance sampling is from log p(x), by bidirectional Monte Carlo.

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
        x: Data [N, *E], of which the shape alone matters: the values are simulated.
        y: What is conditioned on [N, C], or None.
        num_data: Data to simulate; N if None, else the rows of `y` are used in turn.
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
    check_path(start, schedule)
    count = len(x) if num_data is None else num_data
    rows = torch.arange(count, device=x.device) % len(x)

    steps = (num_temperatures, num_leapfrog, schedule)
    parts = map_targets(
        partial(_bracket, num_chains=num_chains, start=start, steps=steps),
        model,
        guide,
        x[rows],
        None if y is None else y[rows],
        chunk_size=chunk_size,
        seed=seed,
        devices=devices,
        progress=progress,
    )
    columns = zip(*((part.lower, part.upper, part.x) for part in parts))
    return Bracket(*(torch.cat(column) for column in columns))


def _bracket(
    template: Target, num_chains: int, start: str, steps: tuple[int, int, str]
) -> Bracket:
    target, exact = simulate(template)
    path = Path(make_start(start, target), *steps)
    lower = log_mean_exp(path.forward(num_chains))
    upper = -log_mean_exp(-path.reverse(exact.expand(num_chains, -1, -1)))
    return Bracket(lower.cpu(), upper.cpu(), target.x.cpu())


def simulate(template: Target) -> tuple[Target, Tensor]:
    """Posteriors of data drawn from the model, and the latents [1, B, D] that made them."""
    x, latents = draw_data(template.model, template.x, template.y)
    target = template.of(x)
    return target, target.vector({name: latents[name] for name in target.sites})
