"""Differences of models over data and seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_vae.__main__ import main
from pyro_vae.metrics import paired_difference


def test_by_hand() -> None:
    first = torch.tensor([[1.0, 2.0, 6.0], [3.0, 2.0, 4.0]])
    second = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 5.0], [0.0, 1.0, 2.0]])
    found = paired_difference(first, second)
    each = [2.0 - 0.0, 2.0 - 1.0, 5.0 - 3.0]  # averages over seeds
    mean = sum(each) / 3
    data = sum((d - mean) ** 2 for d in each) / 2 / 3
    seeds = torch.tensor([3.0, 3.0]).var().item() / 2 + torch.tensor([1, 2, 1.0]).var().item() / 3
    assert found.mean == pytest.approx(mean)
    assert found.stderr_data == pytest.approx(data**0.5)
    assert found.stderr_seeds == pytest.approx(seeds**0.5)
    assert found.freedom == pytest.approx((data + seeds) ** 2 / (data**2 / 2 + seeds**2 / 2))
    back = paired_difference(second, first)
    assert back.mean == -found.mean
    assert back.p_worse == pytest.approx(1 - found.p_worse)


def test_the_probability_is_uniform_where_models_are_equal() -> None:
    torch.manual_seed(0)
    trials, seeds, data = 400, 5, 50
    values = torch.randn(trials, 2, seeds, 1) * 0.3 + torch.randn(trials, 2, 1, data)
    found = [paired_difference(*both).p_worse for both in values]
    for level in (0.05, 0.25, 0.75, 0.95):
        share = sum(p < level for p in found) / trials
        assert abs(share - level) < 3.5 * math.sqrt(level * (1 - level) / trials)


def test_one_seed_says_nothing_of_seeds() -> None:
    found = paired_difference(torch.randn(1, 7), torch.randn(4, 7))
    assert math.isnan(found.stderr_seeds)
    assert found.stderr == found.stderr_data
    assert paired_difference(torch.ones(1, 3), torch.ones(1, 3)).p_worse == 0.5


def test_shapes_that_do_not_fit_are_refused() -> None:
    for first, second in ((3, 3), ((2, 5), (3, 4)), ((2, 1), (3, 1))):
        with pytest.raises(ValueError, match=r"\[S1, N\] and \[S2, N\]; got"):
            paired_difference(torch.zeros(first), torch.zeros(second))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_seeds_are_trained_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(61, 3)))
    small = ["--encoder.hidden=[5]", "--decoder.hidden=[5]", "--epochs=1", "--likelihood=Normal"]
    train = ["train", "--data", str(tmp_path / "x.npy"), *small, "--progress=false", "--seeds=2"]
    for name, size in (("a", 2), ("b", 1)):
        assert main([*train, "--run", str(tmp_path / name), f"--latent_dim={size}"]) == 0
    assert main([*train, "--run", str(tmp_path / "a"), "--latent_dim=2"]) == 0  # already there
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["seed-0", "seed-1"]
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (pair,) = found["differences"]
    assert pair["stderr"] == pytest.approx(math.hypot(pair["stderr_data"], pair["stderr_seeds"]))
    runs = found["runs"]
    assert runs[str(tmp_path / "a")]["log_prob"] == pytest.approx(
        np.mean(runs[str(tmp_path / "a")]["seeds"])
    )
    best = max(runs, key=lambda run: runs[run]["log_prob"])
    assert found["ranks"][0] == best
    assert (pair["p_worse"] < 0.5) == (best == pair["first"])
