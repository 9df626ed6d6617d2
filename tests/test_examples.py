"""Every example runs in its small setting, and is short where it is at the top."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
STUDIES = sorted({*FOLDER.glob("studies/*.py")} - {FOLDER / "studies" / "printing.py"})


def stem(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", EXAMPLES, ids=stem)
def test_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--smoke"])
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=stem)
def test_study_runs(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(path), "--smoke"]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr


def test_examples_are_short() -> None:
    assert EXAMPLES
    assert {path.name for path in EXAMPLES if len(path.read_text().splitlines()) > 80} == set()
