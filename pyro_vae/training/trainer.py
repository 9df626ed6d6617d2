"""The loop behind `fit`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.compiling import CannotCompile
from pyro_vae.files import PathLike, reading
from pyro_vae.generators import epoch_order, forked, seed_generators
from pyro_vae.objectives import Objective
from pyro_vae.training.dataset import Dataset
from pyro_vae.training.engine import Group
from pyro_vae.training.evaluation import Evaluator
from pyro_vae.training.optimizers import advance, make_optimizer, make_schedule, restore
from pyro_vae.training.progress import Bar, Callback, History, State
from pyro_vae.training.run_folder import (
    Settings,
    load_weights,
    put_weights,
    save_checkpoint,
    write_metrics,
)
from pyro_vae.training.step import (
    Gradient,
    Monitor,
    StepLoss,
    compiled_gradient,
    eager_gradient,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Trainer"]

VALIDATED = 2  # first steps, with the argument checks of Pyro's distributions
INTERVAL = 0.5  # seconds between two reports


class Trainer:
    """The state of a training, and the loop over its epochs."""

    def __init__(
        self,
        fabric: Fabric,
        group: Group,
        vae: nn.Module,
        objective: Objective,
        train: Dataset,
        evaluator: Evaluator,
        settings: Settings,
        run: PathLike | None,
    ) -> None:
        self.fabric, self.group = fabric, group
        self.vae, self.objective = vae, objective
        self.train, self.evaluator = train, evaluator
        self.settings, self.run = settings, run
        self.history = History()
        self.epoch = self.step = self.offset = 0  # epochs, steps, batches of this epoch done
        self.seconds = 0.0  # spent in this epoch before it was resumed
        self.began: float | None = None  # ELBO of the first step
        self.best: dict[str, Tensor] | None = None
        self.compiled: Gradient | None = None  # made when it is first needed
        self.asked = True  # whether the user asked to compile, so that a failure is a warning
        self.num_batches = -(-len(train) // settings.batch_size)
        batch = torch.arange(min(settings.batch_size, len(train)))
        self.local_batch_size = len(group.local_rows(batch)[0])

    def prepare(self, state: dict[str, Any] | None) -> None:
        """Initialises the vae or loads the checkpoint `state`, and makes the optimiser."""
        self.objective.prepare(len(self.train), self.num_batches)
        if state is not None:
            if self.settings.precision == "64-true":
                self.vae.double()  # before its weights come, which are
            if self.group.rank == 0:
                put_weights(self.vae, load_weights(self.run, "last"), self.run)  # type: ignore[arg-type]
        elif callable(initialise := getattr(self.vae, "initialise", None)):
            initialise(self.evaluator.initial_data())
        self.group.broadcast_(self._variables())
        self._check_validation()
        if self.objective.own_step:
            self.objective.start(self.evaluator.first_densities())
            self.group.broadcast_(dict(self.objective.named_parameters()))
        self.loss = StepLoss(self.vae, self.objective, self.train)
        self.monitor = Monitor(self.loss, self.fabric.device)
        options = self.settings
        # 16-mixed unscales gradients before the step, which fused ones do inside
        fused = options.precision != "16-mixed"
        optimizer = make_optimizer(options.optimizer, self.vae, options.lr, fused=fused)
        optimizer.zero_grad()
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.schedule = make_schedule(options.schedule, optimizer)
        self.wrapped, self.optimizer = self.fabric.setup(self.loss, optimizer)
        self.eager = eager_gradient(self.fabric, self.loss)
        if state is not None:
            with reading(f"the state of run {self.run}"):
                self._load_state(state)
        elif self.group.rank > 0:
            seed_generators(self.fabric.device, self.group.seed(options.seed, 0))

    def fit(self, bar: Bar, callbacks: Sequence[Callback]) -> None:
        """Trains to the end, and then loads the best weights if there was validation."""
        stopped = False
        while self.epoch < self.settings.epochs and not (stopped or self._out_of_patience()):
            self._train_epoch(bar)
            row = self._end_epoch()
            bar.end(self.history)
            stopped = self._call(callbacks, row)
            best = self.history.best_epoch == self.epoch
            if best:
                self.best = {name: t.detach().clone() for name, t in self.vae.state_dict().items()}
            self._save(best)
        for logger in self.fabric.loggers:
            logger.finalize("success")
        if self.best is not None:
            self.vae.load_state_dict(self.best)

    def _call(self, callbacks: Sequence[Callback], row: dict[str, Any]) -> bool:
        """Logs the epoch and calls the callbacks; returns whether one of them stopped training.

        The checkpoint comes after, so that every epoch in it has been seen by the callbacks.
        """
        self.fabric.log_dict({k: v for k, v in row.items() if v is not None}, self.step)
        state = State(self.epoch, self.step, self.vae, dict(row))
        if self.group.rank == 0:
            self._check_folder()  # callbacks may write to it
        for callback in callbacks if self.group.rank == 0 else ():
            with forked(self.fabric.device):
                callback(state)
        return self.group.broadcast(state.stopped)

    def _check_validation(self) -> None:
        """Raises if the vae does not take the validation data: now, not after an epoch."""
        try:
            with pyro.validation_enabled(True):
                self.evaluator.bound()
        except ValueError as error:
            raise ValueError(f"validation: {error}") from error

    def _train_epoch(self, bar: Bar) -> None:
        self.vae.train()
        order = epoch_order(len(self.train), self.settings.seed, self.epoch)
        batches = order.to(self.fabric.device).split(self.settings.batch_size)
        every = self.settings.checkpoint_every
        began = look = time.monotonic()
        before = self.seconds
        for index in batches[self.offset :]:
            self._step(index, bar)
            now = time.monotonic()
            if now > look:
                self._report(bar)
                look = now + INTERVAL
            if every and self.step % every == 0 and self.offset < len(batches):
                self.seconds = before + now - began
                self._save(best=False)
        self._report(bar)
        self.seconds = before + time.monotonic() - began

    def _step(self, index: Tensor, bar: Bar) -> None:
        self.objective.at(self.step)
        share, weight = self.group.local_rows(index)
        try:
            with pyro.validation_enabled(True) if self.step < VALIDATED else nullcontext():
                batch = self.loss.batch(share)
                loss, terms, d = self._gradient(batch, bar)(*batch)
        except ValueError as error:
            raise ValueError(f"step {self.step}: {error}") from error
        if len(share) != len(index):
            terms = terms * (len(index) / len(share))
        loss, terms = self.group.all_reduce_mean(weight, self.parameters, loss, terms)
        self.monitor.add(self.step, loss, terms)
        self._clip()
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        if d is not None:
            self.objective.after_step(d, partial(self.group.all_reduce_mean, weight))
        self.step += 1
        self.offset += 1

    def _gradient(self, batch: tuple[Tensor, ...], bar: Bar) -> Gradient:
        """The eager gradient; the compiled one if asked for, after the first, checked steps.

        A shorter last batch of an epoch runs eagerly: it is not worth a compilation of its own.
        """
        if (
            not self.settings.compile
            or self.step < VALIDATED
            or len(batch[0]) != self.local_batch_size
        ):
            return self.eager
        if self.compiled is None:
            bar.say("compiling the training step")
            try:
                self.compiled = compiled_gradient(self.fabric, self.loss, *batch)
            except CannotCompile as error:
                message = f"compile: the step runs eagerly, for {error}"
                warnings.warn(message, stacklevel=2) if self.asked else bar.say(message)
                self.compiled = self.eager
        return self.compiled

    def _clip(self) -> None:
        """Clips the gradient, and has the monitor check it."""
        limit, norm = self.settings.clip_norm, None
        if limit is not None:
            norm = self.fabric.clip_gradients(
                self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False
            )
        self.monitor.check_gradient(self.step, self.parameters, norm)

    def _report(self, bar: Bar) -> None:
        """Raises if a loss was not finite, and shows the means; waits for the device."""
        self.monitor.raise_if_bad(self.step)
        means = self._means()
        if self.began is None:
            self.began = means["elbo"]
        bar.show(self.epoch + 1, self.offset, means)

    def _means(self) -> dict[str, float]:
        """Means over the rows of this epoch so far, in nats."""
        count = min(self.offset * self.settings.batch_size, len(self.train))
        assert self.monitor.sums is not None
        objective, reconstruction, *kls = (self.monitor.sums / count).tolist()
        kl = sum(kls)
        elbo = reconstruction - kl
        return {"elbo": elbo, "reconstruction": reconstruction, "kl": kl, "objective": objective}

    def _end_epoch(self) -> dict[str, Any]:
        began = time.monotonic()
        self.group.broadcast_(dict(self.vae.named_buffers()))
        row: dict[str, Any] = {"epoch": self.epoch + 1, "step": self.step, "seconds": 0.0}
        row |= {"lr": float(self.optimizer.param_groups[0]["lr"]), **self._means()}
        row |= self.evaluator.bound()
        units = self.evaluator.active_units()
        row["active_units"], self.history.num_units = units or (None, None)
        row["seconds"] = self.seconds + time.monotonic() - began
        self.history.rows.append(row)
        if self.schedule is not None:
            elbo = row["validation_elbo"]
            advance(self.schedule, row["elbo"] if elbo is None else elbo)
        self.epoch, self.offset, self.seconds = self.epoch + 1, 0, 0.0
        self.monitor.sums = None
        return row

    def _out_of_patience(self) -> bool:
        """Whether `patience` epochs passed without a better one, since all weights settled."""
        best, patience = self.history.best_epoch, self.settings.patience
        if patience is None or best is None:
            return False
        settled = [r["epoch"] for r in self.history.rows if self.objective.settled(r["step"])]
        return bool(settled) and self.epoch - max(best, settled[0]) >= patience

    def _save(self, best: bool) -> None:
        if self.run is None:
            return
        self.monitor.raise_if_bad(self.step, self.parameters)
        self.group.broadcast_(dict(self.vae.named_buffers()))
        state = self._state()
        if self.group.rank == 0:
            self._check_folder()
            save_checkpoint(self.run, self.vae.state_dict(), state, best=best)
            write_metrics(self.run, self.history.rows)

    def _check_folder(self) -> None:
        if self.run is not None and not (Path(self.run) / "run.json").exists():
            raise ValueError(
                f"{self.run} was removed or renamed while it was trained: its run.json is "
                "gone; train anew, and leave the folder where it is"
            )

    def _variables(self) -> dict[str, Tensor]:
        return dict([*self.vae.named_parameters(), *self.vae.named_buffers()])

    def _state(self) -> dict[str, Any]:
        device = self.fabric.device
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
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "objective": self.objective.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "history": {"rows": self.history.rows, "num_units": self.history.num_units},
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        for name in ("epoch", "step", "offset", "seconds"):
            setattr(self, name, state[name])
        if self.step != self.epoch * self.num_batches + self.offset:
            raise TypeError(f"step {self.step} is not in epoch {self.epoch}")
        if state["sums"] is not None:
            self.monitor.sums = state["sums"].to(self.fabric.device)
        restore(self.optimizer, state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.objective.load_state_dict(state["objective"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.history = History(**state["history"])
        if self.history.best_epoch is not None:
            first = self.group.rank == 0
            self.best = self.group.broadcast(load_weights(self.run, "best") if first else {})  # type: ignore[arg-type]
        if self.group.rank == 0:
            write_metrics(self.run, self.history.rows)  # type: ignore[arg-type]
        self._load_generators([state["rng"], *state.get("rng_of_others", [])])

    def _load_generators(self, generators: list[dict[str, Any]]) -> None:
        """Restores the generators of this rank; new ones if the number of processes changed."""
        device, rank = self.fabric.device, self.group.rank
        if rank > 0 and len(generators) != self.group.size:
            seed_generators(device, self.group.seed(self.settings.seed, self.step))
            return
        torch.set_rng_state(generators[rank]["cpu"])
        if device.type == "cuda" and generators[rank]["cuda"] is not None:
            torch.cuda.set_rng_state(generators[rank]["cuda"], device)
