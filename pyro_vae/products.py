"""Products of float32 matrices on the CPU by oneDNN: as exact as torch's own, often faster.

Torch gives them to the BLAS that it was built with. On processors for which that was not
written, oneDNN needs half the time at full precision.

torch.set_float32_matmul_precision("medium") reaches oneDNN too. It was measured on a Zen 5: as
exact (4.2e-6 off float64, both, at 100 x 784 x 500) and as fast. It is not used here, for it
allows bfloat16 where a processor has units for it, changes the whole process, GPUs included,
cannot be put back as it was (torch's newer settings stay "ieee" where they were "none"), and
doubles the time of small products (100 x 37 x 41).
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

__all__ = ["linear", "products_by_onednn"]

LARGE = 2**22  # multiplications, below which calling oneDNN costs what it saves
LARGE_IN_GRAPH = 2**20  # the same where no Python runs around it
AVAILABLE = (
    platform.machine() in ("x86_64", "AMD64")  # elsewhere it was not measured
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b, as torch's own `linear`, for x [B, I], W [O, I] and b [O].

    By oneDNN where it helps: float32 matrices on a CPU, in torch's default precision.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.linear(x, weight, bias)
    large = x.numel() * len(weight) >= LARGE  # looked at first, for it takes least time
    if large and not _is_watched(x, weight, bias) and _helps(x, weight, bias):
        return _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return F.linear(x, weight, bias)


def products_by_onednn(graph: fx.GraphModule) -> None:
    """Puts oneDNN's products into a graph of torch's own operations, where they help."""
    aten, nodes = torch.ops.aten, graph.graph
    for node in nodes.find_nodes(op="call_function", target=aten.mm.default):
        _replace(nodes, node, *node.args)
    for node in nodes.find_nodes(op="call_function", target=aten.addmm.default):
        bias, a, b = node.args
        if not node.kwargs:
            _replace(nodes, node, a, b, bias)
    graph.recompile()


def _replace(nodes: fx.Graph, node: fx.Node, a: Any, b: Any, bias: Any = None) -> None:
    shift = None if bias is None else bias.meta["val"]
    if _helps(a.meta["val"], b.meta["val"].t(), shift, LARGE_IN_GRAPH):
        with nodes.inserting_before(node):
            a = _row_major(nodes, a)
            new = nodes.call_function(torch.ops.pyro_vae.product.default, (a, b, bias))
        new.meta = node.meta
        node.replace_all_uses_with(new)
        nodes.erase_node(node)


def _row_major(nodes: fx.Graph, a: fx.Node) -> fx.Node:
    """The matrix in the order that oneDNN would copy it to: what makes it can write it so."""
    if a.meta["val"].is_contiguous():
        return a
    order: Any = {"memory_format": torch.contiguous_format}
    copy = nodes.call_function(torch.ops.aten.clone.default, (a,), order)
    copy.meta["val"] = a.meta["val"].contiguous()
    return copy


def _helps(x: Tensor, weight: Tensor, bias: Tensor | None, least: int = LARGE) -> bool:
    """Whether these are large matrices, of the plain kind, to be multiplied in full precision."""
    return (
        AVAILABLE
        and x.ndim == weight.ndim == 2
        and x.shape[1] == weight.shape[1]
        and x.numel() * len(weight) >= least
        and (bias is None or bias.shape == weight.shape[:1])
        and all(map(_is_plain, (x, weight) if bias is None else (x, weight, bias)))
        and _in_full_precision()
    )


def _is_plain(tensor: Tensor) -> bool:
    on_cpu = tensor.device.type == "cpu" and tensor.layout == torch.strided
    return on_cpu and tensor.dtype == torch.float32


def _in_full_precision() -> bool:
    try:
        highest = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # one of torch's newer switches was used: it knows what to do
        return False
    return highest and torch._C._get_mkldnn_enabled()


def _is_watched(*tensors: Tensor | None) -> bool:
    """Whether something other than plain autograd looks at the operations."""
    return (
        has_torch_function(tensors)
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return torch.ops.pyro_vae.product(x, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return (
            linear(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            linear(grad.t(), x.t()) if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )


if not hasattr(torch.ops.pyro_vae, "product"):
    torch.library.define("pyro_vae::product", "(Tensor a, Tensor b, Tensor? bias) -> Tensor")


@torch.library.impl("pyro_vae::product", "CPU")
def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a b + bias [M, N]; the first factor must be row-major: the smaller one is put into order."""
    by_onednn = torch.ops.mkldnn._linear_pointwise.default
    bias = None if bias is None else bias.contiguous()
    if bias is None and not a.is_contiguous() and b.numel() + len(a) * b.shape[1] < a.numel():
        return by_onednn(b.t().contiguous(), _dense(a), None, "none", [], "").t().contiguous()
    return by_onednn(a.contiguous(), _dense(b.t()), bias, "none", [], "")


@torch.library.register_fake("pyro_vae::product")
def _shape_of_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _dense(matrix: Tensor) -> Tensor:
    """The matrix in row- or column-major order."""
    dense = matrix.is_contiguous() or matrix.t().is_contiguous()
    return matrix if dense else matrix.contiguous()
