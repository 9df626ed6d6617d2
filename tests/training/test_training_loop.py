"""The loop: what a step does, epochs, evaluation, and what is left behind."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.distributions import is_validation_enabled
from pyro.infer import SVI
from torch import Tensor
from training_cases import (
    QUIET,
    Noisy,
    Stop,
    make_data,
    make_vae,
    noisy_data,
    same,
    weights,
)

from pyro_vae.estimators import evidence_lower_bound
from pyro_vae.objectives import ELBO, IWAE
from pyro_vae.runtime import epoch_order
from pyro_vae.training import History, State, fit, step
from pyro_vae.training.progress import COLUMNS
from pyro_vae.training.run_folder import load_state


def by_hand(
    vae: Any, x: Tensor, epochs: int, batch: int, clip: float | None = None
) -> list[float]:
    """The training of `fit`, written out; mean ELBO of each epoch."""
    objective, means = ELBO(), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae.initialise(x)
        optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
        for epoch in range(epochs):
            total = 0.0
            for index in epoch_order(len(x), 0, epoch).split(batch):
                loss = objective.differentiable_loss(vae.model, vae.guide, x[index])
                optimizer.zero_grad()
                (loss / len(index)).backward()
                if clip is not None:
                    gradient = torch.cat([p.grad.flatten() for p in vae.parameters()])
                    for p in vae.parameters():
                        p.grad *= min(1.0, clip / (gradient.norm().item() + 1e-6))
                optimizer.step()
                total -= loss.item()
            means.append(total / len(x))
    return means


@pytest.mark.parametrize("clip", [None, 0.05])
def test_training_is_the_hand_written_loop(clip: float | None) -> None:
    x, ours, theirs = make_data(), make_vae(), make_vae()
    history = fit(ours, x, epochs=3, batch_size=11, clip_norm=clip, **QUIET)
    means = by_hand(theirs, x, 3, 11, clip)
    for name, tensor in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], tensor, rtol=0, atol=1e-6, msg=name)
    # weighted by datum: the last batch has 9 rows, not 11
    assert history["objective"] == pytest.approx(means, abs=1e-5)
    assert history["elbo"] == pytest.approx(means, abs=1e-5)


def test_training_is_that_of_svi() -> None:
    x, ours, theirs = make_data(), make_vae(), make_vae()
    fit(ours, x, epochs=2, batch_size=53, optimizer={"class_path": "Adam"}, **QUIET)
    pyro.clear_param_store()
    svi = SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": 1e-3}), ELBO())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs.initialise(x)
        for epoch in range(2):
            svi.step(x[epoch_order(53, 0, epoch)])
    pyro.clear_param_store()
    for name, tensor in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_an_epoch_visits_each_row_once() -> None:
    order = epoch_order(53, 0, 1)
    assert sorted(order.tolist()) == list(range(53))
    assert torch.equal(order, epoch_order(53, 0, 1))
    assert not torch.equal(order, epoch_order(53, 0, 2))
    assert not torch.equal(order, epoch_order(53, 1, 1))


def test_validation_and_callbacks_leave_training_alone() -> None:
    x, plain, watched = make_data(), make_vae(), make_vae()
    fit(plain, x, epochs=3, batch_size=11, **QUIET)
    seen: list[dict[str, Tensor]] = []

    def look(state: State) -> None:
        torch.rand(3)
        state.vae.eval()
        seen.append(weights(state.vae))

    fit(watched, x, epochs=3, batch_size=11, validation=x[:13], callbacks=[look], **QUIET)
    assert same(seen[-1], weights(plain))


def test_validation_is_the_bound_in_eval_mode() -> None:
    x, vae = make_data(), make_vae()
    history = fit(vae, x, validation=x[:13], epochs=1, batch_size=11, **QUIET)
    bound = evidence_lower_bound(vae.model, vae.guide, x[:13])
    row = history.rows[0]
    assert row["validation_elbo"] == pytest.approx(bound.elbo.mean().item(), abs=1e-6)
    assert row["validation_kl"] == pytest.approx(bound.kl.mean().item(), abs=1e-6)
    difference = row["validation_reconstruction"] - row["validation_kl"]
    assert row["validation_elbo"] == pytest.approx(difference, abs=1e-6)


class Scripted(torch.nn.Module):
    """A Gaussian latent; its validation is overruled by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(2))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            loc = x / 2 + self.loc
            pyro.sample("z", pyro.distributions.Normal(loc, 0.7).to_event(1))


def test_early_stopping_keeps_the_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter([-9.0, -5.0, -4.0, -2.0, -3.0, float("nan"), -2.0, 0.0])  # the first is a check
    names = ("validation_reconstruction", "validation_kl")
    monkeypatch.setattr(
        "pyro_vae.training.trainer.validation_bound",
        lambda *_: {"validation_elbo": next(script)} | dict.fromkeys(names),
    )
    seen: list[Tensor] = []
    vae, x = Scripted(), torch.randn(31, 2)
    history = fit(
        vae,
        x,
        validation=x,
        epochs=11,
        batch_size=7,
        patience=3,
        callbacks=[lambda state: seen.append(state.vae.loc.detach().clone())],
        **QUIET,
    )
    assert len(history) == 6
    assert history.best_epoch == 3
    assert history.final["epoch"] == 3
    assert torch.equal(vae.loc, seen[2])
    assert not torch.equal(vae.loc, seen[5])


def test_a_callback_can_stop() -> None:
    states: list[State] = []

    def stop(state: State) -> None:
        states.append(state)
        if state.epoch == 2:
            state.stop()

    history = fit(make_vae(), make_data(), epochs=5, batch_size=11, callbacks=[stop], **QUIET)
    assert [(s.epoch, s.step) for s in states] == [(1, 5), (2, 10)]
    assert states[1].metrics == history.rows[1]


def test_schedules_step_once_an_epoch() -> None:
    schedule = {"class_path": "ExponentialLR", "init_args": {"gamma": 0.5}}
    history = fit(make_vae(), make_data(), epochs=3, batch_size=11, schedule=schedule, **QUIET)
    assert history["lr"] == pytest.approx([1e-3, 5e-4, 2.5e-4])
    never = {"patience": 0, "threshold": 1e3, "threshold_mode": "abs"}
    plateau = {"class_path": "ReduceLROnPlateau", "init_args": never}
    history = fit(make_vae(), make_data(), epochs=3, batch_size=11, schedule=plateau, **QUIET)
    assert history["lr"] == pytest.approx([1e-3, 1e-3, 1e-4])


def test_an_objective_by_its_name() -> None:
    found = [
        fit(make_vae(), make_data(), objective, epochs=1, **QUIET).rows[0]["objective"]
        for objective in ("IWAE", IWAE())
    ]
    assert found[0] == found[1]


def test_objectives_are_told_the_step() -> None:
    class Counting(ELBO):
        steps: list[int] = []

        def at(self, step: int) -> None:
            self.steps.append(step)

    fit(make_vae(), make_data(), Counting(), epochs=2, batch_size=11, **QUIET)
    assert Counting.steps == list(range(10))


@pytest.mark.parametrize("K", [1, 3])
def test_training_columns_are_at_beta_one(K: int) -> None:
    objective = ELBO(beta=3.0, num_particles=K)
    history = fit(make_vae(), make_data(), objective, epochs=1, batch_size=11, **QUIET)
    row = history.rows[0]
    assert row["elbo"] == pytest.approx(row["reconstruction"] - row["kl"])
    assert row["objective"] == pytest.approx(row["reconstruction"] - 3 * row["kl"], abs=1e-5)


class Subsampled(Scripted):
    """Each row stands for several of a larger data set; remembers its mode at each run."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor, self.modes = factor, []

    def model(self, x: Tensor) -> None:
        plate = pyro.plate("data", self.factor * len(x), subsample_size=len(x), dim=-1)
        with plate:
            z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        self.modes.append(self.training)
        with pyro.plate("data", self.factor * len(x), subsample_size=len(x), dim=-1):
            loc = x / 2 + self.loc
            pyro.sample("z", pyro.distributions.Normal(loc, 0.7).to_event(1))


def test_a_loss_is_per_datum_whatever_each_stands_for() -> None:
    row = fit(Subsampled(5), torch.randn(31, 2), epochs=1, batch_size=7, **QUIET).rows[0]
    assert row["objective"] == pytest.approx(row["elbo"], abs=1e-5)


def test_every_epoch_trains_in_training_mode() -> None:
    vae = Subsampled(1).eval()
    evaluate = [lambda state: state.vae.eval()]
    fit(vae, torch.randn(31, 2), epochs=3, batch_size=7, callbacks=evaluate, **QUIET)
    assert vae.modes.count(True) == 15


def test_pairs_and_integers_are_data() -> None:
    x = make_data()
    first, second, third = make_vae(), make_vae(), make_vae()
    fit(first, x, epochs=1, batch_size=11, **QUIET)
    fit(second, (x.to(torch.uint8), None), epochs=1, batch_size=11, **QUIET)
    assert same(weights(first), weights(second))
    fit(third, Noisy(x), epochs=1, batch_size=11, **QUIET)
    assert not same(weights(first), weights(third))  # other draws of z, after those of the data


def test_double_precision() -> None:
    vae = make_vae()
    fit(vae, make_data(), epochs=1, batch_size=11, precision="64-true", **QUIET)
    assert next(vae.parameters()).dtype == torch.float64


def test_mixed_precision_leaves_data_alone() -> None:
    vae, x = make_vae(), make_data()
    history = fit(vae, x, validation=x, epochs=2, batch_size=11, precision="bf16-mixed", **QUIET)
    assert next(vae.parameters()).dtype == torch.float32
    assert history["elbo"][1] == pytest.approx(history["validation_elbo"][1], abs=1.0)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", "float32"), ("64-true", "float64")])
def test_new_tensors_of_a_step_are_of_its_precision(precision: str, dtype: str) -> None:
    with step._autocast(precision, "cpu"):
        assert torch.zeros(()).dtype is getattr(torch, dtype)
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_half_precision_scales_its_gradients_and_resumes(
    clip_norm: float | None, tmp_path: Path
) -> None:
    options = {"precision": "16-mixed", "batch_size": 11, "clip_norm": clip_norm, **QUIET}
    whole, broken = make_vae(), make_vae()
    history = fit(whole, make_data(), epochs=3, **options)
    assert history.rows[-1]["elbo"] > history.rows[0]["elbo"]
    fit(broken, make_data(), epochs=1, run=tmp_path, **options)
    state = load_state(tmp_path)
    assert state is not None
    assert state["precision"]["scale"] > 1
    fit(broken, make_data(), epochs=3, run=tmp_path, resume=True, **options)
    assert same(weights(whole), weights(broken))


def test_loggers_are_given_each_epoch() -> None:
    class Logger:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.seen.append((step, metrics["elbo"], "validation_elbo" in metrics))

        def finalize(self, status: str) -> None:
            self.seen.append(status)

    logger = Logger()
    history = fit(make_vae(), make_data(), epochs=2, batch_size=11, loggers=[logger], **QUIET)
    assert logger.seen == [*((r["step"], r["elbo"], False) for r in history.rows), "success"]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"accelerator": "tpu"}, "accelerator must be 'cpu', 'cuda' or 'auto'; got 'tpu'"),
        ({"precision": "8-true"}, "precision must be one of 32-true, .*; got '8-true'"),
    ],
)
def test_unknown_places_and_precisions_are_refused(option: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(make_vae(), make_data(), **{**QUIET, **option})


def test_vaes_train_one_after_the_other() -> None:
    store = pyro.get_param_store()
    store["mine"] = torch.ones(2)
    try:
        for vae in (make_vae(), make_vae()):
            before = weights(vae)
            fit(vae, make_data(), epochs=1, batch_size=11, **QUIET)
            moved = {k for k, v in weights(vae).items() if not torch.equal(v, before[k])}
            assert {name for name, _ in vae.named_parameters()} <= moved
        assert list(store.keys()) == ["mine"]
    finally:
        pyro.clear_param_store()


def test_only_parameters_that_require_gradients_move() -> None:
    vae = make_vae()
    vae.posterior.requires_grad_(False)
    before = weights(vae.posterior)
    fit(vae, make_data(), epochs=1, batch_size=11, **QUIET)
    assert same(before, weights(vae.posterior))
    vae.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(vae, make_data(), epochs=1, **QUIET)


def global_state() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        torch.distributions.Distribution._validate_args,
        pyro.distributions.is_validation_enabled(),
        pyro.infer.util.is_validation_enabled(),
        dict(os.environ),
        list(warnings.filters),
        logging.getLogger().handlers[:],
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    ]


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(validate: bool, fails: bool) -> None:
    def stop(state: State) -> None:
        raise Stop

    vae, callbacks = make_vae().eval(), [stop] if fails else []
    torch.optim.Adam(vae.parameters()).step()  # torch's own compiler sets what it needs
    with pyro.validation_enabled(validate):
        before = global_state()
        try:
            fit(vae, make_data(), epochs=1, batch_size=11, callbacks=callbacks, **QUIET)
        except Stop:
            assert fails
        assert global_state() == before
    assert not vae.training
    assert all(p.grad is None for p in vae.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_caller_s_modes_of_torch_change_no_weight(precision: str) -> None:
    first, second = make_vae(), make_vae()
    options = {"epochs": 2, "batch_size": 11, "precision": precision, **QUIET}
    fit(first, make_data(), **options)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fit(second, make_data(), **options)
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert same(weights(first), weights(second))


def test_each_part_is_left_in_its_mode() -> None:
    vae = make_vae()
    vae.posterior.encoder.eval()
    modes = [part.training for part in vae.modules()]
    fit(vae, make_data(), epochs=1, **QUIET)
    assert [part.training for part in vae.modules()] == modes


def test_a_fresh_process_is_left_as_it_was() -> None:
    code = """
import logging, os, sys, warnings
import torch
import pyro_vae.training
sys.path.insert(0, sys.argv[1])
from training_cases import QUIET, make_data, make_vae
weight = torch.ones(1, requires_grad=True)
torch.optim.Adam([weight]).step()  # torch's own compiler, imported here, sets what it needs
before = dict(os.environ), list(warnings.filters), logging.getLogger().handlers[:]
pyro_vae.training.fit(make_vae(), make_data(), epochs=1, batch_size=11, **QUIET)
assert before == (dict(os.environ), list(warnings.filters), logging.getLogger().handlers[:])
"""
    folder = os.path.dirname(__file__)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, folder], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout + result.stderr == ""


def test_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    fit(make_vae(), make_data(), epochs=2, batch_size=11, accelerator="cpu")
    out = capsys.readouterr().out
    assert "epoch 2/2" in out
    assert "ELBO" in out
    fit(make_vae(), make_data(), epochs=1, batch_size=11, **QUIET)
    assert capsys.readouterr() == ("", "")


def test_collapse_is_reported_once() -> None:
    with pytest.warns(UserWarning, match="none of the 3 latent units") as caught:
        history = fit(make_vae(), make_data(), ELBO(beta=100.0), epochs=7, lr=0.03, **QUIET)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert history.active_units == 0
    assert history.num_units == 3


def test_active_units_are_counted() -> None:
    history = fit(make_vae(), make_data(), epochs=3, batch_size=11, lr=0.03, **QUIET)
    assert history.active_units in (1, 2, 3)
    assert history["active_units"][-1] == history.active_units


def test_history_columns() -> None:
    history = History()
    assert history.best_epoch is None
    assert history["elbo"] == []
    with pytest.raises(ValueError, match="no column 'loss'"):
        history["loss"]


def test_fresh_noise_comes_from_the_seed() -> None:
    first, second, third = make_vae(), make_vae(), make_vae()
    fit(first, noisy_data(), epochs=2, batch_size=11, **QUIET)
    torch.rand(5)
    fit(second, noisy_data(), epochs=2, batch_size=11, **QUIET)
    fit(third, noisy_data(), epochs=2, batch_size=11, seed=1, **QUIET)
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(third))


def test_a_history_is_shown_in_a_line() -> None:
    assert repr(History()) == "History(0 epochs)"
    row = dict.fromkeys(COLUMNS, None) | {"elbo": -7.251, "kl": 2.5, "active_units": 3}
    assert repr(History([row], num_units=5)) == (
        "History(1 epochs; weights of epoch 1: elbo -7.25, kl 2.50 nats; 3 of 5 units active)"
    )
    rows = [row | {"validation_elbo": elbo, "active_units": None} for elbo in (-7.0, -6.25, -8.0)]
    assert repr(History(rows)) == (
        "History(3 epochs; weights of epoch 2: elbo -7.25, kl 2.50, validation_elbo -6.25 nats)"
    )


def test_arguments_are_checked_in_the_first_two_steps_alone() -> None:
    seen = []

    class Watched(ELBO):
        def surrogate(self, d: Any) -> Tensor:
            seen.append(is_validation_enabled())
            return super().surrogate(d)

    before = is_validation_enabled()
    fit(make_vae(), make_data(), Watched(), epochs=1, batch_size=11, **QUIET)
    assert seen == [True, True, False, False, False]
    assert is_validation_enabled() == before


def test_the_number_of_threads_is_left_as_it_was() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # a small model trains on one
    try:
        fit(make_vae(), make_data(), epochs=1, batch_size=11, **QUIET)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
