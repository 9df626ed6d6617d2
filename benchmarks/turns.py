"""Candidates of one benchmark, each in a process of its own, that train in turns.

A training loop of any library calls `tick` before each batch; when a turn's steps are done it
waits there until all others have had theirs. So nothing runs beside what is timed, a slow minute
of the machine falls on all alike, and a candidate is timed with everything that its loop does.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Done", "Turns", "compare"]


class Done(Exception):
    """Raised by `tick` when a candidate has had its last turn."""


class Turns:
    """Where a candidate's loop waits for its turn.

    Args:
        pipe: To the process that gives the turns.
        steps: Of a turn.
        warm: Steps before the first, for what is compiled or cached.
        clock: What tells the time in seconds.
    """

    def __init__(
        self,
        pipe: Connection,
        steps: int,
        warm: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pipe, self.steps, self.left, self.clock = pipe, steps, warm, clock
        self.began = clock()
        self.memory: float | None = None  # MB at the peak before the first step
        self.wait: Callable[[], Any] = lambda: None  # for a GPU, at the end of a turn

    def tick(self) -> None:
        """To be called before each step."""
        if self.memory is None:
            self.memory = peak_memory()
        if self.left == 0:
            self.wait()
            self.pipe.send(self.clock() - self.began)
            if not self.pipe.recv():
                raise Done
            self.left, self.began = self.steps, self.clock()
        self.left -= 1

    def __iter__(self) -> Iterator[None]:
        """Once for each step, after a tick, until the last turn."""
        with suppress(Done):
            while True:
                self.tick()
                yield

    def batches(self, count: int, size: int, device: str = "cpu") -> Iterator[Any]:
        """Positions of random batches of `count` rows, each after a tick, until the last turn."""
        import torch

        with suppress(Done):
            while True:
                for index in torch.randperm(count, device=device).split(size)[: count // size]:
                    self.tick()
                    yield index

    def fit(self, vae: Any, x: Any, objective: Any = None, **options: Any) -> None:
        """pyro_vae's `fit` of the rows x, with a tick before each batch of training."""
        from pyro_vae import fit
        from pyro_vae.objectives import ELBO
        from pyro_vae.training.dataset import TensorDataset

        turns = self

        class Waiting(TensorDataset):
            def to(self, device: Any) -> Any:
                return self

            def batch(self, index: Any) -> Any:
                if len(index) == options["batch_size"] and vae.training:
                    turns.tick()
                return super().batch(index)

        vae.initialised.fill_(True)  # start where the others start
        with suppress(Done):
            fit(vae, Waiting(x), objective or ELBO(), epochs=10_000, progress=False, **options)


Train = Callable[[Turns], Callable[[], float]]


@dataclass(frozen=True)
class Result:
    """What was seen of a candidate.

    Attributes:
        ms: Milliseconds a step, of each turn.
        loss: After training, nats per datum, for those that train.
        first: Seconds until its first turn.
        memory: MB at the peak, above that before the first step.
    """

    ms: list[float]
    loss: float
    first: float
    memory: float

    def ratio(self, base: Result) -> float:
        """Median over turns of the time by that of `base` in the same turn."""
        return statistics.median(a / b for a, b in zip(self.ms, base.ms))


def compare(
    candidates: Mapping[str, Train],
    *,
    turns: int,
    steps: int,
    warm: int,
    threads: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Result]:
    """Results by name; candidates must be functions that can be sent to a process."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name, train in candidates.items():
        pipes[name], child = context.Pipe()
        args = train, child, steps, warm, clock
        context.Process(target=_serve, args=args, daemon=True).start()
        child.close()  # so that a candidate that dies ends the benchmark
    first = {name: pipe.recv() for name, pipe in pipes.items()}
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(turns):
        for name, pipe in pipes.items():
            pipe.send(True)
            times[name].append(pipe.recv() / steps * 1e3)
    ends: dict[str, Sequence[Any]] = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        ends[name] = pipe.recv()
    return {
        name: Result(times[name], *ends[name][:1], first[name], ends[name][1]) for name in pipes
    }


def peak_memory() -> float:
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _serve(
    train: Train, pipe: Connection, steps: int, warm: int, clock: Callable[[], float]
) -> None:
    turns = Turns(pipe, steps, warm, clock)
    loss = train(turns)
    pipe.send((loss(), peak_memory() - (turns.memory or 0.0)))
