"""Log weights against exact log p(x); what is refused; the beta-VAE as a handler."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian, linear_vae, two_sites
from families import POSTERIORS, PRIORS, draw, make, name
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn

from pyro_vae.densities import densities, evaluating, log_weights, scale_latents
from pyro_vae.priors import MixtureOfGaussians

pytestmark = pytest.mark.usefixtures("float64")

B, K, D, F = 7, 11, 2, 5


@pytest.mark.parametrize("num_particles", [1, K])
def test_every_weight_is_the_evidence_under_the_exact_posterior(num_particles: int) -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, B)
    d = densities(exact.vae.model, exact.guide(), x, num_particles=num_particles)
    assert d.log_weights.shape == (num_particles, B)
    truth = exact.log_evidence(x).expand(num_particles, B)
    torch.testing.assert_close(d.log_weights, truth, rtol=0, atol=1e-10)


def test_given_y_every_weight_is_the_conditional_evidence() -> None:
    exact = LinearGaussian.draw(D, F, condition_dim=3)
    y = torch.randn(B, 3)
    x = draw(exact.vae, B, y=y)
    d = densities(exact.vae.model, exact.guide(), x, y, num_particles=K)
    truth = exact.log_evidence(x, y).expand(K, B)
    torch.testing.assert_close(d.log_weights, truth, rtol=0, atol=1e-10)
    assert (exact.log_evidence(x, y) - exact.log_evidence(x, y + 1)).abs().min() > 1e-3


@pytest.mark.parametrize("lead", [(), (1,), (K,)])
def test_each_particle_is_a_draw_whatever_the_guide_s_leading_dimensions(
    lead: tuple[int, ...],
) -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, B)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", B, dim=-1):
            q = dist.Normal(torch.zeros(*lead, B, D), 1.0)
            pyro.sample("z", q.to_event(1))

    d = densities(exact.vae.model, guide, x, num_particles=K)
    z = d.sites["z"].value
    assert z.shape == (K, B, D)
    assert d.sites["z"].guide.batch_shape == (K, B)
    assert len(torch.unique(z)) == z.numel()
    truth = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(d.log_posterior, truth, rtol=0, atol=1e-12)


def mixture_posterior(vae: nn.Module, x: Tensor, sigma: float) -> tuple[dist.Distribution, Tensor]:
    """p(z | x) and log p(x) of the linear decoder under a mixture of Normals."""
    prior, linear = vae.prior, vae.likelihood.decoder.output
    W, b = linear.weight.detach(), linear.bias.detach()
    mean, scale = prior.loc.detach(), prior.log_scale.detach().exp()
    covariance = W @ (scale**2).diag_embed() @ W.T + sigma**2 * torch.eye(len(b))
    marginal = dist.MultivariateNormal(mean @ W.T + b, covariance)
    joint = torch.log_softmax(prior.logits.detach(), 0) + marginal.log_prob(x.unsqueeze(1))
    precision = (scale**-2).diag_embed() + W.T @ W / sigma**2
    pull = ((x - b) @ W / sigma**2).unsqueeze(1) + mean / scale**2
    loc = (torch.linalg.inv(precision) @ pull.unsqueeze(-1)).squeeze(-1)
    precision = precision.expand(len(x), -1, -1, -1)
    components = dist.MultivariateNormal(loc, precision_matrix=precision)
    posterior = dist.MixtureSameFamily(dist.Categorical(logits=joint), components)
    return posterior, joint.logsumexp(1)


def test_a_mixture_prior_with_a_linear_decoder_is_exact() -> None:
    prior = MixtureOfGaussians(D, 3)
    for parameter in prior.parameters():
        nn.init.normal_(parameter)
    vae = linear_vae(prior, F, 0.7)
    x = draw(vae, B)
    posterior, truth = mixture_posterior(vae, x, 0.7)

    def guide(x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", posterior)

    d = densities(vae.model, guide, x, num_particles=K)
    torch.testing.assert_close(d.log_weights, truth.expand(K, B), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("shift", "width"), [(0.0, 0.8), (0.0, 1.7), (0.3, 1.0), (-0.2, 1.3)])
def test_wrong_guides_are_off_by_their_kl_and_unbiased_in_linear_space(
    shift: float, width: float
) -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, B)
    K = 100_003
    weights = densities(exact.vae.model, exact.guide(shift, width), x, num_particles=K).log_weights
    weights = weights.detach()
    gap = torch.distributions.kl_divergence(
        exact.proposal(x, None, shift, width), exact.posterior(x)
    )
    assert (gap > 0.01).all()
    stderr = weights.std(0) / K**0.5
    assert (abs(weights.mean(0) - (exact.log_evidence(x) - gap)) < 5 * stderr).all()
    relative = (weights - exact.log_evidence(x)).exp()
    assert (abs(relative.mean(0) - 1) < 5 * relative.std(0) / K**0.5).all()


@pytest.mark.parametrize("prior", PRIORS, ids=name)
@pytest.mark.parametrize("posterior", POSTERIORS, ids=name)
def test_terms_are_those_of_the_parts(prior: type, posterior: type) -> None:
    vae = make(prior=prior, posterior=posterior)
    x = draw(vae, B)
    d = densities(vae.model, vae.guide, x, num_particles=K)
    z = d.sites["z"].value
    assert z.shape == (K, B, D)
    assert (z[0] != z[1]).any(-1).all()
    for fn in (d.sites["z"].guide, d.sites["z"].model):
        assert (fn.batch_shape, fn.event_shape) == ((K, B), (D,))
    torch.testing.assert_close(d.log_prior, vae.prior().log_prob(z))
    torch.testing.assert_close(d.log_posterior, vae.posterior(x).log_prob(z.clone()))
    torch.testing.assert_close(d.log_likelihood, vae.likelihood(z).log_prob(x))
    assert (d.num_particles, d.num_data, d.scale) == (K, B, 1)


@pytest.mark.parametrize("chunk_size", [1, 5, B, 3 * B, 3 * B + 4, 10_000])
def test_chunks_of_the_same_draws_give_the_same_weights(chunk_size: int) -> None:
    vae = make()
    x = draw(vae, B)
    torch.manual_seed(1)
    whole = densities(vae.model, vae.guide, x, num_particles=K).log_weights
    torch.manual_seed(1)
    parts = log_weights(vae.model, vae.guide, x, num_particles=K, chunk_size=chunk_size)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)


def test_the_first_chunk_alone_is_validated() -> None:
    vae, seen = make(), []

    def model(*args: Tensor) -> None:
        seen.append(is_validation_enabled())
        vae.model(*args)

    with pyro.validation_enabled(True):
        log_weights(model, vae.guide, draw(vae, B), num_particles=3, chunk_size=B)
    assert seen[-3:] == [True, False, False]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_hierarchy_under_its_exact_posterior_is_exact(reverse: bool) -> None:
    model, guide, evidence = two_sites(reverse)
    x = 2 * torch.randn(B)
    d = densities(model, guide, x, num_particles=K)
    torch.testing.assert_close(d.log_weights, evidence(x).expand(K, B), rtol=0, atol=1e-10)
    assert d.same_order is not reverse
    rules = dict.fromkeys(("z1", "z2"), "sampled" if reverse else "analytic")
    assert d.kl_rules == rules
    rao = log_weights(model, guide, x, num_particles=K, chunk_size=B * 3)
    torch.testing.assert_close(rao, evidence(x).expand(K, B), rtol=0, atol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_kl_of_a_hierarchy_completes_the_bound(reverse: bool) -> None:
    model, guide, evidence = two_sites(reverse)
    x = 2 * torch.randn(B)
    d = densities(model, guide, x, num_particles=100_003)
    kl = sum(d.kl().values())
    bound = d.log_likelihood.mean(0) - kl
    each = d.log_likelihood - (kl if not reverse else d.log_posterior - d.log_prior)
    stderr = each.std(0) / 100_003**0.5 + 1e-9
    analytic = 0 if reverse else 5 * stderr  # the top-down KL of z1 varies with z2
    assert (abs(bound - evidence(x)) < 5 * stderr + analytic).all()


def test_an_analytic_kl_in_the_wrong_order_is_refused() -> None:
    model, guide, _ = two_sites(reverse=True)
    d = densities(model, guide, torch.randn(B))
    with pytest.raises(ValueError, match="same order"):
        d.kl("analytic")


@pytest.mark.parametrize("form", ["rows", "indices"])
def test_a_subsampled_plate_gives_unscaled_rows_and_their_scale(form: str) -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, 23)
    rows = torch.randperm(23)[:B]

    def program(inner: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def run(x: Tensor) -> None:
            if form == "rows":
                with pyro.plate("data", 23, subsample=rows):
                    inner(x)
            else:
                with pyro.plate("data", 23, subsample_size=B) as index:
                    seen.append(index)
                    inner(x[index])

        return run

    seen: list[Tensor] = []
    decode = exact.vae.likelihood

    def model(x: Tensor) -> None:
        z = pyro.sample("z", exact.vae.prior())
        pyro.sample("x", decode(z), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", exact.posterior(x))

    given = x[rows] if form == "rows" else x
    d = densities(program(model), program(guide), given, num_particles=K)
    if form == "indices":
        assert torch.equal(seen[0], seen[1])
    truth = exact.log_evidence(x[rows] if form == "rows" else x[seen[0]])
    torch.testing.assert_close(d.log_weights, truth.expand(K, B), rtol=0, atol=1e-10)
    assert d.scale == 23 / B
    assert d.num_data == B


def test_programs_with_scales_are_read_at_weight_one() -> None:
    vae = make()
    x = draw(vae, B)
    torch.manual_seed(1)
    plain = densities(vae.model, vae.guide, x, num_particles=K)
    torch.manual_seed(1)
    model, guide = scale_latents(vae.model, 4.0), scale_latents(vae.guide, 4.0)
    scaled = densities(poutine.scale(model, 0.1), guide, x, num_particles=K)
    assert torch.equal(scaled.log_weights, plain.log_weights)
    assert scaled.site_scales == [("z", 0.4), ("x", 0.1), ("z", 4.0)]


def test_a_deterministic_site_adds_nothing_to_the_weights() -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, B)

    def model(x: Tensor) -> None:
        with data_plate(x):
            z = pyro.sample("z", exact.vae.prior())
            pyro.deterministic("norm", z.norm(dim=-1))
            pyro.sample("x", exact.vae.likelihood(z), obs=x)

    d = densities(model, exact.guide(), x, num_particles=K)
    truth = exact.log_evidence(x).expand(K, B)
    torch.testing.assert_close(d.log_weights, truth, rtol=0, atol=1e-10)


# --- what is refused ---------------------------------------------------------------------------


def data_plate(x: Tensor) -> pyro.plate:
    return pyro.plate("data", len(x), dim=-1)


def normal(name: str, size: int = D, **options: object) -> Tensor:
    return pyro.sample(name, dist.Normal(torch.zeros(size), 1.0).to_event(1), **options)


def sites(x: Tensor, *latent: str) -> None:
    """The latent sites, and the data if there are any."""
    with data_plate(x):
        for name in latent:
            normal(name)
        normal("x", F, obs=x)


def good(x: Tensor) -> None:
    sites(x, "z")


def good_guide(x: Tensor) -> None:
    with data_plate(x):
        normal("z")


def nothing(x: Tensor) -> None:
    pass


def extra_latent(x: Tensor) -> None:
    sites(x, "z", "w")


def extra_guide(x: Tensor) -> None:
    with data_plate(x):
        normal("z")
        normal("v")


def only_data(x: Tensor) -> None:
    sites(x)


def outside(x: Tensor) -> None:
    normal("w")
    good(x)


def outside_guide(x: Tensor) -> None:
    normal("w")
    good_guide(x)


def nested(x: Tensor) -> None:
    with data_plate(x) as rows:
        normal("z")
        with pyro.plate("pixels", F, dim=-3):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[rows].T.unsqueeze(1))


def nested_guide(x: Tensor) -> None:
    with data_plate(x), pyro.plate("pixels", F, dim=-3):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def other_name(x: Tensor) -> None:
    with pyro.plate("rows", len(x), dim=-1):
        normal("z")
        normal("x", F, obs=x)


def factor(x: Tensor) -> None:
    with data_plate(x):
        normal("z")
        normal("x", F, obs=x)
        pyro.factor("extra", torch.ones(len(x)))


def global_factor(x: Tensor) -> None:
    good(x)
    pyro.factor("extra", torch.tensor(1.0))


def masked(x: Tensor) -> None:
    with poutine.mask(mask=torch.ones(len(x), dtype=torch.bool)):
        good(x)


def masked_distribution(x: Tensor) -> None:
    with data_plate(x):
        pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1).mask(True))
        normal("x", F, obs=x)


def no_event(x: Tensor) -> None:
    with data_plate(x):
        pyro.sample("z", dist.Normal(torch.zeros(3, 1, len(x)), 1.0))


REFUSED = {
    "outside": (outside, outside_guide, "site 'w' must be inside the plate 'data'"),
    "nested": (nested, good_guide, "model site 'x' must be inside the plate 'data' at dim -1"),
    "nested guide": (good, nested_guide, "guide site 'z' must be inside the plate 'data'"),
    "other plate": (other_name, other_name, r"found plates \['rows'\]"),
    "factor": (factor, good_guide, "model site 'extra' is a pyro.factor"),
    "global factor": (global_factor, good_guide, "model site 'extra' is a pyro.factor"),
    "mask": (masked, good_guide, "model site 'z' is masked"),
    "masked distribution": (masked_distribution, good_guide, "model site 'z' is masked"),
    "model only": (extra_latent, good_guide, r"\['w'\] is in one of them only"),
    "guide only": (good, extra_guide, r"\['v'\] is in one of them only"),
    "empty guide": (good, nothing, r"\['z'\] is in one of them only"),
    "no latent": (only_data, nothing, "the model has no latent site"),
    "no event": (good, no_event, "declare the dimensions of a datum with .to_event"),
}
WAYS = {
    "at once": lambda *given: densities(*given, num_particles=K),
    "in chunks": lambda *given: log_weights(*given, num_particles=K, chunk_size=B),
}


@pytest.mark.parametrize(("model", "guide", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_programs_without_a_weight_per_datum_are_refused(
    model: Callable, guide: Callable, message: str, way: Callable
) -> None:
    with pytest.raises(ValueError, match=message):
        way(model, guide, torch.randn(B, F))


@pytest.mark.parametrize("num_particles", [0, -1])
def test_no_particles_are_refused(num_particles: int) -> None:
    vae = make()
    with pytest.raises(ValueError, match="must be at least 1"):
        densities(vae.model, vae.guide, draw(vae, B), num_particles=num_particles)


def test_an_unknown_rule_is_refused() -> None:
    vae = make()
    with pytest.raises(ValueError, match="kl must be 'auto', 'analytic' or 'sampled'; got 'mc'"):
        densities(vae.model, vae.guide, draw(vae, B)).kl("mc")


# --- the beta-VAE as a handler -----------------------------------------------------------------


@pytest.mark.parametrize("beta", [0, 0.3, 4.0, torch.tensor(0.7)])
def test_scale_latents_weighs_latent_sites_only(beta: float | Tensor) -> None:
    vae = make()
    x = draw(vae, B)
    with poutine.scale(scale=3.0):
        trace = poutine.trace(scale_latents(vae.model, beta)).get_trace(x)
    assert trace.nodes["z"]["scale"] == 3 * beta
    assert trace.nodes["x"]["scale"] == 3
    guide = poutine.trace(scale_latents(vae.guide, beta)).get_trace(x)
    assert guide.nodes["z"]["scale"] == beta


def test_scale_latents_sees_observations_made_below_it_only() -> None:
    def model() -> None:
        with pyro.plate("data", B):
            z = normal("z")
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0))

    data = {"x": torch.randn(B)}
    below = poutine.trace(scale_latents(poutine.condition(model, data), 0.3)).get_trace()
    above = poutine.trace(poutine.condition(scale_latents(model, 0.3), data)).get_trace()
    assert below.nodes["x"]["is_observed"]
    assert above.nodes["x"]["is_observed"]
    assert (below.nodes["z"]["scale"], below.nodes["x"]["scale"]) == (0.3, 1)
    assert (above.nodes["z"]["scale"], above.nodes["x"]["scale"]) == (0.3, 0.3)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_pyros_bounds_of_a_scaled_pair_are_those_of_the_densities(elbo: type) -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, B)
    beta = 0.3
    torch.manual_seed(1)
    model, guide = scale_latents(exact.vae.model, beta), scale_latents(exact.vae.guide, beta)
    bound = elbo(num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    loss = bound.loss(model, guide, x)
    torch.manual_seed(1)
    d = densities(exact.vae.model, exact.vae.guide, x, num_particles=K)
    kl = d.kl("sampled" if elbo is Trace_ELBO else "analytic")["z"]
    assert abs(-loss - (d.log_likelihood.mean(0) - beta * kl).sum().item()) < 1e-9


def test_an_error_inside_a_program_is_raised_as_it_is() -> None:
    vae = make(data_shape=(F,))
    with pytest.raises(ValueError, match="binarise them or use [^\n]*$"):
        densities(vae.model, vae.guide, torch.full((B, F), 0.5))


def test_draws_of_a_frozen_guide_have_no_path_gradient() -> None:
    vae = make()
    vae.posterior.requires_grad_(False)
    d = densities(vae.model, vae.guide, draw(vae, 7), num_particles=3)
    assert d.log_likelihood.requires_grad
    assert torch.equal(d.through_latents(d.log_likelihood), torch.zeros(3, 7))


def test_each_module_is_left_in_the_mode_that_it_had() -> None:
    vae = make()
    vae.likelihood.eval()
    before = [module.training for module in vae.modules()]
    assert {*before} == {True, False}
    with evaluating(vae.model, vae.guide, seed=0, device=torch.device("cpu")):
        vae.model(torch.zeros(7, 7))
        assert not any(module.training for module in vae.modules())
    assert [module.training for module in vae.modules()] == before
