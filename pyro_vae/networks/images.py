"""Networks for images of any size: convolutions, residual blocks, and their transposes."""

from __future__ import annotations

from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vae.arguments import as_shape
from pyro_vae.networks.dense import Network, activation_layer, apply_layers, dense_layers


class Conv(Network):
    """Image (C, H, W) to vector: 3 x 3 convolutions of stride 2, dense layers, a linear layer.

    Args:
        in_shape: Channels, height and width; each convolution halves the sides, rounded up.
        out_shape: Shape of one output.
        channels: Channels after each convolution.
        hidden: Widths of the dense layers after them, where `y` joins.
        activation: See `MLP`.
        condition_dim: Length of the vector `y`.
        norm: None or "batch".
    """

    repeats = False

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: int | tuple[int, ...],
        channels: tuple[int, ...] = (32, 64, 128),
        hidden: tuple[int, ...] = (256,),
        activation: str = "relu",
        condition_dim: int = 0,
        norm: str | None = None,
    ) -> None:
        super().__init__(in_shape, out_shape, condition_dim, channels=channels, hidden=hidden)
        sizes = image_sizes(self.in_shape, len(channels), "Conv", "in_shape", "ConvTranspose")
        layers: list[nn.Module] = []
        for i, o in zip((self.in_shape[0], *channels), channels):
            layers += [
                nn.Conv2d(i, o, 3, stride=2, padding=1),
                *norm_layers_2d(norm, o),
                activation_layer(activation),
            ]
        self.convolutions = nn.Sequential(*layers)
        flat = (channels[-1] if channels else self.in_shape[0]) * prod(sizes[-1])
        widths = (flat + condition_dim, *hidden)
        self.hidden = nn.Sequential(*dense_layers(widths, activation, norm))
        self.output = nn.Linear(widths[-1], prod(self.out_shape))

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        """Applies convolutions, then dense layers with `y`."""
        return apply_layers([*self.hidden, self.output], self.convolutions(x), y)


class ConvTranspose(Network):
    """Vector to image (C, H, W): dense layers, then transposed convolutions of stride 2.

    Args:
        in_shape: Shape of one input.
        out_shape: Channels, height and width; each layer doubles the sides, to this size exactly.
        channels: Channels before each transposed convolution.
        hidden: Widths of the dense layers before them, where `y` joins.
        activation: See `MLP`.
        condition_dim: Length of the vector `y`.
        norm: None or "batch".
    """

    repeats = False

    def __init__(
        self,
        in_shape: int | tuple[int, ...],
        out_shape: tuple[int, ...],
        channels: tuple[int, ...] = (128, 64, 32),
        hidden: tuple[int, ...] = (256,),
        activation: str = "relu",
        condition_dim: int = 0,
        norm: str | None = None,
    ) -> None:
        super().__init__(in_shape, out_shape, condition_dim, hidden=hidden)
        channels = as_shape("channels", channels)
        sizes = image_sizes(self.out_shape, len(channels), "ConvTranspose", "out_shape", "Conv")
        smallest, *larger = reversed(sizes)
        self.start = (channels[0], *smallest)
        widths = (prod(self.in_shape) + condition_dim, *hidden, prod(self.start))
        self.hidden = nn.Sequential(*dense_layers(widths, activation, norm))
        layers: list[nn.Module] = []
        for i, o, (height, width) in zip(channels, (*channels[1:], self.out_shape[0]), larger):
            if layers:
                layers += [*norm_layers_2d(norm, i), activation_layer(activation)]
            # a side s comes from ceil(s / 2), which doubles to s or s + 1
            even = (1 - height % 2, 1 - width % 2)
            layers.append(nn.ConvTranspose2d(i, o, 3, 2, padding=1, output_padding=even))
        self.convolutions = nn.Sequential(*layers)

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        """Applies dense layers with `y`, then transposed convolutions."""
        h = apply_layers([*self.hidden], x, y)
        return self.convolutions(h.unflatten(-1, self.start))

    @property
    def output_bias(self) -> Tensor:
        """Bias of every channel, [C, 1, 1]."""
        return self.convolutions[-1].bias.view(-1, 1, 1)  # type: ignore[union-attr,operator]


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
        """Applies residual stages, then a linear map with `y`."""
        return apply_layers([self.output], self.stages(x), y)


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
        names = "ResNetTranspose", "out_shape", "ResNet"
        self.sizes = image_sizes(self.out_shape, len(channels), *names)[::-1]
        self.start = (channels[0], *self.sizes[0])
        self.input = nn.Linear(prod(self.in_shape) + condition_dim, prod(self.start))
        self.blocks = nn.ModuleList(ResidualBlock(c, activation, norm) for c in channels)
        self.widths = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1) for i, o in zip(channels, (*channels[1:], channels[-1]))
        )
        self.activation = activation_layer(activation)
        self.output = nn.Conv2d(channels[-1], self.out_shape[0], 3, padding=1)

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        """Applies a linear map with `y`, then residual stages."""
        h = apply_layers([self.input], x, y).unflatten(-1, self.start)
        for block, width, size in zip(self.blocks, self.widths, self.sizes[1:]):
            h = width(F.interpolate(block(h), size, mode="nearest"))
        return self.output(self.activation(h))


class ResidualBlock(nn.Module):
    """x + convolution(activation(convolution(activation(x)))), 3 x 3, same size."""

    def __init__(self, channels: int, activation: str, norm: str | None) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *norm_layers_2d(norm, channels),
            activation_layer(activation),
            nn.Conv2d(channels, channels, 3, padding=1),
            *norm_layers_2d(norm, channels),
            activation_layer(activation),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output, of the shape of `x`."""
        return x + self.layers(x)


def image_sizes(
    shape: tuple[int, ...], count: int, network: str, argument: str, other: str
) -> list[tuple[int, int]]:
    """Returns height and width of an image, and after each of `count` halvings, rounded up."""
    if len(shape) != 3:
        raise ValueError(
            f"{network} needs an image: {argument} (channels, height, width); got {shape}: "
            f"use MLP for vectors, and {other} for the other direction"
        )
    sizes = [(shape[1], shape[2])]
    for _ in range(count):
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    return sizes


def norm_layers_2d(norm: str | None, channels: int) -> list[nn.Module]:
    """Returns batch norm over `channels`, or nothing."""
    if norm not in (None, "batch"):
        raise ValueError(f"norm {norm!r} does not fit images; choose 'batch' or None")
    return [nn.BatchNorm2d(channels)] if norm else []
