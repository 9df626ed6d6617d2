"""The run folder: what was asked for, and the metrics of each epoch."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from pyro_vae.files import PathLike, check_folder, reading, sweep, write
from pyro_vae.training.checkpoint import FORMAT, read_run
from pyro_vae.training.history import COLUMNS

__all__ = ["check_run", "start_run", "write_metrics"]

MAY_CHANGE = ("compile", "epochs", "patience", "checkpoint_every", "threads")


def check_run(run: PathLike, record: dict[str, Any], resume: bool) -> None:
    """Whether a folder may hold this run.

    Args:
        run: The folder.
        record: "declaration", "training" and "data", as `start_run` will write them.
        resume: Whether an existing run is gone on with.

    Raises:
        ValueError: If the folder holds a run and `resume` is false, or that run had other
            settings or data, or the folder holds links.
    """
    folder = Path(run)
    check_folder(folder)
    if (folder / "run.json").exists():
        if not resume:
            raise ValueError(f"{folder} holds a run: choose another folder, or give resume=True")
        with reading(folder / "run.json"):
            _check_same(folder, read_run(folder), json.loads(json.dumps(record)))


def start_run(run: PathLike, record: dict[str, Any]) -> None:
    """Writes run.json, and makes the folder of checkpoints."""
    from pyro_vae import __version__

    for folder in (Path(run), Path(run) / "checkpoints"):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
    text = json.dumps({"format": FORMAT, "pyro_vae": __version__, **record}, indent=2)
    write(Path(run) / "run.json", text + "\n")


def write_metrics(run: PathLike, rows: list[dict[str, Any]]) -> None:
    """Writes metrics.csv, a line for each epoch."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(Path(run) / "metrics.csv", text.getvalue())


def _check_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    was, now = _flat(old), _flat(new)
    changed = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
    if changed:
        what = "; ".join(f"{key} was {was.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise ValueError(
            f"{folder} cannot be resumed with other settings or data: {what}. "
            "Give the same ones, or choose another folder"
        )


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """What must stay the same, by dotted name."""
    flat = {f"training.{k}": v for k, v in (record.get("training") or {}).items()}
    for part, description in (record.get("data") or {}).items():
        flat |= {f"data.{part}.{k}": _nameless(v) for k, v in (description or {}).items()}
    flat["declaration"] = record.get("declaration")
    return {k: v for k, v in flat.items() if k.removeprefix("training.") not in MAY_CHANGE}


def _nameless(description: Any) -> Any:
    """A description of data without their name: the digest says which they are."""
    if isinstance(description, dict):
        return {key: value for key, value in description.items() if key != "name"}
    return description
