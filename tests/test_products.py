"""Products by oneDNN are as exact as torch's own; the switch is left as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pyro_vae import runtime
from pyro_vae.densities import evaluating
from pyro_vae.networks import MLP
from pyro_vae.runtime import fast_products

B, I, O = 211, 223, 227  # noqa: E741
switch = getattr(torch.backends.mkldnn, "matmul", None)
available = pytest.mark.skipif(
    switch is None or not runtime._is_exact(), reason="oneDNN is not asked for here"
)
CPU = torch.device("cpu")


@pytest.fixture(params=["none", "ieee"])
def before(request: pytest.FixtureRequest) -> Iterator[str]:
    """What the switch is set to outside."""
    assert switch is not None
    earlier, switch.fp32_precision = switch.fp32_precision, request.param
    yield request.param
    switch.fp32_precision = earlier


@available
def test_values_and_gradients(before: str) -> None:
    x, w = torch.randn(B, I, requires_grad=True), torch.randn(I, O, requires_grad=True)
    slope = torch.randn(B, O)
    with fast_products([w]):
        found = x @ w, *torch.autograd.grad(x @ w, (x, w), slope)
    a, b, g = (t.detach().double() for t in (x, w, slope))
    for one, other in zip(found, (a @ b, g @ b.t(), a.t() @ g), strict=True):
        assert (one - other).norm() < 2e-6 * other.norm()


@available
def test_the_switch_is_put_back(before: str) -> None:
    def seen() -> str:
        assert switch is not None
        return switch.fp32_precision

    large = MLP(I, O).requires_grad_(False)
    with evaluating(large, seed=None, device=CPU):
        assert seen() == "bf16"
        with evaluating(large, seed=None, device=CPU):
            assert seen() == "bf16"
        assert seen() == "bf16"
    assert seen() == before
    with evaluating(MLP(7, 5, (11,)), seed=None, device=CPU):
        assert seen() == before
    with pytest.raises(ZeroDivisionError), fast_products(large.parameters()):
        _ = 1 / 0
    assert seen() == before


@available
def test_what_a_user_has_set_stays() -> None:
    assert switch is not None
    earlier, switch.fp32_precision = switch.fp32_precision, "tf32"
    try:
        with fast_products([torch.zeros(B, I)]):
            assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = earlier


@available
def test_a_processor_that_rounds_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    assert switch is not None
    a, b = torch.randn(2, B, B)
    off = ((a.bfloat16() @ b.bfloat16()).double() - a.double() @ b.double()).abs().max()
    assert off > 10 * runtime.MAX_ERROR * (a @ b).abs().max()
    monkeypatch.setattr(runtime, "MAX_ERROR", 1e-9)
    assert not runtime._is_exact.__wrapped__()
    monkeypatch.setattr(runtime, "_is_exact", lambda: False)
    with fast_products([torch.zeros(B, I)]):
        assert switch.fp32_precision == before


def test_older_versions_of_torch_have_no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace())
    seen: list[Tensor] = []
    with fast_products([torch.zeros(B, I)]):
        seen.append(torch.ones(2, 3) @ torch.ones(3, 2))
    assert seen
