"""Laws of every network."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from families import NETWORKS, name, network
from torch import Tensor

from pyro_vae.networks import MLP, Conv, ConvTranspose, Network, ResNet, ResNetTranspose

pytestmark = pytest.mark.usefixtures("float64")

each = pytest.mark.parametrize("cls", NETWORKS, ids=name)


def inputs(net: Network, *lead: int) -> Tensor:
    return torch.randn(*lead, *net.in_shape)


def normed(cls: type, **options: object) -> Network:
    """The network with batch norm, its running statistics away from their start."""
    net = network(cls, norm="batch", **options)
    y = (torch.randn(17, net.condition_dim),) if net.condition_dim else ()
    for _ in range(3):
        net(2 * inputs(net, 17) + 1, *y)
    return net.eval()


@each
@pytest.mark.parametrize("lead", [(), (5,), (3, 5), (2, 3, 5), (0,)])
def test_any_leading_dimensions(cls: type, lead: tuple[int, ...]) -> None:
    net = normed(cls)
    x = inputs(net, *lead)
    flat = net(x.reshape(-1, *net.in_shape))
    assert net(x).shape == (*lead, *net.out_shape)
    torch.testing.assert_close(net(x), flat.reshape(*lead, *net.out_shape))


@each
def test_rows_are_independent_in_eval_mode(cls: type) -> None:
    net = normed(cls)
    x = inputs(net, 5)
    changed = x.clone()
    changed[1:] = inputs(net, 4) * 10
    torch.testing.assert_close(net(x)[0], net(changed)[0])


@each
def test_batch_norm_is_an_option_and_not_a_default(cls: type) -> None:
    assert inspect.signature(cls).parameters["norm"].default is None
    assert not any("BatchNorm" in type(m).__name__ for m in network(cls).modules())
    assert any("BatchNorm" in type(m).__name__ for m in network(cls, norm="batch").modules())


@each
def test_every_parameter_gets_a_gradient(cls: type) -> None:
    net = network(cls, condition_dim=3)
    net(inputs(net, 7), torch.randn(7, 3)).pow(2).sum().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@each
def test_state_dict_gives_the_same_outputs(cls: type) -> None:
    net = normed(cls)
    other = network(cls, norm="batch").eval()
    x = inputs(net, 5)
    assert not torch.equal(net(x), other(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))


@each
def test_the_output_bias_is_the_networks_own(cls: type) -> None:
    net = network(cls)
    x = inputs(net, 3)
    before = net(x)
    shift = torch.randn(net.output_bias.shape)
    with torch.no_grad():
        net.output_bias.add_(shift)
    torch.testing.assert_close(net(x), before + shift.expand(net.out_shape))


@each
def test_the_output_depends_on_the_condition(cls: type) -> None:
    net = normed(cls, condition_dim=3)
    x, y = inputs(net, 5), torch.randn(5, 3)
    changed = y.clone()
    changed[0] += 1
    same = net(x, y) == net(x, changed)
    assert not same[0].all()
    assert same[1:].all()
    pairs = net(x.unsqueeze(1), y)  # every x with every y
    assert pairs.shape == (5, 5, *net.out_shape)
    torch.testing.assert_close(pairs.diagonal(0, 0, 1).movedim(-1, 0), net(x, y))
    torch.testing.assert_close(pairs[1, 2], net(x[1], y[2]))


@each
def test_what_sees_x_alone_is_run_once_for_all_conditions(cls: type) -> None:
    net = normed(cls, condition_dim=3)
    x, y = inputs(net, 5).requires_grad_(), torch.randn(2, 7, 5, 3)
    asked = [x, *net.parameters()]
    weights = torch.randn(2, 7, 5, *net.out_shape)
    rows: list[int] = []
    for part in net.modules():
        if isinstance(part, torch.nn.Conv2d) and len(net.in_shape) == 3:
            part.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    together = net(x, y)
    assert set(rows) <= {5}
    repeated = net(x.expand(2, 7, *x.shape), y)
    torch.testing.assert_close(together, repeated)
    slopes = (torch.autograd.grad((out * weights).sum(), asked) for out in (together, repeated))
    for a, b in zip(*slopes):
        torch.testing.assert_close(a, b)


@each
def test_a_missing_or_misshapen_input_is_refused(cls: type) -> None:
    net = network(cls, condition_dim=3)
    x = inputs(net, 5)
    with pytest.raises(ValueError, match="got none"):
        net(x)
    with pytest.raises(ValueError, match=r"condition y of shape \[\*, 3\]; got \[5, 4\]"):
        net(x, torch.randn(5, 4))
    with pytest.raises(ValueError, match=rf"{cls.__name__} takes input of shape"):
        net(x[..., :-1], torch.randn(5, 3))
    with pytest.raises(ValueError, match="in_shape must be .*at least 1"):
        cls((0, 7, 5), (2, 7, 5))


@each
def test_a_deep_copy_is_independent(cls: type) -> None:
    net = network(cls)
    x = inputs(net, 3)
    before = net(x)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.output_bias.add_(1)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("side", [(1, 1), (2, 3), (7, 5), (28, 28), (13, 32)])
@pytest.mark.parametrize(("down", "up"), [(Conv, ConvTranspose), (ResNet, ResNetTranspose)])
def test_images_of_any_size(down: type, up: type, side: tuple[int, int]) -> None:
    small = {"channels": (3, 2, 5)}
    assert down((2, *side), 3, **small)(torch.randn(3, 2, *side)).shape == (3, 3)
    assert up(3, (2, *side), **small)(torch.randn(3, 3)).shape == (3, 2, *side)


def test_no_hidden_layer_is_a_linear_map() -> None:
    net = MLP((2, 3), (5,), hidden=())
    x = torch.randn(7, 2, 3)
    truth = x.flatten(1) @ net.output.weight.T + net.output.bias
    torch.testing.assert_close(net(x), truth)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Conv(784, 3), "needs an image: in_shape"),
        (lambda: ConvTranspose(3, 784), "needs an image: out_shape"),
        (lambda: MLP(3, 5, activation="nope"), "activation 'nope' is unknown"),
        (lambda: MLP(3, 5, norm="nope"), "norm 'nope' is unknown"),
        (lambda: MLP(3, 5, (7, 0)), "hidden must be at least 1; got 0"),
        (lambda: Conv((1, 5, 5), 5, (3, -2)), "channels must be at least 1; got -2"),
        (lambda: ResNet((1, 5, 5), 5, ()), "channels must have at least one size"),
        (lambda: ResNetTranspose(3, (1, 5, 5), ()), "channels must have at least one size"),
        (lambda: Conv((1, 5, 5), 5, norm="layer"), "norm 'layer' does not fit images"),
    ],
)
def test_wrong_options_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
