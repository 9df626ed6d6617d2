"""Networks: tensor -> raw parameters, over any leading dims; they know no distributions."""

from pyro_vae.networks.base import Network
from pyro_vae.networks.conv import Conv, ConvTranspose
from pyro_vae.networks.mlp import MLP, GatedMLP
from pyro_vae.networks.resnet import ResNet, ResNetTranspose

__all__ = ["MLP", "Conv", "ConvTranspose", "GatedMLP", "Network", "ResNet", "ResNetTranspose"]
