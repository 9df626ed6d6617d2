"""Several processes train as one does: two of them, on CPUs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from training_cases import QUIET, make_data, make_vae, noisy_data, same, weights

from pyro_vae import build, likelihoods, networks, posteriors, priors
from pyro_vae.objectives import ELBO, BetaTC, FactorVAE, Objective
from pyro_vae.processes import Engine, Group, in_processes
from pyro_vae.training import State, dataset, fit, load_weights
from pyro_vae.training.dataset import as_dataset
from pyro_vae.training.run_folder import Settings, load_state
from pyro_vae.training.trainer import Result, Trainer
from pyro_vae.vae import VAE

OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 11, "lr": 0.01, **QUIET}


class Still(dist.Normal):
    """A Normal whose every draw is half a standard deviation above its mean."""

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return (self.loc + 0.5 * self.scale).expand(self._extended_shape(sample_shape))


class StillPosterior(posteriors.DiagonalNormal):
    """Handed its noise."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        q = super().forward(x, y).base_dist
        return Still(q.loc, q.scale).to_event(1)


def still_vae() -> VAE:
    vae = make_vae()
    vae.posterior = StillPosterior(vae.posterior.encoder, 3)
    return vae


def norm_vae() -> VAE:
    """With batch norm in its networks."""
    torch.manual_seed(0)
    encoder = networks.MLP(7, 6, (11,), norm="batch")
    decoder = networks.MLP(3, (7,), (11,), norm="batch")
    return VAE(
        priors.StandardNormal(3),
        likelihoods.Bernoulli(decoder, (7,)),
        posteriors.DiagonalNormal(encoder, 3),
    )


def train(
    group: Group,
    vae: VAE,
    objective: Objective | None = None,
    *,
    data: Any = None,
    validation: Any = None,
    run: Path | None = None,
    resume: bool = False,
    callbacks: tuple[Callable[[State], None], ...] = (),
    **changed: Any,
) -> Result:
    """`fit` in a process of a group, or in this one."""
    options = {
        "epochs": 2,
        "batch_size": 11,
        "optimizer": "Adam",
        "lr": 0.01,
        "schedule": None,
        "clip_norm": None,
        "patience": None,
        "precision": "32-true",
        "seed": 0,
        "checkpoint_every": None,
        **changed,
    }
    rows = as_dataset(make_data() if data is None else data, "data")
    held_out = None if validation is None else as_dataset(validation, "validation")
    settings, objective = Settings(**options), objective or ELBO()
    trainer = Trainer(
        vae, objective, rows, held_out, settings, run, {}, resume, callbacks, progress=False
    )
    return trainer(group)


def alone(function: Callable[..., Any]) -> Any:
    """What `function` gives in this process."""
    return Engine("cpu", 1).run(function)


def close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=tolerance, msg=name)


@patch.object(dataset, "CHUNK", 5)  # rows of a part of the validation
def with_noise_handed_in(group: Group, compile: bool = False) -> dict[str, Result]:
    """Trainings whose result does not depend on who draws what."""
    x, one = make_data(), {"epochs": 1}
    warnings.filterwarnings("error", "compile: the step runs eagerly")
    return {
        # shares of 6 and 5 rows, at last of 5 and 4
        "eager": train(group, still_vae(), validation=noisy_data(13)),
        "clipped": train(group, still_vae(), clip_norm=0.05, **one),
        "compiled": train(group, still_vae(), compile=compile or "trace", **one),
        # at last a batch of three rows: whole in both
        "remainder": train(group, still_vae(), batch_size=10, **one),
        "single rows": train(group, still_vae(), batch_size=1, data=x[:5], **one),
    }


def alike(group: Group, result: Result) -> None:
    """The ranks end with the same weights, buffers and history."""
    first, second = group.gather(result)
    assert same(first.vae, second.vae)
    assert same(first.objective, second.objective)
    for row, other in zip(first.history.rows, second.history.rows, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}


def everything(folder: Path, compile: bool, group: Group) -> dict[str, Any]:
    """All that two processes are to show, in one start of them."""
    found: dict[str, Any] = {"still": with_noise_handed_in(group, compile)}
    for result in found["still"].values():
        alike(group, result)
    first, again, other = (train(group, make_vae(), seed=seed) for seed in (0, 0, 1))
    for result in (first, train(group, norm_vae()), train(group, make_vae(), FactorVAE(width=5))):
        alike(group, result)
    assert same(first.vae, again.vae)
    assert not same(first.vae, other.vae)
    found["resumed"] = resumed(group, folder)
    found["validation"] = validated(group)
    found["more"] = train(group, still_vae(), run=folder / "one", resume=True, epochs=3)
    return found


@patch.object(dataset, "CHUNK", 5)
def validated(group: Group) -> Result:
    return train(group, make_vae(), epochs=1, lr=1e-9, validation=noisy_data(13))


def resumed(group: Group, folder: Path) -> bool:
    """Whether a run that is broken off in an epoch goes on as it would have."""
    options: dict[str, Any] = {"data": noisy_data(48), "batch_size": 12, "epochs": 3}
    options |= {"checkpoint_every": 2}
    whole = train(group, make_vae(), run=folder / "whole", **options)
    with pytest.raises(ZeroDivisionError):
        train(group, make_vae(), Breaking(7), run=folder / "broken", **options)
    again = train(group, make_vae(5), ELBO(), run=folder / "broken", resume=True, **options)
    alike(group, again)
    return same(whole.vae, again.vae)


class Breaking(ELBO):
    """Divides by zero at one step, on one rank or on all."""

    def __init__(self, at: int, rank: int | None = None) -> None:
        super().__init__()
        self.stop_at, self.rank = at, rank

    def at(self, step: int) -> None:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if step == self.stop_at and self.rank in (None, rank):
            raise ZeroDivisionError("at this step")


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes(tmp_path: Path, compile: bool) -> None:
    one = alone(lambda group: train(group, still_vae(), run=tmp_path / "one", epochs=1))
    more = alone(lambda group: train(group, still_vae(), epochs=3))
    assert one.history.final["step"] == 5
    found = Engine("cpu", 2).run(partial(everything, tmp_path, compile))
    close(more.vae, found["more"].vae)
    assert found["more"].history["epoch"] == [1, 2, 3]
    one = alone(with_noise_handed_in)
    for name, result in one.items():
        close(result.vae, found["still"][name].vae)
        for column in ("elbo", "kl", "objective", "lr", "step"):
            two = found["still"][name].history[column]
            assert two == pytest.approx(result.history[column], abs=1e-5), (name, column)
    elbos = (h["eager"].history["validation_elbo"] for h in (one, found["still"]))
    assert next(elbos) == pytest.approx(next(elbos), abs=1e-5)
    at_start = alone(lambda group: validated(group))
    two = found["validation"].history["validation_elbo"]
    assert two == pytest.approx(at_start.history["validation_elbo"], abs=1e-6)
    assert found["resumed"]
    state = load_state(tmp_path / "whole")  # both drew as many numbers
    assert state is not None
    assert not torch.equal(state["rng"]["cpu"], state["rng_of_others"][0]["cpu"])


class Note:
    """Writes down where and when it is called."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, state: State) -> None:
        with self.path.open("a") as file:
            file.write(f"{state.epoch} {os.getpid()}\n")
        if state.epoch == 2:
            state.stop()


@pytest.mark.slow
def test_fit_starts_processes_and_brings_back_what_they_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    vae, whole, run, notes = still_vae(), still_vae(), tmp_path / "run", tmp_path / "notes"
    environment, generator = dict(os.environ), torch.get_rng_state()
    history = fit(
        vae,
        make_data(),
        validation=make_data(13),
        devices=2,
        run=run,
        callbacks=[Note(notes)],
        **{**OPTIONS, "epochs": 5},
    )
    assert capfd.readouterr() == ("", "")
    assert (environment, multiprocessing.active_children()) == (dict(os.environ), [])
    assert torch.equal(generator, torch.get_rng_state())
    assert same(weights(vae), load_weights(run))
    lines = [line.split() for line in notes.read_text().splitlines()]
    assert [epoch for epoch, _ in lines] == ["1", "2"]
    assert len({pid for _, pid in lines} - {str(os.getpid())}) == 1
    assert history["epoch"] == [1, 2]
    options = {**OPTIONS, "epochs": 3}
    history = fit(vae, make_data(), validation=make_data(13), run=run, resume=True, **options)
    fit(whole, make_data(), validation=make_data(13), **options)
    assert history["epoch"] == [1, 2, 3]
    close(weights(whole), weights(vae))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:posterior collapse")
@pytest.mark.parametrize(
    "given",
    [
        {"latent_dim": [3, 2]},
        {"latent_dim": 3, "classes": 3, "label_weight": 2.0},
        {"latent_dim": [3, 2], "classes": 3, "prior": "NormalPerClass"},
    ],
)
def test_layers_and_classes_in_two_processes(given: dict[str, Any], tmp_path: Path) -> None:
    x, small = make_data(), {"class_path": "MLP", "init_args": {"hidden": [5]}}
    data = (x, torch.arange(len(x)) % 4 - 1) if "classes" in given else x
    trained = []
    for devices in (1, 2):
        torch.manual_seed(0)
        vae = build(7, encoder=small, decoder=small, **given)
        for part in vae.posterior.modules():
            if isinstance(part, posteriors.DiagonalNormal):
                part.__class__ = StillPosterior
        fit(vae, data, devices=devices, run=tmp_path / str(devices), **OPTIONS)
        trained.append(vae)
    close(*map(weights, trained), tolerance=1e-5)
    assert same(weights(trained[1]), load_weights(tmp_path / "2"))


@pytest.mark.slow
def test_an_error_of_one_process_ends_all() -> None:
    vae = make_vae()
    before = weights(vae)
    with pytest.raises(ZeroDivisionError, match="at this step"):
        fit(vae, make_data(), Breaking(3, rank=1), devices=2, **OPTIONS)
    assert same(before, weights(vae))
    assert multiprocessing.active_children() == []


def test_what_cannot_be_sent_is_named() -> None:
    with pytest.raises(ValueError, match="cannot be sent there: .*<lambda>"):
        fit(make_vae(), make_data(), callbacks=[lambda state: None], devices=2, **OPTIONS)


@pytest.mark.parametrize("devices", ["auto", 0, [], None])
def test_devices_are_a_number_or_a_list(devices: Any) -> None:
    with pytest.raises(ValueError, match="devices must be their number"):
        fit(make_vae(), make_data(), devices=devices, **OPTIONS)


def test_more_devices_than_processors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"devices=1000 .* this machine has \d+ processor"):
        fit(make_vae(), make_data(), devices=1000, **OPTIONS)
    with pytest.raises(ValueError, match=r"devices=1000 .* this machine has \d+ processor"):
        in_processes(abs, range(1000), "cpu")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"devices=\[3\], but the GPUs .* are 0 to 1"):
        Engine("cuda", [3])


def test_batch_level_objectives_say_what_they_see(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Engine, "run", stop)
    with (
        pytest.warns(UserWarning, match="BetaTC looks at whole batches; on 2 devices .* 5 rows"),
        pytest.raises(ZeroDivisionError),
    ):
        fit(make_vae(), make_data(), BetaTC(), devices=2, **OPTIONS)


def test_shares_of_a_batch() -> None:
    for rows in range(1, 12):
        index = torch.arange(rows) + 7
        parts = [Group(rank, 3).local_rows(index) for rank in range(3)]
        assert sum(weight for _, weight in parts) == pytest.approx(1)
        if rows < 6:
            assert all(torch.equal(part, index) for part, _ in parts)
        else:
            assert torch.equal(torch.cat([part for part, _ in parts]), index)
            assert [weight * rows for _, weight in parts] == pytest.approx(
                [len(p) for p, _ in parts]
            )
    part, weight = Group().local_rows(index)
    assert part is index
    assert weight == 1


def test_gradients_are_summed_by_the_weights_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat: flat.mul_(3))
    p, q = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(5))
    p.grad = gradient = torch.randn(2, 3)
    (total,) = Group(0, 3).all_reduce_mean(0.25, [p, q], torch.tensor(7.0))
    torch.testing.assert_close(p.grad, 0.75 * gradient)
    assert torch.equal(q.grad, torch.zeros(5))
    assert total == 5.25


def torchrun(*options: str) -> subprocess.Popen[str]:
    """A training on two ranks."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]
    return subprocess.Popen(
        [sys.executable, *command, "pyro_vae", "train", *options, "--no-progress"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The status of a process and what it printed."""
    out, _ = process.communicate()
    return process.returncode, out


def test_processes_that_cannot_meet_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 0}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda _: pytest.fail("waits"))
    with pytest.raises(ValueError, match="MASTER_PORT at 0.* give --master-port a free port"):
        Engine("cpu", 1).run(lambda group: None)


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--epochs=2", "--limit=40", "--accelerator=cpu", "--devices=2", "--latent_dim=2"]
    status, out = ended(torchrun(*options, f"--run={run}"))
    assert status == 0, out
    assert out.count("run in") == 1
    state = load_state(run)
    assert state is not None
    assert state["step"] == 2
    assert len(state["rng_of_others"]) == 1
    assert (run / "figures" / "curves.svg").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds children in /proc")
def test_a_rank_that_dies_loses_its_epoch_at_most(tmp_path: Path) -> None:
    options = ["--epochs=40", "--limit=40", "--accelerator=cpu", "--latent_dim=2"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert ended(torchrun(*options, f"--run={whole}"))[0] == 0
    process, metrics = torchrun(*options, f"--run={run}"), run / "metrics.csv"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert ended(process)[0] != 0
    state = load_state(run)
    assert state is not None
    assert 2 <= state["step"] < 40
    assert ended(torchrun(f"--resume={run}"))[0] == 0
    for which in ("best", "last"):
        assert same(load_weights(run, which), load_weights(whole, which))
