"""The package as it is shipped: what the wheel holds."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_typing_mark_alone(tmp_path: Path) -> None:
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("no source tree beside the tests")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    subprocess.run([*command, str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    kinds = ("*.py", "*.html", "*.css", "*.js")
    files = [path for kind in kinds for path in (ROOT / "pyro_vae").rglob(kind)]
    sources = [str(p.relative_to(ROOT)) for p in files]
    package = [name for name in names if not name.split("/")[0].endswith(".dist-info")]
    assert sorted(package) == sorted([*sources, "pyro_vae/py.typed"])
    (entry,) = [name for name in names if name.endswith("entry_points.txt")]
    assert b"pyro-vae = pyro_vae.__main__:main" in zipfile.ZipFile(wheel).read(entry)
    (metadata,) = [name for name in names if name.endswith("METADATA")]
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    for extra in ("flows", "test", "docs", "benchmarks", "tensorboard"):
        assert f"Provides-Extra: {extra}" in text
