"""Any prior x any likelihood x any posterior trains under Pyro's bounds and ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import combinations, product

import pyro
import pytest
import torch
from families import (
    LIKELIHOODS,
    ORDERS,
    POSTERIORS,
    PRIORS,
    draw,
    each_once,
    layered,
    make,
    triples,
)
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from pyro_vae.hierarchy import BottomUp, Ladder
from pyro_vae.objectives import ELBO
from pyro_vae.posteriors import DiagonalNormal
from pyro_vae.vae import VAE

BOUNDS = {
    "Trace_ELBO": Trace_ELBO(),
    "TraceMeanField_ELBO": TraceMeanField_ELBO(),
    "sampled": ELBO(kl="sampled"),
    "auto": ELBO(num_particles=2),
}


ON_TOP = {
    "-".join(cls.__name__ for cls in pair): pair
    for pair in (*product(ORDERS, PRIORS), *product(ORDERS, POSTERIORS))
    if pair[0] is not Ladder or pair[1] in (*PRIORS, DiagonalNormal)
}


def test_pairs_of_classes_are_tried_by_default() -> None:
    families = PRIORS, LIKELIHOODS, POSTERIORS
    default = [case.values for case in triples(*families) if not case.marks]
    tried = {pair for triple in default for pair in combinations(triple, 2)}
    assert tried == {pair for two in combinations(families, 2) for pair in product(*two)}
    single = {cls for case in each_once(*families) if not case.marks for cls in case.values}
    assert single == {cls for family in families for cls in family}


@pytest.mark.parametrize(
    ("prior", "likelihood", "posterior"), triples(PRIORS, LIKELIHOODS, POSTERIORS)
)
def test_every_parameter_trains(prior: type, likelihood: type, posterior: type) -> None:
    check_that_all_train(make(prior, likelihood, posterior, data_shape=(3,), hidden=(2,)))


@pytest.mark.parametrize("pair", ON_TOP.values(), ids=ON_TOP)
def test_every_parameter_of_layers_trains(pair: tuple[type, type]) -> None:
    order, part = pair
    family = "prior" if part in PRIORS else "posterior"
    vae = layered(order, data_shape=3, skip=True, **{family: part.__name__})
    mean_field = () if order is BottomUp else ("TraceMeanField_ELBO",)  # one order in both
    check_that_all_train(vae, ("Trace_ELBO", *mean_field, "sampled", "auto"))


def check_that_all_train(vae: VAE, bounds: Iterable[str] = BOUNDS) -> None:
    x = draw(vae, 5)
    vae.initialise(x)
    adam = pyro.optim.Adam({"lr": 1e-3, "foreach": False})
    for name in bounds:
        start = {key: p.detach().clone() for key, p in vae.named_parameters()}
        with warnings.catch_warnings(action="error"):  # of a failed mean field among them
            SVI(vae.model, vae.guide, adam, loss=BOUNDS[name]).step(x)
        still = [key for key, p in vae.named_parameters() if torch.equal(p, start[key])]
        assert not still, f"{name} leaves {still}"
        assert all(p.isfinite().all() for p in vae.parameters()), name
