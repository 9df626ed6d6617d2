"""Reads rows of numbers: named data sets, files of arrays, text or counts, folders of images."""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.data import Data, Parts
from pyro_vae.data.mapped import LARGE, mapped
from pyro_vae.data.schema import as_name, as_number
from pyro_vae.data.sprites import Sprites
from pyro_vae.data.tables import as_cell, check_names, label_column, read_lines
from pyro_vae.files import parsing

if TYPE_CHECKING:
    import PIL.Image

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
"""The names of data sets, each with the folder below the data root that holds its files."""


_PARTS = {"train": "", "validation": "_validation", "test": "_test"}  # endings of arrays
_ARRAYS = ("x", "y", "labels")
_LEVELS = {"bool": 2, "uint8": 256}  # number of grey levels of a type


def read_named(name: str, root: str | Path) -> Parts:
    """Reads a data set of ``NAMED``, downloading it where the data root lacks it.

    Torchvision unpacks archives that lie in the data root already, without a network.

    Raises:
        ValueError: If the files can be neither found nor downloaded.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        x = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
        labels = torch.from_numpy(digits.target.astype(np.int64))
        return {"train": Data(x, labels=labels, levels=17, name=name)}
    if name == "sprites":
        return {"train": Sprites(3, 3, 8, 8, 8, size=32).data()}  # 4608 images
    try:
        return {part: _torchvision_part(name, root, part == "train") for part in ("train", "test")}
    except (OSError, RuntimeError, EOFError) as error:
        folder = Path(root) / NAMED[name]
        line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ValueError(
            f"{name}: expected its published files in {folder} (writable, so that archives can "
            f"be unpacked there), got: {line}; put them there, or set the data root"
        ) from error


def _torchvision_part(name: str, root: str | Path, train: bool) -> Data:
    from torchvision import datasets

    options: dict[str, dict[str, Any]] = {
        "EMNIST": {"split": "balanced", "train": train},
        "Omniglot": {"background": train},
        "SVHN": {"split": "train" if train else "test"},
    }
    part = getattr(datasets, name)(root, download=True, **options.get(name, {"train": train}))
    if name == "Omniglot":
        # The alphabets of the two parts are disjoint: a class would mean two characters.
        ink = np.stack([np.asarray(image) < 128 for image, _ in part])
        return Data(torch.from_numpy(ink).byte().unsqueeze(1), levels=2, name=name)
    x = torch.as_tensor(part.data)
    x = x.unsqueeze(1) if x.ndim == 3 else x
    # EMNIST stores each image transposed, CIFAR10 its channels last
    x = {"EMNIST": x.mT, "CIFAR10": x.movedim(-1, 1)}.get(name, x).contiguous()
    labels = torch.as_tensor(part.labels if name == "SVHN" else part.targets, dtype=torch.int64)
    return Data(x, labels=labels, levels=256, name=name)


def read_arrays(path: Path) -> Parts:
    """Reads an .npz file, or the one array ``x`` of an .npy file.

    The arrays are ``x`` [N, *E] and, both optional, ``labels`` [N] (classes, integers from 0, -1
    or NaN where unknown) and ``y`` [N, C] or [N] (numbers to condition on). The same names with
    ``_validation`` and ``_test`` hold these parts. Integers or booleans [N] called ``y`` are
    taken for labels. Floating point becomes float32. uint8 is taken for grey values 0..255 and
    bool for 0 and 1, both as images: [N, H, W] becomes [N, 1, H, W]. Other integers stay integers.

    Rows of an .npy file of more than 64 MB stay on disk (`Mapped`).

    Raises:
        ValueError: If the file cannot be read, holds Python objects or lacks ``x``, or an array
            has another name, shape or dtype.
    """
    if path.suffix.lower() == ".npy" and path.stat().st_size > LARGE:
        rows = mapped(path, partial(_to_tensor, path), str(path))
        levels = _LEVELS.get(np.load(path, mmap_mode="r").dtype.name)
        return {"train": Data(rows, levels=levels, name=str(path))}
    what = "a file that numpy.savez or numpy.save wrote without Python objects"
    with parsing(path, what), path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            arrays = {"x": loaded}
        else:
            arrays = {name: loaded[name] for name in loaded.files}
    parts = {name: part for name, part in _PARTS.items() if f"x{part}" in arrays}
    known = {f"{array}{part}" for part in parts.values() for array in _ARRAYS}
    if "x" not in arrays or not known.issuperset(arrays):
        raise ValueError(
            f"{path}: expected an array 'x', optionally 'x_validation' and 'x_test', and with "
            "each of them optionally 'y' (numbers to condition on, or integers [N] that are "
            "classes) and 'labels' (such integers) of the same ending, got "
            f"{', '.join(sorted(arrays)) or 'none'}; rename or remove arrays"
        )
    return {name: _array_part(path, arrays, part) for name, part in parts.items()}


def _array_part(path: Path, arrays: Mapping[str, np.ndarray], part: str) -> Data:
    x, y, labels = arrays[f"x{part}"], arrays.get(f"y{part}"), arrays.get(f"labels{part}")
    if y is not None and y.ndim == 1 and y.dtype.kind in "biu":
        if labels is not None:
            raise ValueError(
                f"{path}: expected classes once, got y of integers [N] and labels beside them; "
                "keep one, or store y as floating point to condition on it as a number"
            )
        labels, y = y.astype(np.int64), None
    if labels is not None and labels.dtype.kind == "f" and np.isnan(labels).any():
        filled = np.where(np.isnan(labels), -1, labels)
        labels = filled.astype(np.int64) if (filled == filled.round()).all() else labels
    if labels is not None and labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: expected labels that are integers from 0, got dtype {labels.dtype}"
        )
    return Data(
        _to_tensor(path, x),
        y=None if y is None else _to_tensor(path, y).float(),
        labels=None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        levels=_LEVELS.get(x.dtype.name),
        name=f"{path}{part and f' ({part[1:]})'}",
    )


def _to_tensor(path: Path, x: np.ndarray) -> Tensor:
    """Converts an array to a tensor [N, *E]; [N] becomes [N, 1], grey [N, H, W] [N, 1, H, W]."""
    grey = x.dtype.name in _LEVELS
    if grey and x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        raise ValueError(
            f"{path}: expected images [N, C, H, W], got shape {list(x.shape)}, which looks like "
            "[N, H, W, C]; store x.transpose(0, 3, 1, 2)"
        )
    x = x[:, None] if x.ndim == 1 or (grey and x.ndim == 3) else x
    if x.dtype.kind not in "fbiu":
        raise ValueError(f"{path}: expected arrays of real numbers, got dtype {x.dtype}")
    if x.dtype.kind == "f":
        # A value too large for float32 becomes infinite, and the check of Data names its row.
        with np.errstate(over="ignore"):
            return torch.from_numpy(x.astype(np.float32, copy=False))
    if x.dtype.kind == "u" and x.size and x.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{path}: expected integers below 2**63, got {x.max()}; store floats")
    return torch.from_numpy(x.astype(np.uint8 if grey else np.int64, copy=False))


def read_csv(path: Path) -> Data:
    """Reads a table of numbers, comma separated, with or without a line of column names.

    The values become float32; an empty cell is NaN, a missing value. A column called ``label``
    holds the labels, with an empty cell or -1 where they are unknown.

    Raises:
        ValueError: If the file is no table, or a cell is not a number; the message names the
            line and the column.
    """
    header, table = _read_numbers(path)
    names = [name.strip() for name in header]
    check_names(str(path), names, is_text=True, once=False)
    label = [names.index(key) for key in label_column(str(path), names)]
    values = [d for d in range(table.shape[1]) if d not in label]
    labels = table[:, label].nan_to_num(nan=-1.0).flatten()  # an empty cell is an unknown label
    for row in (labels != labels.round()).nonzero().flatten().tolist():
        raise ValueError(
            f"{path}: expected labels that are integers from 0, got {labels[row].item()} in row "
            f"{row} (from 0); number the classes"
        )
    return Data(
        table[:, values].float(),
        labels=labels.long() if label else None,
        name=str(path),
        columns=tuple(names[d] for d in values) if names else None,
    )


def _read_numbers(path: Path) -> tuple[list[str], Tensor]:
    """Reads the names of the columns, [] if the file has none, and the numbers [N, C]."""
    rows, values = read_lines(path), array("d")
    start, first = next(rows, (1, []))
    has_names = bool(first) and all(as_number(cell) is None for cell in first)
    for line, row in rows if has_names else chain([(start, first)], rows):
        for column, cell in enumerate(row, start=1):
            number = as_number(cell)
            if number is None and as_cell(cell) is not None:
                raise ValueError(
                    f"{path}: expected numbers, got {cell!r} in line {line}, column {column} "
                    "(from 1); replace or remove it"
                )
            values.append(math.nan if number is None else number)
    if not values:
        raise ValueError(f"{path}: expected at least one row of numbers, got none; fill the file")
    table = torch.from_numpy(np.array(values)).unflatten(0, (-1, len(first)))
    steps = table.diff(dim=1)
    is_whole = (table == table.round()).all(1)
    counts_up = is_whole & (steps > 0).all(1) & (steps == steps[:, :1]).all(1)
    if not has_names and table.shape[1] > 1 and counts_up[0] and counts_up.sum() == 1 < len(table):
        raise ValueError(
            f"{path}: expected names or data in the first line, got numbers that count up, "
            f"{', '.join(first[:3])}, as no other line does: if they are names, write them as "
            "text, such as y2019; if data, give the columns names in a line above"
        )
    return first if has_names else [], table


def read_cells(path: Path) -> Data:
    """Reads counts, one row for each cell, from an .h5ad or a Matrix Market file.

    In an .h5ad file the counts are X, or the layer "counts" if X holds others than whole numbers.
    The labels are the column of `obs` called "label" or "labels", or its only column of
    categories; the column names are `var_names`. In a Matrix Market file each row is a cell.

    Raises:
        ValueError: If the file cannot be read, anndata is not installed, or there are no counts
            in it: values below zero or not whole, such as normalised ones.
    """
    if path.suffix.lower() == ".mtx":
        import scipy.io

        with warnings.catch_warnings(), parsing(path, "a whole .mtx file"):
            warnings.simplefilter("ignore")  # of the kind of matrix that scipy will return
            matrix = scipy.io.mmread(path)
        return Data(_counts(path, [matrix]), name=str(path))
    try:
        from anndata import read_h5ad
    except ImportError:
        raise ValueError(
            f"{path}: .h5ad files need anndata, which is not installed: "
            "pip install 'pyro-vae[counts]'"
        ) from None
    with warnings.catch_warnings(), parsing(path, "a whole .h5ad file"):
        warnings.simplefilter("ignore")
        table = read_h5ad(path)
    obs, labels, class_names = table.obs, None, None
    named = [name for name in obs.columns if str(name).lower() in ("label", "labels")]
    named = named or [name for name in obs.columns if str(obs[name].dtype) == "category"]
    if len(named) == 1:
        classes = obs[named[0]].astype("category").cat
        unknown = [name for name in classes.categories if as_number(name) == -1]
        classes = classes.remove_categories(unknown).cat
        labels = torch.from_numpy(classes.codes.to_numpy(np.int64))  # -1 where it is not known
        class_names = tuple(map(as_name, classes.categories))
    return Data(
        _counts(path, [table.X, table.layers.get("counts")]),
        labels=labels,
        class_names=class_names,
        name=str(path),
        columns=tuple(map(str, table.var_names)),
    )


def _counts(path: Path, matrices: list[Any]) -> Tensor:
    """Returns the first of these matrices (dense, sparse or None) that holds counts."""
    got = "none"
    for matrix in (matrix for matrix in matrices if matrix is not None):
        sparse = hasattr(matrix, "tocsr")
        values = np.asarray(matrix.data if sparse else matrix)
        good = (values == np.round(values)) & (values >= 0) & (values < 2.0**63)
        if good.all():
            dense = matrix.toarray() if sparse else values
            return torch.from_numpy(np.ascontiguousarray(dense.astype(np.int64)))
        got = f"{int((~good).sum())} other value(s), such as {values[~good][0]:g}"
    raise ValueError(
        f"{path}: expected counts, whole numbers from 0, got {got}; if they are normalised, give "
        'the raw counts, as X or as the layer "counts"'
    )


def read_images(folder: Path) -> Parts:
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
    images = [_list_images(part) for part in parts]
    mode = _image_mode([path for paths, _ in images for path in paths])
    classes = sorted({name for _, names in images for name in names})
    data = [_images(part, *found, classes, mode) for part, found in zip(parts, images)]
    return dict(zip(("train", "test"), data))


def _list_images(folder: Path) -> tuple[list[Path], list[str]]:
    """Returns the paths of the images below a folder, and the class name of each, if any."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if folder == Path(folder.anchor):
        raise ValueError(f"{folder} is all of the disk: give the folder of the images")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")
    )
    if not paths:
        raise ValueError(f"{folder}: expected images ({', '.join(IMG_EXTENSIONS)}), got none")
    relative = [path.relative_to(folder).parts for path in paths]
    names = [parts[0] for parts in relative if len(parts) > 1]
    if names and len(names) < len(paths):
        loose = next(path for path, parts in zip(paths, relative) if len(parts) == 1)
        raise ValueError(
            f"{folder}: expected all images in class folders or none, got {loose} beside "
            f"{len(names)} in folders; move it"
        )
    return paths, names


def _image_mode(paths: list[Path]) -> str:
    modes = {}
    for path in paths:
        with _open_image(path) as image:
            modes[path] = image.mode
    deep = [path for path, mode in modes.items() if mode[0] in "IF"]
    if deep:
        raise ValueError(
            f"{deep[0]}: expected 8 bits per channel, got mode {modes[deep[0]]!r}; convert the "
            "image, or give an array with grey values as integers or floats"
        )
    kinds = set(modes.values())
    return "1" if kinds == {"1"} else "L" if kinds <= {"1", "L"} else "RGB"


@contextmanager
def _open_image(path: Path) -> Iterator[PIL.Image.Image]:
    from PIL import Image

    if not path.is_file():
        raise ValueError(f"{path}: expected an image file, got a special file; remove it")
    with parsing(path, "a readable image", "repair or remove it"), Image.open(path) as image:
        yield image


def _images(
    folder: Path, paths: list[Path], names: list[str], classes: list[str], mode: str
) -> Data:
    images: list[Tensor] = []
    for path in paths:
        with _open_image(path) as image:
            pixels = np.array(image.convert(mode), dtype=np.uint8)
        images.append(torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1))
        first, size = images[0].shape[1:], images[-1].shape[1:]
        if size != first:
            raise ValueError(
                f"expected images of one size, got {paths[0]} of {first[0]} x {first[1]} "
                f"(height x width) and {path} of {size[0]} x {size[1]}; resize them to one"
            )
    return Data(
        torch.stack(images),
        labels=torch.tensor([classes.index(name) for name in names]) if names else None,
        levels=2 if mode == "1" else 256,
        name=str(folder),
        classes=len(classes) or None,
        class_names=tuple(classes) or None,
    )
