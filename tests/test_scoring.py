"""Batches scored as files are."""

from __future__ import annotations

import pickle
import re
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vae import Scorer
from pyro_vae.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore:posterior collapse")
SMALL = ["--encoder.hidden=[5]", "--decoder.hidden=[5]", "--latent_dim=2", "--epochs=1"]
N, F = 19, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of an array and of a table, with what `score` says of them."""
    folder = tmp_path_factory.mktemp("scoring")
    random = np.random.default_rng(0)
    np.savez(folder / "x.npz", x=random.normal(size=(N, F)).astype(np.float32))
    kinds = random.choice(["red", "green", "blue"], N)
    lines = [f"{kind},{value:.3f}" for kind, value in zip(kinds, random.normal(size=N))]
    lines[3] = ",0.5"
    (folder / "table.csv").write_text("\n".join(["colour,x", *lines]) + "\n")
    for name in ("x.npz", "table.csv"):
        run, out = folder / Path(name).stem, folder / f"{Path(name).stem}.scores"
        train = ["train", "--data", str(folder / name), "--run", str(run), *SMALL]
        train += ["--likelihood=Normal"] if name == "x.npz" else []
        assert main([*train, "--progress=false"]) == 0
        score = ["score", str(run), str(folder / name), "--tolerance=1", "--progress=false"]
        assert main([*score, "--out", f"{out}.csv"]) == 0
    return folder


def scores(path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=",", skiprows=1, usecols=1)


def test_arrays(folder: Path) -> None:
    x = np.load(folder / "x.npz")["x"]
    scorer = pickle.loads(pickle.dumps(Scorer(folder / "x", tolerance=1.0)))
    found = scorer({"x": x, "id": np.arange(N)})
    np.testing.assert_allclose(found["log_prob"], scores(folder / "x.scores.csv"), atol=1e-5)
    assert set(found) == {"x", "id", "log_prob", "stderr", "verdict"}
    beside = {"source": "a.csv", "day": np.int64(5), "part": torch.tensor(3), "none": None}
    wide = scorer({"x": x[:5], **beside})
    assert {name: wide[name] for name in beside} == beside
    assert wide["log_prob"].shape == (5,)
    again = pickle.loads(pickle.dumps(scorer))({"x": torch.from_numpy(x[:5])})
    close = 5 * (again["stderr"] + found["stderr"][:5])
    assert (abs(again["log_prob"] - found["log_prob"][:5]) < close + 1e-6).all()


@pytest.mark.parametrize("kind", ["frame", "mapping"])
def test_tables(kind: str, folder: Path) -> None:
    frame = pytest.importorskip("pandas").read_csv(folder / "table.csv")[["x", "colour"]]
    batch: Any = frame if kind == "frame" else {name: frame[name].to_numpy() for name in frame}
    batch["id"] = np.arange(N)
    scorer = Scorer(folder / "table", tolerance=1.0, audit=False)
    found = scorer(batch)
    log_prob = np.asarray(found["log_prob"])
    np.testing.assert_allclose(log_prob, scores(folder / "table.scores.csv"), atol=1e-5)
    assert list(found) == ["x", "colour", "id", "log_prob", "stderr", "verdict"]
    none = scorer({name: cells[:0] for name, cells in batch.items()})
    assert {name: len(cells) for name, cells in none.items()} == dict.fromkeys(found, 0)
    if kind == "frame":
        assert scorer(frame[:0]).dtypes.equals(found.dtypes)


@pytest.mark.parametrize("text", [True, False])
def test_a_column_of_labels_is_the_condition_of_a_conditional_table(
    text: bool, tmp_path: Path
) -> None:
    random, file = np.random.default_rng(0), tmp_path / "a.csv"
    cells = {"x": random.normal(size=41), "w": random.normal(size=41), "id": np.arange(41)}
    frame = pytest.importorskip("pandas").DataFrame(cells)
    frame["label"] = (frame["x"] > 0) + 1.0
    train = ["train", "--data", str(file), "--run", str(tmp_path / "run"), *SMALL, "--conditional"]
    if text:
        frame["colour"] = np.where(random.random(41) < 0.5, "red", "green")
        frame["label"] = frame["label"].map({1.0: "low", 2.0: "high"})
    frame.loc[3:4, "label"] = None
    frame.drop(columns="id").drop([3, 4]).to_csv(file, index=False)
    likelihood = [] if text else ["--likelihood=Normal"]
    assert main([*train, *likelihood, "--progress=false", "--prior=ConditionalNormal"]) == 0
    frame.drop(columns="id").to_csv(file, index=False)
    score = ["score", str(tmp_path / "run"), str(file), "--tolerance=1", "--progress=false"]
    assert main([*score, "--out", str(tmp_path / "b.csv")]) == 0
    found = Scorer(tmp_path / "run", tolerance=1.0, audit=False)(frame[frame.columns[::-1]])
    np.testing.assert_allclose(found["log_prob"], scores(tmp_path / "b.csv"), atol=1e-5)
    assert found["id"].tolist() == frame["id"].tolist()
    with pytest.raises(ValueError, match="expected labels to condition on, got none"):
        Scorer(tmp_path / "run")(frame.drop(columns="label"))
    if not text:
        with pytest.raises(ValueError, match="expected labels that are integers"):
            Scorer(tmp_path / "run")(frame.assign(label=0.5))


def test_arrays_may_hold_labels_as_files_do(tmp_path: Path) -> None:
    file, run, random = tmp_path / "x.npz", tmp_path / "run", np.random.default_rng(0)
    arrays = {"x": random.normal(size=(N, F)), "labels": np.arange(N) % 3 - 1}
    arrays["labels"][:9] += 1  # a label of -1 is unknown
    np.savez(file, **{name: values[:9] for name, values in arrays.items()})
    train = ["train", "--data", str(file), "--run", str(run), *SMALL, "--conditional"]
    assert main([*train, "--progress=false", "--likelihood=Normal"]) == 0
    np.savez(file, **arrays)
    score = ["score", str(run), str(file), "--tolerance=1", "--progress=false"]
    assert main([*score, "--out", str(tmp_path / "b.csv")]) == 0
    found = Scorer(run, tolerance=1.0, audit=False)(arrays)
    np.testing.assert_allclose(found["log_prob"], scores(tmp_path / "b.csv"), atol=1e-5)


def test_what_is_no_batch_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a batch must be a pandas frame or a mapping"):
        Scorer(folder / "x")([1, 2])
    with pytest.raises(ValueError, match="missing"):
        Scorer(folder)
    for without in ("*.safetensors", "data.json"):
        begun = shutil.copytree(
            folder / "x", tmp_path / without, ignore=shutil.ignore_patterns(without)
        )
        with pytest.raises(ValueError, match=re.escape(str(begun))) as error:
            Scorer(begun)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="rows of shape"):
        Scorer(folder / "x")({"x": np.zeros((2, F + 1), np.float32)})
    with pytest.raises(ValueError, match="log_evidence has no option 'tol', did you mean 'tole"):
        Scorer(folder / "x", tol=0.1)
    batches: dict[str, dict[str, list[Any]]] = {
        "columns of one length; got 1, 2": {"a": [1.0, 2.0], "b": [1.0]},
        "columns of one length; got no column": {},
        "the batch: b must hold real numbers": {"a": [1.0], "b": ["red"]},
    }
    for words, batch in batches.items():
        with pytest.raises(ValueError, match=words):
            Scorer(folder / "x")(batch)


def test_columns_of_objects_count_and_none_or_two_of_a_name_are_refused(folder: Path) -> None:
    frame = pytest.importorskip("pandas").DataFrame(np.ones((2, F)), columns=["a", "b", "c"])
    scorer = Scorer(folder / "x", audit=False)
    decimals = scorer(frame.map(Decimal))
    assert decimals["log_prob"].tolist() == scorer(frame)["log_prob"].tolist()
    with pytest.raises(ValueError, match="columns of one length; got no column"):
        scorer(frame[[]])
    with pytest.raises(ValueError, match="columns of different names; got a, b, b: rename"):
        scorer(frame.set_axis(["a", "b", "b"], axis=1))
