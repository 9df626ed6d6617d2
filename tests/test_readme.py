"""The README's snippets and commands run as written."""

from __future__ import annotations

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_vae.cli import COMMANDS
from pyro_vae.cli.parsing import parse

README = Path(__file__).parent.parent / "README.md"
if not README.exists():
    pytest.skip("no README beside the tests", allow_module_level=True)
TEXT = README.read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)).splitlines()


@pytest.mark.slow
def test_snippets_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for snippet in PYTHON:
        exec(compile(snippet, "README.md", "exec"), namespace)
    shown, printed = (
        float(re.search(r"log p\(x\) = (\S+)", text)[1])
        for text in (TEXT, capsys.readouterr().out)
    )
    assert printed == pytest.approx(shown, abs=0.5)  # rounding in other orders trains others
    assert type(namespace["vae"].prior) is namespace["Gumbel"]
    assert namespace["vae"].prior.scale == 0.5
    prior = namespace["Gumbel"](3)
    assert prior().log_prob(torch.zeros(3)).item() == pytest.approx(-3)


def test_the_svi_snippet_has_at_most_fifteen_statements() -> None:
    tree = ast.parse(PYTHON[0])
    assert "SVI(" in PYTHON[0]
    assert len(PYTHON[0].strip().splitlines()) <= 18
    assert len(tree.body) <= 18


@pytest.mark.parametrize(
    "line", [line for line in SHELL if line.startswith("pyro-vae")], ids=lambda line: line[:40]
)
def test_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/vamp-mnist").mkdir(parents=True)
    (tmp_path / "runs/vamp-mnist/config.yaml").write_text("data: mnist\n")
    _, command, *options = shlex.split(line)
    parse(command, options)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_function(command: str) -> None:
    module, _, function = COMMANDS[command].function.partition(".")
    assert callable(getattr(import_module(f"pyro_vae.cli.{module}"), function))


def test_set_up_commands_are_single_lines() -> None:
    start = "python3 -m venv .venv && .venv/bin/pip install -q "
    assert sum(line.startswith(start) for line in SHELL) == 2
