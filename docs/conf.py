"""Sphinx: the pages of this folder, whose Python runs, and the reference from the docstrings."""

from __future__ import annotations

import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

import pyro_vae
from pyro_vae import priors

project = "pyro_vae"
author = "The pyro_vae developers"
version = release = pyro_vae.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "warn"  # a warning of a block fails the build, as every warning does
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
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_theme_options = {"top_of_page_buttons": []}

DOCS = Path(__file__).parent
shutil.copytree(DOCS.parent / "results", DOCS / "results", dirs_exist_ok=True)  # as pages
MODULES = (
    *("metrics", "sklearn", "networks", "hierarchy", "posteriors", "priors"),
    *("likelihoods", "objectives", "estimators"),
)  # a name of several is that of the last
NAMES = {
    name: f"pyro_vae.{module}.{name}"
    for module in MODULES
    for name in import_module(f"pyro_vae.{module}").__all__
} | {
    **{name: f"pyro_vae.{name}" for name in ("VAE", "Scorer", "build", "explore", "fit", "load")},
    **{name: f"pyro_vae.data.{name}" for name in ("load_data", "read_table")},
    **{name: f"pyro_vae.densities.{name}" for name in ("densities", "scale_latents")},
    "Incomplete": "pyro_vae.distributions.Incomplete",
}
NOTEBOOK = """---
file_format: mystnb
kernelspec: {name: python3}
---
```{code-cell} python
:tags: [remove-cell]
import warnings
warnings.filterwarnings("ignore", "IProgress not found")  # of tqdm, imported by Pyro
```
"""
SESSION = """
```{code-cell} python
:tags: [remove-cell]
import subprocess, sys
def session(commands):
    ours = f'pyro-vae() {{ env -u FORCE_COLOR COLUMNS=88 {sys.executable} -m pyro_vae "$@"; }}'
    run = ["bash", "-ec", ours + chr(10) + commands]
    made = subprocess.run(run, capture_output=True, text=True)
    print(made.stdout)
    assert made.returncode == 0, made.stderr
```
"""  # runs the blocks "```shell" of a page, those that show what they print


def prepare(app: Sphinx, docname: str, source: list[str]) -> None:
    """Makes a notebook of a page with Python, and a table of a module's names in the reference."""
    if docname.startswith("results/"):
        source[0] = source[0].replace("](../docs/", "](../")
        return
    text = source[0].replace("](../results/", "](results/")
    if "```shell" in text:
        text = NOTEBOOK + SESSION + re.sub(r"```shell\n(.*?)```", _with_output, text, flags=re.S)
    if "```python" in text:
        text = NOTEBOOK + text.replace("```python", "```{code-cell} python")
    source[0] = re.sub(r"\.\. automodule:: (\S+)\n(?!   :exclude)", _with_table, text)


def _with_output(found: re.Match[str]) -> str:
    """Commands, and a cell that runs them, of which the output alone is seen."""
    cell = f"```{{code-cell}} python\n:tags: [remove-input]\nsession({found[1]!r})\n```"
    return f"```sh\n{found[1]}```\n\n{cell}"


def _with_table(found: re.Match[str]) -> str:
    module = import_module(found[1])
    ours = (
        name
        for name in sorted(module.__all__)
        if hasattr(getattr(module, name), "__code__") or isinstance(getattr(module, name), type)
    )
    names = "\n".join(f"   ~{found[1]}.{name}" for name in ours)
    return f".. autosummary::\n   :nosignatures:\n\n{names}\n\n{found[0]}"


def link_names(app: Sphinx, document: nodes.document) -> None:
    """Links names of the library in the text of a page to the reference."""
    for literal in [*document.findall(nodes.literal)]:
        name = literal.astext().partition("(")[0].rpartition(".")[2]
        section = literal.parent
        while not isinstance(section, (nodes.section, nodes.document)):
            section = section.parent
        target = NAMES.get(name)
        if any("prior" in word for word in section.get("ids", ())) and name in priors.__all__:
            target = f"pyro_vae.priors.{name}"
        if target and not isinstance(literal.parent, (nodes.title, nodes.reference, pending_xref)):
            link = pending_xref("", refdomain="py", reftype="obj", reftarget=target)
            literal.replace_self(link)
            link += literal


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
    app.connect("source-read", prepare)
    app.connect("doctree-read", link_names)
    app.connect("autodoc-process-docstring", escape_stars, priority=1)
    app.connect("autodoc-process-signature", name_factories)
