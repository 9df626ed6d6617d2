"""What is seen of a training: its history, what callbacks are given, the progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["COLUMNS", "Bar", "Callback", "History", "State", "make_bar"]

COLUMNS = (
    "epoch",
    "step",
    "seconds",
    "lr",
    "elbo",
    "reconstruction",
    "kl",
    "objective",
    "validation_elbo",
    "validation_reconstruction",
    "validation_kl",
    "active_units",
)


@dataclass
class History:
    """What `fit` measured, a row per epoch; `history["elbo"]` is a column.

    All are means per datum in nats at beta = 1, but `objective`, which is what was maximised.
    Training columns are running means over the epoch, validation ones are taken at its end.

    Attributes:
        rows: By column name; None where nothing was measured.
        num_units: Latent units of all sites; None if the guide's distributions have no mean.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    num_units: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        if not self.rows:
            return "History(0 epochs)"
        names = ("elbo", "kl", "validation_elbo")
        shown = [f"{n} {self.final[n]:.2f}" for n in names if self.final[n] is not None]
        kept = f"weights of epoch {self.best_epoch or len(self)}: {', '.join(shown)} nats"
        if self.active_units is not None:
            kept += f"; {self.active_units} of {self.num_units} units active"
        return f"History({len(self)} epochs; {kept})"

    def __getitem__(self, column: str) -> list[Any]:
        if column not in COLUMNS:
            raise ValueError(f"no column {column!r}: expected one of {', '.join(COLUMNS)}")
        return [row[column] for row in self.rows]

    @property
    def best_epoch(self) -> int | None:
        """The epoch (from 1) of the highest validation ELBO, the first of equals, or None."""
        elbos = [_finite(row["validation_elbo"]) for row in self.rows]
        if not self.rows or self.rows[0]["validation_elbo"] is None:
            return None
        return 1 + max(range(len(elbos)), key=elbos.__getitem__)

    @property
    def final(self) -> dict[str, Any]:
        """The row of the weights that `fit` leaves: the best epoch's, else the last one's."""
        return self.rows[(self.best_epoch or len(self.rows)) - 1]

    @property
    def active_units(self) -> int | None:
        """Latent units in use in the weights that `fit` leaves, or None where not measured."""
        return self.final["active_units"] if self.rows else None


def _finite(elbo: float | None) -> float:
    return elbo if elbo is not None and math.isfinite(elbo) else -math.inf


@dataclass
class State:
    """Where training is, at the end of an epoch.

    Attributes:
        epoch: Epochs done.
        step: Optimisation steps done.
        vae: What is trained, with its weights at this moment.
        metrics: The row of this epoch, as in `History.rows`.
    """

    epoch: int
    step: int
    vae: nn.Module = field(repr=False)
    metrics: dict[str, Any]
    stopped: bool = field(default=False, init=False, repr=False)

    def stop(self) -> None:
        """Makes this epoch the last."""
        self.stopped = True


Callback = Callable[[State], Any]
SHOWN = ("ELBO", "KL", "reconstruction")


class Bar:
    """A bar that shows nothing; `make_bar` gives one that does."""

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def show(self, epoch: int, done: int, metrics: dict[str, float]) -> None:
        """Shows the epoch (from 1), batches done in it, and running means in nats."""

    def say(self, text: str) -> None:
        """Prints a line."""


class _RichBar(Bar):
    def __init__(self, epochs: int, batches: int) -> None:
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[metrics]}"),
        )
        self.epochs = epochs
        self.progress = progress.Progress(*columns, auto_refresh=False)
        self.task = self.progress.add_task("", total=batches, metrics="")
        self.stack = ExitStack()

    def __enter__(self) -> Bar:
        self.stack.enter_context(self.progress)
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def show(self, epoch: int, done: int, metrics: dict[str, float]) -> None:
        text = "  ".join(f"{name} {metrics[name.lower()]:.2f}" for name in SHOWN)
        self.progress.update(
            self.task,
            description=f"epoch {epoch}/{self.epochs}",
            completed=done,
            metrics=text,
            refresh=True,
        )

    def say(self, text: str) -> None:
        self.progress.console.print(text)


def make_bar(show: bool, epochs: int, batches: int) -> Bar:
    """A bar over the batches of each epoch."""
    return _RichBar(epochs, batches) if show else Bar()
