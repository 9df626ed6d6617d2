"""Batches of a run scored by engines that share rows among processes, equal to one process."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyro_vae import Scorer
from pyro_vae.__main__ import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the engines
]
N, F, B = 55, 3, 11


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a table of numbers."""
    folder = tmp_path_factory.mktemp("engines")
    rows = np.random.default_rng(0).normal(size=(N, F))
    np.savetxt(folder / "x.csv", rows, delimiter=",", header="a,b,c", comments="")
    small = ["--encoder.hidden=[5]", "--decoder.hidden=[5]", "--latent_dim=2", "--epochs=1"]
    train = ["train", "--data", str(folder / "x.csv"), "--likelihood=Normal", *small]
    assert main([*train, "--run", str(folder / "run"), "--progress=false"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def frame() -> Any:
    """Rows with a number of their own, which the scorer is not to see."""
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(np.random.default_rng(1).normal(size=(N, F)), columns=["a", "b", "c"])


@pytest.fixture(scope="module")
def alone(run: Path, frame: Any) -> np.ndarray:
    """log p(x) of batches of B rows, in this process."""
    scorer = Scorer(run)
    batches = [scorer(frame[i : i + B]) for i in range(0, N, B)]
    return np.concatenate([batch["log_prob"] for batch in batches])


@pytest.fixture
def ray() -> Iterator[Any]:
    """A local Ray of two processors."""
    ray = pytest.importorskip("ray", reason="needs ray: pip install 'pyro-vae[ray]'")
    path = {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": path})
    yield ray
    ray.shutdown()


@pytest.mark.parametrize("kind", ["pandas", "numpy"])
def test_ray_with_two_workers(
    kind: str, run: Path, frame: Any, alone: np.ndarray, ray: Any
) -> None:
    rows = ray.data.from_pandas(frame)
    scored = rows.map_batches(
        Scorer,
        fn_constructor_args=(str(run),),
        batch_size=B,
        batch_format=kind,
        compute=ray.data.ActorPoolStrategy(size=2),
    ).to_pandas()
    found = scored.merge(frame.reset_index(), on=["a", "b", "c"]).set_index("index").sort_index()
    assert len(found) == N
    np.testing.assert_allclose(found["log_prob"], alone, atol=1e-6)
    assert {"stderr", "verdict"} <= set(found)


def test_dask_in_two_processes(run: Path, frame: Any, alone: np.ndarray) -> None:
    dask = pytest.importorskip("dask.dataframe", reason="needs dask")
    scorer = Scorer(run)
    meta = frame.assign(log_prob=0.0, stderr=0.0, verdict="")[:0]
    parts = dask.from_pandas(frame, npartitions=N // B)
    found = parts.map_partitions(scorer, meta=meta).compute(scheduler="processes", num_workers=2)
    np.testing.assert_allclose(found["log_prob"], alone, atol=1e-6)


@pytest.fixture
def spark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A local Spark of two processes, which puts B rows into each part."""
    reason = "needs pyspark and Java"
    sql = pytest.importorskip("pyspark.sql", reason=reason)
    if shutil.which("java") is None:
        pytest.skip(reason)
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    session = sql.SparkSession.builder.master("local[2]").config("spark.ui.enabled", False)
    session = session.config("spark.default.parallelism", N // B).getOrCreate()
    yield session
    session.stop()


def test_spark_in_two_processes(run: Path, frame: Any, alone: np.ndarray, spark: Any) -> None:
    rows, scorer = spark.createDataFrame(frame.reset_index()), Scorer(run)
    columns = ", ".join(f"{name} {kind}" for name, kind in rows.dtypes)
    schema = f"{columns}, log_prob double, stderr double, verdict string"
    scored = rows.mapInPandas(lambda batches: map(scorer, batches), schema).toPandas()
    found = scored.sort_values("index")
    assert list(found["index"]) == list(range(N))
    np.testing.assert_allclose(found["log_prob"], alone, atol=1e-6)
    assert set(found["verdict"]) <= {"reliable", "doubtful", "lower bound"}
