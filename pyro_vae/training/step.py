"""A step: its loss and gradient, eager or compiled; its optimiser; what is not finite in it."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae.arguments import check_options, closest, name_and_options
from pyro_vae.compiling import CannotCompile, compiled
from pyro_vae.densities import Densities, OwnParameters, folds, registered_densities, summed_values
from pyro_vae.objectives import Objective

PRECISIONS = {  # and the types of what autocast casts
    "32-true": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "64-true": None,
}
LONG = 30_000  # steps that repay the 20 seconds of a compilation, at 0.7 ms saved by each

Outcome = tuple[Tensor, Tensor, Densities | None]  # loss, terms, for `Objective.after_step`
Gradient = Callable[..., Outcome]  # of a batch; leaves the gradient in the parameters

OptimizerSpec = str | dict[str, Any] | Callable[[list[nn.Parameter]], Optimizer]
ScheduleSpec = str | dict[str, Any] | Callable[[Optimizer], LRScheduler]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type)
    and issubclass(cls, Optimizer)
    and name not in ("Optimizer", "LBFGS", "Muon", "SparseAdam")  # need a closure, matrices, ...
}
SCHEDULES: dict[str, type[LRScheduler]] = {
    name: cls
    for name, cls in vars(lr_scheduler).items()
    if isinstance(cls, type)
    and issubclass(cls, LRScheduler)
    and name not in ("LRScheduler", "SequentialLR", "ChainedScheduler")  # made of schedules
    and not name.startswith("_")
}


IMPLEMENTATIONS = ("fused", "foreach", "differentiable", "capturable")  # of the same step


@contextmanager
def _casting(precision: str, device: str) -> Iterator[None]:
    """Operations are cast in a mixed precision; new tensors are double in "64-true"."""
    before = torch.get_default_dtype()
    try:
        if precision == "64-true":
            torch.set_default_dtype(torch.double)
        mixed = PRECISIONS[precision]
        with torch.autocast(device, mixed) if mixed else nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


class StepLoss(nn.Module):
    """From a batch to its loss, computed in a precision of `fit`."""

    def __init__(self, vae: nn.Module, objective: Objective, precision: str = "32-true") -> None:
        super().__init__()
        self.vae: Any = vae
        self.objective, self.precision = objective, precision
        self.observed: list[str] = []
        self.latent: list[str] = []

    def forward(self, x: Tensor, y: Tensor | None = None) -> Outcome:
        """The loss of a batch per datum in nats, to be differentiated, and its terms.

        These are sums over the batch of the objective, the reconstruction and each latent
        site's KL, without gradients. Third come the densities, if the objective has a step of
        its own after the model's.
        """
        K = self.objective.num_particles
        # as `densities`, whose checks of arguments no step needs
        with _casting(self.precision, x.device.type), OwnParameters():
            d = registered_densities(self.vae.model, self.vae.guide, x, y, num_particles=K)
            loss = self.objective.reduce(d) / (d.scale * len(x))
            with torch.no_grad():
                sums = [-loss * len(x), d.log_likelihood.mean(0).sum()]
                terms = torch.stack(sums + [kl.sum() for kl in d.kl().values()])
        self.observed, self.latent = list(d.observed), list(d.sites)
        return loss, terms, d if self.objective.own_step else None


def compiled_gradient(loss: StepLoss, *batch: Tensor) -> Gradient:
    """A compiled function of batches of the size of this one.

    Raises:
        CannotCompile: If the vae, the objective or this machine does not allow it.
    """
    if loss.objective.own_step:
        name = type(loss.objective).__name__
        raise CannotCompile(f"{name} trains a second player beside the model")
    if loss.precision == "16-mixed":
        raise CannotCompile("precision 16-mixed scales its gradients")
    for program in (loss.vae.model, loss.vae.guide):
        for look in (folds, summed_values):  # while it can be tried
            look(program, batch[0], batch[1] if len(batch) > 1 else None)
    parameters = [p for p in loss.vae.parameters() if p.requires_grad]
    step = compiled(LossAndGradient(loss), *batch)

    def gradient(*batch: Tensor) -> Outcome:
        value, terms, gradients = step(*batch)
        for parameter, grad in zip(parameters, gradients):
            parameter.grad = grad
        return value, terms, None

    return gradient


def worth_compiling(steps: int, objective: Objective, precision: str, on_cuda: bool) -> bool:
    """Whether to compile a training that nobody asked to: by its length, no clock is read."""
    cannot = objective.own_step or precision == "16-mixed"
    compiler = find_spec("triton") if on_cuda else which(os.environ.get("CXX", "g++"))
    return steps >= LONG and compiler is not None and not cannot


class LossAndGradient(nn.Module):
    """Loss, terms and gradient as one forward pass, which can be traced."""

    def __init__(self, loss: StepLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *batch: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Loss and terms of `StepLoss`, and the gradient of each trained parameter."""
        loss, terms, _ = self.loss(*batch)
        parameters = [p for p in self.loss.vae.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach(), terms, list(gradient)


class Monitor:
    """Sums the terms of an epoch's steps, and finds the first value that is not finite.

    On a CPU the loss and gradient of every step are checked before its update. Elsewhere a check
    waits for the device: the first bad loss stays there until `raise_if_bad`, which looks at the
    weights in place of gradients.

    Attributes:
        sums: The terms of the epoch's steps so far, float64; None before its first step.
    """

    def __init__(self, loss: StepLoss, device: torch.device) -> None:
        self.loss = loss
        self.every_step = device.type == "cpu"
        self.sums: Tensor | None = None
        self.bad = torch.full((), -1, device=device)  # the first step whose loss is not finite
        self.terms: Tensor | None = None  # of that step

    def add(
        self,
        step: int,
        loss: Tensor,
        terms: Tensor,
        parameters: Iterable[nn.Parameter] = (),
        norm: Tensor | None = None,
    ) -> None:
        """Adds the terms of a step, and checks its loss and the gradient of `parameters`.

        Raises:
            FloatingPointError: If the loss is not finite, or the gradient, or its norm; on a CPU.
        """
        self.sums = terms.double() if self.sums is None else self.sums + terms
        if not self.every_step:
            first = ~loss.isfinite() & (self.bad < 0)
            self.bad = torch.where(first, step, self.bad)
            self.terms = terms if self.terms is None else torch.where(first, terms, self.terms)
            return
        if not math.isfinite(loss.item()):
            raise self._loss_error(step, terms)
        gradients = (p.grad for p in parameters if p.grad is not None)
        total: Any = sum(map(torch.sum, gradients)) if norm is None else norm
        if not math.isfinite(total):
            named = self.loss.vae.named_parameters()
            bad = [n for n, p in named if p.grad is not None and not p.grad.isfinite().all()]
            names = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
            raise FloatingPointError(
                f"step {step}: the gradient of {names} is not finite, though the loss is; lower "
                "lr, or look for a function whose derivative is infinite"
            )

    def raise_if_bad(self, step: int, weights: Iterable[Tensor] = ()) -> None:
        """Raises a FloatingPointError if a loss or weight was not finite; waits for the device."""
        if self.every_step:
            return
        if self.terms is not None and int(self.bad) >= 0:
            raise self._loss_error(int(self.bad), self.terms)
        if not all(bool(weight.isfinite().all()) for weight in weights):
            raise FloatingPointError(
                f"step {step}: weights are not finite, though all losses were: a gradient was "
                "not; lower lr, or look for a function whose derivative is infinite"
            )

    def _loss_error(self, step: int, terms: Tensor) -> FloatingPointError:
        _, reconstruction, *kls = terms.isfinite().tolist()
        sites = [site for site, finite in zip(self.loss.latent, kls) if not finite]
        sites = sites if reconstruction else [*self.loss.observed, *sites]
        what = f"log density of site {', '.join(map(repr, sites))}" if sites else "objective"
        return FloatingPointError(
            f"step {step}: the {what} is not finite; lower lr, set clip_norm, or look for "
            "extreme data"
        )


def make_optimizer(
    spec: OptimizerSpec, module: nn.Module, lr: float, *, fused: bool = True
) -> Optimizer:
    """One optimiser of the parameters of `module` that require gradients; `spec` as in `fit`.

    Where class and device have torch's fused step, and `fused` is true, it is taken.

    Raises:
        ValueError: If the name or an option is unknown.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if callable(spec):
        return _made(spec(parameters), Optimizer, "optimizer")
    cls, options = _parse("optimizer", spec, OPTIMIZERS, parameters, lr=lr)
    weight = nn.Parameter(parameters[0].new_zeros(1, 1))
    weight.grad = torch.zeros_like(weight)
    with _options_of("optimizer", cls):
        cls([weight], **options).step()
    chosen = options.keys() & IMPLEMENTATIONS
    if fused and "fused" in inspect.signature(cls).parameters and not chosen:
        try:
            return cls(parameters, fused=True, **options)
        except RuntimeError:  # not on this device or for this type
            pass
    return cls(parameters, **options)


def restore(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads a state; the implementation stays that of `optimizer`, for its own device.

    Raises:
        LookupError: If the state is of other parameters.
        TypeError: If one of its tensors has another shape than its parameter.
    """
    own = optimizer.state_dict()["param_groups"]
    kept = (*IMPLEMENTATIONS, "params")
    groups = [
        loaded | {name: mine[name] for name in kept if name in mine}
        for loaded, mine in zip(state["param_groups"], own, strict=True)
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ours = type(optimizer) in OPTIMIZERS.values()  # others may keep what they like
    for index, values in state["state"].items() if ours else ():
        shape = parameters[index].shape
        for name, value in values.items():
            if isinstance(value, Tensor) and torch.broadcast_shapes(value.shape, shape) != shape:
                raise TypeError(f"{name} of the optimizer is {list(value.shape)}")
    optimizer.load_state_dict({**state, "param_groups": groups})


def replay(schedule: LRScheduler, rows: Iterable[dict[str, Any]]) -> None:
    """Takes a new schedule through the epochs of a history, to where it was after them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no step of the optimizer came before
        for row in rows:
            advance(schedule, row)


def make_schedule(
    spec: ScheduleSpec | None, optimizer: Optimizer, epochs: int
) -> LRScheduler | None:
    """A schedule of the learning rate, from a name, a dict or a callable as for optimisers.

    One that is named is tried for all epochs first: some end before.
    """
    if spec is None:
        return None
    if callable(spec):
        return _made(spec(optimizer), LRScheduler, "schedule")
    cls, options = _parse("schedule", spec, SCHEDULES, optimizer)
    groups = [{"params": [torch.zeros(1)]} for _ in optimizer.param_groups]
    trial = torch.optim.SGD(groups, momentum=0.9)
    with _options_of("schedule", cls):
        replay(cls(trial, **options), [{"elbo": 0.0, "validation_elbo": None}] * epochs)
    return cls(optimizer, **options)


@contextmanager
def _options_of(what: str, cls: type) -> Iterator[None]:
    """Makes of whatever torch raises of options, in a first step or before, one ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} {cls.__name__}: {error}; correct its init_args") from error


def advance(schedule: LRScheduler, row: dict[str, Any]) -> None:
    """One epoch further; ReduceLROnPlateau looks at the (validation) ELBO of its row.

    In its mode "min" it looks at minus the ELBO, so that either mode waits for a higher one.
    """
    if isinstance(schedule, ReduceLROnPlateau):
        elbo = row["elbo"] if row["validation_elbo"] is None else row["validation_elbo"]
        schedule.step(elbo if schedule.mode == "max" else -elbo)
    else:
        schedule.step()


def _parse(
    what: str, spec: Any, known: dict[str, type], *args: Any, **defaults: Any
) -> tuple[type, dict[str, Any]]:
    """The class that `spec` names, and its options; it takes `args` before them."""
    path, options = name_and_options(what, spec)
    name = path.rpartition(".")[2]
    if name not in known:
        raise ValueError(
            f"{what} {name!r} is unknown{closest(name, known)}: choose one of {', '.join(known)}"
        )
    cls, options = known[name], {**defaults, **options}
    signature = inspect.signature(cls)
    check_options(f"{what} {name}", options, list(signature.parameters)[len(args) :])
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        raise ValueError(f"{what} {name}: {error}; give it in init_args") from None
    return cls, options


def _made(result: Any, cls: type, what: str) -> Any:
    if not isinstance(result, cls):
        raise ValueError(
            f"the callable given as {what} must return a torch {cls.__name__}; "
            f"got {type(result).__name__}"
        )
    return result
