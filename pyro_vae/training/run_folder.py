"""The run folder: the settings of a run, the metrics of each epoch, and checkpoints."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any
from uuid import uuid4

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_vae.arguments import as_plain, check_real, check_whole
from pyro_vae.files import (
    PathLike,
    Types,
    as_csv,
    check_folder,
    check_types,
    flush_folder,
    reading,
    write,
)
from pyro_vae.objectives import Objective
from pyro_vae.training.dataset import TensorDataset, describe
from pyro_vae.training.optimizers import OptimizerSpec, ScheduleSpec
from pyro_vae.training.progress import COLUMNS, OPTIONAL
from pyro_vae.training.step import PRECISIONS

FORMAT = 1  # version of the format of run.json
POINTERS = "checkpoints/current.json"  # names the last and the best checkpoint, with digests
WEIGHTS, STATE = "weights.safetensors", "state.pt"
STATE_TYPES: Types = {  # entries of the state in a checkpoint, and their types
    "epoch": (int,),
    "step": (int,),
    "offset": (int,),
    "seconds": (float,),
    "rng": (dict,),
    "history": (dict,),
}
HISTORY_TYPES: Types = {"rows": (list,), "num_units": (int, NoneType)}  # of "history"
RECORD_TYPES: Types = {  # entries of run.json, and their types
    "format": (int,),
    "declaration": (dict, NoneType),
    "training": (dict,),
    "data": (dict,),
}
MAY_CHANGE = ("compile", "epochs", "patience", "checkpoint_every", "threads")  # on resuming


@dataclass
class Settings:
    """The arguments of `fit` that a run records; checks them and converts numpy's numbers."""

    epochs: int
    batch_size: int
    optimizer: OptimizerSpec
    lr: float
    schedule: ScheduleSpec | None
    clip_norm: float | None
    patience: int | None
    precision: str
    seed: int
    checkpoint_every: int | None
    compile: bool | str = False  # or "trace"
    threads: int = 1

    def __post_init__(self) -> None:
        check_whole(epochs=self.epochs, batch_size=self.batch_size)
        check_whole(optional=True, patience=self.patience, checkpoint_every=self.checkpoint_every)
        check_whole(0, seed=self.seed)
        check_real(above=0, lr=self.lr)
        check_real(above=0, optional=True, clip_norm=self.clip_norm)
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ValueError(f"precision must be one of {known}; got {self.precision!r}")
        if self.compile not in (True, False, "trace"):
            raise ValueError(f'compile must be True, False, "trace" or None; got {self.compile!r}')
        for name, value in vars(self).items():  # a checkpoint cannot hold numpy's numbers
            setattr(self, name, as_plain(value))


def make_record(
    declaration: dict[str, Any] | None,
    settings: Settings,
    objective: Objective,
    data: dict[str, TensorDataset | None],
) -> dict[str, Any]:
    """Returns the record of a run for run.json, as it will be read back from JSON.

    Schedules are recorded by name and options; functions and other objects by name alone.
    """

    def plain(value: Any) -> Any:
        name = getattr(value, "__qualname__", None)
        if isinstance(value, Tensor | np.generic):
            return value.tolist()
        if name is not None:
            return f"{value.__module__}.{name}"
        if is_dataclass(value) and not isinstance(value, type):
            return {"class_path": type(value).__name__, "init_args": asdict(value)}
        return str(value) if isinstance(value, partial) else type(value).__name__

    objective.at(0)
    options = {"class_path": type(objective).__name__, "init_args": objective.options}
    record = {
        "declaration": declaration,
        "training": {**vars(settings), "objective": options},
        "data": {n: None if rows is None else describe(rows) for n, rows in data.items()},
    }
    return json.loads(json.dumps(record, default=plain))


def earlier_run(run: PathLike, resume: bool) -> dict[str, Any]:
    """Returns the record of the run in a folder that is to be resumed; empty if it holds none.

    Raises:
        ValueError: If the folder holds a run and `resume` is false, or the folder holds links.
    """
    check_folder(run)
    if not (Path(run) / "run.json").exists():
        return {}
    if not resume:
        raise ValueError(f"{run} holds a run: choose another folder, or give resume=True")
    return read_run(run)


def check_same(run: PathLike, saved: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises ValueError if `record` has other settings or data than `saved`, the run's own."""
    with reading(Path(run) / "run.json"):
        before, now = _fixed_values(saved), _fixed_values(record)
    names = sorted(before.keys() | now.keys())
    what = "; ".join(
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    )
    if what:
        raise ValueError(
            f"{run} cannot be resumed with other settings or data: {what}. "
            "Give the same ones, or choose another folder"
        )


def start_run(run: PathLike, record: dict[str, Any]) -> None:
    """Writes run.json, and creates the folder of checkpoints."""
    from pyro_vae import __version__

    for folder in (Path(run), Path(run) / "checkpoints"):
        folder.mkdir(parents=True, exist_ok=True)
        for temporary in folder.glob(".*.tmp"):  # left by processes killed within `write`
            temporary.unlink(missing_ok=True)
    path = Path(run) / "run.json"
    script = Path(sys.argv[0])
    by_module = ["python", "-m", script.parent.name]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    made = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{device}, {os.cpu_count()} processors",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "command": shlex.join(
            [*(by_module if script.name == "__main__.py" else [script.name]), *sys.argv[1:]]
        ),
    }
    if path.exists():  # a resumed run keeps the date and software of its start
        made = _read_json(path).get("made", made)
    content = {"format": FORMAT, "pyro_vae": __version__, "made": made, **record}
    write(path, json.dumps(content, indent=2) + "\n")


def write_metrics(run: PathLike, rows: list[dict[str, Any]]) -> None:
    """Writes metrics.csv, with a line for each epoch."""
    lines = ([row.get(column) for column in COLUMNS] for row in rows)
    write(Path(run) / "metrics.csv", as_csv([COLUMNS, *lines]))


def _fixed_values(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the values that must not change when a run is resumed, by dotted name."""
    parts = {part: record.get(part) or {} for part in ("declaration", "training")}
    values = {f"{part}.{k}": v for part, given in parts.items() for k, v in given.items()}
    for part, description in (record.get("data") or {}).items():
        for key, value in (description or {}).items():
            if isinstance(value, dict):  # the digest identifies the data, not their name
                value = {k: v for k, v in value.items() if k != "name"}
            values[f"data.{part}.{key}"] = value
    return {k: v for k, v in values.items() if k.removeprefix("training.") not in MAY_CHANGE}


def read_run(run: PathLike) -> dict[str, Any]:
    """Reads run.json, the record of a run.

    Raises:
        ValueError: If the file is missing, damaged, or of a newer format, or the folder holds
            links, which could lead out of it.
    """
    check_folder(run)
    path = Path(run) / "run.json"
    record = {"declaration": None, "training": {}, "data": {}, **_read_json(path)}
    if type(version := record.get("format")) is int and version > FORMAT:
        raise ValueError(
            f"{path} has format {version}, this pyro_vae reads up to {FORMAT}: use the newer "
            "pyro_vae that wrote it"
        )
    with reading(path):
        check_types(record, RECORD_TYPES)
    return record


def load_weights(run: PathLike, which: str = "best") -> dict[str, Tensor]:
    """Loads the weights of a run as a state dict on the CPU, from safetensors: no code is run.

    Args:
        run: The folder that was given to `fit`.
        which: "best", by validation ELBO (the last if there was no validation), or "last".

    Raises:
        ValueError: If `which` is something else, there is no checkpoint yet, or a file is
            missing or damaged.
    """
    from safetensors.torch import load

    if which not in ("best", "last"):
        raise ValueError(f"which must be 'best' or 'last'; got {which!r}")
    read_run(run)
    file = _read_checkpoint_file(run, which, WEIGHTS)
    if file is None:
        raise ValueError(f"run {run} has no checkpoint yet: resume its training")
    with reading(file[0]):
        return load(file[1])


def put_weights(module: nn.Module, weights: dict[str, Tensor], run: PathLike) -> None:
    """Loads the weights of a run into a module that has the same names, shapes and types.

    If the run trained in double precision, the module is made double first.

    Raises:
        ValueError: If names, shapes or types differ.
    """
    if read_run(run)["training"].get("precision") == "64-true":
        module.double()
    for name, tensor in module.state_dict().items():
        if name in weights and weights[name].dtype != tensor.dtype:
            raise ValueError(
                f"the weights of run {run} do not fit: {name} is {weights[name].dtype}, not "
                f"{tensor.dtype}"
            )
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights of run {run} do not fit this vae: {error}") from None


def load_state(run: PathLike) -> dict[str, Any] | None:
    """Loads the state that resuming needs besides the weights; None if there is no checkpoint."""
    file = _read_checkpoint_file(run, "last", STATE)
    if file is None:
        return None
    with reading(file[0]):
        state = torch.load(io.BytesIO(file[1]), map_location="cpu", weights_only=True)
        if (optimizer := state.pop("adversary", None)) is not None:  # written by older versions
            state["objective"]["_extra_state"] = optimizer
        check_types(state, STATE_TYPES)
        check_types(state["history"], HISTORY_TYPES)
        rows = state["history"]["rows"]
        are_numbers = all(
            type(value) in (int, float) or (value is None and name in OPTIONAL)
            for row in rows
            for name, value in row.items()
        )
        have_columns = all(row.keys() == set(COLUMNS) for row in rows)
        if not (are_numbers and have_columns and len(rows) == state["epoch"]):
            raise TypeError("not the state of a training: its epochs")
    return state


def save_checkpoint(
    run: PathLike, weights: dict[str, Tensor], state: dict[str, Any], *, best: bool
) -> None:
    """Writes a new checkpoint, makes it the last (and the best), and removes what it replaces.

    Everything is written to a new folder and flushed to disk; then the small file that names the
    current checkpoints is replaced atomically. So whenever the process dies, it names whole ones.

    Args:
        run: The run folder.
        weights: State dict of the vae.
        state: A dict of types that `torch.load(weights_only=True)` can read.
        best: Whether this checkpoint is the best so far.
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
    contents = {WEIGHTS: save(tensors), STATE: buffer.getvalue()}
    for name, content in contents.items():
        write(new / name, content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    flush_folder(folder)
    before = _read_pointers(Path(run)) or {"best": None, "sha256": {}}
    pointers = {"last": new.name, "best": new.name if best else before["best"]}
    sha256 = {**before["sha256"], new.name: digests}
    sha256 = {name: sha256[name] for name in sha256 if name in pointers.values()}
    write(Path(run) / POINTERS, json.dumps({**pointers, "sha256": sha256}))
    for other in folder.glob("step-*"):
        if other.name not in pointers.values():
            shutil.rmtree(other, ignore_errors=True)


def _read_pointers(run: Path) -> dict[str, Any] | None:
    """Reads the names and digests of the current checkpoints; older versions wrote no digests."""
    path = run / POINTERS
    if not path.exists():
        return None
    pointers = _read_json(path)
    last, best, digests = (pointers.get(name) for name in ("last", "best", "sha256"))
    names = (last, last if best is None else best)
    named = all(isinstance(name, str) and Path(name).name == name for name in names)
    if not named or not isinstance(digests, dict | None):
        raise ValueError(f"{path} is damaged: it must name the last and the best checkpoint")
    return {"last": last, "best": best, "sha256": digests or {}}


def _read_checkpoint_file(run: PathLike, which: str, name: str) -> tuple[Path, bytes] | None:
    """Reads a checkpoint's file, checks its digest, returns path and content; None without one."""
    pointers = _read_pointers(Path(run))
    if pointers is None:
        return None
    checkpoint = pointers[which] or pointers["last"]
    path = Path(run) / "checkpoints" / checkpoint / name
    data = _read(path)
    with reading(Path(run) / POINTERS):
        digest = pointers["sha256"][checkpoint][name] if checkpoint in pointers["sha256"] else None
    if digest is not None and digest != hashlib.sha256(data).hexdigest():
        raise ValueError(
            f"{path} is damaged: its digest is not that of {POINTERS}; restore it from a copy"
        )
    return path, data


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
