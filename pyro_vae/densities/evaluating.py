"""Running programs without leaving a trace: modes, RNG, gradients, Pyro's store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pyro
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vae.densities.programs import OwnParameters, Program
from pyro_vae.runtime import fast_products, forked

__all__ = ["evaluating"]


@contextmanager
def evaluating(*programs: Program, seed: int | None, device: torch.device) -> Iterator[None]:
    """Every module that runs inside is in eval mode, without gradients; all is put back after.

    Modules that a program is a method of are switched with all they hold. Those that plain
    functions reach are found as they run, by a hook before their forward pass, in this thread.

    Args:
        programs: The model and guide that will run.
        seed: Of what is drawn inside; None goes on from the current state.
        device: Where it is drawn.
    """
    store = pyro.get_param_store()
    owners = [p if isinstance(p, nn.Module) else getattr(p, "__self__", None) for p in programs]
    modules = [owner for owner in owners if isinstance(owner, nn.Module)]
    with (
        forked(device, seed),
        torch.no_grad(),
        _eval_mode(modules),
        fast_products(p for module in modules for p in module.parameters()),
        store.scope(store.get_state()),
        OwnParameters(),
    ):
        yield


@contextmanager
def _eval_mode(modules: list[nn.Module]) -> Iterator[None]:
    trained: list[nn.Module] = []
    thread = threading.get_ident()

    def switch(module: nn.Module, *_: Any) -> None:
        if module.training and threading.get_ident() == thread:
            trained.append(module)
            module.training = False

    for module in chain.from_iterable(owner.modules() for owner in modules):
        switch(module)
    hook = register_module_forward_pre_hook(switch)
    try:
        yield
    finally:
        hook.remove()
        for module in trained:
            module.training = True
