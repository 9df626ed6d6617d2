"""Declarations: names and options to objects, and clear errors."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from families import CONDITIONAL
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from pyro_vae import config, likelihoods, networks, posteriors, priors
from pyro_vae.config import build, component, declare
from pyro_vae.data.transforms import default_transform
from pyro_vae.objectives import Cyclical
from pyro_vae.vae import VAE


@pytest.mark.parametrize(
    ("family", "cls"),
    [
        (family, cls)
        for family in ("prior", "likelihood", "posterior")
        for cls in config.components(family).values()
        if cls.__module__.startswith("pyro_vae.")  # not those of other tests
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_class_is_built_by_name_alone(family: str, cls: type) -> None:
    shape = (7,) if cls is likelihoods.Columns else (2, 3, 5)
    given = 7 if cls in CONDITIONAL else 0
    vae = build(shape, 3, **{family: cls.__name__}, condition_dim=given)
    assert type(getattr(vae, family)) is cls
    again = build(**vae.declaration)
    assert again.declaration == vae.declaration
    assert again.load_state_dict(vae.state_dict())
    assert vae.sample(11, torch.ones(11, 7) if given else None).shape == (11, *shape)


class NoOptions(priors.Prior):
    def forward(self, y: Tensor | None = None) -> Distribution:
        return Independent(Normal(torch.zeros(3), torch.ones(3)), 1)


def test_a_prior_without_init_is_built_by_name() -> None:
    vae = build(7, 3, prior="NoOptions")
    assert type(vae.prior) is NoOptions
    assert vae.sample(11).shape == (11, 7)


@pytest.mark.parametrize("encoder", ["MLP", "GatedMLP", "Conv", "ResNet"])
@pytest.mark.parametrize("decoder", ["MLP", "GatedMLP", "ConvTranspose", "ResNetTranspose"])
def test_networks_fit_any_likelihood(encoder: str, decoder: str) -> None:
    vae = build((2, 7, 5), 3, likelihood="NegativeBinomial", encoder=encoder, decoder=decoder)
    x = torch.zeros(11, 2, 7, 5)
    assert vae.encode(x).mean.shape == (11, 3)
    assert vae.reconstruct(x).shape == x.shape


def test_options_reach_the_class() -> None:
    prior = {"class_path": "VampPrior", "init_args": {"num_components": 3}}
    likelihood = {"class_path": "Normal", "init_args": {"scale": "predicted"}}
    encoder = {"class_path": "MLP", "init_args": {"hidden": [11, 13], "activation": "elu"}}
    vae = build(7, 2, prior=prior, likelihood=likelihood, encoder=encoder)
    assert vae.prior.posterior is vae.posterior
    assert vae.prior.inputs.shape == (3, 7)
    assert vae.likelihood.decoder.out_shape == (14,)
    assert [m.out_features for m in vae.posterior.encoder.modules() if hasattr(m, "out_features")]


def test_condition_dim_reaches_both_networks() -> None:
    vae = build(7, 2, condition_dim=5)
    assert vae.posterior.encoder.condition_dim == vae.likelihood.decoder.condition_dim == 5
    assert vae.sample(3, torch.zeros(3, 5)).shape == (3, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior": "VampPrio"}, "prior 'VampPrio' is unknown, did you mean 'VampPrior'"),
        ({"likelihood": "StandardNormal"}, "likelihood 'StandardNormal' is unknown"),
        (
            {"prior": {"class_path": "VampPrior", "init_args": {"num_component": 3}}},
            "no option 'num_component', did you mean 'num_components'",
        ),
        (
            {"prior": {"class_path": "StandardNormal", "init_args": {"num_components": 3}}},
            "StandardNormal has no option 'num_components'",
        ),
        (
            {"prior": {"class_path": "VampPrior", "init_args": {"num_components": "many"}}},
            "(?s)VampPrior.*num_components",
        ),
        ({"prior": {"class_path": "VampPrior", "init_args": {"latent_dim": 3}}}, "no option"),
        ({"prior": {"name": "VampPrior"}}, "class_path and init_args"),
        ({"encoder": "ConvTranspose"}, "ConvTranspose needs an image"),
        ({"prior": {"class_path": "VampPrior", "init_args": {"num_components": 0}}}, "at least 1"),
        ({"likelihood": {"class_path": "Normal", "init_args": {"scale": -1.0}}}, "scale"),
        ({"latent_dim": 0}, "positive|at least 1"),
    ],
)
def test_bad_declarations(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**{"data_shape": 7, "latent_dim": 2, **arguments})


def counts() -> Iterator[tuple[str, str, str]]:
    """Options of whole numbers, of every class that is declared."""
    for family in ("prior", "likelihood", "posterior", "encoder", "decoder", "objective"):
        for name, cls in config.components(family).items():
            options = signature(cls).parameters if cls.__module__.startswith("pyro_vae.") else {}
            for option, parameter in options.items():
                if type(parameter.default) is int and option not in config.INJECTED:
                    yield family, name, option


@pytest.mark.parametrize(("family", "name", "option"), [*counts()])
def test_a_count_below_zero_is_refused_by_its_name(family: str, name: str, option: str) -> None:
    def made() -> None:
        part = component(family, {name: {option: -1}})
        if family == "objective":
            part.make()
        build((1, 8, 8), 2, **{family: part}, condition_dim=3 * (name == "ConditionalNormal"))

    with pytest.raises(ValueError, match=f"{option} must .* got -1"):
        made()


def test_options_are_those_of_the_constructor() -> None:
    """In Python 3.11.2, too, where `inspect.signature` of a class prefers `__new__`."""
    for family in config.BASES:
        for cls in config.components(family).values():
            own = [*signature(cls.__init__).parameters][1:]
            assert [*signature(cls).parameters] == own


def test_a_number_of_parts_is_refused_by_its_name() -> None:
    for likelihood, option in (("MixtureOfLogistics", "components"), ("Categorical", "levels")):
        with pytest.raises(ValueError, match=f"^{option} must be at least 1; got 0"):
            build(7, 2, likelihood={likelihood: {option: 0}})
    with pytest.raises(ValueError, match="^context must be at least 1; got 0"):
        build(7, 2, posterior={"FlowPosterior": {"context": 0}})


@pytest.mark.parametrize(
    ("part", "option", "value"),
    [
        (priors.FlowPrior, "hidden", [0]),
        (priors.FlowPrior, "hidden", [-1]),
        (posteriors.FlowPosterior, "hidden", [-1]),
        (priors.VampPrior, "data_range", 5),
        (priors.VampPrior, "data_range", [1.0]),
        (priors.VampPrior, "data_range", [1, 0]),
        (priors.VampPrior, "data_range", ["a", 1]),
        (networks.MLP, "hidden", 5),
        (networks.MLP, "hidden", "5"),
    ],
)
def test_options_given_in_python_are_refused_by_name(part: Any, option: str, value: Any) -> None:
    shape = {"data_shape": (7,), "in_shape": 7, "out_shape": 3}
    given = {"latent_dim": 3, "posterior": networks.MLP(7, 3), "encoder": networks.MLP(7, 64)}
    with pytest.raises(ValueError, match=f"{option} must be"):
        config.call_with(part, {**shape, **given, option: value})


def test_numbers_of_numpy_declare_as_those_of_python() -> None:
    two, options = np.int64(2), {"class_path": "MLP", "init_args": {"hidden": np.array([5])}}
    made = build(np.array([1, 8, 8]), np.array([3, 2]), encoder=options, classes=two)
    prior = {"MixtureOfGaussians": {"num_components": two}}
    likelihood = {"Normal": {"scale": np.float32(0.5)}}
    other = build((7,), two, condition_dim=two, prior=prior, likelihood=likelihood)
    for vae in (made, other):
        assert build(**json.loads(json.dumps(vae.declaration))).declaration == vae.declaration
    for name, value in (("missing", "yes"), ("missing", None), ("skip", 1)):
        with pytest.raises(ValueError, match=f"{name} must be True or False; got {value!r}"):
            build(7, 2, **{name: value})
    with pytest.raises(ValueError, match=r"prior must be a module .* got 'Normal': .* build\("):
        VAE("Normal", "Bernoulli", "DiagonalNormal")  # type: ignore[arg-type]


def test_what_was_checked_is_not_parsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"prior": "VampPrior", "likelihood": "Normal", "posterior": "FullNormal"}
    parts = {f: component(f, n) for f, n in {**names, "encoder": "MLP", "decoder": "MLP"}.items()}
    monkeypatch.setattr(config, "ArgumentParser", lambda **_: pytest.fail("parsed again"))
    vae = build(7, 2, **parts, condition_dim=3)
    assert {family: vae.declaration[family] for family in names} == {
        family: parts[family].plain for family in names
    }
    assert vae.declaration["encoder"] == parts["encoder"].replace(condition_dim=3).plain


def test_a_part_may_be_given_as_its_name_and_options() -> None:
    vae = build(7, 2, prior={"VampPrior": {"num_components": 5}}, encoder={"MLP": {"hidden": [3]}})
    spelled = {"class_path": "VampPrior", "init_args": {"num_components": 5}}
    again = build(7, 2, prior=spelled, encoder={"class_path": "MLP", "init_args": {"hidden": [3]}})
    assert vae.declaration == again.declaration
    few = build(7, 2, encoder={"MLP": {"hidden": [3]}}, condition_dim=3)
    assert few.posterior.encoder.condition_dim == 3


def test_parts_show_their_options() -> None:
    vae = build(
        7, 2, prior={"VampPrior": {"num_components": 5}}, likelihood={"Normal": {"scale": 0.5}}
    )
    assert repr(vae.prior) == "VampPrior(data_shape=(7,), num_components=5)"
    assert repr(pickle.loads(pickle.dumps(copy.deepcopy(vae.prior)))) == repr(vae.prior)
    assert "data_shape=(7,), scale=0.5, mean='identity'" in repr(vae)
    assert repr(priors.StandardNormal(latent_dim=3)) == "StandardNormal(latent_dim=3)"


def test_foreign_module_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign.py").write_text("open('executed', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="import the module of your own class first"):
        build(7, 2, prior="foreign.Evil")
    assert not (tmp_path / "executed").exists()
    assert "foreign" not in sys.modules


def test_own_class_is_found_by_full_path() -> None:
    class Own(priors.Prior):
        def __init__(self, latent_dim: int, shift: float = 1.0) -> None:
            super().__init__()
            self.base = priors.StandardNormal(latent_dim)
            self.shift = shift

        def forward(self, y: torch.Tensor | None = None) -> torch.distributions.Distribution:
            return self.base(y)

    vae = build(7, 2, prior={"class_path": "Own", "init_args": {"shift": 2.0}})
    assert vae.prior.shift == 2.0
    assert vae.declaration["prior"]["class_path"] == f"{Own.__module__}.{Own.__qualname__}"
    assert type(build(**vae.declaration).prior) is Own


def test_own_classes_that_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(name: str) -> type:
        return type(name, (priors.Laplace,), {"__module__": "own_priors"})

    ours, first, second = made("StandardNormal"), made("Mine"), made("Mine")
    monkeypatch.setitem(sys.modules, "own_priors", ModuleType("own_priors"))
    for name, cls in (("own_priors.StandardNormal", ours), ("Mine", second)):
        vae = build(7, 2, prior=name)
        assert type(vae.prior) is cls, first
        assert type(build(**vae.declaration).prior) is cls
    assert type(build(7, 2).prior) is priors.StandardNormal


@pytest.mark.parametrize(
    ("likelihood", "levels", "shape", "transform"),
    [
        (likelihoods.Bernoulli, 256, (3, 1, 5, 5), "threshold"),
        (likelihoods.Bernoulli, 2, (3, 1, 5, 5), "none"),
        (likelihoods.Bernoulli, None, (3, 5), "none"),
        (likelihoods.ContinuousBernoulli, 17, (3, 1, 5, 5), "dequantise"),
        (likelihoods.Beta, 17, (3, 1, 5, 5), "dequantise"),
        (likelihoods.Normal, 256, (3, 1, 5, 5), "dequantise"),
        (likelihoods.Normal, None, (3, 5), "standardise"),
        (likelihoods.StudentT, None, (3, 5), "standardise"),
        (likelihoods.DiscretizedLogistic, 256, (3, 1, 5, 5), "none"),
        (likelihoods.Categorical, 17, (3, 1, 5, 5), "none"),
        (likelihoods.Poisson, None, (3, 5), "none"),
    ],
)
def test_default_transform_fits_the_support(
    likelihood: Any, levels: int | None, shape: tuple[int, ...], transform: str
) -> None:
    assert default_transform(likelihood.support, levels, len(shape)) == transform


def test_networks_are_shared_by_no_two_parts() -> None:
    vae = build(7, 2, prior="VampPrior")
    names = dict(vae.named_parameters(remove_duplicate=False))
    assert len({id(p) for p in names.values()}) == len(names)
    assert isinstance(vae.posterior.encoder, networks.MLP)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([("", "VampPrior")], ("VampPrior", {})),
        ([("num_components", "7"), ("", "VampPrior")], ("VampPrior", {})),
        ([("", "VampPrior"), ("num_components", "7")], ("VampPrior", {"num_components": 7})),
        ([("", "VampPrior"), ("init_args.num_components", "7"), ("", "VampPrior")],
         ("VampPrior", {"num_components": 7})),
        ([("", "{class_path: StudentT, init_args: {df: 3}}")], ("StudentT", {"df": 3})),
        ([("class_path", "StudentT"), ("df", "1e1")], ("StudentT", {"df": 10.0})),
    ],
)  # fmt: skip
def test_arguments_declare_as_yaml_does(
    arguments: list[tuple[str, str]], expected: tuple[str, dict]
) -> None:
    declared: dict = {"class_path": "StandardNormal"}
    for path, text in arguments:
        declared = declare("prior", declared, path.split(".") if path else [], text)
    cls, options = component("prior", declared)
    assert (cls.__name__, {**options, **expected[1]}) == (expected[0], options)


def test_arguments_declare_a_schedule_by_its_parts() -> None:
    declared: dict = {"class_path": "ELBO"}
    parts = (("beta", "Cyclical"), ("beta.length", "7"), ("beta.init_args.start", "0.5"))
    for path, text in parts:
        declared = declare("objective", declared, path.split("."), text)
    cls, options = component("objective", declared)
    assert cls(**options).schedules == {"beta": Cyclical(length=7, start=0.5)}
    with pytest.raises(ValueError, match="schedule 'Linea' is unknown, did you mean 'Linear'"):
        declare("objective", declared, ["beta", "class_path"], "Linea")
