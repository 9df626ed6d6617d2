"""The pages' code blocks run as written, page by page, and their commands parse."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pyro_vae.cli.parsing import parse

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
if not PAGES:
    pytest.skip("no docs beside the tests", allow_module_level=True)


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def trust(found: dict[str, Any]) -> None:
    """The encoder is nats low where log_evidence is right."""
    low = found["importance_sampling"](found["model"], found["guide"], found["x"]).log_prob
    assert (low - found["exact"]).mean() < -3
    assert (found["evidence"].log_prob - found["exact"]).abs().max() < 0.1
    lower, upper, _ = found["bracket"].mean()
    assert abs(upper - lower) < 0.2


def objective(found: dict[str, Any]) -> None:
    """Scaled programs under Pyro's ELBO are the weighted bound."""
    assert found["ours"] == pytest.approx(found["theirs"], rel=1e-5)


CLAIMS = {"trust.md": trust, "objective.md": objective}


SLOW = {"speed.md"}  # it compiles
TESTED = [
    pytest.param(p.name, marks=pytest.mark.slow if p.name in SLOW else ())
    for p in PAGES
    if "```python" in p.read_text()
]


@pytest.mark.parametrize("page", TESTED)
def test_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType("my_module")
    monkeypatch.setitem(sys.modules, "my_module", module)
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), module.__dict__)
    CLAIMS.get(page, lambda found: None)(module.__dict__)
    for line in "\n".join(blocks(page, "sh")).replace("\\\n", "").splitlines():
        if line.startswith("pyro-vae"):
            _, command, *options = shlex.split(line)
            parse(command, options)
