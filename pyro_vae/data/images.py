"""Images from a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.data import Data
from pyro_vae.data.given import Given

if TYPE_CHECKING:
    import PIL.Image


def read_images(folder: Path) -> Given:
    """Reads the images below a folder, in the sorted order of their paths.

    The first sub-folder of a path is the class of its image, numbered in sorted order; images
    right in the folder have no labels. Folders ``train`` and ``test``, where both are present,
    hold these parts. Where all images are bilevel the values are 0 and 1 (white); where all are
    grey they are [N, 1, H, W]; otherwise all are read as colour, [N, 3, H, W]. Transparency is
    dropped.

    Raises:
        ValueError: If there is no image, one cannot be read, two differ in size, or only some
            lie in class folders.
    """
    parts = [folder / "train", folder / "test"]
    parts = parts if all(part.is_dir() for part in parts) else [folder]
    paths = [_paths(part) for part in parts]
    mode = _mode([path for part in paths for path in part])
    names = [_class_names(part, found) for part, found in zip(parts, paths)]
    classes = sorted({name for part in names for name in part})
    data = [_data(*part, classes, mode) for part in zip(parts, paths, names)]
    return Given(data[0], test=data[1] if len(data) == 2 else None)


def _paths(folder: Path) -> list[Path]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")
    )
    if not found:
        raise ValueError(f"{folder}: expected images ({', '.join(IMG_EXTENSIONS)}), got none")
    return found


def _mode(paths: list[Path]) -> str:
    modes = {path: _mode_of(path) for path in paths}
    deep = [path for path, mode in modes.items() if mode[0] in "IF"]
    if deep:
        raise ValueError(
            f"{deep[0]}: expected 8 bits per channel, got mode {modes[deep[0]]!r}; convert the "
            "image, or give an array with grey values as integers or floats"
        )
    found = set(modes.values())
    return "1" if found == {"1"} else "L" if found <= {"1", "L"} else "RGB"


@contextmanager
def _opened(path: Path) -> Iterator[PIL.Image.Image]:
    from PIL import Image

    if not path.is_file():
        raise ValueError(f"{path}: expected an image file, got a special file; remove it")
    try:
        with Image.open(path) as image:
            yield image
    # On a damaged or huge image the parsers behind open raise errors of many kinds.
    except Exception as error:
        raise ValueError(
            f"{path}: expected a readable image, got: {error}; repair or remove it"
        ) from error


def _mode_of(path: Path) -> str:
    with _opened(path) as image:
        return image.mode


def _image(path: Path, mode: str) -> Tensor:
    with _opened(path) as image:
        pixels = np.array(image.convert(mode), dtype=np.uint8)
    return torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1)


def _class_names(folder: Path, paths: list[Path]) -> list[str]:
    inside = [path.relative_to(folder).parts for path in paths]
    names = [parts[0] for parts in inside if len(parts) > 1]
    if names and len(names) < len(paths):
        loose = next(path for path, parts in zip(paths, inside) if len(parts) == 1)
        raise ValueError(
            f"{folder}: expected all images in class folders or none, got {loose} beside "
            f"{len(names)} in folders; move it"
        )
    return names


def _data(
    folder: Path, paths: list[Path], names: list[str], classes: list[str], mode: str
) -> Data:
    images = [_image(path, mode) for path in paths]
    for path, image in zip(paths, images):
        if image.shape != images[0].shape:
            raise ValueError(
                f"expected images of one size, got {paths[0]} of {_size(images[0])} and {path} of "
                f"{_size(image)}; resize them to one"
            )
    return Data(
        torch.stack(images),
        labels=torch.tensor([classes.index(name) for name in names]) if names else None,
        levels=2 if mode == "1" else 256,
        name=str(folder),
        classes=len(classes) or None,
    )


def _size(image: Tensor) -> str:
    return f"{image.shape[1]} x {image.shape[2]} (height x width)"
