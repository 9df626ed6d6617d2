"""Importance sampling against exact log p(x); what it costs; what it leaves behind."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian, two_sites
from families import PRIORS, draw, make, name
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.densities import densities, scale_latents
from pyro_vae.estimators import Evidence, Imputation, evidence_lower_bound, importance_sampling
from pyro_vae.estimators.evidence import pareto_khat, summarise
from pyro_vae.networks import MLP
from pyro_vae.objectives import ELBO
from pyro_vae.vae import VAE

pytestmark = pytest.mark.usefixtures("float64")

N, K, D, F = 7, 13, 2, 5


def wide(vae: VAE) -> VAE:
    """The VAE with a posterior wider than N(0, I), so that its weights have a variance."""
    with torch.no_grad():
        vae.posterior.encoder.output.bias[vae.posterior.latent_dim :] = 1.5
    return vae


# --- exact truths ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [1, 2, K])
def test_the_exact_posterior_gives_the_evidence_from_any_number_of_draws(num_samples: int) -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, N)
    e = importance_sampling(exact.vae.model, exact.guide(), x, num_samples=num_samples)
    torch.testing.assert_close(e.log_prob, exact.log_evidence(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(e.ess, torch.full((N,), float(num_samples)))
    assert e.num_samples.tolist() == [num_samples] * N
    if num_samples == 1:
        assert e.stderr.isnan().all()
    else:
        assert (e.stderr < 1e-10).all()


@pytest.mark.parametrize("condition_dim", [0, 3])
@pytest.mark.parametrize(("shift", "width"), [(0.0, 0.8), (0.0, 1.7), (0.3, 1.0), (-0.2, 1.3)])
def test_wrong_guides_come_within_their_standard_errors(
    shift: float, width: float, condition_dim: int
) -> None:
    exact = LinearGaussian.draw(D, F, condition_dim=condition_dim)
    y = torch.randn(N, condition_dim) if condition_dim else None
    x = draw(exact.vae, N, y=y)
    guide = exact.guide(shift, width)
    e = importance_sampling(exact.vae.model, guide, x, y, num_samples=20_011)
    assert (abs(e.log_prob - exact.log_evidence(x, y)) < 5 * e.stderr).all()
    assert (e.stderr > 1e-4).all()
    assert set(e.verdict) == {"lower bound"}


def test_the_prior_as_the_proposal() -> None:
    exact = LinearGaussian.draw(D, F, sigma=1.9)
    x = draw(exact.vae, N)
    e = importance_sampling(
        exact.vae.model, exact.vae.guide, x, num_samples=60_013, proposal="prior"
    )
    assert (abs(e.log_prob - exact.log_evidence(x)) < 5 * e.stderr).all()
    assert set(e.method) == {"importance sampling, prior"}
    assert e.num_samples.tolist() == [60_013] * N  # more than are held at once


def grid_evidence(vae: VAE, x: Tensor) -> Tensor:
    """log p(x) [N] by quadrature over a latent of two dimensions."""
    side = torch.linspace(-9, 9, 301)
    z = torch.cartesian_prod(side, side)
    with torch.no_grad():
        joint = (
            vae.prior().log_prob(z)[:, None]
            + vae.likelihood(z).base_dist.log_prob(x[:, None]).sum(-1).T
        )
    return joint.logsumexp(0) + 2 * math.log(18 / 300)


def test_a_bernoulli_decoder_against_quadrature() -> None:
    vae = wide(make(hidden=(5,)))
    with torch.no_grad():
        vae.likelihood.decoder.output.weight.mul_(5)
    x = draw(vae, N)
    truth = grid_evidence(vae, x)
    for proposal in ("guide", "prior"):
        e = importance_sampling(
            vae.model, vae.guide, x, num_samples=20_011, proposal=proposal, seed=1
        )
        assert (abs(e.log_prob - truth) < 5 * e.stderr).all()
        assert e.stderr.max() < 0.02


@pytest.mark.parametrize("reverse", [False, True])
def test_a_hierarchy_is_exact_whatever_the_order_of_its_guide(reverse: bool) -> None:
    model, guide, evidence = two_sites(reverse)
    x = 2 * torch.randn(N)
    e = importance_sampling(model, guide, x, num_samples=K, chunk_size=5)
    torch.testing.assert_close(e.log_prob, evidence(x), rtol=0, atol=1e-10)


def test_standard_errors_cover_the_truth_as_often_as_they_say() -> None:
    exact = LinearGaussian.draw(D, F)
    repeats = 1009
    x = draw(exact.vae, 1).expand(repeats, F)
    e = importance_sampling(
        exact.vae.model, exact.guide(0.2, 1.3), x, num_samples=503, chunk_size=10**6
    )
    error = abs(e.log_prob - exact.log_evidence(x)) / e.stderr
    for width, share in ((1.0, 0.6827), (1.96, 0.95)):
        stderr = (share * (1 - share) / repeats) ** 0.5
        assert abs((error < width).double().mean() - share) < 5 * stderr


@pytest.mark.parametrize("prior", PRIORS, ids=name)
def test_every_prior_against_quadrature(prior: type) -> None:
    vae = make(prior=prior)
    with torch.no_grad():
        vae.likelihood.decoder.output.weight.mul_(5)
    x = draw(vae, N)
    e = importance_sampling(vae.model, vae.guide, x, num_samples=2003, proposal="prior")
    assert (abs(e.log_prob - grid_evidence(vae, x)) < 5 * e.stderr).all()


# --- chunks, batches, modes --------------------------------------------------------------------


def count(vae: VAE) -> dict[str, list[int]]:
    """The rows that encoder and decoder see, call by call."""
    rows: dict[str, list[int]] = {"encoder": [], "decoder": []}
    vae.posterior.encoder.register_forward_hook(
        lambda _, args, out: rows["encoder"].append(out[..., 0].numel())
    )
    vae.likelihood.decoder.register_forward_hook(
        lambda _, args, out: rows["decoder"].append(out[..., 0].numel())
    )
    return rows


@pytest.mark.parametrize(
    ("chunk_size", "encoded", "decoded"),
    [
        (1000, [N], [K * N]),
        (5, [1] * N, [5, 5, 3] * N),
        (K, [1] * N, [K] * N),
        (2 * K + 3, [2, 2, 2, 1], [2 * K, 2 * K, 2 * K, K]),
        (1, [1] * N, [1] * (K * N)),
    ],
)
def test_every_draw_is_decoded_once_and_every_datum_encoded_once(
    chunk_size: int, encoded: list[int], decoded: list[int]
) -> None:
    vae = make()
    x = draw(vae, N)
    densities(vae.model, vae.guide, x)  # which tries the programs
    rows = count(vae)
    e = importance_sampling(vae.model, vae.guide, x, num_samples=K, chunk_size=chunk_size)
    checked = [len(part) for part in torch.arange(N).split(chunk_size)]  # before the work
    assert rows == {"encoder": checked + encoded, "decoder": checked + decoded}
    assert e.num_samples.tolist() == [K] * N
    rows["encoder"].clear()
    rows["decoder"].clear()
    importance_sampling(
        vae.model, vae.guide, x, num_samples=K, chunk_size=chunk_size, proposal="prior"
    )
    assert rows["encoder"] == []
    assert sum(rows["decoder"]) == K * N


@pytest.mark.parametrize("chunk_size", [1, 3, 5, K, 1000])
def test_chunks_of_the_same_noise_give_the_same_estimate(chunk_size: int) -> None:
    vae = make()
    x = draw(vae, 1)
    whole = importance_sampling(vae.model, vae.guide, x, num_samples=K, chunk_size=K * 1000)
    parts = importance_sampling(vae.model, vae.guide, x, num_samples=K, chunk_size=chunk_size)
    for field in ("log_prob", "stderr", "ess"):
        torch.testing.assert_close(
            getattr(parts, field), getattr(whole, field), atol=1e-10, rtol=0
        )


@pytest.mark.parametrize("chunk_size", [101, 1009, 5003, 10**6])
def test_batches_of_data_change_nothing_but_the_noise(chunk_size: int) -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, N)
    guide = exact.guide(0.2, 1.3)
    e = importance_sampling(exact.vae.model, guide, x, num_samples=1009, chunk_size=chunk_size)
    assert (abs(e.log_prob - exact.log_evidence(x)) < 5 * e.stderr).all()
    alone = importance_sampling(exact.vae.model, guide, x[3:4], num_samples=1009)
    stderr = (e.stderr[3] ** 2 + alone.stderr[0] ** 2).sqrt()
    assert abs(e.log_prob[3] - alone.log_prob[0]) < 5 * stderr


def test_the_seed_decides_the_draws() -> None:
    vae = make()
    x = draw(vae, N)

    def estimate(seed: int | None) -> Tensor:
        return importance_sampling(vae.model, vae.guide, x, num_samples=K, seed=seed).log_prob

    assert torch.equal(estimate(3), estimate(3))
    assert not torch.equal(estimate(3), estimate(4))
    torch.manual_seed(5)
    first = estimate(None)
    torch.manual_seed(5)
    assert torch.equal(estimate(None), first)


def with_noise() -> VAE:
    """A VAE with batch norm, its statistics away from their start, and dropout."""
    vae = make(norm="batch")
    vae.likelihood.decoder.hidden.append(nn.Dropout(0.5))
    vae.posterior.encoder.hidden.append(nn.Dropout(0.5))
    for _ in range(3):
        vae.model(draw(vae, 11))
        vae.guide(draw(vae, 11))
    return vae


def program(vae: VAE) -> tuple[Callable, Callable]:
    """Model and guide as plain functions, which show no module."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", vae.likelihood(pyro.sample("z", vae.prior())), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", vae.posterior(x))

    return model, guide


@pytest.mark.parametrize("plain", [False, True])
def test_the_mode_does_not_matter_and_is_given_back(plain: bool) -> None:
    vae = with_noise().eval()
    x = draw(vae, N)
    model, guide = program(vae) if plain else (vae.model, vae.guide)
    truth = importance_sampling(model, guide, x, num_samples=K)
    row = importance_sampling(model, guide, x[:1], num_samples=K)
    vae.train()
    vae.posterior.encoder.hidden.eval()
    modes = [m.training for m in vae.modules()]
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    e = importance_sampling(model, guide, x, num_samples=K)
    assert torch.equal(e.log_prob, truth.log_prob)
    again = importance_sampling(model, guide, x[:1], num_samples=K)
    assert torch.equal(again.log_prob, row.log_prob)
    assert [m.training for m in vae.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in vae.state_dict().items())
    with pytest.raises(RuntimeError, match="stop"):
        importance_sampling(model, stop, x, num_samples=K)
    assert [m.training for m in vae.modules()] == modes


def stop(x: Tensor) -> None:
    raise RuntimeError("stop")


def test_beta_in_training_and_in_the_programs_does_not_matter() -> None:
    vae = make()
    x = draw(vae, N)
    truth = importance_sampling(vae.model, vae.guide, x, num_samples=K)
    model = scale_latents(poutine.scale(vae.model, 0.1), 4.0)
    scaled = importance_sampling(model, scale_latents(vae.guide, 4.0), x, num_samples=K)
    assert torch.equal(scaled.log_prob, truth.log_prob)
    prior = {"num_samples": K, "proposal": "prior"}
    plain = importance_sampling(vae.model, vae.guide, x, **prior)
    assert torch.equal(importance_sampling(model, vae.guide, x, **prior).log_prob, plain.log_prob)
    ELBO(beta=4.0).differentiable_loss(vae.model, vae.guide, x).backward()
    after = importance_sampling(vae.model, vae.guide, x, num_samples=K)
    assert torch.equal(after.log_prob, truth.log_prob)


ESTIMATES = {
    "importance sampling": lambda *given: importance_sampling(*given, num_samples=K),
    "prior": lambda *given: importance_sampling(*given, num_samples=K, proposal="prior"),
    "bound": lambda *given: evidence_lower_bound(*given, num_samples=K),
}
estimates = pytest.mark.parametrize("estimate", ESTIMATES.values(), ids=ESTIMATES)


@estimates
@pytest.mark.parametrize("validate", [False, True])
def test_nothing_is_left_behind(estimate: Callable, validate: bool) -> None:
    vae = with_noise()
    x = draw(vae, N)
    vae.likelihood.decoder.output.bias.requires_grad_(False)
    ELBO().loss_and_grads(vae.model, vae.guide, x)  # gradients and store entries that must stay
    store = pyro.get_param_store()
    entries = dict(store._params.items())
    tensors = {k: v.clone() for k, v in vae.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in vae.parameters()]
    flags = [p.requires_grad for p in vae.parameters()]
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    with pyro.validation_enabled(validate):
        estimate(vae.model, vae.guide, x)
        assert dist.is_validation_enabled() is validate
        assert torch.distributions.Distribution._validate_args is validate
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert torch.is_grad_enabled()
    assert all(torch.equal(v, tensors[k]) for k, v in vae.state_dict().items())
    assert [p.requires_grad for p in vae.parameters()] == flags
    for p, g in zip(vae.parameters(), gradients):
        assert (p.grad is None) if g is None else torch.equal(p.grad, g)
    assert store._params.keys() == entries.keys()
    assert all(store._params[k] is v for k, v in entries.items())


@estimates
@pytest.mark.parametrize("started", [False, True])
def test_a_program_with_parameters_of_its_own_is_read_and_leaves_the_store(
    estimate: Callable, started: bool
) -> None:
    decoder, encoder = MLP(D, F, ()), MLP(F, D, ())

    def programs(param: Callable) -> tuple[Callable, Callable]:
        def model(x: Tensor) -> None:
            pyro.module("decoder", decoder)
            scale = param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            pyro.module("encoder", encoder)
            offset = param("offset", lambda: torch.zeros(D))
            width = param("width", nn.Parameter(torch.tensor(2.0)))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(encoder(x) + offset, width.abs()).to_event(1))

        return model, guide

    x, store = torch.randn(N, F), pyro.get_param_store()
    model, guide = programs(pyro.param)
    values = {"scale": torch.tensor(1.0), "offset": torch.zeros(D), "width": torch.tensor(2.0)}
    if started:
        guide(x)
        model(x)
        values = {key: value + 0.3 for key, value in values.items()}
        for key, value in values.items():
            store[key] = value
    entries = {k: v.clone() for k, v in store._params.items()}
    got = estimate(model, guide, x)
    assert store._params.keys() == entries.keys()
    assert all(torch.equal(store._params[k], v) for k, v in entries.items())
    truth = estimate(*programs(lambda key, *_, **__: values[key]), x)
    field = "elbo" if hasattr(got, "elbo") else "log_prob"
    torch.testing.assert_close(getattr(got, field), getattr(truth, field))


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1; got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"proposal": "posterior"}, "proposal must be 'guide' or 'prior'; got 'posterior'"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    vae = make()
    with pytest.raises(ValueError, match=message):
        importance_sampling(vae.model, vae.guide, draw(vae, N), **options)


@estimates
def test_subsampled_programs_are_refused(estimate: Callable) -> None:
    exact = LinearGaussian.draw(D, F)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            z = pyro.sample("z", exact.vae.prior())
            pyro.sample("x", exact.vae.likelihood(z), obs=x[rows])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            pyro.sample("z", exact.posterior(x[rows]))

    with pytest.raises(ValueError, match="the plate 'data' has 3 rows for 7 data"):
        estimate(model, guide, draw(exact.vae, N))


def test_weights_that_are_no_numbers_are_refused() -> None:
    weights = torch.randn(K, N)
    weights[5, 3] = math.nan
    weights[6, 4] = math.inf
    with pytest.raises(ValueError, match=r"data \[3, 4\] are NaN or infinite"):
        summarise(weights, "method", "verdict")


# --- diagnostics -------------------------------------------------------------------------------


def test_the_mean_and_its_error_are_those_of_the_weights() -> None:
    log_weights = 3 * torch.randn(K, N) - 1000
    w = (log_weights + 1000).exp()
    torch.testing.assert_close(summarise(log_weights, "", "").log_prob, w.mean(0).log() - 1000)
    stderr = w.std(0) / K**0.5 / w.mean(0)
    torch.testing.assert_close(summarise(log_weights, "", "").stderr, stderr)


def test_effective_sample_size() -> None:
    log_weights = 3 * torch.randn(K, N) + 1000
    w = (log_weights - 1000).exp()
    torch.testing.assert_close(summarise(log_weights, "", "").ess, w.sum(0) ** 2 / (w**2).sum(0))
    one = torch.full((K, 1), -math.inf)
    one[3] = 0
    assert summarise(one, "", "").ess == 1
    torch.testing.assert_close(summarise(torch.zeros(K, 1), "", "").ess, torch.tensor([float(K)]))


@pytest.mark.parametrize("num_samples", [23, 101, 1009, 5003])
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_khat_is_that_of_arviz(num_samples: int, scale: float) -> None:
    log_weights = scale * torch.randn(num_samples, N)
    log_weights[:, 1] = scale * dist.StudentT(2.0).sample((num_samples,))
    log_weights[:, 2] -= 700
    with warnings.catch_warnings(action="ignore"):  # of its next version
        arviz = pytest.importorskip("arviz")
    truth = arviz.psislw(log_weights.T.numpy())[1]
    np.testing.assert_allclose(pareto_khat(log_weights).numpy(), truth, rtol=1e-8, atol=1e-8)


def test_khat_recovers_the_shape_of_a_pareto_tail() -> None:
    for shape in (0.2, 0.7, 1.1):
        u = torch.rand(100_003, 5)
        weights = (u**-shape - 1) / shape
        khat = pareto_khat(weights.log())
        tail = 3 * 100_003**0.5
        assert (abs(khat - shape) < 5 * (1 + shape) / tail**0.5 + 0.5 / tail**0.5).all()


def test_khat_without_a_tail() -> None:
    assert pareto_khat(torch.randn(20, N)).isnan().all()
    assert pareto_khat(torch.randn(21, N)).isfinite().all()
    assert (pareto_khat(torch.full((101, N), -3.0)) == -math.inf).all()


def test_khat_of_a_tail_that_no_pareto_fits_is_nan() -> None:
    log_weights = torch.full((100, N), -math.inf)
    log_weights[:5, 0] = torch.tensor([0.0, -100, -200, -300, -708.2])
    assert pareto_khat(log_weights).isnan().tolist() == [True] + [False] * (N - 1)


# --- the bound ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 5, 101, 10**6])
def test_the_measured_bound_at_the_exact_posterior_is_the_evidence(chunk_size: int) -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, N)
    b = evidence_lower_bound(
        exact.vae.model, exact.guide(), x, num_samples=K, chunk_size=chunk_size
    )
    torch.testing.assert_close(b.elbo, exact.log_evidence(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(b.elbo, b.reconstruction - b.kl)
    assert b.rules == {"z": "sampled"}


def test_the_measured_terms_are_the_closed_form() -> None:
    exact = LinearGaussian.draw(D, F)
    vae, draws = exact.vae, 20_011
    x = draw(vae, N)
    b = evidence_lower_bound(vae.model, vae.guide, x, num_samples=draws, chunk_size=10_007)
    q, p = vae.encode(x), vae.prior()
    torch.testing.assert_close(b.kl, torch.distributions.kl_divergence(q, p).detach())
    assert b.rules == {"z": "analytic"}
    with torch.no_grad():
        each = vae.likelihood(q.sample((draws,))).log_prob(x)
    stderr = each.std(0) * (2 / draws) ** 0.5
    assert (abs(b.reconstruction - each.mean(0)) < 5 * stderr).all()


@pytest.mark.parametrize("chunk_size", [1, 5, K, 1000])
def test_the_bound_decodes_no_more_rows_at_once_than_asked(chunk_size: int) -> None:
    vae = make()
    x = draw(vae, N)
    densities(vae.model, vae.guide, x)  # which tries the programs
    rows = count(vae)
    evidence_lower_bound(vae.model, vae.guide, x, num_samples=K, chunk_size=chunk_size)
    assert max(rows["decoder"]) <= chunk_size
    assert sum(rows["decoder"]) == K * N


# --- the result --------------------------------------------------------------------------------


def evidence(size: int) -> Evidence:
    return summarise(torch.randn(101, size), "a method", "doubtful")


@pytest.mark.parametrize("size", [2, N])
def test_evidence_averages_over_data(size: int) -> None:
    e = evidence(size)
    monte_carlo, data = e.mean_stderr()
    assert e.mean() == pytest.approx(e.log_prob.mean().item())
    assert monte_carlo == pytest.approx((e.stderr**2).sum().sqrt().item() / size)
    assert data == pytest.approx(e.log_prob.std().item() / size**0.5)
    assert math.isnan(evidence(1).mean_stderr()[1])


def test_evidence_in_parts_is_the_evidence_in_one(tmp_path: object) -> None:
    parts = [evidence(size) for size in (3, 1, N)]
    whole = Evidence.cat(parts)
    assert len(whole) == 3 + 1 + N
    assert torch.equal(whole.log_prob[3:4], parts[1].log_prob)
    whole.save(tmp_path / "evidence.safetensors")
    loaded = Evidence.load(tmp_path / "evidence.safetensors")
    for field in ("log_prob", "stderr", "ess", "khat", "num_samples"):
        assert torch.equal(getattr(loaded, field), getattr(whole, field))
    assert (loaded.method, loaded.verdict) == (whole.method, whole.verdict)
    assert [p.name for p in tmp_path.iterdir()] == ["evidence.safetensors"]


@pytest.mark.parametrize("names", [(b"extras.a", b"extras.b"), (b"F64", b"I64")])
def test_an_evidence_whose_columns_were_renamed_is_damaged(
    tmp_path: Path, names: tuple[bytes, bytes]
) -> None:
    path = tmp_path / "evidence.safetensors"
    replace(evidence(N), extras={"a": torch.ones(N)}).save(path)
    path.write_bytes(path.read_bytes().replace(*names))
    with pytest.raises(ValueError, match="its digest is that of other content"):
        Evidence.load(path)


def test_evidence_says_how_many_data_have_a_trusted_tail() -> None:
    e = Evidence.cat([evidence(2), evidence(1), summarise(torch.randn(11, 1), "", "")])
    assert abs(e.khat_threshold[0].item() - (1 - 1 / math.log10(101))) < 1e-12
    below = [bool(k < t) for k, t in zip(e.khat, e.khat_threshold)]
    assert not below[3]  # no tail was fitted
    assert e.share_below_threshold() == sum(below) / 4


def test_evidence_shows_its_two_errors() -> None:
    e = evidence(N)
    assert f"{e.mean():.2f}" in repr(e)
    assert "(Monte Carlo)" in repr(e)
    assert f"{N} data" in repr(e)
    assert e._repr_html_().count("<tr>") == N + 1


def test_evidence_is_indexed_as_a_vector() -> None:
    exact = LinearGaussian.draw()
    x = exact.vae.sample(7)
    found = importance_sampling(exact.vae, x, num_samples=31)
    mask = torch.arange(7) > 4
    for index, rows in ((3, [3]), (slice(1, 6, 2), [1, 3, 5]), (mask, [5, 6]), (-1, [6])):
        assert torch.equal(found[index].log_prob, found.log_prob[rows])
        assert found[index].verdict == [found.verdict[i] for i in rows]
    with pytest.raises(IndexError):
        found[7]
    assert "0 data" in repr(found[found.log_prob > 0])  # as those of a verdict that none has


def test_evidence_as_a_frame() -> None:
    pytest.importorskip("pandas")
    exact = LinearGaussian.draw()
    found = importance_sampling(exact.vae, exact.vae.sample(7), num_samples=31)
    frame = found.to_frame()
    assert frame.log_prob.tolist() == found.log_prob.tolist()
    assert frame.verdict.tolist() == found.verdict


def test_arviz_takes_evidences_and_draws() -> None:
    with warnings.catch_warnings(action="ignore"):  # of its next version
        arviz = pytest.importorskip("arviz")
        exact = LinearGaussian.draw()
        x = exact.vae.sample(7)
        found, other = (importance_sampling(exact.vae, x, num_samples=k) for k in (31, 37))
        table = {"found": found.to_inference_data(), "other": other.to_inference_data()}
        ranked = arviz.compare(table, ic="waic")
        rows = arviz.waic(table["found"], pointwise=True).waic_i
        draws = Imputation(torch.randn(5, *x.shape), x, x, found).to_inference_data()
    assert rows.values == pytest.approx(found.log_prob.numpy())
    assert ranked.dse.max() == pytest.approx(found.difference(other)[1] * 42**0.5)
    assert table["found"].sample_stats.stderr.dims == ("chain", "draw", "row")
    assert draws.posterior_predictive.x.shape == (1, 5, *x.shape)
    assert draws.posterior_predictive.x.dims[2] == "row"


def test_a_guide_without_density_bounds_nothing() -> None:
    exact = LinearGaussian.draw(D, F)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(exact.posterior(x).mean, event_dim=1))

    with pytest.raises(ValueError, match="Delta at .'z'., which has no density.*log_evidence"):
        importance_sampling(exact.vae.model, guide, torch.randn(N, F))
