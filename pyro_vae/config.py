"""Declarations, names with options, to objects and back."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor
from torch.distributions import constraints

from pyro_vae import likelihoods, networks, objectives, posteriors, priors
from pyro_vae.arguments import as_shape, check_whole, closest
from pyro_vae.classes import ClassVAE
from pyro_vae.files import reading
from pyro_vae.hierarchy import Inference, Layers, Lowest
from pyro_vae.memory import parameters_that_fit
from pyro_vae.training import load_weights, put_weights, read_run
from pyro_vae.vae import VAE

__all__ = [
    "BASES",
    "INJECTED",
    "build",
    "check_options",
    "check_value",
    "closest",
    "component",
    "components",
    "default_transform",
    "load",
    "named_class",
    "option_names",
    "short_names",
]

Declared = str | Mapping[str, Any]

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
DENSE = (networks.MLP, networks.GatedMLP)  # networks that read vectors


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
) -> VAE:
    """A VAE from the names of its parts.

    A part is a class name, or `{"class_path": name, "init_args": {option: value}}` as in YAML.
    Known are the classes of pyro_vae and those that the caller has imported; nothing else is
    imported. Latent size, data shape, networks and, for a VampPrior, the posterior are filled
    in by argument name; the networks' output sizes follow from `num_params`.

    Args:
        data_shape: Shape of one datum.
        latent_dim: Latent size D; for a hierarchy that of each layer, from the data upwards.
        prior: Name of a prior, in a hierarchy that of the top layer; those below are
            `ConditionalNormal`, by a network of the decoder's class if that reads vectors,
            else an MLP.
        likelihood: Name of a likelihood.
        posterior: Name of a posterior.
        encoder: Name of a network from data.
        decoder: Name of a network to data.
        condition_dim: Length of the vector `y` that both networks are conditioned on.
        missing: Whether NaN in the data stands for a missing entry; see `VAE`.
        hierarchy: Name of the order of inference of several layers: "TopDown" (taken if
            `latent_dim` has several sizes), "BottomUp" or "Ladder".
        skip: Whether p(x | z) sees all layers of a hierarchy, or the one next to it alone.
        classes: Number of classes, known for some data or none, which makes a `ClassVAE`; 0 for
            none. Both networks are conditioned on the class.
        label_weight: What each known label adds to objectives: this times log p(y | x).

    Raises:
        ValueError: If a name or option is unknown (with the closest known one), or an option has
            the wrong type; if `hierarchy` and `latent_dim` do not fit; if the parameters cannot
            fit in memory.
    """
    sizes = as_shape("latent_dim", latent_dim)
    order = _order(latent_dim, hierarchy, skip)
    labelled = _labelled(classes, label_weight, condition_dim, order is not None)
    condition_dim = condition_dim or classes
    shape = as_shape("data_shape", data_shape)
    declared = {
        "prior": component("prior", prior),
        "likelihood": component("likelihood", likelihood),
        "posterior": component("posterior", posterior),
        "encoder": component("encoder", _conditioned("encoder", encoder, condition_dim)),
        "decoder": component("decoder", _conditioned("decoder", decoder, condition_dim)),
    }
    likelihood_class, options = declared["likelihood"]
    inputs = _size(declared["likelihood"], "input_shape", shape, missing=missing)
    filled: dict[str, Any] = {"latent_dim": sizes[-1], "data_shape": shape}
    filled |= {"classes": classes} if classes else {}
    seen = sum(sizes) if skip else sizes[0]
    raw = likelihood_class.out_shape(shape, **options)  # type: ignore[attr-defined]
    network = _make(declared["decoder"], {"in_shape": (seen,), "out_shape": raw})
    filled["decoder"] = Lowest(network, seen) if seen < sum(sizes) else network
    made_likelihood = _make(declared["likelihood"], filled)
    filled["data_shape"] = inputs  # a prior's pseudo-inputs lie where the encoder reads
    made_prior, made_posterior = _latents(declared, order, filled, sizes)
    kind: Any = ClassVAE if classes else VAE
    vae: VAE = kind(made_prior, made_likelihood, made_posterior, missing, **labelled)
    if order is not None:
        declared["hierarchy"] = order
    vae.declaration = {
        "data_shape": list(shape),
        "latent_dim": sizes[0] if order is None else list(sizes),
        **({} if order is None else {"skip": skip}),
        **({"missing": True} if missing else {}),
        **labelled,
        **{
            family: {"class_path": _name(cls), "init_args": options}
            for family, (cls, options) in declared.items()
        },
    }
    return vae


def _labelled(
    classes: int, label_weight: float, condition_dim: int, several: bool
) -> dict[str, Any]:
    """What is declared of classes; empty if there are none."""
    check_whole(0, condition_dim=condition_dim, classes=classes)
    if (condition_dim or several) and classes or label_weight and not classes:
        raise ValueError(
            "classes go with condition_dim=0 and one layer of latents, and label_weight with "
            f"classes; got classes={classes}, condition_dim={condition_dim}, "
            f"label_weight={label_weight}"
        )
    return {"classes": classes, "label_weight": label_weight} if classes else {}


def _order(
    latent_dim: Any, hierarchy: Declared | None, skip: bool
) -> tuple[type, dict[str, Any]] | None:
    """The order of inference that is declared for several layers of latents; None for one."""
    if not isinstance(skip, bool):
        raise ValueError(f"skip must be True or False; got {skip!r}")
    several = isinstance(latent_dim, tuple | list)
    if several and len(latent_dim) > 1:
        return component("hierarchy", "TopDown" if hierarchy is None else hierarchy)
    if several or skip or hierarchy is not None:
        raise ValueError(
            "a hierarchy needs a latent_dim of two sizes or more, from the data upwards, such as "
            f"[40, 40]; got {latent_dim!r}"
        )
    return None


def _latents(
    declared: dict[str, Any],
    order: tuple[type, dict[str, Any]] | None,
    filled: dict[str, Any],
    sizes: tuple[int, ...],
) -> tuple[Any, Any]:
    """Prior and posterior, of one layer or of several."""
    shape, encoder = filled["data_shape"], declared["encoder"]
    reads = [(shape, 0)] if order is None else order[0].reads(shape, sizes)  # type: ignore[attr-defined]
    posteriors = [
        _posterior(declared, encoder if read[0] == shape else _dense(encoder), size, read)
        for size, read in zip(sizes, reads)
    ]
    filled = {**filled, "posterior": posteriors[-1], "data_shape": reads[-1][0]}
    prior = _prior(declared, filled)
    if order is None:
        return prior, posteriors[0]
    lower, given = component("prior", "ConditionalNormal"), _condition_dim(declared)
    below = [_given(declared, lower, size, up + given) for size, up in zip(sizes, sizes[1:])]
    layers = Layers([*below, prior])
    return layers, _make(order, {"posteriors": posteriors, "prior": layers})


def _posterior(
    declared: dict[str, Any],
    encoder: tuple[type, dict[str, Any]],
    latent_dim: int,
    reads: tuple[tuple[int, ...], int],
) -> Any:
    """A posterior whose encoder reads an input of a shape, and so many latents beside `y`."""
    (cls, options), (in_shape, latents) = encoder, reads
    out = (_size(declared["posterior"], "num_params", latent_dim),)
    if latents:
        check_options("encoder", cls, ["condition_dim"])
        options = {**options, "condition_dim": options["condition_dim"] + latents}
    made = _make((cls, options), {"in_shape": in_shape, "out_shape": out})
    return _make(declared["posterior"], {"latent_dim": latent_dim, "encoder": made})


def _prior(declared: dict[str, Any], filled: dict[str, Any]) -> Any:
    """The prior of the top layer, or of the only one."""
    cls, options = declared["prior"]
    if "network" in _parameters(cls):
        if not (count := _condition_dim(declared)):
            raise ValueError(
                f"prior {cls.__name__} of the top layer has nothing above it but y: give "
                "condition_dim, or another prior"
            )
        return _given(declared, declared["prior"], filled["latent_dim"], count)
    return _make(declared["prior"], filled)


def _given(
    declared: dict[str, Any], prior: tuple[type, dict[str, Any]], latent_dim: int, above: int
) -> Any:
    """A prior given `above` numbers, by a network of the decoder's class if it reads vectors."""
    cls, options = _dense(declared["decoder"])
    shapes = {"in_shape": (above,), "out_shape": (_size(prior, "num_params", latent_dim),)}
    network = _make((cls, {**options, "condition_dim": 0}), shapes)
    return _make(prior, {"latent_dim": latent_dim, "network": network})


def _dense(network: tuple[type, dict[str, Any]]) -> tuple[type, dict[str, Any]]:
    """A declared network if it reads vectors, else an MLP on the same condition."""
    cls, options = network
    if cls in DENSE:
        return network
    given = {"condition_dim": options.get("condition_dim", 0)}
    return component("encoder", {"class_path": "MLP", "init_args": given})


def _condition_dim(declared: dict[str, Any]) -> int:
    return declared["encoder"][1].get("condition_dim", 0)


def load(run: str | os.PathLike[str], vae: VAE | None = None) -> VAE:
    """The VAE of a run folder, with its best weights, in eval mode.

    Nothing is executed: weights are safetensors, and a declaration may name only classes that
    are known already.

    Args:
        run: Folder that `fit` or `pyro-vae train` wrote.
        vae: The module to load into, for one that `build` did not make.

    Raises:
        ValueError: If the folder is no run, is incomplete or newer, or does not fit `vae`.
    """
    declaration = read_run(run)["declaration"]
    if vae is None:
        if declaration is None:
            raise ValueError(f"{run}: the VAE was not made by build(): give it, load(run, vae)")
        with reading(Path(run) / "run.json"):
            vae = build(**_as_then(declaration))
    put_weights(vae, load_weights(run), run)
    return vae.eval()


def _as_then(declaration: dict[str, Any]) -> dict[str, Any]:
    """The declaration of a run, with what its options meant before they had names."""
    named = declaration["likelihood"]
    cls: Any = named_class("likelihood", named["class_path"])
    return {
        **declaration,
        "likelihood": {**named, "init_args": {**cls.before, **named["init_args"]}},
    }


def components(family: str) -> dict[str, type]:
    """The known classes of a family, by name: ours, and those of modules already imported."""
    found = sorted(
        _final_subclasses(BASES[family]), key=lambda cls: (_is_ours(cls), cls.__name__)
    )  # ours last: they win a shared name
    return {cls.__name__: cls for cls in found}


def component(family: str, declared: Declared) -> tuple[type, dict[str, Any]]:
    """The class that `declared` names, and its options, checked and complete.

    An option that takes a schedule may be declared in the same way; it comes back made.
    """
    if isinstance(declared, str):
        declared = {"class_path": declared}
    if not isinstance(declared, Mapping) or not (
        {"class_path"} <= set(declared) <= {"class_path", "init_args"}
        and isinstance(declared.get("init_args"), Mapping | None)
    ):
        raise ValueError(
            f"{family} must be a class name or a mapping of class_path and init_args; "
            f"got {declared!r}"
        )
    cls = named_class(family, declared["class_path"])
    options = dict(declared.get("init_args") or {})
    check_options(family, cls, options)
    for name, value in options.items():
        check_value(cls, name, value)
    options = {name: _made_schedule(cls, name, value) for name, value in options.items()}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, family, skip=INJECTED & set(_parameters(cls)))
    try:
        checked = parser.parse_object({family: options} if options else {})
    except ArgumentError as error:
        raise ValueError(f"{family} {cls.__name__}: {error}") from error
    return cls, {key: _plain(checked[family][key]) for key in option_names(cls)}


def named_class(family: str, name: Any) -> type:
    """The known class called `name`, or by its full path."""
    known = components(family)
    name = str(name)
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


def check_options(family: str, cls: type, options: Iterable[str]) -> None:
    """Refuses options that `cls` does not have."""
    names = option_names(cls)
    for option in options:
        if option not in names:
            raise ValueError(
                f"{family} {cls.__name__} has no option {option!r}{closest(option, names)}: "
                f"it has {', '.join(names) or 'none'}"
            )


def check_value(cls: type, option: str, declared: Any) -> None:
    """Refuses classes for an option of `cls`, but for known schedules: nothing is imported."""
    if _declares_schedule(cls, option, declared):
        component("schedule", declared)
    elif not _is_plain(get_type_hints(cls.__init__).get(option)):  # type: ignore[misc]
        for name in _class_paths(declared):
            raise ValueError(
                f"{cls.__name__}: {option} cannot be {name!r}: a declaration holds numbers, "
                "texts and lists; make other objects inside your class"
            )


def option_names(cls: type) -> list[str]:
    """Names of the arguments of `cls` that a user sets."""
    return [name for name in _parameters(cls) if name not in INJECTED]


def _made_schedule(cls: type, option: str, declared: Any) -> Any:
    """The schedule that is declared for an option of `cls`; any other value as it is."""
    if not _declares_schedule(cls, option, declared):
        return declared
    schedule, settings = component("schedule", declared)
    return schedule(**settings)


def _declares_schedule(cls: type, option: str, declared: Any) -> bool:
    hints = get_args(get_type_hints(cls.__init__).get(option))  # type: ignore[misc]
    if objectives.Schedule not in hints or not isinstance(declared, str | Mapping):
        return False
    return isinstance(declared, Mapping) or not _is_number(declared)


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


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _final_subclasses(cls: type) -> set[type]:
    children: set[type] = set().union(*map(_final_subclasses, cls.__subclasses__()))
    abstract = any(
        getattr(getattr(cls, name, None), "__isabstractmethod__", False) for name in dir(cls)
    )
    return children | (set() if abstract else {cls})


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("pyro_vae.")


def _name(cls: type) -> str:
    return cls.__name__ if _is_ours(cls) else f"{cls.__module__}.{cls.__qualname__}"


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def _size(declared: tuple[type, dict[str, Any]], name: str, *args: Any, **more: Any) -> Any:
    """What the class method `name` gives, with those of its class's options that it takes."""
    cls, options = declared
    method = getattr(cls, name)
    taken = set(_parameters(method))
    return method(*args, **{k: v for k, v in {**options, **more}.items() if k in taken})


def _make(declared: tuple[type, dict[str, Any]], filled: dict[str, Any]) -> Any:
    cls, options = declared
    taken = set(_parameters(cls))
    return cls(**{k: v for k, v in filled.items() if k in taken}, **options)


def _conditioned(family: str, declared: Declared, condition_dim: int) -> Declared:
    if not condition_dim:
        return declared
    declared = {"class_path": declared} if isinstance(declared, str) else dict(declared)
    options = dict(declared.get("init_args") or {})
    given = options.get("condition_dim") or condition_dim  # 0 is the default, filled in by parsers
    return {**declared, "init_args": {**options, "condition_dim": given}}


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def short_names(family: str, declared: Mapping[str, Any]) -> dict[str, Any]:
    """`declared` with our classes by their short names, so that moved classes keep old runs."""
    cls = named_class(family, declared["class_path"])
    short = {**declared, "class_path": _name(cls)}
    if declared.get("init_args"):
        short["init_args"] = {
            name: short_names("schedule", value)
            if isinstance(value, Mapping) and _declares_schedule(cls, name, value)
            else value
            for name, value in declared["init_args"].items()
        }
    return short


def default_transform(likelihood: type, levels: int | None, x: Tensor) -> str:
    """Name of the transform that fits raw data `x` to the support of a likelihood."""
    if issubclass(likelihood, likelihoods.Columns):
        return "none"
    support: constraints.Constraint = likelihood.support  # type: ignore[attr-defined]
    if support is constraints.boolean and levels not in (2, None):
        return "threshold"
    if support.is_discrete or levels == 2:
        return "none"
    if levels is not None:
        return "dequantise"
    whole_line = bool(support.check(torch.tensor([-10.0, 10.0])).all())
    return "standardise" if whole_line and x.ndim == 2 else "none"
