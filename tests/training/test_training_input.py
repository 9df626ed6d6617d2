"""What `fit` refuses, and how it stops."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from families import make
from torch import Tensor, nn
from training_cases import QUIET, make_data, make_vae, same, weights

from pyro_vae import likelihoods
from pyro_vae.objectives import ELBO
from pyro_vae.training import State, fit, load_weights
from pyro_vae.training.dataset import as_dataset
from pyro_vae.training.optimizers import OPTIMIZERS, advance, make_optimizer, make_schedule
from pyro_vae.training.step import Monitor, StepLoss


class Empty(nn.Module):
    """Programs without a parameter."""

    model = guide = print


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs must be"),
        ({"batch_size": 1.5}, "batch_size must be"),
        ({"seed": -1}, "seed must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"clip_norm": float("nan")}, "clip_norm must be"),
        ({"patience": 3}, "patience needs validation"),
        ({"precision": "8-true"}, "precision must be one of 32-true"),
        ({"objective": pyro.infer.Trace_ELBO()}, "objective must be"),
        ({"objective": "Schedule"}, "objective 'Schedule' is unknown: choose one of BetaTC"),
        ({"data": [1, 2, 3]}, r"data must be of shape \[N, \*E\] .*; got \[3\]"),
        ({"data": {1, 2}}, "data must be rows .* such as splits.train; got set"),
        ({"data": torch.zeros(0, 7)}, "at least one row"),
        ({"data": (make_data(), torch.full((53,), torch.nan))}, "finite.* give -1 for a label"),
        ({"data": (make_data(), torch.zeros(3, 2))}, r"y of data must be of shape \[53, C\]"),
        ({"validation": torch.full((5, 7), torch.nan)}, r"validation must be finite.*\[0, 1, 2\]"),
        ({"vae": nn.Linear(2, 2)}, "methods model and guide"),
        ({"vae": Empty()}, "nothing to train"),
        ({"callbacks": print}, "callbacks must be a list; got builtin"),
        ({"loggers": 3}, "loggers must be a list; got int"),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(**{"vae": make_vae(), "data": make_data(), **QUIET, **options})


def test_inference_mode_is_refused() -> None:
    vae = make_vae()
    with torch.inference_mode():
        made = make_vae()
        with pytest.raises(ValueError, match="outside of torch.inference_mode"):
            fit(vae, make_data(), **QUIET)
    with pytest.raises(ValueError, match="outside of torch.inference_mode"):
        fit(made, make_data(), **QUIET)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_on_offer_takes_weights_and_biases(name: str) -> None:
    vae = make_vae()
    before = weights(vae)
    fit(vae, make_data(), epochs=1, optimizer=name, **QUIET)
    assert not same(before, weights(vae))


def test_validation_data_that_do_not_suit_fail_before_training() -> None:
    vae = make_vae()
    before = weights(vae)
    with pytest.raises(ValueError, match="validation: likelihood Bernoulli needs data"):
        fit(vae, make_data(), validation=torch.full((5, 7), 3.0), **QUIET)
    assert {k for k, v in weights(vae).items() if not torch.equal(v, before[k])} <= {
        "initialised",
        "likelihood.decoder.output.bias",
    }


class Failing(nn.Module):
    """A Gaussian VAE whose densities or gradients fail from some step on."""

    def __init__(self, part: str, after: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))
        self.part, self.after, self.calls = part, after, 0

    def model(self, x: Tensor) -> None:
        bad = self.calls > self.after
        nan = torch.tensor(torch.nan if bad else 0.0)
        loc = nan if self.part == "latent" else torch.zeros(())
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("code", pyro.distributions.Normal(loc, torch.ones(2)).to_event(1))
            if self.part == "observed":
                z = z + nan
            if self.part == "gradient" and bad:
                z = z + (0 * self.loc).sqrt()
            pyro.sample("pixels", pyro.distributions.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        self.calls += self.training
        with pyro.plate("data", len(x), dim=-1):
            loc = x / 2 + self.loc
            pyro.sample("code", pyro.distributions.Normal(loc, 0.7).to_event(1))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("observed", "step 6: the log density of site 'pixels' is not finite"),
        ("latent", "step 6: the log density of site 'code' is not finite"),
        ("gradient", "step 6: the gradient of loc is not finite"),
    ],
)
def test_a_failing_step_is_named_and_leaves_good_weights(
    tmp_path: Path, part: str, words: str
) -> None:
    x = torch.randn(31, 2)
    good, vae = Failing(part, 10**6), Failing(part, 6)
    fit(good, x, epochs=1, batch_size=5, **QUIET)  # seven steps
    with pytest.raises(FloatingPointError, match=words):
        fit(vae, x, epochs=2, batch_size=5, run=tmp_path, checkpoint_every=2, **QUIET)
    assert vae.loc.isfinite().all()
    assert load_weights(tmp_path)["loc"].isfinite().all()


def test_a_failing_step_of_a_run_that_goes_on_is_named(tmp_path: Path) -> None:
    x = torch.randn(31, 2)
    fit(Failing("observed", 10**6), x, epochs=1, batch_size=5, run=tmp_path, **QUIET)
    options = {"epochs": 2, "batch_size": 5, "run": tmp_path, "resume": True, **QUIET}
    with pytest.raises(FloatingPointError, match="step 9: the log density of site 'pixels'"):
        fit(Failing("observed", 2), x, **options)


def test_a_failing_first_step_is_named() -> None:
    with pytest.raises(ValueError, match="step 0: "):
        fit(Failing("latent", 0), torch.randn(31, 2), epochs=1, **QUIET)


@pytest.mark.parametrize("first", [0, 1])
def test_a_device_that_is_not_waited_for(first: int) -> None:
    vae = make_vae()
    module = StepLoss(vae, ELBO())
    module.observed, module.latent = ["x"], ["z"]
    monitor = Monitor(module, torch.device("cpu"))
    monitor.every_step = False
    bad = torch.tensor(torch.nan)
    for step, (loss, kl) in enumerate([*[(1.0, 2.0)] * first, (bad, bad), (bad, 3.0)]):
        if step <= first:
            monitor.raise_if_bad(step)
        terms = torch.stack([bad, *map(torch.as_tensor, (1.0, kl))])
        monitor.add(step, torch.as_tensor(loss), terms)
    with pytest.raises(FloatingPointError, match=f"step {first}: the log density of site 'z'"):
        monitor.raise_if_bad(2)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("adam", "optimizer 'adam' is unknown, did you mean 'Adam'"),
        (
            {"class_path": "Adam", "init_args": {"beta": 1}},
            "no option 'beta', did you mean 'betas'",
        ),
        ({"class_path": "Adam", "args": {}}, "optimizer must be a name"),
        ({"class_path": "Adam", "init_args": {"betas": 3}}, "optimizer Adam: 'int' object is"),
        ({"class_path": "Rprop", "init_args": {"etas": [1]}}, "Rprop: list index out of range"),
        ({"class_path": "Adam", "init_args": {"differentiable": True}}, "Adam: a leaf Variable"),
        ({"class_path": "Adam", "init_args": {"lr": None}}, "optimizer Adam: .* correct its init"),
        (lambda parameters: "Adam", "must return a torch Optimizer; got str"),
    ],
)
def test_bad_optimizers(spec: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_optimizer(spec, nn.Linear(2, 3), 1e-3)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("StepL", "schedule 'StepL' is unknown, did you mean 'StepLR'"),
        ("CosineAnnealingLR", "missing a required argument: 'T_max'"),
        ({"class_path": "StepLR", "init_args": {"step_size": 0}}, "StepLR: integer modulo by"),
        ({"class_path": "StepLR", "init_args": {"step_size": "x"}}, "StepLR: unsupported operand"),
        ({"class_path": "LambdaLR", "init_args": {"lr_lambda": 3}}, "LambdaLR: 'int' object is"),
        ({"class_path": "ReduceLROnPlateau", "init_args": {"factor": 2}}, "Plateau: Factor"),
        (lambda optimizer: None, "must return a torch LRScheduler"),
    ],
)
def test_bad_schedules(spec: Any, words: str) -> None:
    optimizer = make_optimizer("Adam", nn.Linear(2, 3), 1e-3)
    with pytest.raises(ValueError, match=words):
        make_schedule(spec, optimizer, 1)


def test_optimizers_are_fused_where_they_can_be() -> None:
    module = nn.Linear(2, 3)
    assert make_optimizer("Adam", module, 1e-3).defaults["fused"]
    assert not make_optimizer("Adam", module, 1e-3, fused=False).defaults["fused"]
    assert "fused" not in make_optimizer("RMSprop", module, 1e-3).defaults
    foreach = {"class_path": "torch.optim.Adam", "init_args": {"foreach": True, "lr": 0.5}}
    optimizer = make_optimizer(foreach, module, 1e-3)
    assert not optimizer.defaults["fused"]
    assert optimizer.defaults["lr"] == 0.5


def test_an_optimizer_can_be_a_callable() -> None:
    first, second = make_vae(), make_vae()
    options = {"epochs": 2, "batch_size": 11, **QUIET}
    fit(first, make_data(), optimizer="SGD", lr=0.1, **options)
    fit(
        second,
        make_data(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
        **options,
    )
    assert same(weights(first), weights(second))


@pytest.mark.parametrize("validated", [True, False])
def test_y_that_nothing_looks_at_is_refused(validated: bool) -> None:
    pair = make_data(), torch.randn(53, 2)
    with pytest.raises(ValueError, match=r"y of shape \[\d+, 2\] was given.* condition_dim"):
        fit(make_vae(), pair, epochs=1, validation=pair if validated else None, **QUIET)


def test_rows_and_pairs_of_other_kinds() -> None:
    x, y = make_data(), torch.randn(53, 2)
    for pair in ((x, y), [x, y], (x.numpy(), y.numpy()), (x.tolist(), y.tolist())):
        rows = as_dataset(pair, "data")
        assert torch.equal(rows.x, x)
        assert torch.equal(rows.y, y)
    for alone in (x, x.numpy(), x.tolist(), list(x), x[:2].tolist(), (x, None), x.numpy()[::-1]):
        rows = as_dataset(alone, "data")
        assert rows.y is None
        assert rows.x.shape[1:] == (7,)
    frame = pytest.importorskip("pandas").DataFrame
    assert torch.equal(as_dataset(frame(x.numpy()), "data").x, x)
    assert torch.equal(as_dataset((frame(x.numpy()), frame(y.numpy())), "data").y, y)


@pytest.mark.parametrize("validated", [True, False])
def test_a_training_that_ended_far_below_its_start_is_said(validated: bool) -> None:
    x = 3 * torch.randn(53, 7)
    vae = make(likelihood=likelihoods.Normal)
    options = {"validation": x if validated else None, "epochs": 3, "batch_size": 11, **QUIET}
    with pytest.warns(UserWarning, match="far below the -.* of its first step: lower lr"):
        fit(vae, x, lr=1e3, optimizer="SGD", clip_norm=1.0, **options)


def test_a_run_that_vanishes_while_it_is_trained_is_said(tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"

    def move(state: State) -> None:
        if state.epoch == 2:
            run.rename(moved)

    with pytest.raises(ValueError, match="run was removed or renamed while it was trained"):
        fit(make_vae(), make_data(), run=run, epochs=5, callbacks=[move], **QUIET)
    assert not run.exists()
    fit(make_vae(), make_data(), run=moved, epochs=5, resume=True, **QUIET)


def test_no_callback_writes_to_a_run_that_vanished_during_an_epoch(tmp_path: Path) -> None:
    run, vae = tmp_path / "run", make_vae()

    def move(*_: Any) -> None:
        if (run / "run.json").exists():
            run.rename(tmp_path / "moved")

    vae.posterior.register_forward_hook(move)
    with pytest.raises(ValueError, match="run was removed or renamed while it was trained"):
        fit(vae, make_data(), run=run, epochs=1, callbacks=[lambda _: run.mkdir()], **QUIET)
    assert not run.exists()


def test_data_far_from_a_unit_scale_are_said() -> None:
    x = torch.randn(53, 7) * torch.tensor([1, 1, 1, 1, 1, 1, 300.0])
    for likelihood in (likelihoods.Normal, likelihoods.Laplace, likelihoods.StudentT):
        with pytest.warns(UserWarning, match=r"deviate by up to \d+ .* standardise the data"):
            make(likelihood=likelihood).initialise(x)
        make(likelihood=likelihood).initialise(x / x.std(0))


def test_a_schedule_that_ends_before_the_training_is_refused_before_it() -> None:
    short = {"class_path": "OneCycleLR", "init_args": {"max_lr": 0.01, "total_steps": 5}}
    with pytest.raises(ValueError, match="OneCycleLR: Tried to step 6 times"):
        fit(make_vae(), make_data(), schedule=short, epochs=7, **QUIET)
    fit(make_vae(), make_data(), schedule=short, epochs=3, batch_size=53, **QUIET)


def test_half_precision_leaves_out_steps_whose_scaled_gradient_is_infinite(tmp_path: Path) -> None:
    """Each halves the scale; from the first finite one on, a step of Adam is one of lr."""
    x = 20_000.0 * make_data()
    vae = make(likelihood=likelihoods.Poisson)
    start, whole, begun, resumed = (copy.deepcopy(vae) for _ in range(4))
    start.initialise(x)
    options = {"precision": "16-mixed", "batch_size": 53, "lr": 0.001, **QUIET}
    fit(whole, x, epochs=16, run=tmp_path / "whole", **options)
    fit(begun, x, epochs=12, run=tmp_path / "broken", **options)
    assert same(weights(begun), weights(start))
    change = [abs(p - q).max() for p, q in zip(whole.parameters(), start.parameters())]
    torch.testing.assert_close(torch.stack(change).max(), torch.tensor(0.003), rtol=0.01, atol=0)
    fit(resumed, x, epochs=16, run=tmp_path / "broken", resume=True, **options)
    assert same(weights(whole), weights(resumed))


def test_half_precision_ends_where_no_scale_makes_the_gradient_finite() -> None:
    options = {"epochs": 9, "batch_size": 5, "precision": "16-mixed", **QUIET}
    with pytest.raises(FloatingPointError, match="gradients are not finite, .* at any scale"):
        fit(Failing("gradient", 6), torch.randn(31, 2), **options)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_plateau_is_one_of_the_elbo_in_either_mode(mode: str) -> None:
    optimizer = make_optimizer("SGD", nn.Linear(2, 3), 0.5)
    spec = {"class_path": "ReduceLROnPlateau", "init_args": {"mode": mode, "patience": 0}}
    schedule, rates = make_schedule(spec, optimizer, 1), []
    for elbo in (-7.0, -5.0, -3.0, -4.0):
        advance(schedule, {"elbo": elbo, "validation_elbo": None})
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.05])
