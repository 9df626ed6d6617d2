"""Commands that judge runs: log p(x) and what it is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyro_vae.cli.folder import load_run, pairs, write_text
from pyro_vae.data import Data, Splits
from pyro_vae.estimators import evidence_lower_bound, importance_sampling
from pyro_vae.metrics import active_units

__all__ = ["evaluate"]


def evaluate(options: Namespace) -> None:
    """The table of a run: log p(x) with its error, ELBO and its terms, active units."""
    vae, splits = load_run(options.run, options.data_root)
    data = rows(splits, options.part, options.limit)
    x, y = data.batch(torch.arange(len(data)))
    bound = evidence_lower_bound(vae.model, vae.guide, x, y, num_samples=options.elbo_samples)
    evidence = importance_sampling(
        vae.model, vae.guide, x, y, num_samples=options.num_samples, seed=options.seed
    )
    evidence.save(Path(options.run) / "evidence.safetensors")
    with torch.no_grad():
        active = active_units(torch.cat([vae.encode(*pair).mean for pair in pairs(data)]))
    monte_carlo, over_data = evidence.mean_stderr()
    numbers: dict[str, Any] = {
        "part": options.part,
        "rows": len(data),
        "num_samples": options.num_samples,
        "log_prob": evidence.mean(),
        "stderr_monte_carlo": monte_carlo,
        "stderr_data": over_data,
        "elbo": bound.elbo.mean().item(),
        "kl": bound.kl.mean().item(),
        "reconstruction": bound.reconstruction.mean().item(),
        "active_units": int(active.sum()),
        "khat_below_threshold": evidence.share_below_threshold(),
        "bits_per_dim": data.bits_per_dim(evidence.log_prob).mean().item(),
    }
    write_text(Path(options.run) / "evaluation.json", json.dumps(numbers, indent=1))
    lines = {
        "log p(x)": f"{evidence.mean():.2f} +- {monte_carlo:.2f} (Monte Carlo) "
        f"+- {over_data:.2f} (data)",
        "estimator": f"{evidence.method[0]}, K = {options.num_samples}: {evidence.verdict[0]}",
        "ELBO": with_error(bound.elbo),
        "KL": f"{with_error(bound.kl)}, {', '.join(sorted(set(bound.rules.values())))}",
        "reconstruction": with_error(bound.reconstruction),
        "active units": f"{numbers['active_units']} of {len(active)}",
        "k-hat below its threshold": f"{numbers['khat_below_threshold']:.1%} of data",
        "bits per dimension": f"{numbers['bits_per_dim']:.3f} (transform: {splits.transform})",
    }
    whole = len(getattr(splits, options.part))
    table(f"{options.run}: {len(data)} of {whole} rows of the {options.part} part", lines)


def rows(splits: Splits, part: str, limit: int | None) -> Data:
    """The first rows of a part, with their noise drawn once."""
    data: Data = getattr(splits, part)
    return data.subset(torch.arange(min(len(data), limit or len(data)))).fixed()


def with_error(values: Tensor) -> str:
    """Mean and its standard error over data."""
    return f"{values.mean().item():.2f} +- {values.std().item() / len(values) ** 0.5:.2f} (data)"


def table(title: str, lines: dict[str, str]) -> None:
    """Prints names and values."""
    shown = Table(title=title, show_header=False)
    for name, text in lines.items():
        shown.add_row(name, text)
    Console().print(shown)
    print("nats per datum, of held-out data; larger is better but for KL and bits")
