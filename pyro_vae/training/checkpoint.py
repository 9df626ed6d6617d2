"""Checkpoints of a run: weights and state, replaced together or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from pyro_vae.files import PathLike, check_folder, flush_folder, reading, write

__all__ = ["FORMAT", "load_state", "load_weights", "put_weights", "read_run", "save_checkpoint"]

FORMAT = 1
POINTERS = "checkpoints/current.json"  # the last, the best, and the digests of their files
WEIGHTS, STATE = "weights.safetensors", "state.pt"
KEPT = {  # of the state, whatever the training
    "epoch": int,
    "step": int,
    "offset": int,
    "seconds": float,
    "rng": dict,
    "history": dict,
}
RECORDS: dict[str, tuple[type, ...]] = {  # of run.json
    "declaration": (dict, type(None)),
    "training": (dict,),
    "data": (dict,),
}


def read_run(run: PathLike) -> dict[str, Any]:
    """What a run folder says of itself, from its run.json.

    Raises:
        ValueError: If the file is missing, damaged, or of a newer format, or the folder holds
            links, which could lead out of it.
    """
    check_folder(run)
    path = Path(run) / "run.json"
    record = _read_json(path)
    if type(record.get("format")) is not int:
        raise ValueError(f"{path} is damaged: it has no format number; restore it from a copy")
    if record["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {record['format']}, this pyro_vae reads up to {FORMAT}: "
            "use the newer pyro_vae that wrote it"
        )
    record = {"declaration": None, "training": {}, "data": {}, **record}
    for name, types in RECORDS.items():
        if not isinstance(record[name], types):
            raise ValueError(
                f"{path} is damaged: its {name} is no mapping; restore it from a copy"
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
    from safetensors.torch import load

    if which not in ("best", "last"):
        raise ValueError(f"which must be 'best' or 'last'; got {which!r}")
    read_run(run)
    pointers = _pointers(Path(run))
    if pointers is None:
        raise ValueError(f"run {run} has no checkpoint yet: resume its training")
    path, data = _checked(run, pointers, pointers[which] or pointers["last"], WEIGHTS)
    with reading(path):
        return load(data)


def put_weights(module: nn.Module, weights: dict[str, Tensor], run: PathLike) -> None:
    """Loads the weights of a run into a module, if they are its own: none is cast.

    The module of a run in double precision becomes double.

    Raises:
        ValueError: If names, shapes or types differ.
    """
    if _is_double(run):
        module.double()
    own = module.state_dict()
    for name in (name for name in own if name in weights):
        was, now = weights[name].dtype, own[name].dtype
        if was != now:
            raise ValueError(f"the weights of run {run} do not fit: {name} is {was}, not {now}")
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights of run {run} do not fit this vae: {error}") from None


def load_state(run: PathLike) -> dict[str, Any] | None:
    """What training needs to go on besides the weights, or None before the first checkpoint."""
    pointers = _pointers(Path(run))
    if pointers is None:
        return None
    path, data = _checked(run, pointers, pointers["last"], STATE)
    with reading(path):
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        wrong = [key for key, kind in KEPT.items() if type(state[key]) is not kind]
        if wrong or len(state["history"]["rows"]) != state["epoch"]:
            raise TypeError(f"not the state of a training: {', '.join(wrong) or 'its epochs'}")
    return state


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
    new.mkdir()
    # copies, for safetensors takes neither tied nor strided tensors
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    digests = {
        WEIGHTS: _put(new / WEIGHTS, save(tensors)),
        STATE: _put(new / STATE, buffer.getvalue()),
    }
    flush_folder(folder)
    before = _pointers(Path(run)) or {"best": None, "sha256": {}}
    kept = {"last": new.name, "best": new.name if best else before["best"]}
    known = {**before["sha256"], new.name: digests}
    known = {name: known[name] for name in known if name in kept.values()}
    write(Path(run) / POINTERS, json.dumps({**kept, "sha256": known}))
    for other in folder.glob("step-*"):
        if other.name not in kept.values():
            shutil.rmtree(other, ignore_errors=True)


def _pointers(run: Path) -> dict[str, Any] | None:
    """The current checkpoints; runs of older versions have no digests."""
    path = run / POINTERS
    if not path.exists():
        return None
    pointers = _read_json(path)
    last, best, digests = (pointers.get(name) for name in ("last", "best", "sha256"))
    named = _plain(last) and (best is None or _plain(best))
    if not named or not isinstance(digests, dict | None):
        raise ValueError(f"{path} is damaged: it must name the last and the best checkpoint")
    return {"last": last, "best": best, "sha256": digests or {}}


def _checked(
    run: PathLike, pointers: dict[str, Any], checkpoint: str, name: str
) -> tuple[Path, bytes]:
    """A file of a checkpoint: its path and content, which must be what was written."""
    path = Path(run) / "checkpoints" / checkpoint / name
    data = _read(path)
    with reading(Path(run) / POINTERS):
        digest = pointers["sha256"][checkpoint][name] if checkpoint in pointers["sha256"] else None
    if digest is not None and digest != hashlib.sha256(data).hexdigest():
        raise ValueError(
            f"{path} is damaged: its digest is not that of {POINTERS}; restore it from a copy"
        )
    return path, data


def _put(path: Path, data: bytes) -> str:
    """Writes a file; its digest."""
    write(path, data)
    return hashlib.sha256(data).hexdigest()


def _is_double(run: PathLike) -> bool:
    return read_run(run)["training"].get("precision") == "64-true"


def _plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: give a folder that fit(run=...) wrote") from None


def _read_json(path: Path) -> dict[str, Any]:
    with reading(path):
        record = json.loads(_read(path).decode())
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged: expected a mapping; restore it from a copy")
    return record
