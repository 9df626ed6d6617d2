"""Rows that stay on disk, against the same rows in memory."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vae.data import Data, load_data, read_rows, readers, tables
from pyro_vae.data.mapped import Mapped

N = 53
RANDOM = np.random.default_rng(0)
ARRAYS = {
    "real": RANDOM.normal(size=(N, 3)),
    "gaps": np.where(RANDOM.random((N, 3)) < 0.2, np.nan, RANDOM.normal(size=(N, 3))),
    "column": RANDOM.normal(size=N).astype(np.float32),
    "grey": RANDOM.integers(0, 256, (N, 2, 5)).astype(np.uint8),
    "bits": RANDOM.random((N, 2, 5)) < 0.5,
    "counts": RANDOM.integers(0, 9, (N, 3)),
}


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps files of any size."""
    monkeypatch.setattr(readers, "LARGE", 0)
    monkeypatch.setattr(tables, "LARGE", 0)
    monkeypatch.setattr("pyro_vae.data.mapped.CHUNK", 7)
    monkeypatch.setattr("pyro_vae.data.tables.CHUNK", 7)
    monkeypatch.setattr("pyro_vae.data.transforms.CHUNK", 7)


def with_noise(data: Data, index: torch.Tensor) -> Any:
    """A batch whose noise, if it is drawn anew, is known."""
    torch.manual_seed(0)
    return data.batch(index)


def same(mapped: Data, memory: Data) -> None:
    """Whether all that can be asked of two data agrees."""
    assert isinstance(mapped.x, Mapped)
    index = torch.randperm(len(memory))[:11]
    for a, b in ((mapped, memory), (mapped.fixed(3), memory.fixed(3))):
        found, expected = (with_noise(data, index) for data in (a, b))
        torch.testing.assert_close(found, expected, equal_nan=True)
        torch.testing.assert_close(a.log_jacobians, b.log_jacobians)
        assert (a.missing, a.data_shape, a.levels, len(a)) == (
            b.missing,
            b.data_shape,
            b.levels,
            len(b),
        )
        assert a.x.dtype == b.x.dtype
        assert a.rows.equal(b.rows)
    assert mapped.digest() == memory.digest()
    assert mapped.missing_share == memory.missing_share


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    np.save(tmp_path / "x.npy", ARRAYS[kind])
    transform = {"real": "standardise", "gaps": "standardise", "grey": "dequantise"}
    options: dict[str, Any] = {"transform": transform.get(kind, "none"), "seed": 2}
    memory = load_data(tmp_path / "x.npy", **options)
    request.getfixturevalue("on_disk")
    mapped = load_data(tmp_path / "x.npy", **options)
    for part in ("train", "validation", "test"):
        same(getattr(mapped, part), getattr(memory, part))
    same(pickle.loads(pickle.dumps(mapped.train)), memory.train)


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["real", "counts", "grey"])
def test_rows_in_any_order_are_read_and_not_mapped(
    kind: str, order: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that is mapped counts as memory: 64 kB and more for a row of a few bytes."""
    monkeypatch.setattr(np.memmap, "__getitem__", None)
    values = ARRAYS[kind].astype(ARRAYS[kind].dtype.newbyteorder(">"), order=order)
    np.save(tmp_path / "x.npy", values)
    data = read_rows(tmp_path / "x.npy")
    assert data.levels == (256 if kind == "grey" else None)
    for at in ([7, 8, 9, 3, 52, 0, 1, 1], [5], []):
        found = data.x[torch.tensor(at, dtype=torch.int64)].numpy()
        np.testing.assert_array_equal(
            found.reshape(len(at), *values.shape[1:]), values[at].astype(found.dtype)
        )


@pytest.mark.usefixtures("on_disk")
def test_reads_that_return_less_than_was_asked_for_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of more than 2 GB does."""

    class Slow(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:5])

    np.save(tmp_path / "x.npy", ARRAYS["real"])
    rows = read_rows(tmp_path / "x.npy").x
    expected = rows[torch.arange(N)]
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Slow(path))
    assert rows[torch.arange(N)].equal(expected)


def test_a_parquet_file(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pandas = pytest.importorskip("pandas")
    colour = RANDOM.choice(["red", "green", None], N)
    columns = {"colour": colour, "size": RANDOM.normal(size=N), "Label": RANDOM.integers(0, 3, N)}
    pandas.DataFrame(columns).to_parquet(tmp_path / "t.parquet", row_group_size=11)
    memory = load_data(tmp_path / "t.parquet")
    request.getfixturevalue("on_disk")
    mapped = load_data(tmp_path / "t.parquet")
    assert mapped.train.schema == memory.train.schema
    assert mapped.train.labels is not None
    assert memory.train.labels is not None
    assert mapped.train.labels.equal(memory.train.labels)
    same(mapped.train, memory.train)
    kept = mapped.train.x.path  # type: ignore[union-attr]
    assert kept.exists()
    del mapped
    assert not kept.exists()


@pytest.mark.usefixtures("on_disk")
def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.where(np.arange(N * 3).reshape(N, 3) == 100, np.inf, 0.0))
    with pytest.raises(ValueError, match=r"infinite ones, the first in row 33 \(from 0\)"):
        read_rows(path)
    np.save(path, RANDOM.normal(size=(N, 3)))
    rows = read_rows(path)
    with path.open("rb+") as file:
        file.truncate(700)
    with pytest.raises(ValueError, match="cut or replaced"):
        rows.batch(torch.arange(5))
    np.save(path, RANDOM.normal(size=(N // 2, 3)))
    with pytest.raises(ValueError, match="got 26: it was cut"):
        rows.batch(torch.arange(N))
    np.save(path, np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match="expected a whole .npy file"):
        read_rows(path)
    for text in ("a,b\n1,\n", "no file"):
        (tmp_path / "t.parquet").write_text(text)
        with pytest.raises(ValueError, match="expected a table"):
            read_rows(tmp_path / "t.parquet")
