"""Transforms against exact truths."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Beta, Normal

from pyro_vae.data import (
    Binarise,
    Data,
    Dequantise,
    Identity,
    Rescale,
    Standardise,
    Threshold,
    declare,
    make_transform,
    restore,
)

SHAPE = (2, 3, 5)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def grey(*shape: int, levels: int = 256, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, shape, generator=generator).to(torch.uint8)


SMOOTH = {
    "identity": Identity(),
    "dequantise": Dequantise(17),
    "rescale": Rescale(17),
    "standardise": Standardise(3 + uniform(*SHAPE), 0.3 + uniform(*SHAPE, seed=1)),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_log_jacobian_is_the_slogdet_of_the_transform(name: str) -> None:
    transform = SMOOTH[name]
    x, u = 7 + uniform(1, *SHAPE, seed=2), 0.1 + 0.5 * uniform(1, *SHAPE, seed=3)
    jacobian = torch.autograd.functional.jacobian(lambda x: transform(x, u), x)
    size = math.prod(SHAPE)
    exact = torch.linalg.slogdet(jacobian.reshape(size, size).double()).logabsdet
    assert transform.log_jacobian(SHAPE) == pytest.approx(exact.item(), abs=1e-5)


def test_dequantised_density_integrates_to_one_over_original_units() -> None:
    transform, density = Dequantise(17), Beta(2.0, 3.0, validate_args=False)
    cells = (torch.arange(17_000, dtype=torch.float64) + 0.5) / 1000
    log_prob = density.log_prob(transform(cells.floor(), cells.frac()).double())
    total = (log_prob + transform.log_jacobian((1,))).exp().sum() / 1000
    assert total.item() == pytest.approx(1, abs=1e-4)


def test_standardised_density_integrates_to_one_over_original_units() -> None:
    transform = Standardise(torch.tensor([3.0]), torch.tensor([0.7]))
    x = torch.linspace(-7, 13, 20_001)[:, None]
    log_prob = Normal(0.2, 1.3).log_prob(transform(x)).double()
    total = (log_prob + transform.log_jacobian((1,))).exp().sum() * 0.001
    assert total.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("levels", [17, 256])
@pytest.mark.parametrize("shape", [(7,), (1, 5, 3)])
def test_a_uniform_model_needs_log2_levels_bits_per_dim(
    levels: int, shape: tuple[int, ...]
) -> None:
    data = Data(grey(3, *shape, levels=levels), levels=levels, transform=Dequantise(levels))
    bits = data.bits_per_dim(torch.zeros(2, 3, dtype=torch.float64))
    assert bits.shape == (2, 3)
    assert torch.allclose(bits, torch.full_like(bits, math.log2(levels)), atol=1e-12, rtol=0)


def test_uniform_bits_per_dim_of_256_levels_are_eight() -> None:
    data = Data(grey(3, 1, 5, 7), levels=256, transform=Dequantise(256))
    assert data.bits_per_dim(torch.tensor(0.0, dtype=torch.float64)).item() == 8


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_threshold_is_half_of_the_top(levels: int) -> None:
    x = torch.arange(levels, dtype=torch.int64)[:, None]
    transform = make_transform("threshold", x, levels)
    assert torch.equal(transform(x), (x.double() / (levels - 1) >= 0.5).float())


def test_threshold_of_256_levels_starts_at_128_and_of_17_at_8() -> None:
    x = torch.tensor([[127], [128]], dtype=torch.uint8)
    assert make_transform("threshold", x, 256) == Threshold(127.5, top=255)
    assert make_transform("threshold", x, 256)(x).tolist() == [[0], [1]]
    assert make_transform("threshold", x, 17) == Threshold(8, top=16)


def test_dequantised_values_stay_inside_the_open_unit_interval() -> None:
    transform = Dequantise(256)
    x = torch.tensor([[0, 255, 255]], dtype=torch.uint8)
    values = transform(x, torch.tensor([[0.0, 1 - 2.0**-24, 1 - 2.0**-17]]))
    assert values.min() > 0
    assert values.max() < 1
    assert values.logit().isfinite().all()


@pytest.mark.parametrize("levels", [17, 37, 47, 256, 65_536])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-24])
def test_dequantised_values_stay_in_their_own_bin(levels: int, u: float) -> None:
    x, transform = torch.arange(levels)[:, None], Dequantise(levels)
    back = transform.inverse(transform(x, torch.full(x.shape, u)))
    assert torch.equal(back, x.float())


@pytest.mark.parametrize("name", ["none", "dequantise", "rescale", "standardise"])
def test_inverse_gives_the_original_values(name: str) -> None:
    x = grey(101, *SHAPE)
    transform = make_transform(name, x, 256)
    back = transform.inverse(transform(x, 0.98 * uniform(*x.shape)))
    assert torch.allclose(back, x.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["threshold", "static", "dynamic"])
def test_binary_transforms_have_pictures_from_black_to_white(name: str) -> None:
    x = torch.tensor([[0, 255]], dtype=torch.uint8)
    transform = make_transform(name, x, 256)
    assert transform.binary
    assert transform.inverse(transform(x, torch.full((1, 2), 0.5))).tolist() == [[0, 255]]
    assert transform.log_jacobian((2,)) == 0


@pytest.mark.parametrize(
    ("name", "noisy", "fresh"),
    [
        ("none", False, False),
        ("threshold", False, False),
        ("static", True, False),
        ("dynamic", True, True),
        ("dequantise", True, True),
        ("rescale", False, False),
        ("standardise", False, False),
    ],
)
def test_which_transforms_need_noise(name: str, noisy: bool, fresh: bool) -> None:
    transform = make_transform(name, grey(11, 3), 256)
    assert (transform.noisy, transform.fresh) == (noisy, fresh)


def test_binarised_ends_are_certain() -> None:
    x = torch.tensor([[0, 16]], dtype=torch.uint8)
    low, high = torch.zeros(1, 2), torch.full((1, 2), 1 - 2.0**-24)
    assert Binarise(17, dynamic=False)(x, low).tolist() == [[0, 1]]
    assert Binarise(17, dynamic=False)(x, high).tolist() == [[0, 1]]


def test_standardised_columns_have_mean_zero_and_deviation_one() -> None:
    x = 5 + 3 * uniform(103, 7)
    values = Standardise.fit(x)(x)
    assert torch.allclose(values.mean(0), torch.zeros(7), atol=1e-5)
    assert torch.allclose(values.std(0, correction=0), torch.ones(7), atol=1e-5)


def test_standardise_names_the_constant_columns() -> None:
    x = uniform(11, 5)
    x[:, [1, 3]] = 0.1
    with pytest.raises(ValueError, match=r"2 of 5: 1, 3 \(from 0\)"):
        make_transform("standardise", x, None)


def test_an_unknown_transform_is_hinted() -> None:
    with pytest.raises(ValueError, match="did you mean 'dequantise'"):
        make_transform("dequantize", grey(3, 2), 256)


def test_grey_transforms_need_levels() -> None:
    with pytest.raises(ValueError, match="'static' needs data with grey levels"):
        make_transform("static", uniform(3, 2), None)
    with pytest.raises(ValueError, match="at least 2 grey levels"):
        Rescale(1)


def test_noisy_transforms_need_noise() -> None:
    with pytest.raises(ValueError, match="needs uniform noise"):
        Dequantise(256)(grey(3, 2))


@pytest.mark.parametrize(
    "name", ["none", "threshold", "static", "dynamic", "dequantise", "rescale", "standardise"]
)
def test_declared_transform_is_restored(name: str) -> None:
    x = torch.randint(0, 17, (11, 3), generator=torch.Generator().manual_seed(0))
    transform = make_transform(name, x, 17)
    again = restore(json.loads(json.dumps(declare(transform))))
    u = torch.rand(11, 3, generator=torch.Generator().manual_seed(1))
    assert type(again) is type(transform)
    assert torch.equal(again(x, u), transform(x, u))


def test_restoring_a_foreign_class_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a transform of pyro_vae.data"):
        restore({"class": "os.system"})


def test_standardise_counts_what_is_observed() -> None:
    x = uniform(31, 3) * torch.tensor([2.0, 30.0, 0.5])
    holes = x.masked_fill(uniform(31, 3, seed=1) < 0.4, torch.nan)
    transform = Standardise.fit(holes)
    for d in range(3):
        seen = holes[:, d][~holes[:, d].isnan()]
        exact = Standardise.fit(seen.unsqueeze(1))
        torch.testing.assert_close(transform.mean[d], exact.mean[0])
        torch.testing.assert_close(transform.std[d], exact.std[0])
    with pytest.raises(ValueError, match=r"deviation 0, or no value, in 2 of 3: 1, 2 \(from 0\)"):
        Standardise.fit(torch.tensor([[1.0, 5.0, torch.nan], [2.0, torch.nan, torch.nan]]))


def test_log_jacobian_counts_what_is_observed() -> None:
    x = uniform(7, 3).masked_fill(uniform(7, 3, seed=1) < 0.5, torch.nan)
    transform = Standardise(torch.zeros(3), torch.tensor([2.0, 30.0, 0.5]))
    exact = [sum(-math.log(s) for s, v in zip(transform.std, row) if v == v) for row in x]
    for data in (Data(x, transform=transform), Data(x, transform=transform).fixed()):
        torch.testing.assert_close(data.log_jacobians, torch.tensor(exact).double())
        assert data.log_jacobian == pytest.approx(sum(exact) / 7)
        bits = data.bits_per_dim(-data.log_jacobians + math.log(2)).mean().item()
        assert bits == pytest.approx(-7 / (~x.isnan()).sum().item())
    assert torch.equal(Data(x.nan_to_num()).log_jacobians, torch.zeros(7).double())


@pytest.mark.parametrize("name", ["threshold", "dynamic"])
def test_zeros_and_ones_that_are_taken_for_grey_values_are_said(name: str) -> None:
    x = torch.tensor([[0, 1, 1]], dtype=torch.uint8)
    with pytest.warns(
        UserWarning, match="makes the images black: store images of 0 and 1 as bool"
    ):
        make_transform(name, x, 256)
    for given, levels in ((x, 2), (2 * x, 256), (0 * x, 256)):
        make_transform(name, given, levels)
