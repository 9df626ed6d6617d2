"""Discrete sites summed out: against closed forms, Pyro's own sum, and the model at one value."""

from __future__ import annotations

import re
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from families import OBJECTIVES, name
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn

from pyro_vae import class_probabilities, objectives
from pyro_vae.densities import densities, summed_values
from pyro_vae.distributions import Label
from pyro_vae.estimators import importance_sampling, log_evidence
from pyro_vae.estimators.run import _possible

pytestmark = pytest.mark.usefixtures("float64")

B, K, D, F, C = 7, 3, 2, 5, 4
SIGMA = 0.7
SUM: Any = {"enumerate": "parallel"}


class Mixture(nn.Module):
    """x = W z + b_y + noise; z ~ N(m_y, I), or N(0, I) where `per_class` is false."""

    def __init__(self, per_class: bool = True) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(C))
        self.loc = nn.Parameter(torch.randn(C, D) * per_class)
        self.W = nn.Parameter(torch.randn(F, D))
        self.b = nn.Parameter(torch.randn(C, F))
        self.encoder = nn.Linear(F, 2 * D)
        self.shift = nn.Parameter(torch.zeros(D))
        self.per_class = per_class
        self.labels: Tensor | None = None

    def model(self, x: Tensor, shift: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(logits=self.logits), infer=SUM)
            if self.labels is not None:
                one_hot = nn.functional.one_hot(y, C).to(x)
                pyro.sample("label", Label(one_hot), obs=self.labels)
            loc = self.loc[y] if self.per_class else torch.zeros(D)
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            p = dist.Normal(z @ self.W.T + self.b[y], SIGMA)
            pyro.sample("x", p.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc + self.shift, log_scale.exp()).to_event(1))

    def exact(self, x: Tensor, shift: Tensor | None = None) -> None:
        """q(z | x, y), the posterior moved; y's own probability is wrong."""
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(torch.ones(C)), infer=SUM)
            precision = torch.eye(D) + self.W.T @ self.W / SIGMA**2
            prior = self.loc[y] if self.per_class else 0.0
            pull = (x - self.b[y]) @ self.W / SIGMA**2 + prior
            loc = torch.linalg.solve(precision, pull.mT).mT.detach()
            loc = loc + (self.shift if shift is None else shift)
            q = dist.MultivariateNormal(loc, precision_matrix=precision.detach())
            pyro.sample("z", q)

    def joint(self, x: Tensor) -> Tensor:
        """log p(x, y) [B, C]."""
        covariance = self.W @ self.W.T + SIGMA**2 * torch.eye(F)
        loc = (self.loc if self.per_class else 0 * self.loc) @ self.W.T + self.b
        given = dist.MultivariateNormal(loc, covariance).log_prob(x.unsqueeze(1))
        return self.logits.log_softmax(0) + given


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(B, F)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("num_particles", [1, K])
def test_with_exact_draws_for_each_value_every_weight_is_the_evidence(
    x: Tensor, per_class: bool, num_particles: int
) -> None:
    mixture = Mixture(per_class)
    d = densities(mixture.model, mixture.exact, x, num_particles=num_particles)
    truth = mixture.joint(x).logsumexp(1).expand(num_particles, B)
    torch.testing.assert_close(d.log_weights, truth, rtol=0, atol=1e-10)
    assert set(d.kl_rules.values()) == {"sampled"}
    parts = d.log_likelihood.mean(0) - sum(d.kl("sampled").values())
    torch.testing.assert_close(parts, truth[0], rtol=0, atol=1e-10)
    wanted = mixture.joint(x).log_softmax(1).exp()
    found = d.sites["y"].guide.log_weights.exp().mean(1).T  # type: ignore[attr-defined]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("guide", ["guide", "exact"])
def test_the_density_of_another_value_is_summed_anew(x: Tensor, guide: str) -> None:
    mixture = Mixture()
    d = densities(mixture.model, getattr(mixture, guide), x, num_particles=K)
    fn, rows = d.observed["x"][0], torch.randn(K, B, F)
    each = fn.base_dist.log_prob(rows.repeat(C, 1, 1)).unflatten(0, (C, K))
    shares = fn.log_weights
    truth = (shares + each).logsumexp(0) if guide == "guide" else (shares.exp() * each).sum(0)
    torch.testing.assert_close(fn.log_prob(rows), truth, rtol=0, atol=1e-10)
    torch.testing.assert_close(fn.log_prob(rows[0]), fn.log_prob(rows[:1].expand(K, -1, -1)))


@pytest.mark.parametrize("per_class", [False, True])
def test_value_and_gradient_are_those_of_trace_enum(x: Tensor, per_class: bool) -> None:
    mixture = Mixture(per_class)
    found = []
    for loss in (objectives.ELBO(kl="sampled"), TraceEnum_ELBO(max_plate_nesting=1)):
        torch.manual_seed(5)
        value = loss.differentiable_loss(mixture.model, mixture.guide, x)
        slopes = torch.autograd.grad(value, list(mixture.parameters()), materialize_grads=True,
                                     allow_unused=True)  # fmt: skip
        found.append(torch.cat([value.reshape(1), *(s.flatten() for s in slopes)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
    assert found[0].abs().min() < found[0].abs().max()
    d = densities(mixture.model, mixture.guide, x)
    assert d.kl_rules == {"z": "sampled" if per_class else "analytic"}


@pytest.mark.parametrize("per_class", [False, True])
def test_a_classifier_in_the_guide_makes_the_bound_that_of_trace_enum(
    x: Tensor, per_class: bool
) -> None:
    mixture, classifier = Mixture(per_class), nn.Linear(F, C)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            q = dist.Categorical(logits=classifier(x))
            y = pyro.sample("y", q, infer={"enumerate": "parallel", "classifier": True})
            loc, log_scale = mixture.encoder(x - mixture.b[y]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    parameters, slopes = [*mixture.parameters(), *classifier.parameters()], []
    for loss in (objectives.ELBO(), TraceEnum_ELBO(max_plate_nesting=1)):
        torch.manual_seed(5)
        value = loss.differentiable_loss(mixture.model, guide, x)
        slopes.append(torch.autograd.grad(value, parameters, materialize_grads=True,
                                          allow_unused=True))  # fmt: skip
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-9)
    assert slopes[0][-1].abs().max() > 0.1
    torch.manual_seed(5)
    d = densities(mixture.model, guide, x)
    assert d.label_term is not None
    torch.testing.assert_close(-(d.log_weights[0] + d.label_term).sum(), value)
    assert (d.label_term < 0).all()


def test_a_model_with_no_other_latent_is_a_mixture(x: Tensor) -> None:
    logits, loc = torch.randn(C, requires_grad=True), torch.randn(C, F, requires_grad=True)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(logits=logits), infer=SUM)
            pyro.sample("x", dist.Normal(loc[y], 1.0).to_event(1), obs=x)

    components = dist.Normal(loc, 1.0).to_event(1)
    truth = dist.MixtureSameFamily(dist.Categorical(logits=logits), components).log_prob(x)
    bound = -objectives.ELBO().differentiable_loss(model, lambda x: None, x)
    torch.testing.assert_close(bound, truth.sum(), rtol=1e-12, atol=0)
    slopes = [torch.autograd.grad(v.sum(), (logits, loc)) for v in (bound, truth)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-10, atol=1e-12)


def test_a_known_value_is_the_model_at_that_value_bit_for_bit(x: Tensor) -> None:
    mixture = Mixture()
    mixture.labels = torch.arange(B) % C
    y = mixture.labels
    d = densities(mixture.model, mixture.exact, x, num_particles=K)
    z = d.sites["z"].value.unflatten(0, (C, K))[y, :, torch.arange(B)]  # [B, K, D]
    given = {"y": y.expand(K, B), "z": z.transpose(0, 1)}
    with poutine.trace() as tracer, poutine.condition(data=given), pyro.plate("k", K, dim=-2):
        mixture.model(x)
    nodes: Any = tracer.trace.nodes
    truth = nodes["x"]["fn"].log_prob(x)
    assert torch.equal(d.log_likelihood, truth)
    prior = nodes["z"]["fn"].log_prob(given["z"])
    assert torch.equal(d.sites["z"].log_prior, prior)
    torch.testing.assert_close(
        d.log_weights[0], mixture.joint(x)[torch.arange(B), y], rtol=0, atol=1e-10
    )
    mixture.labels = torch.where(torch.arange(B) < 2, y, -1)
    found = densities(mixture.model, mixture.exact, x).log_weights[0]
    joint = mixture.joint(x)
    known = joint[torch.arange(B), y]
    truth = torch.where(mixture.labels < 0, joint.logsumexp(1), known)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-10)


ONE_SITE = {"BetaTC", "DIP", "FactorVAE", "HierarchicallyFactorized", "InfoVAE"}
PATHWISE = {"PIWAE", "StickingTheLanding"}


@pytest.mark.parametrize("kind", OBJECTIVES, ids=name)
def test_every_objective_takes_a_summed_site(kind: Any, x: Tensor) -> None:
    mixture, objective = Mixture(), kind()
    objective.prepare(101, 11)
    if objective.own_step:
        objective.start(densities(mixture.model, mixture.guide, x))
    objective.differentiable_loss(mixture.model, mixture.guide, x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixture.parameters())
    loss = objective.differentiable_loss
    if kind.__name__ in ONE_SITE | PATHWISE:
        with pytest.raises(ValueError, match="use .*ELBO") as refused:
            loss(mixture.model, mixture.exact, x)
        assert not PATHWISE & {*re.findall(r"\w+", str(refused.value))}
    else:
        assert loss(mixture.model, mixture.exact, x).isfinite()


@pytest.mark.parametrize("known", [False, True])
def test_dreg_has_the_gradient_of_iwae_where_each_value_has_its_draws(known: bool) -> None:
    mixture, x = Mixture(), torch.randn(1, F).expand(20_011, F)
    if known:  # in every other row
        mixture.labels = torch.arange(len(x)) % 2 * 2 - 1
    slopes = {}
    for kind in (objectives.IWAE, objectives.DReG):
        shift = torch.full((len(x), D), 0.4, requires_grad=True)
        torch.manual_seed(7)
        objective = kind(num_particles=2)
        loss = objective.differentiable_loss(mixture.model, mixture.exact, x, shift)
        assert loss.isfinite()
        slopes[kind] = torch.autograd.grad(loss, shift)[0]
    iwae, dreg = slopes.values()
    gap = dreg.mean(0) - iwae.mean(0)
    stderr = (dreg.var(0) + iwae.var(0)).div(len(x)).sqrt()
    assert (gap.abs() < 4 * stderr).all()
    assert (dreg.mean(0).abs() > 10 * stderr).any()
    assert (dreg.var(0) < iwae.var(0)).all()


@pytest.mark.parametrize("guide", ["guide", "exact"])
def test_evidence_and_class_probabilities_are_those_of_the_closed_form(
    guide: str, x: Tensor
) -> None:
    mixture = Mixture()
    programs = mixture.model, getattr(mixture, guide)
    joint = mixture.joint(x).detach()
    if guide == "exact":
        nn.init.constant_(mixture.shift, 0.3)
    else:
        nn.init.zeros_(mixture.encoder.weight)  # N(loc, 1), near the prior
    found = importance_sampling(*programs, x, num_samples=199)
    off = (found.log_prob - joint.logsumexp(1)) / found.stderr
    assert off.abs().max() < 4.5
    assert found.stderr.max() < 0.5
    assert found.method[0] == "importance sampling, guide, sum of 4"
    share, stderr, verdict = class_probabilities(
        *programs, x, estimator=importance_sampling, num_samples=199
    )
    assert ((share - joint.softmax(1)).abs() < 4.5 * stderr + 1e-12).all()
    torch.testing.assert_close(share.sum(1), torch.ones(B))
    assert verdict == ["lower bound"] * B


@pytest.mark.slow
def test_log_evidence_is_reliable_class_by_class(x: Tensor) -> None:
    mixture = Mixture()
    found = log_evidence(mixture.model, mixture.guide, x)
    truth = mixture.joint(x).detach().logsumexp(1)
    assert ((found.log_prob - truth).abs() < 4 * found.stderr).all()
    assert set(found.verdict) == {"reliable"}
    assert found.stderr.max() < 0.05
    share = class_probabilities(mixture.model, mixture.guide, x)
    wanted = mixture.joint(x).detach().softmax(1)
    assert ((share.probabilities - wanted).abs() < 4 * share.stderr + 1e-9).all()


def test_the_probabilities_of_x_and_each_value_add_up(x: Tensor) -> None:
    mixture = Mixture()
    parts = []
    for y in range(C):
        mixture.labels = torch.full((B,), y)
        parts.append(densities(mixture.model, mixture.exact, x).log_weights[0])
    mixture.labels = None
    whole = densities(mixture.model, mixture.exact, x).log_weights[0]
    torch.testing.assert_close(torch.stack(parts).exp().sum(0), whole.exp(), rtol=1e-9, atol=0)


class Two(nn.Module):
    """Two discrete latents, one of which the other depends on; folded or not."""

    def __init__(self, folded: bool) -> None:
        super().__init__()
        self.logits, self.table = torch.randn(C), torch.randn(C, 3)
        self.loc, self.folded = torch.randn(C, 3), folded

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Categorical(logits=self.logits), infer=SUM)
            b = pyro.sample("b", dist.Categorical(logits=self.table[a]), infer=SUM)
            z = pyro.sample("z", dist.Normal(self.loc[a, b], 1.0).expand([len(x)]))
            if self.folded:
                z = torch.stack([z, x], 1)[:, 0]
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 1.0))


@pytest.mark.parametrize("folded", [False, True])
def test_joint_values_of_two_sites_are_summed(folded: bool) -> None:
    two, x = Two(folded), torch.randn(B)
    joint = two.logits.log_softmax(0).unsqueeze(1) + two.table.log_softmax(1)
    scale = (1 + SIGMA**2) ** 0.5
    joint = joint + dist.Normal(two.loc, scale).log_prob(x.reshape(B, 1, 1))  # [B, C, 3]
    d = densities(two.model, two.guide, x, num_particles=2003)
    relative = (d.log_weights - joint.logsumexp((1, 2))).exp()
    assert ((relative.mean(0) - 1).abs() < 4.5 * relative.std(0) / len(relative) ** 0.5).all()
    share, stderr, _ = class_probabilities(
        two.model, two.guide, x, site="b", estimator=importance_sampling, num_samples=199
    )
    wanted = joint.logsumexp(1).softmax(1)
    assert share.shape == (B, 3)
    assert ((share - wanted).abs() < 4.5 * stderr).all()


def test_what_cannot_be_summed_is_refused_in_one_line(x: Tensor) -> None:
    mixture = Mixture()

    def many(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            for i in range(3):
                pyro.sample(f"y{i}", dist.Categorical(torch.ones(23)), infer=SUM)

    with pytest.raises(ValueError, match=r"12167 joint values, more than 10000"):
        densities(many, lambda x: None, x)

    def endless(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Poisson(2.0), infer=SUM)

    with pytest.raises(ValueError, match="site 'y' cannot be summed out, for Poisson has no list"):
        densities(endless, lambda x: None, x)

    def totals(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Binomial(x[:, 0], 0.5), infer=SUM)
            pyro.sample("x", dist.Normal(y, 1.0), obs=x[:, 1])

    for last in (5.0, 1.0):
        rows = torch.tensor([[2.0, 0.0], [2.0, 0.0], [last, 4.0]])
        for run in (densities, importance_sampling, log_evidence):
            with pytest.raises(ValueError, match="site 'y' cannot be summed out"):
                run(totals, lambda x: None, rows)
    with pytest.raises(ValueError, match=r"\['y'\] is in one of them only"):
        densities(poutine.block(mixture.model, hide=["y"]), mixture.exact, x)
    with pytest.raises(ValueError, match="site must name a discrete latent"):
        class_probabilities(mixture.guide, mixture.guide, x)
    assert list(summed_values(mixture.model, x)) == ["y"]


def test_a_latent_that_only_the_guide_has_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            infer = {"enumerate": "parallel"}
            c = pyro.sample("c", dist.Categorical(torch.ones(3)), infer=infer)
            pyro.sample("x", dist.Normal(c.to(x.dtype).unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"same latent sites; \['z'\] is in one of them only"):
        densities(model, guide, torch.randn(7, 1), num_particles=5)


def test_a_value_is_excluded_only_where_no_draw_is_possible() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Delta((z > 0).to(x)), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    x = torch.tensor([1.0] * 31 + [0.5] * 2)
    assert _possible(model, guide, x, x).tolist() == [True] * 31 + [False] * 2
