"""Traces a module's forward pass once through Pyro's handlers; compiles what it traced."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

aten = torch.ops.aten
VIEWS = {
    *(aten.alias.default, aten.detach.default, aten.expand.default, aten.permute.default),
    *(aten.squeeze.dim, aten.t.default, aten.unsqueeze.default, aten.view.default),
}


class CannotCompile(RuntimeError):
    """A forward pass cannot be traced or compiled; the message says why in one line."""


class Traced:
    """The tensor operations of a forward pass, without the Python around them.

    Pyro's handlers, the modules and the gradients that the pass takes are traced once, with fake
    tensors. Parameters and buffers are read at each call, so changed weights and schedules need
    no new trace, and buffers that the pass changes are changed. Noise is drawn at each call from
    torch's generators, in the order of the pass itself.

    Args:
        module: A module whose forward takes tensors and returns a tree of tensors.
        inputs: Tensors of the shapes and types of later calls.

    Attributes:
        graph: The operations, as a torch.fx module of parameters, buffers and inputs.

    Raises:
        CannotCompile: If the pass reads a number from a tensor, sets an attribute of a module,
            or cannot be traced.
    """

    def __init__(self, module: nn.Module, *inputs: Tensor) -> None:
        # each place of a tensor, once if its module has two names; and each tensor once
        places = {
            name: tensor
            for prefix, part in module.named_modules()
            for named in (part.named_parameters, part.named_buffers)
            for name, tensor in named(prefix, recurse=False, remove_duplicate=False)
        }
        self.state = list(dict.fromkeys(places.values()))

        def operations(*leaves: Tensor) -> list[Any]:
            leaf_of = {
                tensor: leaf.detach().requires_grad_() if tensor.requires_grad else leaf
                for tensor, leaf in zip(self.state, leaves)
            }
            state = {name: leaf_of[tensor] for name, tensor in places.items()}
            batch = leaves[len(self.state) :]
            result = functional_call(module, state, batch, tie_weights=False)
            outputs, self.output_spec = tree_flatten(result)
            return outputs

        store = pyro.get_param_store()
        with (
            one_line_errors("traced"),
            _unchanged(module),
            pyro.validation_enabled(False),
            store.scope(store.get_state()),
        ):
            trace = make_fx(operations, tracing_mode="fake", _allow_non_fake_inputs=True)
            self.graph = trace(*self.state, *_contiguous(inputs))
        _skip_views(self.graph)
        for stray in self.graph.parameters() if torch.is_grad_enabled() else ():
            raise CannotCompile(f"a parameter {list(stray.shape)} lies outside the module")
        self.code: Callable[..., Any] = self.graph

    def compile(self, *inputs: Tensor) -> None:
        """Compiles the operations by inductor, for inputs of these shapes.

        Costs 5 to 20 seconds, less where inductor finds its earlier work on disk. Raises
        CannotCompile where inductor fails, or finds no C++ compiler.
        """
        from torch._inductor import compile as by_inductor

        with one_line_errors("compiled"), _hide_warnings(), torch.no_grad():
            # fallback_random: numbers from torch's generators, not the compiler's own
            options = {"fallback_random": True}
            self.code = by_inductor(
                self.graph, [*self.state, *_contiguous(inputs)], options=options
            )

    def __call__(self, *inputs: Tensor) -> Any:
        """Returns what the forward pass returns, without gradients."""
        with torch.no_grad():
            outputs = self.code(*self.state, *_contiguous(inputs))
        return tree_unflatten(list(outputs), self.output_spec)


def compiled(module: nn.Module, *inputs: Tensor) -> Traced:
    """Traces and compiles a forward pass; arguments and errors are those of `Traced`."""
    traced = Traced(module, *inputs)
    traced.compile(*inputs)
    return traced


def _skip_views(graph: GraphModule) -> None:
    """Replaces views by earlier tensors of the same layout, so that there are fewer calls."""

    def layout(node: Node) -> tuple[Any, ...]:
        value = node.meta["val"]
        return value.shape, value.stride(), value.storage_offset()

    for node in graph.graph.nodes:
        source = node
        while source.target in VIEWS:
            source = source.args[0]
            if layout(source) == layout(node):  # an output keeps its view: it is not the input
                node.replace_all_uses_with(source, lambda user: user.op != "output")
                break
    for node in reversed(graph.graph.nodes):
        if node.target in VIEWS and not node.users:
            graph.graph.erase_node(node)
    graph.recompile()


def _contiguous(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns the inputs in row-major order: code is compiled for one order in memory."""
    return [part.contiguous() for part in inputs]


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Restores the attributes of modules, and their lists and dicts, as they were before a trace.

    A trace sets fake tensors, which hold no numbers.

    Raises:
        CannotCompile: If the pass sets an attribute or entry. The traced operations would not.
    """
    holders: list[tuple[str, Any]] = [(type(m).__name__, vars(m)) for m in module.modules()]
    for owner, attributes in holders[:]:
        held = [value for value in attributes.values() if isinstance(value, list | dict)]
        holders += [(owner, value) for value in held]
    before = [(owner, holder, copy(holder)) for owner, holder in holders]
    plain = [
        v for _, values in holders for v in _entries(values).values() if isinstance(v, Tensor)
    ]
    try:
        with numbers_kept(plain):
            yield
        for owner, holder, old in before:
            known = _entries(old)
            for name, value in _entries(holder).items():
                # torch's recurrent networks renew the lists of their weights
                if value is not known.get(name) and not isinstance(value, list):
                    raise CannotCompile(f"it sets the attribute or entry {name} of {owner}")
    finally:
        for _, holder, old in before:
            holder.clear()
            (holder.extend if isinstance(holder, list) else holder.update)(old)


def _entries(holder: list[Any] | dict[Any, Any]) -> dict[Any, Any]:
    return dict(enumerate(holder)) if isinstance(holder, list) else holder


@contextmanager
def numbers_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restores the numbers of tensors that a block changes."""
    before = [(tensor.detach(), tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, numbers in before:
            if not torch.equal(tensor, numbers):  # an expanded tensor cannot be written
                tensor.copy_(numbers)


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Raises CannotCompile for what a block raises; its message says that `what` failed."""
    try:
        yield
    except CannotCompile:
        raise
    except Exception as error:
        text = " ".join(str(error).strip().splitlines()[:1])
        raise CannotCompile(f"it cannot be {what}: {type(error).__name__}: {text}") from error


@contextmanager
def _hide_warnings() -> Iterator[None]:
    """Hides inductor's remarks on machines that have a CUDA compiler but no GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
