"""Checks declarations (names of classes with their options), and builds VAEs from them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from inspect import Parameter, signature
from pathlib import Path
from types import EllipsisType, NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from pyro_vae import likelihoods, networks, objectives, posteriors, priors
from pyro_vae.arguments import (
    as_plain,
    as_shape,
    check_options,
    check_whole,
    closest,
    final_subclasses,
    name_and_options,
)
from pyro_vae.classes import ClassVAE
from pyro_vae.data.schema import as_number
from pyro_vae.files import reading
from pyro_vae.hierarchy import Inference, Layers, Lowest
from pyro_vae.runtime import parameters_that_fit
from pyro_vae.training import load_weights, put_weights, read_run
from pyro_vae.vae import VAE

BASES: dict[str, type] = {  # the base class of each family
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
TYPE_WORDS = {  # types in words, for error messages
    **{"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"},
    **dict.fromkeys(("list", "tuple"), "a list such as [300,300]"),
    **{"dict": "a mapping", "NoneType": "null"},
}
INJECTED = {  # arguments of classes that `build` fills in
    *("latent_dim", "data_shape", "posterior", "posteriors", "prior", "encoder", "decoder"),
    *("network", "in_shape", "out_shape", "classes"),
}
CLASS_PATH = re.compile(r"[^\W\d]\w*\.\w[\w.]*")  # the path of a class or function, in text
DENSE = (networks.MLP, networks.GatedMLP)  # networks that read vectors


class Component(NamedTuple):
    """A class and the values of all of its options, checked."""

    cls: Any
    options: dict[str, Any]

    def make(self, **filled: Any) -> Any:
        """Makes the object, with those of `filled` that its class takes."""
        return call_with(self.cls, {**filled, **self.options})

    def replace(self, **options: Any) -> Component:
        """Returns the same class with some options changed.

        Raises:
            ValueError: If it has no option of that name.
        """
        check_options(self.cls.__name__, options, self.options)
        return Component(self.cls, {**self.options, **options})

    @property
    def plain(self) -> dict[str, Any]:
        """The declaration for a file; our classes have short names, which outlast a move."""
        options = {}
        for name, value in self.options.items():
            if isinstance(value, objectives.Schedule):
                names = signature(type(value)).parameters
                value = Component(type(value), {n: getattr(value, n) for n in names}).plain
            options[name] = list(value) if isinstance(value, tuple) else value
        return {"class_path": short_name(self.cls), "init_args": options}


Declared = str | Mapping[str, Any] | Component


@parameters_that_fit()
def build(
    data_shape: int | Iterable[int],
    latent_dim: int | Sequence[int],
    prior: Declared = "StandardNormal",
    likelihood: Declared = "Bernoulli",
    posterior: Declared = "DiagonalNormal",
    encoder: Declared = "MLP",
    decoder: Declared = "MLP",
    condition_dim: int = 0,
    missing: bool = False,
    hierarchy: Declared | None = None,
    skip: bool = False,
    classes: int = 0,
    label_weight: float = 0.0,
    classifier: bool = False,
) -> VAE:
    """Builds a VAE from the names of its parts.

    A part is a class name, or `{name: {option: value}}`, or `{"class_path": name, "init_args":
    {option: value}}` as in YAML. The classes of pyro_vae and those that the caller has imported
    are known; nothing else is imported. Latent size, data shape, networks and, for a VampPrior,
    the posterior are filled in by argument name; the output sizes of networks follow from
    `num_params`.

    Args:
        data_shape: Shape of one datum.
        latent_dim: Latent size D; for a hierarchy that of each layer, from the data upwards.
        prior: Name of a prior, in a hierarchy that of the top layer; the layers below have a
            `ConditionalNormal`, with a network of the decoder's class if that reads vectors, else
            an MLP.
        likelihood: Name of a likelihood.
        posterior: Name of a posterior.
        encoder: Name of a network from data.
        decoder: Name of a network to data.
        condition_dim: Length of the vector `y` that both networks are conditioned on.
        missing: Whether NaN in the data stands for a missing entry; see `VAE`.
        hierarchy: Name of the order of inference of several layers: "TopDown" (the default if
            `latent_dim` has several sizes), "BottomUp" or "Ladder".
        skip: Whether p(x | z) sees all layers of a hierarchy, or only the lowest one.
        classes: Number of classes; 0 for none. Otherwise a `ClassVAE` is built, whose labels may
            be known for some data or for none, and whose networks are conditioned on the class.
        label_weight: Weight of log p(y | x), which each known label adds to objectives.
        classifier: Whether a network like the encoder learns q(y | x) beside the model, and
            log q(y | x) is weighted instead; useful with few labels, see `ClassVAE`.

    Raises:
        ValueError: If a name or option is unknown (with the closest known one), or an option has
            the wrong type; if `hierarchy` and `latent_dim` do not fit; if the parameters cannot
            fit in memory.

    Example:
        >>> vae = build((1, 8, 8), latent_dim=5, prior="MixtureOfGaussians")
        >>> vae.sample(3).shape
        torch.Size([3, 1, 8, 8])
    """
    latent_dim, missing, skip, classifier = map(as_plain, (latent_dim, missing, skip, classifier))
    condition_dim, classes, label_weight = map(as_plain, (condition_dim, classes, label_weight))
    for name, value in (("missing", missing), ("skip", skip), ("classifier", classifier)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False; got {value!r}")
    sizes = as_shape("latent_dim", latent_dim)
    layered = isinstance(latent_dim, list)
    if len(sizes) == 1 and (layered or skip or hierarchy is not None):
        raise ValueError(
            "a hierarchy needs a latent_dim of two sizes or more, from the data upwards, such as "
            f"[40, 40]; got {latent_dim!r}"
        )
    labels = _class_options(condition_dim, classes, label_weight, classifier)
    shape = as_shape("data_shape", as_plain(data_shape))
    declared = {"prior": prior, "likelihood": likelihood, "posterior": posterior}
    declared |= {"encoder": encoder, "decoder": decoder}
    declared |= {"hierarchy": "TopDown" if hierarchy is None else hierarchy} if layered else {}
    parts = {family: component(family, part) for family, part in declared.items()}
    for family in ("encoder", "decoder") if condition_dim or classes else ():
        own = parts[family].options.get("condition_dim")
        parts[family] = parts[family].replace(condition_dim=own or condition_dim or classes)
    for family in ("likelihood", "posterior"):  # options that multiply the widths of networks
        cls, options = parts[family]
        counts = signature(cls.num_params).parameters.keys() & options
        check_whole(**{name: options[name] for name in counts if type(options[name]) is int})
    cls, options = parts["likelihood"]
    in_shape = call_with(cls.input_shape, {**options, "missing": missing}, shape)
    filled: dict[str, Any] = {"latent_dim": sizes[-1], "data_shape": shape}
    filled |= {"classes": classes} if classes else {}
    modules = {**labels, "likelihood": _likelihood(parts, filled, sizes, skip)}
    filled["data_shape"] = in_shape  # pseudo-inputs have the shape that the encoder reads
    modules["prior"], modules["posterior"] = _latents(parts, filled, sizes)
    if classifier:
        unconditional = parts["encoder"].replace(condition_dim=0)
        modules["classifier"] = unconditional.make(in_shape=in_shape, out_shape=(classes,))
    vae = (ClassVAE if classes else VAE)(missing=missing, **modules)
    vae.declaration = {
        "data_shape": list(shape),
        "latent_dim": list(sizes) if layered else sizes[0],
        **({"skip": skip} if layered else {}),
        **({"missing": True} if missing else {}),
        **labels,
        **{family: part.plain for family, part in parts.items()},
    }
    return vae


def _class_options(
    condition_dim: int, classes: int, label_weight: float, classifier: bool
) -> dict[str, Any]:
    """Returns the further arguments of a `ClassVAE`, checked; {} without classes."""
    check_whole(0, condition_dim=condition_dim, classes=classes)
    if condition_dim and classes:
        raise ValueError(
            f"a datum has one y: give classes or a condition, not both; got classes={classes} and "
            f"condition_dim={condition_dim}"
        )
    for name, asked in (("label_weight", label_weight), ("classifier", classifier)):
        if asked and not classes:
            raise ValueError(f"{name} needs classes: give classes too; got {asked}")
    labels: dict[str, Any] = {"classes": classes, "label_weight": label_weight} if classes else {}
    return labels | ({"classifier": True} if classifier else {})


def _likelihood(
    parts: dict[str, Component], filled: dict[str, Any], sizes: tuple[int, ...], skip: bool
) -> Any:
    cls, options = parts["likelihood"]
    size = sum(sizes) if skip else sizes[0]
    out_shape = cls.out_shape(filled["data_shape"], **options)
    network = parts["decoder"].make(in_shape=(size,), out_shape=out_shape)
    decoder = Lowest(network, size) if size < sum(sizes) else network
    return parts["likelihood"].make(**filled, decoder=decoder)


def _latents(
    parts: dict[str, Component], filled: dict[str, Any], sizes: tuple[int, ...]
) -> tuple[Any, Any]:
    hierarchy, top, posterior = parts.get("hierarchy"), parts["prior"], parts["posterior"]
    encoder, shape = parts["encoder"], filled["data_shape"]
    condition_dim = encoder.options.get("condition_dim", 0)
    reads = [(shape, 0)] if hierarchy is None else hierarchy.cls.reads(shape, sizes)
    posteriors = []
    for size, (in_shape, above) in zip(sizes, reads):
        network = encoder if in_shape == shape else _dense(encoder)
        network = network.replace(condition_dim=condition_dim + above) if above else network
        count = call_with(posterior.cls.num_params, posterior.options, size)
        module = network.make(in_shape=in_shape, out_shape=(count,))
        posteriors.append(posterior.make(latent_dim=size, encoder=module))
    filled = {**filled, "posterior": posteriors[-1], "data_shape": reads[-1][0]}
    if "network" in signature(top.cls).parameters:
        if not condition_dim:
            raise ValueError(
                f"prior {top.cls.__name__} of the top layer has nothing above it but y: give "
                "condition_dim, or another prior"
            )
        filled["network"] = _prior_network(top, parts["decoder"], sizes[-1], condition_dim)
    prior = top.make(**filled)
    if hierarchy is None:
        return prior, posteriors[0]
    lower_prior, lower_priors = component("prior", "ConditionalNormal"), []
    for size, above in zip(sizes, sizes[1:]):
        network = _prior_network(lower_prior, parts["decoder"], size, above + condition_dim)
        lower_priors.append(lower_prior.make(latent_dim=size, network=network))
    layers = Layers([*lower_priors, prior])
    return layers, hierarchy.make(posteriors=posteriors, prior=layers)


def _prior_network(prior: Component, decoder: Component, latent_dim: int, above: int) -> Any:
    """Makes the network of a prior that is conditioned on a vector of length `above`."""
    out_shape = (call_with(prior.cls.num_params, prior.options, latent_dim),)
    return _dense(decoder).replace(condition_dim=0).make(in_shape=(above,), out_shape=out_shape)


def _dense(network: Component) -> Component:
    """Returns a declared network if it reads vectors, else an MLP with the same condition."""
    if network.cls in DENSE:
        return network
    mlp = component("encoder", "MLP")
    return mlp.replace(condition_dim=network.options.get("condition_dim", 0))


def load(run: str | os.PathLike[str], vae: VAE | None = None) -> VAE:
    """Loads the VAE of a run folder, with its best weights, in eval mode.

    No code of the folder is executed: weights are safetensors, and a declaration may name only
    classes that are known already.

    Args:
        run: Folder that `fit` or `pyro-vae train` wrote.
        vae: The module to load into, if `build` did not make it.

    Raises:
        ValueError: If the folder is no run, is incomplete or newer, or does not fit `vae`.
    """
    declaration = read_run(run)["declaration"]
    if vae is None:
        if declaration is None:
            raise ValueError(f"{run}: the VAE was not made by build(): give it, load(run, vae)")
        with reading(Path(run) / "run.json"):
            likelihood = add_new_options(declaration["likelihood"])
            vae = build(**{**declaration, "likelihood": likelihood})
            vae.declaration = declaration  # unchanged, so that the run can be resumed
    put_weights(vae, load_weights(run), run)
    return vae.eval()


def add_new_options(likelihood: Declared) -> dict[str, Any]:
    """Returns the likelihood of a run, with the options that older versions did not write."""
    name, options = name_and_options("likelihood", likelihood)
    cls: Any = named_class("likelihood", name)
    return {"class_path": name, "init_args": {**cls.old_defaults, **options}}


def components(family: str) -> dict[str, type]:
    """Returns the known classes of a family, by name: ours, and those of imported modules.

    If several have one name, ours is returned, else the last one defined.
    """
    found = sorted(
        final_subclasses(BASES[family]), key=lambda cls: short_name(cls) == cls.__name__
    )
    return dict(sorted({cls.__name__: cls for cls in found}.items()))


def component(family: str, declared: Declared) -> Component:
    """Returns the class that `declared` names, and the values of all its options, checked.

    An option that takes a schedule may be declared in the same way; the schedule is then made.
    """
    if isinstance(declared, Component):
        return declared
    name, options = name_and_options(family, declared)
    cls = named_class(family, name)
    parameters = signature(cls).parameters.values()
    variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    names = [p.name for p in parameters if p.kind not in variadic and p.name not in INJECTED]
    check_options(f"{family} {cls.__name__}", options, names)
    options = {name: _option_value(cls, name, value) for name, value in options.items()}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, family, skip=INJECTED)
    try:
        checked = parser.parse_object({family: options} if options else {})
    except ArgumentError as error:
        line = plain_words(str(error)).replace(f"{family}.", "")
        raise ValueError(f"{family} {cls.__name__}: {line}") from error
    return Component(cls, {name: checked[family][name] for name in names})


def plain_words(line: str) -> str:
    """Puts what jsonargparse says of a value of a wrong type in our words; keeps other lines."""
    line = " ".join(line.split())
    match = re.fullmatch(r"(.*?)Parser key \"([\w.]+)\": (.*) value:(.*)", line)
    text = match[3].partition(" Errors:")[0] if match else ""
    types = re.findall(r"Literal\[(.*?)\]|<class '(\w+)'>|(list|tuple)\[", text)
    words = [names.replace("'", "") or TYPE_WORDS.get(a or b, a) for names, a, b in types]
    if match is None or not words:
        return line
    words.sort(key="null".__eq__)  # null comes last
    option = match[2].rpartition(".")[2]
    expected = " or ".join(words).replace(", ", " or ")
    return f"{match[1]}{option} must be {expected}; got {match[4].strip() or repr('')}"


def declare(family: str, declared: Declared, path: Sequence[str], text: str) -> dict[str, Any]:
    """Returns a declaration changed by an argument such as `--prior.num_components 5`.

    Args:
        family: The family of the class.
        declared: The declaration so far.
        path: Names after that of the family: none or "class_path" for the class, which drops
            the options of another class; or an option, and then an option of its schedule.
        text: The value, as YAML.

    Raises:
        ValueError: If it names an unknown class, or one column of a table.
    """
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    so_far = declared.plain if isinstance(declared, Component) else declared
    name, options = name_and_options(family, so_far)
    if path in ([], ["class_path"]):
        new_name, new_options = name_and_options(family, value)
        cls = named_class(family, new_name)
        is_same = name in (cls.__name__, short_name(cls))
        return {"class_path": new_name, "init_args": new_options or (options if is_same else {})}
    first, *rest = path[1:] if path[0] == "init_args" else path
    if rest:
        if first == "columns":
            raise ValueError("give columns as a mapping: --likelihood.columns '{NAME: KIND}'")
        inner = options.get(first)
        inner = inner if isinstance(inner, Mapping) else str(inner)
        value = declare("schedule", inner, rest, text)
    return {"class_path": name, "init_args": {**options, first: value}}


def named_class(family: str, name: str) -> type:
    """Returns the known class of a name or path, also by the path of a module that imports it."""
    known = components(family)
    if name in known:
        return known[name]
    module, _, last = name.rpartition(".")
    for cls in reversed(final_subclasses(BASES[family])):
        full = f"{cls.__module__}.{cls.__qualname__}"
        if name == full or getattr(sys.modules.get(module), last, None) is cls:
            return cls
    raise ValueError(
        f"{family} {name!r} is unknown{closest(name, known)}: choose one of {', '.join(known)}, "
        "or import the module of your own class first"
    )


def _option_value(cls: type, option: str, declared: Any) -> Any:
    """Returns the value of an option, a schedule made; raises ValueError for other classes."""
    hint, declared = None, as_plain(declared)
    with suppress(NameError):  # types that are imported for type checkers alone
        hint = get_type_hints(cls.__init__).get(option)  # type: ignore[misc]
    is_text = isinstance(declared, str) and as_number(declared) is None
    if objectives.Schedule in get_args(hint) and (is_text or isinstance(declared, Mapping)):
        schedule, settings = component("schedule", declared)
        return schedule(**settings)
    if not _is_plain(hint) and (path := CLASS_PATH.search(repr(declared))):
        raise ValueError(
            f"{cls.__name__}: {option} cannot be {path[0]!r}: a declaration holds numbers, "
            "texts and lists; make other objects inside your class"
        )
    return declared


def _is_plain(hint: Any) -> bool:
    """Returns whether no text for an option of this type can make a parser import something."""
    parts = get_args(hint)
    if get_origin(hint) is Literal or hint in PLAIN:
        return True
    return get_origin(hint) in (*PLAIN, Union, UnionType, Sequence) and all(map(_is_plain, parts))


def short_name(cls: type) -> str:
    """Returns the name of a class, with its module unless it is ours."""
    ours = cls.__module__.startswith("pyro_vae.")
    return cls.__name__ if ours else f"{cls.__module__}.{cls.__qualname__}"


def call_with(function: Callable[..., Any], known: Mapping[str, Any], *args: Any) -> Any:
    """Calls a function or class with `args` and those of `known` that it takes."""
    parameters = signature(function).parameters
    return function(*args, **{name: value for name, value in known.items() if name in parameters})
