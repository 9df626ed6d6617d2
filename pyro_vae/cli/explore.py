"""The page that runs a decoder, of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from pyro_vae.arguments import check_whole
from pyro_vae.cli.folder import destination, load_run, placed
from pyro_vae.cli.judge import estimate, rows_of
from pyro_vae.data import Data, spread
from pyro_vae.estimators import Evidence, evidence_lower_bound
from pyro_vae.explorer import page
from pyro_vae.exploring import content, known_rows
from pyro_vae.files import reading, write
from pyro_vae.vae import VAE

__all__ = ["evaluated", "explore"]


def explore(options: Namespace) -> None:
    """Writes the page; it opens from disk and asks for nothing else."""
    check_whole(0, judged=options.judged)
    out = destination(options.out, Path(options.run) / "explore.html", (".html",))
    vae, splits = load_run(options.run, options.data_root)
    part: Data = getattr(splits, options.part)
    index = spread(len(part), options.limit, splits.seed)
    data = part.subset(index).fixed()
    where = rows_of(splits, options.part, data)
    name = Path(options.run).resolve().name
    with torch.no_grad():
        known = _known(vae, data, where, splits.seed, options)
        text = page(content(vae, data, index, known, name, where, not options.no_data))
    write(out, text)
    print(f"{len(text) / 1e6:.2f} MB in {out}: open it in a browser")


def _known(vae: VAE, data: Data, where: str, seed: int, options: Namespace) -> dict[str, Any]:
    """ELBO of each row, and log p(x): what evaluate found, or of some rows now."""
    vae, rows = placed(vae, data, options.accelerator)
    elbo = evidence_lower_bound(vae, *rows.batch(), num_samples=100).elbo
    found = evaluated(Path(options.run), where, elbo.mean().item())
    some = torch.arange(len(data))
    if found is None:
        some = spread(len(data), min(options.judged, len(data)) or 1, seed)
        found = estimate(vae, rows.subset(some), options) if options.judged else None
    vae.to("cpu")
    return known_rows(vae, data, found, some, elbo)


def evaluated(folder: Path, where: str, elbo: float) -> Evidence | None:
    """What evaluate wrote, if it was of these rows and of these weights."""
    path = folder / "evaluation.json"
    if not path.exists() or not (folder / "evidence.safetensors").exists():
        return None
    with reading(path):
        numbers = json.loads(path.read_text())
        same = math.isclose(numbers["elbo"], elbo, rel_tol=1e-4)
        if numbers.get("rows_of") != where or not same:
            return None
    return Evidence.load(folder / "evidence.safetensors")
