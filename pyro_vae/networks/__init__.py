"""Networks: tensor -> raw parameters, over any leading dims; they know no distributions."""

from pyro_vae.networks.dense import MLP, GatedMLP, Network
from pyro_vae.networks.images import Conv, ConvTranspose, ResNet, ResNetTranspose

__all__ = ["MLP", "Conv", "ConvTranspose", "GatedMLP", "Network", "ResNet", "ResNetTranspose"]
