"""What is not finite is found on a device that is not read at every step, as a GPU is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import QUIET, make_data, make_vae

from pyro_vae.objectives import ELBO
from pyro_vae.training import fit, load_weights, step, trainer
from pyro_vae.training.dataset import TensorDataset
from pyro_vae.training.optimizers import make_optimizer, restore
from pyro_vae.vae import VAE

OPTIONS = {"batch_size": 11, **QUIET}


@pytest.fixture
def distant(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` looks at the CPU as it looks at a GPU."""

    class Distant(step.Monitor):
        def __init__(self, loss: step.StepLoss, device: torch.device) -> None:
            super().__init__(loss, device)
            self.every_step = False

    monkeypatch.setattr(trainer, "Monitor", Distant)


class Spoilt:
    """Rows that are not numbers in one of the training's batches."""

    def __init__(self, x: Tensor, bad: int) -> None:
        self.x, self.bad, self.batches = x, bad, 0

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, index: Tensor) -> tuple[Tensor, None]:
        self.batches += 1
        return self.x[index] * (torch.nan if self.batches - 1 == self.bad else 1), None

    def fixed(self, seed: int) -> Spoilt:
        return Spoilt(self.x, -1)

    def to(self, device: torch.device) -> Spoilt:
        return self


@pytest.mark.usefixtures("distant")
def test_the_first_bad_step_is_named() -> None:
    with pytest.raises(FloatingPointError, match="step 6: the log density of site 'x'"):
        fit(make_vae(), Spoilt(make_data(), 6), epochs=2, **OPTIONS)


@pytest.mark.usefixtures("distant")
def test_a_bad_step_of_a_run_that_goes_on_is_named(tmp_path: Path) -> None:
    fit(make_vae(), make_data(), epochs=1, run=tmp_path, **OPTIONS)
    x = Spoilt(make_data(), 2)
    x.digest = TensorDataset(make_data()).digest  # type: ignore[attr-defined]
    x.describe = TensorDataset(make_data()).describe  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError, match="step 7: the log density of site 'x'"):
        fit(make_vae(), x, epochs=3, run=tmp_path, resume=True, **OPTIONS)


class Steep(VAE):
    """A VAE whose gradient is infinite from some step on, and its loss is not."""

    steps = 0

    def guide(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        self.steps += self.training
        weight = next(self.posterior.parameters())
        bad = (0 * weight).abs().sum().sqrt() if self.steps > 6 else 0.0
        return super().guide(x + bad, y)


@pytest.mark.usefixtures("distant")
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    made = make_vae()
    vae = Steep(made.prior, made.likelihood, made.posterior)
    with pytest.raises(FloatingPointError, match="step 7: weights are not finite"):
        fit(vae, make_data(), epochs=3, run=tmp_path, checkpoint_every=1, **OPTIONS)
    assert all(weight.isfinite().all() for weight in load_weights(tmp_path).values())


@pytest.mark.parametrize(("count", "words"), [(3, "0, 1, 2 is"), (4, "0, 1, 2 and 1 more is")])
def test_three_bad_gradients_are_named_and_the_others_counted(count: int, words: str) -> None:
    weights = nn.ParameterList([torch.zeros(()) for _ in range(count)])
    for weight in weights:
        weight.grad = torch.tensor(torch.nan)
    monitor = step.Monitor(step.StepLoss(weights, ELBO()), torch.device("cpu"))
    with pytest.raises(FloatingPointError, match=f"^step 7: the gradient of {words} not finite"):
        monitor.add(7, torch.ones(()), torch.ones(3), weights)


class Whitened(torch.optim.SGD):
    """Keeps a matrix for each parameter, of a shape of its own."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["basis"] = self.state[p].get("basis", torch.eye(7)) + 1
        super().step(closure)


def test_a_state_of_other_optimizers_is_loaded_whatever_it_holds() -> None:
    layer = nn.Linear(3, 2)
    there, here = (Whitened(layer.parameters(), lr=0.1) for _ in range(2))
    there.step()
    restore(here, there.state_dict())
    assert all(torch.equal(here.state[p]["basis"], torch.eye(7) + 1) for p in layer.parameters())


def test_a_state_is_loaded_and_the_implementation_of_the_step_is_kept() -> None:
    layer = nn.Linear(3, 2)
    there = torch.optim.Adam(layer.parameters(), lr=0.5, capturable=True)
    layer(torch.ones(1, 3)).sum().backward()
    for p in layer.parameters():
        there.state[p] = {"step": torch.zeros(()), "exp_avg": p.grad, "exp_avg_sq": p.grad**2}
    here = make_optimizer("Adam", layer, 0.1)
    restore(here, there.state_dict())
    (group,) = here.param_groups
    assert (group["capturable"], group["fused"], group["lr"]) == (False, True, 0.5)
    for p in layer.parameters():
        assert torch.equal(here.state[p]["exp_avg"], there.state[p]["exp_avg"])
