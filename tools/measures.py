"""The size of the package, and how many of its functions a piece of work passes through.

python tools/measures.py            # this checkout, about a minute
python tools/measures.py FOLDER     # another one
"""

from __future__ import annotations

import ast
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).resolve()
ROOT = ROOT if ROOT.is_dir() else ROOT.parents[1]
PACKAGE = ROOT / "pyro_vae"
WINDOW = 6  # lines of code that count as a duplicate where they come again
MEASURED = 3  # the step whose functions are counted: earlier ones are checked or compiled


def code_lines(text: str) -> list[str]:
    """Lines that are neither blank, comment, docstring nor import."""
    tree = ast.parse(text)
    skipped = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = [line.strip() for i, line in enumerate(text.splitlines(), 1) if i not in skipped]
    return [line for line in lines if len(line) > 3 and not line.startswith("#")]


def duplicated(files: list[list[str]]) -> float:
    """Share of the lines of code that lie in a window that occurs twice."""
    windows = [
        [tuple(lines[i : i + WINDOW]) for i in range(len(lines) - WINDOW + 1)] for lines in files
    ]
    seen = Counter(window for file in windows for window in file)
    repeated = sum(
        len({i + j for i, w in enumerate(file) if seen[w] > 1 for j in range(WINDOW)})
        for file in windows
    )
    return repeated / sum(map(len, files))


def size() -> dict[str, Any]:
    """What can be counted without running anything."""
    texts = [path.read_text() for path in sorted(PACKAGE.rglob("*.py"))]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = sorted((n.end_lineno or n.lineno) - n.lineno + 1 for n in functions)
    exported = {
        (id(node), element.value)
        for node in nodes
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for element in ast.walk(node.value)
        if isinstance(element, ast.Constant)
    }
    return {
        "files": len(texts),
        "lines": sum(text.count("\n") for text in texts),
        "functions": len(functions),
        "classes": sum(isinstance(n, ast.ClassDef) for n in nodes),
        "lines of a function, median": statistics.median(lengths),
        "lines of a function, 90th percentile": lengths[int(0.9 * len(lengths))],
        "functions over 60 lines": sum(length > 60 for length in lengths),
        "code in duplicates, per cent": round(100 * duplicated([*map(code_lines, texts)]), 1),
        "names in __all__": len(exported),
    }


class Passed:
    """Counts the functions of the package that are called between `start` and `stop`."""

    def __init__(self) -> None:
        self.functions: set[tuple[str, str]] = set()

    def start(self) -> None:
        sys.setprofile(self._see)

    def stop(self) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        ours = event == "call" and code.co_filename.startswith(f"{PACKAGE}{os.sep}")
        # neither comprehensions and lambdas, nor what an import runs: modules and class bodies
        if ours and not code.co_qualname.endswith(">") and code.co_flags & CO_OPTIMIZED:
            self.functions.add((code.co_filename, code.co_qualname))

    def __str__(self) -> str:
        files = {file for file, _ in self.functions}
        return f"{len(self.functions)} functions in {len(files)} files"


def passed(work: Callable[[], Any]) -> Passed:
    """The functions that a piece of work passes through."""
    count = Passed()
    count.start()
    try:
        work()
    finally:
        count.stop()
    return count


def of_a_step(compile: bool) -> Passed:
    """The functions of one training step, from one setting of the weights to the next."""
    import torch

    from pyro_vae import build, fit
    from pyro_vae.objectives import ELBO

    count = Passed()

    class Counting(ELBO):
        def at(self, step: int) -> None:
            count.stop()
            if step == MEASURED:
                count.start()
            super().at(step)

    torch._inductor.compile = lambda graph, inputs, **_: graph  # type: ignore[assignment]
    x = torch.bernoulli(torch.full((300, 64), 0.3))
    options: dict[str, Any] = {"epochs": 1, "batch_size": 50, "progress": False}
    fit(build((64,), 2), x, Counting(), compile=compile, accelerator="cpu", **options)
    return count


def work() -> dict[str, Passed]:
    """One training by command, one step, one estimate."""
    import numpy as np
    import torch

    from pyro_vae import build, log_evidence
    from pyro_vae.__main__ import main

    rows = np.random.default_rng(0).integers(0, 256, (230, 1, 8, 8)).astype(np.uint8)
    small = ["--latent_dim=2", "--encoder.hidden=[8]", "--decoder.hidden=[8]", "--epochs=1"]
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/a.npz", x=rows)
        options = [f"--data={folder}/a.npz", f"--run={folder}/run", "--progress=false", *small]
        training = passed(lambda: main(["train", *options]))
    vae, x = build((64,), 2).eval(), torch.bernoulli(torch.full((3, 64), 0.3))
    return {
        "pyro-vae train": training,
        "a step": of_a_step(compile=False),
        "a compiled step": of_a_step(compile=True),
        "log_evidence of 3 rows": passed(lambda: log_evidence(vae.model, vae.guide, x)),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for what, value in {**size(), **work()}.items():
        print(f"{what}: {value}")
