"""Metrics on codes whose score is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_vae.distributions import FullNormal
from pyro_vae.metrics import (
    Score,
    active_units,
    beta_vae_score,
    dci,
    factor_information,
    factor_vae_score,
    mig,
    mig_of_means,
    modularity,
    sap,
)
from pyro_vae.metrics.information import discretise

pytestmark = pytest.mark.usefixtures("float64")

SIZES = (3, 4, 5)
NAMES = ("shape", "x", "y")
FACTORS = torch.cartesian_prod(*[torch.arange(n) for n in SIZES]).repeat(9, 1)  # 540 rows
VOTES = {"num_votes": 600, "num_test": 500, "batch_size": 31}


def standard(values: Tensor) -> Tensor:
    return (values - values.mean(0)) / values.std(0)


def identity() -> Tensor:
    """Each factor in a dimension of its own, in another order, and a dimension of noise."""
    codes = standard(FACTORS.double())[:, [2, 0, 1]] * torch.tensor([1.0, -2.0, 0.7])
    return torch.cat([codes, 1e-3 * torch.randn(len(codes), 1)], 1)


def constant() -> Tensor:
    return torch.zeros(len(FACTORS), 4)


def noise() -> Tensor:
    return torch.randn(len(FACTORS), 4)


def duplicated() -> Tensor:
    codes = standard(FACTORS.double())
    return torch.cat([codes, codes], 1)


def rotated() -> Tensor:
    """Every factor in every dimension alike."""
    turn = torch.linalg.qr(torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]]).T).Q
    return standard(FACTORS.double()) @ turn


def q(means: Tensor, scale: float = 0.01) -> Distribution:
    return dist.Normal(means, scale).to_event(1)


SCORES: dict[str, Callable[[Tensor], float]] = {
    "mig": lambda c: mig(q(c), FACTORS, NAMES, without=()).value,
    "mig_of_means": lambda c: mig_of_means(c, FACTORS, NAMES).value,
    "sap": lambda c: sap(c, FACTORS, NAMES, categorical=()).value,
    "factor_vae": lambda c: factor_vae_score(c, FACTORS, NAMES, **VOTES).value,
    "beta_vae": lambda c: beta_vae_score(c, FACTORS, NAMES, **VOTES).value,
    "modularity": lambda c: modularity(c, FACTORS, NAMES).value,
    "disentanglement": lambda c: dci(c, FACTORS, NAMES, num_trees=5).disentanglement,
    "completeness": lambda c: dci(c, FACTORS, NAMES, num_trees=5).completeness,
    "informativeness": lambda c: dci(c, FACTORS, NAMES, num_trees=5).informativeness,
}
# identity, constant, duplicated, rotated: lowest and highest score
KNOWN: dict[str, list[tuple[float, float]]] = {
    "mig": [(0.97, 1.0), (-1e-9, 1e-9), (-0.03, 0.03), (0, 0.45)],
    "mig_of_means": [(0.95, 1.0), (0, 1e-9), (0, 1e-9), (0, 0.5)],
    "sap": [(0.97, 1.0), (0, 1e-9), (0, 1e-9), (0, 0.6)],
    "factor_vae": [(1, 1), (0.25, 0.42), (1, 1), (0.3, 0.95)],
    "beta_vae": [(1, 1), (0.25, 0.42), (1, 1), (0.5, 1)],
    "modularity": [(0.70, 1.0), (0, 1e-9), (1 - 1e-9, 1), (0.1, 0.85)],
    "disentanglement": [(0.99, 1.0), (0, 1e-9), (0.99, 1.0), (0, 0.7)],
    "completeness": [(0.99, 1.0), (0, 1e-9), (0.5, 0.8), (0, 0.7)],
    "informativeness": [(0.99, 1.0), (0.15, 0.3), (0.99, 1.0), (0.4, 1.0)],
}


@pytest.mark.parametrize("score", SCORES)
def test_oracles(score: str) -> None:
    for make, (low, high) in zip((identity, constant, duplicated, rotated), KNOWN[score]):
        found = SCORES[score](make())
        assert low - 1e-9 <= found <= high + 1e-9, f"{make.__name__}: {found}"


@pytest.mark.parametrize("score", [s for s in SCORES if s != "modularity"])
def test_noise_scores_low(score: str) -> None:
    # chance is a third for votes, and trees find some order in any noise
    assert SCORES[score](noise()) < 0.45


# --- the mutual information of draws -------------------------------------------------------------


def test_information_of_codes_far_apart_is_the_entropy() -> None:
    information = factor_information(q(identity()), FACTORS)
    expected = torch.zeros(3, 4)
    for f, d in ((0, 1), (1, 2), (2, 0)):
        expected[f, d] = math.log(SIZES[f])
    torch.testing.assert_close(information[:, :3], expected[:, :3], atol=1e-9, rtol=0)


@pytest.mark.parametrize("full", [False, True])
def test_information_is_that_of_quadrature(full: bool) -> None:
    """Two binary factors, and overlapping posteriors."""
    factors = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [1, 1]])
    loc = torch.tensor([[-1.0, 0.2], [-0.5, 1.0], [1.0, 0.0], [0.4, 2.0], [2.0, -1.0]])
    scale = 0.5 + torch.arange(10).reshape(5, 2) / 10
    posterior: Distribution = q(loc, 1.0)
    posterior = dist.Normal(loc, scale).to_event(1)
    if full:
        tril = torch.diag_embed(scale)
        tril[:, 1, 0] = 0.4
        posterior = FullNormal(loc, scale_tril=tril)
        scale = posterior.stddev
    grid = torch.linspace(-12, 12, 20_001)
    exact = torch.empty(2, 2)
    for d in range(2):
        pairs = dist.Normal(loc[:, d], scale[:, d]).log_prob(grid[:, None]).exp()
        whole = pairs.mean(1)
        for f in range(2):
            exact[f, d] = 0.0
            for value in (0, 1):
                mine = factors[:, f] == value
                part = pairs[:, mine].mean(1)
                ratio = torch.where(part > 0, part * (part / whole).log(), 0.0)
                exact[f, d] += mine.double().mean() * torch.trapezoid(ratio, grid)
    runs = torch.stack(
        [factor_information(posterior, factors, num_samples=503, seed=s) for s in range(31)]
    )
    stderr = runs.std(0) / len(runs) ** 0.5
    assert (abs(runs.mean(0) - exact) < 5 * stderr).all()
    assert stderr.max() < 0.005


def test_a_few_rows_are_enough_and_nothing_is_clamped() -> None:
    """Of a factor that the code does not know the information is zero, above and below."""
    factors = torch.randint(2, (41, 1))
    posterior = q(torch.zeros(41, 2), 1.0)
    assert factor_information(posterior, factors).abs().max() < 1e-12
    free = q(0.3 * torch.randn(41, 2), 1.0)
    found = torch.stack([factor_information(free, factors, seed=s) for s in range(50)])
    assert (found < 0).any()


def test_the_means_alone_may_score_what_draws_do_not() -> None:
    """A code of much noise: its means are a perfect code, its draws are not."""
    codes = standard(FACTORS.double())
    assert mig_of_means(codes, FACTORS).value > 0.95
    assert mig(q(codes, 2.0), FACTORS, without=()).value < 0.2


# --- what the result says ------------------------------------------------------------------------


def test_shape_is_left_out_by_name() -> None:
    found = mig(q(identity()), FACTORS, NAMES, num_samples=2, num_rows=101, seed=3)
    assert found.factors == ("x", "y")
    assert (found.num_samples, found.num_data, found.seed, found.bins) == (202, 540, 3, None)
    assert "Chen" in found.variant
    of_means = mig_of_means(identity(), FACTORS, NAMES, bins=7)
    assert of_means.factors == NAMES
    assert (of_means.bins, of_means.seed) == (7, None)
    assert "Locatello" in of_means.variant
    assert of_means.per_factor.mean().item() == pytest.approx(of_means.value)
    assert of_means.matrix.shape == (3, 4)


def test_the_same_seed_gives_the_same_votes() -> None:
    first, second, other = (
        factor_vae_score(noise_of(7), FACTORS, seed=s, **VOTES) for s in (1, 1, 2)
    )
    assert first.value == second.value != other.value
    assert first.stderr == pytest.approx((first.value * (1 - first.value) / 499) ** 0.5)


@pytest.mark.parametrize("score", [factor_vae_score, beta_vae_score])
def test_votes_are_counted(score: Callable[..., Score]) -> None:
    assert score(noise(), FACTORS, **VOTES).num_samples == 600 + 500


def test_bins_are_of_equal_width_and_the_highest_value_is_in_the_last() -> None:
    codes = torch.stack([torch.linspace(-3, 7, 11), torch.full((11,), 2.0)], 1)
    first, second = discretise(codes, 5).T.tolist()
    assert first == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4]
    assert second == [0] * 11


def noise_of(seed: int) -> Tensor:
    return torch.randn(540, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_dimensions_that_do_not_vary_have_no_vote() -> None:
    codes = torch.cat([identity()[:, :3], torch.full((540, 1), 5.0)], 1)
    assert factor_vae_score(codes, FACTORS, **VOTES).value == 1.0


def test_a_dimension_has_a_vote_from_a_deviation_of_a_twentieth() -> None:
    """The threshold of disentanglement_lib: of the deviation, not of the variance."""
    codes = standard(FACTORS.double())
    found = [factor_vae_score(scale * codes, FACTORS, **VOTES).value for scale in (0.051, 0.049)]
    assert found[0] == 1.0
    assert found[1] < 0.5


def test_votes_look_at_variance_over_that_of_all_data() -> None:
    codes = standard(FACTORS.double()) + 0.3 * torch.randn(540, 3)
    for scale in (1.0, 10.0):  # the noise of the first dimension alone is more than the others
        wide = codes * torch.tensor([scale, 1.0, 1.0])
        assert factor_vae_score(wide, FACTORS, **VOTES).value > 0.99


def test_a_categorical_factor_is_predicted_by_thresholds() -> None:
    """A code that orders the values of a factor otherwise: no line, but thresholds."""
    values = torch.randint(4, (503, 1))
    codes = torch.cat([torch.tensor([0.0, 3.0, 1.0, 2.0])[values], torch.randn(503, 1)], 1)
    by_line = sap(codes, values, ["kind"], categorical=()).value
    found = sap(codes, values, ["kind"], categorical=["kind"])
    assert by_line < 0.3
    assert found.matrix[0, 0] == 1.0
    assert found.matrix[0, 1] == pytest.approx(0.25, abs=0.12)


def test_a_value_that_no_scored_row_has_does_not_count_in_sap() -> None:
    values = torch.tensor([0] * 20 + [1] * 20 + [2])  # the last row is one of those fitted to
    code = torch.tensor([0.0] * 20 + [1.0, 2.0] * 10 + [1.0])
    found = sap(torch.stack([code, 0 * code], 1), values[:, None], ["shape"], seed=4).matrix
    assert found is not None
    assert found.tolist() == [[0.75, 0.5]]  # all of value 0, and half of value 1


def test_modularity_by_hand() -> None:
    """One dimension knows a factor of two values wholly, and another a product of two."""
    factors = torch.cartesian_prod(torch.arange(2), torch.arange(2)).repeat(5, 1)
    both = factors[:, 0] * 2 + factors[:, 1]
    codes = torch.stack([factors[:, 0], both], 1).double()
    assert modularity(codes, factors).value == pytest.approx(0.5)  # 1 and 0
    three = torch.cartesian_prod(*[torch.arange(2)] * 3).repeat(5, 1)
    codes = torch.stack([three[:, 0] * 2 + three[:, 1], three[:, 2]], 1).double()
    assert modularity(codes, three).value == pytest.approx(0.75)  # a half and 1


def test_dci_by_hand() -> None:
    found = dci(identity(), FACTORS, NAMES, num_trees=3, num_train=300, num_test=211, seed=2)
    assert (found.num_train, found.num_test, found.seed) == (300, 211, 2)
    torch.testing.assert_close(found.importance.sum(0), torch.ones(3))
    assert found.importance[[1, 2, 0], [0, 1, 2]].min() > 0.99
    assert found.factors == NAMES


def test_trees_of_one_row_guess_its_values() -> None:
    found = dci(noise(), FACTORS, num_train=1, num_test=539, num_trees=1)
    assert found.train_accuracy == 1
    guessed = sum((540 / n - 1) / 539 for n in SIZES) / 3
    assert found.informativeness == pytest.approx(guessed, rel=1e-12)
    assert (found.disentanglement, found.completeness) == (0, 0)


ANY: list[Callable[..., Score]] = [mig_of_means, factor_vae_score, beta_vae_score, sap, modularity]


@pytest.mark.parametrize("metric", [*ANY, dci], ids=lambda m: m.__name__)
def test_what_does_not_fit_is_refused(metric: Callable[..., Score]) -> None:
    with pytest.raises(ValueError, match=r"got \[540, 4\] and \[539, 3\]"):
        metric(noise(), FACTORS[1:])
    with pytest.raises(ValueError, match="a name for each of the 3 factors"):
        metric(noise(), FACTORS, ["x"])
    bad = noise()
    bad[7, 1] = torch.inf
    with pytest.raises(ValueError, match="means must be finite"):
        metric(bad, FACTORS)
    with pytest.raises(ValueError, match="whole numbers"):
        metric(noise(), FACTORS + 0.5)


def test_more_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="two latent dimensions"):
        mig_of_means(noise()[:, :1], FACTORS)
    with pytest.raises(ValueError, match=r"column\(s\) \[1\] have one value"):
        mig_of_means(noise(), FACTORS * torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="not left out"):
        mig(q(noise()), FACTORS[:, :1], ["shape"])
    with pytest.raises(ValueError, match="at least two factors, to tell"):
        beta_vae_score(noise(), FACTORS[:, :1])
    with pytest.raises(ValueError, match="at least two factors"):
        modularity(noise(), FACTORS[:, :1])
    with pytest.raises(ValueError, match="two or more"):
        factor_information(q(noise()[:1]), FACTORS[:1])
    with pytest.raises(ValueError, match="at most 540 rows"):
        dci(noise(), FACTORS, num_train=500, num_test=41)


# --- active units ------------------------------------------------------------------------------


def test_active_units_are_those_whose_mean_varies() -> None:
    unit = torch.randn(10_007)
    means = torch.stack([unit, 0.05 * unit + 7, torch.full_like(unit, 3.0), 0.11 * unit], 1)
    assert active_units(means).tolist() == [True, False, False, True]
    assert active_units(means, threshold=1e-3).tolist() == [True, True, False, True]
    with pytest.raises(ValueError, match="two rows or more, for a variance"):
        active_units(means[:1])
    with pytest.raises(ValueError, match="posterior_means must be finite"):
        active_units(means / 0)
