"""`fit`: the training of a VAE."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_vae import objectives
from pyro_vae.arguments import as_plain
from pyro_vae.files import PathLike
from pyro_vae.objectives import Objective
from pyro_vae.processes import Engine, is_first_process
from pyro_vae.training.dataset import TensorDataset, as_dataset
from pyro_vae.training.optimizers import OptimizerSpec, ScheduleSpec
from pyro_vae.training.progress import Callback, History
from pyro_vae.training.run_folder import Settings, check_same, earlier_run, make_record
from pyro_vae.training.step import Compile, choose_compile
from pyro_vae.training.trainer import Trainer


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
    compile: Compile | None = None,
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
    depends on `seed` and the epoch alone. All random numbers are drawn from `seed`: training
    leaves torch's generators as they were, as well as Pyro's parameter store, its validation
    flag, and the device and mode of `vae`. With `validation` the weights of the best epoch are
    loaded at the end. With the same number of devices and threads, a resumed run ends with the
    weights of an uninterrupted one, bit for bit. Small models train on one thread, others on as
    many as torch uses.

    Several devices have a process each, which takes its share of every batch; gradients are
    averaged over the batch, so all processes keep the same weights. The result is that of one
    process except for the noise, which each process draws for itself, and for what depends on
    whole batches: batch norm, whose running statistics are those of the first process, and
    objectives such as BetaTC. `fit` starts the processes, so a script must call it under
    `if __name__ == "__main__":`, all arguments must be picklable, and callbacks are called in
    the first process, on copies. Under torchrun, the processes that it started are used.

    Args:
        vae: A module with Pyro programs `model` and `guide`, all sites inside the plate "data".
            Its `initialise(x)`, if any, gets up to 10,000 training rows before the first step.
        data: Rows [N, \*E] (a tensor, array, frame or list), a pair (x [N, \*E], y [N, C]) of
            them, or an object with `__len__`, `batch`, `fixed` and `to`, as the parts of
            `data.load_data`. It is moved to the device once.
        objective: The objective to maximise, or the name of one that needs no options, such as
            "BetaTC"; ELBO() if None.
        run: Folder for settings, metrics.csv and checkpoints; nothing is written if None.
        epochs: Number of passes over the data.
        batch_size: Rows per step, on all devices together; the last batch of an epoch may be
            shorter.
        optimizer: A name in torch.optim, {"class_path": name, "init_args": {...}}, or a callable
            from parameters to an optimiser. A named one uses torch's fused form if there is one.
        lr: Learning rate, unless `optimizer` sets its own.
        schedule: A schedule of torch.optim.lr_scheduler, in one of the forms of `optimizer`,
            stepped once an epoch; ReduceLROnPlateau waits for a higher (validation) ELBO.
        clip_norm: Largest norm of the gradient of all parameters together; no limit if None.
        validation: Rows in a form of `data`; their ELBO is measured in eval mode after each epoch.
        patience: Stop after so many epochs without a better validation ELBO; never if None.
        devices: Number of devices (on a CPU, of processes), or their indices, such as [0, 1].
        accelerator: "cpu", "cuda" or "auto": CUDA if torch finds a GPU.
        precision: "32-true", "bf16-mixed", "16-mixed" or "64-true"; evaluation is never mixed.
        compile: How steps are taken. False: eagerly. "trace": by their tensor operations alone,
            which are traced once through Pyro's handlers, in about a second. True: by these,
            compiled in 5 to 20 seconds; a C++ compiler is needed. None: they are traced if 2,000
            steps are planned, and compiled from 30,000 on; a resumed run goes on as it began.
            Noise and losses are those of the eager step, compiled ones up to rounding. A shorter
            last batch runs eagerly; so does what cannot be traced, with a message why. At steps
            2, 4, 8, ... and where epochs start, once in 100 steps, the trace is compared with the
            programs: if a value in Python has changed, a warning says so, and steps run eagerly.
        seed: Seed of the order of the rows and of all noise.
        callbacks: Functions called with a `State` after each epoch, before its checkpoint is
            written, which therefore holds the weights as they leave them. If a run breaks off in
            between, they are called for this epoch again when it is resumed.
        loggers: Objects with `log_metrics(metrics, step)`, called after each epoch, and
            `finalize(status)`, called at the end: those of Lightning, for example.
        resume: Whether to continue from the last checkpoint in `run`, if there is one.
        progress: Whether to show a bar over all epochs, or a line for each without a terminal.
        declaration: The names and options that the vae was built from, for run.json;
            `vae.declaration` if None.
        checkpoint_every: Number of steps between checkpoints within an epoch, besides its end.

    Returns:
        The metrics of each epoch, in nats per datum.

    Raises:
        ValueError: If an argument does not fit, `run` holds a run that cannot be resumed, or
            another process trains in it.
        FloatingPointError: If a loss or gradient is not finite. On a CPU the weights are then
            those before the step; with several devices, those before `fit`. A GPU is checked
            twice a second and before each checkpoint, so that all checkpoints are finite.

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
        checkpoint_every, compile or False,
    )  # fmt: skip
    if objective is None or isinstance(objective, str):
        objective = _make_objective("ELBO" if objective is None else objective)
    _check_arguments(vae, objective, callbacks=callbacks, loggers=loggers)
    if patience is not None and validation is None:
        raise ValueError("patience needs validation data: give validation=, or no patience")
    if resume and run is None:
        raise ValueError("resume=True needs the folder of the run: give run=")
    rows, held_out = _datasets(vae, data, validation)
    engine = Engine(accelerator, as_plain(devices))
    settings.threads = engine.threads(vae, batch_size * objective.num_particles)
    saved = earlier_run(run, resume) if run is not None and (resume or is_first_process()) else {}
    if compile is None:
        steps = epochs * -(-len(rows) // batch_size)
        chosen = choose_compile(steps, objective, precision, engine.on_cuda)
        settings.compile = saved["training"].get("compile", False) if saved else chosen
    record = {}
    if run is not None:
        declaration = declaration or getattr(vae, "declaration", None)
        parts = {"train": rows, "validation": held_out}
        run, record = Path(run), make_record(declaration, settings, objective, parts)
        if saved and is_first_process():
            check_same(run, saved, record)
    for message in _warnings_at_the_start(run, saved, settings, objective, engine.size):
        warnings.warn(message, UserWarning, stacklevel=2)
    trainer = Trainer(
        vae, objective, rows, held_out, settings, run, record, resume, tuple(callbacks),
        progress, compile is None, tuple(loggers),
    )  # fmt: skip
    result = engine.run(trainer)
    if engine.spawns:  # loads the weights that other processes trained
        if precision == "64-true":
            vae.double()
        vae.load_state_dict(result.vae)
        objective.load_state_dict(result.objective, strict=False)  # skips any discriminator
    for message in result.warnings:
        warnings.warn(message, UserWarning, stacklevel=2)
    return result.history


def _make_objective(name: str) -> Objective:
    classes = {n: getattr(objectives, n) for n in objectives.__all__ if n != "Objective"}
    known = {n: cls for n, cls in classes.items() if issubclass(cls, Objective)}
    if name not in known:
        raise ValueError(f"objective {name!r} is unknown: choose one of {', '.join(known)}")
    return known[name]()


def _check_arguments(vae: Any, objective: Any, **lists: Any) -> None:
    if not isinstance(vae, nn.Module) or not all(
        callable(getattr(vae, name, None)) for name in ("model", "guide")
    ):
        raise ValueError(
            f"vae must be a torch module with methods model and guide; got {type(vae).__name__}"
        )
    if not any(parameter.requires_grad for parameter in vae.parameters()):
        raise ValueError("nothing to train: no parameter of the vae requires gradients")
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in vae.parameters()):
        raise ValueError(
            "fit needs gradients: build the vae and call fit outside of torch.inference_mode()"
        )
    for name, value in lists.items():
        if not isinstance(value, Sequence):
            raise ValueError(f"{name} must be a list; got {type(value).__name__}")
    if not isinstance(objective, Objective):
        raise ValueError(
            "objective must be one of pyro_vae.objectives, such as ELBO(); got "
            f"{type(objective).__name__}: for Pyro's own, use pyro.infer.SVI"
        )


def _datasets(vae: Any, data: Any, validation: Any) -> tuple[TensorDataset, TensorDataset | None]:
    """Returns the training and validation rows as datasets, their labels checked by the vae."""
    missing = getattr(vae, "missing", True)  # modules other than a VAE may take NaN
    rows = as_dataset(data, "data", missing)
    held_out = None if validation is None else as_dataset(validation, "validation", missing)
    for part, name in ((rows, "check_training_labels"), (held_out, "check_labels")):
        if callable(check := getattr(vae, name, None)):
            check(getattr(part, "y", None))
    return rows, held_out


def _warnings_at_the_start(
    run: Path | None, saved: dict[str, Any], settings: Settings, objective: Objective, size: int
) -> Iterator[str]:
    """Yields warnings before training in `size` processes; `saved` is the record to resume."""
    if objective.batch_level and size > 1:
        yield (
            f"{type(objective).__name__} looks at whole batches; on {size} devices it sees each "
            f"one's share, {settings.batch_size // size} rows of {settings.batch_size}"
        )
    threads = saved["training"].get("threads", settings.threads) if saved else settings.threads
    if threads != settings.threads and is_first_process():
        yield (
            f"{run} was trained on {threads} threads and goes on with {settings.threads}: its "
            "weights will differ, by rounding, from an unbroken run's"
        )
