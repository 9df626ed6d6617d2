"""log p(x) of batches of rows, for engines that share them among machines."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from pyro_vae import config
from pyro_vae.arguments import as_tensor, check_options
from pyro_vae.cli.folder import as_trained, read_record, schema_of
from pyro_vae.data import Data, read_table
from pyro_vae.estimators import log_evidence
from pyro_vae.vae import VAE

__all__ = ["Scorer"]

NONE = {"log_prob": np.zeros(0), "stderr": np.zeros(0), "verdict": np.zeros(0, str)}
OPTIONS = tuple(inspect.signature(log_evidence).parameters)[4:]  # after model, guide, x, y


class Scorer:
    """A function from a batch of rows to the batch with log p(x) of each row beside it.

    It is what Ray Data's `map_batches`, Dask's `map_partitions` and Spark's `mapInPandas` take:
    small to send, for it holds the path of the run alone and loads it once in each process. A
    row's noise depends on its place in the batch; its log p(x) does so within its standard error.

    Args:
        run: A run folder of `pyro-vae train`, which every machine can read.
        options: Of `log_evidence`, such as `tolerance`.

    Raises:
        ValueError: If the folder holds no run, or one that is not complete.
    """

    def __init__(self, run: str | os.PathLike[str], **options: Any) -> None:
        check_options("log_evidence", options, OPTIONS)
        self.run, self.options = os.path.abspath(run), options
        read_record(self.run)
        self._vae: VAE | None = config.load(self.run)  # here, where a broken run is seen early

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_vae": None}

    def __call__(self, batch: Any) -> Any:
        """Adds the columns "log_prob" (nats, in the data's own units), "stderr" and "verdict".

        Args:
            batch: A pandas frame, or a mapping of arrays: of "x" [N, *E] (and "y" [N, C]), or of
                the columns of a table by name. Other columns, such as an id, are passed on.

        Raises:
            ValueError: If the rows are not of the kind that the run was trained on.
        """
        is_mapping = isinstance(batch, Mapping)
        if not is_mapping and not hasattr(batch, "assign"):
            raise ValueError(
                "a batch must be a pandas frame or a mapping of arrays; got "
                f"{type(batch).__name__}"
            )
        cells = batch.values() if is_mapping else [batch.index]
        found = NONE if {*map(_length, cells)} == {0} else self._scored(batch)
        return {**batch, **found} if is_mapping else batch.assign(**found)

    def _scored(self, batch: Any) -> dict[str, np.ndarray]:
        """The columns that are added."""
        if self._vae is None:
            self._vae = config.load(self.run)
        rows = as_trained(self.run, self._rows(batch), self._vae)
        evidence = log_evidence(self._vae, *rows.batch(), **self.options)
        return {
            "log_prob": (evidence.log_prob + rows.log_jacobians).numpy(),
            "stderr": evidence.stderr.numpy(),
            "verdict": np.array(evidence.verdict),
        }

    def _rows(self, batch: Any) -> Data:
        """The batch as rows, untransformed."""
        schema, known = schema_of(self.run), read_record(self.run).get("rows", {}).get("columns")
        if isinstance(batch, Mapping) and "x" in batch and "x" not in (known or ()):
            return Data(batch["x"], batch.get("y"), name="the batch")
        cells = {str(name): batch[name] for name in batch}
        if len(cells) < len(list(batch)):
            raise ValueError(
                "the batch: expected columns of different names; got "
                f"{', '.join(map(str, batch))}: rename those that are there twice"
            )
        if known is not None and cells.keys() >= set(known):
            cells = {name: cells[name] for name in known}
        if len(lengths := {*map(_length, cells.values())}) != 1:
            raise ValueError(
                "the batch: expected columns of one length; got "
                f"{', '.join(map(str, sorted(lengths))) or 'no column'}"
            )
        if schema is None:
            columns = [_numbers(f"the batch: {name}", cell) for name, cell in cells.items()]
            return Data(torch.stack(columns, 1), name="the batch", columns=tuple(cells))
        import pandas as pd

        rows, _ = read_table(pd.DataFrame(cells), schema)
        return Data(rows, name="the batch", columns=tuple(schema.columns), schema=schema)


def _length(cell: Any) -> int:
    """The number of its rows; 1 of what has none."""
    with suppress(TypeError):
        return len(cell)
    return 1


def _numbers(name: str, cell: Any) -> torch.Tensor:
    """A column as float32; Decimals and texts of numbers come as objects."""
    if isinstance(getattr(cell, "dtype", None), np.dtypes.ObjectDType):
        with suppress(TypeError, ValueError):  # which the next line says in plain words
            cell = np.asarray(cell, np.float64)
    return as_tensor(name, cell).float()
