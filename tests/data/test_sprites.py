"""Sprites: what is drawn is what the factors say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_vae.data import Sprites, load_data, read_dsprites
from pyro_vae.data.sprites import FACTORS, MARGIN

GRID = Sprites(3, 3, 8, 5, 7, size=32)
AREAS = {"square": 0.25**2, "ellipse": math.pi * 0.2 * 0.1, "heart": 3.66197 * 0.13**2}


def one(grid: Sprites, **values: int) -> Tensor:
    """An image [size, size] of these factors, others at 0."""
    factors = torch.tensor([[values.get(name, 0) for name in FACTORS]])
    return grid.draw(grid.rows(factors))[0, 0]


def test_rows_and_factors_are_one_another() -> None:
    rows = torch.arange(len(GRID))
    table = GRID.factors()
    assert len(GRID) == 3 * 3 * 8 * 5 * 7
    assert torch.equal(GRID.rows(table), rows)
    assert len(table.unique(dim=0)) == len(GRID)
    assert (table.amax(0) + 1).tolist() == list(GRID.sizes)
    assert table[1].tolist() == [0, 0, 0, 0, 1]
    assert torch.equal(GRID.factors(rows[[5, 200]]), table[[5, 200]])


def test_the_published_grid_is_the_default() -> None:
    assert len(Sprites()) == 737_280
    assert Sprites().draw(torch.tensor([737_279])).shape == (1, 1, 64, 64)


@pytest.mark.parametrize(("kind", "name"), list(enumerate(AREAS)))
@pytest.mark.parametrize("turn", [0, 1, 3])
def test_areas_are_those_of_the_curves(kind: int, name: str, turn: int) -> None:
    grid = Sprites(3, 2, 8, 2, 2, size=500)
    for scale, factor in ((0, 0.25), (1, 1.0)):
        area = one(grid, shape=kind, scale=scale, orientation=turn).double().mean().item()
        assert area == pytest.approx(AREAS[name] * factor, rel=0.02)


def test_positions_are_where_they_say() -> None:
    grid = Sprites(3, 1, 1, 5, 3, size=200)
    pixel = (torch.arange(200) + 0.5) / 200
    for kind, tolerance in ((0, 1e-2), (1, 1e-2), (2, 0.04)):
        for x in range(5):
            for y in range(3):
                image = one(grid, shape=kind, x=x, y=y).double()
                column = (image.sum(0) * pixel).sum() / image.sum()
                row = (image.sum(1) * pixel).sum() / image.sum()
                assert abs(column - (MARGIN + x * (1 - 2 * MARGIN) / 4)) < tolerance
                assert abs(row - (MARGIN + y * (1 - 2 * MARGIN) / 2)) < tolerance


def test_symmetries() -> None:
    grid = Sprites(3, 1, 8, 1, 1, size=64)
    square, ellipse, heart = (
        [one(grid, shape=s, orientation=o) for o in range(8)] for s in range(3)
    )
    for images, period in ((square, 2), (ellipse, 4), (heart, 8)):
        for turn in range(8):
            for other in range(turn):
                same = bool((images[turn] != images[other]).double().mean() < 0.002)
                assert same is ((turn - other) % period == 0)
    assert torch.equal(heart[0], heart[0].flip(1))
    assert not torch.equal(heart[0], heart[0].flip(0))
    assert torch.equal(ellipse[0], ellipse[0].flip(0))
    # a quarter turn, counter-clockwise
    assert (torch.rot90(heart[0]) != heart[2]).double().mean() < 0.002
    assert (torch.rot90(heart[0], -1) != heart[2]).double().mean() > 0.01


@pytest.mark.parametrize("size", [16, 32, 64])
def test_every_factor_changes_the_image(size: int) -> None:
    grid = Sprites(3, 3, 2, 4, 4, size=size)  # two orientations: half around
    images, table = grid.draw(torch.arange(len(grid))), grid.factors()
    for f, name in enumerate(FACTORS):
        step = torch.zeros(5, dtype=torch.long)
        step[f] = 1
        able = table[:, f] + 1 < grid.sizes[f]
        if name == "orientation":
            able &= table[:, 0] == 2  # half around, squares and ellipses are the same
        here, there = images[able], images[grid.rows(table[able] + step)]
        assert (here != there).flatten(1).any(1).all(), name


def test_nothing_is_cut_off_or_empty() -> None:
    grid = Sprites(3, 2, 16, 2, 2, size=64)
    images = grid.draw(torch.arange(len(grid)))[:, 0]
    for edge in (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]):
        assert edge.sum() == 0
    assert images.flatten(1).any(1).all()
    assert set(images.unique().tolist()) == {0, 1}
    assert images.dtype == torch.uint8


def test_drawing_depends_on_the_row_alone() -> None:
    rows = torch.randperm(len(GRID))
    images = GRID.draw(torch.arange(len(GRID)))
    state = torch.get_rng_state()
    assert torch.equal(GRID.draw(rows), images[rows])
    assert torch.equal(state, torch.get_rng_state())
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(GRID.draw(rows[:7]), images[rows[:7]])
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_sub_grid_keeps_the_ends() -> None:
    large, small = Sprites(3, 5, 8, 9, 9, size=32), Sprites(2, 2, 4, 3, 2, size=32)
    table = small.factors()
    spread = torch.tensor([1, 4, 2, 4, 8])
    mine = small.draw(torch.arange(len(small)))
    assert (mine != large.draw(large.rows(table * spread))).double().mean() < 1e-4  # rounding


def test_load_data_knows_them() -> None:
    data = load_data("sprites")
    grid = Sprites(3, 3, 8, 8, 8, size=32)
    assert sum(len(part) for part in (data.train, data.validation, data.test)) == len(grid)
    assert tuple(data.train.data_shape) == (1, 32, 32)
    index = torch.arange(5)
    table = grid.factors(data.test.rows[index])
    assert torch.equal(data.test.x[index], grid.draw(grid.rows(table)))
    assert torch.equal(data.test.labels[index], table[:, 0])


def write(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


def published(count: int = 7) -> dict[str, object]:
    rows = torch.arange(count) * 100
    table = GRID.factors(rows)
    classes = torch.cat([torch.zeros(count, 1, dtype=torch.long), table], 1)
    return {"imgs": GRID.draw(rows)[:, 0].numpy(), "latents_classes": classes.numpy()}


def test_the_published_file(tmp_path: Path) -> None:
    objects = np.array({"title": "dSprites"}, dtype=object)  # which must not be unpickled
    data, factors = read_dsprites(write(tmp_path / "d.npz", **published(), metadata=objects))
    rows = torch.arange(7) * 100
    assert torch.equal(factors, GRID.factors(rows))
    assert torch.equal(data.x, GRID.draw(rows))
    assert torch.equal(data.labels, factors[:, 0])
    assert data.levels == 2


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="published dSprites file"):
        read_dsprites(tmp_path / "none.npz")
    arrays = published()
    with pytest.raises(ValueError, match="published dSprites file"):
        read_dsprites(write(tmp_path / "a.npz", imgs=arrays["imgs"]))
    objects = np.array([{}] * 7, dtype=object)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_dsprites(write(tmp_path / "b.npz", imgs=objects, latents_classes=objects))
    wrong = {**arrays, "latents_classes": np.zeros((7, 5))}
    with pytest.raises(ValueError, match=r"latents_classes \[N, 6\]"):
        read_dsprites(write(tmp_path / "c.npz", **wrong))


@pytest.mark.parametrize("sizes", [(4,), (0,), (3, 0), (3, 6, 40, 32, 32, 7)])
def test_wrong_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected 1 to 3 shapes"):
        Sprites(*sizes)


def test_wrong_rows_and_factors_are_refused() -> None:
    with pytest.raises(ValueError, match="rows from 0 to 2519"):
        GRID.factors(torch.tensor([0, 2520]))
    for bad in ([[3, 0, 0, 0, 0]], [[0, 0, 0, 0, -1]], [[0, 0]]):
        with pytest.raises(ValueError, match="factors"):
            GRID.rows(torch.tensor(bad))
