"""What two studies compute by themselves, against exact values and repeated draws."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sklearn.metrics import roc_auc_score

from pyro_vae.data import Data

EXAMPLES = Path(__file__).parent.parent / "examples/studies"


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return import_module(name)


def test_area_under_the_curve_with_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    area = example("anomaly", monkeypatch).area
    normal, anomalous = torch.randn(53).round(decimals=1), torch.randn(31).round(decimals=1) + 1
    assert len({*normal.tolist()} & {*anomalous.tolist()}) > 3
    truth = [0] * 53 + [1] * 31
    expected = roc_auc_score(truth, torch.cat([normal, anomalous]))
    assert area(normal, anomalous)[0] == pytest.approx(expected, abs=1e-12)


def test_its_standard_error_is_the_spread_of_repeated_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    area = example("anomaly", monkeypatch).area
    pairs = [area(torch.randn(53), 2 * torch.randn(31) + 1) for _ in range(2000)]
    values, errors = torch.tensor(pairs).T
    assert errors.square().mean().sqrt() == pytest.approx(values.std().item(), rel=0.06)


@pytest.mark.parametrize("dark", [False, True])
def test_letters_become_light_on_dark_and_keep_thin_strokes(
    dark: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ink = torch.zeros(2, 1, 21, 21, dtype=torch.uint8)
    ink[:, :, 10] = 1  # a line of one pixel of three that become one
    data = Data(1 - ink if dark else ink, levels=2)
    found = example("anomaly", monkeypatch).like_digits(data, 7)
    expected = torch.zeros(2, 1, 7, 7)
    expected[:, :, 3] = 1
    assert torch.equal(found, expected)


def test_the_mixture_is_summed_out_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    worst = example("mixture_by_enumeration", monkeypatch).main(True, str(tmp_path / "m.png"))
    assert worst < 1e-12
    assert capsys.readouterr().out.count("nats per flower") == 7
    assert (tmp_path / "m.png").exists()
