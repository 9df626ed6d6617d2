"""Rows of data with the transform between the file and the model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_vae.arguments import as_tensor, check_finite, check_whole, digest_of
from pyro_vae.data.mapped import CHUNK, Mapped
from pyro_vae.data.schema import Schema, column_mismatch
from pyro_vae.data.transforms import Identity, Threshold, Transform, declare

MAX_CLASSES = 1_000_000  # labels must be below this
UNIT_RATIO = 10.0  # ratio of largest values above which two data sets seem to have different units


@dataclass(frozen=True, eq=False)
class Data:
    """N rows of original values, as in their file, with the transform to model values.

    Args:
        x: The original values, [N, *E], in any dtype: uint8 for images, (C, H, W) each. Arrays,
            frames and lists are accepted too, also for y and labels. NaN is a missing value.
            The rows of a large file stay on disk (`Mapped`): a batch is read when it is needed,
            and values are checked when the file is opened.
        y: The values that a model is conditioned on, float [N, C], or None.
        labels: The class of each row, int64 [N] from 0, or -1 where unknown; or None.
        transform: The map from original values to model values.
        rows: The id of each row, int64 [N], on which its noise depends; 0, ..., N - 1 if None.
        levels: The number of grey levels, for values 0, ..., levels - 1; None for other data.
        name: What the error messages call these rows.
        seed: The seed of the noise; the noise of a row depends on it and on the row's id.
        classes: The number of classes; the largest label plus 1 if None.
        columns: The names of the columns, for tables [N, D] that have them.
        schema: What these columns hold, for tables that `read_table` reads.
        applied: Whether x holds model values already, as after ``fixed``.
        class_names: The names that the file gives to the classes 0, 1, ..., or None.

    Raises:
        ValueError: If there is no row, lengths or the number of columns differ, a value is
            infinite (or one of y NaN), or a grey value or a label is out of its range.
    """

    x: Tensor | Mapped
    y: Tensor | None = None
    labels: Tensor | None = None
    transform: Transform = field(default_factory=Identity)
    rows: Tensor = None  # type: ignore[assignment]
    levels: int | None = None
    name: str = ""
    seed: int = 0
    classes: int | None = None
    columns: tuple[str, ...] | None = None
    schema: Schema | None = None
    applied: bool = False
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, ndim in (("x", 0), ("y", 2), ("labels", 1), ("rows", 1)):
            part = getattr(self, name)
            if part is None or isinstance(part, Mapped):
                continue
            part = as_tensor(f"{self._title}: {name}", part)
            object.__setattr__(self, name, part)
            if ndim and (part.ndim != ndim or len(part) != len(self.x)):
                raise ValueError(
                    f"{self._title}: expected {name} of {ndim} dimension(s) with one row for each "
                    f"of the {len(self.x)} rows of x, got shape {list(part.shape)}"
                )
        if self.x.ndim < 2 or 0 in self.x.shape:
            raise ValueError(
                f"{self._title}: expected x of shape [N, *E] with at least 1 row and 1 value "
                f"each, got {list(self.x.shape)}"
            )
        if self.rows is None:
            rows = self.x.index if isinstance(self.x, Mapped) else torch.arange(len(self.x))
            object.__setattr__(self, "rows", rows.to(self.x.device))
        if self.columns is not None and (len(self.columns),) != tuple(self.data_shape):
            raise ValueError(
                f"{self._title}: expected one name for each of the {self.data_shape.numel()} "
                f"columns; got {len(self.columns)}"
            )
        self._check_values()
        check_whole(0, seed=self.seed)

    def __repr__(self) -> str:
        name = [repr(self.name)] if self.name else []
        return f"Data({', '.join([*name, f'{len(self)} rows of {self.summary}'])})"

    @property
    def summary(self) -> str:
        """A description of the rows in words."""
        parts = [f"shape {tuple(self.data_shape)}"]
        parts += [] if self.levels is None else [f"{self.levels} levels"]
        parts += [] if self.classes is None else [f"{self.classes} classes"]
        parts += [] if self.y is None else [f"y of {self.y.shape[1]}"]
        done = ", applied" if self.applied else ""
        return ", ".join([*parts, f"transform {type(self.transform).__name__}{done}"])

    @property
    def _title(self) -> str:
        return f"data {self.name!r}" if self.name else "data"

    def _check_values(self) -> None:
        if isinstance(self.x, Tensor):  # rows on disk were checked when the file was opened
            check_finite(f"{self._title}: x", self.x, missing=True)
        if self.y is not None:
            check_finite(f"{self._title}: y", self.y)
        if self.levels is not None and not self.applied and isinstance(self.x, Tensor):
            good = (self.x >= 0) & (self.x <= self.levels - 1)
            self._check(good, f"grey values from 0 to {self.levels - 1}", "others")
        if (labels := self.labels) is None:
            return
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"{self._title}: expected labels that are integers, got "
                f"{str(labels.dtype)[6:]}; give labels.long()"
            )
        self._check(labels >= -1, "labels from 0, or -1 where unknown", "negative ones")
        self._check(labels < MAX_CLASSES, f"labels below {MAX_CLASSES}", "others")
        classes = int(labels.max()) + 1 if self.classes is None else self.classes
        object.__setattr__(self, "classes", classes)
        self._check(labels < classes, f"labels below {classes}, the number of classes", "others")

    def _check(self, good: Tensor, expected: str, got: str) -> None:
        bad = (~good).flatten(1).any(1) if good.ndim > 1 else ~good
        if bad.any():
            raise ValueError(
                f"{self._title}: expected {expected}, got {got} in {int(bad.sum())} row(s), the "
                f"first one row {int(bad.nonzero()[0])} (from 0); repair or remove them"
            )

    def __len__(self) -> int:
        return len(self.x)

    @property
    def data_shape(self) -> torch.Size:
        """The shape E of one datum."""
        return self.x.shape[1:]

    @property
    def missing(self) -> bool:
        """Whether any value is missing."""
        return self.missing_share > 0

    @cached_property
    def missing_share(self) -> float:
        """The share of the values that are missing."""
        parts = () if isinstance(self.x, Mapped) and not self.x.has_nan else self.x.split(CHUNK)
        return sum(int(x.isnan().sum()) for x in parts) / self.x.shape.numel()

    @cached_property
    def extremes(self) -> tuple[float, float]:
        """The lowest and the highest value that is not missing; (0, 0) if all are missing."""
        if isinstance(self.x, Mapped):
            return self.x.extremes
        values = self.x[~self.x.isnan()] if self.x.is_floating_point() else self.x
        return (values.min().item(), values.max().item()) if len(values) else (0.0, 0.0)

    @property
    def log_jacobian(self) -> float:
        """The mean over rows of the transform's log-Jacobian, in nats per datum."""
        return self.log_jacobians.mean().item()

    @property
    def log_jacobians(self) -> Tensor:
        """The transform's log-Jacobian at the observed values of each row [N], in nats."""
        if not self.missing:
            constant = self.transform.log_jacobian(self.data_shape)
            return torch.full((len(self),), constant, dtype=torch.float64)
        slope = torch.as_tensor(self.transform.log_slope(), dtype=torch.float64)
        parts = (torch.where(x.isnan().cpu(), 0.0, slope) for x in self.x.split(CHUNK))
        return torch.cat([part.flatten(1).sum(1) for part in parts])

    def bits_per_dim(self, log_prob: Tensor) -> Tensor:
        r"""Returns bits per dimension in original units, :math:`-(\log p(T(x)) + J) / (D \log 2)`.

        Args:
            log_prob: The model's log density of the transformed data, nats per datum, any shape.

        Returns:
            The bits per dimension, in the same shape; J is ``log_jacobian``, and D is the mean
            number of observed values of a row.
        """
        dimensions = self.data_shape.numel() * (1 - self.missing_share)
        return -(log_prob + self.log_jacobian) / (dimensions * math.log(2))

    def batch(self, index: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns the model values of a batch of rows, on the device of the data.

        A transform that redraws its noise at each visit takes it from torch's generator of that
        device; under other noisy transforms a row keeps the noise that ``fixed`` gives it.

        Args:
            index: The positions of the rows, int64 [B]; all if None.

        Returns:
            x, float32 [B, *E], and y, [B, C] or None.
        """
        index = torch.arange(len(self)) if index is None else index
        noisy = self.transform.noisy and not self.applied
        if noisy and not self.transform.fresh:
            return self._fixed_rows.batch(index)
        index = index.to(self.x.device)
        x, y = self.x[index], None if self.y is None else self.y[index]
        u = torch.rand(x.shape, device=x.device) if noisy else None
        return x.float() if self.applied else self.transform(x, u), y

    @cached_property
    def _fixed_rows(self) -> Data:
        return self.fixed(self.seed)

    def fixed(self, seed: int | None = None) -> Data:
        """Returns the rows transformed once, for evaluation.

        The noise of a row depends on the seed and the row's id only.

        Args:
            seed: The seed of the noise; the data's own seed if None.

        Returns:
            Data that holds the model values, float32, or uint8 where they are binary.
        """
        seed = self.seed if seed is None else seed
        check_whole(0, seed=seed)
        if self.applied:
            return self.unchecked(seed=seed)
        dtype = torch.uint8 if self.transform.binary else torch.float32
        change = partial(self.transform.fixed, seed=seed)
        x: Tensor | Mapped
        if isinstance(self.x, Mapped):
            x = replace(self.x, change=change, dtype=dtype)
        else:
            x = torch.cat(list(map(change, self.x.split(CHUNK), self.rows.split(CHUNK))))
            check_finite(f"{self._title}: x", x, missing=True)
        return self.unchecked(x=x, applied=True, seed=seed)

    def with_transform(self, transform: Transform) -> Data:
        """Returns the same rows with another transform.

        Raises:
            ValueError: If these rows came from ``fixed``, which keeps no original values.
        """
        if isinstance(transform, str):
            raise ValueError(
                f"{self._title}: expected a Transform, got {transform!r}; a name goes to "
                "with_transform of the Splits, which fits it to the training part"
            )
        if self.applied:
            raise ValueError(
                f"{self._title}: expected original values, got the model values that fixed() "
                "keeps; choose the transform before fixed()"
            )
        return self.unchecked(transform=transform)

    def one_hot(self) -> Data:
        """Returns the rows with y = their one-hot labels, float32 [N, classes]; 0 where unknown.

        Raises:
            ValueError: If the rows have no labels.
        """
        if self.labels is None or self.classes is None:
            raise ValueError(
                f"{self._title}: expected labels to condition on, got none; give labels or y"
            )
        known = one_hot(self.labels.clamp(min=0), self.classes).float()
        return self.unchecked(y=known * (self.labels >= 0).unsqueeze(1))

    def subset(self, index: Tensor) -> Data:
        """Returns the rows at positions `index`, int64 [M]; they keep their ids and noise."""
        parts = {
            name: part.rows(index) if isinstance(part, Mapped) else part[index.to(part.device)]
            for name, part in self._parts.items()
        }
        if len(parts["x"]) < 1:
            raise ValueError(f"{self._title}: expected a subset of at least 1 row, got none")
        return self.unchecked(**parts)

    def to(self, device: torch.device | str) -> Data:
        """Returns the same rows on a device."""
        return self.unchecked(**{name: part.to(device) for name, part in self._parts.items()})

    @property
    def _parts(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in ("x", "y", "labels", "rows")}
        return {name: part for name, part in parts.items() if part is not None}

    def unchecked(self, **changes: Any) -> Data:
        """Returns these rows with some fields changed, without any check of the values."""
        data = object.__new__(Data)
        data.__dict__.update({f.name: getattr(self, f.name) for f in fields(self)} | changes)
        return data

    def describe(self) -> dict[str, Any]:
        """Returns the name, seed and transform of the rows, for JSON."""
        return {"name": self.name, "seed": self.seed, "transform": declare(self.transform)}

    def digest(self) -> str:
        """Returns the SHA-256, in hex, of the dtype, shape and bytes of the current x and y."""
        return digest_of(self.x, self.y)


def kind_of(rows: Data) -> dict[str, Any]:
    """Returns what other rows must have in common with these to fit the same model, for JSON."""
    return {
        "levels": rows.levels,
        "columns": None if rows.columns is None else list(rows.columns),
        **({} if rows.schema is None else {"schema": rows.schema.plain}),
        "dtype": str(rows.x.dtype).removeprefix("torch."),
        "range": list(rows.extremes),
    }


def alike(
    rows: Data, known: Mapping[str, Any], transform: Transform, data_shape: tuple[int, ...]
) -> Data:
    """Returns rows with the columns and grey levels of a run; warns if their units seem different.

    Args:
        rows: Rows of a user's file.
        known: The result of `kind_of` for the training rows; empty for runs of version 0.1.
        transform: The transform of the run.
        data_shape: The shape of one datum of the run.

    Raises:
        ValueError: If columns are missing or unknown, the shape differs, or the values are not
            grey values where those of the run are, or the other way round.
    """
    rows = _ordered(rows, known.get("columns"))
    if tuple(rows.data_shape) != data_shape:
        raise ValueError(
            f"{rows.name} has rows of shape {tuple(rows.data_shape)}; the run was trained on "
            f"{data_shape}: give data of the same columns or image size"
        )
    top = transform.top + 1 if isinstance(transform, Threshold) else None
    levels = known.get("levels") if known else top or getattr(transform, "levels", None)
    if levels is not None:
        return rows if rows.levels == levels else _as_grey(rows, int(levels))
    if not known:
        return rows
    low, high = known["range"]
    if rows.levels is not None and known["dtype"].startswith("float"):
        raise ValueError(
            f"{rows.name}: expected numbers in the units that the run was trained on, "
            f"from {low:g} to {high:g}; got grey values ({rows.x.dtype}): store them as "
            "floats in these units"
        )
    largest, usual = (max(map(abs, ends)) for ends in (rows.extremes, (low, high)))
    differs = largest > UNIT_RATIO * usual or UNIT_RATIO * largest < usual
    if differs and rows.schema is None and rows.missing_share < 1:
        message = (
            f"{rows.name}: values reach {largest:g}, those that the run was trained on {usual:g}: "
            "are they in the same units?"
        )
        warnings.warn(message, UserWarning, stacklevel=2)
    return rows.unchecked(levels=None)


def _ordered(rows: Data, columns: list[str] | None) -> Data:
    """Returns the rows with their columns in the order of `columns`, if both have names."""
    if columns is None or rows.columns is None or list(rows.columns) == columns:
        return rows
    words = column_mismatch(columns, rows.columns)
    if words or len(set(columns)) < len(columns):
        raise ValueError(
            f"{rows.name}: expected the columns of the run, got others ({words or 'one twice'}): "
            "give the file the columns that the run was trained on"
        )
    order = torch.tensor([rows.columns.index(name) for name in columns])
    x = rows.x.columns(order) if isinstance(rows.x, Mapped) else rows.x[:, order]
    return rows.unchecked(x=x, columns=tuple(columns))


def _as_grey(rows: Data, levels: int) -> Data:
    """Returns the rows as grey values of `levels` levels; raises ValueError if they are not."""
    low, high = rows.extremes
    whole = not rows.x.is_floating_point() and (rows.levels != 2 or levels == 2)
    if not whole or low < 0 or high > levels - 1:
        raise ValueError(
            f"{rows.name}: expected whole grey values from 0 to {levels - 1}, as those that the "
            f"run was trained on; got {rows.x.dtype} from {low:g} to {high:g}: store them as "
            "uint8, not divided"
        )
    return rows.unchecked(levels=levels)


Parts = dict[str, Data]
"""Rows of a source by part: "train" (or all), and "validation" and "test" if it has them."""
