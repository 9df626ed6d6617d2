"""Judges an estimator of log p(x) on the reference set, and prints a table in Markdown.

python -m benchmarks.reference [--estimator MODULE:NAME | --numpy MODULE:NAME] [--models NAME ...]
    [--seed SEED]

An estimator is called with (model, guide, x), two Pyro programs and a tensor, or with --numpy
with three functions of numpy arrays; README.md says what it gives back. With --seed the models
are made anew by the recipes of the set: other weights, guides and data, half a minute for each.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from benchmarks.reference.generate import RECIPES, make
from benchmarks.reference.judge import judge, table
from benchmarks.reference.store import declarations, load


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
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    names, problem = options.models or declarations(), load
    if options.seed is not None:
        names, problem = options.models or RECIPES, lambda name: make(name, options.seed)[0]
    estimate = find(options.numpy or options.estimator)
    print(table(judge(estimate, names, bool(options.numpy), problem)))
