"""The pages' commands parse. Their Python runs when the pages are built, which show its output."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_vae
from pyro_vae import class_probabilities, impute, log_evidence
from pyro_vae.cli.parsing import parse
from pyro_vae.densities import densities
from pyro_vae.sklearn import VariationalAutoencoder

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [page.name for page in sorted(DOCS.glob("*.md")) if "```sh" in page.read_text()]
if not PAGES:
    pytest.skip("no docs beside the tests", allow_module_level=True)
EXAMPLES = [
    *(pyro_vae.build, pyro_vae.fit, densities),
    *(
        pytest.param(found, marks=pytest.mark.slow)
        for found in (log_evidence, impute, class_probabilities, VariationalAutoencoder)
    ),
]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_module.py").write_text("\n".join(blocks("extending.md", "python")[:-1]))
    (tmp_path / "runs/vamp").mkdir(parents=True)
    (tmp_path / "runs/vamp/config.yaml").write_text("data: mnist\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for line in "\n".join(blocks(page, "sh(?:ell)?")).replace("\\\n", "").splitlines():
        if line.startswith("pyro-vae"):
            _, command, *options = shlex.split(line)
            parse(command, options)


@pytest.mark.parametrize("found", EXAMPLES)
def test_docstring_example(found: Any) -> None:
    names = {"torch": torch, **vars(pyro_vae.estimators), "build": pyro_vae.build}
    names[found.__name__] = found
    (test,) = doctest.DocTestFinder(recurse=False).find(found, "example", globs=names)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0
