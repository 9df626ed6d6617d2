"""The command line: what a person types, on real files, and what they get for a mistake."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import Namespace

from pyro_vae import build, importance_sampling, load, log_evidence, plots
from pyro_vae.__main__ import main
from pyro_vae.cli.compare import check_comparable
from pyro_vae.cli.figures import KlParts, layer_lines, lower_layers_at_mean
from pyro_vae.cli.folder import CHECKED_ROWS, check_support, destination, load_run
from pyro_vae.cli.score import estimate
from pyro_vae.cli.train import _run_folder
from pyro_vae.data import Data, Dequantise, Splits, load_data, spread, tables
from pyro_vae.metrics import elbo_decomposition
from pyro_vae.training import State, load_weights

SMALL = ["--encoder.hidden=[11]", "--decoder.hidden=[11]", "--latent_dim=3", "--progress=false"]


pytestmark = pytest.mark.xdist_group("cli")  # they share a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    options = ["--prior", "MixtureOfGaussians", "--prior.num_components", "3", "--epochs", "3"]
    assert main(["train", *SMALL, *options, "--limit", "211", "--run", str(folder)]) == 0
    return folder


def test_run_folder_holds_its_declaration_and_figures(run: Path) -> None:
    declared = yaml.safe_load((run / "config.yaml").read_text())
    assert declared["prior"]["class_path"] == "MixtureOfGaussians"
    assert declared["prior"]["init_args"] == {"num_components": 3}
    assert declared["transform"] == "threshold"
    names = {path.name for path in (run / "figures").iterdir()}
    assert names == {
        "curves.svg", "latent.svg", "parts.svg", "reconstructions.png", "sample_means.png",
        "samples.png",
    }  # fmt: skip


def test_a_loaded_vae_is_in_eval_mode(run: Path) -> None:
    assert not any(module.training for module in load(run).modules())


def test_evaluate_reports_what_the_estimators_give(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--num_samples", "101", "--limit", "13", "--progress", "false"]
    assert main(["evaluate", str(run), *options]) == 0
    numbers = json.loads((run / "evaluation.json").read_text())
    data = load_data("digits", transform="threshold", limit=211).test
    x, _ = data.subset(spread(len(data), 13, 0)).fixed().batch(torch.arange(13))
    vae = load(run)
    plain = importance_sampling(vae.model, vae.guide, x, num_samples=101)
    evidence = log_evidence(vae.model, vae.guide, x)
    assert numbers["encoder_bound"] == pytest.approx(plain.mean(), abs=1e-6)
    assert numbers["log_prob"] == pytest.approx(evidence.mean(), abs=1e-6)
    assert numbers["rows"] == 13
    bound = numbers["log_prob"] - numbers["elbo"]
    assert numbers["inference_gap"] == pytest.approx(bound, abs=1e-6)
    with torch.no_grad():
        posterior = vae.encode(data.fixed().batch(torch.arange(len(data)))[0])
    parts = elbo_decomposition(posterior, vae.prior())
    assert numbers["total_correlation"] == pytest.approx(parts.total_correlation.value)
    assert numbers["mutual_information"] == pytest.approx(parts.mutual_information.value)
    whole = parts.total_correlation.value + parts.dimension_wise_kl.value
    assert numbers["aggregate_kl"] == pytest.approx(whole)
    assert numbers["kl"] == pytest.approx(numbers["mutual_information"] + whole, abs=0.5)
    printed = " ".join(capsys.readouterr().out.split())
    assert "13 of 180 rows of the test part, spread over it (seed 0)" in printed
    assert "KL(q(z) || p(z))" in printed
    assert "dimension-wise" not in printed  # the prior is a mixture
    assert numbers["bits_per_dim"] == pytest.approx(-evidence.mean() / 64 / math.log(2))
    assert numbers["elbo"] == pytest.approx(numbers["reconstruction"] - numbers["kl"], abs=1e-6)


@pytest.mark.parametrize("command", ["evaluate", "compare"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--accelerator", "cuda"], "accelerator cuda was asked for; this machine has no GPU"),
        (["--chunk_size", "0"], "chunk_size must be at least 1"),
        (["--devices", "1000"], "devices=1000 were asked for; this machine has"),
    ],
)
def test_where_and_how_much_at_once(
    command: str,
    options: list[str],
    words: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    shutil.copytree(run, tmp_path / "twin")
    runs = [str(run), str(tmp_path / "twin")][: 1 + (command == "compare")]
    assert main([command, *runs, "--limit", "3", "--progress", "false", *options]) == 2
    assert words in capsys.readouterr().err


def test_parts_of_the_kl_are_kept_for_each_epoch(run: Path) -> None:
    with (run / "parts.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    data = load_data("digits", transform="threshold", limit=211).validation.fixed()
    last = load(run)
    last.load_state_dict(load_weights(run, "last"))
    with torch.no_grad():
        posterior = last.encode(data.batch(torch.arange(len(data)))[0])
    parts = elbo_decomposition(posterior, last.prior(), num_rows=len(data))
    for name in ("mutual_information", "total_correlation", "dimension_wise_kl"):
        assert rows[-1][name] == pytest.approx(getattr(parts, name).value, rel=1e-5)


def test_sample_writes_original_units(run: Path) -> None:
    assert main(["sample", str(run), "--size", "7", "--seed", "5"]) == 0
    first = np.load(run / "samples.npz")["x"]
    assert first.shape == (7, 1, 8, 8)
    assert set(np.unique(first)) <= {0.0, 16.0}
    assert main(["sample", str(run), "--size", "7", "--seed", "5"]) == 0
    assert np.array_equal(first, np.load(run / "samples.npz")["x"])
    assert main(["encode", str(run), str(run / "samples.npz")]) == 0  # they are data again


@pytest.mark.parametrize("suffix", [".npz", ".csv"])
def test_encode_writes_posterior_means_and_scales(run: Path, tmp_path: Path, suffix: str) -> None:
    x = load_data("digits").test.x[:17]
    np.savez(tmp_path / "own.npz", x=x.numpy())
    out = tmp_path / f"codes{suffix}"
    assert main(["encode", str(run), str(tmp_path / "own.npz"), "--out", str(out)]) == 0
    q = load(run).encode((x >= 8).float())
    expected = torch.cat([q.mean, q.stddev], 1).detach().numpy()
    if suffix == ".npz":
        codes = np.load(out)
        found = np.concatenate([codes["mean"], codes["scale"]], 1)
    else:
        with out.open() as file:
            head, *rows = csv.reader(file)
        assert head == ["mean0", "mean1", "mean2", "scale0", "scale1", "scale2"]
        found = np.array(rows, dtype=float)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_score_gives_each_row_in_the_units_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    x = torch.randn(97, 2, generator=torch.Generator().manual_seed(0)) * 3 + 10
    np.save(tmp_path / "x.npy", x.numpy())
    run = tmp_path / "run"
    options = ["--data", str(tmp_path / "x.npy"), "--likelihood", "Normal", "--epochs", "2"]
    assert main(["train", *SMALL, *options, "--run", str(run)]) == 0
    np.save(tmp_path / "few.npy", x[:5].numpy())
    out = tmp_path / "scores.csv"
    files = [str(run), str(tmp_path / "few.npy"), "--out", str(out), "--progress", "false"]
    capsys.readouterr()
    assert main(["score", *files]) == 0
    printed = capsys.readouterr().out
    assert main(["score", files[0], str(tmp_path / "none.npy"), *files[2:]]) == 2
    assert "expected a file or folder at" in capsys.readouterr().err
    with out.open() as file:
        rows = list(csv.DictReader(file))
    np.savez(tmp_path / "few.npz", x=x[:5].numpy(), y=np.ones((5, 1)))  # y of other models
    again = tmp_path / "again.csv"
    assert main(["score", str(run), str(tmp_path / "few.npz"), "--out", str(again)]) == 0
    assert again.read_text() == out.read_text()
    transform = load_data(tmp_path / "x.npy", transform="standardise").train.transform
    vae = load(run)
    evidence = log_evidence(vae.model, vae.guide, transform(x[:5]))
    expected = evidence.log_prob + transform.log_jacobian((2,))
    found = [float(row["log_prob"]) for row in rows]
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
    assert [row["verdict"] for row in rows] == evidence.verdict
    assert f"log p(x) = {sum(found) / 5:.2f} +- " in printed
    assert main(["evaluate", str(run), "--limit", "3", "--progress", "false"]) == 0
    numbers = json.loads((run / "evaluation.json").read_text())
    in_units = numbers["log_prob"] + transform.log_jacobian((2,))
    assert re.search(rf"data's units\W+{in_units:.2f} ", capsys.readouterr().out)
    assert numbers["bits_per_dim"] == pytest.approx(-in_units / 2 / math.log(2), abs=1e-6)
    assert [int(row["row"]) for row in rows] == list(range(5))


def test_compare_pairs_the_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = tmp_path / "other"
    options = ["--limit", "211", "--epochs", "1", "--run", str(other)]
    assert main(["train", *SMALL, *options]) == 0
    capsys.readouterr()
    estimator = ["--limit", "7", "--progress", "false"]
    assert main(["compare", str(run), str(other), *estimator]) == 0
    printed = capsys.readouterr().out
    data = load_data("digits", transform="threshold", limit=211).test
    x, _ = data.subset(spread(len(data), 7, 0)).fixed().batch(torch.arange(7))
    one, two = (log_evidence(vae.model, vae.guide, x).log_prob for vae in (load(run), load(other)))
    error = (one - two).std().item() / 7**0.5
    mean = (one - two).mean().item()
    first, second = (run, other) if mean > 0 else (other, run)
    said = " ".join(printed.split())
    by = f"by {abs(mean):.2f} +- {error:.2g} nats per datum"
    assert by in said
    assert (f"{first} is better than {second} {by}" in said) is (abs(mean) >= 2 * error)
    assert "what differs between them" in said
    third = tmp_path / "third"
    options = ["--limit", "53", "--epochs", "1", "--run", str(third)]
    assert main(["train", *SMALL, *options]) == 0
    assert main(["compare", str(run), str(third), *estimator]) == 2
    assert "have other rows" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_compare_takes_the_same_rows_and_noise_of_runs_of_other_split_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(0).integers(0, 256, (61, 2, 2), np.uint8)
    np.savez(tmp_path / "x.npz", x=x, x_test=x[:31])
    runs, seen = [str(tmp_path / seed) for seed in "01"], []
    options = ["--data", str(tmp_path / "x.npz"), "--transform=static", "--epochs=1"]
    for run in runs:
        split = ["--split_seed", Path(run).name, "--run", run]
        assert main(["train", *SMALL, *options, *split, "--validation=7"]) == 0

    def spied(vae: Any, data: Any, options: Any) -> Any:
        seen.append(data.batch()[0])
        return estimate(vae, data, options)

    monkeypatch.setattr("pyro_vae.cli.compare.estimate", spied)
    assert main(["compare", *runs, "--limit=7", "--progress=false"]) == 0
    assert torch.equal(*seen)


def test_a_mass_and_a_density_do_not_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    x = np.random.default_rng(0).poisson(3.0, (97, 3)).astype(np.int64)
    np.savez(tmp_path / "x.npz", x=x)
    runs = [str(tmp_path / name) for name in ("Poisson", "Normal")]
    for run in runs:
        options = ["--data", str(tmp_path / "x.npz"), "--likelihood", Path(run).name]
        assert main(["train", *SMALL, *options, "--epochs", "3", "--run", run]) == 0
    assert main(["compare", *runs, "--progress", "false"]) == 2
    assert "probability of whole numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (("Categorical", "none"), ("Beta", "dequantise"), None),
        (("Beta", "dequantise"), ("ContinuousBernoulli", "dequantise"), None),
        (("Normal", "rescale"), ("ContinuousBernoulli", "rescale"), None),
        (("Normal", "rescale"), ("Normal", "dequantise"), "whole numbers"),
        (("Bernoulli", "threshold"), ("Bernoulli", "threshold"), None),
        (("Bernoulli", "threshold"), ("Categorical", "none"), "binarised"),
    ],
)
def test_a_dequantised_density_stands_for_a_mass(
    first: tuple[str, str], second: tuple[str, str], words: str | None
) -> None:
    loaded = {}
    for name, (likelihood, transform) in zip("ab", (first, second)):
        options = {"levels": 17} if likelihood == "Categorical" else {}
        vae = build((1, 8, 8), 2, likelihood={"class_path": likelihood, "init_args": options})
        loaded[name] = vae, load_data("digits", transform=transform, limit=31)
    refused = pytest.raises(ValueError, match=f"b and a do not compare: .*{words}")
    with refused if words else nullcontext():
        check_comparable("a", "b", loaded, "test")


def test_counts_given_their_total_do_not_compare_with_others() -> None:
    x, loaded = torch.poisson(torch.full((31, 5), 3.0)), {}
    for name, library in (("a", "observed"), ("b", "none")):
        options = {"class_path": "Poisson", "init_args": {"library": library}}
        vae = build((5,), 2, likelihood=options)
        loaded[name] = vae, Splits(*[Data(x)] * 3, name="counts")
    words = r"b and a do not compare: a log p\(x | its total\), b log p\(x\)$"
    with pytest.raises(ValueError, match=words.replace("|", r"\|")):
        check_comparable("a", "b", loaded, "test")


def test_plot_draws_again(run: Path) -> None:
    (run / "figures/curves.svg").unlink()
    assert main(["plot", str(run)]) == 0
    assert (run / "figures/curves.svg").stat().st_size > 10_000


def test_a_run_can_be_made_again_from_its_configuration(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    options = ["--config", str(run / "config.yaml"), "--run", str(again), "--progress", "false"]
    assert main(["train", *options]) == 0
    first, second = load(run).state_dict(), load(again).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resume_goes_on_as_if_never_stopped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SMALL, "--limit", "101"]
    assert main(["train", *options, "--epochs", "3", "--run", str(whole)]) == 0
    assert main(["train", *options, "--epochs", "1", "--run", str(parts)]) == 0
    assert main(["train", "--resume", str(parts), "--epochs", "3", "--progress", "false"]) == 0
    first, second = load(whole).state_dict(), load(parts).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "parts.csv").read_text() == (parts / "parts.csv").read_text()
    assert "trained 3 of 3 epochs; weights" in capsys.readouterr().out
    assert main(["train", "--resume", str(parts), "--epochs", "2", "--progress", "false"]) == 0
    assert "trained 3 epochs; weights" in capsys.readouterr().out
    drawn = {path.name for path in (parts / "figures").iterdir()}
    assert {"traversals.png", "unit_kl.svg", "parts.svg"} <= drawn
    with (parts / "parts.csv").open() as file:
        last = {key: float(value) for key, value in list(csv.DictReader(file))[-1].items()}
    with (parts / "metrics.csv").open() as file:
        kl = float(list(csv.DictReader(file))[-1]["validation_kl"])
    assert sum(last[f"kl_z{d}"] for d in range(3)) == pytest.approx(kl, rel=1e-4)


def test_a_resolution_is_in_the_units_of_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(5, 3, (40, 3)).round(1))
    train = ["train", "--data", str(tmp_path / "x.npy"), "--likelihood", "Normal"]
    train += ["--likelihood.resolution", "0.1", "--epochs", "1", "--latent_dim", "2"]
    assert main([*train, "--run", str(tmp_path / "run"), "--progress", "false"]) == 0
    assert "transform none" in capsys.readouterr().out
    assert main([*train, "--transform", "standardise"]) == 2
    assert "a resolution is in the units of the data" in capsys.readouterr().err


def test_table_from_a_csv_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_columns = []
    monkeypatch.setattr(
        "pyro_vae.plots.columns", lambda *args: drawn_columns.append(args) or plots.latent(args[0])
    )
    table = torch.randn(97, 3, generator=torch.Generator().manual_seed(0)) * 5 + 100
    lines = ["a,b,c", *(",".join(f"{v:.6f}" for v in row) for row in table.tolist())]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    run = tmp_path / "run"
    options = ["--data", str(tmp_path / "table.csv"), "--likelihood", "Normal", "--epochs", "2"]
    scale = ["--likelihood.scale", "learned"]
    assert main(["train", *SMALL, *options, *scale, "--run", str(run)]) == 0
    ((rows, draws, names),) = drawn_columns
    train = load_data(tmp_path / "table.csv").train
    assert names == ("a", "b", "c")
    torch.testing.assert_close(rows, train.x)
    assert draws.shape == rows.shape
    assert torch.all((draws.mean(0) - 100).abs() < 5)
    assert yaml.safe_load((run / "config.yaml").read_text())["transform"] == "standardise"
    assert main(["sample", str(run), "--size", "1000"]) == 0
    drawn = np.load(run / "samples.npz")["x"]
    assert np.all(np.abs(drawn.mean(0) - 100) < 5)  # original units, not standardised ones


@pytest.mark.filterwarnings("ignore:posterior collapse")  # the label says enough of 53 rows
def test_conditional_run_draws_one_class(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    options = ["--conditional", "true", "--limit", "53", "--epochs", "1", "--precision=64-true"]
    assert main(["train", *SMALL, *options, "--run", str(run)]) == 0
    assert "conditional on y of length 10" in capsys.readouterr().out
    vae = load(run)
    assert vae.posterior.encoder.condition_dim == vae.likelihood.decoder.condition_dim == 10
    assert main(["sample", str(run), "--label", "7", "--size", "5"]) == 0
    assert main(["sample", str(run), "--label", "10"]) == 2
    assert "label must be one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; got 10" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "expected"), [([], 17), (["--likelihood.levels", "23"], 23)])
def test_levels_are_those_given_or_the_data_s(
    given: list[str], expected: int, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ["--likelihood", "Categorical", *given, "--limit", "53", "--epochs", "1"]
    assert main(["train", *SMALL, *options, "--run", str(run)]) == 0
    assert load(run).likelihood.levels == expected


def test_refused_resume_leaves_the_declaration(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    assert main(["train", *SMALL, "--limit", "53", "--epochs", "1", "--run", str(run)]) == 0
    before = (run / "config.yaml").read_text()
    assert main(["train", "--resume", str(run), "--lr", "0.01", "--epochs", "2"]) == 2
    assert "lr was 0.001" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == before
    again = ["--epochs", "2", "--progress", "false"]
    assert main(["train", "--resume", str(run), *again]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["epochs"] == 2


def test_rows_of_another_shape_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((5, 3), np.float32))
    for command in ("encode", "score"):
        assert main([command, str(run), str(tmp_path / "x.npy")]) == 2
        assert "rows of shape (3,)" in capsys.readouterr().err


def test_a_run_is_named_after_the_folder_of_its_data_also_where_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run_folder(Namespace(run=None, data=".")) == Path(f"runs/{tmp_path.name.lower()}-1")


def test_results_lie_beside_the_folder_of_the_rows_also_where_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images/cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "images/cats")
    beside = {".": "images/cats.csv", "..": "images.csv", "../cats/": "images/cats.csv"}
    for given, name in beside.items():
        assert destination(None, ".csv", (".csv",), given).resolve() == tmp_path / name


def test_own_class_by_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_prior.py").write_text(
        "from pyro_vae.priors import Prior, StandardNormal\n"
        "class Shifted(Prior):\n"
        "    def __init__(self, latent_dim, shift: float = 1.0):\n"
        "        super().__init__()\n"
        "        self.base, self.shift = StandardNormal(latent_dim), shift\n"
        "    def forward(self, y=None):\n"
        "        return self.base(y)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    options = ["--import", "own_prior", "--prior", "Shifted", "--prior.shift", "2.5"]
    run = tmp_path / "run"
    assert (
        main(["train", *SMALL, *options, "--limit", "53", "--epochs", "1", "--run", str(run)]) == 0
    )
    assert load(run).prior.shift == 2.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prior", "VampPrio"], "did you mean 'VampPrior'"),
        (["--prior", "VampPrior", "--prior.num_component", "3"], "did you mean 'num_components'"),
        (["--prior.num_components", "3"], "StandardNormal has no option 'num_components'"),
        (["--data", "mnst"], "did you mean"),
        (["--data", "nothing.csv"], "expected a file"),
        (
            ["--transform", "none"],
            "likelihood Bernoulli needs data in {0, 1}; got values in [0, 16]",
        ),
        (["--transform", "thresh"], "did you mean 'threshold'"),
        (["--objective", "ELB"], "did you mean 'ELBO'"),
        (["--objective.beta", "-1"], "beta must be zero or more"),
        (["--optimizer", "Adamm"], "Adam"),
        (["--config", "nothing.yaml"], "nothing.yaml cannot be read: No such file or directory\n"),
        (["--resume", "nothing"], "nothing cannot be resumed: it has no config.yaml"),
        (["--resume"], "argument --resume: expected one argument"),
        (["--latent_dim", "0"], "latent_dim must be at least 1; got 0"),
        (["--latent_dimm", "3"], "there is no option --latent_dimm, did you mean '--latent_dim'?"),
        (["--latent_dimm=3"], "there is no option --latent_dimm, did you mean '--latent_dim'?"),
        (["--priors.num_components", "3"], "no option --priors, did you mean '--prior'?"),
        (["--epochs", "many"], "epochs must be a whole number; got many"),
        (["--encoder.hidden", "3,5"], "hidden must be a list such as [300,300]; got 3,5"),
        (["stray"], "unrecognized arguments: stray"),
        (["--encoder", "ConvTranspose"], "ConvTranspose needs an image"),
        (["--lr", "-1"], "lr must be positive"),
        (["--lr", ""], "lr must be a number; got ''"),
        (["--prior={VampPrior: {5: 6}}"], "prior VampPrior has no option 5: it has num_comp"),
        (["--prior=FlowPrior", "--prior.flow=CNF"], "zuko's CNF is not made of transforms"),
        ([f"--prior={'[' * 5000}"], "prior '[[[["),
        (
            ["--objective.beta=Linear"],
            "schedule Linear: the following arguments are required: len",
        ),
        (["--resume=a", "--resume=b"], "b cannot be resumed: it has no config.yaml"),
        (["--accelerator", "cuda"], "accelerator cuda was asked for; this machine has no GPU"),
        (["--matmul", "low"], "matmul must be highest or high or medium; got low"),
        (["--limit", "x"], "limit must be a whole number or null; got x"),
    ],
)
def test_mistakes_are_one_clear_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["train", *SMALL, "--epochs", "1", *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert len(printed) < 1100
    assert not list(tmp_path.iterdir())


def test_a_command_that_lacks_an_argument_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate"]) == 2
    assert main(["evaluate", "run", "--limt", "3"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "pyro-vae evaluate: the following arguments are required: run",
        "pyro-vae evaluate: there is no option --limt, did you mean '--limit'?: see "
        "pyro-vae evaluate --help",
    ]


def test_an_error_inside_a_program_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_box.py").write_text(
        "import pyro.distributions as dist, torch\n"
        "from pyro_vae.priors import Prior\n"
        "class Box(Prior):\n"
        "    def __init__(self, latent_dim):\n"
        "        super().__init__()\n"
        "        self.register_buffer('edge', torch.ones(latent_dim))\n"
        "    def forward(self, y=None):\n"
        "        return dist.Uniform(-self.edge, self.edge).to_event(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    options = ["--import", "own_box", "--prior", "Box", "--limit", "53", "--epochs", "1"]
    assert main(["train", *SMALL, *options]) == 2
    printed = capsys.readouterr().err
    assert "prior Box has no density at latents that posterior DiagonalNormal draws" in printed
    assert printed.index("\n") == len(printed) - 1
    assert "Trace Shapes" not in printed


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(
    run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(*_: object) -> None:
        warnings.warn("of two\nlines", UserWarning, stacklevel=1)

    before = warnings.showwarning
    monkeypatch.setattr("pyro_vae.cli.figures.plot", warn)
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().err == "warning: of two lines\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")]
)
def test_memory_that_does_not_suffice_is_one_line(
    error: Exception, run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("pyro_vae.cli.figures.plot", fail)
    assert main(["plot", str(run)]) == 2
    assert capsys.readouterr().err.startswith("pyro-vae plot: this takes more memory than there")


def stop_in(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C once the parts of the KL of an epoch have been measured, as by a person."""

    def stop(self: KlParts, state: State) -> None:
        if state.epoch == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(KlParts, "__call__", stop)


def test_an_interrupted_training_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SMALL, "--limit", "101", "--epochs"]
    assert main(["train", *options, "3", "--run", str(whole)]) == 0
    with monkeypatch.context() as patch:
        stop_in(1, patch)
        assert main(["train", *options, "3", "--run", str(parts)]) == 130
    (line,) = capsys.readouterr().err.split("\n")[1:-1]
    go_on = "pyro-vae train: interrupted; go on with: pyro-vae train --resume "
    assert line == go_on + str(parts)
    assert main(line.removeprefix(go_on.partition("pyro-vae train --resume")[0]).split()[1:]) == 0
    first, second = load(whole).state_dict(), load(parts).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with monkeypatch.context() as patch:
        stop_in(4, patch)
        assert main(["train", "--resume", str(parts), "--epochs", "5"]) == 130
    assert yaml.safe_load((parts / "config.yaml").read_text())["epochs"] == 5


def test_an_interrupted_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["pyro_vae.cli.train"], "fit", stop)
    assert main(["train", *SMALL, "--limit", "53", "--run", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "\npyro-vae train: interrupted\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:posterior collapse")  # with these learning rates
@pytest.mark.filterwarnings("ignore:training ended at an ELBO")
def test_training_says_what_was_chosen_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options = [*SMALL, "--limit", "53", "--epochs", "7", "--run"]
    assert main(["train", *options, str(tmp_path / "run"), "--lr", "0.1"]) == 0
    first, last, _ = capsys.readouterr().out.splitlines()[-3:]
    assert first == (
        "digits: 53 train, 53 validation, 53 test rows; transform threshold, which fits Bernoulli"
    )
    with (tmp_path / "run/metrics.csv").open() as file:
        elbos = [float(row["validation_elbo"]) for row in csv.DictReader(file)]
    best = elbos.index(max(elbos))
    assert last == (
        f"trained 7 of 7 epochs; weights of epoch {best + 1} kept, "
        f"validation ELBO {elbos[best]:.2f} nats"
    )
    early = ["--lr", "10", "--patience", "1", "--transform", "threshold"]
    assert main(["train", *options, str(tmp_path / "early"), *early]) == 0
    first, last, _ = capsys.readouterr().out.splitlines()[-3:]
    assert first.endswith("transform threshold")
    assert re.match(r"trained [2-6] of 7 epochs, for the bound had stopped rising;", last)


def test_options_win_over_a_configuration_before_or_after_them(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "c.yaml").write_text("epochs: 7\nlr: 0.5\nprior: VampPrior\n")
    options = ["--epochs", "3", "--prior.num_components=5"]
    for given in (["--config", str(tmp_path / "c.yaml")], [f"--config={tmp_path / 'c.yaml'}"]):
        for argv in ([*options, *given], [*given, *options]):
            with pytest.raises(SystemExit):
                main(["train", *argv, "--print_config"])
            printed = yaml.safe_load(capsys.readouterr().out)
            assert (printed["epochs"], printed["lr"]) == (3, 0.5)
            assert printed["prior"]["init_args"]["num_components"] == 5


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("epochs: 7\nlr: 0.5\nepochs: 9\n", "line 3 gives 'epochs' again"),
        ("prior:\n  VampPrior:\n    num_components: 3\n    'num_components': 5\n", "line 4 gives"),
        ("schema: {job: real, pay: real, job: ignored}\n", "line 1 gives 'job' again"),
    ],
)
def test_a_configuration_that_gives_an_option_twice_is_refused(
    text: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--print_config"]) == 2
    printed = capsys.readouterr().err
    assert place in printed
    assert printed.endswith("again: keep one of them\n")
    (tmp_path / "c.yaml").write_text("schema: {a: &b {kind: real}, c: *b, d: {<<: *b}}\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(tmp_path / "c.yaml"), "--print_config"])
    kinds = yaml.safe_load(capsys.readouterr().out)["schema"].values()
    assert [*kinds] == [{"kind": "real"}] * 3


def test_a_run_on_a_file_is_used_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).integers(0, 2, (53, 5)).astype(np.float32)
    np.savez("x.npz", x=x)
    assert main(["train", *SMALL, "--data", "x.npz", "--epochs", "1", "--run", "run"]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    load_run(str(tmp_path / "run"), None)
    moved = tmp_path / "moved.npz"
    (tmp_path / "x.npz").rename(moved)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    config = tmp_path / "run/config.yaml"
    assert f"write the new place into {config}: its data" in capsys.readouterr().err
    config.write_text(config.read_text().replace(str(tmp_path / "x.npz"), str(moved)))
    load_run(str(tmp_path / "run"), None)
    moved.rename(tmp_path / "x.npz")
    again = ["--resume", str(tmp_path / "run"), "--epochs", "2", "--progress", "false"]
    assert main(["train", *again, "--data", "../x.npz"]) == 0
    assert yaml.safe_load(config.read_text())["data"] == str(tmp_path / "x.npz")


def test_named_data_sets_are_looked_for_where_training_had_them(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = []

    def read(*arguments: object, root: str, **options: object) -> Splits:
        roots.append(root)
        return load_data(*arguments, root=root, **options)

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    known = yaml.safe_load((copy / "config.yaml").read_text())
    monkeypatch.setattr("pyro_vae.cli.folder.load_data", read)
    for root in (tmp_path, tmp_path / "gone"):
        (copy / "config.yaml").write_text(yaml.safe_dump(known | {"data_root": str(root)}))
        assert main(["plot", str(copy)]) == 0
    assert main(["plot", str(copy), "--data_root", "given"]) == 0
    assert roots == [str(tmp_path), "data", "given"]
    assert known["data_root"] == str(Path("data").absolute())


def test_a_run_that_lacks_a_file_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 1, 8, 8), np.float32))
    cases = {"config.yaml": "plot", "data.json": "score", "metrics.csv": "plot"}
    for name, command in cases.items():
        copy = tmp_path / name
        shutil.copytree(run, copy)
        (copy / name).unlink()
        file = [str(tmp_path / "x.npz")] if command == "score" else []
        assert main([command, str(copy), *file]) == 2
        assert f"{copy} has no {name}, which pyro-vae train writes" in capsys.readouterr().err


def test_one_run_is_not_compared(run: Path, capsys: pytest.CaptureFixture) -> None:
    for runs in ([str(run)], [str(run)] * 2):
        assert main(["compare", *runs]) == 2
        assert "two runs or more; for one: pyro-vae evaluate" in capsys.readouterr().err


def test_every_long_part_of_evaluate_has_a_bar(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["evaluate", str(run), "--limit", "3", "--num_samples", "101"]) == 0
    printed = capsys.readouterr().out
    assert "importance sampling, guide" in printed
    assert printed.count("100%") == 3  # and the audit


def test_existing_run_is_not_written_over(run: Path, capsys: pytest.CaptureFixture) -> None:
    before = (run / "run.json").read_bytes(), (run / "config.yaml").read_bytes()
    assert main(["train", *SMALL, "--epochs", "1", "--run", str(run)]) == 2
    assert "holds a run" in capsys.readouterr().err
    assert before == ((run / "run.json").read_bytes(), (run / "config.yaml").read_bytes())


def test_changed_data_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    x = np.random.default_rng(0).integers(0, 2, (53, 5)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    run = tmp_path / "run"
    options = ["--data", str(tmp_path / "x.npz"), "--epochs", "1", "--run", str(run)]
    assert main(["train", *SMALL, *options]) == 0
    x[3, 2] = 1 - x[3, 2]
    np.savez(tmp_path / "x.npz", x=x)
    assert main(["evaluate", str(run)]) == 2
    assert "data changed since the run" in capsys.readouterr().err


def test_configuration_naming_a_foreign_module_imports_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "foreign.py").write_text("open('executed', 'w').close()\n")
    (tmp_path / "evil.yaml").write_text("prior: {class_path: foreign.Evil}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["train", "--config", "evil.yaml"]) == 2
    assert "unknown" in capsys.readouterr().err
    assert main(["train", "--prior", "foreign.Evil"]) == 2
    assert not (tmp_path / "executed").exists()


def test_run_declaration_naming_a_foreign_module_imports_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = tmp_path / "evil"
    shutil.copytree(run, evil)
    content = json.loads((evil / "run.json").read_text())
    content["declaration"]["prior"]["class_path"] = "foreign2.Evil"
    (evil / "run.json").write_text(json.dumps(content))
    (tmp_path / "foreign2.py").write_text("open('executed', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="unknown"):
        load(evil)
    assert main(["evaluate", str(evil)]) == 2
    assert not (tmp_path / "executed").exists()


def test_help_needs_no_torch() -> None:
    code = "import sys, pyro_vae.__main__ as m; m.main(['--help']); print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip().endswith("False")


def test_print_config_is_yaml_that_train_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--prior", "VampPrior", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["prior"]["init_args"]["num_components"] == 500
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(printed))
    options = [
        "--config",
        str(tmp_path / "c.yaml"),
        "--prior.num_components",
        "3",
        "--limit",
        "53",
    ]
    assert main(["train", *SMALL, *options, "--epochs", "1", "--run", str(tmp_path / "run")]) == 0
    assert load(tmp_path / "run").prior.inputs.shape[0] == 3


def test_precision_and_threads_are_those_asked_for_and_put_back(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    seen = []

    def look(*_: object, **options: object) -> None:
        seen.append((torch.get_float32_matmul_precision(), torch.get_num_threads()))
        seen.append(options["compile"])
        raise ValueError("enough")

    monkeypatch.setattr("pyro_vae.cli.evaluate.importance_sampling", look)
    speed = ["--num-samples", "7", "--matmul", "medium", "--threads", "1", "--compile", "true"]
    assert main(["evaluate", str(run), *speed]) == 2
    assert seen == [("medium", 1), True]
    assert (torch.get_float32_matmul_precision(), torch.get_num_threads()) == before
    for number in ("0", "100000"):
        assert main(["evaluate", str(run), "--threads", number]) == 2
        words = r"threads must be from 1 to \d+, the processors of this machine; got " + number
        assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize("command", ["score", "encode"])
def test_grey_values_that_were_divided_are_refused(
    run: Path, command: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    x = load_data("digits").test.x[:5].numpy()
    np.save(tmp_path / "x.npy", x / np.float32(16))
    assert main([command, str(run), str(tmp_path / "x.npy")]) == 2
    assert "expected whole grey values from 0 to 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "out", "words"),
    [
        ("score", "x.csv", "out must not be the input"),
        ("score", "../{folder}/x.csv", "out must not be the input"),
        ("score", "x.npz", "out must end in .csv; got"),
        ("score", "none/x.csv", "there is no"),
        ("encode", "x.csv", "out must not be the input"),
        ("encode", "x.txt", "out must end in .npz or .csv; got"),
        ("sample", "x.txt", "out must end in .npz; got"),
        ("sample", "", "out must end in .npz; got ''"),
        ("report", "x.txt", "out must end in .html; got"),
        ("report", "none/x.html", "there is no"),
    ],
)
def test_a_place_that_is_none_is_refused_before_any_work(
    run: Path,
    command: str,
    out: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "x.csv").write_text("kept")
    out = out and str(tmp_path / out.format(folder=tmp_path.name))
    files = [] if command in ("sample", "report") else [str(tmp_path / "x.csv")]
    assert main([command, str(run), *files, "--out", out]) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]
    assert (tmp_path / "x.csv").read_text() == "kept"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["evaluate", "{run}", "--limit", "0"], "limit must be at least 1; got 0"),
        (["evaluate", "{run}", "--limit", "-5"], "limit must be at least 1; got -5"),
        (["evaluate", "{run}", "--limit", "3", "--seed", "-1"], "seed must be at least 0; got -1"),
        (["sample", "{run}", "--size", "0"], "size must be at least 1; got 0"),
        (["impute", "{run}", "{run}"], "expected a .csv, .npy or .npz file to impute; got"),
        (["sample", "{run}", "--size", "-1"], "size must be at least 1; got -1"),
        (["sample", "{run}", "--seed", "9" * 20], "seed must be at most 9223372036854775807"),
        (["train", "--run", ""], "run must name a folder; got ''"),
        (["train", "--prior", "StudentT", "--prior.df", ".nan"], "df must be a finite number"),
        (["train", "--posterior.min_scale=-5"], "min_scale must be at least 0; got -5"),
    ],
)
def test_numbers_out_of_range_are_refused(
    run: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([argument.format(run=run) for argument in argv]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_columns_of_a_file_are_put_in_the_order_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    x = np.stack([rng.choice([3.0, 7.0], 97), rng.normal(50, 7, 97)], 1)
    np.savetxt(tmp_path / "x.csv", x, delimiter=",", header="a,b", comments="")
    run = tmp_path / "run"
    options = ["--data", str(tmp_path / "x.csv"), "--likelihood", "Normal", "--epochs", "1"]
    assert main(["train", *SMALL, *options, "--run", str(run)]) == 0

    def encoded(file: Path) -> np.ndarray | None:
        status = main(["encode", str(run), str(file), "--out", str(tmp_path / "codes.npz")])
        return np.load(tmp_path / "codes.npz")["mean"] if status == 0 else None

    files = {"a,b": x[:5], "b,a": x[:5, ::-1], "a,c": x[:5], "b": x[:5, :1]}
    found = {}
    for head, rows in files.items():
        np.savetxt(tmp_path / "few.csv", rows, delimiter=",", header=head, comments="")
        found[head] = encoded(tmp_path / "few.csv")
    assert found["a,b"] is not None
    assert np.array_equal(found["a,b"], found["b,a"])
    assert found["a,c"] is found["b"] is None
    assert "missing: b; unknown: c" in capsys.readouterr().err
    frame = pytest.importorskip("pandas").DataFrame(x[:5], columns=["a", "b"])[["b", "a"]]
    frame.to_csv(tmp_path / "few.tsv", sep="\t", index=False)
    frame.to_parquet(tmp_path / "few.parquet")
    frame.to_parquet(tmp_path / "few.PARQUET")
    for ending, large in (("tsv", 2**26), ("parquet", 2**26), ("parquet", 0), ("PARQUET", 2**26)):
        monkeypatch.setattr(tables, "LARGE", large)
        assert np.array_equal(encoded(tmp_path / f"few.{ending}"), found["a,b"])


@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_a_run_that_took_first_rows_goes_on_with_them(
    tmp_path: Path,
) -> None:
    """A run folder as version 0.1 wrote it: nothing on rows, a limit of first ones."""
    np.savez(tmp_path / "x.npz", x=np.eye(97), x_test=np.eye(97))
    run = tmp_path / "run"
    options = ["--data", str(tmp_path / "x.npz"), "--limit", "11", "--epochs", "1"]
    assert main(["train", *SMALL, *options, "--run", str(run)]) == 0
    known = json.loads((run / "data.json").read_text())
    splits = load_data(tmp_path / "x.npz", limit=11, even=False)
    old = splits.describe()
    assert old["digests"] != known["description"]["digests"]
    del known["rows"], old["even"]
    known["description"] = old | {"transform": known["description"]["transform"]}
    (run / "data.json").write_text(json.dumps(known))
    assert main(["plot", str(run)]) == 0
    assert main(["encode", str(run), str(tmp_path / "x.npz")]) == 0


@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_what_a_table_will_teach_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(0)
    table = np.stack([rng.normal(size=211), rng.integers(3, size=211)], 1)
    np.savetxt(tmp_path / "x.csv", table, delimiter=",", header="size,kind", comments="")
    counts = rng.poisson(rng.lognormal(3, 1.3, (211, 1)), (211, 5))
    np.save(tmp_path / "counts.npy", counts)
    np.save(tmp_path / "even.npy", rng.poisson(20, (211, 5)))
    for name, likelihood, words in (
        ("x.csv", "Normal", ["note: 1 column(s) hold at most 10 whole numbers", "(kind)"]),
        ("counts.npy", "Poisson", ["note: the sums of rows go from", "library latent"]),
        ("counts.npy", "Poisson --likelihood.library=latent", []),
        ("even.npy", "NegativeBinomial", []),
    ):
        run = tmp_path / f"{name.split('.')[0]}{len(words)}"
        options = ["--data", str(tmp_path / name), "--epochs=1", "--likelihood"]
        options += likelihood.split()
        assert main(["train", *SMALL, *options, "--run", str(run)]) == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in words)
        assert printed.count("note:") == bool(words)
    assert main(["evaluate", str(tmp_path / "x2"), "--limit", "3", "--progress", "false"]) == 0
    assert "bits per dimension" not in capsys.readouterr().out


def test_layers_are_trained_judged_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    options = ["--latent_dim=[3,2]", "--hierarchy=BottomUp", "--conditional=true", "--limit=53"]
    small = [option for option in SMALL if "latent_dim" not in option]
    objective = ["--objective=BetaTC", "--epochs=1", f"--run={tmp_path / 'refused'}"]
    assert main(["train", *small, *options, *objective]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the model has ['z1', 'z2']: use one of ELBO, " in line
    idle = "collapse: none of the 2 latent units of z2 varies"
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # so short a run leaves a layer idle
        assert main(["train", *small, *options, "--epochs=2", f"--run={run}"]) == 0
        assert main(["train", "--resume", str(run), "--epochs=3"]) == 0
    assert capsys.readouterr().err.count(idle) == 2
    head, *rows = (run / "parts.csv").read_text().splitlines()
    assert head == "epoch,kl_z1[0],kl_z1[1],kl_z1[2],kl_z2[0],kl_z2[1]"
    assert len(rows) == 3
    assert {"traversals.png", "unit_kl.svg"} <= {p.name for p in (run / "figures").iterdir()}
    assert main(["report", str(run)]) == 0
    assert "[3, 2]" in (run / "report.html").read_text()
    assert main(["explore", str(run), "--judged=0", "--limit=7"]) == 0
    vae = load(run)
    lines = layer_lines(vae, load_run(str(run), None)[1].test.fixed())
    assert re.fullmatch(r"KL [0-9.]+, 0 of 2 units active", lines["z2"])
    assert vae.sizes == {"z1": 3, "z2": 2}
    assert type(vae.posterior).__name__ == "BottomUp"


def test_layers_below_a_moved_latent_follow_it() -> None:
    vae = build(7, [2, 3, 4])
    z = torch.randn(5, 9)
    prior = vae.prior()
    top, middle, lowest = (lower_layers_at_mean(prior, z, unit) for unit in (5, 2, 0))
    given = prior.split(z)
    assert torch.equal(lowest, z)
    assert torch.equal(middle[:, 2:], z[:, 2:])
    assert torch.equal(middle[:, :2], vae.prior.layers[0](given["z2"]).mean)
    assert torch.equal(top[:, 5:], z[:, 5:])
    below = vae.prior.layers[1](given["z3"]).mean
    assert torch.equal(top[:, 2:5], below)
    assert torch.equal(top[:, :2], vae.prior.layers[0](below).mean)


def test_the_support_is_checked_in_every_row_of_exact_values() -> None:
    x = torch.zeros(1303, 3)
    counts = build((3,), 2, likelihood="Poisson")
    check_support(counts, Data(x))
    x[(torch.bincount(spread(1303, CHECKED_ROWS, 0), minlength=1303) == 0).nonzero()[0], 2] = -1
    with pytest.raises(ValueError, match=r"Poisson needs data in .*; got values in \[-1, 0\]"):
        check_support(counts, Data(x))
    grey = Data(torch.full((1303, 3), 7), levels=17, transform=Dequantise(17))
    with pytest.raises(ValueError, match="Bernoulli needs data in {0, 1}"):
        check_support(build((3,), 2), grey)
