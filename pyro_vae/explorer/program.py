"""Traces a function of tensors into a list of torch's own operations, for a page to run."""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

__all__ = ["CannotRun", "Program", "trace"]

SCRIPT = Path(__file__).with_name("program.js").read_text("utf-8")
OPERATIONS = set(re.findall(r"^OPS\.(\w+) = ", SCRIPT, re.MULTILINE))
KEYWORDS = {"alpha", "approximate"}  # keywords that change a result: the page needs them
IGNORED = {"dtype", "device", "layout", "pin_memory", "memory_format"}  # keywords without effect
LARGEST_HALF = 65504.0


class CannotRun(ValueError):
    """The page cannot run a function; the message says why."""


@dataclass(frozen=True)
class Program:
    """A list of steps that computes one tensor from inputs and constants.

    Attributes:
        numbers: The number of each value: first the inputs, then the constants, then the steps.
        constants: Weights, as the page holds them: matrices and kernels in float16.
        exact: The same weights in float32.
        steps: Operations of torch, whose arguments are earlier values.
        output: The step or value that is the result.
    """

    numbers: dict[Node, int]
    constants: list[Tensor]
    exact: list[Tensor]
    steps: list[Node]
    output: Node

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Computes with torch what the page computes, for inputs of the traced shapes."""
        constants = [c.float() if c.is_floating_point() else c for c in self.constants]
        values: dict[Node, Any] = dict(zip(self.numbers, [*inputs, *constants]))
        for node in self.steps:
            values[node] = _compute(node, values)
        result: Tensor = values[self.output]
        return result

    def single(self) -> Program:
        """Returns the same program with all weights in float32."""
        return replace(self, constants=self.exact)

    def declare(self) -> dict[str, Any]:
        """Returns the program for JSON: each step has a name, arguments and keywords."""
        keywords = [{k: n.kwargs[k] for k in KEYWORDS & {*n.kwargs}} for n in self.steps]
        steps = [[_name(n.target), self._to_json(n.args), k] for n, k in zip(self.steps, keywords)]
        inputs = len(self.numbers) - len(self.constants) - len(steps)
        return {"inputs": inputs, "steps": steps, "output": self.numbers[self.output]}

    def _to_json(self, argument: Any) -> Any:
        """Returns an argument for JSON: {"r": number} for a value, {"f": text} for inf and NaN."""
        if isinstance(argument, list | tuple):
            return [self._to_json(part) for part in argument]
        if isinstance(argument, Node):
            return {"r": self.numbers[argument]}
        if isinstance(argument, float) and not math.isfinite(argument):
            return {"f": str(argument).replace("inf", "Infinity").replace("nan", "NaN")}
        return argument if isinstance(argument, int | float | None) else None


def trace(module: nn.Module, *inputs: Tensor) -> Program:
    """Traces the operations of a module's forward pass, for inputs of these shapes.

    Values that depend on constants alone are computed now. The program does not check arguments
    of distributions.

    Raises:
        CannotRun: If the pass cannot be traced, or has an operation that the page lacks.
    """
    try:
        with torch.no_grad():
            exported = torch.export.export(module, inputs, strict=False).run_decompositions()
    except Exception as error:
        line = " ".join(str(error).strip().splitlines()[:1])
        raise CannotRun(f"{type(error).__name__}: {line}") from error
    known, steps = _weights(exported), []
    for node in exported.graph.nodes:
        if node.op != "call_function" or not (node.users or "val" in node.meta):
            continue  # a check, which has no result
        if known.keys() >= {*node.all_input_nodes} and _is_foldable(node, known):
            known[node] = _compute(node, known)
        else:
            _check_operation(node)
            steps.append(node)
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder" and n not in known]
    (result,) = next(iter(reversed(exported.graph.nodes))).args[0]
    used = [*(part for node in steps for part in node.all_input_nodes), result]
    constants = dict.fromkeys(node for node in used if node in known)
    weights = [known[node] for node in constants]
    exact = [w if w.dtype == torch.bool else w.float().contiguous() for w in weights]
    numbers = {node: i for i, node in enumerate([*placeholders, *constants, *steps])}
    return Program(numbers, [_to_half(weight) for weight in exact], exact, steps, result)


def _weights(exported: torch.export.ExportedProgram) -> dict[Node, Any]:
    """Returns the values of the placeholders that are not inputs."""
    signature = exported.graph_signature
    values = {**exported.state_dict, **exported.constants}
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    nodes = (node for node in exported.graph.nodes if node.name in names)
    return {node: values[names[node.name]].detach() for node in nodes}


def _is_foldable(node: Node, known: dict[Node, Any]) -> bool:
    """Returns whether to compute a node of constants now: it is no larger than its arguments."""
    value = node.meta.get("val")
    size = value.numel() if isinstance(value, torch.Tensor) else 0
    parts = [known[used] for used in node.all_input_nodes]
    return size <= max(4096, *(p.numel() if isinstance(p, Tensor) else size for p in parts), 0)


def _compute(node: Node, known: dict[Node, Any]) -> Any:
    arguments = map_arg((node.args, node.kwargs), known.__getitem__)
    with torch.no_grad():
        return node.target(*arguments[0], **arguments[1])  # type: ignore[operator]


def _check_operation(node: Node) -> None:
    name = _name(node.target)
    if name not in OPERATIONS:
        raise CannotRun(f"the page has no operation {name!r}")
    if unknown := node.kwargs.keys() - KEYWORDS - IGNORED:
        raise CannotRun(f"the page has no option {sorted(unknown)} of {name!r}")
    value = node.meta.get("val")
    is_integer = isinstance(value, torch.Tensor) and not (
        value.is_floating_point() or value.dtype == torch.bool
    )
    if is_integer and name != "argmax":
        raise CannotRun(f"{name!r} gives whole numbers, which the page does not compute")
    if name == "convolution" and value is not None and value.ndim != 4:
        raise CannotRun("the page has convolutions of images only")


def _name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    return str(target).removeprefix("aten.").partition(".")[0].lstrip("_")


def _to_half(constant: Tensor) -> Tensor:
    """Returns matrices and kernels in float16 if they fit; smaller tensors as they are."""
    if constant.ndim < 2 or constant.dtype == torch.bool:
        return constant
    return constant.half() if bool((constant.abs() < LARGEST_HALF).all()) else constant
