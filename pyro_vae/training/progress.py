"""What a training shows: its history, the state given to callbacks, its progress, warnings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

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
OPTIONAL = COLUMNS[8:]  # columns that are None where nothing was measured
MAX_FALL = 10.0  # a warning is given if the ELBO falls by this times its first value
Units = dict[str, tuple[int, int]]  # number of active and of all units, by latent site


@dataclass
class History:
    """The measurements of `fit`, one row per epoch; `history["elbo"]` is a column.

    The ELBO and its terms are means in nats per datum at beta = 1; "objective" is the mean of
    what was maximised. Training columns are running means over the epoch; validation columns are
    measured at its end.

    Attributes:
        rows: The values of each epoch by column name; None where nothing was measured.
        num_units: Number of latent units of all sites; None if a guide's distribution has no mean.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    num_units: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        if not self.rows:
            return "History(0 epochs)"
        names = ("elbo", "kl", "validation_elbo")
        values = [f"{n} {self.final[n]:.2f}" for n in names if self.final[n] is not None]
        text = f"weights of epoch {self.best_epoch or len(self)}: {', '.join(values)} nats"
        if self.active_units is not None:
            text += f"; {self.active_units} of {self.num_units} units active"
        return f"History({len(self)} epochs; {text})"

    def __getitem__(self, column: str) -> list[Any]:
        if column not in COLUMNS:
            raise ValueError(f"no column {column!r}: expected one of {', '.join(COLUMNS)}")
        return [row[column] for row in self.rows]

    @property
    def best_epoch(self) -> int | None:
        """The epoch (from 1) of the highest validation ELBO; None without validation."""
        elbos = [row["validation_elbo"] for row in self.rows]
        if not elbos or elbos[0] is None:
            return None
        finite = [e if e is not None and math.isfinite(e) else -math.inf for e in elbos]
        return 1 + finite.index(max(finite))

    @property
    def final(self) -> dict[str, Any]:
        """The row of the epoch whose weights `fit` keeps: the best if validated, else the last."""
        return self.rows[(self.best_epoch or len(self.rows)) - 1]

    @property
    def active_units(self) -> int | None:
        """Number of active latent units in the epoch that `fit` keeps; None if not measured."""
        return self.final["active_units"] if self.rows else None


@dataclass
class State:
    """The state of training at the end of an epoch, which callbacks are given.

    Attributes:
        epoch: Number of epochs done.
        step: Number of optimisation steps done.
        vae: The VAE with its current weights.
        metrics: The row of this epoch, as in `History.rows`.
    """

    epoch: int
    step: int
    vae: nn.Module = field(repr=False)
    metrics: dict[str, Any]
    stopped: bool = field(default=False, init=False, repr=False)

    def stop(self) -> None:
        """Ends training after this epoch."""
        self.stopped = True


Callback = Callable[[State], Any]


class Bar:
    """Shows one bar over all epochs in a terminal, and a line after each epoch elsewhere.

    The bar's time left is that of all epochs, though patience may end training sooner. In a
    notebook each line replaces the one before.
    """

    def __init__(self, shown: bool, epochs: int, patience: int | None, batches: int) -> None:
        from rich import progress
        from rich.console import Console

        console = Console()
        self.overwrites = console.is_jupyter
        self.prints_lines = shown and (self.overwrites or not console.is_terminal)
        self.epochs, self.patience, self.batches = epochs, patience, batches
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("{task.fields[metrics]}"),
        )
        hidden = self.prints_lines or not shown
        self.progress = progress.Progress(
            *columns, auto_refresh=False, expand=True, disable=hidden
        )
        self.task: Any = None
        self.validation_text = ""

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.progress.live.transient = kind is KeyboardInterrupt  # after ^C, erase the bar
        self.progress.stop()
        if self.prints_lines and self.overwrites:
            print(flush=True)

    def show(self, epoch: int, done: int, metrics: dict[str, float]) -> None:
        """Shows the epoch (from 1), the number of its batches done, and running means in nats."""
        done += (epoch - 1) * self.batches
        if self.task is None:  # not at 0 if training is resumed
            total = self.epochs * self.batches
            self.task = self.progress.add_task("", total=total, completed=done, metrics="")
        self.progress.update(
            self.task,
            description=f"epoch {epoch}/{self.epochs}",
            completed=done,
            metrics=f"ELBO {metrics['elbo']:.2f}{self.validation_text}",
            refresh=True,
        )

    def end(self, history: History) -> None:
        """Shows the measurements at an epoch's end, and the number of epochs since the best."""
        row, best = history.rows[-1], history.best_epoch
        if best is not None:
            last_elbo, best_elbo = row["validation_elbo"], history.final["validation_elbo"]
            waited = f" ({len(history) - best}/{self.patience})" if self.patience else ""
            self.validation_text = f"  validation {last_elbo:.2f}, best {best_elbo:.2f}{waited}"
        self.show(row["epoch"], self.batches, row)
        text = f"epoch {row['epoch']}/{self.epochs}  {row['seconds']:.1f} s"
        text += f"  ELBO {row['elbo']:.2f}  KL {row['kl']:.2f}{self.validation_text}"
        if self.prints_lines and self.overwrites:
            print(f"\r{text:<100}", end="", flush=True)
        elif self.prints_lines:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """Prints a line."""
        if self.prints_lines:
            print(f"\n{text}" if self.overwrites else text, flush=True)
        elif not self.progress.disable:
            self.progress.console.print(text)


def units_in_use(units: Units) -> str:
    """Returns a line on how many latent units are active, in all and for each of several sites."""
    active, total = map(sum, zip(*units.values()))
    by_site = ", ".join(f"{name} {a} of {n}" for name, (a, n) in units.items())
    by_site = f" ({by_site})" if len(units) > 1 else ""
    return f"{active} of {total} latent units are active{by_site}"


def warnings_at_the_end(
    history: History, first_elbo: float | None, units: Units, unsettled: list[str]
) -> list[str]:
    """Returns warnings on collapsed sites, a fallen ELBO, and schedules that had not ended.

    `first_elbo` is the ELBO of the first step; `unsettled` names the weights whose schedules had
    not ended.
    """
    messages = []
    if dead := [name for name, (active, _) in units.items() if active == 0]:
        where = "" if len(dead) == len(units) else f" of {' and '.join(dead)}"
        messages.append(
            f"posterior collapse: none of the {sum(units[name][1] for name in dead)} latent units"
            f"{where} varies with the data; try a weight of the KL that grows from 0, free bits, "
            "or another seed"
        )
    if first_elbo is not None:
        validated = history.final["validation_elbo"]
        elbo = history.final["elbo"] if validated is None else validated
        if elbo < first_elbo - MAX_FALL * max(1.0, abs(first_elbo)):
            messages.append(
                f"training ended at an ELBO of {elbo:.3g} nats, far below the {first_elbo:.3g} "
                "of its first step: lower lr, or set clip_norm"
            )
    if unsettled:
        messages.append(
            f"training ended at step {history.rows[-1]['step']}, before the schedule of "
            f"{', '.join(unsettled)}: train for longer, or shorten the schedule"
        )
    return messages
