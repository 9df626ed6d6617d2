"""Mutation testing of packages: small faults in random functions, and which tests see them.

python tools/mutants.py PACKAGE[,PACKAGE...] [--number 40] [--seed 0] [--seconds 60]
    [--only TEXT ...] TESTS AND OPTIONS

The tests run once, which tells who calls what. Then each mutant, one changed operator, constant
or branch, runs in a fork of this process: against the tests that call its function, the quickest
first, until one fails or as many take `--seconds` without it. A mutant that runs for ten times as
long counts as killed. `--only` runs the mutants in whose description one of the texts stands,
such as survivors of other tests.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import os
import random
import resource
import sys
import time
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TWINS: list[tuple[type, type]] = [  # each in place of the other
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot)),
    *((ast.In, ast.NotIn), (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.And, ast.Or)),
    (ast.BitAnd, ast.BitOr),
]
SWAPPED = {ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv}
SWAPPED |= {a: b for pair in TWINS for a, b in (pair, pair[::-1])}
Key = tuple[str, str, int]  # file, qualified name and first line of a function


def mutated(node: ast.AST) -> ast.AST | None:
    """The node with one fault, or None where there is nothing to change."""
    new: Any = copy.deepcopy(node)
    match new:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAPPED:
            new.op = SWAPPED[type(op)]()
        case ast.Compare(ops=[op, *_]):
            new.ops[0] = SWAPPED[type(op)]()
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            return operand
        case ast.Constant(value=bool(value)):
            new.value = not value
        case ast.Constant(value=int(value) | float(value)):
            new.value = value + 1
        case ast.IfExp():
            new.body, new.orelse = new.orelse, new.body
        case ast.If() | ast.While():
            new.test = ast.UnaryOp(ast.Not(), new.test)
        case ast.Expr(value=ast.Call()):
            return ast.Pass()
        case _:
            return None
    return new


def places(function: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Where a node hangs in the body of a function: parent, field, index; messages left out."""
    for field, value in ast.iter_fields(function):
        if field in ("decorator_list", "args", "returns", "annotation"):
            continue
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(node, ast.AST) and not isinstance(node, ast.Raise | ast.JoinedStr):
                yield function, field, index
                yield from places(node)


def codes(code: CodeType) -> Iterator[CodeType]:
    """A code object and those inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from codes(inner)


def mutants(path: Path) -> Iterator[tuple[Key, str, CodeType]]:
    """The function, a description and the changed code of every mutant of a file.

    A function cannot be given code of other free variables, as without its `super().__init__()`.
    """
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    inner = {n for f in functions for n in ast.walk(f) if n is not f}
    whole = compile(tree, str(path), "exec")
    for function in (f for f in functions if f not in inner):
        first = min(n.lineno for n in [function, *function.decorator_list])
        for parent, field, index in places(function):
            held: Any = getattr(parent, field)
            node = held if index is None else held[index]
            new = mutated(node)
            if new is None:
                continue
            what = f"{ast.unparse(node).splitlines()[0]} -> {ast.unparse(new).splitlines()[0]}"
            _put(parent, field, index, ast.copy_location(new, node))
            module = compile(ast.fix_missing_locations(tree), str(path), "exec")
            _put(parent, field, index, node)
            old, code = (
                next(
                    c
                    for c in codes(made)
                    if c.co_firstlineno == first and c.co_name == function.name
                )
                for made in (whole, module)
            )
            if code.co_freevars != old.co_freevars:
                continue
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', first)} {code.co_qualname}"
            yield (str(path), code.co_qualname, first), f"{where}: {what}", code


def _put(parent: Any, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


class Campaign:
    """The plugin of pytest that runs the tests, and then the mutants."""

    def __init__(self, given: argparse.Namespace) -> None:
        found = [ROOT / "pyro_vae" / package for package in given.packages.split(",")]
        each = [sorted(p.rglob("*.py")) if p.is_dir() else [p.with_suffix(".py")] for p in found]
        made = [m for files in each for path in files for m in mutants(path)]
        only = given.only or [""]
        self.mutants = [m for m in made if any(text in m[1] for text in only)]
        self.given, self.failed = given, False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed = self.failed or report.failed

    def pytest_runtestloop(self, session: Any) -> bool:
        tests: dict[Key, list[tuple[float, int]]] = defaultdict(list)
        items = session.items
        for i, item in enumerate(items):
            seen: set[CodeType] = set()
            began = time.process_time()
            sys.settrace(lambda frame, *_, seen=seen: seen.add(frame.f_code))
            self.run(item, items[i + 1] if i + 1 < len(items) else None)
            sys.settrace(None)
            for code in seen:
                key = code.co_filename, code.co_qualname, code.co_firstlineno
                tests[key].append((time.process_time() - began, i))
        assert not self.failed, "the tests fail without a mutant"
        called = [m for m in self.mutants if m[0] in tests]
        number = min(self.given.number, len(called))
        sample, killed = random.Random(self.given.seed).sample(called, number), 0
        for key, what, code in sample:
            spent = list(accumulate(seconds for seconds, _ in sorted(tests[key])))
            seen_by = sorted(tests[key])[: 1 + bisect(spent, self.given.seconds)]
            dead = self.dies(key, code, [items[i] for _, i in seen_by], sum(t for t, _ in seen_by))
            killed += dead
            of = f"{len(seen_by)} of {len(tests[key])} tests"
            print(f"{'killed' if dead else 'SURVIVED'} ({of}) {what}", flush=True)
        print(
            f"{killed} of {len(sample)} mutants killed; {len(self.mutants) - len(called)} of "
            f"{len(self.mutants)} are in functions that no test here calls in this process"
        )
        return True

    def dies(self, key: Key, code: CodeType, items: list[Any], seconds: float) -> bool:
        """Whether one of the tests fails with the mutant."""
        child = os.fork()
        if child:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status != 3, "a fault of this script"
            return status != 0
        try:
            limit = int(10 * seconds) + 10
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            for function in [f for f in gc.get_objects() if type(f) is FunctionType]:
                old = function.__code__
                if (old.co_filename, old.co_qualname, old.co_firstlineno) == key:
                    function.__code__ = code
            for i, item in enumerate(items):
                self.run(item, items[i + 1] if i + 1 < len(items) else None)
                if self.failed:
                    os._exit(1)
            os._exit(0)
        finally:
            os._exit(3)

    def run(self, item: Any, following: Any) -> None:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("packages")
    parser.add_argument("--number", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", action="append")
    given, tests = parser.parse_known_args()
    sys.path.insert(0, str(ROOT))
    options = ["-n0", "-q", "-p", "no:cacheprovider", *tests]
    sys.exit(pytest.main(options, plugins=[Campaign(given)]))
