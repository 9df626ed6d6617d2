"""Trains and uses runs on disks that become full, then gives them room and goes on.

What does not fit must be refused in one line that names a file, leave what was there before
readable and nothing half written. Given room, a training must end as one that was not stopped,
bit for bit. Mounts a tmpfs, so that it needs Linux and root.

    python benchmarks/full_disk.py [trainings] [seed]
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from pyro_vae.__main__ import main as command
from pyro_vae.training.run_folder import POINTERS, load_weights

SMALL = ["--encoder.hidden=[11]", "--decoder.hidden=[11]", "--latent_dim=3", "--limit=53"]
QUIET = "--progress=false"
FEW = ["--limit=3", "--num_samples=101", "--elbo_samples=7", QUIET]
USES = {
    **{"evaluate": FEW, "plot": [], "report": [], "sample": ["--size=99"]},
    **{"encode": ["rows.npz"], "score": ["rows.npz", "--num_samples=11", QUIET]},
}


def mount(disk: Path, kilobytes: int, *options: str) -> None:
    size = ",".join([*options, f"size={kilobytes}k"])
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], check=True)


def said(*argv: str) -> tuple[object, list[str]]:
    """How a command ends, with a traceback or a status; and its lines of error."""
    text = io.StringIO()
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
        try:
            status: object = command(list(argv))
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            status = traceback.format_exc()
    return status, [s for s in text.getvalue().splitlines() if not s.startswith("warning")]


def refused(status: object, lines: list[str]) -> bool:
    return status == 2 and len(lines) == 1 and "No space left on device: " in lines[0]


def same(run: Path, other: Path) -> bool:
    pairs = [(load_weights(run, which), load_weights(other, which)) for which in ("best", "last")]
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def train(disk: Path, whole: Path, kilobytes: int) -> str:
    """One training on a disk of this size."""
    mount(disk, kilobytes)
    run = disk / "run"
    status, lines = said("train", *SMALL, "--epochs=3", QUIET, f"--run={run}")
    if status == 0:
        return "there was room"
    good = refused(status, lines) and not list(disk.rglob(".*.tmp"))
    began = (run / POINTERS).exists()
    good = good and (not began or bool(load_weights(run, "last")))
    mount(disk, 99_999, "remount")
    again = [f"--resume={run}"] if (run / "config.yaml").exists() else [f"--run={run}", *SMALL]
    ended, words = said("train", *again, "--epochs=3", QUIET)
    good = good and ended == 0 and same(run, whole)
    return "same" if good else f"OTHER: {status} {lines} {ended} {words}"


def use(disk: Path, whole: Path, name: str, kilobytes: int) -> str:
    """A command on a copy of the run, with so much room left."""
    mount(disk, 99_999)
    run = Path(shutil.copytree(whole, disk / "run"))
    shutil.copy(whole.parent / "rows.npz", disk)
    rows = [str(disk / part) if part == "rows.npz" else part for part in USES[name]]
    used = int(subprocess.check_output(["df", "--output=used", str(disk)]).split()[-1])
    mount(disk, used + kilobytes, "remount")
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    status, lines = said(name, str(run), *rows)
    if status == 0:
        return "there was room"
    kept = all(path.exists() and path.stat().st_size for path in before)
    whole_files = not list(disk.rglob(".*.tmp"))
    empty = [p for p in disk.rglob("*") if p.is_file() and not p.stat().st_size]
    mount(disk, 99_999, "remount")
    ended, words = said(name, str(run), *rows)
    good = refused(status, lines) and kept and whole_files and not empty and ended == 0
    return "same" if good else f"OTHER: {status} {lines} {empty} {ended} {words}"


def main(trainings: int = 13, seed: int = 0) -> int:
    """The number of trials that ended otherwise."""
    random.seed(seed)
    found = []
    with TemporaryDirectory() as name:
        folder, disk = Path(name), Path(name) / "disk"
        disk.mkdir()
        np.savez(folder / "rows.npz", x=np.zeros((97, 1, 8, 8), np.uint8))
        whole = folder / "whole"
        assert said("train", *SMALL, "--epochs=3", QUIET, f"--run={whole}")[0] == 0
        assert said("evaluate", str(whole), *FEW)[0] == 0
        sizes = [int(8 * 40 ** (i / trainings)) for i in range(trainings)]
        trials = [("train", size) for size in sizes]
        trials += [(each, random.choice([0, 4, 12])) for each in USES for _ in range(2)]
        for each, size in trials:
            try:
                args = disk, whole
                how = train(*args, size) if each == "train" else use(*args, each, size)
            finally:
                subprocess.run(["umount", str(disk)], check=True)
            found.append(how)
            print(f"{each}, {size} kB: {how}", flush=True)
    full = [how for how in found if how != "there was room"]
    bad = sum(how != "same" for how in full)
    print(f"{len(full)} full disks, {bad} failed; {len(found) - len(full)} had room")
    return bad


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])) > 0)
