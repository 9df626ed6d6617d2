"""What only a GPU can show: its noise and its compiler. Skipped where there is none."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import LinearGaussian
from families import OBJECTIVES, draw, make
from torch import Tensor
from training_cases import make_data, make_vae, same, weights

from pyro_vae import cli, importance_sampling, log_evidence, priors
from pyro_vae.objectives import ELBO, IWAE, BetaTC, Linear, Objective
from pyro_vae.training import fit, trainer

DEVICE = os.environ.get("PYRO_VAE_TEST_DEVICE", "cuda")  # "cpu": to try the tests themselves
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU that torch sees"
    ),
]
OPTIONS: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 11,
    "accelerator": DEVICE,
    "progress": False,
}


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ELBO": (ELBO, {}),
    "beta": (lambda: ELBO(beta=Linear(length=13)), {}),
    "IWAE": (lambda: IWAE(3), {"clip_norm": 0.7}),
    "BetaTC": (BetaTC, {"optimizer": "AdamW"}),
    "schedule": (
        ELBO,
        {"schedule": {"class_path": "ExponentialLR", "init_args": {"gamma": 0.5}}},
    ),
    "SGD": (ELBO, {"optimizer": {"class_path": "SGD", "init_args": {"momentum": 0.9}}}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prior", [priors.StandardNormal, priors.VampPrior])
def test_compiled_steps_give_the_weights_of_the_eager_step(case: str, prior: type) -> None:
    objective, options = CASES[case]
    vae = make(prior, norm="batch")
    x, twin = draw(vae, 53), copy.deepcopy(vae)
    options = {**OPTIONS, "precision": "64-true", **options}
    eager = fit(twin, x, objective(), **options)
    compiled = fit(vae, x, objective(), compile=True, **options)
    for name, weight in twin.state_dict().items():
        torch.testing.assert_close(vae.state_dict()[name], weight, rtol=1e-7, atol=1e-9)
    for mine, other in zip(eager.rows, compiled.rows, strict=True):
        for part in ("elbo", "kl", "objective", "lr"):
            assert other[part] == pytest.approx(mine[part], rel=1e-7)


@pytest.mark.parametrize("cls", [cls for cls in OBJECTIVES if not cls.own_step])
def test_every_objective_compiles(cls: type[Objective]) -> None:
    vae = make()
    x, twin = draw(vae, 23), copy.deepcopy(vae)
    fit(twin, x, cls(), **{**OPTIONS, "precision": "64-true"})
    fit(vae, x, cls(), compile=True, **{**OPTIONS, "precision": "64-true"})
    for name, weight in twin.state_dict().items():
        torch.testing.assert_close(vae.state_dict()[name], weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("compile", [False, True])
def test_a_broken_run_goes_on_as_if_unbroken(tmp_path: Path, compile: bool) -> None:
    x, whole, broken = make_data(), make_vae(), make_vae()
    fit(whole, x, compile=compile, **OPTIONS)
    fit(broken, x, run=tmp_path, compile=compile, **{**OPTIONS, "epochs": 1})
    fit(broken, x, run=tmp_path, compile=compile, resume=True, **OPTIONS)
    assert same(weights(whole), weights(broken))


def test_a_run_goes_on_on_the_cpu(tmp_path: Path) -> None:
    x, vae = make_data(), make_vae()
    fit(vae, x, run=tmp_path, compile=True, **{**OPTIONS, "epochs": 1})
    history = fit(vae, x, run=tmp_path, resume=True, **{**OPTIONS, "accelerator": "cpu"})
    assert [row["step"] for row in history.rows] == [5, 10, 15]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("cls", OBJECTIVES)
def test_no_step_waits_for_the_device(
    cls: type[Objective], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, watched = trainer.Trainer._step, []

    def checked(self: trainer.Trainer, index: Tensor) -> None:
        if self.step >= 3:  # two are validated
            watched.append(self.step)
            waiting("error")
        try:
            step(self, index)
        finally:
            waiting("default")

    monkeypatch.setattr(trainer.Trainer, "_step", checked)
    fit(make_vae(), make_data(101), cls(), **{**OPTIONS, "epochs": 1})
    assert watched == [3, 4, 5, 6, 7, 8, 9]


def waiting(mode: str) -> None:
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("compile", [False, True])
def test_log_evidence_is_the_exact_one(compile: bool) -> None:
    world = LinearGaussian.draw()
    x = world.vae.sample(101).detach()
    exact = world.log_evidence(x)
    vae, there = world.vae.to(DEVICE), x.to(DEVICE)
    for found in (
        importance_sampling(vae.model, vae.guide, there, num_samples=5000, compile=compile),
        log_evidence(vae.model, vae.guide, there, compile=compile),
    ):
        z = (found.log_prob - exact) / found.stderr
        assert found.log_prob.device.type == "cpu"
        assert abs(z.mean()) * len(z) ** 0.5 < 4
        assert z.std() < 2


def test_generators_are_left_alone() -> None:
    vae, x = make_vae(), make_data()
    before = states()
    fit(vae, x, compile=True, **OPTIONS)
    there = copy.deepcopy(vae).to(DEVICE)
    log_evidence(there.model, there.guide, x[:5].to(DEVICE))
    for state, other in zip(before, states()):
        assert torch.equal(state, other)


def states() -> list[Tensor]:
    found = [torch.get_rng_state()]
    return [*found, torch.cuda.get_rng_state()] if DEVICE == "cuda" else found


def test_commands(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    options = ["--epochs", "3", "--latent_dim", "2", "--compile", "true", "--progress", "false"]
    assert cli.run(["train", "--run", run, "--accelerator", DEVICE, *options]) == 0
    few = ["--limit", "11", "--accelerator", DEVICE, "--progress", "false"]
    assert cli.run(["evaluate", run, *few, "--compile", "true"]) == 0
