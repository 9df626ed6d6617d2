"""Traces a module's forward pass once through Pyro's handlers, and compiles it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten


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
        CannotCompile: If the pass reads a number from a tensor, or cannot be traced.
    """

    def __init__(self, module: nn.Module, *inputs: Tensor) -> None:
        parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        trained = {name for name, p in parameters.items() if p.requires_grad}
        names = [*parameters, *buffers]
        self.state = [*parameters.values(), *buffers.values()]

        def operations(*leaves: Tensor) -> list[Any]:
            state = dict(zip(names, leaves))
            state |= {name: state[name].detach().requires_grad_() for name in trained}
            result = functional_call(module, state, leaves[len(names) :])
            outputs, self.output_spec = tree_flatten(result)
            return outputs

        store = pyro.get_param_store()
        with (
            _one_line_errors("traced"),
            pyro.validation_enabled(False),
            store.scope(store.get_state()),
        ):
            trace = make_fx(operations, tracing_mode="fake", _allow_non_fake_inputs=True)
            self.graph = trace(*self.state, *_contiguous(inputs))
        for stray in self.graph.parameters() if torch.is_grad_enabled() else ():
            raise CannotCompile(f"a parameter {list(stray.shape)} lies outside the module")
        self.code: Callable[..., Any] = self.graph

    def __call__(self, *inputs: Tensor) -> Any:
        """Returns what the forward pass returns, without gradients."""
        with torch.no_grad():
            outputs = self.code(*self.state, *_contiguous(inputs))
        return tree_unflatten(list(outputs), self.output_spec)


def compiled(module: nn.Module, *inputs: Tensor) -> Traced:
    """Compiles the forward pass of `module` by inductor, for inputs of these shapes.

    Arguments and errors are those of `Traced`; a C++ compiler is needed as well. Costs 5 to 20
    seconds, less where inductor finds its earlier work on disk.
    """
    traced = Traced(module, *inputs)
    from torch._inductor import compile as by_inductor

    with _one_line_errors("compiled"), _hide_warnings(), torch.no_grad():
        # fallback_random: numbers from torch's generators, not the compiler's own
        options = {"fallback_random": True}
        traced.code = by_inductor(
            traced.graph, [*traced.state, *_contiguous(inputs)], options=options
        )
    return traced


def _contiguous(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns the inputs in row-major order: code is compiled for one order in memory."""
    return [part.contiguous() for part in inputs]


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    try:
        yield
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
