"""`fit`: the training of a VAE."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae import objectives
from pyro_vae.files import PathLike, locked
from pyro_vae.generators import forked
from pyro_vae.memory import keep_memory
from pyro_vae.objectives import ELBO, Objective
from pyro_vae.processes import threads
from pyro_vae.training.dataset import Dataset, as_dataset, describe
from pyro_vae.training.engine import Engine, Group, is_first_process
from pyro_vae.training.evaluation import Evaluator
from pyro_vae.training.optimizers import OptimizerSpec, ScheduleSpec
from pyro_vae.training.progress import Bar, Callback, History, make_bar
from pyro_vae.training.run_folder import Settings, check_run, load_state, read_run, start_run
from pyro_vae.training.step import worth_compiling
from pyro_vae.training.trainer import Trainer

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["fit"]

FALL = 10.0  # a warning is given if the ELBO falls by this times its first value


def fit(
    vae: nn.Module,
    data: Any,
    objective: Objective | str | None = None,
    *,
    run: PathLike | None = None,
    epochs: int = 20,
    batch_size: int = 100,
    optimizer: OptimizerSpec = "Adam",
    lr: float = 1e-3,
    schedule: ScheduleSpec | None = None,
    clip_norm: float | None = None,
    validation: Any = None,
    patience: int | None = None,
    devices: int | list[int] = 1,
    accelerator: str = "auto",
    precision: str = "32-true",
    compile: bool | None = None,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Any] = (),
    resume: bool = False,
    progress: bool = True,
    declaration: dict[str, Any] | None = None,
    checkpoint_every: int | None = None,
) -> History:
    r"""Trains a VAE, in place, by stochastic gradient ascent on an objective.

    .. math:: \max_{\theta, \phi} \; \frac1N \sum_{n=1}^N \mathcal L(x_n; \theta, \phi)

    A step takes a batch and makes one update; an epoch visits every row once, in an order that
    depends on `seed` and the epoch alone. The generators of torch are forked: training draws
    from `seed`, and leaves them, Pyro's parameter store, the validation flags, the device and
    the mode of `vae` as they were. With `validation` the best epoch's weights are put back at
    the end. A resumed run gives the weights of an unbroken one, bit for bit, on as many devices
    and threads. Small models train on one thread, others on as many as torch has.

    With several devices a process for each takes its share of every batch, in the order of one
    process; gradients are averaged over the batch, and all have the same weights. The result is
    that of one process but for the noise, which is each process's own, and for what looks at
    whole batches: batch norm, whose running statistics are those of the first process, and
    objectives such as BetaTC. The processes are started by `fit`, so that a script must call it
    under `if __name__ == "__main__":`, everything given must be picklable, and callbacks work on
    copies, in the first process; under torchrun those that it started are taken.

    Args:
        vae: A module with Pyro programs `model` and `guide`, all sites inside the plate "data";
            its `initialise(x)`, if any, sees up to 10,000 training rows before the first step.
        data: Rows [N, \*E] (a tensor, array, frame or list), a pair (x [N, \*E], y [N, C]) of
            them, or an object with `__len__`, `batch`, `fixed` and `to`, as the parts of
            `data.load_data`. Moved to the device once.
        objective: What is maximised, or the name of one without options, such as "BetaTC"; ELBO()
            if None.
        run: Folder for settings, metrics.csv and checkpoints; None keeps nothing.
        epochs: Passes over the data.
        batch_size: Rows of a step, on all devices together; the last batch of an epoch may be
            shorter.
        optimizer: A name in torch.optim, {"class_path": name, "init_args": {...}}, or a callable
            from parameters to an optimiser. The fused form is taken where there is one.
        lr: Learning rate, unless `optimizer` says otherwise.
        schedule: The like for torch.optim.lr_scheduler, stepped once an epoch.
        clip_norm: Largest norm of the whole gradient, or None.
        validation: Rows in the form of `data`, for the ELBO after each epoch, in eval mode.
        patience: Epochs without a better validation ELBO after which to stop, or None.
        devices: How many, or their indices ([3] or [0, 1]); processes where there is no GPU.
        accelerator: "cpu", "cuda" or "auto": CUDA where there is one.
        precision: "32-true", "bf16-mixed", "16-mixed" or "64-true"; evaluation is never mixed.
        compile: Whether to trace the step once through Pyro's handlers and compile it: 5 to 20
            seconds once, each step then faster. None: if 30,000 steps are planned and there is
            a compiler; a run that is resumed goes on as it began. The noise and, to rounding,
            the losses are those of the eager step. A shorter last batch runs eagerly, and so
            does a step that cannot be compiled, after a warning that says why.
        seed: Of the order and of all noise.
        callbacks: Each is called with a `State` after each epoch, before its checkpoint: what
            they change is kept with it, and an epoch that was broken off is shown again.
        loggers: Fabric loggers, given the metrics of each epoch.
        resume: Whether to go on from the last checkpoint in `run`, if there is one.
        progress: Whether to show a bar over all epochs, or a line for each without a terminal.
        declaration: What the vae was built from, for run.json; vae.declaration if None.
        checkpoint_every: Steps between checkpoints within an epoch, besides its end.

    Returns:
        The metrics of each epoch, in nats per datum.

    Raises:
        ValueError: If an argument does not fit, `run` holds a run that cannot be resumed, or
            another process trains in it.
        FloatingPointError: If a loss or gradient is not finite. The weights are those before
            the step on a CPU, or those before `fit` with several devices; a GPU is looked at
            twice a second and before each checkpoint, so that those stay good.

    Example:
        >>> vae = build(3, latent_dim=2, likelihood="Normal")
        >>> history = fit(vae, 5 * torch.randn(100, 3), epochs=3, progress=False)
        >>> len(history.rows)
        3

    Cost: a step is within a few per cent of a hand-written one; an epoch ends with one pass
    over the validation rows and a checkpoint of weights and optimiser state.
    """
    settings = Settings(
        epochs, batch_size, optimizer, lr, schedule, clip_norm, patience, precision, seed,
        checkpoint_every, bool(compile),
    )  # fmt: skip
    objective = _named(objective) if isinstance(objective, str) else objective
    objective = ELBO() if objective is None else objective
    _check(vae, objective, validation, patience, run, resume)
    missing = getattr(vae, "missing", True)  # programs of one's own may take NaN
    train = as_dataset(data, "data", missing)
    held_out = None if validation is None else as_dataset(validation, "validation", missing)
    if callable(check := getattr(vae, "check_labels", None)):
        for rows in (train, held_out):
            check(getattr(rows, "y", None))
    engine = Engine(accelerator, devices, precision, loggers)
    threads = engine.threads(vae, batch_size * objective.num_particles)
    settings, said = replace(settings, threads=threads), None
    if compile is None:
        steps = epochs * -(-len(train) // batch_size)
        choice = worth_compiling(steps, objective, precision, engine.on_cuda)
        choice = _recorded(run if resume else None).get("compile", choice)
        settings = replace(settings, compile=choice)
        how = "is compiled" if choice else "runs eagerly"
        said = f"compile: {steps} steps are planned, and the step {how}"
    if objective.batch_level and engine.size > 1:
        message = (
            f"{type(objective).__name__} looks at whole batches; on {engine.size} devices it sees "
            f"each one's share, {batch_size // engine.size} rows of {batch_size}"
        )
        warnings.warn(message, UserWarning, stacklevel=2)
    record: dict[str, Any] = {}
    if run is not None:
        record["declaration"] = declaration or getattr(vae, "declaration", None)
        record["training"] = settings.record(objective)
        record["data"] = {"train": describe(train), "validation": None}
        if held_out is not None:
            record["data"]["validation"] = describe(held_out)
        if is_first_process():
            check_run(run, record, resume)
            _say_threads(run, threads)
    task = Task(
        vae, objective, train, held_out, settings, run, record, resume, tuple(callbacks),
        progress, said,
    )  # fmt: skip
    result = engine.run(_train, task)
    if engine.spawns:
        _load_result(result, vae, objective, precision)
    for message in filter(None, (result.collapsed, result.fell)):
        warnings.warn(message, UserWarning, stacklevel=2)
    if result.moving:
        message = (
            f"training ended at step {result.step}, before the schedule of "
            f"{', '.join(result.moving)}: train for longer, or shorten the schedule"
        )
        warnings.warn(message, UserWarning, stacklevel=2)
    return result.history


@dataclass(frozen=True)
class Task:
    """What each process needs to train."""

    vae: nn.Module
    objective: Objective
    train: Dataset
    held_out: Dataset | None
    settings: Settings
    run: PathLike | None
    record: dict[str, Any]
    resume: bool
    callbacks: Sequence[Callback]
    progress: bool
    said: str | None = None  # whether the step is compiled, in words, where `fit` decided it


@dataclass(frozen=True)
class Result:
    """What training returns: its history, its warnings and the trained weights."""

    history: History
    step: int
    collapsed: str | None
    fell: str | None
    moving: list[str]
    vae: dict[str, Tensor]
    objective: dict[str, Tensor]


def _train(fabric: Fabric, group: Group, task: Task) -> Result:
    """Trains in one process; the first, which writes, locks the run folder."""
    writes = task.run is not None and group.rank == 0
    with locked(Path(task.run) / "lock") if writes else nullcontext():  # type: ignore[arg-type]
        return _train_locked(fabric, group, task)


def _train_locked(fabric: Fabric, group: Group, task: Task) -> Result:
    vae, objective, settings, run = task.vae, task.objective, task.settings, task.run
    first, device = group.rank == 0, fabric.device
    state = load_state(run) if run is not None and task.resume and first else None
    state = group.broadcast(state)
    keep_memory()
    with _borrowed(vae, objective, device, settings):
        train = task.train.to(device)
        held_out = None if task.held_out is None else task.held_out.to(device)
        evaluator = Evaluator(vae, train, held_out, settings.seed, group)
        trainer = Trainer(fabric, group, vae, objective, train, evaluator, settings, run)
        trainer.asked = task.said is None
        trainer.prepare(state)
        if run is not None and first:
            start_run(run, task.record)
        way = settings.epochs, settings.patience, trainer.num_batches
        with make_bar(task.progress and first, *way) as bar:
            if task.said is not None:
                bar.say(task.said)
            trainer.fit(bar, task.callbacks)
            collapsed = _report_units(trainer.history, evaluator, bar)
    moving = objective.unsettled(trainer.step)
    states = vae.state_dict(), objective.state_dict()
    fell = _fell(trainer.history, trainer.began)
    return Result(trainer.history, trainer.step, collapsed, fell, moving, *states)


def _named(name: str) -> Objective:
    """The objective of this name, with its usual options."""
    classes = {n: getattr(objectives, n) for n in objectives.__all__ if n != "Objective"}
    known = {n: cls for n, cls in classes.items() if issubclass(cls, Objective)}
    if name not in known:
        raise ValueError(f"objective {name!r} is unknown: choose one of {', '.join(known)}")
    return known[name]()


def _load_result(result: Result, vae: nn.Module, objective: Objective, precision: str) -> None:
    """Loads what other processes trained into the modules of this one."""
    if precision == "64-true":
        vae.double()
    vae.load_state_dict(result.vae)
    objective.load_state_dict(result.objective, strict=False)  # what it made itself stays there


def _check(
    vae: Any,
    objective: Any,
    validation: Any,
    patience: int | None,
    run: PathLike | None,
    resume: bool,
) -> None:
    if not isinstance(vae, nn.Module) or not all(
        callable(getattr(vae, name, None)) for name in ("model", "guide")
    ):
        raise ValueError(
            f"vae must be a torch module with methods model and guide; got {type(vae).__name__}"
        )
    if not isinstance(objective, Objective):
        raise ValueError(
            "objective must be one of pyro_vae.objectives, such as ELBO(); got "
            f"{type(objective).__name__}: for Pyro's own, use pyro.infer.SVI"
        )
    if patience is not None and validation is None:
        raise ValueError("patience needs validation data: give validation=, or no patience")
    if resume and run is None:
        raise ValueError("resume=True needs the folder of the run: give run=")


def _recorded(run: PathLike | None) -> dict[str, Any]:
    """The recorded settings of a run, empty before it has begun."""
    began = run is not None and (Path(run) / "run.json").exists()
    return {"compile": False, **(read_run(run)["training"] or {})} if began else {}  # type: ignore[arg-type]


def _say_threads(run: PathLike, threads: int) -> None:
    """Warns if a run is resumed on another number of threads, which changes rounding."""
    before = _recorded(run)
    if before.get("threads", threads) != threads:
        warnings.warn(
            f"{run} was trained on {before['threads']} threads and goes on with {threads}: its "
            "weights will differ, by rounding, from those of an unbroken run",
            UserWarning,
            stacklevel=3,
        )


@contextmanager
def _borrowed(
    vae: nn.Module, objective: nn.Module, device: torch.device, settings: Settings
) -> Iterator[None]:
    """Moves modules to the device, seeds generators, sets flags; restores all afterwards."""
    modules = (vae, objective)
    homes = [t.device if (t := _first_tensor(m)) is not None else device for m in modules]
    training = vae.training
    few = threads(settings.threads)
    with forked(device, settings.seed), pyro.validation_enabled(False), few:
        try:
            for module in modules:
                module.to(device)
            yield
        finally:
            for module, home in zip(modules, homes):
                module.to(home)
            vae.zero_grad()
            vae.train(training)


def _first_tensor(module: nn.Module) -> torch.Tensor | None:
    return next(chain(module.parameters(), module.buffers()), None)


def _fell(history: History, began: float | None) -> str | None:
    """A warning if training ended far below its first step, or None."""
    if began is None:
        return None
    elbo = history.final["validation_elbo"]
    ended = history.final["elbo"] if elbo is None else elbo
    if not ended < began - FALL * max(1.0, abs(began)):
        return None
    return (
        f"training ended at an ELBO of {ended:.3g} nats, far below the {began:.3g} of its first "
        "step: lower lr, or set clip_norm"
    )


def _report_units(history: History, evaluator: Evaluator, bar: Bar) -> str | None:
    """Prints how many units are active if not all are; returns a warning if a site has none."""
    active, total = history.active_units, history.num_units
    if active is None or active == total:
        return None
    sites = evaluator.active_by_site() or {}
    each = ", ".join(f"{name} {a} of {n}" for name, (a, n) in sites.items())
    bar.say(f"{active} of {total} latent units are active" + f" ({each})" * (len(sites) > 1))
    idle = [name for name, (a, _) in sites.items() if a == 0]
    if active and not idle:
        return None
    units = "" if active == 0 else f" of {' and '.join(idle)}"
    count = total if active == 0 else sum(sites[name][1] for name in idle)
    return (
        f"posterior collapse: none of the {count} latent units{units} varies with the data; try "
        "a weight of the KL that grows from 0, free bits, or another seed"
    )
