"""Tables with holes on the command line: train, score, encode, impute."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_vae import load, log_evidence
from pyro_vae.__main__ import main
from pyro_vae.cli.compare import check_comparable
from pyro_vae.data import load_data

pytestmark = pytest.mark.xdist_group("cli_missing")

SMALL = ["--encoder.hidden=[7]", "--decoder.hidden=[7]", "--latent_dim=1", "--progress=false"]
TRAIN = ["train", *SMALL, "--likelihood=Normal", "--epochs=2", "--data"]
FEW = "b,a,label\n,11.25,1\n-0.5,,0\n,,2\n1.125,9.5,1\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table of two columns, a third of it missing."""
    folder = tmp_path_factory.mktemp("missing")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(97, 2, generator=generator) * torch.tensor([3.0, 0.5])
    x[:, 0] += 10
    holes = torch.rand(97, 2, generator=generator) < 0.3
    lines = [
        ",".join("" if hole else f"{value:.3f}" for value, hole in zip(*row))
        for row in zip(x.tolist(), holes.tolist())
    ]
    (folder / "t.csv").write_text("\n".join(["a,b", *lines, ""]))
    assert main([*TRAIN, str(folder / "t.csv"), "--run", str(folder / "run")]) == 0
    return folder


def test_the_run_knows_that_values_are_missing(folder: Path) -> None:
    vae = load(folder / "run")
    assert vae.missing
    assert vae.posterior.encoder.in_shape == (4,)


def test_scores_are_of_what_is_observed_in_its_units(folder: Path) -> None:
    (folder / "few.csv").write_text(FEW)
    out = folder / "scores.csv"
    files = [str(folder / "run"), str(folder / "few.csv"), "--out", str(out)]
    assert main(["score", *files, "--progress=false"]) == 0
    transform = load_data(folder / "t.csv", transform="standardise").train.transform
    x = torch.tensor([[11.25, torch.nan], [torch.nan, -0.5], [torch.nan] * 2, [9.5, 1.125]])
    evidence = log_evidence(load(folder / "run"), transform(x))
    slope = torch.where(x.isnan(), 0.0, -transform.std.double().log()).sum(1)
    with out.open() as file:
        rows = list(csv.DictReader(file))
    found = [float(row["log_prob"]) for row in rows]
    assert found == pytest.approx((evidence.log_prob + slope).tolist(), abs=1e-5)
    assert found[2] == 0.0
    assert rows[2]["verdict"] == "reliable"


def test_impute_fills_a_table(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "few.csv").write_text(FEW)
    files = [str(folder / "run"), str(folder / "few.csv")]
    options = ["--draws", "11", "--num_samples", "300", "--progress=false"]
    assert main(["impute", *files, *options]) == 0
    assert "lower bound" in capsys.readouterr().out
    names = [f"few.imputed-{i:02d}.csv" for i in range(1, 12)]
    tables = [(folder / name).read_text().splitlines() for name in ["few.imputed.csv", *names]]
    given = FEW.splitlines()
    for table in tables:
        assert table[0] == given[0]
        for row, known in zip(table[1:], given[1:]):
            for cell, value in zip(row.split(","), known.split(",")):
                assert cell == value if value else float(cell) == float(cell)
    of_a = [float(table[2].split(",")[1]) for table in tables[1:]]
    assert len(set(of_a)) == 11
    assert 0 < np.mean(of_a) < 20  # in the units of the file
    assert np.std(of_a) > 0.5


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_impute_fills_arrays(folder: Path, suffix: str) -> None:
    x = np.array([[11.25, np.nan], [np.nan, np.nan]], np.float32)
    path = folder / f"array{suffix}"
    np.save(path, x) if suffix == ".npy" else np.savez(path, x=x, labels=np.array([3, 1]))
    out = folder / f"filled{suffix}"
    files = [str(folder / "run"), str(path), "--out", str(out)]
    assert main(["impute", *files, "--draws", "0", "--progress=false"]) == 0
    found = np.load(out)
    if suffix == ".npz":
        assert found["labels"].tolist() == [3, 1]
        found = found["x"]
    assert np.isfinite(found).all()
    assert found[0, 0] == 11.25
    assert not list(folder.glob("filled-*"))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,inf\n", [], "1 row(s) hold infinite values"),
        ("a,c\n1,\n", [], "expected the columns of the run"),
        ("a,b\n9,\n", ["--out=x.npz"], "out must end in .csv"),
        ("a,b\n9,\n", ["--draws=-1"], "draws must be at least 0"),
        ("a,b\n9,\n", ["--num_samples=0"], "num_samples must be at least 1"),
    ],
)
def test_bad_input_of_impute(
    folder: Path, text: str, options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    (folder / "bad.csv").write_text(text)
    assert main(["impute", str(folder / "run"), str(folder / "bad.csv"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(folder.glob("bad.imputed*"))


def test_a_column_that_is_never_observed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "".join(f"{i}.5,\n" for i in range(31)))
    assert main([*TRAIN, str(path), "--run", str(tmp_path / "run")]) == 2
    assert "or no value, in 1 of 2: 1 (from 0); remove" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_complete_rows_may_be_declared_to_lack_values(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(31, 2)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    options = [str(tmp_path / "x.npy"), "--run", str(tmp_path / "run"), "--missing"]
    assert main([*TRAIN, *options]) == 0
    assert load(tmp_path / "run").missing
    x[3, 1] = np.nan
    np.save(tmp_path / "holes.npy", x)
    files = [str(tmp_path / "run"), str(tmp_path / "holes.npy"), "--progress=false"]
    assert main(["impute", *files, "--draws=0"]) == 0
    assert np.isfinite(np.load(tmp_path / "holes.imputed.npy")).all()


def test_holes_may_not_be_declared_away(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "".join(f"{i}.5,{i or ''}\n" for i in range(31)))
    run = ["--run", str(tmp_path / "run"), "--missing=false"]
    assert main([*TRAIN, str(path), *run]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "missing=True" in error
    assert not (tmp_path / "run").exists()


def test_a_run_of_complete_rows_refuses_holes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    x = np.random.default_rng(0).normal(size=(31, 2)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    assert main([*TRAIN, str(tmp_path / "x.npy"), "--run", str(tmp_path / "run")]) == 0
    x[3, 1] = np.nan
    np.save(tmp_path / "holes.npy", x)
    capsys.readouterr()
    assert main(["score", str(tmp_path / "run"), str(tmp_path / "holes.npy")]) == 2
    assert "first [3] (from 0): repair or remove them, or give the VAE missing=True" in (
        capsys.readouterr().err
    )
    vae = load(tmp_path / "run")
    splits = {name: load_data(tmp_path / f"{name}.npy") for name in ("x", "holes")}
    loaded = {name: (vae, parts) for name, parts in splits.items()}
    with pytest.raises(ValueError, match="have other rows, or other values missing"):
        check_comparable("x", "holes", loaded, "train")
