"""Arrays, tables and folders of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pyro_vae.data import Data, Splits, load_data, read_rows

RNG = np.random.default_rng(0)


def parts(splits: Splits) -> tuple[Data, Data, Data]:
    return splits.train, splits.validation, splits.test


def together(splits: Splits) -> Tensor:
    """All rows of the three parts in the order of the file."""
    rows = torch.cat([part.rows for part in parts(splits)]).argsort()
    return torch.cat([part.x for part in parts(splits)])[rows]


def test_an_npz_file_with_one_part(tmp_path: Path) -> None:
    x, labels = RNG.integers(256, size=(101, 5, 7)).astype(np.uint8), np.arange(101) % 3
    path = tmp_path / "grey.npz"
    np.savez_compressed(path, x=x, labels=labels, y=RNG.random((101, 2)))
    splits = load_data(path)
    assert [len(part) for part in parts(splits)] == [81, 10, 10]
    assert np.array_equal(together(splits)[:, 0], x)
    assert splits.train.levels == 256
    assert splits.train.y is None
    conditional = load_data(str(path), conditional=True)
    assert conditional.train.y.shape == (81, 2)
    assert torch.equal(conditional.train.labels, conditional.train.rows % 3)


def test_an_npz_file_with_three_parts(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    arrays = {"x": RNG.random((11, 3)), "x_test": RNG.random((5, 3))}
    np.savez(path, **arrays)
    assert [len(part) for part in parts(load_data(path))] == [9, 2, 5]
    np.savez(path, **arrays, x_validation=RNG.random((7, 3)))
    splits = load_data(path)
    assert [len(part) for part in parts(splits)] == [11, 7, 5]
    assert splits.test.rows.tolist() == list(range(18, 23))
    assert splits.describe()["validation"] is None
    with pytest.raises(ValueError, match="no validation size"):
        load_data(path, validation=2)


@pytest.mark.parametrize(
    ("dtype", "stored", "levels"),
    [
        ("float64", torch.float32, None),
        (">f4", torch.float32, None),
        ("int32", torch.int64, None),
        ("uint16", torch.int64, None),
        ("int8", torch.int64, None),
        ("uint8", torch.uint8, 256),
        ("bool", torch.uint8, 2),
    ],
)
def test_npy_dtypes(tmp_path: Path, dtype: str, stored: torch.dtype, levels: int) -> None:
    x = RNG.integers(2, size=(11, 3)).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    splits = load_data(tmp_path / "x.npy")
    assert (splits.train.x.dtype, splits.train.levels) == (stored, levels)
    assert np.array_equal(together(splits), x)
    assert splits.train.batch(torch.tensor([0]))[0].dtype == torch.float32


def test_a_vector_becomes_one_column(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", RNG.random(11))
    assert load_data(tmp_path / "x.npy").train.data_shape == (1,)


def test_all_parts_of_a_file_are_its_rows(tmp_path: Path) -> None:
    arrays = {"x": RNG.random((7, 2)), "x_validation": RNG.random((3, 2)), "x_test": np.eye(2)}
    np.savez(tmp_path / "x.npz", **arrays, labels_test=np.array([1, 0]))
    rows = read_rows(tmp_path / "x.npz")
    assert torch.equal(rows.x, torch.from_numpy(np.concatenate([*arrays.values()])).float())
    assert rows.labels is not None
    assert rows.labels.tolist() == [-1] * 10 + [1, 0]
    assert rows.rows.tolist() == [*range(12)]
    np.savez(tmp_path / "x.npz", **arrays)
    assert read_rows(tmp_path / "x.npz").labels is None


def test_classes_are_counted_over_all_parts(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=np.ones((7, 2)), labels=np.arange(7) % 2, x_test=np.ones((3, 2)),
             labels_test=np.array([4, 0, 0]))  # fmt: skip
    splits = load_data(path, conditional=True)
    assert splits.train.y.shape[1] == splits.test.y.shape[1] == 5


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"data": np.ones((3, 2))}, "expected an array 'x'.*got data"),
        ({"x": np.ones((3, 2)), "X_test": np.ones((3, 2))}, "got X_test, x"),
        ({"x": np.array([["a"], ["b"]])}, "real numbers, got dtype <U1"),
        ({"x": np.full((3, 2), 2**64 - 1, np.uint64)}, r"integers below 2\*\*63, got 18446744"),
        ({"x": np.ones((3, 2), complex)}, "real numbers, got dtype complex128"),
        ({"x": np.array([[{}], [{}]])}, "without Python objects.*allow_pickle=False"),
        ({"x": np.ones((11, 2)), "labels": np.ones(11)}, "labels that are integers"),
        ({"x": np.ones((11, 2)), "labels": np.arange(7)}, "expected labels of 1"),
        (
            {"x": np.ones((3, 2)), "y": np.arange(3), "labels": np.arange(3)},
            "y of integers .* and labels .* keep one, or store y as floating point",
        ),
        ({"x": np.ones((3, 2)), "y": np.array([0, 1, -2])}, "or -1 where unknown, got negative"),
        ({"X": np.ones((3, 2))}, "'y' .* and 'labels' .* got X"),
        (
            {"x": np.array([[1.0], [np.inf], [np.nan]])},
            r"1 row\(s\) hold infinite values, f.* \[1\]",
        ),
        ({"x": np.array([[1.0], [1e300], [1.0]])}, r"infinite values, first \[1\]"),
        ({"x": np.zeros((11, 5, 7, 3), np.uint8)}, r"looks like \[N, H, W, C\]"),
        ({"x": np.ones((11, 2)), "x_test": np.ones((11, 3))}, r"shape \[2\].* shape \[3\]"),
        ({"x": np.ones((11, 2)), "y_test": np.ones((11, 3))}, "got x, y_test"),
        (
            {"x": np.ones((11, 2)), "y": np.ones(11), "x_test": np.ones((3, 2))},
            "1 columns of y and .* no columns of y",
        ),
        ({"x": np.ones((2, 2))}, "rows left for training"),
        ({"x": np.ones((0, 2))}, "at least 1 row"),
    ],
)
def test_bad_arrays_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message):
        load_data(path)


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool"])
def test_integers_named_y_are_classes(tmp_path: Path, dtype: str) -> None:
    path, classes = tmp_path / "x.npz", (np.arange(11) % 2).astype(dtype)
    np.savez(path, x=np.ones((11, 3)), y=classes)
    splits = load_data(path)
    assert (splits.train.y, splits.train.classes) == (None, 2)
    assert torch.equal(splits.train.labels, splits.train.rows % 2)
    conditional = load_data(path, conditional=True).train
    assert torch.equal(conditional.y, torch.eye(2)[conditional.labels])


def test_numbers_named_y_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for y in (np.arange(11.0), np.arange(11)[:, None], np.eye(11)[:, :3].astype(int)):
        np.savez(path, x=np.ones((11, 3)), y=y, labels=np.arange(11) % 2)
        train = load_data(path, conditional=True).train
        expected = torch.as_tensor(y).float().reshape(11, -1)[train.rows]
        assert torch.equal(train.y, expected)


def test_a_source_without_labels_has_no_condition(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", RNG.random((11, 3)))
    with pytest.raises(ValueError, match="expected labels to condition on"):
        load_data(tmp_path / "x.npy", conditional=True)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_unreadable_arrays_are_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected a file that numpy.savez"):
        load_data(path)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=RNG.random((101, 7)))
    content = bytearray(path.read_bytes())
    content[200:900] = bytes(700)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected a file that numpy.savez"):
        load_data(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("1,2\n")
    with pytest.raises(ValueError, match="expected an .npz, .npy, .csv, .tsv or .parquet file"):
        load_data(tmp_path / "x.txt")


@pytest.mark.parametrize("head", ["", "a,b,c\n", '\ufeff"a ""x""",b,c\n', "a,b,c\r\n"])
def test_csv_tables(tmp_path: Path, head: str) -> None:
    x = RNG.integers(100, size=(13, 3)) / 8
    lines = "\n".join(",".join(map(str, row)) for row in x.tolist())
    path = tmp_path / "x.csv"
    path.write_text(head + lines + "\n\n", encoding="utf-8", newline="")
    splits = load_data(path)
    assert np.array_equal(together(splits), x)
    assert splits.train.x.dtype == torch.float32
    assert (splits.train.labels, splits.train.levels) == (None, None)
    names = ('a "x"' if '"' in head else "a", "b", "c") if head else None
    assert splits.train.columns == splits.test.fixed().columns == names


def test_labels_that_are_unknown_are_minus_one(tmp_path: Path) -> None:
    path = tmp_path / "few.csv"
    path.write_text("a,label\n" + "".join(f"{i}.5,{i % 2 if i < 4 else ''}\n" for i in range(31)))
    train = load_data(path).train
    assert torch.equal(train.labels, torch.where(train.rows < 4, train.rows % 2, -1))
    words = ["cat", "dog", "", "-1"]
    path.write_text("a,b,label\n" + "".join(f"{i}.5,u{i % 2},{words[i % 4]}\n" for i in range(31)))
    train = load_data(path).train
    names = train.rows % 4
    assert torch.equal(train.labels, torch.where(names < 2, names, -1))
    arrays = tmp_path / "few.npz"
    np.savez(arrays, x=np.ones((31, 2)), labels=np.where(np.arange(31) < 4, 1.0, np.nan))
    train = load_data(arrays).train
    assert torch.equal(train.labels, torch.where(train.rows < 4, 1, -1))
    known = (train.labels >= 0).float()
    assert torch.equal(train.one_hot().y, torch.stack([0 * known, known], 1))


def test_a_csv_column_of_labels(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b,label\n" + "".join(f"{i}.5,1e-3,{i % 3}\n" for i in range(11)))
    splits = load_data(path, conditional=True)
    assert splits.train.data_shape == (2,)
    assert torch.equal(splits.train.labels, splits.train.rows % 3)
    assert splits.test.y.shape == (1, 3)
    assert splits.train.columns == ("a", "b")
    path.write_text("a, Label ,b\n" + "".join(f"{i}.5,{i % 3},1e-3\n" for i in range(11)))
    other = load_data(path, conditional=True)
    assert torch.equal(other.train.x, splits.train.x)
    assert torch.equal(other.train.labels, splits.train.labels)
    assert other.train.columns == ("a", "b")
    path.write_text("a,label,b\n" + "".join(f"{i}.5,{'yn'[i % 2]},u{i % 3}\n" for i in range(11)))
    named = load_data(path).train
    assert named.class_names == ("n", "y")
    assert torch.equal(named.labels, 1 - named.rows % 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one row"),
        ("a,b\n", "at least one row"),
        ("a,b\n1,2\n3,four\n", "got 'four' in line 3, column 2"),
        ("1,x\n1,2\n", "got 'x' in line 1, column 2"),
        (",a\n0,1.5\n1,2.5\n", "got none for column 1 .*write the file with index=False"),
        ("Unnamed: 0,a\n0,1.5\n", "got none for column 1 "),
        ("a,label,Label\n1,0,0\n", "expected one column 'label', got 2"),
        ("a,label,Label\nx,0,0\n", "expected one column 'label', got 2"),
        ("2019,2020\n1.5,2.5\n4,3\n", "numbers that count up, 2019, 2020"),
        ("0,1,2\n1.5,2.5,0\n1,4,3\n", "numbers that count up, 0, 1, 2"),
        ("a,b\n1_000,2\n3,4\n5,6\n", "got '1_000' in line 2, column 1"),
        ("a,label\n1,0\n2,1e18\n3,1\n", "labels below 1000000, got others in 1 row"),
        ("1,2\n3\n", "expected 2 columns as in the first line, got 1 in line 2"),
        ("a,label\n1,0\n2,0.5\n3,1\n", "labels that are integers from 0, got 0.5 in row 1"),
        ("1,2\n3,inf\n5,\n", r"1 row\(s\) hold infinite values, first \[1\]"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_data(path)


def test_empty_cells_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "holes.csv"
    path.write_text("a,b\n1,\n ,nan\nNA,null\n4,5\n")
    x = read_rows(path).x
    assert x.nan_to_num(-1).tolist() == [[1, -1], [-1, -1], [-1, -1], [4, 5]]


def test_endings_in_capitals_are_endings(tmp_path: Path) -> None:
    for name, text in (("A.CSV", "a,b\n1,2\n3,4\n"), ("B.TSV", "a\tb\n7\t2\n5\t4\n7\t3\n")):
        (tmp_path / name).write_text(text)
        assert read_rows(tmp_path / name).columns == ("a", "b")
    np.save(tmp_path / "x.npy", np.ones((3, 2)))
    assert len(read_rows((tmp_path / "x.npy").rename(tmp_path / "x.NPY"))) == 3


def test_a_table_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(b"1,2\n\xff\xfe,3\n")
    with pytest.raises(ValueError, match="expected a table in UTF-8"):
        load_data(path)


def test_standardise_uses_the_training_part(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", 5 + 3 * RNG.random((101, 3)))
    splits = load_data(tmp_path / "x.npy", transform="standardise")
    x = splits.train.x.double()
    for part in parts(splits):
        assert torch.allclose(part.transform.mean.double(), x.mean(0))
        assert torch.allclose(part.transform.std.double(), x.std(0, correction=0))


def save_images(
    folder: Path, rows: int, size: tuple[int, int] = (7, 5), mode: str = "RGB"
) -> np.ndarray:
    """Writes images of one random shade each and returns their pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (rows, size[1], size[0], 3) if mode == "RGB" else (rows, size[1], size[0])
    pixels = RNG.integers(256, size=shape).astype(np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).convert(mode).save(folder / f"{i:03}.png")
    return pixels


def test_a_folder_of_colour_images(tmp_path: Path) -> None:
    pixels = save_images(tmp_path, 11)
    splits = load_data(tmp_path)
    assert np.array_equal(together(splits).permute(0, 2, 3, 1), pixels)
    assert (splits.train.levels, splits.train.labels) == (256, None)


def test_a_folder_of_grey_images_with_classes(tmp_path: Path) -> None:
    pixels = [save_images(tmp_path / name, 7, mode="L") for name in ("b", "a", "c")]
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    splits = load_data(tmp_path)
    assert np.array_equal(together(splits)[:, 0], np.concatenate([pixels[i] for i in (1, 0, 2)]))
    assert torch.equal(splits.train.labels, splits.train.rows // 7)


def test_a_folder_with_training_and_test_part_shares_the_classes(tmp_path: Path) -> None:
    save_images(tmp_path / "train" / "a", 11)
    save_images(tmp_path / "train" / "c", 2)
    test = save_images(tmp_path / "test" / "c", 5)
    splits = load_data(tmp_path, conditional=True)
    assert [len(part) for part in parts(splits)] == [11, 2, 5]
    assert np.array_equal(splits.test.x.permute(0, 2, 3, 1), test)
    assert splits.test.labels.tolist() == [1] * 5
    assert splits.train.y.shape == (11, 2)


def test_bilevel_images_have_two_levels(tmp_path: Path) -> None:
    save_images(tmp_path, 11, mode="1")
    splits = load_data(tmp_path)
    assert splits.train.levels == 2
    assert splits.train.x.unique().tolist() == [0, 1]


def test_grey_images_among_colour_ones_are_read_as_colour(tmp_path: Path) -> None:
    save_images(tmp_path / "a", 7)
    grey = save_images(tmp_path / "b", 5, mode="L")
    x = together(load_data(tmp_path))[7:]
    assert np.array_equal(x, np.repeat(grey[:, None], 3, 1))


def test_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    save_images(tmp_path / "a", 7, size=(7, 5))
    save_images(tmp_path / "b", 7, size=(7, 3))
    message = r"a.000.png of 5 x 7 \(height x width\) and .*b.000.png of 3 x 7"
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path)


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected images .*got none"):
        load_data(tmp_path)
    save_images(tmp_path / "a", 7)
    (tmp_path / "a" / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="bad.png: expected a readable image"):
        load_data(tmp_path)
    (tmp_path / "a" / "bad.png").rename(tmp_path / "a" / "bad.other")
    save_images(tmp_path, 1)
    with pytest.raises(ValueError, match="class folders or none"):
        load_data(tmp_path)


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    save_images(tmp_path, 11, size=(101, 53))
    path = tmp_path / "005.png"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="005.png: expected a readable image"):
        load_data(tmp_path)


def test_deep_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((5, 7), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png: expected 8 bits per channel"):
        load_data(tmp_path)


def test_a_first_line_that_counts_up_is_data_where_others_do_too(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("2019,2020\n1.5,2.5\n3,4\n0,1\n7.5,2\n")
    assert len(read_rows(path)) == 5
