"""The parts of the search for modes, on densities whose modes are known."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from worlds import World, data, linear

from pyro_vae.densities import evaluating
from pyro_vae.estimators import modes
from pyro_vae.estimators.evidence import Evidence
from pyro_vae.estimators.proposal import Proposal
from pyro_vae.estimators.refined import MOST_WIDENING, WIDENING, Fit, _widen
from pyro_vae.estimators.target import Target

pytestmark = pytest.mark.usefixtures("float64")
CPU = torch.device("cpu")


def symmetric(rows: int = 3) -> World:
    """x = (z_1 + z_2, z_1 z_2, z_3) + noise: the same if z_1 and z_2 are exchanged."""

    def loc(z: Tensor) -> Tensor:
        return torch.stack([z[..., 0] + z[..., 1], z[..., 0] * z[..., 1], z[..., 2]], -1)

    def model(x: Tensor) -> None:
        with data(len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(loc(z), 0.1).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with data(len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), 3), 1.0).to_event(1))

    z = torch.tensor([1.3, -0.7, 0.4])
    return World(model, guide, loc(z).expand(rows, -1), torch.zeros(rows))


@pytest.fixture
def pair() -> tuple[Target, Tensor, Tensor]:
    """A target, one mode [B, D] of it, and the factor of the covariance there."""
    world = symmetric()
    with evaluating(seed=0, device=CPU):
        target = Target(world.model, world.guide, world.x)
        mode, tril = modes.laplace(target, torch.tensor([[1.3, -0.7, 0.4]]).expand(3, -1))
    return target, mode, tril


def test_exchanged_units_are_found_beyond_their_valley(pair: tuple) -> None:
    target, mode, tril = pair
    _, pairs = modes._directions(tril)
    assert len(pairs) == 3
    points, height = modes._exchanges(target, mode, pairs, torch.zeros_like(mode))
    best = height.argmax(0)
    found = points[best, torch.arange(3)]
    torch.testing.assert_close(found, mode[:, [1, 0, 2]])
    torch.testing.assert_close(height.amax(0), target.log_joint(mode[None])[0])
    assert (height > -torch.inf).sum(0).tolist() == [1, 1, 1]


def test_of_many_exchanges_the_best_are_kept() -> None:
    peaks = torch.arange(7.0).repeat(2, 1)
    peaks[1, 5:] = torch.tensor([6.0, 5.0])
    target: Any = SimpleNamespace(
        log_joint=lambda u: -50 * torch.cdist(u, peaks).square().amin(-1)
    )
    _, pairs = modes._directions(0.1 * torch.eye(7).unsqueeze(0))
    points, height = modes._exchanges(target, peaks[:1], pairs, torch.zeros(1, 7))
    assert len(pairs) == 21 > len(height) == modes.MORE_STARTS
    torch.testing.assert_close(points[height[:, 0] > -torch.inf, 0], peaks[1:])


def test_lines_lead_beyond_a_valley(pair: tuple) -> None:
    target, mode, tril = pair
    lines, _ = modes._directions(tril)
    across = torch.tensor([-1.0, 1.0, 0.0]).expand(1, 3, 3) / 2**0.5
    spread = torch.full((1, 3), 0.4)
    points, reach = modes._beyond_valleys(target, mode, across, spread, torch.zeros_like(mode))
    assert (reach > target.log_joint(mode[None])[0] - 60).all()
    other = mode[:, [1, 0, 2]]
    assert ((points[0] - other).norm(dim=-1) < (points[0] - mode).norm(dim=-1)).all()
    along = torch.tensor([0.0, 0.0, 1.0]).expand(1, 3, 3)  # one mode: no valley
    assert (
        modes._beyond_valleys(target, mode, along, spread, torch.zeros_like(mode))[1] == -torch.inf
    ).all()
    assert lines.shape == (6, 3, 3)


class Twins:
    """Peaks in the first coordinate, 3.3 and another from 0.5, that no stride meets."""

    def __init__(self, other: float) -> None:
        self.peaks = 0.5 + torch.tensor([3.3, other])

    def log_joint(self, u: Tensor) -> Tensor:
        return -(((u[..., :1] - self.peaks) / 0.1) ** 2).amin(-1) / 2


@pytest.mark.parametrize("other", [-3.3, *modes.LINE_POSITIONS])
def test_a_line_leads_to_the_mirror_image_of_a_mode_and_to_fixed_places(other: float) -> None:
    mode, line = torch.tensor([[3.8, 0.7]]), torch.tensor([1.0, 0.0]).view(1, 1, 2)
    spread, centre = torch.tensor([[0.1]]), torch.tensor([[0.5, 0.7]])
    target: Any = Twins(other)
    points, reach = modes._beyond_valleys(target, mode, line, spread, centre)
    torch.testing.assert_close(points, torch.tensor([[[0.5 + other, 0.7]]]))
    torch.testing.assert_close(reach, torch.zeros(1, 1))


class Comb:
    """Peaks at every third whole number in the first coordinate."""

    def log_joint(self, u: Tensor) -> Tensor:
        away = u[..., 0] - 3 * (u[..., 0] / 3).round()
        return -((away / 0.1) ** 2) / 2


def test_modes_lead_on_to_those_as_far_again() -> None:
    mode, others = torch.tensor([[3.0, 0.7]]), torch.tensor([[[0.0, 0.2]], [[3.2, 0.7]]])
    points, height = modes._reflections(Comb(), mode, others)  # type: ignore[arg-type]
    expected = torch.tensor([[6.0, 1.2], [2.8, 0.7], [-3.0, -0.3], [3.4, 0.7]])
    torch.testing.assert_close(points[:, 0], expected)
    assert height[:, 0].isfinite().tolist() == [True, False, True, False]
    assert modes._reflections(Comb(), mode, others[:0])[1].shape == (0, 1)  # type: ignore[arg-type]


def test_a_valley_tells_modes_apart(pair: tuple) -> None:
    target, mode, tril = pair
    other, near = mode[:, [1, 0, 2]], mode + 0.02
    far = mode + torch.tensor([0.0, 0.0, 2.0])
    u, keep = modes._distinct_modes(target, torch.stack([near, far, other, mode]))
    assert keep.tolist() == [[True] * 3, [True] * 3, [False] * 3, [False] * 3]
    assert {round(v, 3) for v in u[:2, 0, 0].tolist()} == {
        round(mode[0, 0].item(), 3),
        round(mode[0, 1].item(), 3),
    }
    height = target.log_joint(torch.stack([near, other]))
    apart = modes._is_separate(target, mode[None], torch.stack([near, other]), height)
    assert apart.tolist() == [[False] * 3, [True] * 3]


class Peaks:
    """Peaks of unit width at 0, 5 and -20, the second 3 nats lower and the third 25."""

    def log_joint(self, u: Tensor) -> Tensor:
        place, height = torch.tensor([0.0, 5.0, -20.0]), torch.tensor([0.0, -3.0, -25.0])
        return (height - (u - place).square() / 2).logsumexp(-1)


def test_a_lower_mode_counts_unless_it_is_negligible() -> None:
    u = torch.tensor([-20.0, 5.0, 0.0, 0.3]).view(4, 1, 1)
    found, keep = modes._distinct_modes(Peaks(), u)  # type: ignore[arg-type]
    assert found[:2].flatten().tolist() == [0.0, 5.0]
    assert keep.flatten().tolist() == [True, True, False, False]


def test_climbs_reach_the_mode_and_never_end_lower(pair: tuple) -> None:
    target, mode, tril = pair
    starts = torch.stack([mode + 0.1, mode])
    climbed = modes._climb(target, starts, tril, modes.STEPS, 1.0)
    torch.testing.assert_close(climbed[0], mode, atol=0.02, rtol=0)
    assert (target.log_joint(climbed) >= target.log_joint(starts)).all()
    torch.testing.assert_close(modes._climb(target, starts, tril, 1, 1e6), starts)


def test_first_steps_reach_twice_as_far_as_a_mode_is() -> None:
    tril = torch.tensor([[[0.5, 0.0], [3.0, 0.2]]])
    away = torch.tensor([[31.0, -53.0], [0.1, 0.0]]).unsqueeze(1)  # in standard deviations
    steps = modes._step_sizes(tril, away @ tril[0].T)
    torch.testing.assert_close(steps[:, 0, 0], torch.tensor([4 * 53 / modes.STEPS, modes.LR]))


def test_the_lower_of_the_first_climbs_counts_in_the_first_round_alone(
    pair: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, mode, _ = pair
    other = mode[:, [1, 0, 2]]
    search = modes._Search(target, torch.stack([mode, other]), mode[None], torch.zeros_like(mode))
    monkeypatch.setattr(search, "_starts", lambda target, rows, known, *_: known)
    for origin, number in ((0, 2), (1, 1)):
        _, keep = search._extend(torch.arange(3), search.known, 1, origin)
        assert keep.sum(0).tolist() == [number] * 3


def test_lines_leave_out_what_data_do_not_inform() -> None:
    variance = torch.tensor([[1.0, 0.2, 1.02, 0.9], [1.0, 1.0, 1.0, 0.01]])
    order, number = modes._most_informed(variance)
    assert number == 2
    assert order[:, 0].tolist() == [1, 3]
    assert modes._most_informed(torch.ones(2, 3))[1] == 1


class Scripted(modes._Search):
    """A search whose rounds find what a script says: modes known after each round."""

    def __init__(self, script: list[int]) -> None:
        self.target = None
        self.known, self.tril = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
        self.centre, self.script, self.rounds = torch.zeros(1, 1), script, 0

    def _extend(self, rows: Tensor, known: Tensor, number: int, origin: int) -> tuple:
        found = self.script[min(self.rounds, len(self.script) - 1)]
        self.rounds += 1
        keep = torch.arange(found + 2).unsqueeze(-1) < found
        return torch.arange(found + 2.0).view(-1, 1, 1), keep


@pytest.mark.parametrize(
    ("script", "rounds", "complete"),
    [
        ([1], 1, True),  # one mode: the first round is all
        ([2, 2], 2, True),  # 16 starts without a third end the search
        ([3, 3, 3], 3, True),  # 24 need two rounds
        ([3, 3, 4, 4, 4], 5, True),  # a fourth starts the count again
        ([2, 3, 4, 5, 6, 7, 8, 9, 10], 9, False),  # always more
        ([25], 1, False),  # too many
    ],
)
def test_the_search_ends_when_nothing_new_is_found(
    script: list[int], rounds: int, complete: bool
) -> None:
    search = Scripted(script)
    row, u, ended = search.run(5)
    assert search.rounds == rounds
    assert ended.tolist() == [complete]
    assert len(row) == script[-1]
    assert sorted(u[:, 0].tolist()) == list(range(script[-1]))


def test_what_draws_of_the_prior_show_and_the_estimate_misses_is_doubtful() -> None:
    """Missed: by more than three standard errors, 0.3015 nats. k-hat: 2/3 at 1000 draws."""
    ones, zeros = torch.ones(4), torch.zeros(4)
    method, bound = ["prior"] * 4, ["lower bound"] * 4
    log_prob, khat = torch.tensor([0.301, 0.302, 0.0, -9.0]), torch.tensor([0.66, 0.0, 0.67, 0.0])
    simple = Evidence(log_prob, 0.1 * ones, ones, zeros, ones, method, bound)
    estimate = replace(simple, log_prob=zeros, stderr=0.01 * ones, khat=khat)
    estimate = replace(estimate, num_samples=1000 * ones)
    proposal = Proposal(zeros[None], zeros[None, :, None], ones.view(1, 4, 1, 1))
    fit, none = Fit(None, proposal, simple, zeros == 0), ["doubtful"] * 4  # type: ignore[arg-type]
    verdicts = ["reliable", "doubtful", "doubtful", "reliable"]
    assert fit.judge(estimate, 0.0101).verdict == verdicts
    assert fit.judge(estimate, 0.0101, 0.65).verdict == [*none[:3], "reliable"]
    assert fit.judge(estimate, 0.0099).verdict == none
    assert replace(fit, search_ended=zeros == 1).judge(estimate, 0.0101).verdict == none


@pytest.mark.parametrize("number", [1, 37])
def test_proposals_are_wider_where_data_inform(number: int) -> None:
    """By a fifth in few directions; by less in many, so that the volume grows as much."""
    rotation = torch.linalg.qr(torch.randn(number + 2, number + 2)).Q
    variances = torch.tensor([*[0.01] * number, 1.0, 1.7])
    wider = _widen(torch.linalg.cholesky((rotation * variances) @ rotation.T)[None])[0]
    more = min(MOST_WIDENING, WIDENING / (0.99 * number))
    expected = variances * torch.tensor([*[1 + more * (2 + more) * 0.99] * number, 1.0, 1.0])
    torch.testing.assert_close(torch.linalg.eigvalsh(wider @ wider.T), expected)
    assert more < MOST_WIDENING or number == 1


def test_a_posterior_of_one_mode_is_searched_once() -> None:
    world = linear(num_data=3)
    with evaluating(seed=0, device=CPU):
        found = modes.find_modes(Target(world.model, world.guide, world.x), 5)
    assert found.row.tolist() == [0, 1, 2]
    assert found.search_ended.all()
