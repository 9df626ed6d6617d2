"""Every example runs in its small setting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(path), "--smoke"]
    environment = {**os.environ, "PYTHONPATH": str(path.parent.parent)}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


def test_the_svi_example_is_short() -> None:
    (path,) = [path for path in EXAMPLES if path.stem == "mnist_svi"]
    assert len(path.read_text().splitlines()) <= 80
