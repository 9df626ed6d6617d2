"""A function of tensors as a list of torch's own operations, for a page to run."""

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

__all__ = ["CannotRun", "Program", "Ref", "trace"]

SCRIPT = Path(__file__).with_name("program.js").read_text("utf-8")
KNOWN = set(re.findall(r"^OPS\.(\w+) = ", SCRIPT, re.MULTILINE))
KEYWORDS = {"alpha", "approximate"}  # that change a result; the page is given these
PLACES = {"dtype", "device", "layout", "pin_memory", "memory_format"}  # that do not
LARGEST_HALF = 65504.0


class CannotRun(ValueError):
    """A function with an operation that the page does not have; says which."""


@dataclass(frozen=True)
class Ref:
    """The value of an input, a constant or an earlier step, by its number."""

    number: int


@dataclass(frozen=True)
class Program:
    """Steps from inputs and constants to one tensor.

    Values are numbered: inputs first, then constants, then a value for each step.

    Attributes:
        inputs: How many there are.
        constants: Weights, as the page holds them: matrices and kernels in float16.
        exact: The same weights in float32.
        steps: Operation of torch, its arguments (with `Ref` for values) and keywords.
        output: The number of the result.
    """

    inputs: int
    constants: list[Tensor]
    exact: list[Tensor]
    steps: list[tuple[Any, list[Any], dict[str, Any]]]
    output: int

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the page computes, by torch; for inputs of the shapes of the trace."""
        whole = [c.float() if c.is_floating_point() else c for c in self.constants]
        values: list[Any] = [*inputs, *whole]
        for target, arguments, keywords in self.steps:
            filled = [_filled(argument, values) for argument in arguments]
            values.append(target(*filled, **keywords))
        return values[self.output]

    def single(self) -> Program:
        """The same with all weights in float32."""
        return replace(self, constants=self.exact)

    def declare(self) -> dict[str, Any]:
        """Steps for JSON: name, arguments, keywords."""
        steps = [
            [
                _name(target),
                _plain(arguments),
                {k: keywords[k] for k in KEYWORDS & keywords.keys()},
            ]
            for target, arguments, keywords in self.steps
        ]
        return {"inputs": self.inputs, "steps": steps, "output": self.output}


def trace(module: nn.Module, *inputs: Tensor) -> Program:
    """The operations of a module's forward pass, for inputs of these shapes.

    What depends on constants alone is computed now. Arguments of distributions are not checked.

    Raises:
        CannotRun: If the pass cannot be traced, or has an operation that the page lacks.
    """
    try:
        with torch.no_grad():
            exported = torch.export.export(module, inputs, strict=False).run_decompositions()
    except Exception as error:
        first = " ".join(str(error).strip().splitlines()[:1])
        raise CannotRun(f"{type(error).__name__}: {first}") from error
    return _program(exported)


def _program(exported: torch.export.ExportedProgram) -> Program:
    known, inputs = _constants(exported)
    live: dict[Node, Any] = {node: ("input", i) for i, node in enumerate(inputs)}
    constants: dict[Node, Tensor] = {}
    steps: list[tuple[Node, list[Any]]] = []

    def place(argument: Any) -> Any:
        """An argument, its constants kept for the page."""
        if isinstance(argument, list | tuple):
            return [place(part) for part in argument]
        if isinstance(argument, Node) and argument in known:
            constants[argument] = known[argument]
        return argument

    for node in exported.graph.nodes:
        if node.op != "call_function" or not (node.users or "val" in node.meta):
            continue  # a check, which gives nothing
        if all(used in known for used in node.all_input_nodes) and _folds(node, known):
            known[node] = _computed(node, known)
        else:
            _check(node)
            live[node] = ("step", len(steps))
            steps.append((node, place(list(node.args))))
    (result,) = next(iter(reversed(exported.graph.nodes))).args[0]
    place(result)
    numbers = {node: i for i, node in enumerate([*inputs, *constants, *(n for n, _ in steps)])}
    return Program(
        len(inputs),
        [_stored(constant) for constant in constants.values()],
        [_single(constant) for constant in constants.values()],
        [(n.target, _numbered(arguments, numbers), dict(n.kwargs)) for n, arguments in steps],
        numbers[result],
    )


def _constants(exported: torch.export.ExportedProgram) -> tuple[dict[Node, Any], list[Node]]:
    """Values of the placeholders of weights, and the placeholders of inputs."""
    signature = exported.graph_signature
    values = {**exported.state_dict, **exported.constants}
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    known = {n: values[names[n.name]].detach() for n in placeholders if n.name in names}
    return known, [node for node in placeholders if node not in known]


def _folds(node: Node, known: dict[Node, Any]) -> bool:
    """Whether the value of a node of constants is not larger than what it is made of."""
    made = node.meta.get("val")
    size = made.numel() if isinstance(made, torch.Tensor) else 0
    parts = [known[used] for used in node.all_input_nodes]
    return size <= max(4096, *(p.numel() if isinstance(p, Tensor) else size for p in parts), 0)


def _computed(node: Node, known: dict[Node, Any]) -> Any:
    arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda used: known[used])
    with torch.no_grad():
        return node.target(*arguments[0], **arguments[1])  # type: ignore[operator]


def _check(node: Node) -> None:
    name = _name(node.target)
    if name not in KNOWN:
        raise CannotRun(f"the page has no operation {name!r}")
    if strange := node.kwargs.keys() - KEYWORDS - PLACES:
        raise CannotRun(f"the page has no option {sorted(strange)} of {name!r}")
    made = node.meta.get("val")
    whole = isinstance(made, torch.Tensor) and not (
        made.is_floating_point() or made.dtype == torch.bool
    )
    if whole and name != "argmax":
        raise CannotRun(f"{name!r} gives whole numbers, which the page does not compute")
    if name == "convolution" and made is not None and made.ndim != 4:
        raise CannotRun("the page has convolutions of images only")


def _name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    return str(target).removeprefix("aten.").partition(".")[0].lstrip("_")


def _stored(constant: Tensor) -> Tensor:
    """Matrices and kernels in half precision, where they fit; what is small as it is."""
    constant = _single(constant)
    if constant.ndim < 2 or constant.dtype == torch.bool:
        return constant
    return constant.half() if bool((constant.abs() < LARGEST_HALF).all()) else constant


def _single(constant: Tensor) -> Tensor:
    return constant if constant.dtype == torch.bool else constant.float().contiguous()


def _numbered(argument: Any, numbers: dict[Node, int]) -> Any:
    if isinstance(argument, list):
        return [_numbered(part, numbers) for part in argument]
    return Ref(numbers[argument]) if isinstance(argument, Node) else argument


def _filled(argument: Any, values: list[Any]) -> Any:
    if isinstance(argument, list):
        return [_filled(part, values) for part in argument]
    return values[argument.number] if isinstance(argument, Ref) else argument


def _plain(argument: Any) -> Any:
    """For JSON: {"r": number} for a value, a string for a number that JSON lacks."""
    if isinstance(argument, list):
        return [_plain(part) for part in argument]
    if isinstance(argument, Ref):
        return {"r": argument.number}
    if isinstance(argument, float) and not math.isfinite(argument):
        return {"f": str(argument).replace("inf", "Infinity").replace("nan", "NaN")}
    return argument if isinstance(argument, int | float | None) else None
