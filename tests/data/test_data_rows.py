"""Rows, their noise, subsets and digests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_vae.data import (
    Binarise,
    Data,
    Dequantise,
    Standardise,
    Threshold,
    Transform,
    epoch_order,
)

N, SHAPE = 101, (1, 5, 7)


def make(
    transform: Transform, *, labels: bool = True, rows: Tensor | None = None, seed: int = 0
) -> Data:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(17, (N, *SHAPE), generator=generator).to(torch.uint8)
    classes = torch.arange(N) % 11 if labels else None
    return Data(x, labels=classes, levels=17, transform=transform, rows=rows, seed=seed)


NOISY = {
    "static": Binarise(17, dynamic=False),
    "dynamic": Binarise(17, dynamic=True),
    "dequantise": Dequantise(17),
}


def all_rows(data: Data) -> Tensor:
    return data.batch(torch.arange(len(data)))[0]


@pytest.mark.parametrize("name", NOISY)
def test_fixed_noise_ignores_order_subset_and_batching(name: str) -> None:
    data = make(NOISY[name])
    whole = all_rows(data.fixed(5))
    index = torch.randperm(N, generator=torch.Generator().manual_seed(1))[:37]
    parts = [data.subset(rows).fixed(5) for rows in index.split(13)]
    assert torch.equal(torch.cat([all_rows(part) for part in parts]), whole[index])
    assert torch.equal(data.fixed(5).batch(index)[0], whole[index])


@pytest.mark.parametrize("name", NOISY)
def test_fixed_noise_depends_on_seed_and_row_id(name: str) -> None:
    data = make(NOISY[name])
    assert torch.equal(all_rows(data.fixed(5)), all_rows(data.fixed(5)))
    assert not torch.equal(all_rows(data.fixed(5)), all_rows(data.fixed(6)))
    moved = make(NOISY[name], rows=torch.arange(N) + N)
    assert not torch.equal(all_rows(data.fixed(5)), all_rows(moved.fixed(5)))


def test_fixed_noise_spans_more_than_one_chunk() -> None:
    x = torch.zeros(2053, 1, dtype=torch.uint8)
    data = Data(x, levels=17, transform=Dequantise(17))
    index = torch.tensor([0, 1023, 1024, 2052])
    assert torch.equal(data.fixed().x[index], data.subset(index).fixed().x)
    assert len(data.fixed().x.unique()) > 2000


def test_fixed_noise_leaves_the_generator_of_torch_alone() -> None:
    state = torch.get_rng_state()
    make(Dequantise(17)).fixed()
    epoch_order(N, 0, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_static_noise_is_that_of_fixed_and_dynamic_noise_is_fresh() -> None:
    static = make(NOISY["static"], seed=7)
    assert torch.equal(all_rows(static), all_rows(static))
    assert torch.equal(all_rows(static), all_rows(static.fixed()))
    assert torch.equal(all_rows(static), all_rows(static.fixed(7)))
    for name in ("dynamic", "dequantise"):
        fresh = make(NOISY[name])
        assert not torch.equal(all_rows(fresh), all_rows(fresh))


def test_binarised_frequency_is_the_grey_value() -> None:
    data = Data(
        torch.arange(17, dtype=torch.uint8).expand(10_007, 17).contiguous(),
        levels=17,
        transform=Binarise(17, dynamic=True),
    )
    p = torch.arange(17) / 16
    for values in (all_rows(data.fixed()), all_rows(data)):
        error = (p * (1 - p) / len(data)).sqrt()
        assert ((values.mean(0) - p).abs() <= 5 * error).all()


@pytest.mark.parametrize("transform", [*NOISY.values(), Threshold(8, 16)])
def test_batches_are_float_and_fixed_keeps_the_units(transform: Transform) -> None:
    data = make(transform)
    fixed = data.fixed()
    assert all_rows(data).dtype == all_rows(fixed).dtype == torch.float32
    assert fixed.x.dtype == (torch.uint8 if transform.binary else torch.float32)
    assert fixed.log_jacobian == data.log_jacobian
    x = all_rows(fixed)
    assert torch.equal(fixed.transform.inverse(x), transform.inverse(x))


def test_standardised_images_can_be_fixed() -> None:
    data = make(Standardise.fit(make(NOISY["static"]).x))
    assert torch.equal(all_rows(data.fixed()), all_rows(data))


def test_fixed_data_takes_no_other_transform() -> None:
    with pytest.raises(ValueError, match="choose the transform before"):
        make(Dequantise(17)).fixed().with_transform(Threshold(8))
    assert make(Dequantise(17)).with_transform(Threshold(8)).transform == Threshold(8)
    with pytest.raises(ValueError, match="'standardise'; a name goes to with_transform of the S"):
        Data(torch.randn(7, 3)).with_transform("standardise")


def test_batches_carry_y() -> None:
    data = make(NOISY["static"]).one_hot()
    index = torch.tensor([97, 2, 2])
    for source in (data, data.fixed(), data.with_transform(Dequantise(17))):
        x, y = source.batch(index)
        assert x.shape == (3, *SHAPE)
        assert torch.equal(y.argmax(1), data.labels[index])
        assert y.shape == (3, 11)


def test_a_subset_keeps_the_number_of_classes() -> None:
    data = make(Dequantise(17))
    assert data.classes == 11
    assert data.subset(torch.tensor([0, 1])).one_hot().y.shape == (2, 11)


def test_what_was_checked_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(NOISY["dequantise"])
    monkeypatch.setattr(Data, "_check_values", lambda self: pytest.fail("looked at again"))
    some = data.subset(torch.arange(13)).to("cpu").one_hot().with_transform(Dequantise(17)).fixed()
    assert some.y.shape == (13, 11)
    assert some.rows.tolist() == [*range(13)]
    assert not some.missing
    with pytest.raises(ValueError, match="subset of at least 1 row"):
        data.subset(torch.arange(0))


def test_values_that_a_transform_makes_infinite_are_refused() -> None:
    tiny = Standardise(torch.zeros(5), torch.full((5,), 1e-38))
    with pytest.raises(ValueError, match=r"x must be finite; 3 row\(s\) hold infinite"):
        Data(torch.full((3, 5), 1e30), transform=tiny).fixed()


def test_one_hot_needs_labels() -> None:
    with pytest.raises(ValueError, match="expected labels"):
        make(Dequantise(17), labels=False).one_hot()


def test_moving_keeps_the_rows() -> None:
    data = make(NOISY["static"]).one_hot()
    assert torch.equal(all_rows(data.to("cpu")), all_rows(data))


def test_one_pixel_changes_the_digest() -> None:
    data = make(Dequantise(17))
    x = data.x.clone()
    assert Data(x).digest() == data.digest()
    x[53, 0, 3, 2] ^= 1
    assert Data(x).digest() != data.digest()


def test_y_shape_and_dtype_change_the_digest() -> None:
    x = torch.zeros(6, 5, dtype=torch.uint8)
    y = torch.zeros(6, 2)
    y_other = y.clone()
    y_other[5, 1] = 1
    made = [
        Data(x),
        Data(x, y=y),
        Data(x, y=y_other),
        Data(x.reshape(5, 6)),
        Data(x.reshape(6, 1, 5)),
        Data(x.to(torch.int8)),
    ]
    assert len({data.digest() for data in made}) == len(made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.zeros(0, 3)}, "at least 1 row"),
        ({"x": torch.zeros(3)}, r"shape \[N, \*E\]"),
        ({"x": torch.zeros(3, 0)}, "1 value"),
        ({"x": torch.zeros(3, 2), "y": torch.zeros(5, 2)}, "expected y of 2"),
        ({"x": torch.zeros(3, 2), "y": torch.zeros(3)}, "expected y of 2"),
        ({"x": torch.zeros(3, 2), "labels": torch.tensor([0, 1])}, "expected labels of 1"),
        ({"x": torch.zeros(3, 2), "rows": torch.tensor([0, 1])}, "expected rows of 1"),
        (
            {"x": torch.tensor([[0.0], [torch.nan], [torch.inf]])},
            r"x must be finite; 1 row.*\[2\]",
        ),
        (
            {"x": torch.zeros(2, 1), "y": torch.tensor([[0.0], [torch.nan]])},
            r"y must be finite.*\[1\]",
        ),
        ({"x": torch.tensor([[1], [17]]), "levels": 17}, "from 0 to 16.* row 1 "),
        ({"x": torch.zeros(2, 1), "labels": torch.tensor([0, -2])}, "expected labels from 0"),
        (
            {"x": torch.zeros(2, 1), "labels": torch.tensor([0, 5]), "classes": 5},
            "labels below 5",
        ),
        ({"x": torch.zeros(2, 1), "labels": torch.zeros(2)}, "integers, got float32"),
        ({"x": torch.zeros(2, 1), "labels": torch.tensor([0, 10**18])}, "labels below 1000000"),
        ({"x": torch.zeros(2, 1, dtype=torch.complex64)}, "real numbers; got complex"),
        ({"x": "text"}, "data 'table': x must be a tensor, array, .*got str"),
        ({"x": torch.zeros(2, 1), "seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_rows_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Data(name="table", **options)


def test_an_order_visits_each_row_once() -> None:
    order = epoch_order(N, 2, 3)
    assert torch.equal(order.sort().values, torch.arange(N))


def test_an_order_depends_on_seed_and_epoch_only() -> None:
    first = epoch_order(N, 2, 3)
    torch.rand(5)
    assert torch.equal(epoch_order(N, 2, 3), first)
    for seed, epoch in ((2, 4), (3, 3), (3, 2)):
        assert not torch.equal(epoch_order(N, seed, epoch), first)


def test_bad_numbers_of_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        epoch_order(N, 0, -1)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        epoch_order(N, -1, 0)


def test_describe_names_what_was_done_before_and_after_fixing() -> None:
    data = Data(torch.zeros(3, 5, dtype=torch.uint8), levels=17, seed=7, name="x")
    data = data.with_transform(Dequantise(17))
    expected = {"name": "x", "seed": 7, "transform": {"class": "Dequantise", "levels": 17}}
    assert data.describe() == expected
    assert data.fixed().describe() == expected


def test_data_are_shown_in_a_line() -> None:
    x = torch.zeros(7, 1, 3, 5, dtype=torch.uint8)
    data = Data(x, labels=torch.arange(7) % 3, levels=17, name="few").one_hot()
    assert repr(data) == (
        "Data('few', 7 rows of shape (1, 3, 5), 17 levels, 3 classes, y of 3, transform Identity)"
    )
    fixed = Data(torch.randn(7, 2)).with_transform(Threshold(0.5)).fixed()
    assert repr(fixed) == "Data(7 rows of shape (2,), transform Threshold, applied)"
    with pytest.raises(ValueError, match="one name for each of the 2 columns; got 3"):
        Data(torch.randn(7, 2), columns=("a", "b", "c"))
