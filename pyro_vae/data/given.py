"""The parts that a source comes with."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_vae.data.data import Data


@dataclass(frozen=True, eq=False)
class Given:
    """The parts of a data set as its source has them, before any split.

    Args:
        train: The training rows, or all rows.
        validation: The validation part, where the source has one.
        test: The test part, where the source has one.

    Raises:
        ValueError: If the parts differ in the shape or grey levels of a datum or the width of y.
    """

    train: Data
    validation: Data | None = None
    test: Data | None = None

    def __post_init__(self) -> None:
        for part in (self.validation, self.test):
            if part is not None:
                self._check(part)

    def _check(self, part: Data) -> None:
        if _kind(part) != _kind(self.train):
            raise ValueError(
                f"expected parts of one kind, got {self.train.name} with {_kind(self.train)} and "
                f"{part.name} with {_kind(part)}; make them alike"
            )


def _kind(part: Data) -> str:
    width = "no" if part.y is None else part.y.shape[1]
    levels = "no" if part.levels is None else part.levels
    return f"data of shape {list(part.data_shape)}, {levels} grey levels and {width} columns of y"
