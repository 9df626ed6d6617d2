"""Creates optimisers and learning rate schedules by their names in torch, and restores them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae.arguments import check_options, closest, name_and_options

OptimizerSpec = str | dict[str, Any] | Callable[[list[nn.Parameter]], Optimizer]
ScheduleSpec = str | dict[str, Any] | Callable[[Optimizer], LRScheduler]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type)
    and issubclass(cls, Optimizer)
    and name not in ("Optimizer", "LBFGS", "Muon", "SparseAdam")  # need closures, matrices, ...
}
SCHEDULES: dict[str, type[LRScheduler]] = {
    name: cls
    for name, cls in vars(lr_scheduler).items()
    if isinstance(cls, type)
    and issubclass(cls, LRScheduler)
    and name not in ("LRScheduler", "SequentialLR", "ChainedScheduler")  # base, combinations
    and not name.startswith("_")
}
IMPLEMENTATIONS = ("fused", "foreach", "differentiable", "capturable")  # ways to compute a step


def make_optimizer(
    spec: OptimizerSpec, module: nn.Module, lr: float, *, fused: bool = True
) -> Optimizer:
    """Creates an optimiser of the parameters that require gradients; see `fit` for `spec`.

    torch's fused step is used if `fused` is true and the class has one for the device.

    Raises:
        ValueError: If the name or an option is unknown.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if callable(spec):
        return _check_result(spec(parameters), Optimizer, "optimizer")
    cls, options = _parse("optimizer", spec, OPTIMIZERS, parameters, lr=lr)
    weight = nn.Parameter(parameters[0].new_zeros(1, 1))
    weight.grad = torch.zeros_like(weight)
    with _option_errors("optimizer", cls):
        cls([weight], **options).step()
    implementation = options.keys() & IMPLEMENTATIONS
    if fused and "fused" in inspect.signature(cls).parameters and not implementation:
        try:
            return cls(parameters, fused=True, **options)
        except RuntimeError:  # there is no fused step on this device or for this type
            pass
    return cls(parameters, **options)


def restore(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads a state into an optimiser, whose implementation (such as fused) stays its own.

    Raises:
        LookupError: If the state is that of other parameters.
        TypeError: If one of its tensors has another shape than its parameter.
    """
    own_groups = optimizer.state_dict()["param_groups"]
    kept_options = (*IMPLEMENTATIONS, "params")
    groups = [
        loaded | {name: own[name] for name in kept_options if name in own}
        for loaded, own in zip(state["param_groups"], own_groups, strict=True)
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    is_from_torch = type(optimizer) in OPTIMIZERS.values()  # other classes may keep any state
    for index, values in state["state"].items() if is_from_torch else ():
        shape = parameters[index].shape
        for name, value in values.items():
            if isinstance(value, Tensor) and torch.broadcast_shapes(value.shape, shape) != shape:
                raise TypeError(f"{name} of the optimizer is {list(value.shape)}")
    optimizer.load_state_dict({**state, "param_groups": groups})


def replay(schedule: LRScheduler, rows: Iterable[dict[str, Any]]) -> None:
    """Steps a new schedule through the epochs of a history, to its state at their end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the optimiser made no step
        for row in rows:
            advance(schedule, row)


def make_schedule(
    spec: ScheduleSpec | None, optimizer: Optimizer, epochs: int
) -> LRScheduler | None:
    """Creates a schedule of the learning rate from a name, a dict or a callable, as in `fit`.

    A named schedule is first tried for all epochs, since some raise an error at their end.
    """
    if spec is None:
        return None
    if callable(spec):
        return _check_result(spec(optimizer), LRScheduler, "schedule")
    cls, options = _parse("schedule", spec, SCHEDULES, optimizer)
    groups = [{"params": [torch.zeros(1)]} for _ in optimizer.param_groups]
    trial = torch.optim.SGD(groups, momentum=0.9)
    with _option_errors("schedule", cls):
        replay(cls(trial, **options), [{"elbo": 0.0, "validation_elbo": None}] * epochs)
    return cls(optimizer, **options)


@contextmanager
def _option_errors(what: str, cls: type) -> Iterator[None]:
    """Turns any error that torch raises about the options into a ValueError that names `cls`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} {cls.__name__}: {error}; correct its init_args") from error


def advance(schedule: LRScheduler, row: dict[str, Any]) -> None:
    """Steps a schedule by one epoch; ReduceLROnPlateau is given the (validation) ELBO of `row`.

    In its mode "min" it is given minus the ELBO, so that both modes wait for a higher ELBO.
    """
    if isinstance(schedule, ReduceLROnPlateau):
        elbo = row["elbo"] if row["validation_elbo"] is None else row["validation_elbo"]
        schedule.step(elbo if schedule.mode == "max" else -elbo)
    else:
        schedule.step()


def _parse(
    what: str, spec: Any, known: dict[str, type], *args: Any, **defaults: Any
) -> tuple[type, dict[str, Any]]:
    """Returns the class that `spec` names and its options, which follow the arguments `args`."""
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


def _check_result(result: Any, cls: type, what: str) -> Any:
    if not isinstance(result, cls):
        raise ValueError(
            f"the callable given as {what} must return a torch {cls.__name__}; "
            f"got {type(result).__name__}"
        )
    return result
