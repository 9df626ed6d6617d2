"""The grammar of declarations: names of classes, with options, checked before anything is made."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import EllipsisType, NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from pyro_vae import likelihoods, networks, objectives, posteriors, priors
from pyro_vae.arguments import check_options, closest, final_subclasses, name_and_options
from pyro_vae.data.schema import as_number
from pyro_vae.hierarchy import Inference

__all__ = [
    "BASES",
    "INJECTED",
    "Component",
    "Declared",
    "component",
    "components",
    "declare",
    "given",
    "named_class",
    "option_names",
    "short_name",
]


class Component(NamedTuple):
    """A class, and all of its options, checked."""

    cls: Any
    options: dict[str, Any]

    def made(self, **filled: Any) -> Any:
        """The object, with those of `filled` that its class takes."""
        return given(self.cls, {**filled, **self.options})

    def having(self, **options: Any) -> Component:
        """The same class with other options.

        Raises:
            ValueError: If it has none of that name.
        """
        check_options(self.cls.__name__, options, self.options)
        return Component(self.cls, {**self.options, **options})

    @property
    def plain(self) -> dict[str, Any]:
        """A declaration for a file; our classes by short names, which outlast a move."""
        options = {}
        for name, value in self.options.items():
            if isinstance(value, objectives.Schedule):
                cls = type(value)
                value = Component(cls, {n: getattr(value, n) for n in option_names(cls)}).plain
            options[name] = list(value) if isinstance(value, tuple) else value
        return {"class_path": short_name(self.cls), "init_args": options}


Declared = str | Mapping[str, Any] | Component

BASES: dict[str, type] = {
    "prior": priors.Prior,
    "likelihood": likelihoods.Likelihood,
    "posterior": posteriors.Posterior,
    "hierarchy": Inference,
    "encoder": networks.Network,
    "decoder": networks.Network,
    "objective": objectives.Objective,
    "schedule": objectives.Schedule,
}
PLAIN = (NoneType, bool, int, float, str, list, tuple, dict, EllipsisType, ...)
INJECTED = {
    *("latent_dim", "data_shape", "posterior", "posteriors", "prior", "encoder", "decoder"),
    *("network", "in_shape", "out_shape", "classes"),
}


def components(family: str) -> dict[str, type]:
    """The known classes of a family, by name: ours, and those of modules already imported."""
    found = sorted(
        final_subclasses(BASES[family]),
        key=lambda cls: (short_name(cls) == cls.__name__, cls.__name__),
    )  # ours last: they win a shared name
    return {cls.__name__: cls for cls in found}


def component(family: str, declared: Declared) -> Component:
    """The class that `declared` names, and its options, checked and complete.

    An option that takes a schedule may be declared in the same way; it comes back made.
    """
    if isinstance(declared, Component):
        return declared
    name, options = name_and_options(family, declared)
    cls = named_class(family, name)
    check_options(f"{family} {cls.__name__}", options, option_names(cls))
    options = {name: _value(cls, name, value) for name, value in options.items()}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, family, skip=INJECTED)
    try:
        checked = parser.parse_object({family: options} if options else {})
    except ArgumentError as error:
        raise ValueError(f"{family} {cls.__name__}: {error}") from error
    return Component(cls, {key: checked[family][key] for key in option_names(cls)})


def declare(family: str, declared: Declared, path: Sequence[str], text: str) -> dict[str, Any]:
    """A declaration with what an argument such as `--prior.num_components 5` adds to it.

    Args:
        family: That of the class.
        declared: What was declared so far.
        path: Names after that of the family: none or "class_path" for the class, which drops
            the options of another one; or an option, and below it what a schedule is made of.
        text: The value, as YAML.

    Raises:
        ValueError: If it names an unknown class.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    so_far = declared.plain if isinstance(declared, Component) else declared
    name, options = name_and_options(family, so_far)
    if path in ([], ["class_path"]):
        chosen, given = name_and_options(family, value)
        cls = named_class(family, chosen)
        same = name in (cls.__name__, short_name(cls))
        return {"class_path": chosen, "init_args": given or (options if same else {})}
    first, *rest = path[1:] if path[0] == "init_args" else path
    if rest:
        inner = options.get(first)
        inner = inner if isinstance(inner, Mapping) else str(inner)
        value = declare("schedule", inner, rest, text)
    return {"class_path": name, "init_args": {**options, first: value}}


def named_class(family: str, name: str) -> type:
    """The known class called `name`, or by its full path."""
    known = components(family)
    module, _, last = name.rpartition(".")
    for cls in known.values():
        if name in (cls.__name__, f"{cls.__module__}.{cls.__qualname__}"):
            return cls
        if getattr(sys.modules.get(module), last, None) is cls:  # a re-export of it
            return cls
    raise ValueError(
        f"{family} {name!r} is unknown{closest(name, known)}: choose one of "
        f"{', '.join(sorted(known))}, or import the module of your own class first"
    )


def _value(cls: type, option: str, declared: Any) -> Any:
    """An option of `cls`, a schedule made; other classes are refused, so nothing is imported."""
    hint = get_type_hints(cls.__init__).get(option)  # type: ignore[misc]
    is_text = isinstance(declared, str) and as_number(declared) is None
    if objectives.Schedule in get_args(hint) and (is_text or isinstance(declared, Mapping)):
        schedule, settings = component("schedule", declared)
        return schedule(**settings)
    if not _is_plain(hint):
        for name in _class_paths(declared):
            raise ValueError(
                f"{cls.__name__}: {option} cannot be {name!r}: a declaration holds numbers, "
                "texts and lists; make other objects inside your class"
            )
    return declared


def option_names(cls: type) -> list[str]:
    """Names of the arguments of `cls` that a user sets."""
    return [name for name in inspect.signature(cls).parameters if name not in INJECTED]


def _is_plain(hint: Any) -> bool:
    """Whether text for an option of this type can name nothing that a parser would import."""
    parts = get_args(hint)
    if get_origin(hint) is Literal or hint in PLAIN:
        return True
    return get_origin(hint) in (*PLAIN, Union, UnionType, Sequence) and all(map(_is_plain, parts))


def _class_paths(value: Any) -> Iterator[str]:
    """Texts that may be paths of classes or functions, at any depth."""
    if isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _class_paths(part)
    elif isinstance(value, str) and "." in value:
        yield value


def short_name(cls: type) -> str:
    """The name of a class, with its module unless it is ours."""
    ours = cls.__module__.startswith("pyro_vae.")
    return cls.__name__ if ours else f"{cls.__module__}.{cls.__qualname__}"


def given(function: Callable[..., Any], known: Mapping[str, Any], *args: Any) -> Any:
    """What a function or class makes of `args` and those of `known` that it takes."""
    taken = inspect.signature(function).parameters
    return function(*args, **{name: value for name, value in known.items() if name in taken})
