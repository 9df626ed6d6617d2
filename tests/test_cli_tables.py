"""Tables with text and empty cells on the command line."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pyro_vae import column_log_prob, load
from pyro_vae.__main__ import main
from pyro_vae.cli.parsing import parse
from pyro_vae.data import Schema, read_table

JOBS = ["baker", "clerk", "pilot"]
SMALL = [
    *("--encoder.hidden=[7]", "--decoder.hidden=[7]", "--latent_dim=2", "--progress=false"),
    "--epochs=3",
]


def people(rows: int = 101) -> list[list[object]]:
    """Rows of a small table, a tenth of its cells empty."""
    torch.manual_seed(0)
    table = []
    for t in torch.randn(rows).tolist():
        job = JOBS[min(max(round(1 + t), 0), 2)]
        row = [round(40 + 10 * t, 1), job, round(math.exp(7 + 2 * t), 2), min(max(round(t), 0), 2)]
        table.append([cell if torch.rand(()) > 0.1 else "" for cell in row])
    return table


def written(path: Path, rows: list, names: str = "age,job,pay,edu.num") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names.split(","), *rows])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    data = written(folder / "people.csv", people())
    schema = "{age: {kind: real, resolution: 0.1}}"
    assert main(["train", *SMALL, "--data", str(data), "--run", str(folder / "run"),
                 "--schema", schema]) == 0  # fmt: skip
    return folder / "run"


def test_a_run_holds_the_schema(run: Path) -> None:
    declared = yaml.safe_load((run / "config.yaml").read_text())
    schema = Schema.restore(declared["schema"])
    assert schema.columns["age"].resolution == 0.1
    assert schema.columns["job"].categories == tuple(JOBS)
    assert Schema.restore(json.loads((run / "data.json").read_text())["rows"]["schema"]) == schema
    vae = load(run)
    assert vae.missing
    assert vae.likelihood.names == ["age", "job", "pay", "edu.num"]
    rows, _ = read_table(run.parent / "people.csv", schema)
    assert torch.equal(vae.likelihood.input_scale > 0, torch.ones(3, dtype=torch.bool))
    assert vae.likelihood.observed(vae.likelihood(torch.zeros(101, 2))).log_prob(rows).max() < 0


def test_train_prints_the_schema_and_its_config_trains_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    again = tmp_path / "once again"
    options = ["--config", str(run / "config.yaml"), "--run", str(again)]
    assert main(["train", *options, "--epochs", "1", "--progress", "false",
                 "--likelihood.columns", "{age: StudentT}"]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "age: {kind: real, resolution: 0.1}" in printed
    assert "categories: [baker, clerk, pilot]" in printed
    assert printed.endswith(f"log p(x): pyro-vae evaluate '{again}'\n")
    kinds = [type(part).__name__ for part in load(again).likelihood.parts]
    assert kinds == ["StudentT", "Categorical", "LogNormal", "Ordinal"]


def test_a_run_from_before_columns_were_computed_together_goes_on(
    run: Path, tmp_path: Path
) -> None:
    older = Path(shutil.copytree(run, tmp_path / "run"))
    config = yaml.safe_load((older / "config.yaml").read_text())
    record = json.loads((older / "run.json").read_text())
    for declared in (config, record["declaration"]):
        assert declared["likelihood"]["init_args"].pop("together")
    (older / "config.yaml").write_text(yaml.safe_dump(config))
    (older / "run.json").write_text(json.dumps(record))
    vae = load(older)
    assert vae.declaration == record["declaration"]
    again = ["train", "--resume", str(older), "--epochs", "2", "--progress", "false"]
    assert main(again) == 0
    config = yaml.safe_load((older / "config.yaml").read_text())
    assert config["likelihood"]["init_args"]["together"] is False
    assert json.loads((older / "run.json").read_text())["declaration"] == record["declaration"]


def test_samples_are_written_as_the_table_is(run: Path) -> None:
    assert main(["sample", str(run), "--size", "31"]) == 0
    rows, _ = read_table(run / "samples.csv", Schema.restore(yaml.safe_load(
        (run / "config.yaml").read_text())["schema"]))  # fmt: skip
    assert rows.shape == (31, 4)
    assert not rows.isnan().any()
    lines = (run / "samples.csv").read_text().splitlines()
    assert all(len(line.split(",")[0].partition(".")[2]) <= 1 for line in lines[1:])  # of age
    assert {line.split(",")[1] for line in lines[1:]} <= set(JOBS)


def test_score_matches_columns_by_name_and_says_which_is_odd(run: Path, tmp_path: Path) -> None:
    rows = people()[:5]
    plain = written(tmp_path / "a.csv", rows)
    other = written(tmp_path / "b.csv", [row[::-1] for row in rows], "edu.num,pay,job,age")
    for file in (plain, other):
        assert main(["score", str(run), str(file), "--columns", "true", "--progress=false"]) == 0
    first, second = (
        list(csv.DictReader((tmp_path / f"{n}.scores.csv").read_text().splitlines()))
        for n in ("a", "b")
    )
    assert first == second
    x, _ = read_table(plain, Schema.restore(yaml.safe_load(
        (run / "config.yaml").read_text())["schema"]))  # fmt: skip
    truth = column_log_prob(load(run), x)
    for row, values in zip(first, truth.tolist()):
        cells = [row[f"log_prob of {name}"] for name in ("age", "job", "pay", "edu.num")]
        found = [float(cell or "nan") for cell in cells]
        assert found == pytest.approx(values, abs=1e-5, nan_ok=True)


def test_impute_fills_the_holes_of_a_table_and_leaves_the_rest(run: Path, tmp_path: Path) -> None:
    rows = people()[:17]
    file = written(tmp_path / "a.csv", rows)
    assert main(["impute", str(run), str(file), "--draws", "2", "--progress=false"]) == 0
    for name in ("a.imputed.csv", "a.imputed-1.csv", "a.imputed-2.csv"):
        names, *found = list(csv.reader((tmp_path / name).read_text().splitlines()))
        assert names == ["age", "job", "pay", "edu.num"]
        for row, filled in zip(rows, found, strict=True):
            for cell, value in zip(row, filled, strict=True):
                same = value in JOBS if isinstance(cell, str) else float(value) == cell
                assert value != "" if cell == "" else value == cell or same, (row, filled)
            assert len(filled[0].partition(".")[2]) <= 1  # of the resolution of age


def test_impute_keeps_the_labels_of_a_table(run: Path, tmp_path: Path) -> None:
    rows = [[name, *row] for name, row in zip(["yes", "no", ""], people())]
    file = written(tmp_path / "a.csv", rows, "Label,age,job,pay,edu.num")
    assert main(["impute", str(run), str(file), "--draws", "1", "--progress=false"]) == 0
    for name in ("a.imputed.csv", "a.imputed-1.csv"):
        names, *found = list(csv.reader((tmp_path / name).read_text().splitlines()))
        assert names == ["age", "job", "pay", "edu.num", "Label"]
        assert [row[-1] for row in found] == ["yes", "no", ""]
        assert all(row[:-1] for row in found)


@pytest.mark.filterwarnings("ignore:posterior collapse")
@pytest.mark.parametrize("kind", ["csv", "parquet", "numbers"])
def test_impute_changes_no_cell_that_was_observed(kind: str, tmp_path: Path) -> None:
    """Numbers of more digits than float32 has, as dates and amounts are, and other spellings."""
    file, words = tmp_path / "a.csv", kind != "numbers"
    texts = ["01", "2.50", "", "1e1"]
    rows = [
        [f"n{i}", texts[i % 4], 20200101 + 37 * i if i % 5 else "", f"{123456.789 * 1.3**i:.2f}"]
        for i in range(40)
    ]
    names = "id,b,day,pay,label"
    table = [[*row[not words :], "" if i == 3 else "1.0"] for i, row in enumerate(rows)]
    written(file, table, names[3 * (not words) :])
    schema = ["--schema", "{id: ignored}"] if words else ["--likelihood", "Normal"]
    run = tmp_path / "run"
    assert main(["train", *SMALL, "--data", str(file), "--run", str(run), *schema]) == 0
    if kind == "parquet":
        frame = pytest.importorskip("pandas").read_csv(file)
        pytest.importorskip("pyarrow")
        file = tmp_path / "a.parquet"
        frame.astype({"b": "float32"}).to_parquet(file)
    assert main(["impute", str(run), str(file), "--draws=1", "--progress=false"]) == 0
    order = ["b", "day", "pay", *(["id"] if words else []), "label"]
    for name in ("a.imputed.csv", "a.imputed-1.csv"):
        head, *found = csv.reader((tmp_path / name).read_text().splitlines())
        assert head == order
        for row, filled in zip(table, found, strict=True):
            known = dict(zip(names[3 * (not words) :].split(","), row))
            for column, value in zip(order, filled, strict=True):
                cell = str(known[column])
                if cell == "":
                    assert (value == "") == (column == "label")
                elif kind == "parquet" and column != "id":
                    assert float(value) == float(cell)
                    assert len(value) <= len(cell)
                else:
                    assert value == cell


def test_a_file_without_some_classes_keeps_the_codes_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = [[name, *row] for name, row in zip(["short", "tall", "wide"] * 34, people())]
    file, run = written(tmp_path / "a.csv", table, "label,age,job,pay,edu.num"), tmp_path / "run"
    assert main(["train", *SMALL, "--data", str(file), "--run", str(run), "--conditional"]) == 0
    codes = []
    for name, rows in (("all", table), ("some", [row for row in table if row[0] != "short"])):
        one = written(tmp_path / f"{name}.csv", rows, "label,age,job,pay,edu.num")
        assert main(["encode", str(run), str(one), "--out", str(tmp_path / "codes.csv")]) == 0
        _, *lines = csv.reader((tmp_path / "codes.csv").read_text().splitlines())
        codes.append(torch.tensor([[float(cell) for cell in line] for line in lines]))
    kept = torch.tensor([row[0] != "short" for row in table])
    torch.testing.assert_close(codes[1], codes[0][kept])
    other = written(tmp_path / "b.csv", [["thin", *table[0][1:]]], "label,age,job,pay,edu.num")
    capsys.readouterr()
    assert main(["encode", str(run), str(other), "--out", str(tmp_path / "codes.csv")]) == 2
    assert "run's classes, short, tall, wide; got 'thin'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["data.json", "run.json"])
def test_a_run_whose_keys_were_sorted_mixes_up_no_columns(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = [[row[2], row[0]] for row in people()]
    file, run = written(tmp_path / "a.csv", table, "pay,age"), tmp_path / "run"
    columns = ["--likelihood=Columns", "--likelihood.columns=[Normal,Normal]"]
    assert main(["train", *SMALL, "--data", str(file), "--run", str(run), *columns]) == 0
    declared = json.loads((run / name).read_text())
    if name == "run.json":
        likelihood = declared["declaration"]["likelihood"]["init_args"]
        likelihood["columns"] = {"age": "Normal", "pay": "Normal"}
    (run / name).write_text(json.dumps(declared, sort_keys=True))
    capsys.readouterr()
    work = ["--draws=0", "--num_samples=7", "--progress=false"]
    if name == "run.json":
        assert main(["impute", str(run), str(file), *work]) == 2
        assert "columns age, pay, data.json pay, age" in capsys.readouterr().err
        return
    assert main(["impute", str(run), str(file), *work]) == 0
    names, *found = csv.reader((tmp_path / "a.imputed.csv").read_text().splitlines())
    assert names == ["pay", "age"]
    for row, filled in zip(table, found, strict=True):
        for cell, value in zip(row, filled, strict=True):
            assert cell == "" or float(value) == pytest.approx(cell)


@pytest.mark.parametrize("command", ["score", "encode", "impute"])
def test_an_array_is_no_table(
    run: Path, command: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    np.save(tmp_path / "a.npy", np.ones((7, 4)))
    assert main([command, str(run), str(tmp_path / "a.npy")]) == 2
    assert "expected a table, as the run was trained on, got an array" in capsys.readouterr().err


def test_an_array_is_a_table_of_numbers_in_the_order_of_the_columns(tmp_path: Path) -> None:
    pandas, _ = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    rows = np.random.default_rng(0).normal(size=(60, 2)).round(2).astype(np.float32)
    pandas.DataFrame(rows, columns=["b", "a"]).to_parquet(tmp_path / "t.parquet")
    run, files = str(tmp_path / "run"), [str(tmp_path / name) for name in ("t.parquet", "t.npy")]
    assert main(["train", *SMALL, "--missing", "--data", files[0], "--run", run]) == 0
    np.save(files[1], rows)
    found = []
    for file in files:
        out = str(tmp_path / "scores.csv")
        assert main(["score", run, file, "--columns", "--num_samples=7", "--out", out]) == 0
        found.append((tmp_path / "scores.csv").read_text())
    assert found[0] == found[1]
    assert "log_prob of b,log_prob of a" in found[1]
    rows[3, 1] = np.nan
    np.save(files[1], rows)
    assert main(["impute", run, files[1], "--draws=0", "--num_samples=50"]) == 0
    filled = np.load(tmp_path / "t.imputed.npy")
    assert np.isfinite(filled).all()
    assert (filled == rows).sum() == rows.size - 1
    np.save(files[1], rows[:, :1])
    assert main(["score", run, files[1]]) == 2


def test_names_of_columns_keep_their_dots_and_dashes() -> None:
    typed = ["--schema.c=real", "--schema.a.b", "count", "--schema.a-b", "{kind: real}"]
    expected = {"c": "real", "a.b": "count", "a-b": {"kind": "real"}}
    assert parse("train", typed).schema == expected
    typed = ["--schema", "{c: real, d: count}", "--schema.c.1", "binary", "--schema.d", "real"]
    assert parse("train", typed).schema == {"c": "real", "d": "real", "c.1": "binary"}


def test_labels_of_a_run_of_numbers_are_the_same_in_every_kind_of_file(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    frame = pandas.DataFrame(x.numpy(), columns=list("abc")).assign(label=[0, 1, 2] * 20)
    frame.to_csv(tmp_path / "a.csv", index=False)
    arguments = ["--data", str(tmp_path / "a.csv"), "--likelihood", "Normal", "--conditional"]
    assert main(["train", *SMALL, *arguments, "--run", str(tmp_path / "run")]) == 0
    some = frame[frame.label > 0]
    some.to_csv(tmp_path / "b.csv", index=False)
    some.to_csv(tmp_path / "c.csv", index=False, sep=";")
    codes = []
    for name in ("b", "c"):
        arguments = [str(tmp_path / "run"), str(tmp_path / f"{name}.csv")]
        assert main(["encode", *arguments, "--out", str(tmp_path / f"{name}.codes.csv")]) == 0
        codes.append((tmp_path / f"{name}.codes.csv").read_text())
    assert codes[0] == codes[1]


def test_classify_counts_the_labels_of_a_file_without_some_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = ["short", "tall", "wide"]
    table = [[name, *row] for name, row in zip(names * 34, people())]
    file, run = written(tmp_path / "a.csv", table, "label,age,job,pay,edu.num"), tmp_path / "run"
    assert main(["train", *SMALL, "--data", str(file), "--run", str(run), "--classes=3"]) == 0
    rows = [["thin", *row[1:]] if row[0] == "short" else row for row in table]
    file = written(tmp_path / "b.csv", rows, "label,age,job,pay,edu.num")
    capsys.readouterr()
    assert main(["classify", str(run), str(file), "--progress=false"]) == 0
    found = csv.DictReader((tmp_path / "b.classes.csv").read_text().splitlines())
    hits = [one["class"] == row[0] for one, row in zip(found, rows, strict=True)]
    assert f"{sum(hits) / len(hits):.1%} of 101 known" in capsys.readouterr().out


def test_classify_takes_numbers_of_classes_as_pandas_writes_them_where_some_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = [[i % 2, *row] for i, row in enumerate(people())]
    file, run = written(tmp_path / "a.csv", table, "label,age,job,pay,edu.num"), tmp_path / "run"
    assert main(["train", *SMALL, "--data", str(file), "--run", str(run), "--classes=2"]) == 0
    said = []
    for form in (str, "{:.1f}".format, "{:02d}".format):
        rows = [[form(row[0]), *row[1:]] for row in table]
        one = written(tmp_path / "b.csv", rows, "label,age,job,pay,edu.num")
        capsys.readouterr()
        assert main(["classify", str(run), str(one), "--progress=false"]) == 0
        said.append(capsys.readouterr().out.split(", ")[1])
    assert said == [said[0]] * 3
    assert not said[0].startswith("0.0%")


def test_evaluate_and_report_say_what_is_missing_and_odd(run: Path) -> None:
    assert main(["evaluate", str(run), "--progress=false", "--num_samples", "101"]) == 0
    numbers = json.loads((run / "evaluation.json").read_text())
    assert len(numbers["odd_rows"]) == 5
    lowest = [row["log_prob"] for row in numbers["odd_rows"]]
    assert lowest == sorted(lowest)
    assert set(numbers["missing"]) <= {"age", "job", "pay", "edu.num"}
    patterns = numbers["missing_patterns"]
    assert len({tuple(pattern["columns"]) for pattern in patterns}) == len(patterns) <= 5
    assert sum(pattern["rows"] for pattern in patterns) <= numbers["rows"]
    complete = [pattern["rows"] for pattern in patterns if not pattern["columns"]]
    assert complete == [max(pattern["rows"] for pattern in patterns)]
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "The oddest rows, and why" in page
    assert "Share of rows that lack a value" in page
    assert "Columns that rows lack together" in page
    assert f'<th scope="row">none</th><td class="number">{complete[0]}</td>' in page


@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_of_one_row_no_error_over_data_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def told(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments, "--progress=false", "--tolerance=1"]) == 0
        found = capsys.readouterr()
        assert found.err == ""
        return found.out

    def none(constant: str) -> None:
        raise ValueError(constant)

    found = json.loads(told("evaluate", str(run), "--limit=1", "--json"), parse_constant=none)
    assert found["rows"] == 1
    assert not {"stderr_data", "stderr_elbo", "active_units"} & {*found}
    shown = told("evaluate", str(run), "--limit=1")
    assert "(Monte Carlo)" in shown
    assert "nan" not in shown
    assert main(["report", str(run)]) == 0
    file = written(tmp_path / "a.csv", people()[:2])
    assert "(data)" in told("score", str(run), str(file))
    file = written(tmp_path / "a.csv", people()[:1])
    assert "(Monte Carlo), in the file's units" in told("score", str(run), str(file))
    same = shutil.copytree(run, tmp_path / "same")
    assert "what differs" not in told("compare", str(run), str(same), "--limit=2")
    assert main(["compare", str(run), str(same), "--limit=1", "--progress=false"]) == 2
    assert "compare needs two rows or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pilot", "diver", "expected one of the categories baker, clerk, pilot, got 'diver'"),
        ("pay", "wage", "missing: pay; unknown: wage"),
        ("clerk", "7", "expected one of the categories baker, clerk, pilot, got '7'"),
        ("age,job", "age;job", "expected"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    old: str, new: str, message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = written(tmp_path / "t.csv", people())
    file.write_text(file.read_text().replace(old, new))
    assert main(["score", str(run), str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--missing=false"], "column 'age' lacks values in 4 row(s), and the model takes none"),
        (["--likelihood", "Normal"], "which the likelihood Columns is for; got Normal"),
        (["--schema", "{ages: real}"], "the schema names columns that are not there: ages"),
        (["--likelihood", "Columns", "--likelihood.columns", "{ages: Normal}"],
         "there is no column 'ages', did you mean 'age'?"),
        (["--likelihood", "Columns", "--likelihood.columns.age", "Normal"],
         "give columns as a mapping: --likelihood.columns '{NAME: KIND}'"),
        (["--schema", "{job: real}"], "column 'job': expected a finite number, got '"),
        (["--schema", "{age: reel}"], "kind must be one of real"),
    ],
)  # fmt: skip
def test_wrong_declarations_of_tables_write_nothing(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = written(tmp_path / "t.csv", people())
    out = ["--run", str(tmp_path / "run")]
    assert main(["train", *SMALL, "--data", str(file), *out, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_numbers_alone_are_read_as_before_unless_columns_are_asked_for(tmp_path: Path) -> None:
    rows = [[cell for cell in row if cell not in JOBS] for row in people()]
    rows = [row for row in rows if len(row) == 3 and "" not in row]
    file = written(tmp_path / "t.csv", rows, "age,pay,edu")
    out = tmp_path / "run"
    assert main(["train", *SMALL, "--data", str(file), "--run", str(out), "--likelihood",
                 "Columns"]) == 0  # fmt: skip
    kinds = [type(part).__name__ for part in load(out).likelihood.parts]
    assert kinds == ["Normal", "LogNormal", "Ordinal"]
    assert main(["train", *SMALL, "--data", str(file), "--run", str(tmp_path / "plain"),
                 "--likelihood", "Normal"]) == 0  # fmt: skip
    assert "schema" not in json.loads((tmp_path / "plain" / "data.json").read_text())["rows"]
