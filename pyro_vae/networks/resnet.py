"""Small residual networks for images."""

from __future__ import annotations

from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vae.arguments import as_shape
from pyro_vae.networks.base import Network, activation_layer, joint
from pyro_vae.networks.conv import image_sizes, norm_2d

__all__ = ["ResNet", "ResNetTranspose"]


class ResNet(Network):
    """Image (C, H, W) to vector: a residual block and a halving per entry of `channels`.

    Args:
        in_shape: Channels, height and width.
        out_shape: Shape of one output.
        channels: Channels of each stage.
        activation: See `MLP`.
        condition_dim: Length of the vector `y`, joined before the linear output.
        norm: None or "batch".

    References:
        He et al. Identity mappings in deep residual networks. 2016.
    """

    repeats = False

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: int | tuple[int, ...],
        channels: tuple[int, ...] = (32, 64, 128),
        activation: str = "elu",
        condition_dim: int = 0,
        norm: str | None = None,
    ) -> None:
        super().__init__(in_shape, out_shape, condition_dim)
        channels = as_shape("channels", channels)
        sizes = image_sizes(self.in_shape, len(channels), "ResNet", "in_shape", "ResNetTranspose")
        layers: list[nn.Module] = []
        for i, o in zip((self.in_shape[0], *channels), channels):
            layers += [nn.Conv2d(i, o, 3, 2, padding=1), ResidualBlock(o, activation, norm)]
        self.stages = nn.Sequential(*layers, activation_layer(activation))
        flat = channels[-1] * prod(sizes[-1])
        self.output = nn.Linear(flat + condition_dim, prod(self.out_shape))

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual stages, then a linear map with `y`."""
        return joint([self.output], self.stages(x), y)


class ResNetTranspose(Network):
    """Vector to image (C, H, W): a residual block and a doubling per entry of `channels`.

    Args:
        in_shape: Shape of one input.
        out_shape: Channels, height and width, reached exactly.
        channels: Channels of each stage.
        activation: See `MLP`.
        condition_dim: Length of the vector `y`, joined to the input.
        norm: None or "batch".
    """

    repeats = False

    def __init__(
        self,
        in_shape: int | tuple[int, ...],
        out_shape: tuple[int, ...],
        channels: tuple[int, ...] = (128, 64, 32),
        activation: str = "elu",
        condition_dim: int = 0,
        norm: str | None = None,
    ) -> None:
        super().__init__(in_shape, out_shape, condition_dim)
        channels = as_shape("channels", channels)
        halvings = len(channels)
        sizes = image_sizes(self.out_shape, halvings, "ResNetTranspose", "out_shape", "ResNet")
        self.sizes = sizes[::-1]
        self.start = (channels[0], *self.sizes[0])
        self.input = nn.Linear(prod(self.in_shape) + condition_dim, prod(self.start))
        self.blocks = nn.ModuleList(ResidualBlock(c, activation, norm) for c in channels)
        self.widths = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1) for i, o in zip(channels, (*channels[1:], channels[-1]))
        )
        self.activation = activation_layer(activation)
        self.output = nn.Conv2d(channels[-1], self.out_shape[0], 3, padding=1)

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        """A linear map with `y`, then residual stages."""
        h = joint([self.input], x, y).unflatten(-1, self.start)
        for block, width, size in zip(self.blocks, self.widths, self.sizes[1:]):
            h = width(F.interpolate(block(h), size, mode="nearest"))
        return self.output(self.activation(h))

    @property
    def output_bias(self) -> Tensor:
        """Bias of every channel, [C, 1, 1]."""
        return self.output.bias.view(-1, 1, 1)


class ResidualBlock(nn.Module):
    """x + convolution(activation(convolution(activation(x)))), 3 x 3, same size."""

    def __init__(self, channels: int, activation: str, norm: str | None) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *norm_2d(norm, channels),
            activation_layer(activation),
            nn.Conv2d(channels, channels, 3, padding=1),
            *norm_2d(norm, channels),
            activation_layer(activation),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, of the shape of `x`."""
        return x + self.layers(x)
