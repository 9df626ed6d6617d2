"""The progress bar."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

__all__ = ["Bar", "make_bar"]

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
