"""VAEs with a class: few labels, or none."""

from __future__ import annotations

import csv
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_vae import (
    build,
    class_probabilities,
    column_log_prob,
    fit,
    impute,
    load,
    log_conditional,
)
from pyro_vae.classes import SUM_OUT, ClassVAE
from pyro_vae.cli.folder import class_names
from pyro_vae.cli.parsing import run
from pyro_vae.densities import densities, summed_values
from pyro_vae.distributions import Label
from pyro_vae.estimators import Imputation, audit, importance_sampling, log_evidence
from pyro_vae.estimators.evidence import summarise
from pyro_vae.objectives import ELBO, IWAE

B, C, D, F = 7, 3, 2, 5
SMALL: Any = {"class_path": "MLP", "init_args": {"hidden": [6]}}
LINEAR: Any = {"class_path": "MLP", "init_args": {"hidden": []}}


def made(prior: str = "StandardNormal", decoder: Any = SMALL, **options: Any) -> ClassVAE:
    likelihood = {"class_path": "Normal", "init_args": {"scale": 0.7}}
    given = {"latent_dim": D, "encoder": SMALL, "decoder": decoder, "classes": C, **options}
    vae = build(F, prior=prior, likelihood=likelihood, **given)
    assert isinstance(vae, ClassVAE)
    for parameter in (*vae.prior.parameters(), vae.class_weights.logits):
        nn.init.normal_(parameter, std=0.3)
    return vae


def joint(vae: ClassVAE, x: Tensor) -> Tensor:
    """log p(x, y) [B, C] of a linear decoder."""
    logits, loc, covariance = moments(vae)
    given = dist.MultivariateNormal(loc, covariance).log_prob(x.unsqueeze(1))
    return logits + given


def moments(vae: ClassVAE) -> tuple[Tensor, Tensor, Tensor]:
    """log p(y) [C], and moments [C, F] and [C, F, F] of p(x | y), of a linear decoder."""
    linear: Any = vae.likelihood.decoder.output  # type: ignore[union-attr]
    W, offset = linear.weight[:, :D], linear.weight[:, D:].T + linear.bias
    prior: Any = vae.prior(torch.eye(C))
    scale = prior.stddev.expand(C, D)
    noise = 0.7**2 * torch.eye(F)
    covariance = W @ scale.square().diag_embed() @ W.T + noise
    loc = prior.mean.expand(C, D) @ W.T + offset
    return vae.class_weights.logits.log_softmax(0).detach(), loc.detach(), covariance.detach()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("proposal", ["guide", pytest.param("refined", marks=pytest.mark.slow)])
def test_what_is_missing_is_drawn_from_the_mixture_over_classes(proposal: str) -> None:
    vae, N = made("NormalPerClass", LINEAR, missing=True), 13
    with torch.no_grad():
        vae.prior.loc *= 5.0  # type: ignore[union-attr, operator]
        vae.posterior.encoder.output.weight *= 0.1  # type: ignore[union-attr, operator]
        vae.posterior.encoder.output.bias[D:] = 2.0  # type: ignore[union-attr, operator, index]
    x = vae.sample(N).masked_fill(torch.rand(N, F) < 0.5, torch.nan)
    labels = torch.where(torch.arange(N) < C, torch.arange(N), -1)
    K = {"guide": 10_007, "refined": 499}[proposal]
    found = impute(vae, x, labels, num_draws=499, num_samples=K, proposal=proposal)
    given = ~x.isnan()
    assert torch.equal(found.mean[given], x[given])
    assert not found.stderr[given].any()
    logits, loc, covariance = moments(vae)
    means, draws = [], []
    for n in range(N):
        m = x[n].isnan()
        o = ~m
        gain = covariance[:, m][:, :, o] @ covariance[:, o][:, :, o].inverse()
        given = loc[:, m] + (gain @ (x[n, o] - loc[:, o])[..., None])[..., 0]
        within = covariance[:, m][:, :, m] - gain @ covariance[:, o][:, :, m]
        seen = dist.MultivariateNormal(loc[:, o], covariance[:, o][:, :, o]) if o.any() else None
        log_joint = logits + (0.0 if seen is None else seen.log_prob(x[n, o]))
        known = labels[n] < 0 or torch.arange(C) == labels[n]
        log_joint = torch.where(torch.as_tensor(known), log_joint, -torch.inf)
        total, share = log_joint.logsumexp(0), log_joint.softmax(0)
        assert abs(found.log_prob[n] - total) < 4.5 * found.evidence.stderr[n] + 1e-9
        if not m.any():
            continue
        mean = share @ given
        means.append((found.mean[n, m] - mean) / found.stderr[n, m])
        spread = given - mean
        second = (share[:, None, None] * (within + spread[:, :, None] * spread[:, None])).sum(0)
        away = found.draws[:, n, m] - mean
        products = (away[:, :, None] * away[:, None]).flatten(1)
        draws.append(away.mean(0) / (2 * second.diag() / len(away)).sqrt())  # repeated draws
        draws.append((products.mean(0) - second.flatten()) / (2 * products.var(0) / 499).sqrt())
    for scores in (torch.cat(means), torch.cat(draws)):
        assert 0.5 < scores.square().mean().sqrt() < 1.5
        assert scores.abs().max() < 4.5
    assert set(found.verdict) == {{"guide": "lower bound", "refined": "reliable"}[proposal]}
    assert torch.equal(found.draws[:, ~x.isnan()], x[~x.isnan()].expand(499, -1))


@pytest.mark.usefixtures("float64")
def test_the_error_of_a_mixed_mean_has_that_of_the_probabilities() -> None:
    N, logits, errors = 2003, torch.randn(C), torch.tensor([0.1, 0.02, 0.05])
    parts = []
    for c in range(C):
        evidence = summarise(torch.zeros(2, N), "known", "reliable")
        log_prob = logits[c] + errors[c] * torch.randn(N)
        evidence = replace(evidence, log_prob=log_prob, stderr=errors[c].expand(N))
        exact = torch.full((N, 1), c**2 + 1.0)
        parts.append(Imputation(exact.expand(17, N, 1), exact, 0 * exact, evidence))
    found = Imputation.mixed(parts)
    share, value = logits.softmax(0), torch.arange(C) ** 2 + 1.0
    assert abs(found.stderr.mean() / found.mean.std() - 1) < 0.07
    assert abs(found.mean.mean() - share @ value) < 5 * found.mean.std() / N**0.5 + 1e-3
    drawn = (found.draws == value).double().mean((0, 1))
    assert ((drawn - share).abs() < 4.5 * (share * (1 - share) / (17 * N)).sqrt() + 1e-3).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("prior", ["StandardNormal", "NormalPerClass"])
def test_evidence_is_that_of_the_mixture_and_labels_are_observed(prior: str) -> None:
    vae, x = made(prior, LINEAR), torch.randn(B, F)
    truth = joint(vae, x)
    way: Any = {"num_samples": 199, "proposal": "prior"}  # of bounded weights
    found = importance_sampling(vae, x, **way)
    assert ((found.log_prob - truth.logsumexp(1)).abs() < 4.5 * found.stderr).all()
    labels = torch.tensor([0, 1, 2, -1, 1, -1, 0])
    known = truth.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    wanted = torch.where(labels < 0, truth.logsumexp(1), known)
    found = importance_sampling(vae, x, labels, **way)
    assert ((found.log_prob - wanted).abs() < 4.5 * found.stderr).all()
    one_hot = torch.eye(C)[labels] * (labels >= 0)[:, None]
    for rows in (one_hot, one_hot.bool()):
        again = importance_sampling(vae, x, rows, **way)
        assert torch.equal(again.log_prob, found.log_prob)
    share, stderr, _ = class_probabilities(vae, x, estimator=importance_sampling, **way)
    assert ((share - truth.softmax(1)).abs() < 4.5 * stderr + 1e-9).all()
    all_known = importance_sampling(vae, x, torch.arange(B) % 2, **way)  # class 2 is no row's
    assert ((all_known.ess > 1) & (all_known.ess <= 199)).all()


@pytest.mark.usefixtures("float64")
def test_a_label_is_scored_where_nothing_of_x_was_observed() -> None:
    vae, labels = made("StandardNormal", LINEAR, missing=True), torch.tensor([0, 2, -1])
    with torch.no_grad():
        vae.class_weights.logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
    x, way = torch.full((3, F), torch.nan), {"num_samples": 19, "proposal": "prior"}
    found: Any = importance_sampling(vae, x, labels, **way)
    known = vae.class_weights.logits.log_softmax(0)[labels].detach()
    assert torch.allclose(found.log_prob, torch.where(labels < 0, 0.0, known))
    own: Any = importance_sampling(vae, x, labels, num_samples=19)
    assert own.log_prob[-1] == 0
    assert own.method[-1] == "nothing observed"
    given = torch.zeros(F, dtype=torch.bool)
    other: Any = log_conditional(vae, torch.zeros(3, F), given, labels, audit=False)
    whole = importance_sampling(vae, torch.zeros(3, F), labels, num_samples=2000)
    assert torch.allclose(other.log_prob, whole.log_prob - found.log_prob, atol=0.3)


def joint_of_layers(vae: ClassVAE, x: Tensor) -> Tensor:
    """log p(x, y) [B, C] of two linear layers, D and 3, the lower one of fixed scale."""
    top: Any = vae.prior.layers[1](torch.eye(C))  # type: ignore[union-attr, operator]
    lower: Any = vae.prior.layers[0].network.output  # type: ignore[union-attr]
    linear: Any = vae.likelihood.decoder.decoder.output  # type: ignore[union-attr]
    with torch.no_grad():
        lower.weight[D:] = 0
    A, W = lower.weight[:D], linear.weight
    loc = top.mean @ A[:, :3].T + A[:, 3:].T + lower.bias[:D]
    scale = nn.functional.softplus(lower.bias[D:]) + 1e-4
    covariance = A[:, :3] @ top.variance.diag_embed() @ A[:, :3].T + scale.square().diag()
    loc = loc @ W[:, :D].T + W[:, D:].T + linear.bias
    covariance = W[:, :D] @ covariance @ W[:, :D].T + 0.7**2 * torch.eye(F)
    given = dist.MultivariateNormal(loc, covariance).log_prob(x.unsqueeze(1))
    return (vae.class_weights.logits.log_softmax(0) + given).detach()


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:posterior collapse")
@pytest.mark.parametrize("order", ["TopDown", "BottomUp", "Ladder"])
def test_classes_of_several_layers_have_their_closed_form(order: str) -> None:
    vae, x = made("NormalPerClass", LINEAR, latent_dim=[D, 3], hierarchy=order), torch.randn(B, F)
    truth = joint_of_layers(vae, x)
    for q in vae.posterior.layers:  # type: ignore[union-attr]
        size = q.latent_dim
        with torch.no_grad():
            q.encoder.output.weight *= 0.3
            q.encoder.output.bias[size:] = 1.5  # wide, for weights of finite variance
    labels = torch.tensor([0, 1, 2, -1, 1, -1, 0])
    known = truth.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    wanted = torch.where(labels < 0, truth.logsumexp(1), known)
    for proposal in ("guide", "prior"):
        found = importance_sampling(vae, x, labels, num_samples=499, proposal=proposal)
        assert ((found.log_prob - wanted).abs() < 4.5 * found.stderr).all()
    way: Any = {"estimator": importance_sampling, "num_samples": 499, "proposal": "prior"}
    share, stderr, _ = class_probabilities(vae, x, **way)
    assert ((share - truth.softmax(1)).abs() < 4.5 * stderr + 1e-9).all()
    fit(vae, (x, labels), IWAE(3), epochs=1, precision="64-true", progress=False)
    assert vae.encode(x).mean.shape == (B, D + 3)
    assert vae.reconstruct(x).shape == vae.sample(B, labels).shape == (B, F)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", [{}, {"latent_dim": [D, 3]}, {"missing": True}])
def test_a_classifier_learns_labels_and_is_tied_to_the_model_elsewhere(options: Any) -> None:
    x, labels = torch.randn(B, F), torch.tensor([0, 1, 2, -1, 1, -1, 0])
    x[3, 2] = torch.nan if options.get("missing") else 0.0
    vae = made(label_weight=13.0, classifier=True, **options)
    parameters, classifier, known = list(vae.parameters()), vae.classifier, labels >= 0
    for objective in (ELBO(), IWAE(3)):
        K, slopes, values = objective.num_particles, [], []
        for network, weight in ((classifier, 13.0), (None, 0.0)):
            vae.classifier, vae.label_weight = network, weight
            torch.manual_seed(5)
            loss = objective.differentiable_loss(vae.model, vae.guide, x, labels)
            values.append(loss.detach())
            slopes.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
        torch.manual_seed(5)
        d = densities(vae.model, vae.guide, x, num_particles=K)
        vae.classifier = classifier
        assert d.each is not None
        p = dist.Categorical(logits=d.each.log_weights.unflatten(0, (C, K)).logsumexp(1).T)
        q = dist.Categorical(probs=vae.classify(x).probs)
        kl = torch.distributions.kl_divergence(q, p)
        term = kl[~known].sum() - 13.0 * q.log_prob(labels.clamp(min=0))[known].sum()
        wanted = torch.autograd.grad(term, parameters, materialize_grads=True)
        assert values[0] == values[1]
        assert wanted[-1].any()
        for with_it, without, part in zip(*slopes, wanted):
            torch.testing.assert_close(with_it - without, part, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("labels", [[0, 1], [-1, -1]])
def test_a_classifier_learns_where_x_excludes_a_class(labels: list[int]) -> None:
    x, known = torch.tensor([0.5, -1.0]), torch.tensor(labels).unsqueeze(1)
    slope, logits = torch.tensor(0.5, requires_grad=True), torch.zeros(3, requires_grad=True)

    def model(x: Tensor, labels: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.OneHotCategorical(torch.ones(3)), infer=SUM_OUT)
            weighted: Any = {"label_weight": 5.0}
            pyro.sample("label", Label(c), obs=labels[..., 0], infer=weighted)
            z = pyro.sample("z", dist.Normal(slope * c[..., 1], 1.0))
            top = torch.where(c[..., 2] > 0, 0.1, 9.0)  # no x of the third class is so large
            pyro.sample("size", dist.Uniform(0.0, top, validate_args=False), obs=x.abs())
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor, labels: Tensor) -> None:
        infer: Any = SUM_OUT | {"classifier": True}
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("c", dist.OneHotCategorical(logits=logits), infer=infer)
            pyro.sample("z", dist.Normal(x, 0.5))

    loss = ELBO().differentiable_loss(model, guide, x, known)
    slopes = torch.autograd.grad(loss, [slope, logits])
    assert slopes[0].isfinite()
    if labels[0] < 0:
        assert 10 < slopes[1][2] < 100  # away from what x excludes
    else:
        torch.testing.assert_close(slopes[1], torch.tensor([-5.0, -5.0, 10.0]) / 3)


@pytest.mark.parametrize(("weight", "label", "warned"), [(0.0, 2, 1), (0.0, -1, 0), (3.0, 2, 0)])
def test_labels_that_a_classifier_will_not_see_are_told(
    weight: float, label: int, warned: int
) -> None:
    vae, labels = made(label_weight=weight, classifier=True), torch.full((B,), -1)
    labels[0] = label
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(vae, (torch.randn(B, F), labels), epochs=1, progress=False)
    assert ["learns no label" in str(w.message) for w in caught] == [True] * warned


@pytest.mark.usefixtures("float64")
def test_the_label_weight_moves_gradients_by_log_p_of_the_label_alone() -> None:
    x, labels = torch.randn(B, F), torch.tensor([0, 1, 2, -1, 1, -1, 0])
    vae = made(label_weight=13.0)
    parameters = list(vae.parameters())
    for objective in (ELBO(), IWAE(3)):
        slopes, values = [], []
        for weight in (13.0, 0.0):
            vae.label_weight = weight
            torch.manual_seed(5)
            loss = objective.differentiable_loss(vae.model, vae.guide, x, labels)
            values.append(loss.detach())
            slopes.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
        K = objective.num_particles
        torch.manual_seed(5)
        d = densities(vae.model, vae.guide, x, num_particles=K)
        assert d.each is not None
        weights = d.each.log_weights.unflatten(0, (C, K)).logsumexp(1)  # [C, B]
        shares = weights.log_softmax(0).T.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        term = -13.0 * shares[labels >= 0].sum()
        wanted = torch.autograd.grad(term, parameters, materialize_grads=True)
        assert values[0] == values[1]
        for with_it, without, part in zip(*slopes, wanted):
            torch.testing.assert_close(with_it - without, part, rtol=1e-8, atol=1e-10)


def test_codes_draws_and_reconstructions_have_their_shapes_and_follow_the_label() -> None:
    vae, x = made("NormalPerClass"), torch.randn(B, F)
    y = torch.arange(B) % C
    assert vae.encode(x).mean.shape == (B, D)
    given = vae.posterior(x, torch.eye(C)[y]).mean
    torch.testing.assert_close(vae.encode(x, y).mean, given)
    assert vae.reconstruct(x).shape == (B, F)
    assert vae.reconstruct(x, y, num_samples=2).shape == (2, B, F)
    assert vae.sample(B, torch.where(y == 0, -1, y), mean=True).shape == (B, F)
    nn.init.constant_(vae.class_weights.logits, 0.0)
    with torch.no_grad():
        vae.class_weights.logits[1] = 50.0
    torch.manual_seed(1)
    drawn = vae.sample(B, mean=True)
    torch.manual_seed(1)
    torch.testing.assert_close(vae.sample(B, torch.full((B,), 1), mean=True), drawn)


def clusters(num: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    y = torch.arange(num) % C
    return 4 * torch.eye(C, F)[y] + 0.7 * torch.randn(num, F), y


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_few_labels_name_the_clusters(tmp_path: Path, compile: bool, classifier: bool) -> None:
    x, y = clusters(210)
    labels = torch.where(torch.arange(210) < 15, y, -1)
    vae = made("NormalPerClass", label_weight=5.0, classifier=classifier)
    options: Any = {"lr": 0.02, "batch_size": 30, "progress": False, "compile": compile}
    fit(vae, (x, labels), epochs=12, run=tmp_path / "run", **options)
    share, _, _ = class_probabilities(vae, x, estimator=importance_sampling, num_samples=11)
    assert (share.argmax(1) == y).double().mean() > 0.95
    again = load(tmp_path / "run")
    assert isinstance(again, ClassVAE)
    if classifier:
        with torch.no_grad():
            assert (again.classify(x).probs.argmax(1) == y).double().mean() > 0.95
    else:
        with pytest.raises(ValueError, match="no classifier: use class_probabilities, or build"):
            again.classify(x)
    assert (again.classes, again.label_weight) == (C, 5.0)
    for name, value in vae.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.filterwarnings("ignore:posterior collapse")
@pytest.mark.parametrize("latent_dim", [D, [D, 3]])
def test_a_resumed_run_is_an_unbroken_one(tmp_path: Path, latent_dim: Any) -> None:
    x, y = clusters(60)
    data, weights = (x, torch.where(y == 1, y, -1)), []
    for epochs in ((4,), (2, 4)):
        torch.manual_seed(3)
        vae = made(latent_dim=latent_dim, label_weight=5.0, classifier=True)
        folder = tmp_path / str(len(epochs))
        for number in epochs:
            fit(vae, data, epochs=number, run=folder, resume=True, progress=False)
        weights.append(vae.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_file_of_few_labels_is_trained_and_classified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    x, y = clusters(120)
    labels = np.where(np.arange(120) < 20, y.numpy(), np.nan)
    np.savez("few.npz", x=x.numpy(), labels=labels)
    np.savez("new.npz", x=x[:11].numpy(), labels=y[:11].numpy())
    train = ["train", "--data=few.npz", "--likelihood=Normal", "--transform=none", "--run=run"]
    small = ["--latent_dim=[2,3]", "--encoder.hidden=[6]", "--decoder.hidden=[6]", "--epochs=2"]
    assert run([*train, *small, "--classes=3", "--label_weight=5", "--classifier"]) == 0
    assert run(["encode", "run", "new.npz"]) == 0
    assert np.load("new.encoded.npz")["mean"].shape == (11, 5)
    judge = ["--num_samples=7", "--progress=false"]
    assert run(["classify", "run", "new.npz", *judge]) == 0
    assert "of 11 known labels found" in capsys.readouterr().out
    rows = list(csv.DictReader(Path("new.classes.csv").read_text().splitlines()))
    shares = np.array([[float(row[f"p{c}"]) for c in range(C)] for row in rows])
    assert shares.shape == (11, C)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)
    assert [int(row["class"]) for row in rows] == shares.argmax(1).tolist()
    assert run(["sample", "run", "--size=3", "--label=7"]) == 2
    assert "label must be one of 0, 1, 2; got 7" in capsys.readouterr().err
    assert run([*train[:-1], "--run=two", *small, "--classes=2"]) == 2
    assert "labels below 2, the number of classes" in capsys.readouterr().err
    assert run([*train[:-1], "--run=two", *small, "--conditional=true"]) == 2
    assert "for few labels use --classes" in capsys.readouterr().err


def test_no_class_without_a_name_is_called_as_another() -> None:
    assert class_names(["1", "2"], 4) == ["1", "2", "class_2", "3"]


@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_a_table_with_classes_is_evaluated_and_classified_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"{i % 7 + 0.5},{'uv'[i % 2]},{('2', 'one')[i % 2]}" for i in range(60)]
    Path("t.csv").write_text("\n".join(["a,b,label", *lines]))
    small = ["--latent_dim=1", "--encoder.hidden=[4]", "--decoder.hidden=[4]", "--epochs=1"]
    assert run(["train", "--data=t.csv", "--classes=2", "--run=run", "--no-progress", *small]) == 0
    capsys.readouterr()
    assert run(["evaluate", "run", "--json", "--tolerance=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == sum(found["verdicts"].values()) == 6
    assert "simulated data" in found["audit"]
    assert run(["classify", "run", "t.csv", "--num_samples=3", "--progress=false"]) == 0
    found = list(csv.DictReader(Path("t.classes.csv").read_text().splitlines()))
    assert [*found[0]] == ["row", "class", "p2", "p_one", "stderr", "verdict"]
    for row in found:
        assert row["class"] == ("one" if float(row["p_one"]) > float(row["p2"]) else "2")
    assert run(["sample", "run", "--size=3", "--label=one"]) == 0
    assert run(["sample", "run", "--size=3", "--label=0"]) == 2
    assert "label must be one of 2, one; got 0" in capsys.readouterr().err


@pytest.mark.usefixtures("float64")
def test_each_column_given_the_others_is_that_of_the_mixture_over_classes() -> None:
    vae = made("NormalPerClass", LINEAR, missing=True)
    with torch.no_grad():
        vae.prior.loc *= 5.0  # type: ignore[union-attr, operator]
    x, labels = vae.sample(3), torch.tensor([-1, 0, -1])
    x[2, 1] = torch.nan
    logits, loc, covariance = moments(vae)

    def log_prob(n: int, seen: Tensor) -> Tensor:
        part = dist.MultivariateNormal(loc[:, seen], covariance[:, seen][:, :, seen])
        each = logits + part.log_prob(x[n, seen])
        return each.logsumexp(0) if labels[n] < 0 else each[labels[n]]

    truth = torch.full_like(x, torch.nan)
    for n, c in (~x.isnan()).nonzero().tolist():
        seen = ~x[n].isnan()
        truth[n, c] = log_prob(n, seen) - log_prob(n, seen & (torch.arange(F) != c))
    found = column_log_prob(vae, x, labels)
    torch.testing.assert_close(found, truth, rtol=0, atol=0.1, equal_nan=True)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    vae, x = made(), torch.randn(B, F)
    for labels in (torch.full((B,), C), torch.full((B,), -2), torch.full((B,), 0.5)):
        with pytest.raises(ValueError, match="labels must be from 0 to 2, for 3 classes, or -1"):
            fit(vae, (x, labels), progress=False)
        wrong = next(label for label in labels.flatten().tolist() if label not in (-1, 0, 1, 2))
        with pytest.raises(ValueError, match=f"unknown; got {wrong:g}"):
            vae.check_labels(labels.tolist())
        for read in (vae.model, vae.encode, vae.reconstruct, lambda x, y: vae.sample(len(x), y)):
            with pytest.raises(ValueError, match="labels must be from 0 to 2"):
                read(x, labels)
    with pytest.raises(ValueError, match=r"y must be labels \[B\]"):
        vae.model(x, torch.zeros(B, 2))
    for read in (vae.model, vae.encode, vae.reconstruct):
        with pytest.raises(ValueError, match=f"one row for each datum or draw: {len(x)}; got 2"):
            read(x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="a datum has one y: give classes or a condition"):
        build(F, D, classes=C, condition_dim=2)
    with pytest.raises(ValueError, match=r"audit holds \['y'\] at each value: expected no y"):
        audit(vae, x, torch.zeros(len(x), 1))
    with pytest.raises(ValueError, match="label_weight needs classes"):
        build(F, D, label_weight=1.0)
    with pytest.raises(ValueError, match="classifier needs classes"):
        build(F, D, classifier=True)
    with pytest.raises(ValueError, match="classes must be at least 2"):
        build(F, D, classes=1)


def test_a_label_says_its_class_or_nothing() -> None:
    label = Label(torch.eye(C))
    assert torch.equal(label.log_prob(torch.full((C,), -1)), torch.zeros(C))
    inf = torch.inf
    assert label.log_prob(torch.tensor([0, 0, 2])).tolist() == [0.0, -inf, 0.0]
    assert label.sample().tolist() == [0, 1, 2]
    assert label.expand(torch.Size((2, C))).batch_shape == (2, C)


def test_each_class_is_audited() -> None:
    torch.manual_seed(0)
    vae = made(decoder=LINEAR)
    x = vae.sample(5)
    found = log_evidence(vae, x)
    assert found.audit.startswith("passed: of 24 simulated data")
    assert set(found.verdict) == {"reliable"}
    held = audit(vae, x, num_data=7)
    assert (len(held), held.passed) == (7 * C, True)


def test_data_that_are_refused_leave_the_class_summed_out() -> None:
    vae, x = made(), torch.ones(3, F)
    with pytest.raises(ValueError, match="x must be finite"):
        densities(vae, x * torch.nan)
    assert summed_values(vae.model, x)
