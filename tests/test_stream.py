"""Files scored in parts: kept, joined, ranked, and the same in whatever way they were made."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import Namespace
from torch.distributions import MultivariateNormal

from pyro_vae import files
from pyro_vae.__main__ import main
from pyro_vae.cli import score, stream, use
from pyro_vae.data import Data, readers
from pyro_vae.metrics import p_values

pytestmark = pytest.mark.filterwarnings("ignore:posterior collapse")
N, F = 29, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and rows to score."""
    folder = tmp_path_factory.mktemp("stream")
    random = np.random.default_rng(0)
    np.save(folder / "x.npy", random.normal(size=(61, F)))
    np.save(folder / "new.npy", random.normal(size=(N, F)))
    small = ["--encoder.hidden=[5]", "--decoder.hidden=[5]", "--latent_dim=2", "--epochs=1"]
    train = ["train", "--data", str(folder / "x.npy"), "--run", str(folder / "run"), *small]
    assert main([*train, "--likelihood=Normal", "--progress=false"]) == 0
    return folder


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of five rows, of a file that stays on disk."""
    monkeypatch.setattr(stream, "PART_ROWS", 5)
    monkeypatch.setattr(readers, "LARGE", 0)


def scored(folder: Path, out: Path, *options: str, num_samples: int = 7) -> bytes:
    """The scores of the new rows."""
    given = ["score", str(folder / "run"), str(folder / "new.npy"), "--out", str(out)]
    assert main([*given, f"--num_samples={num_samples}", "--progress=false", *options]) == 0
    return out.read_bytes()


def test_a_score_that_was_broken_off_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = scored(folder, tmp_path / "whole.csv")
    rows = [line["row"] for line in csv.DictReader(whole.decode().splitlines())]
    assert rows == [str(row) for row in range(N)]
    made: list[int] = []
    given = score.csv_lines

    def lines(rows: torch.Tensor, *others: object) -> str:
        made.append(len(rows))
        if len(made) == 3:
            raise OSError("the disk is full")
        return given(rows, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(score, "csv_lines", lines)
    out = tmp_path / "again.csv"
    command = ["score", str(folder / "run"), str(folder / "new.npy"), "--out", str(out)]
    assert main([*command, "--num_samples=7", "--progress=false"]) == 2
    error = capsys.readouterr().err
    assert "the disk is full; 2 of 5 parts are kept: the same command goes on from there" in error
    assert error.count("\n") == 1
    assert not out.exists()
    other = scored(folder, out, num_samples=5)  # of which nothing is there yet
    assert len(made) == 3 + 5
    assert other != whole
    assert not list(tmp_path.glob(".*"))


def test_what_is_there_is_not_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scored(folder, tmp_path / "whole.csv")
    calls = []
    given = score.csv_lines

    def lines(rows: torch.Tensor, *others: object) -> str:
        calls.append(int(rows[0]))
        if calls == [0, 5, 10]:
            raise KeyboardInterrupt
        return given(rows, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(score, "csv_lines", lines)
    out = tmp_path / "again.csv"
    command = ["score", str(folder / "run"), str(folder / "new.npy"), "--out", str(out)]
    assert main([*command, "--num_samples=7", "--progress=false"]) == 130
    assert scored(folder, out) == whole
    assert calls == [0, 5, 10, 10, 15, 20]


def test_of_the_rows_in_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = scored(folder, tmp_path / "a.csv")
    monkeypatch.setattr(readers, "LARGE", 2**26)
    assert scored(folder, tmp_path / "b.csv") == mapped


def test_p_values_are_uniform_under_the_model() -> None:
    torch.manual_seed(0)
    model = MultivariateNormal(torch.zeros(3), torch.diag(torch.tensor([1.0, 2.0, 5.0])))
    others = model.log_prob(model.sample(torch.Size((199,))))
    found = torch.stack([p_values(others.roll(i)[:1], others.roll(i)[1:]) for i in range(199)])
    assert found.flatten().sort().values.allclose(torch.arange(1, 200).double() / 199)
    each = torch.cat(
        [
            p_values(values[:1], values[1:])
            for values in model.log_prob(model.sample(torch.Size((2000, 20))))
        ]
    )
    counts = torch.bincount((each * 20).round().long() - 1, minlength=20)
    assert ((counts - 100) ** 2 / 100).sum() < 36.2  # 99% of chi-square with 19 degrees
    assert p_values(torch.tensor([-9.0, 0.0]), torch.tensor([-1.0, 0.0, 1.0])).tolist() == [
        0.25,
        0.75,
    ]


def test_p_values_of_a_file(folder: Path, tmp_path: Path) -> None:
    odd = np.load(folder / "new.npy")
    odd[0] = 20.0
    np.save(tmp_path / "odd.npy", odd)
    given = ["score", str(folder / "run"), str(tmp_path / "odd.npy"), "--p_values=6"]
    assert main([*given, "--num_samples=50", "--progress=false"]) == 0
    lines = list(csv.DictReader((tmp_path / "odd.scores.csv").read_text().splitlines()))
    for name in ("p_held_out", "p_simulated"):
        ranks = [float(line[name]) for line in lines]
        assert ranks[0] == min(ranks)
        assert ranks[0] == pytest.approx(1 / 7, abs=1e-6)
        assert np.mean(ranks[1:]) > 0.3
        assert set(np.round(np.multiply(ranks, 7), 4)) <= set(range(1, 8))


def test_a_file_that_is_cut(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rows = tmp_path / "cut.npy"
    rows.write_bytes((folder / "new.npy").read_bytes())
    given = score.csv_lines

    def lines(*arguments: object) -> str:
        with rows.open("rb+") as file:
            file.truncate(400)
        return given(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(score, "csv_lines", lines)
    assert main(["score", str(folder / "run"), str(rows), "--num_samples=7"]) == 2
    assert "cut.npy: expected a whole .npy file" in (error := capsys.readouterr().err)
    assert "1 of 5 parts are kept" in error


def test_64_workers_score_each_row_once_and_as_one_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PART_ROWS", 1)
    rows, whole, out = (tmp_path / name for name in ("rows.npy", "whole.csv", "out.csv"))
    np.save(rows, np.random.default_rng(1).normal(size=(67, F)))
    given = dict.fromkeys(score.RESULT_OPTIONS) | {"num_samples": 7, "p_values": 0, "seed": 0}
    given |= {"run": str(folder / "run"), "file": str(rows), "accelerator": "cpu"}
    options = Namespace(**given, progress=False, devices=1, out=str(whole))
    job: list[Any] = []
    monkeypatch.setattr(score, "stream", lambda options, out, *given: job.extend(given))
    score.score(options)
    number, key, scored, join = job
    stream.stream(options, whole, *job)
    made: list[list[int]] = [[] for _ in range(64)]
    monkeypatch.setenv("WORLD_SIZE", "64")
    for rank in np.random.default_rng(0).permutation(64).tolist():
        assert not out.exists()
        monkeypatch.setenv("RANK", str(rank))

        def run(part: int, at: torch.Tensor, rank: int = rank) -> bytes:
            made[rank] += at.tolist()
            return scored(part, at)

        stream.stream(options, out, number, key, run, join)
    assert made == [[rank, rank + 64] if rank < 3 else [rank] for rank in range(64)]
    assert out.read_bytes() == whole.read_bytes()


def test_one_process_joins_the_parts_that_several_find_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole, out = scored(folder, tmp_path / "whole.csv"), tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        patch.setattr(score, "join_scores", lambda parts, out: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scored(folder, out)
    (parts,) = tmp_path.glob(".out.csv.*.parts")
    with files.locked(parts / "lock"):
        command = ["score", str(folder / "run"), str(folder / "new.npy"), "--out", str(out)]
        assert main([*command, "--num_samples=7", "--progress=false"]) == 0
    assert "this process has done its parts" in capsys.readouterr().out
    assert not out.exists()
    assert scored(folder, out) == whole
    assert not parts.exists()


def test_the_last_part_is_joined_also_where_it_comes_while_another_process_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PART_ROWS", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "out"

    def join(parts: list[Path], to: Path) -> str:
        to.write_bytes(b"".join(part.read_bytes() for part in parts))
        return ""

    def process(rank: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        options = Namespace(devices=1, progress=False)
        stream.stream(options, out, 2, "k" * 16, lambda *_: b"x", join)

    @contextmanager
    def slow(path: Path) -> Iterator[None]:
        with files.locked(path):
            yield
            if not (path.parent / "00000001").exists():
                process(1)

    monkeypatch.setattr(stream, "locked", slow)
    process(0)
    if not any(path.is_file() for path in tmp_path.glob("*/00000001")):
        process(1)
    assert out.read_bytes() == b"xx"


def test_a_command_given_twice_at_once_ends_well(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The second makes all parts and joins them while the first makes its third."""
    out, made, done = tmp_path / "out.csv", score._score_part, []

    def slow(*given: Any) -> bytes:
        if given[-2] == 2 and not done:
            done.append(True)
            done.append(scored(folder, out))
        return made(*given)

    monkeypatch.setattr(score, "_score_part", slow)
    assert scored(folder, out) == done[1]
    assert [*tmp_path.iterdir()] == [out]
    assert f"finds all of them there writes {out}" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_share_the_parts(folder: Path, tmp_path: Path) -> None:
    alone = scored(folder, tmp_path / "b.csv")
    assert scored(folder, tmp_path / "c.csv", "--devices=2") == alone
    assert by_torchrun(folder, tmp_path) == alone


def by_torchrun(folder: Path, tmp_path: Path) -> bytes:
    """The scores of two processes that torchrun starts."""
    code = "import sys; from pyro_vae.cli import stream; stream.PART_ROWS = 5; from "
    code += "pyro_vae.__main__ import main; sys.exit(main())"
    (tmp_path / "command.py").write_text(code)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    out = tmp_path / "d.csv"
    given = ["score", str(folder / "run"), str(folder / "new.npy"), "--out", str(out)]
    subprocess.run(
        [*run, str(tmp_path / "command.py"), *given, "--num_samples=7", "--progress=false"],
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        timeout=200,
    )
    return out.read_bytes()


@pytest.mark.parametrize("ending", ["npz", "csv"])
def test_codes_in_parts(
    ending: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(path: Path, content: Iterator[bytes]) -> None:
        """Nothing else is put on the disk before."""
        assert all(part.name.isdigit() for part in tmp_path.glob(".*.parts/[!l]*"))
        files.write(path, content)

    monkeypatch.setattr(use, "write", written)
    command = ["encode", str(folder / "run"), str(folder / "new.npy"), "--out"]
    assert main([*command, str(tmp_path / f"parts.{ending}")]) == 0
    monkeypatch.setattr(stream, "PART_ROWS", 1000)
    assert main([*command, str(tmp_path / f"whole.{ending}")]) == 0
    parts, whole = (codes(tmp_path / f"{name}.{ending}") for name in ("parts", "whole"))
    assert parts.shape == (N, 4)
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    assert not list(tmp_path.glob(".*"))


def codes(path: Path) -> np.ndarray:
    """Means and scales of an encoded file."""
    if path.suffix == ".csv":
        return np.loadtxt(path, delimiter=",", skiprows=1)
    with np.load(path) as file:
        return np.concatenate([file["mean"], file["scale"]], 1)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["npy", "csv"])
def test_values_filled_in_in_parts(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def read(path: Path) -> np.ndarray:
        return np.load(path) if ending == "npy" else np.genfromtxt(path, delimiter=",")

    random = np.random.default_rng(2)
    x = np.where(random.random((N, F)) < 0.3, np.nan, random.normal(size=(N, F)))
    file = tmp_path / f"holes.{ending}"
    np.save(file, x) if ending == "npy" else np.savetxt(file, x, delimiter=",")
    small = ["--encoder.hidden=[5]", "--decoder.hidden=[5]", "--latent_dim=2", "--epochs=1"]
    train = ["train", "--data", str(file), "--run", str(tmp_path / "run"), *small]
    assert main([*train, "--likelihood=Normal", "--progress=false"]) == 0
    command = ["impute", str(tmp_path / "run"), str(file), "--draws=2", "--progress=false"]
    assert main(command) == 0
    assert f"of the values of {N} rows filled in" in capsys.readouterr().out
    found = [read(path) for path in sorted(tmp_path.glob(f"holes.imputed*.{ending}"))]
    assert len(found) == 3
    seen = ~np.isnan(x)
    for filled in found:
        assert filled.shape == (N, F)
        assert np.isfinite(filled).all()
        np.testing.assert_array_equal(filled[seen].astype(np.float32), x[seen].astype(np.float32))
    assert not np.array_equal(found[1], found[2])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds children in /proc")
def test_a_worker_that_dies_loses_its_part(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PART_ROWS", 1000)
    rows, out = tmp_path / "many.npy", tmp_path / "many.csv"
    np.save(rows, np.random.default_rng(1).normal(size=(60_000, F)))
    command = ["score", str(folder / "run"), str(rows), "--num_samples=20", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pyro_vae", *command, "--devices=2", "--no-progress"],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (made := list(tmp_path.glob(".many.csv.*.parts/0*"))) and process.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "of 60 parts are kept: the same command goes on from there" in error
    assert not out.exists()
    assert all(path.exists() for path in made)
    assert main([*command, "--progress=false"]) == 0
    lines = list(csv.DictReader(out.read_text().splitlines()))
    assert [int(line["row"]) for line in lines] == list(range(60_000))


def test_parts_of_another_version_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    data, vae = Data(torch.zeros(3, 2)), torch.nn.Linear(2, 2)
    now = stream.key_of(vae, data, {})
    assert now == stream.key_of(vae, data, {})
    monkeypatch.setattr(stream, "__version__", "another")
    assert now != stream.key_of(vae, data, {})
