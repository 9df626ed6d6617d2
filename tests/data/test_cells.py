"""Counts from the files of single-cell programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch

from pyro_vae.data import load_data
from pyro_vae.data.splits import read_rows

pytestmark = pytest.mark.filterwarnings("default")

N, G = 31, 7
X = np.random.default_rng(0).poisson(2.0, (N, G))


def table(x: Any = X, **parts: Any) -> Any:
    anndata, pd = map(pytest.importorskip, ("anndata", "pandas"))
    obs = pd.DataFrame(
        {"kind": pd.Categorical(np.arange(N) % 3)}, index=[f"c{i}" for i in range(N)]
    )
    var = pd.DataFrame(index=[f"gene{g}" for g in range(G)])
    return anndata.AnnData(x, obs=obs, var=var, **parts)


@pytest.mark.parametrize("kind", ["dense", "sparse", "layer"])
def test_h5ad(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    given = {
        "dense": lambda: table(X.astype(np.float32)),
        "sparse": lambda: table(scipy.sparse.csr_matrix(X.astype(np.float32))),
        "layer": lambda: table(np.log1p(X), layers={"counts": X}),
    }[kind]()
    given.write_h5ad(path)
    rows = read_rows(path)
    assert torch.equal(rows.x, torch.from_numpy(X))
    assert rows.columns == tuple(f"gene{g}" for g in range(G))
    assert torch.equal(rows.labels, torch.arange(N) % 3)
    assert rows.class_names == ("0", "1", "2")
    assert len(load_data(path).test) == 3


def test_a_missing_label_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    given = table()
    given.obs.loc["c4", "kind"] = None
    given.write_h5ad(path)
    labels = read_rows(path).labels
    assert labels is not None
    assert (labels < 0).nonzero().tolist() == [[4]]


@pytest.mark.parametrize("unknown", [-1, "-1"])
def test_minus_one_is_no_class(unknown: int | str, tmp_path: Path) -> None:
    given = table()
    given.obs["label"] = [unknown, *(type(unknown)(i % 2) for i in range(1, N))]
    given.write_h5ad(tmp_path / "cells.h5ad")
    rows = read_rows(tmp_path / "cells.h5ad")
    assert rows.labels is not None
    assert rows.labels.tolist() == [-1, *(i % 2 for i in range(1, N))]
    assert rows.class_names == ("0", "1")


def test_matrix_market(tmp_path: Path) -> None:
    path = tmp_path / "cells.mtx"
    scipy.io.mmwrite(path, scipy.sparse.coo_matrix(X))
    assert torch.equal(read_rows(path).x, torch.from_numpy(X))


def test_what_holds_no_counts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    for bad in (np.log(2), -1, np.nan, np.inf):
        table(np.where(X == X.max(), bad, X)).write_h5ad(path)
        words = f"expected counts.*value.s., such as {bad:g}; if they are normalised, give the raw"
        with pytest.raises(ValueError, match=words):
            read_rows(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"expected a whole \.h5ad file"):
        read_rows(path)
    path = tmp_path / "cells.mtx"
    path.write_text("x")
    with pytest.raises(ValueError, match=r"expected a whole \.mtx file"):
        read_rows(path)
