"""Products of float32 matrices on the CPU by oneDNN, where that is as exact as torch's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

__all__ = ["fast_products"]

LARGE = 2**14  # entries of a matrix from which its products are faster
SWITCHED_OFF = ("none", "ieee")
EXACT = 1e-5  # of the largest entry of a product; bfloat16 is off by 1e-3


@contextmanager
def fast_products(weights: Iterable[Tensor]) -> Iterator[None]:
    """Has torch give products to oneDNN, if one of `weights` is large and oneDNN is exact.

    torch gives them to the BLAS that it was built with, which on some processors takes twice
    as long. `torch.backends.mkldnn.matmul.fp32_precision = "bf16"` has it call oneDNN, which
    computes in float32 unless the processor multiplies matrices of bfloat16: one product, once a
    process, shows which. Where it is not exact, or a user allows less already, nothing changes.
    """
    switch = getattr(torch.backends.mkldnn, "matmul", None)  # of torch 2.9 and later
    before = getattr(switch, "fp32_precision", None)
    large = any(w.ndim > 1 and w.numel() >= LARGE and w.device.type == "cpu" for w in weights)
    if switch is None or before not in SWITCHED_OFF or not (large and _is_exact()):
        yield
        return
    try:
        switch.fp32_precision = "bf16"
        yield
    finally:
        switch.fp32_precision = before


@cache
def _is_exact() -> bool:
    """Whether a product is one of float32 with the switch on."""
    switch = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009
    before = switch.fp32_precision
    a, b = torch.arange(2.0 * 2**16, device="cpu").sin().reshape(2, 2**8, 2**8)
    exact = a.double() @ b.double()
    try:
        switch.fp32_precision = "bf16"
        error = (a @ b - exact).abs().max()
    finally:
        switch.fp32_precision = before
    return bool(error < EXACT * exact.abs().max())
