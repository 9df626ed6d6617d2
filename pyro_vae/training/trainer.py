"""The training in one process: its state, the loop over its epochs, and a step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.compiling import CannotCompile
from pyro_vae.densities import densities, evaluating
from pyro_vae.files import locked, reading
from pyro_vae.objectives import Objective
from pyro_vae.processes import Group
from pyro_vae.runtime import (
    epoch_order,
    fast_products,
    forked,
    keep_memory,
    seed_generators,
    threads,
    without_autocast,
)
from pyro_vae.training.dataset import (
    UNIT_ROWS,
    TensorDataset,
    active_units,
    fetch,
    fetch_few,
    validation_bound,
)
from pyro_vae.training.optimizers import (
    advance,
    make_optimizer,
    make_schedule,
    replay,
    restore,
)
from pyro_vae.training.progress import (
    Bar,
    Callback,
    History,
    State,
    units_in_use,
    warnings_at_the_end,
)
from pyro_vae.training.run_folder import (
    Settings,
    load_state,
    load_weights,
    put_weights,
    save_checkpoint,
    start_run,
    write_metrics,
)
from pyro_vae.training.step import Monitor, Outcome, StepLoss, TracedGradient

INITIAL_ROWS = 10_000  # largest number of training rows given to `vae.initialise`
COMPARED_STEPS = 100  # steps of which one at an epoch's start compares the trace
VALIDATED_STEPS = 2  # first steps, which run with the argument checks of Pyro's distributions
BAR_INTERVAL = 0.5  # seconds between two updates of the progress bar
MIN_SCALE = 1e-6  # least scale of float16 gradients: it starts at 65,536 and halves at overflow


class Result(NamedTuple):
    """What training returns: history, warnings, and the state dicts of vae and objective."""

    history: History
    warnings: list[str]
    vae: dict[str, Tensor]
    objective: dict[str, Tensor]


@dataclass
class Trainer:
    """Trains in one process of a group; holds the arguments, the state and the epoch loop."""

    vae: Any
    objective: Objective
    rows: TensorDataset
    held_out: TensorDataset | None
    settings: Settings
    run: Path | None
    record: dict[str, Any]
    resume: bool
    callbacks: Sequence[Callback]
    progress: bool
    auto_compile: bool = False  # whether `fit`, and not its caller, decided about `compile`
    loggers: Sequence[Any] = ()

    def __call__(self, group: Group) -> Result:
        """Trains in one process; the first one locks the run folder, and alone writes to it."""
        folder = self.run if group.rank == 0 else None
        with (
            locked(folder / "lock") if folder else nullcontext(),
            _training_context(self.vae, self.objective, self.settings, group.device),
        ):
            keep_memory()
            state = load_state(folder) if folder and self.resume else None
            self._setup_data(group)
            self._setup_model(group.broadcast(state))
            if folder:
                start_run(folder, self.record)
            return self._fit()

    def _setup_data(self, group: Group) -> None:
        """Moves the data to the device of the group, and sets the state before the first step."""
        self.group = group
        if self.settings.precision == "64-true":
            self.vae.double()
        # all weights and batches have its device and type
        self.weight = next(p for p in self.vae.parameters() if p.is_floating_point())
        self.rows = self.rows.to(group.device)
        seed, held_out = self.settings.seed, self.held_out
        with forked(group.device):
            if held_out is not None:
                held_out = held_out.to(group.device).fixed(seed)
            fixed_rows = held_out or self.rows.fixed(seed)
        self.validate = partial(validation_bound, self.vae, held_out, self.weight, seed, group)
        self.unit_rows = fetch_few(fixed_rows, UNIT_ROWS, self.weight)
        self.history = History()
        self.epoch = self.step = self.offset = 0  # done: epochs, steps, batches of this epoch
        self.seconds = 0.0  # spent on the steps of this epoch so far
        self.first_elbo: float | None = None  # ELBO of the first step
        self.best: dict[str, Tensor] | None = None
        self.compile = self.settings.compile
        self.traced: TracedGradient | None = None  # made at the first step that needs it
        self.state_errors: AbstractContextManager[None] = nullcontext()  # of the next update
        self.num_batches = -(-len(self.rows) // self.settings.batch_size)
        batch = torch.arange(min(self.settings.batch_size, len(self.rows)))
        self.local_batch_size = len(group.local_rows(batch)[0])

    def _setup_model(self, state: dict[str, Any] | None) -> None:
        """Sets the weights, makes loss, optimiser and schedule, and loads a checkpoint `state`."""
        settings, device = self.settings, self.group.device
        self.objective.prepare(len(self.rows), self.num_batches)
        self._set_weights(resumed=state is not None)
        try:  # to raise now if the validation rows do not fit, not after an epoch
            with pyro.validation_enabled(True):
                self.validate()
        except ValueError as error:
            raise ValueError(f"validation: {error}") from error
        if self.objective.own_step:
            programs, few = (self.vae.model, self.vae.guide), fetch_few(self.rows, 2, self.weight)
            with evaluating(*programs, seed=settings.seed, device=device):
                d = densities(*programs, *few)
            self.objective.start(d)
            self.group.broadcast_(*self.objective.parameters())
        self.loss = StepLoss(self.vae, self.objective, settings.precision)
        self.monitor = Monitor(self.loss, device)
        # in 16-mixed, gradients are unscaled before the step; fused optimisers do so inside
        fused = settings.precision != "16-mixed"
        self.scaler = torch.amp.GradScaler(device.type, enabled=not fused)
        self.optimizer = make_optimizer(settings.optimizer, self.vae, settings.lr, fused=fused)
        self.optimizer.zero_grad()
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.schedule = make_schedule(settings.schedule, self.optimizer, settings.epochs)
        if state is not None:
            self.state_errors = reading(f"the state of run {self.run}")
            with reading(f"the state of run {self.run}"):
                self._load_state(state)
        elif self.group.rank > 0:
            seed_generators(device, self.group.seed(settings.seed, 0))

    def _set_weights(self, resumed: bool) -> None:
        """Loads the last weights or calls `vae.initialise`, then broadcasts to all processes."""
        if resumed:
            if self.group.rank == 0:
                put_weights(self.vae, load_weights(self.run, "last"), self.run)  # type: ignore[arg-type]
        elif callable(initialise := getattr(self.vae, "initialise", None)):
            with forked(self.group.device):
                fixed = self.rows.fixed(self.settings.seed)
            initialise(fetch_few(fixed, INITIAL_ROWS, self.weight)[0])
        self.group.broadcast_(*self.vae.parameters(), *self.vae.buffers())

    def _fit(self) -> Result:
        """Trains to the end, and then loads the best weights if there was validation.

        Each epoch takes its steps, measures, calls the callbacks and writes a checkpoint.
        """
        settings, stopped = self.settings, False
        shown = self.progress and self.group.rank == 0
        with Bar(shown, settings.epochs, settings.patience, self.num_batches) as bar:
            self.bar = bar
            if self.auto_compile:
                steps = settings.epochs * self.num_batches
                how = {True: "is compiled", "trace": "is traced"}.get(self.compile, "runs eagerly")
                bar.say(f"compile: {steps} steps are planned, and the step {how}")
            while self.epoch < settings.epochs and not (stopped or self._out_of_patience()):
                with fast_products(self.parameters):
                    means = self._train_epoch()
                row = self._end_epoch(means)
                bar.end(self.history)
                stopped = self._run_callbacks(row)
                self._save(best=self.history.best_epoch == self.epoch)
            for logger in self.loggers if self.group.rank == 0 else ():
                logger.finalize("success")
            if self.best is not None:
                self.vae.load_state_dict(self.best)
            units = active_units(self.vae, self.unit_rows, settings.seed)
            unsettled = self.objective.unsettled(self.step)
            if any(active < total for active, total in units.values()):
                bar.say(units_in_use(units))
        messages = warnings_at_the_end(self.history, self.first_elbo, units, unsettled)
        return Result(self.history, messages, self.vae.state_dict(), self.objective.state_dict())

    def _run_callbacks(self, row: dict[str, Any]) -> bool:
        """Logs the epoch and calls the callbacks; returns whether one of them stopped training.

        The checkpoint is written afterwards: callbacks have seen every epoch that it holds.
        """
        state = State(self.epoch, self.step, self.vae, dict(row))
        if self.group.rank == 0:
            self._check_folder()  # callbacks may write to it
            for logger in self.loggers:
                logger.log_metrics({k: v for k, v in row.items() if v is not None}, self.step)
            for callback in self.callbacks:
                with forked(self.group.device):
                    callback(state)
        return self.group.broadcast(state.stopped)

    def _train_epoch(self) -> dict[str, float]:
        self.vae.train()
        order = epoch_order(len(self.rows), self.settings.seed, self.epoch)
        batches = order.to(self.group.device).split(self.settings.batch_size)
        every = self.settings.checkpoint_every
        start = time.monotonic() - self.seconds
        next_report = time.monotonic()
        for index in batches[self.offset :]:
            self._step(index)
            now = time.monotonic()
            if now > next_report:
                self._report()
                next_report = now + BAR_INTERVAL
            if every and self.step % every == 0 and self.offset < len(batches):
                self.seconds = now - start
                self._save(best=False)
        self.seconds = time.monotonic() - start
        return self._report()

    def _step(self, index: Tensor) -> None:
        self.objective.at(self.step)
        local, weight = self.group.local_rows(index)
        try:
            with pyro.validation_enabled(True) if self.step < VALIDATED_STEPS else nullcontext():
                loss, terms, d = self._gradient(*fetch(self.rows, local, self.weight))
        except ValueError as error:
            raise ValueError(f"step {self.step}: {error}") from error
        terms = terms * (len(index) / len(local))
        loss, terms = self.group.all_reduce_mean(weight, self.parameters, loss, terms)
        with self.state_errors:  # a loaded state is first used here: its errors name the run
            norm = None
            if self.settings.clip_norm is not None:
                self.scaler.unscale_(self.optimizer)
                norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
            if self.scaler.is_enabled():  # it skips steps with infinite gradients
                self.monitor.add(self.step, loss, terms)
            else:
                self.monitor.add(self.step, loss, terms, self.parameters, norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            for parameter in self.parameters:
                parameter.grad = None
            if d is not None:
                self.objective.after_step(d, partial(self.group.all_reduce_mean, weight))
        self.state_errors = nullcontext()
        self.step += 1
        self.offset += 1

    def _gradient(self, *batch: Tensor) -> Outcome:
        """Leaves the gradient of a batch in the parameters, by its trace or eagerly.

        At steps 2, 4, 8, ... and where epochs start, once in 100 steps or when other parameters
        are trained, the trace is compared with the programs. From a difference on, steps run
        eagerly.
        """
        # a shorter last batch is not worth a trace of its own
        if self.step < VALIDATED_STEPS or len(batch[0]) != self.local_batch_size:
            return self._eager_gradient(*batch)
        if self.compile and self.traced is None:
            self._trace(*batch)
        if self.traced is None:
            return self._eager_gradient(*batch)
        due = self.step % COMPARED_STEPS < self.num_batches
        epoch_starts = self.offset == 0 and (due or not self.traced.trains_the_same())
        if not epoch_starts and self.step & (self.step - 1):
            return self.traced(*batch)
        outcome, same = self.traced.compare(self._eager_gradient, *batch)
        if not same:
            warnings.warn(
                f"compile: from step {self.step} on the steps run eagerly: the programs compute "
                "something else than when they were traced, for a value in Python has changed; "
                "keep such values in buffers, or give compile=False",
                stacklevel=2,
            )
            self.compile, self.traced = False, None
        return outcome

    def _eager_gradient(self, *batch: Tensor) -> Outcome:
        loss, terms, d = self.loss(*batch)
        self.scaler.scale(loss).backward()
        return loss.detach(), terms, d

    def _trace(self, *batch: Tensor) -> None:
        """Traces the gradient of batches of this size, and compiles it; says why if that fails."""
        try:
            self.traced = TracedGradient(self.loss, *batch)
            if self.compile != "trace":
                self.bar.say("compiling the training step")
                self.traced.operations.compile(*batch)
        except CannotCompile as error:
            self.compile = False
            how = "runs eagerly" if self.traced is None else "is traced only"
            message = f"compile: the step {how}, for {error}"
            if self.auto_compile:
                self.bar.say(message)
            else:  # the user asked for it
                warnings.warn(message, stacklevel=2)

    def _report(self) -> dict[str, float]:
        """Shows and returns means over the rows of this epoch so far, in nats.

        Waits for the device. Raises FloatingPointError if a loss was not finite.
        """
        self.monitor.raise_if_bad(self.step)
        if self.scaler.get_scale() < MIN_SCALE:
            raise FloatingPointError(
                f"step {self.step}: gradients are not finite, in half precision at any scale; "
                "lower lr, or take another precision"
            )
        assert self.monitor.sums is not None
        count = min(self.offset * self.settings.batch_size, len(self.rows))
        objective, reconstruction, *kls = (self.monitor.sums / count).tolist()
        kl = sum(kls)
        elbo = reconstruction - kl
        self.first_elbo = elbo if self.first_elbo is None else self.first_elbo
        means = {"elbo": elbo, "reconstruction": reconstruction, "kl": kl, "objective": objective}
        self.bar.show(self.epoch + 1, self.offset, means)
        return means

    def _end_epoch(self, means: dict[str, float]) -> dict[str, Any]:
        """Ends an epoch: measures, adds a row with `means` to the history, steps the schedule."""
        start = time.monotonic()
        self.group.broadcast_(*self.vae.buffers())
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            **means,
            **self.validate(),
        }
        units = active_units(self.vae, self.unit_rows, self.settings.seed).values()
        row["active_units"], self.history.num_units = (
            map(sum, zip(*units)) if units else [None] * 2
        )
        row["seconds"] = self.seconds + time.monotonic() - start
        self.history.rows.append(row)
        if self.schedule is not None:
            advance(self.schedule, row)
        self.epoch, self.offset, self.seconds = self.epoch + 1, 0, 0.0
        self.monitor.sums = None
        return row

    def _out_of_patience(self) -> bool:
        """Returns whether `patience` epochs passed since the best one and the end of schedules."""
        best, patience = self.history.best_epoch, self.settings.patience
        if patience is None or best is None:
            return False
        rows = self.history.rows
        settled_epochs = [r["epoch"] for r in rows if not self.objective.unsettled(r["step"])]
        return bool(settled_epochs) and self.epoch - max(best, settled_epochs[0]) >= patience

    def _save(self, best: bool) -> None:
        """Keeps the weights if they are the best, and writes a checkpoint if there is a run."""
        if best:
            state = self.vae.state_dict()
            self.best = {name: t.detach().clone() for name, t in state.items()}
        if self.run is None:
            return
        self.monitor.raise_if_bad(self.step, self.parameters)
        self.group.broadcast_(*self.vae.buffers())
        state = self._state()
        if self.group.rank == 0:
            self._check_folder()
            save_checkpoint(self.run, self.vae.state_dict(), state, best=best)
            write_metrics(self.run, self.history.rows)

    def _check_folder(self) -> None:
        if self.run is not None and not (self.run / "run.json").exists():
            raise ValueError(
                f"{self.run} was removed or renamed while it was trained: its run.json is "
                "gone; train anew, and leave the folder where it is"
            )

    def _state(self) -> dict[str, Any]:
        device = self.group.device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        generators = self.group.gather({"cpu": torch.get_rng_state(), "cuda": cuda})
        return {
            "epoch": self.epoch,
            "step": self.step,
            "offset": self.offset,
            "sums": self.monitor.sums,
            "seconds": self.seconds,
            "rng": generators[0],
            "rng_of_others": generators[1:],
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "precision": self.scaler.state_dict(),
            "history": {"rows": self.history.rows, "num_units": self.history.num_units},
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        for name in ("epoch", "step", "offset", "seconds"):
            setattr(self, name, state[name])
        self.history = History(**state["history"])
        epochs, offset = divmod(self.step, self.num_batches)
        if (epochs, offset) != (self.epoch, self.offset):
            raise TypeError(f"step {self.step} is not in epoch {self.epoch}")
        if offset:
            self.monitor.sums = state["sums"].to(self.group.device)
        if self.schedule is not None:
            replay(self.schedule, self.history.rows)
        restore(self.optimizer, state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        self.scaler.load_state_dict(state["precision"])
        if self.history.best_epoch is not None:
            first = self.group.rank == 0
            self.best = self.group.broadcast(load_weights(self.run, "best") if first else {})  # type: ignore[arg-type]
        if self.group.rank == 0:
            write_metrics(self.run, self.history.rows)  # type: ignore[arg-type]
        generators = [state["rng"], *state.get("rng_of_others", [])]
        device, rank = self.group.device, self.group.rank
        if rank > 0 and len(generators) != self.group.size:  # the number of processes has changed
            seed_generators(device, self.group.seed(self.settings.seed, self.step))
            return
        torch.set_rng_state(generators[rank]["cpu"])
        if device.type == "cuda" and generators[rank]["cuda"] is not None:
            torch.cuda.set_rng_state(generators[rank]["cuda"], device)


@contextmanager
def _training_context(
    vae: nn.Module, objective: Objective, settings: Settings, device: torch.device
) -> Iterator[None]:
    """Moves modules to the device, seeds generators, sets flags; restores all afterwards."""
    modules = vae, objective
    before = [
        next((t.device for t in chain(m.parameters(), m.buffers())), device) for m in modules
    ]
    trained = [module for module in vae.modules() if module.training]
    with (
        forked(device, settings.seed),
        pyro.validation_enabled(False),
        torch.enable_grad(),  # even under a caller's no_grad
        without_autocast(device),
        threads(settings.threads),
    ):
        try:
            for module in modules:
                module.to(device)
            yield
        finally:
            for module, old_device in zip(modules, before):
                module.to(old_device)
            vae.zero_grad()
            vae.eval()
            for module in trained:
                module.training = True
