"""Judges an estimator of log p(x) on the reference set, and prints a table in Markdown.

python -m benchmarks.reference [--estimator MODULE:NAME | --numpy MODULE:NAME] [--models NAME ...]

An estimator is called with (model, guide, x), two Pyro programs and a tensor, or with --numpy
with three functions of numpy arrays; README.md says what it gives back.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from benchmarks.reference.judge import judge, table


def find(name: str) -> Any:
    """The object that `module:name` names."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise SystemExit(f"an estimator is named module:name; got {name!r}")
    return getattr(import_module(module), attribute)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--estimator", default="pyro_vae:log_evidence")
    parser.add_argument("--numpy")
    parser.add_argument("--models", nargs="+")
    options = parser.parse_args()
    found = judge(find(options.numpy or options.estimator), options.models, bool(options.numpy))
    print(table(found))
