"""From declarations to a VAE, made anew or loaded from a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae import likelihoods, networks
from pyro_vae.arguments import as_shape, check_options, check_whole, name_and_options
from pyro_vae.classes import ClassVAE
from pyro_vae.data.mapped import Mapped
from pyro_vae.declarations import (
    BASES,
    Declared,
    component,
    components,
    make,
    named_class,
    option_names,
    parameters,
    short_name,
    size_of,
)
from pyro_vae.files import reading
from pyro_vae.hierarchy import Layers, Lowest
from pyro_vae.memory import parameters_that_fit
from pyro_vae.training import load_weights, put_weights, read_run
from pyro_vae.vae import VAE

__all__ = ["BASES", "build", "component", "components", "default_transform", "load"]

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

    A part is a class name, or `{name: {option: value}}`, or `{"class_path": name, "init_args":
    {option: value}}` as in YAML.
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
            none. Every network is conditioned on the class.
        label_weight: What each known label adds to objectives: this times log p(y | x).

    Raises:
        ValueError: If a name or option is unknown (with the closest known one), or an option has
            the wrong type; if `hierarchy` and `latent_dim` do not fit; if the parameters cannot
            fit in memory.

    Example:
        >>> vae = build((1, 8, 8), latent_dim=5, prior="MixtureOfGaussians")
        >>> vae.sample(3).shape
        torch.Size([3, 1, 8, 8])
    """
    sizes = as_shape("latent_dim", latent_dim)
    order = _order(latent_dim, hierarchy, skip)
    labelled = _labelled(classes, label_weight, condition_dim)
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
    inputs = size_of(declared["likelihood"], "input_shape", shape, missing=missing)
    filled: dict[str, Any] = {"latent_dim": sizes[-1], "data_shape": shape}
    filled |= {"classes": classes} if classes else {}
    seen = sum(sizes) if skip else sizes[0]
    raw = likelihood_class.out_shape(shape, **options)  # type: ignore[attr-defined]
    network = make(declared["decoder"], {"in_shape": (seen,), "out_shape": raw})
    filled["decoder"] = Lowest(network, seen) if seen < sum(sizes) else network
    made_likelihood = make(declared["likelihood"], filled)
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
            family: {"class_path": short_name(cls), "init_args": options}
            for family, (cls, options) in declared.items()
        },
    }
    return vae


def _labelled(classes: int, label_weight: float, condition_dim: int) -> dict[str, Any]:
    """What is declared of classes; empty if there are none."""
    check_whole(0, condition_dim=condition_dim, classes=classes)
    if condition_dim and classes or label_weight and not classes:
        raise ValueError(
            "classes go with condition_dim=0, for a datum has one y, and label_weight with "
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
    return layers, make(order, {"posteriors": posteriors, "prior": layers})


def _posterior(
    declared: dict[str, Any],
    encoder: tuple[type, dict[str, Any]],
    latent_dim: int,
    reads: tuple[tuple[int, ...], int],
) -> Any:
    """A posterior whose encoder reads an input of a shape, and so many latents beside `y`."""
    (cls, options), (in_shape, latents) = encoder, reads
    out = (size_of(declared["posterior"], "num_params", latent_dim),)
    if latents:
        check_options(f"encoder {cls.__name__}", ["condition_dim"], option_names(cls))
        options = {**options, "condition_dim": options["condition_dim"] + latents}
    made = make((cls, options), {"in_shape": in_shape, "out_shape": out})
    return make(declared["posterior"], {"latent_dim": latent_dim, "encoder": made})


def _prior(declared: dict[str, Any], filled: dict[str, Any]) -> Any:
    """The prior of the top layer, or of the only one."""
    cls, options = declared["prior"]
    if "network" in parameters(cls):
        if not (count := _condition_dim(declared)):
            raise ValueError(
                f"prior {cls.__name__} of the top layer has nothing above it but y: give "
                "condition_dim, or another prior"
            )
        return _given(declared, declared["prior"], filled["latent_dim"], count)
    return make(declared["prior"], filled)


def _given(
    declared: dict[str, Any], prior: tuple[type, dict[str, Any]], latent_dim: int, above: int
) -> Any:
    """A prior given `above` numbers, by a network of the decoder's class if it reads vectors."""
    cls, options = _dense(declared["decoder"])
    shapes = {"in_shape": (above,), "out_shape": (size_of(prior, "num_params", latent_dim),)}
    network = make((cls, {**options, "condition_dim": 0}), shapes)
    return make(prior, {"latent_dim": latent_dim, "network": network})


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


def _conditioned(family: str, declared: Declared, condition_dim: int) -> Declared:
    if not condition_dim:
        return declared
    name, options = name_and_options(family, declared)
    given = options.get("condition_dim") or condition_dim  # 0 is the default, filled in by parsers
    return {"class_path": name, "init_args": {**options, "condition_dim": given}}


def default_transform(likelihood: type, levels: int | None, x: Tensor | Mapped) -> str:
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
