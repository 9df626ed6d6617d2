"""Run folders: exact resume, checkpoints that survive, files that are refused."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, get_num_threads
from training_cases import QUIET, Stop, make_data, make_vae, noisy_data, same, weights

from pyro_vae import build, load
from pyro_vae.objectives import CIWAE, ELBO, Linear
from pyro_vae.training import State, fit, load_weights, read_run, run_folder, trainer

OPTIONS: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 11,
    "lr": 0.01,
    "schedule": {"class_path": "ExponentialLR", "init_args": {"gamma": 0.8}},
    **QUIET,
}


class Breaking(ELBO):
    """Raises at one step."""

    def __init__(self, at: int = -1) -> None:
        super().__init__()
        self.stop_at = at

    def at(self, step: int) -> None:
        if step == self.stop_at:
            raise Stop


def metrics(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("optimizer", ["Adam", "RMSprop", "AdamW"])
@pytest.mark.parametrize("stop_at", [7, 9, 10, 12])  # five steps an epoch
def test_resume_is_exact(tmp_path: Path, stop_at: int, optimizer: str) -> None:
    options = {**OPTIONS, "optimizer": optimizer, "validation": noisy_data(13)}
    whole, broken = make_vae(), make_vae()
    fit(whole, noisy_data(), Breaking(), run=tmp_path / "whole", **options)
    options |= {"run": tmp_path / "broken", "checkpoint_every": 2}
    with pytest.raises(Stop):
        fit(broken, noisy_data(), Breaking(stop_at), **options)
    resumed = make_vae(seed=5)
    history = fit(resumed, noisy_data(), Breaking(), resume=True, **options)
    assert same(weights(whole), weights(resumed))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    assert history["epoch"] == [1, 2, 3, 4]
    for which in ("best", "last"):
        first, second = (load_weights(tmp_path / name, which) for name in ("whole", "broken"))
        assert same(first, second)


def test_resume_after_a_callback_raised(tmp_path: Path) -> None:
    def stop(state: State) -> None:
        if state.epoch == 2:
            raise Stop

    whole, resumed = make_vae(), make_vae(seed=5)
    fit(whole, noisy_data(), run=tmp_path / "whole", **OPTIONS)
    with pytest.raises(Stop):
        fit(make_vae(), noisy_data(), run=tmp_path / "broken", callbacks=[stop], **OPTIONS)
    steps: list[int] = []
    fit(
        resumed,
        noisy_data(),
        run=tmp_path / "broken",
        resume=True,
        callbacks=[lambda state: steps.append(state.step)],
        **OPTIONS,
    )
    assert steps == [10, 15, 20]
    assert same(weights(whole), weights(resumed))


@pytest.mark.parametrize("dies_in", ["save_checkpoint", "write_metrics"])
def test_callbacks_miss_no_epoch_and_what_they_change_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    seen: dict[str, dict[int, dict[str, Any]]] = {"whole": {}, "broken": {}}

    def train(name: str, **more: Any) -> dict[str, Tensor]:
        def look_and_move(state: State) -> None:
            seen[name][state.epoch] = {**state.metrics, "seconds": 0}
            for parameter in state.vae.parameters():
                parameter.data.mul_(1.01)

        vae = make_vae()
        options = {**OPTIONS, "validation": noisy_data(13), "callbacks": [look_and_move]}
        fit(vae, noisy_data(), run=tmp_path / name, **options, **more)
        return weights(vae)

    def die_at_epoch_2(*arguments: Any, **options: Any) -> None:
        if len(seen["broken"]) == 2:
            raise Stop
        write(*arguments, **options)

    whole = train("whole")
    write = getattr(trainer, dies_in)
    monkeypatch.setattr(trainer, dies_in, die_at_epoch_2)
    with pytest.raises(Stop):
        train("broken")
    monkeypatch.undo()
    assert same(whole, train("broken", resume=True))
    assert seen["broken"] == seen["whole"]
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_threads_are_few_for_a_small_model_and_recorded(tmp_path: Path) -> None:
    seen: list[int] = []
    options = {**OPTIONS, "epochs": 1, "callbacks": [lambda _: seen.append(get_num_threads())]}
    before = get_num_threads()
    torch.set_num_threads(2)
    try:
        fit(make_vae(), make_data(), run=tmp_path / "small", **options)
        large = build((1013,), 5, encoder={"class_path": "MLP", "init_args": {"hidden": [997]}})
        data = torch.ones(11, 1013)
        options |= {"run": tmp_path / "large"}
        fit(large, data, **options)
        assert get_num_threads() == 2
        torch.set_num_threads(1)
        with pytest.warns(UserWarning, match="on 2 threads and goes on with 1: its") as caught:
            fit(large, data, **{**options, "epochs": 2}, resume=True)
        assert caught[0].filename == __file__
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2, 1]
    recorded = [read_run(tmp_path / name)["training"]["threads"] for name in ("small", "large")]
    assert recorded == [1, 1]


def test_more_epochs_go_on(tmp_path: Path) -> None:
    whole, resumed = make_vae(), make_vae(seed=5)
    fit(whole, noisy_data(), **OPTIONS)
    fit(make_vae(), noisy_data(), run=tmp_path, **{**OPTIONS, "epochs": 1})
    fit(resumed, noisy_data(), run=tmp_path, resume=True, **OPTIONS)
    assert same(weights(whole), weights(resumed))
    again = make_vae(seed=5)
    history = fit(again, noisy_data(), run=tmp_path, resume=True, **OPTIONS)
    assert same(weights(whole), weights(again))
    assert len(history) == 4


def test_numbers_of_numpy_are_recorded_and_go_on(tmp_path: Path) -> None:
    def train(epochs: int, i: type, f: type) -> None:
        fit(
            make_vae(),
            make_data(),
            CIWAE(Linear(length=i(3), end=f(0.5)), num_particles=i(3)),
            optimizer={"class_path": "Adam", "init_args": {"betas": (f(0.75), f(0.875))}},
            epochs=i(epochs),
            lr=f(2.0**-9),
            batch_size=i(11),
            seed=i(3),
            devices=i(1),
            run=tmp_path / "run",
            resume=True,
            **QUIET,
        )

    train(1, np.int64, np.float64)
    train(2, np.int32, np.float32)
    train(3, int, float)
    training = read_run(tmp_path / "run")["training"]
    assert (training["lr"], training["batch_size"], training["seed"]) == (2.0**-9, 11, 3)
    assert training["objective"]["init_args"]["num_particles"] == 3


def test_an_error_of_the_first_resumed_step_is_raised_as_it_is(tmp_path: Path) -> None:
    fit(make_vae(), make_data(), run=tmp_path, **{**OPTIONS, "epochs": 1})
    vae = make_vae()

    def fail(*_: Any) -> None:
        if vae.training:
            raise LookupError("of one's own")

    vae.posterior.register_forward_hook(fail)
    with pytest.raises(LookupError, match="^.of one's own.$|^of one's own$"):
        fit(vae, make_data(), run=tmp_path, resume=True, **OPTIONS)


def test_resume_before_the_first_checkpoint_starts_over(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fit(make_vae(), noisy_data(), Breaking(3), run=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="no checkpoint yet"):
        load_weights(tmp_path)
    whole, resumed = make_vae(), make_vae()
    fit(whole, noisy_data(), Breaking(), **OPTIONS)
    fit(resumed, noisy_data(), Breaking(), run=tmp_path, resume=True, **OPTIONS)
    assert same(weights(whole), weights(resumed))


def test_what_a_run_holds(tmp_path: Path) -> None:
    x, vae = make_data(), make_vae()
    history = fit(
        vae, x, validation=x[:13], run=tmp_path / "a" / "b", declaration={"prior": "p"}, **OPTIONS
    )
    run = tmp_path / "a" / "b"
    record = read_run(run)
    assert record["format"] == 1
    assert record["declaration"] == {"prior": "p"}
    assert record["training"]["batch_size"] == 11
    assert record["training"]["objective"]["init_args"]["beta"] == 1.0
    assert record["data"]["train"]["rows"] == 53
    assert len(record["data"]["validation"]["digest"]) == 64
    rows = metrics(run)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["validation_elbo"]) for row in rows] == history["validation_elbo"]
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names[0] == "current.json"
    assert len(names) in (2, 3)  # the last and the best, which may be one
    assert same(load_weights(run, "best"), weights(vae))
    with pytest.raises(ValueError, match="which must be"):
        load_weights(run, "first")


def test_without_validation_the_best_is_the_last(tmp_path: Path) -> None:
    vae = make_vae()
    fit(vae, make_data(), run=tmp_path, **OPTIONS)
    assert same(load_weights(tmp_path), weights(vae))
    assert same(load_weights(tmp_path, "last"), weights(vae))


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    fit(make_vae(), make_data(), run=tmp_path, **{**OPTIONS, "epochs": 1})
    with pytest.raises(ValueError, match="holds a run"):
        fit(make_vae(), make_data(), run=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="needs the folder"):
        fit(make_vae(), make_data(), resume=True, **OPTIONS)


def test_a_mistake_does_not_take_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'Adam'"):
        fit(make_vae(), make_data(), run=tmp_path / "run", **{**OPTIONS, "optimizer": "adam"})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_size": 13}, "training.batch_size was 11, is 13"),
        ({"seed": 3}, "training.seed was 0, is 3"),
        ({"optimizer": "SGD"}, "training.optimizer was 'Adam', is 'SGD'"),
        ({"objective": ELBO(beta=2.0)}, "training.objective"),
        ({"data": make_data(seed=2)}, "data.train.digest"),
        ({"vae": build((7,), 2)}, r"or data: declaration.latent_dim was 3, is 2\. Give"),
    ],
)
def test_resume_with_other_settings(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    options = {"data": make_data(), "objective": ELBO(), "vae": build((7,), 3), **OPTIONS}
    fit(run=tmp_path, **{**options, "epochs": 1})
    with pytest.raises(ValueError, match=words):
        fit(run=tmp_path, resume=True, **{**options, **changed})


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    fit(make_vae(), make_data(), run=tmp_path, **{**OPTIONS, "epochs": 1})
    other = make_vae()
    other.posterior = torch.nn.Sequential(torch.nn.Linear(7, 6))
    with pytest.raises(ValueError, match="do not fit this vae"):
        fit(other, make_data(), run=tmp_path, resume=True, **OPTIONS)


def parts(run: Path) -> dict[str, Path]:
    (folder,) = (run / "checkpoints").glob("step-*")
    return {
        "run": run / "run.json",
        "pointer": run / "checkpoints" / "current.json",
        "weights": folder / "weights.safetensors",
        "state": folder / "state.pt",
    }


@pytest.mark.parametrize("part", ["run", "pointer", "weights", "state"])
@pytest.mark.parametrize("how", ["empty", "noise", "cut", "missing"])
def test_damaged_files_are_named(tmp_path: Path, part: str, how: str) -> None:
    fit(make_vae(), make_data(), run=tmp_path, **{**OPTIONS, "epochs": 1})
    path = parts(tmp_path)[part]
    whole = path.read_bytes()
    damaged = {"empty": b"", "noise": b"\xff\x00noise" * 9, "cut": whole[: len(whole) // 2]}
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged[how])
    if how == "missing" and part in ("run", "pointer"):  # a run that has not begun
        if part == "run":
            with pytest.raises(ValueError, match=r"run\.json is missing"):
                load_weights(tmp_path)
        return
    with pytest.raises(ValueError, match=path.name):
        fit(make_vae(), make_data(), run=tmp_path, resume=True, **OPTIONS)


@pytest.mark.parametrize("part", ["weights", "state"])
def test_one_changed_bit_is_found_by_the_digest(tmp_path: Path, part: str) -> None:
    fit(make_vae(), make_data(), run=tmp_path, **{**OPTIONS, "epochs": 1})
    whole = load_weights(tmp_path)
    path, pointer = parts(tmp_path)[part], parts(tmp_path)["pointer"]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name} is damaged: its digest is not that of"):
        fit(make_vae(), make_data(), run=tmp_path, resume=True, **OPTIONS)
    if part == "weights":
        with pytest.raises(ValueError, match="its digest is not that of checkpoints/current.json"):
            load_weights(tmp_path)
        record = json.loads(pointer.read_text())
        del record["sha256"]  # as older versions wrote it: there is nothing to compare
        pointer.write_text(json.dumps(record))
        assert not same(load_weights(tmp_path), whole)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    fit(make_vae(), make_data(), run=tmp_path, **{**OPTIONS, "epochs": 1})
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**record, "format": 2, "data": []}))
    with pytest.raises(ValueError, match="format 2"):
        load_weights(tmp_path)


def test_pointers_stay_inside(tmp_path: Path) -> None:
    fit(make_vae(), make_data(), run=tmp_path, **{**OPTIONS, "epochs": 1})
    parts(tmp_path)["pointer"].write_text(json.dumps({"last": "../../x", "best": None}))
    with pytest.raises(ValueError, match=r"current\.json is damaged"):
        load_weights(tmp_path)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("part", ["weights", "state"])
@pytest.mark.parametrize("zipped", [False, True])
def test_pickles_are_not_executed(tmp_path: Path, part: str, zipped: bool) -> None:
    run, caught = tmp_path / "run", tmp_path / "caught"
    fit(make_vae(), make_data(), run=run, **{**OPTIONS, "epochs": 1})
    path = parts(run)[part]
    if zipped:
        torch.save({"weights": Trap(caught)}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(caught)))
    with pytest.raises(ValueError, match=path.name):
        fit(make_vae(), make_data(), run=run, resume=True, **OPTIONS)
    assert not caught.exists()


@pytest.mark.parametrize("write", range(6))
@pytest.mark.parametrize("function", ["replace", "fsync", "fsync of half"])
def test_a_broken_write_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int, function: str
) -> None:
    """Breaks off at each write of the second checkpoint, half of it done."""
    whole, resumed = make_vae(), make_vae(seed=5)
    fit(whole, make_data(), run=tmp_path / "whole", **OPTIONS)
    run, count = tmp_path / "broken", [-1]
    name, _, half = function.partition(" of ")
    real = getattr(os, name)

    def breaking(*args: Any) -> Any:
        if count[0] >= 0:
            count[0] += 1
        if count[0] == write + 1:
            if half and stat.S_ISREG(os.fstat(args[0]).st_mode):
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            raise Stop
        return real(*args)

    def arm(state: State) -> None:
        if state.epoch == 2:
            count[0] = 0

    with monkeypatch.context() as patch:
        patch.setattr(os, name, breaking)
        with pytest.raises(Stop):
            fit(make_vae(), make_data(), run=run, callbacks=[arm], **OPTIONS)
    assert load_weights(run).keys() == whole.state_dict().keys()
    fit(resumed, make_data(), run=run, resume=True, **OPTIONS)
    assert same(weights(whole), weights(resumed))
    assert metrics(run) == metrics(tmp_path / "whole")
    assert len(list((run / "checkpoints").glob("step-*"))) == 1
    assert not list(run.rglob(".*"))


@pytest.mark.slow
def test_killed_at_any_moment() -> None:
    """Three runs are killed, the first in a write; all, resumed, end as if they were not."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "benchmarks/kill.py", "3"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1: killed in a write, 16 steps kept: same" in done.stdout
    assert "3 of 3 resumed runs end as the unbroken one; of" in done.stdout


def test_tied_and_strided_weights_are_kept(tmp_path: Path) -> None:
    run = Path(shutil.copytree(Path(__file__).parent / "earlier" / "run", tmp_path / "run"))
    weight = torch.randn(3, 5)
    weights = {"encoder": weight, "decoder": weight.T, "again": weight}
    run_folder.save_checkpoint(run, weights, {"step": 1}, best=True)
    kept = load_weights(run)
    assert all(torch.equal(kept[name], weights[name]) for name in weights)


def test_a_run_of_an_earlier_version_loads_and_goes_on(tmp_path: Path) -> None:
    """Two epochs under a schedule, made before the objectives had their present modules."""
    earlier = Path(__file__).parent / "earlier"
    run = Path(shutil.copytree(earlier / "run", tmp_path / "run"))
    x = torch.bernoulli(torch.full((53, 5), 0.5), generator=torch.Generator().manual_seed(0))
    vae = load(run)
    beta = ELBO(beta=Linear(length=7))
    options = {"batch_size": 11, "validation": x[:13], **QUIET}
    history = fit(vae, x, beta, run=run, epochs=3, resume=True, **options)
    assert history["epoch"] == [1, 2, 3]
    expected = load_file(earlier / "third_epoch.safetensors")
    for name, weight in load_weights(run, "last").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


def test_a_run_from_before_compilation_was_recorded_goes_on_eagerly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(Path(__file__).parent / "earlier" / "run", tmp_path / "run"))
    record = json.loads((run / "run.json").read_text())
    record["training"].pop("compile")
    (run / "run.json").write_text(json.dumps(record))

    def stop(engine: object, trainer: Any) -> None:
        raise Stop(trainer.settings.compile)

    monkeypatch.setattr("pyro_vae.processes.Engine.run", stop)
    x = torch.bernoulli(torch.full((53, 5), 0.5), generator=torch.Generator().manual_seed(0))
    options = {"batch_size": 11, "validation": x[:13], "epochs": 10**6, **QUIET}
    with pytest.raises(Stop, match="False"):
        fit(load(run), x, ELBO(beta=Linear(length=7)), run=run, resume=True, **options)


@pytest.mark.parametrize(
    ("script", "told"),
    [("/a/pyro_vae/__main__.py", "python -m pyro_vae"), ("/bin/pyro-vae", "pyro-vae")],
)
def test_a_run_says_the_command_that_made_it(
    script: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [script, "train", "--data", "a b.csv"])
    fit(make_vae(), make_data(), epochs=1, run=tmp_path / "run", **QUIET)
    made = json.loads((tmp_path / "run/run.json").read_text())["made"]
    assert made["command"] == f"{told} train --data 'a b.csv'"
