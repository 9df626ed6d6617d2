"""The data sets that have a name: scikit-learn's, torchvision's, and sprites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_vae.data.data import Data
from pyro_vae.data.given import Given
from pyro_vae.data.sprites import Sprites

NAMED = {
    "digits": "",
    "sprites": "",
    "MNIST": "MNIST/raw",
    "FashionMNIST": "FashionMNIST/raw",
    "KMNIST": "KMNIST/raw",
    "EMNIST": "EMNIST/raw",
    "Omniglot": "omniglot-py",
    "SVHN": "",
    "CIFAR10": "cifar-10-batches-py",
}
"""The names, each with the folder below the data root that holds its files."""

SUB_GRID = Sprites(3, 3, 8, 8, 8, size=32)
"""What "sprites" means: 4608 images."""


def read_named(name: str, root: str | Path) -> Given:
    """Reads a data set of ``NAMED``, downloading it where the data root lacks it.

    Torchvision unpacks archives that lie in the data root already, without a network.

    Raises:
        ValueError: If the files can be neither found nor downloaded.
    """
    if name == "digits":
        return _digits()
    if name == "sprites":
        return Given(SUB_GRID.data())
    try:
        return Given(train=_read(name, root, train=True), test=_read(name, root, train=False))
    except (OSError, RuntimeError, EOFError) as error:
        folder = Path(root) / NAMED[name]
        raise ValueError(
            f"{name}: expected its published files in {folder} (writable, so that archives can "
            f"be unpacked there), got: {_last_line(error)}; put them there, or set the data root"
        ) from error


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _digits() -> Given:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return Given(Data(x, labels=labels, levels=17, name="digits"))


def _read(name: str, root: str | Path, train: bool) -> Data:
    from torchvision import datasets

    match name:
        case "EMNIST":
            # The published files hold each image transposed.
            part = datasets.EMNIST(root, split="balanced", train=train, download=True)
            return _data(name, part.data.transpose(1, 2).unsqueeze(1), part.targets)
        case "Omniglot":
            return _omniglot(datasets.Omniglot(root, background=train, download=True))
        case "SVHN":
            part = datasets.SVHN(root, split="train" if train else "test", download=True)
            return _data(name, part.data, part.labels)
        case "CIFAR10":
            part = datasets.CIFAR10(root, train=train, download=True)
            return _data(name, part.data.transpose(0, 3, 1, 2), part.targets)
        case _:
            kind = {"FashionMNIST": datasets.FashionMNIST, "KMNIST": datasets.KMNIST}
            part = kind.get(name, datasets.MNIST)(root, train=train, download=True)
            return _data(name, part.data.unsqueeze(1), part.targets)


def _omniglot(part: Any) -> Data:
    # The alphabets of the two parts are disjoint, so a class number would mean two characters.
    ink = [(np.asarray(image) < 128).astype(np.uint8) for image, _ in part]
    return Data(torch.from_numpy(np.stack(ink)).unsqueeze(1), levels=2, name="Omniglot")


def _data(name: str, x: Any, labels: Any) -> Data:
    x = torch.as_tensor(x).contiguous()
    return Data(x, labels=torch.as_tensor(labels, dtype=torch.int64), levels=256, name=name)
