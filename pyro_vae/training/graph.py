"""A whole update as one CUDA graph: what a GPU does in it is recorded once, and replayed."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["CapturedUpdate", "Recorder", "has_graphs"]


WAITS = "called a synchronizing CUDA operation"  # as torch says it


def has_graphs(device: torch.device) -> bool:
    """Whether CUDA graphs can be made on a device."""
    return device.type == "cuda"


class Recorder:
    """Makes updates on a GPU: two as they are, the later ones as a CUDA graph.

    At the first, what is made at first use is made, and its kernels are tuned; at the second
    torch watches for what waits for the device, which no graph can hold.

    Args:
        why_not: What stands against a graph, or None.
    """

    def __init__(self, why_not: str | None = None) -> None:
        self.why_not = why_not
        self.launched = 0
        self.graph: CapturedUpdate | None = None

    def __call__(self, update: Callable[..., None], *batch: Tensor) -> None:
        """Makes an update of a batch; all are one function, of batches of the same shapes."""
        if self.graph is None and self.launched >= 2 and self.why_not is None:
            self.graph = CapturedUpdate(update, *batch)
        if self.graph is not None:
            self.graph(*batch)
            return
        self.launched += 1
        if self.launched == 2:
            self._watched(update, *batch)
        else:
            update(*batch)

    def forget(self) -> None:
        """To be called when a number that is no tensor changed, or a tensor moved."""
        self.graph = None

    def _watched(self, update: Callable[..., None], *batch: Tensor) -> None:
        with _waits() as waits:
            update(*batch)
        if waits and self.why_not is None:
            self.why_not = "it waits for the GPU"
        if self.why_not is not None:
            message = f"compile: no CUDA graph holds the step, for {self.why_not}"
            warnings.warn(message, stacklevel=2)


class CapturedUpdate:
    """An update of tensors that stay where they are, without the Python between its kernels.

    Recording does not run it. A replay does to the device's memory what the update did: it takes
    all numbers that are no tensors, such as a learning rate, as they were then. Noise comes from
    torch's generator of the device, in the order and as much as without a graph.

    Args:
        update: Changes tensors in place, of a batch of tensors. Has run before, so that what is
            made at the first use is there, and without waiting for the device.
        batch: Of the shapes of all later ones.

    Raises:
        RuntimeError: If the update cannot be recorded; the generators are then of no more use.
    """

    def __init__(self, update: Callable[..., None], *batch: Tensor) -> None:
        self.batch = [part.clone() for part in batch]  # for a batch may be a view of the data
        self.graph = torch.cuda.CUDAGraph()
        device = batch[0].device
        collects = gc.isenabled()
        gc.disable()  # what it would free may be the device's, of which recording knows nothing
        try:
            # a stream of this device, for torch keeps one of its own for whichever came first;
            # thread_local: what other threads do with the device is not our affair
            with (
                torch.cuda.device(device),
                torch.cuda.graph(
                    self.graph,
                    stream=torch.cuda.Stream(device),
                    capture_error_mode="thread_local",
                ),
            ):
                update(*self.batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            text = " ".join(str(error).strip().splitlines()[:1])
            raise RuntimeError(
                f"the training step cannot be recorded as a CUDA graph ({text}): train without "
                "compile"
            ) from error
        finally:
            if collects:
                gc.enable()

    def __call__(self, *batch: Tensor) -> None:
        """The update of this batch."""
        for mine, part in zip(self.batch, batch, strict=True):
            mine.copy_(part)
        self.graph.replay()


@contextmanager
def _waits() -> Iterator[list[Any]]:
    """Lists the operations inside that make the host wait for a GPU, as torch sees them."""
    before = torch.cuda.get_sync_debug_mode()
    waits: list[Any] = []
    caught: list[Any] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # warns that it does not see all of them
            caught.clear()
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if WAITS in str(warning.message):
            waits.append(warning)
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
