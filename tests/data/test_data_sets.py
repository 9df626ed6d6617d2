"""Named data sets, the split, and the description of a run."""

from __future__ import annotations

import gzip
import json
import math
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from pyro_vae.data import Data, Splits, load_data, spread

ROOT = Path(os.environ.get("PYRO_VAE_DATA", Path(__file__).parents[2] / "data"))


def parts(splits: Splits) -> tuple[Data, Data, Data]:
    return splits.train, splits.validation, splits.test


def test_digits_come_in_three_disjoint_parts() -> None:
    splits = load_data("digits")
    assert [len(part) for part in parts(splits)] == [1437, 180, 180]
    rows = torch.cat([part.rows for part in parts(splits)])
    assert torch.equal(rows.sort().values, torch.arange(1797))
    for part in parts(splits):
        assert part.x.dtype == torch.uint8
        assert part.data_shape == (1, 8, 8)
        assert (part.levels, part.classes, part.y) == (17, 10, None)


def test_digits_keep_their_pixels_and_labels() -> None:
    from sklearn.datasets import load_digits

    test = load_data("Digits", seed=5).test
    source = load_digits()
    assert np.array_equal(test.x[:, 0].numpy(), source.images[test.rows])
    assert np.array_equal(test.labels.numpy(), source.target[test.rows])


def test_the_split_depends_on_the_seed_only() -> None:
    first, again, other = load_data("digits"), load_data("digits"), load_data("digits", seed=1)
    torch.rand(3)
    assert first.describe() == again.describe()
    assert not torch.equal(first.test.rows, other.test.rows)


@pytest.mark.parametrize(
    ("validation", "rows"), [(101, 101), (0.25, 449), (np.int64(1), 1), (None, 180)]
)
def test_the_size_of_the_validation_part(validation: float | None, rows: int) -> None:
    splits = load_data("digits", validation=validation)
    assert (len(splits.validation), splits.validation_rows, len(splits.test)) == (rows, rows, 180)


def test_the_limit_keeps_the_first_rows_where_that_is_asked_for() -> None:
    whole, few = load_data("digits"), load_data("digits", limit=23, even=False)
    for all_rows, first in zip(parts(whole), parts(few)):
        assert torch.equal(first.x, all_rows.x[:23])
        assert torch.equal(first.rows, all_rows.rows[:23])
    assert few.train.classes == 10


def test_the_limit_keeps_rows_of_every_class(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(10), 23)  # as folders of images come, one after another
    arrays = {"x": np.ones((230, 2)) * labels[:, None], "labels": labels}
    np.savez(tmp_path / "x.npz", **arrays, **{f"{name}_test": a for name, a in arrays.items()})
    for limit in (20, 50, 111):
        few = load_data(tmp_path / "x.npz", limit=limit)
        counts = few.test.labels.bincount()
        assert len(few.test) == counts.sum() == limit
        assert counts.min() >= limit // 10 - 1
        assert counts.max() <= -(-limit // 10) + 1
        again = load_data(tmp_path / "x.npz", limit=limit, seed=3).test
        assert not torch.equal(again.rows, few.test.rows)
    assert load_data(tmp_path / "x.npz", limit=1000).test.labels.tolist() == labels.tolist()


@pytest.mark.parametrize(("num", "limit"), [(7, 7), (7, 3), (1009, 1008), (1009, 501), (5, 1)])
def test_spread_rows_are_distinct_and_each_as_likely(num: int, limit: int) -> None:
    drawn = torch.stack([spread(num, limit, seed) for seed in range(400)])
    assert (drawn.diff(dim=1) > 0).all()
    assert drawn.min() >= 0
    assert drawn.max() < num
    share = drawn.flatten().bincount(minlength=num) / 400
    least, most = 1 / math.ceil(num / limit), 1 / (num // limit)
    error = 5 * (most * (1 - most) / 400) ** 0.5 + 5 * (least * (1 - least) / 400) ** 0.5
    assert share.min() >= least - error
    assert share.max() <= most + error


def test_conditional_parts_carry_one_hot_labels() -> None:
    splits = load_data("digits", conditional=True, limit=2)
    for part in parts(splits):
        assert part.y.shape == (2, 10)
        assert torch.equal(part.y.argmax(1), part.labels)


def test_the_noise_of_a_row_is_keyed_by_the_seed() -> None:
    first, other = (load_data("digits", transform="static", seed=seed) for seed in (0, 3))
    assert (first.train.seed, other.train.seed) == (0, 3)


def test_a_description_is_json_and_makes_the_same_parts() -> None:
    splits = load_data("digits", transform="static", validation=0.2, seed=3, limit=53)
    description = json.loads(json.dumps(splits.describe()))
    assert "root" not in description
    splits.check(description)
    del description["digests"]
    assert load_data(**description).describe() == splits.describe()


def test_changed_data_are_noticed() -> None:
    splits = load_data("digits")
    description = splits.describe()
    splits.test.x[17, 0, 3, 2] ^= 1
    with pytest.raises(ValueError, match="data changed since the run: the test part"):
        splits.check(description)
    with pytest.raises(ValueError, match="data changed since the run: transform was 'none'"):
        load_data("digits", transform="static").check(description)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mnits"}, "did you mean 'MNIST'"),
        ({"name": "nothing.npz"}, "expected a file or folder at nothing.npz"),
        ({"name": ""}, "expected the name of a data set or a path, got ''"),
        ({"name": "digits", "schema": {"a": "real"}}, "a schema is of tables"),
        ({"name": "digits", "validation": 0}, "got 0"),
        ({"name": "digits", "validation": 1.0}, "fraction between 0 and 1, got 1.0"),
        ({"name": "digits", "validation": 1617}, "rows left for training"),
        ({"name": "digits", "seed": -1}, "seed must be at least 0"),
        ({"name": "digits", "limit": 0}, "limit must be at least 1"),
        ({"name": "digits", "transform": "statc"}, "did you mean 'static'"),
        ({"name": "digits", "transform": "standardise"}, "standard deviation 0"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(**options)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def test_emnist_stands_upright_and_keeps_its_test_part(tmp_path: Path) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    upright = {}
    for part, rows in (("train", 13), ("test", 5)):
        upright[part] = np.random.default_rng(rows).integers(256, size=(rows, 28, 28))
        stem = f"emnist-balanced-{part}"
        write_idx(raw / f"{stem}-images-idx3-ubyte", upright[part].transpose(0, 2, 1))
        write_idx(raw / f"{stem}-labels-idx1-ubyte", np.arange(rows))
    splits = load_data("emnist", root=tmp_path)
    assert [len(part) for part in parts(splits)] == [11, 2, 5]
    assert np.array_equal(splits.test.x[:, 0], upright["test"])
    assert np.array_equal(splits.train.x[:, 0], upright["train"][splits.train.rows])
    assert splits.test.rows.tolist() == [13, 14, 15, 16, 17]
    assert splits.test.classes == 13


def test_colour_images_have_the_channels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(17, 32, 32, 3)).astype(np.uint8)

    def cifar(root: str, train: bool, download: bool) -> SimpleNamespace:
        return SimpleNamespace(data=pixels, targets=list(range(17)))

    def svhn(root: str, split: str, download: bool) -> SimpleNamespace:
        return SimpleNamespace(data=pixels.transpose(0, 3, 1, 2), labels=np.arange(17))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar)
    monkeypatch.setattr(torchvision.datasets, "SVHN", svhn)
    for name in ("cifar10", "svhn"):
        test = load_data(name).test
        assert np.array_equal(test.x.permute(0, 2, 3, 1), pixels)
        assert test.labels.tolist() == list(range(17))


def test_omniglot_ink_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    paper = np.full((105, 105), 255, np.uint8)
    paper[7, 11:13] = 0

    def omniglot(root: str, background: bool, download: bool) -> list[tuple[Any, int]]:
        return [(Image.fromarray(paper), 0)] * 7

    monkeypatch.setattr(torchvision.datasets, "Omniglot", omniglot)
    test = load_data("omniglot").test
    assert (test.levels, test.labels, test.data_shape) == (2, None, (1, 105, 105))
    assert test.x[0].nonzero().tolist() == [[0, 7, 11], [0, 7, 12]]


def test_a_failed_download_says_where_the_files_belong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(root: Path, train: bool, download: bool) -> None:
        raise RuntimeError("Error downloading:\nno network")

    monkeypatch.setattr(torchvision.datasets, "KMNIST", offline)
    with pytest.raises(ValueError, match=r"KMNIST/raw .*got: no network; put them there"):
        load_data("kmnist", root=tmp_path)


needs_mnist = pytest.mark.skipif(
    not (ROOT / "MNIST" / "raw").is_dir(), reason="no MNIST under PYRO_VAE_DATA or data/"
)


@needs_mnist
def test_mnist_is_the_published_one() -> None:
    splits = load_data("mnist", root=ROOT, transform="threshold", conditional=True)
    assert [len(part) for part in parts(splits)] == [50_000, 10_000, 10_000]
    assert splits.train.data_shape == (1, 28, 28)
    assert torch.cat([part.rows for part in parts(splits)]).unique().numel() == 70_000
    with gzip.open(ROOT / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz") as file:
        raw = np.frombuffer(file.read(), np.uint8, offset=16)
    ones = splits.test.fixed().x
    assert np.array_equal(ones.flatten().numpy(), raw >= 128)
    counts = [int(part.fixed().x.sum()) for part in parts(splits)]
    assert (counts[0] + counts[1], counts[2]) == (6_221_431, 1_052_359)
    assert splits.test.y.sum(0).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_splits_are_shown_in_a_line() -> None:
    assert repr(load_data("digits", transform="threshold")) == (
        "Splits('digits', 1437 train, 180 validation, 180 test rows of shape (1, 8, 8), "
        "17 levels, 10 classes, transform Threshold)"
    )
