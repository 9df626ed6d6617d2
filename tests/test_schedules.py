"""Weights that move: exact values, in training, resumed, declared."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from training.training_cases import QUIET, Stop, make_data, make_vae, same, weights

from pyro_vae import config
from pyro_vae.__main__ import main
from pyro_vae.objectives import (
    CIWAE,
    ELBO,
    Capacity,
    Constant,
    Cosine,
    Cyclical,
    FreeBits,
    Linear,
    Objective,
    Renyi,
    Schedule,
    StickingTheLanding,
)
from pyro_vae.training import State, fit, read_run

ENDLESS = "before the schedule of"


def test_an_objective_shows_its_options() -> None:
    shown = "ELBO(beta=Linear(length=7, start=0.0, end=1.0, delay=0.0, unit='step'), "
    assert repr(ELBO(beta=Linear(length=7))) == f"{shown}kl='auto', num_particles=1)"
    assert repr(Renyi(alpha=0.5)).startswith("Renyi(alpha=0.5, ")


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(0.7), {0: 0.7, 3: 0.7, 1e9: 0.7}),
        (Linear(length=8), {0: 0.0, 1: 0.125, 4: 0.5, 7: 0.875, 8: 1.0, 9: 1.0, 1e9: 1.0}),
        (
            Linear(start=3.0, end=0.5, length=5, delay=2),
            {0: 3.0, 2: 3.0, 3: 2.5, 4.5: 1.75, 7: 0.5, 100: 0.5},
        ),
        (
            Cosine(start=1.0, end=3.0, length=4, delay=1),
            {1: 1.0, 2: 2 - math.sqrt(0.5), 3: 2.0, 4: 2 + math.sqrt(0.5), 5: 3.0, 6: 3.0},
        ),
        (Cyclical(length=4, cycles=1, rising=1.0), {0: 0.0, 1: 0.25, 3: 0.75, 4: 1.0, 5: 1.0}),
        (
            Cyclical(length=10, cycles=3, rising=0.4, end=2.0),
            {
                0: 0.0,
                1: 0.5,
                2: 1.0,
                4: 2.0,
                9.9: 2.0,
                10: 0.0,
                11: 0.5,
                24: 2.0,
                30: 2.0,
                31: 2.0,
            },
        ),
    ],
    ids=lambda v: type(v).__name__,
)
def test_values(schedule: Schedule, values: dict[float, float]) -> None:
    for position, value in values.items():
        assert schedule(position) == pytest.approx(value, rel=1e-12, abs=1e-15)
    low, high = schedule.extremes
    drawn = [schedule(p / 7) for p in range(300)]
    assert (min(drawn), max(drawn)) == (low, high)
    assert schedule(schedule.finish) == schedule(schedule.finish + 123.4)


@pytest.mark.parametrize("cls", [Linear, Cosine, Cyclical])
def test_the_ends_are_exact(cls: type) -> None:
    schedule = cls(start=0.7, end=0.1, length=3)
    assert (schedule(0), schedule(schedule.finish)) == (0.7, 0.1)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Linear, {"length": 0}, "Linear: length must be positive; got 0"),
        (Linear, {"length": math.inf}, "length must be a finite number, positive; got inf"),
        (Linear, {"length": 3, "delay": -1}, "delay must be at least 0; got -1"),
        (Cosine, {"length": 3, "end": math.nan}, "Cosine: end must be a finite number; got nan"),
        (Cosine, {"length": 3, "unit": "batch"}, "unit must be 'step' or 'epoch'; got 'batch'"),
        (Constant, {"value": math.inf}, "value must be a finite number; got inf"),
        (Cyclical, {"length": 3, "rising": 0}, "rising must be positive; got 0"),
        (Cyclical, {"length": 3, "rising": 2}, "rising must be at most 1; got 2"),
        (Linear, {"length": "3"}, "Linear: length must be a finite number, positive; got '3'"),
        (Cyclical, {"length": 3, "cycles": 1.5}, "cycles must be a whole number, at least 1"),
    ],
)
def test_wrong_schedules_are_refused(cls: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_a_schedule_of_ones_own_may_hold_anything_but_an_infinite_weight() -> None:
    @dataclass(frozen=True)
    class Steps(Schedule):
        at: tuple[int, ...] = (2, 5)
        most: float = math.inf
        unit: str = "step"
        finish = 5.0
        extremes = (0.0, 2.0)

        def __call__(self, position: float) -> float:
            return float(sum(position >= step for step in self.at))

    objective = ELBO(beta=Steps())  # type: ignore[arg-type,abstract]
    objective.at(3)
    assert objective.beta == 1

    class Endless(Steps):
        extremes = (0.0, math.inf)

    with pytest.raises(ValueError, match="beta must be finite; got"):
        ELBO(beta=Endless())  # type: ignore[arg-type,abstract]


@pytest.mark.parametrize(
    ("cls", "name", "start", "end"),
    [
        (ELBO, "beta", 0.0, 4.0),
        (Capacity, "capacity", 0.0, 25.0),
        (Capacity, "gamma", 3.0, 1.0),
        (FreeBits, "free_nats", 2.0, 0.0),
        (StickingTheLanding, "beta", 0.0, 1.0),
        (CIWAE, "beta", 1.0, 0.0),
        (Renyi, "alpha", -1.0, 1.0),
    ],
)
def test_any_weight_moves(cls: type, name: str, start: float, end: float) -> None:
    objective = cls(**{name: Linear(start=start, end=end, length=8, delay=2)})
    weight = getattr(objective, name)
    assert weight.dtype == torch.float64
    assert weight == start
    for step, share in ((6, 0.5), (10, 1.0), (0, 0.0), (3, 0.125)):
        objective.at(step)
        assert weight == start + share * (end - start)
        assert objective.unsettled(step) == ([] if step >= 10 else [name])
    assert name in objective.state_dict()


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (ELBO, {"beta": Linear(start=-1.0, length=3)}, "beta must be zero or more; got Linear"),
        (CIWAE, {"beta": Linear(end=1.5, length=3)}, "beta must be from 0 to 1; got Linear"),
        (CIWAE, {"beta": -0.1}, "beta must be from 0 to 1; got -0.1"),
        (ELBO, {"beta": math.nan}, "beta must be finite; got nan"),
        (Renyi, {"alpha": math.inf}, "alpha must be finite; got inf"),
        (ELBO, {"beta": "fast"}, "beta must be a number or a schedule, .*; got 'fast'"),
        (Capacity, {"capacity": -1}, "capacity must be zero or more; got -1"),
        (Capacity, {"gamma": -1}, "gamma must be zero or more; got -1"),
        (FreeBits, {"free_nats": -1}, "free_nats must be zero or more; got -1"),
    ],
)
def test_wrong_weights_are_refused(cls: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_epochs_count_once_they_are_known() -> None:
    objective = ELBO(beta=Linear(length=2, unit="epoch"))
    objective.at(0)
    with pytest.raises(ValueError, match=r"schedule of beta counts epochs.*call prepare\("):
        objective.at(1)
    objective.prepare(num_data=53, steps_per_epoch=5)
    for step, beta in ((0, 0.0), (1, 0.1), (5, 0.5), (10, 1.0), (11, 1.0)):
        objective.at(step)
        assert objective.beta == pytest.approx(beta, abs=1e-15)
    assert objective.unsettled(9) == ["beta"]
    assert not objective.unsettled(10)


# --- in training -------------------------------------------------------------------------------


class Recorded(ELBO):
    """Keeps the weight of each step."""

    def __init__(self, beta: float | Schedule = 1.0) -> None:
        super().__init__(beta)
        self.seen: list[float] = []

    def at(self, step: int) -> None:
        super().at(step)
        self.seen.append(self.beta.item())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Linear(length=4), [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        (Linear(length=1, delay=1, unit="epoch"), [0.0, 0.0, 0.0, 0.0, 1 / 3, 2 / 3]),
    ],
    ids=lambda v: getattr(v, "unit", ""),
)
def test_fit_moves_the_weight_at_every_step(schedule: Schedule, expected: list[float]) -> None:
    objective = Recorded(schedule)
    fit(make_vae(), make_data(), objective, epochs=2, batch_size=19, **QUIET)
    assert objective.seen[-6:] == pytest.approx(expected)


def test_objective_and_elbo_are_told_apart() -> None:
    history = fit(make_vae(), make_data(), ELBO(Linear(end=0.0, length=1)), epochs=1, **QUIET)
    row = history.rows[0]
    assert row["objective"] == pytest.approx(row["reconstruction"], rel=1e-6)
    assert row["elbo"] == pytest.approx(row["reconstruction"] - row["kl"], rel=1e-6)


def test_a_run_that_ends_before_its_schedule_warns() -> None:
    with pytest.warns(UserWarning, match=f"ended at step 6, {ENDLESS} beta: train for longer"):
        fit(make_vae(), make_data(), ELBO(Linear(length=7)), epochs=2, batch_size=19, **QUIET)
    with warnings.catch_warnings(action="error"):
        fit(make_vae(), make_data(), ELBO(Linear(length=6)), epochs=2, batch_size=19, **QUIET)


@pytest.mark.parametrize(("length", "epochs"), [(1, 4), (15, 8)])
def test_patience_begins_when_the_schedules_are_finished(length: int, epochs: int) -> None:
    data = make_data()
    history = fit(
        make_vae(), data, ELBO(Linear(length=length)), epochs=40, batch_size=19, lr=1e-12,
        validation=data, patience=3, **QUIET,
    )  # fmt: skip
    assert history.best_epoch <= 5  # nothing is learnt
    assert len(history) == max(epochs, history.best_epoch + 3)


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path, unit: str) -> None:
    def objective() -> Objective:
        return ELBO(beta=Cosine(length=9 if unit == "step" else 2.5, unit=unit))

    data, unbroken, broken = make_data(), make_vae(), make_vae()
    options = {"epochs": 4, "batch_size": 19, **QUIET}
    history = fit(unbroken, data, objective(), run=tmp_path / "one", **options)

    def stop(state: State) -> None:
        if state.epoch == 2:
            raise Stop

    options["run"] = tmp_path / "two"
    with pytest.raises(Stop):
        fit(broken, data, objective(), callbacks=[stop], **options)
    resumed = fit(broken, data, objective(), resume=True, **options)
    assert same(weights(unbroken), weights(broken))
    assert resumed["objective"] == history["objective"]
    with pytest.raises(ValueError, match="cannot be resumed with other settings"):
        fit(broken, data, ELBO(beta=Cosine(length=10)), resume=True, **options)


def test_a_run_records_the_schedule(tmp_path: Path) -> None:
    fit(make_vae(), make_data(), ELBO(Linear(length=1)), epochs=1, run=tmp_path, **QUIET)
    beta = read_run(tmp_path)["training"]["objective"]["init_args"]["beta"]
    assert beta == {
        "class_path": "Linear",
        "init_args": {"length": 1, "start": 0.0, "end": 1.0, "delay": 0.0, "unit": "step"},
    }


# --- declared ----------------------------------------------------------------------------------


def test_a_schedule_is_declared_in_place_of_a_number() -> None:
    beta = {"class_path": "Linear", "init_args": {"length": 7, "unit": "epoch"}}
    declared = {"class_path": "ELBO", "init_args": {"beta": beta, "kl": "sampled"}}
    cls, options = config.component("objective", declared)
    assert (cls, options["kl"]) == (ELBO, "sampled")
    assert options["beta"] == Linear(length=7, unit="epoch")
    assert cls(**options).schedules == {"beta": Linear(length=7, unit="epoch")}
    plain = {"class_path": "ELBO", "init_args": {"beta": 2.0}}
    assert config.component("objective", plain)[1]["beta"] == 2.0


def test_a_declaration_is_kept_plain_with_short_names() -> None:
    beta = {"class_path": "pyro_vae.objectives.Linear", "init_args": {"length": 7}}
    declared = {
        "class_path": "pyro_vae.objectives.ELBO",
        "init_args": {"beta": beta, "kl": "auto"},
    }
    defaults = {"start": 0.0, "end": 1.0, "delay": 0.0, "unit": "step"}
    linear = {"class_path": "Linear", "init_args": {"length": 7, **defaults}}
    assert config.component("objective", declared).plain == {
        "class_path": "ELBO",
        "init_args": {"beta": linear, "kl": "auto", "num_particles": 1},
    }


@pytest.mark.parametrize(
    ("init_args", "message"),
    [
        ({"betta": 1.0}, "has no option 'betta', did you mean 'beta'"),
        ({"beta": {"class_path": "Linea"}}, "schedule 'Linea' is unknown, did you mean 'Linear'"),
        ({"beta": "Linea"}, "schedule 'Linea' is unknown"),
        ({"beta": {"length": 3}}, "schedule 'None' is unknown|class_path"),
        (
            {"beta": {"class_path": "Linear", "init_args": {"lenght": 3}}},
            "Linear has no option 'lenght', did you mean 'length'",
        ),
        ({"beta": {"class_path": "Linear", "init_args": {"length": "x"}}}, "(?s)Linear.*length"),
        ({"beta": {"class_path": "Linear"}}, "(?s)Linear.*length"),
        ({"beta": {"class_path": "Linear", "init_args": {"length": 0}}}, "must be positive"),
        ({"beta": {"class_path": "foreign.Evil"}}, "import the module of your own class first"),
        ({"beta": "foreign.Evil"}, "import the module of your own class first"),
    ],
)
def test_wrong_declarations_are_refused(init_args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.component("objective", {"class_path": "ELBO", "init_args": init_args})


FOREIGN = [
    ["--objective.beta", "foreign.Evil"],
    ["--objective.beta=foreign.Evil"],
    ["--objective.init_args.beta", '{"class_path": "foreign.Evil"}'],
    ["--objective.beta.class_path", "foreign.Evil"],
    ["--objective.beta", "class_path: foreign.Evil"],
    ["--config", "foreign.yaml"],
    ["--config", "foreign.yaml", "--objective", "IWAE"],
]


@pytest.mark.parametrize("options", FOREIGN, ids=" ".join)
def test_the_command_line_imports_nothing_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    (tmp_path / "foreign.py").write_text("open('executed', 'w').close()\n")
    objective = {"class_path": "ELBO", "init_args": {"beta": {"class_path": "foreign.Evil"}}}
    (tmp_path / "foreign.yaml").write_text(yaml.safe_dump({"objective": objective}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["train", *options])
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_the_command_line_takes_a_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        *("train", "--data", "digits", "--limit", "20", "--latent_dim", "2", "--epochs", "1"),
        *("--objective.beta", '{"class_path": "Linear", "init_args": {"length": 1}}'),
        *("--encoder.hidden", "[3]", "--decoder.hidden", "[3]", "--progress", "false"),
        *("--accelerator", "cpu", "--run", "run"),
    ]
    assert not main(arguments)
    record = read_run("run")
    assert record["training"]["objective"]["init_args"]["beta"]["init_args"]["length"] == 1
