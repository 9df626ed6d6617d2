"""`fit`: the training of a VAE."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pyro
import torch
from torch import nn

from pyro_vae.objectives import ELBO, Objective
from pyro_vae.training.callbacks import Callback
from pyro_vae.training.checkpoint import PathLike, load_state
from pyro_vae.training.engine import make_fabric
from pyro_vae.training.evaluation import Evaluator, forked
from pyro_vae.training.history import History
from pyro_vae.training.optimizers import OptimizerSpec, ScheduleSpec
from pyro_vae.training.progress import Bar, make_bar
from pyro_vae.training.rows import as_rows, describe
from pyro_vae.training.runs import check_run, start_run
from pyro_vae.training.settings import Settings
from pyro_vae.training.trainer import Trainer

__all__ = ["fit"]


def fit(
    vae: nn.Module,
    data: Any,
    objective: Objective | None = None,
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
    compile: bool = False,
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
    the end. A resumed run gives the weights of an unbroken one, bit for bit, on one device.

    Args:
        vae: A module with Pyro programs `model` and `guide`, all sites inside the plate "data";
            its `initialise(x)`, if any, sees up to 10,000 training rows before the first step.
        data: A tensor [N, \*E], a pair (x [N, \*E], y [N, C]), or an object with `__len__`,
            `batch`, `fixed` and `to`. Moved to the device once.
        objective: What is maximised; ELBO() if None.
        run: Folder for settings, metrics.csv and checkpoints; None keeps nothing.
        epochs: Passes over the data.
        batch_size: Rows of a step; the last batch of an epoch may be shorter.
        optimizer: A name in torch.optim, {"class_path": name, "init_args": {...}}, or a callable
            from parameters to an optimiser. The fused form is taken where there is one.
        lr: Learning rate, unless `optimizer` says otherwise.
        schedule: The like for torch.optim.lr_scheduler, stepped once an epoch.
        clip_norm: Largest norm of the whole gradient, or None.
        validation: Rows in the form of `data`, for the ELBO after each epoch, in eval mode.
        patience: Epochs without a better validation ELBO after which to stop, or None.
        devices: One, by number (1) or by index ([3]).
        accelerator: "cpu", "cuda" or "auto": CUDA where there is one.
        precision: "32-true", "bf16-mixed", "16-mixed" or "64-true"; evaluation is never mixed.
        compile: Not available yet.
        seed: Of the order and of all noise.
        callbacks: Each is called with a `State` after each epoch.
        loggers: Fabric loggers, given the metrics of each epoch.
        resume: Whether to go on from the last checkpoint in `run`, if there is one.
        progress: Whether to show a bar.
        declaration: What the vae was built from, for run.json; vae.declaration if None.
        checkpoint_every: Steps between checkpoints within an epoch, besides its end.

    Returns:
        The metrics of each epoch, in nats per datum.

    Raises:
        ValueError: If an argument does not fit, or `run` holds a run that cannot be resumed.
        FloatingPointError: If a loss or gradient is not finite. The weights are those before
            the step on a CPU; a GPU is looked at twice a second, and checkpoints stay good.
        NotImplementedError: For `compile`, or more than one device.

    Cost: a step is within a few per cent of a hand-written one; an epoch ends with one pass
    over the validation rows and a checkpoint of weights and optimiser state.
    """
    settings = Settings(
        epochs, batch_size, optimizer, lr, schedule, clip_norm, patience, precision, seed,
        checkpoint_every,
    )  # fmt: skip
    objective = ELBO() if objective is None else objective
    _check(vae, objective, compile, validation, patience, run, resume)
    train = as_rows(data, "data")
    held_out = None if validation is None else as_rows(validation, "validation")
    fabric = make_fabric(accelerator, devices, precision, loggers)
    record: dict[str, Any] = {}
    if run is not None:
        record["declaration"] = declaration or getattr(vae, "declaration", None)
        record["training"] = settings.record(objective)
        record["data"] = {"train": describe(train), "validation": None}
        if held_out is not None:
            record["data"]["validation"] = describe(held_out)
        check_run(run, record, resume)
    state = load_state(run) if run is not None and resume else None
    with _borrowed(vae, objective, fabric.device, seed):
        train = train.to(fabric.device)
        held_out = None if held_out is None else held_out.to(fabric.device)
        evaluator = Evaluator(vae, train, held_out, seed)
        trainer = Trainer(fabric, vae, objective, train, evaluator, settings, run)
        trainer.prepare(state)
        if run is not None:
            start_run(run, record)
        with make_bar(progress, epochs, trainer.num_batches) as bar:
            trainer.fit(bar, callbacks)
            collapsed = _report_units(trainer.history, bar)
    if collapsed:
        warnings.warn(collapsed, UserWarning, stacklevel=2)
    if moving := objective.unsettled(trainer.step):
        message = (
            f"training ended at step {trainer.step}, before the schedule of "
            f"{', '.join(moving)}: train for longer, or shorten the schedule"
        )
        warnings.warn(message, UserWarning, stacklevel=2)
    return trainer.history


def _check(
    vae: Any,
    objective: Any,
    compile: bool,
    validation: Any,
    patience: int | None,
    run: PathLike | None,
    resume: bool,
) -> None:
    if compile:
        raise NotImplementedError("compile=True is not available yet: leave it out")
    if not isinstance(vae, nn.Module) or not all(
        callable(getattr(vae, name, None)) for name in ("model", "guide")
    ):
        raise ValueError(
            f"vae must be a torch module with methods model and guide; got {type(vae).__name__}"
        )
    if not isinstance(objective, Objective):
        raise ValueError(
            "objective must be one of pyro_vae.objectives, such as ELBO(); got "
            f"{objective!r}: for Pyro's own, use pyro.infer.SVI"
        )
    if patience is not None and validation is None:
        raise ValueError("patience needs validation data: give validation=, or no patience")
    if resume and run is None:
        raise ValueError("resume=True needs the folder of the run: give run=")


@contextmanager
def _borrowed(
    vae: nn.Module, objective: nn.Module, device: torch.device, seed: int
) -> Iterator[None]:
    """The modules on the device, generators seeded, flags off; all is put back afterwards."""
    modules = (vae, objective)
    homes = [t.device if (t := _first_tensor(m)) is not None else device for m in modules]
    training = vae.training
    with forked(device, seed), pyro.validation_enabled(False):
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


def _report_units(history: History, bar: Bar) -> str | None:
    """Says how many latent units are active if not all are; the warning if none is."""
    active, total = history.active_units, history.num_units
    if active is None or active == total:
        return None
    if active == 0:
        return (
            f"posterior collapse: none of the {total} latent units varies with the data; try a "
            "weight of the KL that grows from 0, free bits, or another seed"
        )
    bar.say(f"{active} of {total} latent units are active")
    return None
