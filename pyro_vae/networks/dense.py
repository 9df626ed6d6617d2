"""The base class of networks (shapes, leading dimensions, conditioning), and dense networks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pyro_vae.arguments import as_shape, check_whole

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
}
NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class Network(nn.Module):
    """A map from a tensor [*S, *in_shape] to raw parameters [*S, *out_shape].

    A subclass builds its layers in `__init__` and says in `body` what they do to one flat
    batch; any leading dimensions `*S`, particles included, are flattened into it once.
    See `MLP` for an example.

    Args:
        in_shape: Shape of one input, an int or a tuple.
        out_shape: Shape of one output.
        condition_dim: Length of the vector `y` that the output also depends on; 0 for none.
        widths: Sizes of layers, by the name of the option that sets them.

    Attributes:
        repeats: Whether `body` gets a row of x for each row of `y`. If not, `y` may have R times
            as many rows as x, [R * B, condition_dim], so that layers that see x alone run once.
    """

    repeats: ClassVar[bool] = True
    output: Any

    def __init__(
        self,
        in_shape: int | tuple[int, ...],
        out_shape: int | tuple[int, ...],
        condition_dim: int,
        **widths: Sequence[int],
    ) -> None:
        super().__init__()
        self.in_shape = as_shape("in_shape", in_shape)
        self.out_shape = as_shape("out_shape", out_shape)
        check_whole(0, condition_dim=condition_dim)
        for name, sizes in widths.items():
            if not isinstance(sizes, tuple | list):
                raise ValueError(f"{name} must be a list, such as (300, 300); got {sizes!r}")
            if sizes:
                as_shape(name, sizes)
        self.condition_dim = condition_dim

    @abstractmethod
    def body(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the outputs of one flat batch `x` [B, *in_shape] and `y` [B, condition_dim]."""

    @property
    def output_bias(self) -> Tensor:
        """Bias of the last layer, `output`, as a view that broadcasts to `out_shape`."""
        bias = self.output.bias  # a convolution has one for each channel
        return bias.view(self.out_shape if isinstance(self.output, nn.Linear) else (-1, 1, 1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Returns raw parameters [*S, *out_shape] of `x` [*S, *in_shape], `y` [*S, condition_dim].

        Raises:
            ValueError: If the shape of `x` or `y` is not the declared one.
        """
        x_lead = self._leading_shape(x, self.in_shape, "input")
        if not self.condition_dim:
            flat = x.reshape(-1, *self.in_shape)
            return self.body(flat, x.new_empty(len(flat), 0)).reshape(*x_lead, *self.out_shape)
        if y is None:
            raise ValueError(
                f"{type(self).__name__} is conditioned on a vector y of length "
                f"{self.condition_dim}; got none: pass y to model and guide"
            )
        y_lead = self._leading_shape(y, (self.condition_dim,), "condition y")
        try:
            lead = torch.broadcast_shapes(x_lead, y_lead)
        except RuntimeError:
            raise ValueError(
                f"y must have a row for each of the input: {list(x_lead)}; got {list(y_lead)}"
            ) from None
        if self.repeats or x_lead != lead[len(lead) - len(x_lead) :]:
            x = x.expand(*lead, *self.in_shape)
        x = x.reshape(-1, *self.in_shape)
        y = y.expand(*lead, self.condition_dim).reshape(-1, self.condition_dim)
        return self.body(x, y.to(x.dtype)).reshape(*lead, *self.out_shape)

    def _leading_shape(self, x: Tensor, event: tuple[int, ...], what: str) -> torch.Size:
        if x.shape[x.ndim - len(event) :] != event:
            raise ValueError(
                f"{type(self).__name__} takes {what} of shape [*, {', '.join(map(str, event))}]; "
                f"got {list(x.shape)}"
            )
        return x.shape[: x.ndim - len(event)]


class MLP(Network):
    """Dense layers with an activation, then a linear layer.

    Args:
        in_shape: Shape of one input.
        out_shape: Shape of one output.
        hidden: Widths of the hidden layers; () for a linear map.
        activation: "tanh", "relu", "leaky_relu", "elu", "softplus" or "gelu".
        condition_dim: Length of the vector `y`, joined to the input.
        norm: None, "batch" or "layer", before each activation.
    """

    repeats = False

    def __init__(
        self,
        in_shape: int | tuple[int, ...],
        out_shape: int | tuple[int, ...],
        hidden: tuple[int, ...] = (500,),
        activation: str = "tanh",
        condition_dim: int = 0,
        norm: str | None = None,
    ) -> None:
        super().__init__(in_shape, out_shape, condition_dim, hidden=hidden)
        sizes = (prod(self.in_shape) + condition_dim, *hidden)
        self.hidden = nn.Sequential(*dense_layers(sizes, activation, norm))
        self.output = nn.Linear(sizes[-1], prod(self.out_shape))

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        """Applies dense layers to the flattened input and `y`."""
        return apply_layers([*self.hidden, self.output], x, y)


class GatedMLP(Network):
    r"""Dense layers :math:`(A x + a) \odot \sigma(B x + b)`, then a linear layer.

    Args:
        in_shape: Shape of one input.
        out_shape: Shape of one output.
        hidden: Widths of the gated layers.
        condition_dim: Length of the vector `y`, joined to the input.
        norm: None, "batch" or "layer", before each gate.

    References:
        Dauphin et al. Language modeling with gated convolutional networks. 2017.
        Tomczak and Welling. VAE with a VampPrior. 2018.
    """

    repeats = False

    def __init__(
        self,
        in_shape: int | tuple[int, ...],
        out_shape: int | tuple[int, ...],
        hidden: tuple[int, ...] = (300, 300),
        condition_dim: int = 0,
        norm: str | None = None,
    ) -> None:
        super().__init__(in_shape, out_shape, condition_dim, hidden=hidden)
        sizes = (prod(self.in_shape) + condition_dim, *hidden)
        layers: list[nn.Module] = []
        for i, o in zip(sizes, sizes[1:]):
            layers += [nn.Linear(i, 2 * o), *norm_layers(norm, 2 * o), nn.GLU(-1)]
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear(sizes[-1], prod(self.out_shape))

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        """Applies gated layers to the flattened input and `y`."""
        return apply_layers([*self.hidden, self.output], x, y)


def activation_layer(name: str) -> nn.Module:
    """Returns the activation called `name`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; choose one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def apply_layers(layers: Sequence[nn.Module], x: Tensor, y: Tensor) -> Tensor:
    """Applies layers, the first linear, to `x` [B, *E] flattened, joined with `y` [R * B, C]."""
    first: Any = layers[0]
    x = x.flatten(1)
    if len(y) == len(x):
        h = first(torch.cat([x, y], -1) if y.shape[1] else x)
    else:
        weight_x, weight_y = first.weight.split([x.shape[1], y.shape[1]], 1)
        h = linear(y, weight_y).unflatten(0, (-1, len(x))) + linear(x, weight_x, first.bias)
        h = h.flatten(0, 1)
    for layer in layers[1:]:
        h = layer(h)
    return h


def dense_layers(sizes: tuple[int, ...], activation: str, norm: str | None) -> list[nn.Module]:
    """Returns a linear layer, norm and activation for each pair of neighbours in `sizes`."""
    layers: list[nn.Module] = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), *norm_layers(norm, o), activation_layer(activation)]
    return layers


def norm_layers(norm: str | None, size: int) -> list[nn.Module]:
    """Returns the normalisation called `norm` for vectors of length `size`, or nothing."""
    if norm not in (None, *NORMS):
        raise ValueError(f"norm {norm!r} is unknown; choose 'batch', 'layer' or None")
    return [NORMS[norm](size)] if norm else []
