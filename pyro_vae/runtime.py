"""Sets the state of the whole process for a while: generators, threads, precision, memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from threading import RLock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pyro_vae.arguments import check_whole

MAX_SMALL = 10_000_000  # multiplications in a layer from which a second thread pays
LARGE = 2**14  # entries of a matrix from which oneDNN's products are faster
FULL_PRECISION = ("none", "ieee")  # values of the switch that ask for products of full precision
MAX_ERROR = 1e-5  # as a share of a product's largest entry; that of bfloat16 is 1e-3
BLOCK_BYTES = 31 * 2**20  # bytes of a block; glibc adapts to blocks of up to 32 MiB

# fit and the estimators hold this lock while they change the state of the process, such as
# torch's generators and Pyro's handlers; other threads wait
process_lock = RLock()


@contextmanager
def forked(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Restores torch's generators for the CPU and `device` afterwards; seeds them if asked.

    Inside, this thread holds the lock `process_lock`. Generators of other devices are not touched:
    reading a CUDA generator's state initialises its device.
    """
    with process_lock, torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:
            seed_generators(device, seed)
        yield


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Turns autocast off, where it is on: not every kind of device has it."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def seed_generators(device: torch.device, seed: int) -> None:
    """Seeds torch's generators for the CPU and `device`, and no other."""
    torch.random.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def seed_of(*numbers: int) -> int:
    """Returns a seed below 2^64 mixed from whole numbers, such as a seed, a rank and a batch."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def epoch_order(num_data: int, seed: int, epoch: int) -> Tensor:
    """Returns the order of the rows in an epoch, a permutation of 0, ..., N - 1, int64 [N].

    It depends on the three arguments only, so a resumed run needs no saved state.

    Raises:
        ValueError: If the seed or the epoch is negative.
    """
    check_whole(0, seed=seed, epoch=epoch)
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(num_data))


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Makes torch use `number` threads of this process."""
    before = torch.get_num_threads()
    try:
        if number != before:
            torch.set_num_threads(number)
        yield
    finally:
        if number != before:
            torch.set_num_threads(before)


def is_small(parameters: Iterable[Tensor], rows: int) -> bool:
    """Returns whether a model of these parameters should run on one thread.

    A second thread saves a small model a fifth to a third of its time on an idle machine, but
    beside other work it makes small operations ten times as slow. A model is small if it has no
    convolutions, and the size of its largest weight times the rows of a step is below `MAX_SMALL`.
    """
    return all(p.ndim < 2 or (p.ndim == 2 and p.numel() * rows < MAX_SMALL) for p in parameters)


@contextmanager
def fast_products(weights: Iterable[Tensor]) -> Iterator[None]:
    """Makes torch use oneDNN for products, if one of `weights` is large and oneDNN is exact.

    Without it torch uses the BLAS that it was built with, which on some processors takes twice
    as long. `torch.backends.mkldnn.matmul.fp32_precision = "bf16"` makes torch call oneDNN, which
    computes in float32 unless the processor multiplies matrices of bfloat16: one product, once a
    process, shows which. If it is not exact, or the user has set the switch, nothing changes.
    """
    switch = getattr(torch.backends.mkldnn, "matmul", None)  # exists in torch 2.9 and later
    unset = getattr(switch, "fp32_precision", None) in FULL_PRECISION
    is_large = any(w.ndim > 1 and w.numel() >= LARGE and w.device.type == "cpu" for w in weights)
    with _onednn(switch) if unset and is_large and _is_exact() else nullcontext():
        yield


@contextmanager
def _onednn(switch: Any) -> Iterator[None]:
    before = switch.fp32_precision
    try:
        switch.fp32_precision = "bf16"
        yield
    finally:
        switch.fp32_precision = before


@cache
def _is_exact() -> bool:
    """Returns whether a product has the precision of float32 with the switch on."""
    a, b = torch.arange(2.0 * 2**16, device="cpu").sin().reshape(2, 2**8, 2**8)
    exact = a.double() @ b.double()
    with _onednn(getattr(torch.backends.mkldnn, "matmul")):  # noqa: B009
        error = (a @ b - exact).abs().max()
    return bool(error < MAX_ERROR * exact.abs().max())


def keep_memory() -> None:
    """Makes the C library keep up to 62 MB of freed memory for later operations.

    glibc returns freed memory to the system beyond twice the largest block that it has seen
    freed. With temporaries of a few MB, each operation then waits for new pages: a third of the
    time of an evaluation. So this frees one large block, which is never touched. With another
    allocator it has no effect.
    """
    torch.empty(BLOCK_BYTES, dtype=torch.uint8)


def check_fits(num_bytes: int, what: str) -> None:
    """Raises ValueError if `what` takes more memory than this machine has."""
    if not hasattr(os, "sysconf"):  # not on Windows
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > memory:
        raise ValueError(
            f"{what} would take {num_bytes / 2**30:,.0f} GiB of memory; this machine has "
            f"{memory / 2**30:,.0f}: ask for less"
        )


@contextmanager
def parameters_that_fit() -> Iterator[None]:
    """Raises ValueError if the parameters of modules made inside do not fit in memory."""
    total = 0

    def add(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal total
        total += 0 if parameter is None else parameter.nbytes
        check_fits(total, "the parameters")

    hook = register_module_parameter_registration_hook(add)
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("allocate", "overflow")):
            raise
        raise ValueError(
            "the parameters do not fit in memory: ask for fewer latents or narrower layers"
        ) from error
    finally:
        hook.remove()
