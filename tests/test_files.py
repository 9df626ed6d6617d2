"""Files: whole or absent, held to their digests, and one process to a run."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pyro_vae import build, files, fit, load
from pyro_vae.__main__ import main
from pyro_vae.estimators import Evidence
from pyro_vae.training import load_weights
from pyro_vae.training.run_folder import load_state

QUIET: dict[str, Any] = {"accelerator": "cpu", "progress": False, "batch_size": 11}


def trained(run: Path, epochs: int = 1, resume: bool = False, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    vae = build(5, 2, encoder=MLP, decoder=MLP)
    x = torch.bernoulli(torch.full((53, 5), 0.5), generator=torch.Generator().manual_seed(0))
    options = {**QUIET, "validation": x[:13], **options}
    fit(vae, x, run=run, epochs=epochs, resume=resume, **options)
    return vae


MLP = {"class_path": "MLP", "init_args": {"hidden": [7]}}


pytestmark = pytest.mark.xdist_group("files")  # they share a run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    trained(run)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def evidence() -> Evidence:
    columns = {name: torch.rand(7) for name in ("log_prob", "stderr", "ess", "khat")}
    samples = torch.full((7,), 100)
    words = ["<script>alert(1)</script>"] * 7
    return Evidence(**columns, num_samples=samples, method=words, verdict=words)


def without_digests(run: Path) -> None:
    """As an older version left it."""
    path = run / "checkpoints/current.json"
    pointers = json.loads(path.read_text())
    pointers.pop("sha256")
    path.write_text(json.dumps(pointers))


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "evidence.safetensors"])
def test_every_flipped_bit_is_noticed(name: str, run: Path) -> None:
    evidence().save(run / "evidence.safetensors")
    (path,) = run.rglob(name)
    data, random_bits = path.read_bytes(), random.Random(0)
    readers = {
        "weights.safetensors": lambda: load_weights(run),
        "state.pt": lambda: load_state(run),
        "evidence.safetensors": lambda: Evidence.load(path),
    }
    assert readers[name]()
    for bit in random_bits.sample(range(8 * len(data)), 211):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=path.name):
            readers[name]()


def test_runs_without_digests_load_and_go_on(run: Path, tmp_path: Path) -> None:
    without_digests(run)
    assert load(run)
    resumed, unbroken = trained(run, 3, resume=True), trained(tmp_path / "unbroken", 3)
    known = json.loads((run / "checkpoints/current.json").read_text())
    assert known["last"] in known["sha256"]
    for name, weight in unbroken.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, rtol=0, atol=0)
    assert load(run)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float16, torch.complex64])
def test_weights_are_not_cast(dtype: torch.dtype, run: Path) -> None:
    without_digests(run)
    (path,) = run.rglob("weights.safetensors")
    save_file({name: weight.to(dtype) for name, weight in load_file(path).items()}, path)
    for use in (lambda: load(run), lambda: trained(run, 2, resume=True)):
        with pytest.raises(ValueError, match=f"do not fit: .* is {dtype}, not torch.bool"):
            use()


def test_a_run_in_double_precision_loads_and_goes_on_exactly(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run, precision="64-true")
    loaded = load(run)
    assert loaded.encode(torch.rand(3, *loaded.likelihood.data_shape).double()).mean.dtype == (
        torch.float64
    )
    unbroken = trained(tmp_path / "unbroken", 3, precision="64-true").state_dict()
    resumed = trained(run, 3, resume=True, precision="64-true").state_dict()
    assert torch.float64 in {weight.dtype for weight in resumed.values()}
    assert all(torch.equal(weight, resumed[name]) for name, weight in unbroken.items())


def test_a_state_that_does_not_fit_is_refused(run: Path) -> None:
    without_digests(run)
    (path,) = run.rglob("state.pt")
    state = torch.load(path, weights_only=True)
    adam, row = state["optimizer"], state["history"]["rows"][0]
    for changed in (
        {"epoch": 10**6},
        {"epoch": 0, "history": {"rows": [], "num_units": 2}},
        {"step": 3},
        {"rng": {}},
        {"history": {"rows": [{"x": 1}], "num_units": 2}},
        {"optimizer": {}},
        {"optimizer": {**adam, "state": {0: {"step": 1, "exp_avg": torch.ones(3)}}}},
        {"optimizer": {**adam, "state": {0: {"step": torch.ones(())}}}},
        {"optimizer": {**adam, "state": {99: {}}}},
        {"optimizer": {**adam, "param_groups": [{**adam["param_groups"][0], "lr": "x"}]}},
        {"optimizer": {**adam, "param_groups": [{**adam["param_groups"][0], "amsgrad": True}]}},
        {"history": {"rows": [{**row, "elbo": "x"}], "num_units": 2}},
        {"history": {"rows": [{**row, "elbo": None}], "num_units": 2}},
        {"history": {"rows": [row], "num_units": []}},
        {"step": 3, "offset": 3, "epoch": 0, "history": {"rows": [], "num_units": 2}},
        {"step": 3, "offset": 3, "epoch": 0, "history": {"rows": [], "num_units": 2}}
        | {"sums": torch.ones(7, dtype=torch.float64)},
        {"step": -1, "offset": -6},
    ):
        torch.save({**state, **changed}, path)
        with pytest.raises(ValueError, match=r"state\.pt|the state of run"):
            trained(run, 2, resume=True)


def test_an_edited_transform_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--encoder.hidden=[7]", "--decoder.hidden=[7]", "--limit=53", "--progress=false"]
    assert main(["train", *small, "--epochs=1", "--run=run"]) == 0
    np.savez("x.npz", x=np.zeros((2, 1, 8, 8), np.uint8))
    assert main(["score", "run", "x.npz", "--progress=false"]) == 0
    text = Path("run/data.json").read_text()
    assert '"at": 8.0' in text
    Path("run/data.json").write_text(text.replace('"at": 8.0', '"at": -5.0'))
    capsys.readouterr()
    for command in (["score", "run", "x.npz"], ["encode", "run", "x.npz"], ["evaluate", "run"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "data.json is damaged" in error
        assert "in run.json" in error


def test_what_evidence_shows_in_a_notebook_is_escaped() -> None:
    shown = evidence()._repr_html_()
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown


def test_a_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    files.write(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'$"):
        files.write(path, "new")
    assert [(p, p.read_text()) for p in tmp_path.iterdir()] == [(path, "old")]


def test_a_full_disk_is_said_with_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = os.replace

    def full(source: Path, target: Path) -> None:
        if "step-" in str(target.parent):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    run = tmp_path / "run"
    small = ["--encoder.hidden=[7]", "--decoder.hidden=[7]", "--limit=53", "--progress=false"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert main(["train", *small, "--epochs=2", f"--run={run}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert "weights.safetensors" in line
    assert line.endswith(f"go on with: pyro-vae train --resume {run}")
    assert main(["train", "--resume", str(run), "--progress=false"]) == 0
    assert not list(run.rglob(".*"))


def test_a_second_training_of_a_run_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with files.locked(run / "lock"):
        with pytest.raises(ValueError, match="is being written by another process"):
            trained(run, 2, resume=True)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    new = tmp_path / "runs" / "new"
    with files.locked(new / "train.lock"):
        assert main(["train", "--limit=53", "--epochs=1", f"--run={new}"]) == 2
        assert [path.name for path in new.iterdir()] == ["train.lock"]
    assert f"{new} is being written by another process" in capsys.readouterr().err
    assert not new.parent.exists()


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from pyro_vae.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    path = tmp_path / "run" / "lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="another process"), files.locked(path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with files.locked(path):
        assert path.exists()
    assert not path.parent.exists()


def test_a_run_folder_that_vanishes_ends_the_training(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=f"{run} was removed or renamed"):
        trained(run, 3, callbacks=[lambda state: shutil.rmtree(run)])
    assert not run.exists()
