"""Bad command lines: each is refused in one line, and writes no file."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import numpy as np
import pytest

from pyro_vae.__main__ import main

LINES = Path(__file__).with_name("bad_lines.txt").read_text().splitlines()
SMALL = ["--latent_dim=3", "--progress=false", "--epochs=1"]
DENSE = ["--encoder.hidden=[11]", "--decoder.hidden=[11]"]


def make_files(folder: Path) -> None:
    """Two runs, `run` of images and `table`, and files of which most are damaged."""
    zeros = np.zeros((2, 1, 8, 8), np.uint8)
    large = np.full((2, 1, 8, 8), 10**9)
    arrays = {"x": zeros, "wide": zeros[..., :7], "none": zeros[:0], "big": large}
    for name, x in arrays.items():
        np.savez(folder / f"{name}.npz", x=x)
    np.savez(folder / "y.npz", z=np.zeros(3))
    np.save(folder / "obj.npy", np.array([{}, []], dtype=object))
    table = "".join(f"{i % 7},{i * 1.7},{'uvw'[i % 3]}\n" for i in range(60))
    texts = {
        **{"t.csv": f"a,b,c\n{table}", "empty.csv": "", "head.csv": "a,b,c\n"},
        **{"other.csv": "a,b\n1,2\n", "far.csv": "a,b,c\n1,2,q\n", "text.csv": "a,b,c\nx,2,u\n"},
        **{"list.yaml": "[1]", "full/x": "x", "pics/a.png": "no picture"},
    }
    for name in ("full", "pics", "empty"):
        (folder / name).mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("noise.csv", "noise.npz", "noise.npy", "noise.yaml", "noise.png"):
        (folder / name).write_bytes(b"\x93\xff" + bytes(range(99)))
    os.mkfifo(folder / "pipe.csv")
    assert main(["train", *SMALL, *DENSE, "--limit=53", "--run=run"]) == 0
    assert main(["train", *SMALL, *DENSE, "--data=t.csv", "--run=table"]) == 0


def files() -> set[str]:
    return {str(path) for path in Path.cwd().rglob("*") if path.is_file()}


@pytest.mark.slow
def test_bad_lines_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path)
    before, wrong = files(), {}
    for line in LINES:
        name, *rest = shlex.split(line)
        quick = SMALL if name == "train" and "resume" not in line else []
        capsys.readouterr()
        try:
            status: object = main([name, *quick, *rest])
        except BaseException as error:  # noqa: BLE001
            status = repr(error)
        said = capsys.readouterr().err
        if status != 2 or len(said.splitlines()) != 1 or files() != before:
            wrong[line] = status, said
            before = files()
    assert not wrong
