"""Tables with text and empty cells, and their schema."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml

from pyro_vae import build
from pyro_vae.data import Column, Schema, load_data, read_table
from pyro_vae.data.tables import read_rows_of_table

PEOPLE = """age,job,pay,grade,visits,member
23,baker,1200.5,2,0,yes
,clerk,812.25,1,3,no
41,,120000.75,3,14,no
67,baker,3100.5,1,1,
33,pilot,41000.25,3,,yes
29,clerk,650.75,2,7,no
"""


def people(rows: int = 4) -> str:
    """A small table, its rows repeated with other ages and pays."""
    head, *lines = PEOPLE.strip().splitlines()
    more = [line.replace(".", f"{i}.") for i in range(rows) for line in lines]
    return "\n".join([head, *more]) + "\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "people.csv"
    path.write_text(people())
    return path


def test_kinds_are_inferred_and_print_as_yaml(file: Path) -> None:
    rows, schema = read_table(file)
    assert rows.shape == (24, 6)
    assert rows.dtype == torch.float32
    kinds = {name: column.kind for name, column in schema.columns.items()}
    assert kinds == {
        "age": "ordinal", "job": "category", "pay": "positive", "grade": "ordinal",
        "visits": "ordinal", "member": "binary",
    }  # fmt: skip
    assert schema.columns["job"].categories == ("baker", "clerk", "pilot")
    assert rows[1, 0].isnan()
    assert rows[:3, 1].nan_to_num(-1).tolist() == [0, 1, -1]
    assert rows[0, 5] == 1
    assert Schema.restore(yaml.safe_load(str(schema))) == schema
    again, edited = read_table(file, {**schema.plain, "age": {"kind": "StudentT"}})
    assert edited.columns["age"].likelihood == "StudentT"
    assert again[:3, 0].nan_to_num(-1).tolist() == [23, -1, 41]


@pytest.mark.parametrize(
    ("cells", "kind", "resolution"),
    [
        ([0.1 * i + 0.013 * i**2 for i in range(1, 50)], "positive", None),
        ([20 + math.sin(i) for i in range(50)], "real", None),
        ([20 + round(math.sin(i), 1) for i in range(50)], "real", 0.1),
        ([round(math.exp(i % 17 / 2), 1) for i in range(50)], "positive", 0.6),
        ([1990 + i % 20 for i in range(50)], "real", 1.0),
        ([(i * i) % 97 for i in range(50)], "count", None),
        ([i % 5 for i in range(50)], "ordinal", None),
        (
            [i % 5 for i in range(50)] + [9],
            "count",
            None,
        ),  # others may come that are not among them
        ([i % 2 for i in range(50)], "binary", None),
        ([7.5 if i % 2 else -1 for i in range(50)], "binary", None),
        ([0.0] * 20 + [2.5 * i for i in range(1, 31)], "positive", 2.5),
        ([-(i % 30) for i in range(50)], "real", 1.0),
        ([10 ** (i % 12) + i for i in range(50)], "count", None),
        ([1e15 * 1.5**i for i in range(50)], "positive", None),
        ([1e30 * math.sin(i) for i in range(50)], "real", None),
    ],
)
def test_kinds_of_numbers(
    cells: list, kind: str, resolution: float | None, tmp_path: Path
) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("\n".join(["a\tb", *(f"{cell}\t{i}" for i, cell in enumerate(cells))]))
    column = read_table(path)[1].columns["a"]
    assert column.kind == kind
    assert column.resolution == pytest.approx(resolution)


def test_a_table_is_written_as_it_was_read(file: Path) -> None:
    rows, schema = read_table(file)
    written = file.with_name("again.csv")
    written.write_text(schema.csv(rows))
    again, _ = read_table(written, schema)
    assert torch.equal(again.nan_to_num(-1), rows.nan_to_num(-1))
    assert schema.csv(rows).splitlines()[2] == "," + people().splitlines()[2][1:]


def test_semicolons_with_decimal_commas_and_other_orders_of_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("b;a\n1,5;x\n+2,25;y\n-3;z\n,5e1;x\n")
    rows, schema = read_table(path)
    assert rows[:, 0].tolist() == [1.5, 2.25, -3, 5]
    path.write_text("a,b\ny,7\n")
    other, _ = read_table(path, schema)
    assert other.tolist() == [[7.0, 1.0]]


def test_other_delimiters_under_names_with_commas(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("id;pay, yearly;age\n" + "".join(f"{i};{i}000;{20 + i}\n" for i in range(20)))
    splits = load_data(str(path))
    assert splits.train.columns == ("id", "pay, yearly", "age")
    path.write_text('"pay, year";"age, years"\n1;2\n3;4\n5;7\n')
    assert load_data(str(path)).train.columns == ("pay, year", "age, years")
    path.write_text("a,b\n1,2\n3,4,5\n")
    with pytest.raises(
        ValueError, match="expected 2 columns as in the first line, got 3 in line 3"
    ):
        load_data(str(path))


@pytest.mark.parametrize("names", [None, ["id"], ["year", "id"]])
@pytest.mark.parametrize("form", ["pandas", "parquet", "pyarrow"])
def test_frames(form: str, names: list[str] | None, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pyarrow = pytest.importorskip("pyarrow")
    index = pandas.Index([3, 5, 7, 11])
    if names:
        index = pandas.MultiIndex.from_arrays([["a", "a", "b", "b"]] * len(names), names=names)
    frame = pandas.DataFrame(
        {
            "size": pandas.Categorical(
                ["lo", "hi", "mid", None], ["lo", "mid", "hi"], ordered=True
            ),
            "job": ["a", "b", None, "c"],
            "old": [True, False, True, None],
            "pay": [1.5, math.nan, 2.25, 800.0],
        },
        index=index,
    )
    source = {"pandas": frame, "pyarrow": pyarrow.Table.from_pandas(frame)}.get(form)
    if source is None:
        source = tmp_path / "t.parquet"
        frame.to_parquet(source)
    rows, schema = read_table(source)
    assert list(schema.columns) == ["size", "job", "old", "pay"]  # the index is none of them
    assert schema.columns["size"].categories == ("lo", "mid", "hi")
    assert schema.columns["size"].kind == "ordinal"
    assert rows.nan_to_num(-1).tolist() == [
        [0, 0, 1, 1.5], [2, 1, 0, -1], [1, -1, 1, 2.25], [-1, 2, -1, 800]
    ]  # fmt: skip


class Stream:
    """A frame of a library of its own: all that is known of it is Arrow's interchange."""

    def __init__(self, table: object) -> None:
        self.table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.table.__arrow_c_stream__(requested_schema)


CELLS = {"pay": [1.5, None, 2.25, 800.0], "job": ["a", "b", None, "a"], "old": [3, 5, 7, None]}


@pytest.mark.parametrize("library", ["polars", "another"])
def test_frames_of_other_libraries(library: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(CELLS)
    rows, schema = read_table(
        Stream(table) if library == "another" else pytest.importorskip("polars").DataFrame(CELLS)
    )
    known, same = read_table(table)
    assert schema == same
    assert torch.equal(rows.nan_to_num(-1), known.nan_to_num(-1))
    assert rows.isnan().sum() == 3


def test_columns_of_a_frame_may_have_numbers_for_names() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    cells = {"2019": [1.5, 2.25, 800.0, 3.5], "2020": ["a", "b", "b", "a"]}
    assert list(read_table(pyarrow.table(cells))[1].columns) == ["2019", "2020"]


def test_blank_cells_of_a_frame_are_missing() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"job": ["a", "", "b", "  "], "pay": [1.5, 2.25, 800.0, 3.5]})
    rows, schema = read_table(frame)
    assert schema.columns["job"].categories == ("a", "b")
    assert rows[:, 0].nan_to_num(-1).tolist() == [0, -1, 1, -1]


@pytest.mark.parametrize("source", [5, [[1, 2]], {"a": [1, "x"]}, {"a": [10**400]}])
def test_what_is_no_frame_is_refused_in_one_line(source: object) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="table: expected a table with one kind of values"):
        read_table(source)
    with pytest.raises(ValueError, match="table: expected columns, got none"):
        read_table({})


def test_whole_numbers_are_filled_in_with_whole_numbers() -> None:
    kinds = {"a": Column("Poisson"), "b": Column("count"), "c": Column("real")}
    kinds |= {"d": Column("Bernoulli"), "e": Column("ordinal", (1, 2, 3))}
    draws = torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1).expand(3, 2, 5)
    centre = Schema(kinds).centre(draws, draws.mean(0))
    assert centre[0].tolist() == [1, 1, pytest.approx(2 / 3), 1, 1]


def test_a_column_of_lists_is_no_column() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="column 'a' holds lists: give each of their parts a col"):
        read_table(pyarrow.table({"a": [[1], [2]], "b": [1, 2]}))


def test_intervals_and_periods_are_refused() -> None:
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    numbers = pandas.Series(range(30))
    for cells in (pandas.cut(numbers, 3), pandas.period_range("2020", periods=30)):
        with pytest.raises(
            ValueError, match="'a' holds objects such as intervals or periods: wri"
        ):
            read_table(pandas.DataFrame({"a": cells, "b": numbers}))


def test_a_kind_alone_takes_its_categories_from_the_cells(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\nx,10\n7,2\n,2\nx,9\n")
    rows, schema = read_table(path, {"a": "category", "b": {"kind": "ordinal"}})
    assert schema.columns["a"].categories == ("7", "x")
    assert schema.columns["b"].categories == ("2", "9", "10")
    assert rows.nan_to_num(-1).tolist() == [[1, 2], [0, 0], [-1, 0], [1, 1]]
    with pytest.raises(ValueError, match="'a': kind ordinal needs .* listed from the lowest; got"):
        read_table(path, {"a": "ordinal"})  # text has no order of its own


@pytest.mark.parametrize("kind", ["category", "ordinal"])
def test_numbers_name_the_same_category_however_they_are_written(
    kind: str, tmp_path: Path
) -> None:
    path, found = tmp_path / "t.csv", []
    forms = (["1", "2", "10", "-0.0"], ["1.0", "2.0", "10.0", "0"], ["01", "02", "10", "0.0"])
    for form in forms:
        path.write_text("a,b\n" + "".join(f"{cell},{i}.5\n" for i, cell in enumerate(3 * form)))
        rows, schema = read_table(path, {"a": kind})
        assert schema.columns["a"].categories == tuple(sorted(form, key=float))
        found.append(schema)
        for known in found:
            assert torch.equal(read_table(path, known)[0], rows)
    path.write_text("a,b\n1,2.5\n01,3.5\n1.0,4.5\n2,7\n")
    apart = read_table(path, {"a": kind})[0][:, 0]  # within one file they may be codes
    assert len(apart.unique()) == 4
    both = {"a": {"kind": kind, "categories": ["1", "01", "1.0", "2"]}}
    assert read_table(path, both)[0][:, 0].tolist() == [0, 1, 2, 3]


def test_labels_of_other_spellings_are_other_classes_and_no_label_is_not_one(
    tmp_path: Path,
) -> None:
    labels = ["1E3", "1000", "01", "1", "x", "", "None"]
    path = tmp_path / "t.csv"
    path.write_text("label,a\n" + "".join(f"{cell},{i}.5\n" for i, cell in enumerate(labels)))
    rows = read_rows_of_table(path, {})
    assert rows.class_names is not None
    assert len(rows.class_names) == 6
    named = [rows.class_names[i] if i >= 0 else "" for i in rows.labels.tolist()]
    assert named == labels


@pytest.mark.parametrize("cells", [[1, 2, 3], ["1", "2", "3"], ["2020-01-01", "2021-01-01", "x"]])
def test_an_ordered_category_may_hold_numbers_or_dates(cells: list) -> None:
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    ranks = pandas.Categorical(cells[:2] * 3, cells, ordered=True)
    column = read_table(pandas.DataFrame({"a": ranks}))[1].columns["a"]
    assert column.categories == tuple(map(str, cells[:2]))


@pytest.mark.parametrize("cells", ["xy", "12"])
def test_labels_may_all_be_unknown(cells: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "label,a,b\n" + "".join(f",{cell},{i}.5\n" for i, cell in enumerate(cells * 2))
    )
    labels = load_data(path).train.labels
    assert labels is not None
    assert labels.tolist() == [-1, -1]


def test_truth_values_name_categories_as_the_cells_do(file: Path) -> None:
    pandas, _ = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    given = yaml.safe_load("sure: {kind: binary, categories: [false, true]}")
    frame = pandas.DataFrame({"sure": [True, False, True], "a": [1.5, 2.0, 7.25]})
    rows, schema = read_table(frame, given)
    assert rows[:, 0].tolist() == [1, 0, 1]
    assert schema == read_table(frame)[1]


BAD = {
    "": "expected a line of names and rows below it, got 0 lines",
    "a,b\n1,2,3\n4,5,6\n": "expected 2 columns as in the first line, got 3 in line 2",
    "a,b\n,2\n,3\n": "column 'a' is empty in all rows: give it the kind ignored, or drop it",
    "a,b\n7,x\n7,y\n": "column 'a' holds 7 in all rows: give it the kind ignored",
    "a,b\nx,1\nx,2\n": "column 'a' holds 'x' in all rows: give it the kind ignored",
    "a,b\n1,1\n2,2\nx,3\n": "column 'a' holds 2 numbers beside text such as 'x'",
    "a,b\ninf,1\n2,2\n": "column 'a' holds infinite values",
    "a,b\n2020-01-31,1\n2021-02-03,2\n": "column 'a' holds dates, such as '2020-01-31'",
    "a,b\n31.1.2020,1\n3.2.2021,2\n": "column 'a' holds dates",
    'a,b\n"1,250.5",1\n"2,000",2\n"2,000",2\n': "'a' holds numbers .* such as '1,250.5': write",
    "a\tb\n0,5\t1\n-1,25\t2\n": "column 'a' holds numbers written as text, such as '0,5'",
    "a,b\n$ 5,1\n$ 7.50,2\n": "column 'a' holds numbers written as text, such as '\\$ 5'",
    "a,b\n1.5%,1\n-12 %,2\n": "column 'a' holds numbers written as text, such as '1.5%'",
    'a;b\n1.250,50;1\n2.000,75;2\n"7,5 kg";1\n'
    + "3.000,5;2\n" * 9: "'a' holds .* such as '1.250,50'",
    "a,b\n" + "".join(f"{n % 12} kg,{n}\n" for n in range(30)) + "none,1\n": "'a' holds .* '0 kg'",
    "a,1.5\nx,1\ny,2\n": "expected a line of names first, got '1.5' for column 2",
    "a,a\nx,1\ny,2\n": "expected different names, got 'a' twice",
    "a,b\n1700000001,x\n1700000004,y\n1700000002,x\n": "column 'a' holds numbers .* subtract 17",
    "a,b\n1e-50,x\n2e-50,y\n3e-50,x\n": "column 'a' holds numbers .* or change their unit",
    "a,b\n1e39,x\n2.5,y\n3,x\n": "column 'a' holds infinite values",
}


def test_a_few_numbers_with_letters_are_categories(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("cabin,size\n1st,5 kg\n2nd,10 kg\n3rd,5 kg\n1st,5 kg\n")
    kinds = [column.kind for column in read_table(path)[1].columns.values()]
    assert kinds == ["category", "binary"]


def test_not_a_number_with_a_sign_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1.5,x\n-nan,y\n2.5,x\n-NaN,\n")
    rows, schema = read_table(path)
    assert rows[:, 0].isnan().tolist() == [False, True, False, True]
    assert torch.equal(read_table(path, schema)[0].isnan(), rows.isnan())


def test_a_category_may_be_called_as_missing_values_are(tmp_path: Path) -> None:
    pandas, _ = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"land": ["NA", "ZA", None, "NA"], "a": [0.5, 1.25, 2.0, 3.75]})
    rows, schema = read_table(frame)
    (tmp_path / "t.csv").write_text(schema.csv(rows))
    again = read_table(tmp_path / "t.csv", schema)[0]
    assert again.nan_to_num(-1).tolist() == rows.nan_to_num(-1).tolist()
    (tmp_path / "t.csv").write_text("land,a\nNA,1\nZA,2.5\n,3.5\n")
    known = {"land": {"kind": "category", "categories": ["ZA", "NA"]}}
    assert read_table(tmp_path / "t.csv", known)[0][:, 0].nan_to_num(-1).tolist() == [1, 0, -1]
    inferred = read_table(tmp_path / "t.csv", {"land": "ignored"})[0]
    assert inferred.shape == (3, 1)


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=range(len(BAD)))
def test_what_is_no_table_to_learn_from(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        read_table(path)
    assert "\n" not in str(refused.value)


def test_names_and_ids_are_no_categories(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "".join(f"name{i},{i % 7}\n" for i in range(100_000)))
    with pytest.raises(ValueError, match="column 'a' holds 100000 different texts in 100000 rows"):
        read_table(path)


def test_columns_of_names_and_ids_may_be_ignored(file: Path, tmp_path: Path) -> None:
    rows, known = read_table(file)
    lines = [f"P{i:04d},{line}" for i, line in enumerate(file.read_text().splitlines())]
    path = tmp_path / "ids.csv"
    path.write_text("\n".join(["id" + lines[0][5:], *lines[1:]]) + "\n")
    again, schema = read_table(path, {"id": "ignored"})
    assert schema == Schema(known.columns, ("id",))
    assert torch.equal(again.nan_to_num(-1), rows.nan_to_num(-1))
    assert Schema.restore(yaml.safe_load(str(schema))) == schema
    for table in (path, file):  # with ids or without
        assert torch.equal(read_table(table, schema)[0].nan_to_num(-1), rows.nan_to_num(-1))
    with pytest.raises(ValueError, match="names columns that are not there: ids"):
        read_table(path, {"ids": "ignored"})
    with pytest.raises(ValueError, match="the schema ignores every column"):
        read_table(path, "ignored")


def test_a_column_of_labels_may_be_ignored(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(PEOPLE.replace("member", "label"))
    known = dict.fromkeys(("age", "pay", "visits"), "real")
    for ignored in ({}, {"label": "ignored"}):
        found = load_data(tmp_path / "t.csv", schema=known | ignored, validation=1).train
        assert found.columns == ("age", "job", "pay", "grade", "visits")
        assert found.schema is not None
        assert found.schema.ignored == tuple(ignored)
        assert (found.labels is None) == bool(ignored)


def test_ignored_columns_of_frames_may_hold_anything() -> None:
    pandas, _ = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    born = pandas.date_range("2001-02-03", periods=7)
    frame = pandas.DataFrame({"born": born, "a": [2.5, 3.25, 1.0, 7.5, 4.0, 6.0, 5.5]})
    rows, schema = read_table(frame, {"born": {"kind": "ignored"}})
    assert rows[:, 0].tolist() == frame["a"].tolist()
    assert torch.equal(read_table(frame, schema)[0], rows)


def test_a_file_of_bytes_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="expected a table in UTF-8"):
        read_table(path)
    with pytest.raises(ValueError, match="expected a file at"):
        read_table(tmp_path / "none.csv")
    path = tmp_path / "t.parquet"
    path.write_bytes(b"none")
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="expected a table with one kind of values"):
        read_table(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("baker", "diver", "column 'job': expected one of the categories baker, clerk, pilot, got "
         "'diver' in row 0 .* correct the cell, or leave it empty, or train with a schema"),
        ("1200", "plenty", "column 'pay': expected a finite number, got 'plenty0.5' in row 0"),
        ("1200", "inf", "column 'pay': expected a finite number, got 'inf0.5' in row 0"),
        ("pay", "wage", r"others \(missing: pay; unknown: wage\): give the table these columns"),
        (",member", "", "expected 5 columns as in the first line, got 6"),
    ],
)  # fmt: skip
def test_later_rows_must_fit_the_schema(old: str, new: str, message: str, file: Path) -> None:
    _, schema = read_table(file)
    file.write_text(people().replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_table(file, schema)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("reel", "column 'age': kind must be one of real, .* got 'reel'"),
        (
            {"kind": "category", "categories": ["a"]},
            "column 'age': kind category needs two different categories",
        ),
        ({"kind": "real", "categories": ["a", "b"]}, "kind real needs no categories"),
        (
            {"kind": "binary", "categories": [1, 2, 3]},
            r"'age': kind binary needs two different categories; got \[1, 2, 3\]",
        ),
        ({"kind": "real", "resolution": -1}, "column 'age': resolution must be positive; got -1"),
        ({"kind": "real", "width": 1}, "must be a kind, or a mapping of kind, categories and"),
        (3, "must be a kind, or a mapping"),
    ],
)
def test_wrong_schemas(entry: object, message: str, file: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(file, {"age": entry})
    with pytest.raises(ValueError, match="the schema names columns that are not there: old"):
        read_table(file, {"old": "real"})


def test_a_schema_declares_the_likelihood(file: Path) -> None:
    rows, schema = read_table(file, {"age": {"kind": "real", "resolution": 1}})
    vae = build((6,), 2, likelihood=schema.likelihood, missing=True)
    vae.initialise(rows)
    assert vae.likelihood.names == list(schema.columns)
    assert (
        vae.likelihood.observed(vae.likelihood(torch.zeros(24, 2))).log_prob(rows).isfinite().all()
    )
    drawn = schema.csv(vae.sample(5)).splitlines()
    assert drawn[0] == "age,job,pay,grade,visits,member"
    assert drawn[1].split(",")[1] in ("baker", "clerk", "pilot")
