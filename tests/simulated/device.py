"""A device of its own, simulated: what a GPU refuses is refused, and what it waits for is counted.

Tensors of the device "sim" keep their numbers on the CPU, hidden. An operation on them runs there,
unless it mixes devices. Noise comes from the CPU's generator: results are those of the CPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

__all__ = ["DEVICE", "Simulation", "hidden", "reads"]


class Backend(_DummyBackendModule):
    """What torch asks of a device's module when generators are forked: nothing is kept here."""

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *_: Any) -> None:
        pass


_setup_privateuseone_for_python_backend("sim", backend_module=Backend())
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="sim") goes through here
torch.autograd.set_multithreading_enabled(False)

aten = torch.ops.aten
DEVICE = torch.device("sim:0")
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
READS = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._linalg_check_errors.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
)
reads: Counter[str] = Counter()  # operations for which the host waits


class Simulated(Tensor):
    """A tensor on the device; `hidden` holds its numbers."""

    hidden: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: Any, numbers: Tensor, requires_grad: bool = False) -> Simulated:
        made = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        made.hidden = numbers
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        reads["tolist"] += 1
        return self.hidden.tolist()

    def quantile(self, q: Tensor, dim: int) -> Tensor:  # changes shapes in place inside
        assert isinstance(q, Simulated)
        return Simulated(self.hidden.quantile(q.hidden, dim))

    def data_ptr(self) -> int:
        return self.hidden.data_ptr()

    def untyped_storage(self) -> Any:
        return self.hidden.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.hidden.__reduce_ex__(protocol)


class Simulation(TorchDispatchMode):
    """Inside, the device is there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation, on the device if it is asked for there or an argument lies there."""
    tensors = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
    there = [part for part in tensors if isinstance(part, Simulated)]
    device = kwargs.get("device")
    made_there = device is not None and torch.device(device).type == "sim"
    if not there and not made_there:
        return func(*args, **kwargs)
    if func in READS:
        reads[str(func)] += 1
    if made_there and not there and tensors or func is aten.copy_.default and len(there) == 1:
        reads["from the CPU, or to it"] += 1
    if func not in COPIES:
        refuse_mixed(func, args, [part for part in tensors if not isinstance(part, Simulated)])
    leaves = func is aten._to_copy.default and device is not None and not made_there
    if leaves or (func is aten.copy_.default and not isinstance(args[0], Simulated)):
        reads["from the CPU, or to it"] += leaves
        out = func(*tree_map(hidden, args), **tree_map(hidden, kwargs))
        return out if leaves else args[0]
    if made_there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*tree_map(hidden, args), **tree_map(hidden, kwargs))
    known = {id(part.hidden): part for part in there}  # in-place operations return their argument
    return tree_map(lambda part: wrapped(part, known), out)


def refuse_mixed(func: Any, args: Any, others: list[Tensor]) -> None:
    """As CUDA does: only numbers of no dimension, and indices, may lie on the CPU."""
    if func in INDEXED and isinstance(args[0], Simulated):
        masks = any(part is not None and part.dtype == torch.bool for part in args[1])
        if others or masks:
            reads["index by a mask, or from the CPU"] += 1
    elif any(part.ndim for part in others):
        raise RuntimeError(f"expected all tensors to be on the same device: {func}")


def hidden(value: Any) -> Any:
    """The numbers of a tensor of the device; anything else as it is."""
    return value.hidden if isinstance(value, Simulated) else value


def wrapped(value: Any, known: dict[int, Simulated]) -> Any:
    """A tensor of the device for its numbers, the same for the same."""
    return known.get(id(value), Simulated(value)) if isinstance(value, Tensor) else value
