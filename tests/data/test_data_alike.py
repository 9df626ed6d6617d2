"""A user's rows beside those of a run: columns, grey levels, units."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyro_vae.data import Data, Identity, Threshold, Transform, kind_of
from pyro_vae.data import alike as alike_of_shape

GREY = torch.arange(3 * 1 * 5 * 7).reshape(3, 1, 5, 7).to(torch.uint8)
TABLE = torch.tensor([[1.0, 20.0, 300.0], [2.0, 30.0, 100.0]])


def alike(rows: Data, known: dict[str, Any], transform: Transform) -> Data:
    shape = (3,) if rows.x.ndim == 2 else (1, 5, 7)
    return alike_of_shape(rows, known, transform, shape)


def images(x: Any, levels: int | None) -> Data:
    return Data(x, levels=levels, name="file")


def test_columns_come_in_the_order_of_the_run() -> None:
    known = kind_of(Data(TABLE, columns=("a", "b", "c")))
    rows = Data(TABLE[:, [2, 0, 1]], labels=torch.tensor([1, 0]), columns=("c", "a", "b"))
    found = alike(rows, known, Identity())
    assert torch.equal(found.x, TABLE)
    assert found.columns == ("a", "b", "c")
    assert torch.equal(found.labels, rows.labels)
    assert alike(Data(TABLE), known, Identity()).columns is None  # no names: by position
    for names, words in ((("a", "b", "d"), "missing: c; unknown: d"), (("a", "a", "b"), "c;.* a")):
        with pytest.raises(ValueError, match=words):
            alike(Data(TABLE, columns=names), known, Identity())
    wide = Data(torch.zeros(2, 4), columns=("a", "b", "c", "d"))
    with pytest.raises(ValueError, match="unknown: d"):
        alike(wide, known, Identity())


@pytest.mark.parametrize("known", [kind_of(images(GREY, 256)), {}])
def test_grey_values_are_those_of_the_run(known: dict[str, Any]) -> None:
    threshold = Threshold(127.5, top=255)
    for x, levels in ((GREY, 256), (GREY.long(), None)):
        found = alike(images(x, levels), known, threshold)
        assert (found.levels, found.x.tolist()) == (256, GREY.tolist())
    for x, levels in (
        (GREY / 255, None),
        (GREY.float(), None),
        (GREY > 50, 2),
        (-1 - GREY.long(), None),
    ):
        with pytest.raises(
            ValueError, match="whole grey values from 0 to 255.*store them as uint8"
        ):
            alike(images(x, levels), known, threshold)


def test_a_file_of_more_levels_than_it_uses_is_taken() -> None:
    known = kind_of(images(GREY % 17, 17))
    assert alike(images(GREY % 17, 256), known, Identity()).levels == 17
    with pytest.raises(ValueError, match="from 0 to 16"):
        alike(images(GREY, 256), known, Identity())


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"file has rows of shape \(1, 5, 6\); .* on \(1, 5, 7\)"):
        alike(images(GREY[..., 1:], 256), kind_of(images(GREY, 256)), Identity())


def test_grey_values_for_a_run_of_floats_are_refused_and_for_counts_taken() -> None:
    with pytest.raises(ValueError, match="from 0 to .*; got grey values"):
        alike(images(GREY, 256), kind_of(images(GREY / 255, None)), Identity())
    assert alike(images(GREY, 256), kind_of(images(GREY.long(), None)), Identity()).levels is None
    assert alike(images(GREY, 256), {}, Identity()).levels == 256  # a run that recorded nothing


@pytest.mark.parametrize("factor", [0.05, 20.0])
def test_other_units_are_said(factor: float) -> None:
    known = kind_of(Data(TABLE))
    with pytest.warns(UserWarning, match="values reach .*trained on 300: are they in the same"):
        alike(Data(TABLE * factor), known, Identity())
    alike(Data(TABLE * 5), known, Identity())
