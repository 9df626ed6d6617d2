"""The page of a run: complete in itself, and its numbers are those of the run's files."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from pyro_vae import build, load
from pyro_vae.__main__ import main
from pyro_vae.cli.report import programs
from pyro_vae.config import components
from pyro_vae.estimators import Evidence

NAME = "a <b> & 'c'"


pytestmark = pytest.mark.xdist_group("report")  # they share a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / NAME
    options = ["--encoder.hidden=[11]", "--decoder.hidden=[11]", "--latent_dim=3", "--limit=211"]
    assert main(["train", *options, "--epochs=3", "--progress=false", f"--run={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    options = ["--limit=13", "--num_samples=101", "--progress=false"]
    assert main(["evaluate", str(run), *options]) == 0
    assert main(["report", str(run)]) == 0
    return (run / "report.html").read_text()


def words(page: str) -> str:
    """The page as it is read: no tags, entities resolved."""
    return re.sub(
        r"\s+", " ", html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S))
    )


def cells(page: str, label: str) -> list[str]:
    """What stands beside `label` in its table, without the remark below it."""
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", page, re.S)
    (row,) = [row for row in rows if re.match(re.escape(html.escape(label)) + "<", row)]
    return [words(cell).strip() for cell in re.findall(r"<td.*?</td>", row, re.S)]


def test_page_is_complete_in_itself(page: str) -> None:
    assert page.isascii()
    assert "<script" not in page
    assert "http" not in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert not re.findall(r"url\((?!#)", page)
    assert "@import" not in page
    anchors = {source[1:] for source in sources if source.startswith("#")}
    assert anchors == set(re.findall(r'<h2 id="([^"]*)"', page))


def test_names_are_escaped(page: str) -> None:
    assert "<b> &" not in page
    assert NAME in words(page)


def test_every_figure_of_the_run_is_shown(run: Path, page: str) -> None:
    drawn = [path.suffix for path in (run / "figures").iterdir()]
    pictures = re.findall(r'<img[^>]*src="data:image/(png|svg)', page)
    assert pictures.count("png") == drawn.count(".png")
    assert pictures.count("svg") == drawn.count(".svg") + 1  # k-hat; curves are drawn anew
    assert page.count('class="graph"') == 2
    assert "x Bernoulli z data observed" in words(page)


def test_the_audit_behind_the_verdicts_is_drawn(run: Path, page: str) -> None:
    assert json.loads((run / "evaluation.json").read_text())["audit"].startswith("passed")
    assert (run / "figures" / "audit.svg").exists()
    assert "What an exact draw adds" in words(page)


def test_evaluation_is_that_of_the_file(run: Path, page: str) -> None:
    numbers = json.loads((run / "evaluation.json").read_text())
    errors = (
        f"{numbers['stderr_monte_carlo']:.2g} (Monte Carlo) {numbers['stderr_data']:.2g} (data)"
    )
    assert cells(page, "log p(x)") == [f"{numbers['log_prob']:.2f}", errors, "13"]
    assert cells(page, "mutual information")[2] == "180"
    shown = {
        "encoder alone": f"{numbers['encoder_bound']:.2f}",
        "ELBO": f"{numbers['elbo']:.2f}",
        "KL": f"{numbers['kl']:.2f}",
        "reconstruction": f"{numbers['reconstruction']:.2f}",
        "inference gap": f"{numbers['inference_gap']:.2f}",
        "mutual information": f"{numbers['mutual_information']:.3f}",
        "total correlation": f"{numbers['total_correlation']:.3f}",
        "dimension-wise KL": f"{numbers['dimension_wise_kl']:.3f}",
        "active units": str(numbers["active_units"]),
        "k-hat below threshold": f"{numbers['khat_below_threshold']:.1%}",
        "bits per dimension": f"{numbers['bits_per_dim']:.3f}",
    }
    for label, value in shown.items():
        assert cells(page, label)[0] == value, label
    assert "13 of 180 rows of the test part, spread over it (seed 0)" in words(page)
    assert cells(page, "KL(q(z) || p(z))")[0] == f"{numbers['aggregate_kl']:.3f}"
    assert "K = 101" in page


def test_verdicts_are_counted_from_the_evidence(run: Path, page: str) -> None:
    evidence = Evidence.load(run / "evidence.safetensors")
    kinds = set(zip(evidence.verdict, evidence.method))
    for verdict, method in kinds:
        rows = [
            i
            for i, kind in enumerate(zip(evidence.verdict, evidence.method))
            if kind == (verdict, method)
        ]
        mean = evidence.log_prob[rows].mean().item()
        worst = max(evidence.stderr[rows].tolist())
        line = f"{verdict} {method} {len(rows)} {mean:.2f} {worst:.2g}"
        assert line in words(page)


def test_training_is_that_of_the_file(run: Path, page: str) -> None:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = max(rows, key=lambda row: float(row["validation_elbo"]))
    names = {"ELBO": "elbo", "KL": "kl", "reconstruction": "reconstruction"}
    for part, start in (("training", ""), ("validation", "validation_")):
        for label, key in names.items():
            chosen = [best] if best is rows[-1] else [best, rows[-1]]
            expected = [f"{float(row[start + key]):.2f}" for row in chosen]
            assert cells(page, f"{label}, {part}") == expected


def test_declaration_is_that_of_the_run(run: Path, page: str) -> None:
    assert cells(page, "encoder") == [
        "MLP(hidden=[11], activation=tanh, condition_dim=0, norm=None)"
    ]
    assert cells(page, "train rows") == ["211"]
    size = sum(parameter.numel() for parameter in load(run).parameters())
    assert cells(page, "parameters") == [f"{size:,}"]
    assert html.escape((run / "config.yaml").read_text(), quote=False) in page


def test_the_same_run_gives_the_same_page(run: Path, page: str, tmp_path: Path) -> None:
    out = tmp_path / "again.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert out.read_text() == page


def test_page_says_what_is_missing_and_what_makes_it(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare run"
    shutil.copytree(run, bare)
    shutil.rmtree(bare / "figures")
    for name in ("evaluation.json", "evidence.safetensors", "metrics.csv", "data.json"):
        (bare / name).unlink(missing_ok=True)
    assert main(["report", str(bare)]) == 0
    text = words((bare / "report.html").read_text())
    assert f"Run pyro-vae evaluate '{bare}' and" in text
    assert f"Run pyro-vae plot '{bare}' and" in text
    assert "no metrics.csv" in text
    (bare / "config.yaml").unlink()
    assert main(["report", str(bare)]) == 0
    assert "The run was made by fit" in words((bare / "report.html").read_text())


@pytest.mark.parametrize("name", sorted(components("likelihood")))
def test_programs_of_every_likelihood(name: str) -> None:
    vae = build((5,), latent_dim=3, likelihood=name, condition_dim=2)
    declared = {"encoder": {"class_path": "MLP", "init_args": {"condition_dim": 2}}}
    state = torch.get_rng_state()
    found = programs(vae, declared)
    assert torch.equal(state, torch.get_rng_state())
    (z, x), (q,) = found["model"]["sites"], found["guide"]["sites"]
    assert z == ("z", "Normal", "", "data", "latent")
    assert (x[0], *x[2:]) == ("x", "z", "data", "observed")
    assert q == ("z", "Normal", "", "data", "latent")


def test_a_folder_that_is_no_run_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyro-vae report: ")
    assert str(tmp_path) in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_errors_over_data_are_shown_where_the_file_has_them(
    run: Path, page: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    numbers = json.loads((copy / "evaluation.json").read_text())
    (copy / "evaluation.json").write_text(json.dumps({**numbers, "stderr_elbo": 0.1234}))
    assert main(["report", str(copy)]) == 0
    assert cells((copy / "report.html").read_text(), "ELBO")[1] == "0.12 (data)"
