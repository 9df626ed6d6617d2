"""Counts: inflated zeros, dispersions, and totals that are given or integrated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from families import Raw
from torch import Tensor

import pyro_vae
from pyro_vae import likelihoods
from pyro_vae.estimators import bidirectional

G, N = 5, 13
COUNTS = [likelihoods.Poisson, likelihoods.NegativeBinomial]
KINDS = [{"dispersion": kind} for kind in ("gene", "cell", "shared")]


def counts(rows: int = N) -> Tensor:
    torch.manual_seed(0)
    size = torch.randn(rows, 1).exp() * 7 + 1
    return torch.poisson(size * torch.rand(rows, G) * 3) + torch.eye(G)[torch.arange(rows) % G]


def vae(x: Tensor, cls: str = "NegativeBinomial", **options: Any) -> pyro_vae.VAE:
    """A VAE whose decoder ignores z."""
    torch.manual_seed(0)
    made = pyro_vae.build((G,), 2, likelihood={"class_path": cls, "init_args": options})
    made.initialise(x)
    torch.nn.init.zeros_(made.likelihood.decoder.output.weight)
    return made


def share(made: pyro_vae.VAE) -> Tensor:
    return made.likelihood.shares(torch.zeros(1, 2).double()).detach()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("cls", "options"), [(COUNTS[0], {}), *((COUNTS[1], k) for k in KINDS)])
def test_inflated_zeros(cls: Any, options: dict[str, str]) -> None:
    likelihood = cls(Raw(), (1,), zero_inflated=True, **options)
    plain = cls(Raw(), (1,), **options)
    raw = 0.5 * torch.randn(7, cls.num_params(zero_inflated=True, **options))
    p, q = likelihood(raw), plain(raw[:, :-1])
    k = torch.arange(2000.0).view(-1, 1, 1).expand(-1, 7, 1)
    torch.testing.assert_close(p.log_prob(k).exp().sum(0), torch.ones(7))
    gate = raw[:, -1].sigmoid()
    torch.testing.assert_close(p.log_prob(k[0]).exp(), gate + (1 - gate) * q.log_prob(k[0]).exp())
    torch.testing.assert_close(p.log_prob(k[3]).exp(), (1 - gate) * q.log_prob(k[3]).exp())
    torch.testing.assert_close(p.mean, (1 - gate).unsqueeze(-1) * q.mean)


@pytest.mark.usefixtures("float64")
def test_a_large_dispersion_is_poisson() -> None:
    likelihood = likelihoods.NegativeBinomial(Raw(), (3,))
    torch.nn.init.constant_(likelihood.raw_dispersion, 1e7)
    raw, x = torch.randn(7, 3), torch.arange(21.0).view(7, 3)
    truth = likelihoods.Poisson(Raw(), (3,))(raw).log_prob(x)
    torch.testing.assert_close(likelihood(raw).log_prob(x), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [*KINDS, {"zero_inflated": True}, {"library": "latent"}])
@pytest.mark.parametrize("cls", ["Poisson", "NegativeBinomial"])
def test_large_counts_in_float32(cls: str, options: dict[str, str]) -> None:
    """Values are those of float64, and in training the gradients."""
    options = {k: v for k, v in options.items() if k != "dispersion" or cls != "Poisson"}
    x = counts()
    x[0, 1] = 999_983.0
    values, slopes = [], []
    for kind in (torch.float32, torch.float64):
        made, z = vae(x, cls, **options).to(kind), torch.zeros(N, 2, dtype=kind)
        given = {"library": x.sum(1).to(kind)} if "library" in options else {}
        values.append(made.eval().likelihood(z, **given).log_prob(x.to(kind)).double())
        made.train().likelihood(z, **given).log_prob(x.to(kind)).sum().backward()
        slopes += [{n: p.grad.double() for n, p in made.named_parameters() if p.grad is not None}]
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1.0)  # of terms of 10^6


@pytest.mark.parametrize(
    "cls", ["Poisson", pytest.param("NegativeBinomial", marks=pytest.mark.slow)]
)
def test_given_their_total(cls: str) -> None:
    x = counts()
    made = vae(x, cls, library="observed").double()
    rate = x.sum(1, keepdim=True) * share(made)
    if cls == "Poisson":
        truth = dist.Poisson(rate).log_prob(x).sum(1)
    else:
        r = made.likelihood.min_dispersion + made.likelihood.raw_dispersion.exp().log1p()
        truth = dist.NegativeBinomial(r, logits=rate.log() - r.log()).log_prob(x).sum(1)
    found = pyro_vae.log_evidence(made, x)
    assert ((found.log_prob - truth).abs() < 4 * found.stderr + 1e-4).all()
    assert abs((found.log_prob - truth).mean()) < 3 * found.mean_stderr()[0]
    assert found.audit.startswith("none")
    total = made.sample(20_011).sum(1)
    truth = dist.LogNormal(*made.likelihood.log_total).mean
    assert abs(total.mean() - truth) < 4 * total.std() / 20_011**0.5
    with pytest.raises(ValueError, match="1 row\\(s\\) are all zero"):
        made.initialise(torch.cat([x, torch.zeros(1, G)]))
    made.likelihood.missing = True
    with pytest.raises(ValueError, match="2 row\\(s\\) lack values"):
        made.likelihood.check(x.index_fill(0, torch.tensor([0, 3]), torch.nan))


@pytest.mark.parametrize(
    "cls", [pytest.param("Poisson", marks=pytest.mark.slow), "NegativeBinomial"]
)
def test_a_latent_total_is_integrated(cls: str) -> None:
    """log p(x) by one integral over the total."""
    x = counts()
    made, x = vae(x, cls, library="latent", zero_inflated=True).double(), x[:7]
    mean, spread = made.likelihood.log_total.tolist()
    t = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    total = (mean + spread * t).exp()
    with torch.no_grad():
        p = made.likelihood(torch.zeros(4001, 1, 2).double(), None, library=total.unsqueeze(1))
        log_p = p.log_prob(x.double()) + dist.Normal(0.0, 1.0).log_prob(t).unsqueeze(1)
    truth = log_p.logsumexp(0) + torch.tensor(18 / 4000).log()
    found = pyro_vae.log_evidence(made, x)
    assert found.verdict == ["reliable"] * 7
    assert ((found.log_prob - truth).abs() < 4 * found.stderr + 1e-4).all()
    assert abs((found.log_prob - truth).mean()) < 3 * found.mean_stderr()[0]
    elbo = pyro_vae.importance_sampling(made, x, num_samples=20).log_prob
    assert (elbo - truth).mean() < 0.05  # a bound
    assert bidirectional(made, x, num_data=3, num_chains=8).mean()[2] < 1.0


@pytest.mark.filterwarnings("ignore:posterior collapse")
@pytest.mark.parametrize("objective", ["ELBO", "IWAE", "DReG"])
def test_totals_train(objective: str) -> None:
    x = counts(101)
    made = vae(x, library="latent")
    with torch.no_grad():
        made.likelihood.decoder.output.weight.normal_(0, 0.1)
    chosen = getattr(pyro_vae.objectives, objective)()
    before = made.likelihood.raw_guide.detach().clone()
    options = {"epochs": 7, "lr": 3e-3, "batch_size": 23, "progress": False, "accelerator": "cpu"}
    rows = pyro_vae.fit(made, x, chosen, **options).rows
    assert rows[-1]["elbo"] > rows[0]["elbo"]
    assert not torch.equal(before, made.likelihood.raw_guide.detach())
    mean, spread = made.normalised(x[:7])
    torch.testing.assert_close(mean.sum(1), torch.ones(7))
    assert (spread > 0).all()
    assert made.reconstruct(x[:7]).shape == (7, G)
    assert made.sample(11).shape == (11, G)


@pytest.mark.parametrize("rows", [3, 7])  # as many as classes, and more
def test_classes_of_counts_with_totals(rows: int) -> None:
    x, labels = counts(rows), torch.arange(rows) % 4 - 1
    like = {"Poisson": {"library": "latent"}}
    made = pyro_vae.build((G,), 2, likelihood=like, classes=3).eval()
    made.initialise(x)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for method in (lambda x, y: made.encode(x, y).mean, made.reconstruct):
        alone = [method(x[i, None], labels[i, None]) for i in range(rows)]
        torch.testing.assert_close(method(x, labels), torch.cat(alone))
    each = [made.normalised(x, torch.full((rows,), c), 4000) for c in range(3)]
    means, spreads = (torch.stack(part) for part in zip(*each))
    share = torch.where(
        labels[:, None] < 0, made.encode(x).mixture_distribution.probs, torch.eye(3)[labels]
    )
    torch.testing.assert_close(means.sum(-1), torch.ones(3, rows))
    truth = (share.T.unsqueeze(-1) * means).sum(0)
    mean, spread = made.normalised(x, labels, 4000)
    assert (
        (mean - truth).abs() < 4.5 * (spread**2 + spreads.amax(0) ** 2).sqrt() / 4000**0.5
    ).all()


def test_a_dispersion_of_each_cell_starts_at_log_two() -> None:
    x = counts()
    x[:, 1], x[:, 2] = torch.eye(N)[0], 0.0
    likelihood = likelihoods.NegativeBinomial(Raw(), (G,), 0.1, dispersion="cell")
    p = likelihood(likelihood.raw_start(x)).base_dist
    torch.testing.assert_close(p.mean, x.mean(0).clamp(min=0.01))
    torch.testing.assert_close(p.total_count, torch.full((G,), 0.1 + math.log(2)))


@pytest.mark.parametrize("rows", [1, 2])
def test_the_spread_of_totals_is_measured_from_two_rows_on(rows: int) -> None:
    x = counts(rows)
    x[0] = 0.0  # a total of 0 counts as 1
    logs = x.sum(1).clamp(min=1).log()
    truth = torch.stack([logs.mean(), logs.std() if rows == 2 else torch.tensor(1.0)])
    torch.testing.assert_close(vae(x, library="latent").likelihood.log_total, truth)


def test_the_encoder_sees_logarithms() -> None:
    x = counts()
    torch.testing.assert_close(vae(x).likelihood.inputs(x), x.log1p())
    torch.testing.assert_close(vae(x, log_inputs=False).likelihood.inputs(x), x)


def test_runs_from_before_the_options_load_as_they_were(tmp_path: Path) -> None:
    x = counts(101)
    made = vae(x, dispersion="cell", log_inputs=False)
    run = tmp_path / "run"
    with pytest.warns(UserWarning, match="collapse"):
        pyro_vae.fit(made, x, epochs=1, run=run, progress=False, accelerator="cpu")
    record = json.loads((run / "run.json").read_text())
    record["declaration"]["likelihood"]["init_args"] = {"min_dispersion": 1e-3}
    (run / "run.json").write_text(json.dumps(record))
    loaded = pyro_vae.load(run)
    torch.testing.assert_close(loaded.encode(x).mean, made.eval().encode(x).mean)


def test_names_of_options() -> None:
    for key in ("library", "dispersion"):
        with pytest.raises(ValueError, match=f"{key} must be '.*', '.*' or '.*'; got 'x'"):
            likelihoods.NegativeBinomial(Raw(), (3,), **{key: "x"})
    with pytest.raises(ValueError, match="need a likelihood of counts"):
        pyro_vae.build((3,), 2).normalised(torch.zeros(5, 3))
