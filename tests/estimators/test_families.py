"""Refined importance sampling of every prior and posterior against simple Monte Carlo."""

from __future__ import annotations

import pytest
from families import POSTERIORS, PRIORS, draw, make, name

from pyro_vae.estimators import importance_sampling, refined_importance_sampling
from pyro_vae.vae import VAE

pytestmark = pytest.mark.usefixtures("float64")


def compare(vae: VAE) -> None:
    x = draw(vae, 3)
    simple = importance_sampling(
        vae.model, vae.guide, x, num_samples=20_011, proposal="prior", chunk_size=30_000
    )
    refined = refined_importance_sampling(vae.model, vae.guide, x)
    noise = (simple.stderr**2 + refined.stderr**2).sqrt()
    assert ((refined.log_prob - simple.log_prob).abs() < 5 * noise).all()


@pytest.mark.parametrize("prior", PRIORS, ids=name)
def test_every_prior(prior: type) -> None:
    compare(make(prior=prior))


@pytest.mark.parametrize("posterior", POSTERIORS, ids=name)
def test_every_posterior(posterior: type) -> None:
    compare(make(posterior=posterior))
