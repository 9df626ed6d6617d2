"""Products by oneDNN are torch's products, in value and in every derivative."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import pyro_vae.products
from pyro_vae.networks import MLP
from pyro_vae.networks.linear import Linear
from pyro_vae.products import linear, products_by_onednn

B, I, O = 211, 223, 227  # noqa: E741
NARROW = (7919, 3, 211)
available = pytest.mark.skipif(not pyro_vae.products.AVAILABLE, reason="torch without oneDNN")


def parts(b: int = B, i: int = I, o: int = O, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, W and b, all to be differentiated."""
    shapes = ((b, i), (o, i), (o,))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def exact(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of the results that oneDNN is asked for from now on."""
    seen: list[tuple[int, int]] = []
    real = torch.ops.mkldnn._linear_pointwise.default

    def spy(a: Tensor, w: Tensor, *rest: object) -> Tensor:
        seen.append((len(a), len(w)))
        return real(a, w, *rest)

    monkeypatch.setattr(torch.ops.mkldnn._linear_pointwise, "default", spy)
    return seen


@available
@pytest.mark.parametrize("sizes", [(B, I, O), NARROW, (2, 1500, 1511), (1511, 1500, 2)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_gradient(
    sizes: tuple[int, int, int], with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls(monkeypatch)
    x, w, b = parts(*sizes)
    inputs = [x, w, b] if with_bias else [x, w]
    y = linear(*inputs)
    slope = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, inputs, slope)]
    assert len(seen) == 3  # the value, and the slopes of x and W
    doubles = exact(inputs)
    expected_y = F.linear(*doubles)
    expected = [expected_y, *torch.autograd.grad(expected_y, doubles, slope.double())]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.is_contiguous()
        assert (one - other).norm() < 2e-6 * other.norm()


@available
def test_second_derivatives() -> None:
    inputs = parts()
    weight = torch.randn(B, O)

    def slope_of_slope(
        function: Callable[..., Tensor], inputs: list[Tensor]
    ) -> tuple[Tensor, ...]:
        y = (function(*inputs).tanh() * weight.to(inputs[0])).sum()
        slopes = torch.autograd.grad(y, inputs, create_graph=True)
        return torch.autograd.grad(sum((s**2).sum() for s in slopes), inputs)

    found = slope_of_slope(linear, inputs)
    expected = slope_of_slope(F.linear, exact(inputs))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


@available
def test_any_strides() -> None:
    base = torch.randn(2 * I, 2 * B)
    w = torch.randn(O, I)
    row = torch.randn(1, I)
    for x in (base[:I, :B].t(), base.t()[:B, ::2], base.t()[:B, I:], row.expand(B, I)):
        overlapping = torch.randn(O * 3 + I).as_strided((O, I), (3, 1))
        for weight in (w, w.t().contiguous().t(), torch.randn(O, 2 * I)[:, ::2], overlapping):
            found, expected = linear(x, weight), F.linear(x.double(), weight.double())
            assert (found - expected).norm() < 2e-6 * expected.norm()


@available
def test_a_slope_that_is_expanded() -> None:
    x, w, b = parts()
    found = torch.autograd.grad(linear(x, w, b).sum(), (x, w, b))
    expected = torch.autograd.grad(F.linear(x, w, b).sum(), (x, w, b))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 2e-6 * other.norm()


@available
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_where_it_stays_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    x, w, b = parts()
    linear(*parts(dtype=torch.float64))
    linear(*parts(5, 7, 11))
    linear(x.unsqueeze(0), w, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w, b).dtype == torch.bfloat16
    torch.func.vmap(lambda row: linear(x * row, w, b))(torch.ones(3, 1, I))
    torch.func.jvp(lambda x: linear(x, w, b), (x,), (x,))
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(linear(forward_ad.make_dual(x.detach(), x), w, b)).tangent
    torch.testing.assert_close(slope, x @ w.t())
    assert "product" not in make_fx(linear)(x, w, b).code
    assert seen == []
    linear(x, w, b)
    assert seen == [(B, O)]


@available
@pytest.mark.parametrize(
    "bias", [torch.ones(1).expand(O), torch.arange(2.0 * O)[::2], torch.rand(O, 3)[:, 0]]
)
def test_a_bias_of_any_strides(bias: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    x, w, _ = (p.detach() for p in parts())
    graph = make_fx(lambda x, w, b: torch.addmm(b, x, w.t()), tracing_mode="fake")(x, w, bias)
    products_by_onednn(graph)
    expected = F.linear(x.double(), w.double(), bias.double())
    for found in (linear(x, w, bias), graph(x, w, bias)):
        assert (found - expected).norm() < 2e-6 * expected.norm()
    assert len(seen) == 2


@available
def test_only_what_a_derivative_needs_is_kept() -> None:
    x, w, b = parts()
    first, second = linear(x.detach(), w, b).sum(), linear(x.detach(), w, b).tanh().sum()
    first.backward()
    with torch.no_grad():
        w.sub_(w.grad)  # type: ignore[arg-type]
    second.backward()  # its slope needs x alone
    h = x * 1
    y = linear(h, w.detach(), b.detach())
    h += 1
    y.sum().backward()  # its slope needs w alone
    torch.testing.assert_close(x.grad, w.detach().sum(0).expand(B, I), atol=1e-4, rtol=1e-4)
    y = linear(h, w, b)
    h += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@available
def test_other_ways_to_run_it_see_torchs_own() -> None:
    x, w, b = (p.detach() for p in parts())
    layer = Linear(I, O)
    with FlopCounterMode(display=False) as counter:
        linear(x, w, b)
    assert counter.get_total_flops() == 2 * B * I * O
    code = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(code(x), F.linear(x, layer.weight, layer.bias))
    rows = {0: torch.export.Dim("rows", max=10_000)}
    graph = torch.export.export(layer, (x,), dynamic_shapes=(rows,)).module()
    torch.testing.assert_close(graph(x[:3]), F.linear(x[:3], layer.weight, layer.bias))
    sparse = linear(x.to_sparse(), w, b)
    torch.testing.assert_close(sparse, F.linear(x, w, b), atol=1e-4, rtol=1e-4)
    for bias in (torch.randn(1), torch.randn(1, O), torch.tensor(0.5)):
        assert torch.equal(linear(x, w, bias), F.linear(x, w, bias))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(x[:, 1:])


@available
def test_torchs_switches_are_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises() -> str:
        raise RuntimeError("mix of the legacy and new APIs")  # as after the newer switches

    seen = calls(monkeypatch)
    torch._C._set_mkldnn_enabled(False)
    try:
        linear(*parts())
    finally:
        torch._C._set_mkldnn_enabled(True)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", raises)
    linear(*parts())
    assert seen == []


@available
def test_a_wish_for_less_precision_is_torchs_to_fulfil(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        linear(*parts())
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == []


def test_the_layer_is_torchs_own_in_all_else() -> None:
    torch.manual_seed(0)
    ours = Linear(I, O)
    torch.manual_seed(0)
    theirs = nn.Linear(I, O)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    x = torch.randn(B, I)
    for layer in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(layer(x), theirs(x))


def test_the_networks_have_it() -> None:
    assert type(MLP(I, O).output) is Linear
    assert isinstance(MLP(I, O).hidden[0], Linear)


@available
def test_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def operations(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        scaled = torch.addmm(b, x, w.t(), beta=2)
        return torch.addmm(b, x, w.t()), scaled, g @ w, g.t() @ x, x[:3] @ w.t()

    inputs = [*(p.detach() for p in parts()), torch.randn(B, O)]
    expected = operations(*inputs)
    graph = make_fx(operations, tracing_mode="fake")(*inputs)
    products_by_onednn(graph)
    seen = calls(monkeypatch)
    found = graph(*inputs)
    assert seen == [(B, O), (B, I), (O, I)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


@available
def test_a_graph_in_double_precision_is_left_alone() -> None:
    x, w, _ = (p.detach() for p in parts(dtype=torch.float64))
    graph = make_fx(lambda x, w: x @ w.t(), tracing_mode="fake")(x, w)
    before = graph.code
    products_by_onednn(graph)
    assert graph.code == before
