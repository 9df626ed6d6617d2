"""The step traced through Pyro's handlers, and compiled, is the eager step."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from families import (
    LIKELIHOODS,
    NETWORKS,
    OBJECTIVES,
    POSTERIORS,
    PRIORS,
    accepted,
    draw,
    each_once,
    make,
    name,
    network,
)
from pyro.nn import PyroModule
from torch import Tensor, nn
from training_cases import QUIET, make_data, make_vae, noisy_data, same, weights

from pyro_vae import likelihoods, networks, posteriors, priors
from pyro_vae.compiling import CannotCompile, Traced, compiled
from pyro_vae.densities import Densities
from pyro_vae.objectives import ELBO, IWAE, Capacity, DReG, FactorVAE, Linear, Objective
from pyro_vae.training import fit, read_run, step, trainer
from pyro_vae.training.step import LossAndGradient, StepLoss, TracedGradient, choose_compile
from pyro_vae.vae import VAE

ONE_PLAYER = [cls for cls in OBJECTIVES if not cls.own_step]


def step_of(vae: nn.Module, x: Tensor, objective: Objective | None = None) -> LossAndGradient:
    objective = objective or ELBO()
    objective.prepare(2 * len(x), 3)
    objective.at(0)
    return LossAndGradient(StepLoss(vae.train(), objective))


def outcome(step: Any, *inputs: Tensor) -> list[Tensor | None]:
    """Loss, terms and gradient under one seed, and the noise that comes next."""
    torch.manual_seed(3)
    with pyro.validation_enabled(False):
        loss, terms, gradient = step(*inputs)
    return [loss, terms, *gradient, torch.rand(3)]


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in module.named_buffers()}


def agree(
    step: LossAndGradient, *inputs: Tensor, how: type | Any = Traced, tolerance: float = 1e-9
) -> Traced:
    """The traced step gives the eager step's loss, terms, gradient, buffers and noise."""
    twin, start = copy.deepcopy(step), buffers(step)
    traced = how(step, *inputs)
    assert all(torch.equal(b, start[name]) for name, b in step.named_buffers())
    pairs = zip(outcome(twin, *inputs), outcome(traced, *inputs), strict=True)
    for expected, found in [*pairs, *zip(twin.buffers(), step.buffers())]:
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return traced


@pytest.mark.parametrize(
    ("prior", "likelihood", "posterior"), each_once(PRIORS, LIKELIHOODS, POSTERIORS)
)
def test_the_traced_step_of_every_composition(
    prior: type, likelihood: type, posterior: type
) -> None:
    vae = make(prior, likelihood, posterior, data_shape=(3,), hidden=(2,)).double()
    x = draw(vae, 5).double()
    agree(step_of(vae, x), x)


@pytest.mark.parametrize("cls", ONE_PLAYER, ids=name)
def test_the_traced_step_of_every_objective(cls: type) -> None:
    vae = make().double()
    x = draw(vae, 7).double()
    agree(step_of(vae, x, cls()), x)


@pytest.mark.parametrize("cls", NETWORKS, ids=name)
def test_the_traced_step_of_every_network_with_batch_norm(cls: type) -> None:
    body = network(cls, **accepted(cls, norm="batch"))
    if body.in_shape == (11,):
        vae = VAE(
            priors.StandardNormal(11),
            likelihoods.Bernoulli(body, body.out_shape),
            posteriors.DiagonalNormal(networks.MLP(body.out_shape, 22), 11),
        )
    else:
        vae = VAE(
            priors.StandardNormal(3),
            likelihoods.Bernoulli(networks.MLP(3, body.in_shape), body.in_shape),
            posteriors.DiagonalNormal(Encoder(body), 3),
        )
    x = torch.bernoulli(torch.full((5, *vae.likelihood.data_shape), 0.3)).double()
    agree(step_of(vae.double(), x), x)


def test_batch_norm_moves_its_statistics_in_the_traced_step() -> None:
    vae = make(norm="batch")
    x = draw(vae, 7)
    step = step_of(vae, x)
    before = buffers(step)
    agree(step, x, tolerance=1e-5)
    moved = [n for n, b in step.named_buffers() if not torch.equal(b, before[n])]
    assert sum("running_mean" in n for n in moved) >= 2


def test_a_condition_is_an_input() -> None:
    vae = make(condition_dim=2).double()
    y = torch.randn(7, 2, dtype=torch.float64)
    x = draw(vae, 7, y=y)
    traced = agree(step_of(vae, x), x, y)
    eager = outcome(step_of(vae, x), x, -y)[0]
    torch.testing.assert_close(outcome(traced, x, -y)[0], eager)


class Encoder(nn.Module):
    """A network of 11 outputs, and the 6 that are asked for."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.last = body, nn.Linear(11, 6)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.last(self.body(x, y))


class OwnProgram(PyroModule):
    """Two latent sites and the parameters of a PyroModule."""

    def __init__(self) -> None:
        super().__init__()
        self.first = PyroModule[nn.Linear](3, 2)
        self.second = PyroModule[nn.Linear](2, 2)
        self.out = PyroModule[nn.Linear](2, 3)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(a, 0.5).to_event(1))
            pyro.sample("x", dist.Normal(self.out(b), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(self.first(x), 0.7).to_event(1))
            pyro.sample("b", dist.Normal(self.second(a), 0.3).to_event(1))


@pytest.mark.parametrize("objective", [ELBO(), IWAE(5), DReG(5)], ids=lambda o: type(o).__name__)
def test_a_program_of_ones_own(objective: Objective) -> None:
    x = torch.randn(7, 3)
    agree(step_of(OwnProgram(), x, objective), x, tolerance=1e-5)
    assert not dict(pyro.get_param_store())


def test_weights_that_move_need_no_new_trace() -> None:
    vae = make().double()
    x = draw(vae, 7).double()
    objective = Capacity(capacity=Linear(length=10, end=3.0), gamma=Linear(length=10, start=1.0))
    step = step_of(vae, x, objective)
    traced = Traced(step, x)
    found = []
    for moment in (0, 4, 9):
        objective.at(moment)
        with torch.no_grad():
            next(vae.parameters()).mul_(1.1)
        found.append(outcome(traced, x)[0])
        torch.testing.assert_close(found[-1], outcome(step, x)[0])
    assert len(set(map(float, found))) == 3


def test_a_tensor_of_two_names_trains() -> None:
    vae = make().double()
    vae.again = vae.posterior.encoder
    vae.shared = nn.Module()
    vae.shared.weight = next(vae.parameters())  # another module's
    x = draw(vae, 7).double()
    before = dict(vae.named_parameters())
    agree(step_of(vae, x), x)
    assert all(p is before[name] for name, p in vae.named_parameters())


class Keeps(nn.Module):
    """Keeps what a call computes, in the way that is asked for."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.calls, self.kept = way, 0, torch.zeros(3)
        self.log: list[Tensor] = []
        self.last: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "number":
            self.calls += 1
        elif self.way == "tensor":
            self.kept = x.mean(0)
        elif self.way == "list":
            self.log.append(x.mean())
        elif self.way == "dict":
            self.last["mean"] = x.mean()
        else:
            self.kept.mul_(0.5).add_(1.0)
        return x + self.kept


@pytest.mark.parametrize(
    ("way", "name"), [("number", "calls"), ("tensor", "kept"), ("list", "0"), ("dict", "mean")]
)
def test_a_pass_that_sets_an_attribute_is_refused_and_undone(way: str, name: str) -> None:
    module = Keeps(way)
    with pytest.raises(CannotCompile, match=f"^it sets the attribute or entry {name} of Keeps$"):
        Traced(module, torch.ones(2, 3))
    assert (module.calls, module.log, module.last) == (0, [], {})
    assert torch.equal(module.kept, torch.zeros(3))


def test_a_tensor_that_is_no_buffer_is_changed_by_the_calls_alone() -> None:
    module = Keeps("in place")
    traced = Traced(module, torch.ones(2, 3))
    assert torch.equal(module.kept, torch.zeros(3))
    for kept in (1.0, 1.5):
        assert torch.equal(traced(torch.ones(2, 3)), torch.full((2, 3), 1 + kept))


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > 0 else -x


def test_a_pass_that_reads_a_number_is_refused_in_one_line() -> None:
    with pytest.raises(CannotCompile, match="^it cannot be traced: [^\n]*$"):
        Traced(Reads(), torch.ones(3))


def test_a_parameter_outside_the_module_is_refused() -> None:
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * outside.weight[0]

    outside = nn.Linear(3, 3)
    with pytest.raises(CannotCompile, match=r"a parameter \[3, 3\] lies outside"):
        Traced(Strange(), torch.ones(3))


def test_views_that_change_nothing_are_left_out() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.detach(), 2 * x.t().unsqueeze(0).squeeze(0).expand(3, 2).t().view(2, 3)

    x = torch.randn(2, 3)
    traced = Traced(Views(), x)
    same, doubled = traced(x)
    assert same is not x
    assert torch.equal(same, x)
    assert torch.equal(doubled, 2 * x)
    called = [node for node in traced.graph.graph.nodes if node.op == "call_function"]
    assert len(called) == 2  # a view for the output, and the product


def test_full_batches_are_compared_once_in_a_hundred_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []
    take = TracedGradient.compare

    def look(self: TracedGradient, *arguments: Any) -> Any:
        compared.append(None)
        return take(self, *arguments)

    monkeypatch.setattr(TracedGradient, "compare", look)
    fit(make_vae(), make_data(11), epochs=211, batch_size=11, compile="trace", **QUIET)
    assert len(compared) == len([2, 4, 8, 16, 32, 64, 100, 128, 200])


# --- the compiler itself, for a set that covers each kind of composition ------------------------


@pytest.mark.slow
@pytest.mark.parametrize("i", range(len(ONE_PLAYER)))
def test_the_compiled_step_of_each_class_once(i: int) -> None:
    families = (PRIORS, LIKELIHOODS, POSTERIORS, ONE_PLAYER)
    *triple, objective = [family[i % len(family)] for family in families]
    if objective.__name__ in ("BetaTC", "HierarchicallyFactorized", "DIP"):
        triple[2] = posteriors.DiagonalNormal  # they need a density per dimension
    vae = make(*triple, norm=None if i % 2 else "batch").double()
    x = draw(vae.eval(), 7).double()
    agree(step_of(vae, x, objective()), x, how=compiled)


def test_compiled_training_is_eager_training(tmp_path: Path) -> None:
    """Losses, weights and a broken-off run; the remainder of 3 rows runs eagerly."""
    data, options = noisy_data(53), {"batch_size": 10, "seed": 3, **QUIET}
    objective = ELBO(beta=Linear(length=12))
    start, eager, fast, resumed = make_vae(), make_vae(), make_vae(), make_vae()
    first = fit(eager, data, objective, epochs=3, **options)
    second = fit(fast, data, objective, epochs=3, compile=True, **options)
    run = {"run": tmp_path / "run", "compile": True, **options}
    fit(resumed, data, objective, epochs=2, **run)
    fit(resumed, data, objective, epochs=3, resume=True, **run)
    for a, b in zip(first.rows, second.rows, strict=True):
        assert a["elbo"] == pytest.approx(b["elbo"], abs=1e-5)
    for key, weight in weights(eager).items():
        if weight.is_floating_point():
            torch.testing.assert_close(weights(fast)[key], weight, rtol=1e-4, atol=1e-5)
    moved = [not torch.equal(p, q) for p, q in zip(fast.parameters(), start.parameters())]
    assert all(moved)
    assert same(weights(fast), weights(resumed))
    run["compile"] = False
    assert len(fit(resumed, data, objective, epochs=4, resume=True, **run)) == 4


def test_what_cannot_be_compiled_trains_eagerly_and_says_why() -> None:
    class Branching(VAE):
        def guide(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            assert x.sum().item() >= 0
            return super().guide(x, y)

    plain, odd = make_vae(), make_vae()
    odd.__class__ = Branching
    fit(plain, make_data(), epochs=2, batch_size=10, **QUIET)
    with pytest.warns(UserWarning, match="compile: the step runs eagerly, for it cannot be tr"):
        fit(odd, make_data(), epochs=2, batch_size=10, compile=True, **QUIET)
    assert same(weights(plain), weights(odd))


@pytest.mark.slow
def test_no_compiler_is_said_in_one_line() -> None:
    code = """
from training_cases import QUIET, make_data, make_vae
from pyro_vae.training import fit, read_run, step, trainer
fit(make_vae(), make_data(41), epochs=2, batch_size=10, compile=True, **QUIET)
"""
    # torch reads the compiler's name once, when it is imported: a process of its own
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"CXX": "no-such-compiler", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    said = [line for line in done.stderr.splitlines() if "UserWarning" in line]
    assert done.returncode == 0
    assert len(said) == 1
    assert "compile: the step is traced only, for it cannot be compiled: " in said[0]


def test_gradients_that_are_scaled_are_not_compiled() -> None:
    loss = StepLoss(make_vae(), ELBO(), "16-mixed")
    with pytest.raises(CannotCompile, match="16-mixed"):
        TracedGradient(loss, make_data()[:5])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions_compile(precision: str) -> None:
    options = {"batch_size": 10, "epochs": 3, "precision": precision, **QUIET}
    rows = [fit(make_vae(), make_data(), compile=c, **options).rows for c in (False, True)]
    tolerance = 1e-6 if precision == "64-true" else 0.02  # Adam magnifies rounding
    for eager, fast in zip(*rows):
        assert fast["elbo"] == pytest.approx(eager["elbo"], abs=tolerance)


def test_a_long_training_is_traced_and_a_longer_one_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", sys.executable)  # a program that is there
    asked = {"objective": ELBO(), "precision": "32-true", "on_cuda": False}
    steps = {1999: False, 2000: "trace", 29_999: "trace", 30_000: True}
    assert {number: choose_compile(number, **asked) for number in steps} == steps
    for without in ({"objective": FactorVAE()}, {"precision": "16-mixed"}):
        assert choose_compile(30_000, **{**asked, **without}) is False
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert choose_compile(30_000, **asked) == "trace"


def test_what_was_decided_is_recorded_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(Traced, "compile", lambda *a: compiled.append(a))
    monkeypatch.setattr(step, "which", lambda _: "a compiler")
    options = {"batch_size": 10, **QUIET}

    def train(run: str, **more: Any) -> dict[str, Tensor]:
        vae = make_vae()
        fit(vae, make_data(), run=tmp_path / run, **options, **more)
        return weights(vae)

    def recorded(run: str) -> bool | str:
        return read_run(tmp_path / run)["training"]["compile"]

    train("short", epochs=1)
    assert recorded("short") is False
    monkeypatch.setattr(step, "MIN_TRACED_STEPS", 18)
    traced = train("traced", epochs=3)
    assert recorded("traced") == "trace"
    assert not compiled
    monkeypatch.setattr(step, "MIN_COMPILED_STEPS", 18)
    whole = train("whole", epochs=3)
    assert recorded("whole") is True
    train("broken", epochs=3, callbacks=[lambda state: state.stop()])
    monkeypatch.setattr(step, "MIN_COMPILED_STEPS", 10_000)
    assert same(whole, train("broken", epochs=3, resume=True))
    assert len(compiled) == 3
    assert recorded("broken") is True
    train("short", epochs=3, resume=True)
    assert recorded("short") is False
    assert same(traced, whole)


# --- the traced step as a way to train ----------------------------------------------------------


@pytest.mark.parametrize("norm", [None, "batch"])
def test_traced_training_is_eager_training_bit_for_bit(tmp_path: Path, norm: str | None) -> None:
    """Metrics, weights, buffers and a run that was broken off within an epoch."""
    data = noisy_data(53)
    options = {"batch_size": 10, "validation": noisy_data(13), "epochs": 3, **QUIET}

    def train(**more: Any) -> tuple[Any, dict[str, Tensor]]:
        torch.manual_seed(0)
        vae = make(data_shape=(7,), norm=norm)
        history = fit(vae, data, ELBO(beta=Linear(length=12)), **{**options, **more})
        return [{**row, "seconds": 0} for row in history.rows], weights(vae)

    rows, final = train(compile=False)
    for more in ({}, {"clip_norm": 0.1, "compile": "trace"}):
        clipped = train(**{**more, "compile": False}) if more else (rows, final)
        found = train(**{"compile": "trace", **more})
        assert found[0] == clipped[0]
        assert same(found[1], clipped[1])
    run = {"run": tmp_path / "run", "compile": "trace", "checkpoint_every": 5}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(**run, callbacks=[lambda state: stop() if state.epoch == 2 else None])
    again, weights_again = train(**run, resume=True)
    assert again == rows
    assert same(weights_again, final)


class Late(ELBO):
    """A bound that is multiplied by a number which Python keeps."""

    factor, change_at = 1.0, -1

    def at(self, step: int) -> None:
        super().at(step)
        if step == self.change_at:
            self.factor = 2.0

    def bound(self, d: Densities) -> Tensor:
        return self.factor * super().bound(d)


class Uneasy(OwnProgram):
    """A program that does in its guide what a trace could miss."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.wide = how, torch.ones(1).expand(3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("flag", torch.tensor(True))
        self.empty = nn.Parameter(torch.zeros(0))
        self.lstm = nn.LSTM(1, 3, batch_first=True) if how == "lstm" else None

    def guide(self, x: Tensor) -> None:
        if self.how == "replaced" and self.training:
            self.mean = 0.9 * self.mean + x.mean(0)
        elif self.how == "in place":
            x.mul_(1.5)
        elif self.how == "lstm":
            x = x + self.lstm(x.unsqueeze(-1))[0][:, -1]
        super().guide(x * self.wide + self.empty.sum())


@pytest.mark.parametrize(
    ("how", "says"), [("replaced", "something else"), ("in place", ""), ("lstm", "runs eagerly")]
)
def test_what_a_trace_could_miss_trains_as_the_program_does(
    how: str, says: str, recwarn: pytest.WarningsRecorder
) -> None:
    def train(compile: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        program = Uneasy(how)
        fit(
            program,
            torch.linspace(-2, 2, 99).view(33, 3),
            epochs=4,
            batch_size=10,
            compile=compile,
            **QUIET,
        )
        return weights(program)

    eager = train(False)
    recwarn.clear()
    assert same(train("trace"), eager)
    messages = [str(w.message) for w in recwarn if "compile:" in str(w.message)]
    assert [says in message for message in messages] == ([True] if says else [])


def test_a_gradient_that_is_not_finite_is_named_where_steps_are_compared() -> None:
    class Breaks(OwnProgram):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))
            self.scale = nn.Parameter(torch.zeros(()))

        def guide(self, x: Tensor) -> None:
            if self.training:
                self.steps.add_(1)
            root = torch.where(self.steps < 5, self.scale + 1, 0 * self.scale).sqrt()
            super().guide(x * (1 + root))

    for compile in (False, "trace"):
        with pytest.raises(FloatingPointError, match="step 4: the gradient of scale"):
            fit(Breaks(), torch.ones(60, 3), epochs=1, batch_size=10, compile=compile, **QUIET)


def test_what_python_changes_ends_the_trace_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A number, parameters that are frozen: from there on, each step is the eager one."""

    def train(compile: Any, change_at: int = -1, freeze: bool = False) -> dict[str, Tensor]:
        monkeypatch.setattr(trainer, "COMPARED_STEPS", 100 if freeze else 6)
        vae, objective = make_vae(), Late()
        objective.change_at = change_at
        vae.likelihood.requires_grad_(not freeze)  # from the end of the second epoch on trained

        def swap(state: Any) -> None:
            if state.epoch == 2:
                vae.posterior.requires_grad_(not freeze)
                vae.likelihood.requires_grad_(True)

        options = {"batch_size": 10, "epochs": 4, "callbacks": [swap], **QUIET}
        fit(vae, make_data(53), objective, compile=compile, **options)
        return weights(vae)

    assert same(train("trace"), train(False))
    says = "compile: from step {} on the steps run eagerly"
    for change in ({"change_at": 12}, {"freeze": True}):
        with pytest.warns(UserWarning, match=says.format(12)):
            found = train("trace", **change)
        assert same(found, train(False, **change))
    with pytest.warns(UserWarning, match=says.format(8)):
        train("trace", change_at=7)
