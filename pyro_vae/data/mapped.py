"""Rows that stay on disk, and are read when they are needed."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from pyro_vae.files import parsing

LARGE = 2**26  # bytes of a file above which its rows stay on disk
CHUNK = 1_000  # rows read at once where all rows are read


class Folder:
    """A temporary folder that lasts as long as this object."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="pyro_vae_"))
        finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class Mapped:
    """N rows [N, *E] of an .npy file, with those methods of a tensor that `Data` needs.

    `x[index]` reads a tensor from the file. No row is kept in memory, and the file is not
    memory-mapped: if it is cut meanwhile this raises an error, and does not end the process.

    Attributes:
        path: The file.
        index: Positions of the rows in the file, int64 [N], which are their ids.
        shape: (N, *E).
        dtype: Type of the tensors.
        convert: Function from an array of rows to a tensor.
        extremes: Lowest and highest value in the file; (0, 0) if all values are missing.
        has_nan: Whether any value of the file is missing.
        device: Device of the tensors.
        change: Function from rows and their ids to the rows returned in their place, or None.
        folder: Temporary folder of a file that this library wrote, removed with the last
            object that holds it; None for other files.
    """

    path: Path
    index: Tensor
    shape: torch.Size
    dtype: torch.dtype
    convert: Callable[[np.ndarray], Tensor]
    extremes: tuple[float, float]
    has_nan: bool
    device: torch.device = torch.device("cpu")
    change: Callable[[Tensor, Tensor], Tensor] | None = None
    folder: Folder | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "folder": None}

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def is_floating_point(self) -> bool:
        """Returns whether values are floating point."""
        return self.dtype.is_floating_point

    def __getitem__(self, at: Any) -> Tensor:
        """Reads the rows at these positions."""
        index = self.index[at.cpu() if isinstance(at, Tensor) else at]
        ids = index.reshape(-1)
        rows = self.convert(_read_rows(self.path, ids.numpy()))
        rows = (rows if self.change is None else self.change(rows, ids)).to(self.device)
        return rows if index.ndim else rows[0]

    def split(self, size: int) -> Iterator[Tensor]:
        """Reads all rows, `size` at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def rows(self, at: Tensor) -> Mapped:
        """Returns the rows at these positions, still on disk."""
        index = self.index[at.cpu()]
        return replace(self, index=index, shape=torch.Size((len(index), *self.shape[1:])))

    def columns(self, order: Tensor) -> Mapped:
        """Returns rows [N, C] with their columns in another order."""
        return replace(self, convert=partial(_ordered, self.convert, order))

    def to(self, device: torch.device | str) -> Mapped:
        """Returns the same rows, whose tensors will be on a device."""
        return replace(self, device=torch.device(device))


def mapped(
    path: Path,
    convert: Callable[[np.ndarray], Tensor],
    name: str,
    folder: Folder | None = None,
) -> Mapped:
    """Returns all rows of an .npy file as a `Mapped`, after a check of their values.

    A file that is stored column by column is first written row by row to a temporary one.

    Args:
        path: The file.
        convert: Function from an array of rows to a tensor [N, *E].
        name: What error messages call the file.
        folder: The temporary folder of the file, if this library wrote it.

    Raises:
        ValueError: If the file cannot be read or holds no rows, or a value is infinite.
    """
    if not (rows := _open_npy(path)).flags.c_contiguous:
        folder = Folder()
        path = _write_npy(folder, _to_row_major(path, rows), rows.shape)
    number, low, high, has_nan = len(rows), math.inf, -math.inf, False
    for start in range(0, number, CHUNK):
        part = convert(_read_rows(path, np.arange(start, min(start + CHUNK, number))))
        if not math.isfinite(sum(ends := _min_max(part))):
            if bool((bad := part.isinf().flatten(1).any(1)).any()):
                raise ValueError(
                    f"data {name!r}: expected finite values in x, got infinite ones, the first in "
                    f"row {start + int(bad.nonzero()[0])} (from 0); repair or remove them"
                )
            has_nan, ends = True, _min_max(part[~part.isnan()])
        low, high = min(low, ends[0]), max(high, ends[1])
    extremes = (low, high) if low <= high else (0.0, 0.0)
    shape = torch.Size((number, *part.shape[1:]))
    index = torch.arange(number)
    return Mapped(path, index, shape, part.dtype, convert, extremes, has_nan, folder=folder)


def _ordered(convert: Callable[[np.ndarray], Tensor], order: Tensor, rows: np.ndarray) -> Tensor:
    return convert(rows)[:, order]


def _min_max(part: Tensor) -> tuple[float, float]:
    """Returns the lowest and highest value, NaN if one is NaN; (inf, -inf) if there is none."""
    if not part.numel():
        return math.inf, -math.inf
    low, high = part.aminmax()
    return low.item(), high.item()


def spooled(parts: Iterable[Tensor], rows: int, columns: int, name: str) -> Mapped:
    """Writes rows, float32 [N, C], that come in parts to a temporary file; returns a `Mapped`."""
    folder = Folder()
    arrays = (part.numpy().astype("<f4") for part in parts)
    path = _write_npy(folder, arrays, (rows, columns))
    return mapped(path, torch.from_numpy, name, folder)


def _write_npy(folder: Folder, parts: Iterable[np.ndarray], shape: Sequence[int]) -> Path:
    """Writes rows that come in parts to an .npy file in a temporary folder; returns its path."""
    path = folder.path / "rows.npy"
    with path.open("wb") as file:
        file.writelines(npy(parts, shape))
    return path


def _to_row_major(path: Path, rows: np.memmap) -> Iterator[np.ndarray]:
    """Yields the rows, in parts, of a file that is stored column by column."""
    number, item = len(rows), rows.dtype.itemsize
    for start in range(0, number, CHUNK):
        columns = np.empty((rows.size // number, min(CHUNK, number - start)), rows.dtype)
        first, end = rows.offset + start * item, rows.offset + rows.nbytes
        _read_at(path, number, range(first, end, number * item), columns)
        yield columns.T.reshape(-1, *rows.shape[1:], order="F")


def npy(parts: Iterable[np.ndarray], shape: Sequence[int]) -> Iterator[bytes]:
    """Yields the content of an .npy file of rows that come in parts."""
    for number, part in enumerate(parts):
        if number == 0:
            head = io.BytesIO()
            fields = {"descr": part.dtype.str, "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(head, fields)
            yield head.getvalue()
        yield part.tobytes()


def _open_npy(path: Path) -> np.memmap:
    remedy = "if it was cut or replaced while it was read, write it again"
    with parsing(path, "a whole .npy file of numbers", remedy):
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(rows, np.memmap) or rows.ndim < 1 or len(rows) < 1:
        raise ValueError(f"{path}: expected one array with a row for each datum, got none")
    return rows


def _read_rows(path: Path, at: np.ndarray) -> np.ndarray:
    """Reads the rows of a file at `at`; pages of a memory map would count as memory in use."""
    rows = _open_npy(path)
    size = rows.dtype.itemsize * math.prod(rows.shape[1:])
    buffer = np.empty((len(at), size), np.uint8)
    starts = np.flatnonzero(np.diff(at, prepend=at[:1] - 2) != 1)  # of consecutive rows
    ends, offsets = np.append(starts[1:], len(at)), at[starts] * size + rows.offset
    parts = (buffer[start:end] for start, end in zip(starts.tolist(), ends.tolist()))
    _read_at(path, len(rows), offsets.tolist(), parts)
    return buffer.view(rows.dtype).reshape(len(at), *rows.shape[1:])


def _read_at(path: Path, number: int, offsets: Iterable[int], out: Iterable[np.ndarray]) -> None:
    """Fills each array with the bytes at its place in a file, which has `number` rows."""
    with io.BufferedReader(path.open("rb", buffering=0)) as file:  # continues reads cut at 2 GB
        for offset, part in zip(offsets, out):
            file.seek(offset)
            if file.readinto(part.reshape(-1).view(np.uint8).data) < part.nbytes:
                raise ValueError(
                    f"{path}: expected the rows that it had before, got {number}: it was cut or "
                    "replaced while it was read; write it again"
                )
