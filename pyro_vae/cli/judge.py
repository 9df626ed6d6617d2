"""log p(x) of rows of a run, and what is said of it, for all commands that judge."""

from __future__ import annotations

from dataclasses import replace

from jsonargparse import Namespace

from pyro_vae.data import Data, Splits, spread
from pyro_vae.estimators import Evidence, log_evidence
from pyro_vae.vae import VAE

__all__ = ["estimate", "held_out", "rows_of", "shifted", "shown"]


def held_out(splits: Splits, part: str, limit: int | None) -> Data:
    """Rows that stand for a part, with their noise drawn once."""
    data: Data = getattr(splits, part)
    return data.subset(spread(len(data), limit, splits.seed)).fixed()


def rows_of(splits: Splits, part: str, data: Data) -> str:
    """Which rows of a part these are, in words."""
    whole = len(getattr(splits, part))
    if len(data) == whole:
        return f"all {whole} rows of the {part} part"
    return f"{len(data)} of {whole} rows of the {part} part, spread over it (seed {splits.seed})"


def estimate(vae: VAE, data: Data, options: Namespace) -> Evidence:
    """log p(x) of all rows, by the one estimator to call."""
    names = ("tolerance", "chunk_size", "compile", "devices", "seed")
    asked = {name: options[name] for name in names}
    return log_evidence(vae, *data.batch(), progress=shown(options), **asked)


def shown(options: Namespace) -> bool:
    """Whether progress is shown: where asked for, and the output is not JSON."""
    return bool(options.progress and not options.get("json"))


def shifted(evidence: Evidence, data: Data) -> Evidence:
    """Evidence in the units of the data before their transform."""
    return replace(evidence, log_prob=evidence.log_prob + data.log_jacobians)
