"""The three parts of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pyro_vae.data.data import Data
from pyro_vae.data.transforms import make_transform


@dataclass(frozen=True, eq=False)
class Splits:
    """The training, validation and test part of a data set, and how they were made.

    Args:
        train: The training part.
        validation: The validation part.
        test: The test part.
        name: The name of the data set, or the path of its file or folder.
        transform: The name of the transform.
        validation_rows: The number of rows of the validation part before the limit.
        seed: The seed of the split and of the noise of the rows.
        conditional: Whether the parts carry y.
        limit: The largest number of rows of a part, or None.
        even: Whether those rows are spread over the part, or its first ones.
    """

    train: Data
    validation: Data
    test: Data
    name: str
    transform: str = "none"
    validation_rows: int | None = None
    seed: int = 0
    conditional: bool = False
    limit: int | None = None
    even: bool = True

    def __repr__(self) -> str:
        rows = ", ".join(f"{n} {part}" for part, n in self.sizes.items())
        return f"Splits({self.name!r}, {rows} rows of {self.train.summary})"

    @property
    def sizes(self) -> dict[str, int]:
        """How many rows each part has."""
        return {part: len(getattr(self, part)) for part in ("train", "validation", "test")}

    @property
    def missing(self) -> bool:
        """Whether a value of some part is missing."""
        return any(part.missing for part in (self.train, self.validation, self.test))

    def with_transform(self, name: str) -> Splits:
        """The same rows under the transform called ``name``, fitted to the training part."""
        made = make_transform(name, self.train.x, self.train.levels)
        parts = {
            part: getattr(self, part).with_transform(made)
            for part in ("train", "validation", "test")
        }
        return replace(self, **parts, transform=name)

    def describe(self) -> dict[str, Any]:
        """What ``load_data`` needs to make the parts again, and their digests, for JSON.

        The data root is left out: it may differ between machines.
        """
        return {
            "name": self.name,
            "transform": self.transform,
            "validation": self.validation_rows,
            "seed": self.seed,
            "conditional": self.conditional,
            "limit": self.limit,
            "even": self.even,
            "digests": {
                "train": self.train.digest(),
                "validation": self.validation.digest(),
                "test": self.test.digest(),
            },
        }

    def check(self, description: Mapping[str, Any]) -> None:
        """Checks that these are the data of a run.

        Args:
            description: What ``describe`` gave at the run.

        Raises:
            ValueError: If the transform, the seed or a digest differs; the message names it.
        """
        now = self.describe()
        for key in ("transform", "seed"):
            if description[key] != now[key]:
                raise ValueError(
                    f"data changed since the run: {key} was {description[key]!r} and is "
                    f"{now[key]!r}; load the data with the {key} of the run"
                )
        for part, digest in now["digests"].items():
            if description["digests"][part] != digest:
                raise ValueError(
                    f"data changed since the run: the {part} part of {self.name!r} had digest "
                    f"{description['digests'][part][:12]}... and has {digest[:12]}...; "
                    "restore the files and options of the run"
                )
