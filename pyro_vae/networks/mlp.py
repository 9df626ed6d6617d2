"""Dense networks."""

from __future__ import annotations

from math import prod

from torch import Tensor, nn

from pyro_vae.networks.base import Network, dense, joint, norm_layers

__all__ = ["MLP", "GatedMLP"]


class MLP(Network):
    """Dense layers with an activation, then a linear one.

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
        self.hidden = nn.Sequential(*dense(sizes, activation, norm))
        self.output = nn.Linear(sizes[-1], prod(self.out_shape))

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        """Dense layers over the flattened input and `y`."""
        return joint([*self.hidden, self.output], x, y)


class GatedMLP(Network):
    r"""Dense layers :math:`(A x + a) \odot \sigma(B x + b)`, then a linear one.

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
        """Gated layers over the flattened input and `y`."""
        return joint([*self.hidden, self.output], x, y)
