"""From declarations to a VAE, made anew or loaded from a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae import likelihoods, networks
from pyro_vae.arguments import as_shape, check_whole
from pyro_vae.classes import ClassVAE
from pyro_vae.data.mapped import Mapped
from pyro_vae.declarations import (
    BASES,
    Component,
    Declared,
    component,
    components,
    given,
    named_class,
)
from pyro_vae.files import reading
from pyro_vae.hierarchy import Layers, Lowest
from pyro_vae.runtime import parameters_that_fit
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
    check_whole(0, condition_dim=condition_dim, classes=classes)
    if condition_dim and classes or label_weight and not classes:
        raise ValueError(
            "classes go with condition_dim=0, for a datum has one y, and label_weight with "
            f"classes; got classes={classes}, condition_dim={condition_dim}, "
            f"label_weight={label_weight}"
        )
    labelled: dict[str, Any] = {}
    if classes:
        labelled = {"classes": classes, "label_weight": label_weight}
    condition_dim = condition_dim or classes
    shape = as_shape("data_shape", data_shape)
    parts = {
        "prior": component("prior", prior),
        "likelihood": component("likelihood", likelihood),
        "posterior": component("posterior", posterior),
        "encoder": component("encoder", encoder),
        "decoder": component("decoder", decoder),
        **({} if order is None else {"hierarchy": order}),
    }
    for family in ("encoder", "decoder") if condition_dim else ():
        own = parts[family].options.get("condition_dim")
        parts[family] = parts[family].having(condition_dim=own or condition_dim)
    cls, options = parts["likelihood"]
    inputs = given(cls.input_shape, {**options, "missing": missing}, shape)
    filled: dict[str, Any] = {"latent_dim": sizes[-1], "data_shape": shape}
    filled |= {"classes": classes} if classes else {}
    seen = sum(sizes) if skip else sizes[0]
    network = parts["decoder"].made(in_shape=(seen,), out_shape=cls.out_shape(shape, **options))
    filled["decoder"] = Lowest(network, seen) if seen < sum(sizes) else network
    made_likelihood = parts["likelihood"].made(**filled)
    filled["data_shape"] = inputs  # a prior's pseudo-inputs lie where the encoder reads
    made_prior, made_posterior = _latents(parts, filled, sizes)
    kind: Any = ClassVAE if classes else VAE
    vae: VAE = kind(made_prior, made_likelihood, made_posterior, missing, **labelled)
    vae.declaration = {
        "data_shape": list(shape),
        "latent_dim": sizes[0] if order is None else list(sizes),
        **({} if order is None else {"skip": skip}),
        **({"missing": True} if missing else {}),
        **labelled,
        **{family: part.plain for family, part in parts.items()},
    }
    return vae


def _order(latent_dim: Any, hierarchy: Declared | None, skip: bool) -> Component | None:
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
    parts: dict[str, Component], filled: dict[str, Any], sizes: tuple[int, ...]
) -> tuple[Any, Any]:
    """Prior and posterior, of one layer or of several."""
    order, encoder, shape = parts.get("hierarchy"), parts["encoder"], filled["data_shape"]
    condition_dim = encoder.options.get("condition_dim", 0)
    reads = [(shape, 0)] if order is None else order.cls.reads(shape, sizes)
    posteriors = []
    for size, (in_shape, above) in zip(sizes, reads):
        network = encoder if in_shape == shape else _dense(encoder)
        network = network.having(condition_dim=condition_dim + above) if above else network
        out_shape = (given(parts["posterior"].cls.num_params, parts["posterior"].options, size),)
        made = network.made(in_shape=in_shape, out_shape=out_shape)
        posteriors.append(parts["posterior"].made(latent_dim=size, encoder=made))
    filled = {**filled, "posterior": posteriors[-1], "data_shape": reads[-1][0]}
    top = parts["prior"]
    if "network" in signature(top.cls).parameters:
        if not condition_dim:
            raise ValueError(
                f"prior {top.cls.__name__} of the top layer has nothing above it but y: give "
                "condition_dim, or another prior"
            )
        filled["network"] = _network_of(top, parts["decoder"], sizes[-1], condition_dim)
    prior = top.made(**filled)
    if order is None:
        return prior, posteriors[0]
    lower, below = component("prior", "ConditionalNormal"), []
    for size, above in zip(sizes, sizes[1:]):
        network = _network_of(lower, parts["decoder"], size, above + condition_dim)
        below.append(lower.made(latent_dim=size, network=network))
    layers = Layers([*below, prior])
    return layers, order.made(posteriors=posteriors, prior=layers)


def _network_of(prior: Component, decoder: Component, latent_dim: int, above: int) -> Any:
    """The network of a prior given `above` numbers, of the decoder's class if it reads vectors."""
    out_shape = (given(prior.cls.num_params, prior.options, latent_dim),)
    return _dense(decoder).having(condition_dim=0).made(in_shape=(above,), out_shape=out_shape)


def _dense(network: Component) -> Component:
    """A declared network if it reads vectors, else an MLP on the same condition."""
    if network.cls in DENSE:
        return network
    mlp = component("encoder", "MLP")
    return mlp.having(condition_dim=network.options.get("condition_dim", 0))


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
            vae = build(**as_named_now(declaration))
            vae.declaration = declaration  # as its run knows it when it goes on
    put_weights(vae, load_weights(run), run)
    return vae.eval()


def as_named_now(declaration: dict[str, Any]) -> dict[str, Any]:
    """The declaration of a run, with options of its likelihood that older runs left unnamed."""
    named = declaration["likelihood"]
    cls: Any = named_class("likelihood", named["class_path"])
    options = {**cls.before, **named["init_args"]}
    return {**declaration, "likelihood": {**named, "init_args": options}}


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
