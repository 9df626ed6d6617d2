"""Checkpoints of a run: weights and state, replaced together or not at all."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4
from zipfile import is_zipfile

import torch
from torch import Tensor

__all__ = [
    "FORMAT",
    "PathLike",
    "load_state",
    "load_weights",
    "read_run",
    "save_checkpoint",
    "write_atomic",
]

FORMAT = 1
PathLike = str | os.PathLike[str]
POINTERS = "checkpoints/current.json"  # which checkpoint is the last, which the best


def read_run(run: PathLike) -> dict[str, Any]:
    """What a run folder says of itself, from its run.json.

    Raises:
        ValueError: If the file is missing, damaged, or of a newer format.
    """
    path = Path(run) / "run.json"
    record = _read_json(path)
    if not isinstance(record.get("format"), int):
        raise ValueError(f"{path} is damaged: it has no format number; restore it from a copy")
    if record["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {record['format']}, this pyro_vae reads up to {FORMAT}: "
            "use the newer pyro_vae that wrote it"
        )
    return record


def load_weights(run: PathLike, which: str = "best") -> dict[str, Tensor]:
    """The weights of a run as a state dict on the CPU, from safetensors: nothing is executed.

    Args:
        run: The folder that was given to `fit`.
        which: "best", by validation ELBO (the last where there was no validation), or "last".

    Raises:
        ValueError: If `which` is something else, there is no checkpoint yet, or a file is
            missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if which not in ("best", "last"):
        raise ValueError(f"which must be 'best' or 'last'; got {which!r}")
    read_run(run)
    pointers = _pointers(Path(run))
    if pointers is None:
        raise ValueError(f"run {run} has no checkpoint yet: resume its training")
    path = (
        Path(run) / "checkpoints" / (pointers[which] or pointers["last"]) / "weights.safetensors"
    )
    try:
        return load(_read(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None


def load_state(run: PathLike) -> dict[str, Any] | None:
    """What training needs to go on besides the weights, or None before the first checkpoint."""
    pointers = _pointers(Path(run))
    if pointers is None:
        return None
    path = Path(run) / "checkpoints" / pointers["last"] / "state.pt"
    file = io.BytesIO(_read(path))
    if not is_zipfile(file):
        raise ValueError(f"{path} is damaged or not a checkpoint: restore it from a copy")
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or not a checkpoint: {error}") from None


def save_checkpoint(
    run: PathLike, weights: dict[str, Tensor], state: dict[str, Any], *, best: bool
) -> None:
    """Writes a new checkpoint, makes it the last (and the best), and removes what it replaces.

    Everything is written aside and flushed to disk; one atomic replacement of a small file then
    makes it current. Whenever the process dies, one whole checkpoint is current.

    Args:
        run: The run folder.
        weights: State dict of the vae.
        state: Of what `torch.load(weights_only=True)` can read.
        best: Whether it is the best so far.
    """
    from safetensors.torch import save

    folder = Path(run) / "checkpoints"
    new = folder / f"step-{state['step']}-{uuid4().hex[:8]}"
    new.mkdir(parents=True)
    # copies, for safetensors takes neither tied nor strided tensors
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()
    }
    _write(new / "weights.safetensors", save(tensors))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    _write(new / "state.pt", buffer.getvalue())
    _flush_folder(new)
    _flush_folder(folder)
    pointers = _pointers(Path(run)) or {"best": None}
    pointers = {"last": new.name, "best": new.name if best else pointers["best"]}
    write_atomic(Path(run) / POINTERS, json.dumps(pointers))
    for other in folder.glob("step-*"):
        if other.name not in pointers.values():
            shutil.rmtree(other, ignore_errors=True)


def write_atomic(path: Path, text: str) -> None:
    """Replaces a file by another text, wholly or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    _write(temporary, text.encode())
    os.replace(temporary, path)
    _flush_folder(path.parent)


def _pointers(run: Path) -> dict[str, Any] | None:
    path = run / POINTERS
    if not path.exists():
        return None
    pointers = _read_json(path)
    names = (pointers.get("last"), pointers.get("best"))
    if not isinstance(names[0], str) or not all(_plain(name) for name in names if name):
        raise ValueError(f"{path} is damaged: it must name the last and the best checkpoint")
    return {"last": names[0], "best": names[1]}


def _plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: give a folder that fit(run=...) wrote") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(_read(path).decode())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}; restore it from a copy") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged: expected a mapping; restore it from a copy")
    return record


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
