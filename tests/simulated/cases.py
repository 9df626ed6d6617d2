"""What must work on a GPU, on a simulated device: run by tests/test_simulated_device.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from device import DEVICE, Simulation, hidden, reads
from families import (
    LIKELIHOODS,
    NETWORKS,
    OBJECTIVES,
    POSTERIORS,
    PRIORS,
    accepted,
    draw,
    make,
    network,
)
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import pyro_vae
from pyro_vae import likelihoods, metrics, networks, posteriors, priors
from pyro_vae.__main__ import main
from pyro_vae.cli import compare, evaluate, score
from pyro_vae.data import load_data
from pyro_vae.estimators import evidence_lower_bound
from pyro_vae.objectives import (
    ELBO,
    IWAE,
    BetaTC,
    FactorVAE,
    HierarchicallyFactorized,
    Linear,
    Objective,
)
from pyro_vae.processes import Engine
from pyro_vae.training import fit, trainer
from pyro_vae.training.dataset import TensorDataset
from pyro_vae.training.step import LossAndGradient, StepLoss
from pyro_vae.vae import VAE


@pytest.fixture(autouse=True)
def simulation() -> Iterator[None]:
    reads.clear()
    with Simulation():
        yield


def same(here: Any, there: Any) -> None:
    """Numbers on the CPU, and those of the device."""
    assert there.device == DEVICE
    torch.testing.assert_close(hidden(there), here, rtol=1e-4, atol=1e-5)


# --- steps --------------------------------------------------------------------------------------


def step_of(vae: nn.Module, x: Tensor, objective: Objective) -> LossAndGradient:
    objective.prepare(2 * len(x), 3)
    objective.at(0)
    return LossAndGradient(StepLoss(vae.train(), objective))


def outcome(step: LossAndGradient, x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    with pyro.validation_enabled(False):
        loss, terms, gradient = step(x)
    return [loss, terms, *(part for part in gradient if part is not None)]


def check_step(vae: VAE, x: Tensor, objective: Objective | None = None, waits: int = 0) -> None:
    """The step on the device is that of the CPU, and the host does not wait for it."""
    objective = ELBO() if objective is None else objective
    here = outcome(step_of(copy.deepcopy(vae), x, copy.deepcopy(objective)), x)
    x_there = x.to("sim")
    there = step_of(vae.to("sim"), x_there, objective.to("sim"))
    reads.clear()
    found = outcome(there, x_there)
    assert sum(reads.values()) == waits
    for mine, other in zip(here, found, strict=True):
        same(mine, other)


PARTS = [
    *(("prior", cls) for cls in PRIORS),
    *(("likelihood", cls) for cls in LIKELIHOODS),
    *(("posterior", cls) for cls in POSTERIORS),
]


@pytest.mark.parametrize(("family", "cls"), PARTS)
def test_each_part(family: str, cls: type) -> None:
    vae = make(**{family: cls}, data_shape=(3,), hidden=(2,))
    # torch's StudentT makes a number on the device for its Chi2; Columns sends it an index
    check_step(vae, draw(vae, 5), waits=int(cls.__name__ in ("StudentT", "Columns")))


@pytest.mark.parametrize("cls", [cls for cls in OBJECTIVES if not cls.own_step])
@pytest.mark.parametrize("posterior", [posteriors.DiagonalNormal, posteriors.FullNormal])
def test_each_objective(cls: type, posterior: type) -> None:
    vae = make(posterior=posterior)
    check_step(vae, draw(vae, 7), cls())


def test_groups_of_a_full_normal() -> None:
    vae = make(posterior=posteriors.FullNormal, latent_dim=3)
    check_step(vae, draw(vae, 7), HierarchicallyFactorized([[2, 0]]))


@pytest.mark.parametrize("cls", NETWORKS)
def test_each_network(cls: type) -> None:
    body = network(cls, **accepted(cls, norm="batch"))
    if body.in_shape != (11,):
        pytest.skip("an encoder: its decoders are the other cases")
    vae = VAE(
        priors.StandardNormal(11),
        likelihoods.Bernoulli(body, body.out_shape),
        posteriors.DiagonalNormal(networks.MLP(body.out_shape, 22), 11),
    )
    check_step(vae, torch.bernoulli(torch.full((5, *body.out_shape), 0.3)))


# --- fit ----------------------------------------------------------------------------------------


class Counted:
    """Rows that note how often the host has waited when a batch is asked for."""

    def __init__(self, of: Any, seen: list[int] | None = None) -> None:
        self.of, self.seen = of, [] if seen is None else seen

    def __len__(self) -> int:
        return len(self.of)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        self.seen.append(sum(reads.values()))
        return self.of.batch(index)

    def fixed(self, seed: int) -> Any:
        return self.of.fixed(seed)

    def to(self, device: torch.device) -> Counted:
        return Counted(self.of.to(device), self.seen)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "_device", lambda *_: DEVICE)
    monkeypatch.setattr(trainer, "BAR_INTERVAL", float("inf"))


OBJECTIVES_OF_FIT: dict[str, Callable[[], Objective]] = {
    "ELBO": ELBO,
    "IWAE": lambda: IWAE(3),
    "BetaTC": lambda: BetaTC(beta=Linear(length=3)),
    "FactorVAE": FactorVAE,
}


@pytest.mark.parametrize("name", OBJECTIVES_OF_FIT)
def test_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, objective = make(), OBJECTIVES_OF_FIT[name]
    x, twin = draw(vae, 103), copy.deepcopy(vae)
    options: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 20,
        "validation": x[:31],
        "clip_norm": 1.0,
        "schedule": {"class_path": "ExponentialLR", "init_args": {"gamma": 0.5}},
        "progress": False,
    }
    here = fit(twin, x, objective(), accelerator="cpu", **options)
    monkeypatch.setattr(Engine, "_device", lambda *_: DEVICE)
    monkeypatch.setattr(trainer, "BAR_INTERVAL", float("inf"))
    rows = Counted(TensorDataset(x))
    there = fit(vae, rows, objective(), **options)
    for part, weight in twin.state_dict().items():
        torch.testing.assert_close(vae.state_dict()[part], weight, rtol=1e-4, atol=1e-5)
    for mine, other in zip(here.rows, there.rows, strict=True):
        assert other == pytest.approx({**mine, "seconds": other["seconds"]}, rel=1e-4, nan_ok=True)
    steps = rows.seen[-6:]  # of the last epoch: there is one look at its first step
    assert steps[1:-1] == steps[2:]


@pytest.mark.filterwarnings("ignore:posterior collapse")
@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("transform", ["threshold", "static", "dynamic", "dequantise", "rescale"])
@pytest.mark.parametrize("conditional", [False, True])
def test_noise_of_the_data(transform: str, conditional: bool, tmp_path: Path) -> None:
    data = load_data("digits", transform=transform, conditional=conditional, limit=53)
    likelihood = "Bernoulli" if data.train.transform.binary else "Normal"
    condition = 10 if conditional else 0
    vae = pyro_vae.build((1, 8, 8), 2, likelihood=likelihood, condition_dim=condition)
    options = {"batch_size": 17, "run": tmp_path, "progress": False}
    fit(vae, data.train, epochs=1, validation=data.validation, **options)
    fit(vae, data.train, epochs=2, validation=data.validation, resume=True, **options)


# --- log p(x) and metrics -----------------------------------------------------------------------

ESTIMATES: dict[str, Callable[[VAE, Tensor], Tensor]] = {
    "ELBO": lambda v, x: evidence_lower_bound(v.model, v.guide, x, seed=0).elbo,
    "encoder": lambda v, x: pyro_vae.importance_sampling(v.model, v.guide, x).log_prob,
    "prior": lambda v, x: (
        pyro_vae.importance_sampling(
            v.model, v.guide, x, num_samples=53, proposal="prior"
        ).log_prob
    ),
    "one to call": lambda v, x: pyro_vae.log_evidence(v.model, v.guide, x).log_prob,
    "annealed": lambda v, x: (
        pyro_vae.annealed_importance_sampling(
            v.model, v.guide, x, num_temperatures=13, num_chains=3
        ).log_prob
    ),
    "refined": lambda v, x: (
        pyro_vae.refined_importance_sampling(v.model, v.guide, x, num_samples=53).log_prob
    ),
    "both sides": lambda v, x: (
        pyro_vae.bidirectional(v.model, v.guide, x, num_temperatures=11, num_chains=3).lower
    ),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_log_evidence(name: str) -> None:
    vae = make(priors.MixtureOfGaussians)
    x = draw(vae, 5)
    here = ESTIMATES[name](vae, x)
    there = ESTIMATES[name](vae.to("sim"), x.to("sim"))
    assert there.device.type == "cpu"  # results are read
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)


def test_what_a_vae_gives() -> None:
    vae = make()
    x = draw(vae, 7)
    there = copy.deepcopy(vae).to("sim")
    same(vae.encode(x).mean, there.encode(x.to("sim")).mean)
    same(vae.reconstruct(x), there.reconstruct(x.to("sim")))
    torch.manual_seed(1)
    here = vae.sample(5)
    torch.manual_seed(1)
    same(here, there.sample(5))


METRICS: dict[str, Callable[[Any, Any, Tensor, Tensor], Any]] = {
    "decomposition": lambda q, p, c, f: metrics.elbo_decomposition(q, p).total_correlation.value,
    "mig": lambda q, p, c, f: metrics.mig(q, f).value,
    "mig of means": lambda q, p, c, f: metrics.mig_of_means(c, f).value,
    "sap": lambda q, p, c, f: metrics.sap(c, f).value,
    "modularity": lambda q, p, c, f: metrics.modularity(c, f).value,
    "dci": lambda q, p, c, f: metrics.dci(c, f).disentanglement,
    "active units": lambda q, p, c, f: int(metrics.active_units(c).sum()),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics(name: str) -> None:
    loc, scale, codes = torch.randn(53, 3), torch.rand(53, 3) + 0.1, torch.randn(53, 3)
    factors = torch.randint(0, 3, (53, 2))

    def value(move: Callable[[Tensor], Tensor]) -> Any:
        q = Independent(Normal(move(loc), move(scale)), 1)
        p = Independent(Normal(move(torch.zeros(3)), move(torch.ones(3))), 1)
        return METRICS[name](q, p, move(codes), move(factors))

    assert value(lambda part: part.to("sim")) == pytest.approx(value(lambda part: part), rel=1e-4)


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.usefixtures("on_device")
def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (compare, evaluate, score):
        monkeypatch.setattr(
            module, "to_device", lambda vae, data, _: (vae.to("sim"), data.to("sim"))
        )
    runs = [str(tmp_path / name) for name in ("first", "second")]
    for run, prior in zip(runs, ("StandardNormal", "VampPrior")):
        options = ["--latent_dim", "2", "--epochs", "2", "--limit", "103", "--progress", "false"]
        assert main(["train", "--run", run, "--prior", prior, *options]) == 0
    few = ["--limit", "5", "--num_samples", "50", "--progress", "false"]
    assert main(["evaluate", runs[0], *few]) == 0
    assert main(["compare", *runs, *few[:2], *few[4:]]) == 0
    rows = tmp_path / "rows.npy"
    np.save(rows, np.random.default_rng(0).integers(0, 17, (5, 1, 8, 8)).astype("uint8"))
    assert main(["score", runs[0], str(rows), *few[4:]]) == 0
    for command in (["encode", runs[0], str(rows)], ["sample", runs[0]], ["plot", runs[0]]):
        assert main(command) == 0
