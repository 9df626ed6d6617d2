"""The loop behind `fit`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from pyro_vae.objectives import Objective
from pyro_vae.training.adversary import Adversary, start
from pyro_vae.training.callbacks import Callback, State
from pyro_vae.training.checkpoint import PathLike, load_weights, save_checkpoint
from pyro_vae.training.evaluation import Evaluator, forked
from pyro_vae.training.history import History
from pyro_vae.training.optimizers import advance, make_optimizer, make_schedule
from pyro_vae.training.progress import Bar
from pyro_vae.training.rows import Rows, epoch_order
from pyro_vae.training.runs import write_metrics
from pyro_vae.training.settings import Settings
from pyro_vae.training.step import StepLoss, Watch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Trainer"]

VALIDATED = 2  # first steps, with the argument checks of Pyro's distributions
INTERVAL = 0.5  # seconds between looks at the device


class Trainer:
    """Where a training is, and how it goes on."""

    def __init__(
        self,
        fabric: Fabric,
        vae: nn.Module,
        objective: Objective,
        train: Rows,
        evaluator: Evaluator,
        settings: Settings,
        run: PathLike | None,
    ) -> None:
        self.fabric, self.vae, self.objective = fabric, vae, objective
        self.train, self.evaluator = train, evaluator
        self.settings, self.run = settings, run
        self.history = History()
        self.epoch = self.step = self.offset = 0  # epochs, steps, batches of this epoch done
        self.sums: Tensor | None = None  # of the loss's terms, over this epoch's data
        self.seconds = 0.0  # of this epoch, before `began`
        self.best: dict[str, Tensor] | None = None
        self.adversary: Adversary | None = None
        self.num_batches = -(-len(train) // settings.batch_size)

    def prepare(self, state: dict[str, Any] | None) -> None:
        """Initialises the vae, or goes back to a checkpoint; makes the optimiser."""
        self.objective.prepare(len(self.train), self.num_batches)
        if state is not None:
            self._load_weights("last")
        elif callable(initialise := getattr(self.vae, "initialise", None)):
            initialise(self.evaluator.initial_data())
        self._check_validation()
        if self.objective.has_adversary:
            start(self.vae, self.objective, self.train, self.settings.seed)
        loss = StepLoss(self.vae, self.objective, self.train)
        self.watch = Watch(loss, self.fabric.device)
        options = self.settings
        # 16-mixed unscales gradients before the step, which fused ones do inside
        fused = options.precision != "16-mixed"
        optimizer = make_optimizer(options.optimizer, self.vae, options.lr, fused=fused)
        optimizer.zero_grad()
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.schedule = make_schedule(options.schedule, optimizer)
        self.loss, self.optimizer = self.fabric.setup(loss, optimizer)
        if self.objective.has_adversary:
            self.adversary = Adversary(self.fabric, self.objective)
        if state is not None:
            self._load_state(state)
        self.unchecked = self.step + VALIDATED  # the first step without argument checks

    def fit(self, bar: Bar, callbacks: Sequence[Callback]) -> None:
        """Trains to the end, and leaves the best weights if there is a best."""
        stopped = False
        while self.epoch < self.settings.epochs and not (stopped or self._out_of_patience()):
            self._train_epoch(bar)
            row = self._end_epoch()
            self.fabric.log_dict({k: v for k, v in row.items() if v is not None}, self.step)
            state = State(self.epoch, self.step, self.vae, dict(row))
            for callback in callbacks:
                with forked(self.fabric.device):
                    callback(state)
            stopped = state.stopped
        for logger in self.fabric.loggers:
            logger.finalize("success")
        if self.best is not None:
            self.vae.load_state_dict(self.best)

    def _check_validation(self) -> None:
        """Data that the vae does not take fail now, not after an epoch."""
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
            self._step(index)
            now = time.monotonic()
            if now > look:
                self._look(bar)
                look = now + INTERVAL
            if every and self.step % every == 0 and self.offset < len(batches):
                self.seconds = before + now - began
                self._save(best=False)
        self._look(bar)
        self.seconds = before + time.monotonic() - began

    def _step(self, index: Tensor) -> None:
        self.objective.at(self.step)
        try:
            with pyro.validation_enabled(self.step < self.unchecked):
                loss, terms, adversary_loss = self.loss(index)
        except ValueError as error:
            raise ValueError(f"step {self.step}: {error}") from error
        self.watch.see(self.step, loss, terms)
        self.fabric.backward(loss)
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.adversary is not None:
            self.adversary.step(adversary_loss)
        self.sums = terms.double() if self.sums is None else self.sums.add_(terms)
        self.step += 1
        self.offset += 1

    def _clip(self) -> None:
        """Clips the gradient; on a CPU, refuses one that is not finite."""
        limit, norm = self.settings.clip_norm, None
        if limit is not None:
            norm = self.fabric.clip_gradients(
                self.loss, self.optimizer, max_norm=limit, error_if_nonfinite=False
            )
        elif self.watch.at_once:
            norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.watch.at_once and norm is not None and not math.isfinite(norm.item()):
            raise self.watch.gradient_error(self.step)

    def _look(self, bar: Bar) -> None:
        """Reads the device: whether all was finite, and the means for the bar."""
        self.watch.check()
        bar.show(self.epoch + 1, self.offset, self._means())

    def _means(self) -> dict[str, float]:
        """Of the data of this epoch so far, in nats."""
        count = min(self.offset * self.settings.batch_size, len(self.train))
        assert self.sums is not None
        objective, reconstruction, *kls = (self.sums / count).tolist()
        kl = sum(kls)
        elbo = reconstruction - kl
        return {"elbo": elbo, "reconstruction": reconstruction, "kl": kl, "objective": objective}

    def _end_epoch(self) -> dict[str, Any]:
        began = time.monotonic()
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
        self.epoch, self.offset, self.sums, self.seconds = self.epoch + 1, 0, None, 0.0
        best = self.history.best_epoch == self.epoch
        if best:
            self.best = {name: t.detach().clone() for name, t in self.vae.state_dict().items()}
        self._save(best)
        return row

    def _out_of_patience(self) -> bool:
        """Whether the best epoch is long ago; patience begins when all weights are settled."""
        best, patience = self.history.best_epoch, self.settings.patience
        if patience is None or best is None:
            return False
        settled = [r["epoch"] for r in self.history.rows if self.objective.settled(r["step"])]
        return bool(settled) and self.epoch - max(best, settled[0]) >= patience

    def _save(self, best: bool) -> None:
        if self.run is not None:
            self.watch.check()
            save_checkpoint(self.run, self.vae.state_dict(), self._state(), best=best)
            write_metrics(self.run, self.history.rows)

    def _state(self) -> dict[str, Any]:
        device = self.fabric.device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return {
            "epoch": self.epoch,
            "step": self.step,
            "offset": self.offset,
            "sums": self.sums,
            "seconds": self.seconds,
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "objective": self.objective.state_dict(),
            "adversary": self.adversary and self.adversary.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "history": {"rows": self.history.rows, "num_units": self.history.num_units},
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        device = self.fabric.device
        for name in ("epoch", "step", "offset", "seconds"):
            setattr(self, name, state[name])
        self.sums = None if state["sums"] is None else state["sums"].to(device)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.objective.load_state_dict(state["objective"])
        if self.adversary is not None:
            self.adversary.optimizer.load_state_dict(state["adversary"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.history = History(**state["history"])
        if self.history.best_epoch is not None:
            self.best = load_weights(self.run, "best")  # type: ignore[arg-type]
        write_metrics(self.run, self.history.rows)  # type: ignore[arg-type]
        torch.set_rng_state(state["rng"]["cpu"])
        if device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], device)

    def _load_weights(self, which: str) -> None:
        weights = load_weights(self.run, which)  # type: ignore[arg-type]
        try:
            self.vae.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"the weights of run {self.run} do not fit this vae: {error}"
            ) from None
