"""Sphinx: the pages of this folder, the results, and the reference from the docstrings."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import pyro_vae

project = "pyro_vae"
author = "The pyro_vae developers"
version = release = pyro_vae.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
smartquotes_action = "D"  # dashes; quotes stay as they are typed
default_role = "py:obj"  # `name` in a docstring: a link where there is such an object

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
maximum_signature_line_length = 88
autodoc_default_options = {"members": True, "imported-members": True}

html_theme = "furo"
html_title = "pyro_vae"
html_show_copyright = False
html_show_sourcelink = False
html_theme_options = {"top_of_page_buttons": []}

ROOT = Path(__file__).parent.parent


def insert(app: Sphinx, docname: str, source: list[str]) -> None:
    """Puts what lies outside this folder where a page says {examples}, {studies} or {results}."""
    if "{examples}" in source[0]:
        for folder, mark in (("examples", "{examples}"), ("examples/studies", "{studies}")):
            files = sorted((ROOT / folder).glob("*.py"))
            source[0] = source[0].replace(mark, "\n\n".join(map(_example, files)))
    if "{results}" in source[0]:
        first, *others = sorted((ROOT / "results").glob("*.md"))  # README.md is the first
        below = [re.sub(r"(?m)^(#+ )", r"#\1", page.read_text()) for page in others]
        text = "\n\n".join([first.read_text(), *below])
        source[0] = re.sub(r"\]\((?!https?:|#)", "](../results/", text)


def _example(file: Path) -> str:
    """The docstring of an example, its commands and options as code."""
    blocks = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")
    shown = [
        f"```sh\n{block}\n```"
        if block.startswith("python ")
        else re.sub(r"(?<=\s)(--\w+)", r"`\1`", block)
        for block in blocks
    ]
    return "\n\n".join([f"## {file.name}", *shown])


def escape_stars(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Leaves the stars of shapes such as [N, *E] as they are: they emphasise nothing."""
    lines[:] = [re.sub(r"(?<![\\*\w])\*(?=\w)", r"\\*", line) for line in lines]


def name_factories(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, result: Any
) -> tuple[str, Any] | None:
    """Writes a dataclass's factory as "...", for "<factory>" is no Python."""
    return (signature.replace("<factory>", "..."), result) if signature else None


def setup(app: Sphinx) -> None:
    """Registers the handlers."""
    app.connect("source-read", insert)
    app.connect("autodoc-process-docstring", escape_stars, priority=1)
    app.connect("autodoc-process-signature", name_factories)
