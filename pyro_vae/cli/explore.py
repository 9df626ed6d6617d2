"""The page that runs a decoder, of a run."""

from __future__ import annotations

import json
import math
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyro
import torch
from jsonargparse import Namespace
from torch import Tensor, nn

from pyro_vae.arguments import check_whole
from pyro_vae.classes import ClassVAE
from pyro_vae.cli.figures import followed, unit_kl, unit_names
from pyro_vae.cli.folder import destination, load_run, placed
from pyro_vae.cli.judge import estimate, rows_of
from pyro_vae.data import Data, Splits, spread
from pyro_vae.data.transforms import Transform
from pyro_vae.estimators import (
    Evidence,
    class_probabilities,
    evidence_lower_bound,
    importance_sampling,
)
from pyro_vae.explorer import Content, Rows, page
from pyro_vae.files import reading, write
from pyro_vae.vae import VAE

__all__ = ["evaluated", "explore"]


class Mean(nn.Module):
    """E[x | z] in the units of the data before their transform, at means of other latents."""

    def __init__(self, vae: VAE, transform: Transform) -> None:
        super().__init__()
        self.vae, self.transform = vae, transform

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """[B, *E] for z [B, D] and y [B, C]."""
        with pyro.validation_enabled(False):
            own = {n: d.mean for n, d in self.vae.likelihood.latents().items()}
            return self.transform.inverse(self.vae.likelihood(z, y, **own).mean)


class Follow(nn.Module):
    """z [B, D] with the layers below that of a unit at their means given those above."""

    def __init__(self, vae: VAE, unit: int) -> None:
        super().__init__()
        self.vae, self.unit = vae, unit

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """[B, D] for z [B, D] and y [B, C]."""
        with pyro.validation_enabled(False):
            return followed(self.vae.prior(y), z, self.unit)


def explore(options: Namespace) -> None:
    """Writes the page; it opens from disk and asks for nothing else."""
    check_whole(0, judged=options.judged)
    out = destination(options.out, Path(options.run) / "explore.html", (".html",))
    vae, splits = load_run(options.run, options.data_root)
    part: Data = getattr(splits, options.part)
    index = spread(len(part), options.limit, splits.seed)
    data = part.subset(index).fixed()
    with torch.no_grad():
        text = page(_content(vae, splits, data, index, options))
    write(out, text)
    print(f"{len(text) / 1e6:.2f} MB in {out}: open it in a browser")


def _content(vae: VAE, splits: Splits, data: Data, index: Tensor, options: Namespace) -> Content:
    x, y = data.batch(torch.arange(len(data)))
    c = y
    if isinstance(vae, ClassVAE):  # of the class of most weight, or that of the label
        few: dict[str, Any] = {"estimator": importance_sampling, "num_samples": 10}
        likely = class_probabilities(vae, x, y, **few).probabilities.argmax(-1)
        c = torch.eye(vae.classes)[likely]
    prior, codes = vae.prior(c), VAE.encode(vae, x, c)
    back = data.transform.inverse
    inputs = getattr(vae.prior, "inputs", None)
    if inputs is not None and (options.no_data or inputs.shape[1:] != x.shape[1:]):
        inputs = None
    kl = None if isinstance(vae, ClassVAE) else unit_kl(vae, data)
    known = _known(vae, splits, data, options)
    where = rows_of(splits, options.part, data)
    one_hot = c is not None and c.shape[1] == data.classes
    return Content(
        name=Path(options.run).resolve().name,
        about=_about(vae, where, not options.no_data),
        decoder=Mean(vae, data.transform).eval(),
        prior=prior,
        rows=Rows(
            numbers=index,
            codes=codes,
            shown=None if options.no_data else back(x).float(),
            y=c,
            labels=data.labels,
            **known,
        ),
        limits=_limits(back(x), data),
        kl=codes.mean.var(0, correction=0) if kl is None else kl,
        order="the variance of its codes" if kl is None else "its KL",
        names=unit_names(vae),
        layers=list(vae.sizes.values()),
        follow=[Follow(vae, end).eval() for end in accumulate(list(vae.sizes.values())[:-1])],
        columns=data.columns,
        classes=data.classes if one_hot else None,
        inputs=None if inputs is None else back(inputs),
    )


def _known(vae: VAE, splits: Splits, data: Data, options: Namespace) -> dict[str, Any]:
    """ELBO of each row, and log p(x): what evaluate found, or of some rows now."""
    vae, data = placed(vae, data, options.accelerator)
    x, y = data.batch(torch.arange(len(data)))
    elbo = evidence_lower_bound(vae.model, vae.guide, x, y, num_samples=100).elbo
    where = rows_of(splits, options.part, data)
    found = evaluated(Path(options.run), where, elbo.mean().item())
    some = torch.arange(len(data))
    if found is None:
        some = spread(len(data), min(options.judged, len(data)) or 1, splits.seed)
        found = estimate(vae, data.subset(some), options) if options.judged else None
    vae.to("cpu")
    log_prob, stderr = torch.full((2, len(data)), math.nan)
    verdict = [""] * len(data)
    if found is not None:
        log_prob[some], stderr[some] = found.log_prob.float(), found.stderr.float()
        for i, word in zip(some.tolist(), found.verdict):
            verdict[i] = word
    return {"elbo": elbo, "log_prob": log_prob, "stderr": stderr, "verdict": verdict}


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


def _about(vae: VAE, where: str, with_data: bool) -> list[str]:
    top = getattr(vae.prior, "layers", [vae.prior])[-1]
    parts = {"prior": top, "likelihood": vae.likelihood, "posterior": vae.posterior}
    named = ", ".join(f"{role} {type(part).__name__}" for role, part in parts.items())
    sizes = " + ".join(map(str, vae.sizes.values()))
    held = "the rows themselves" if with_data else "not the rows themselves"
    return [
        f"A variational autoencoder of {sizes} latents: {named}.",
        f"Codes are those of {where}.",
        f"This file holds the decoder's weights, the codes of these rows, and {held}.",
    ]


def _limits(x: Tensor, data: Data) -> tuple[Tensor, Tensor]:
    """Black and white of images; of columns, the ends of most of their values."""
    if data.levels is not None:
        return torch.tensor(0.0), torch.tensor(float(data.levels - 1))
    if x.ndim == 4:
        return x[~x.isnan()].amin(), x[~x.isnan()].amax()
    low, high = x.float().nanquantile(torch.tensor([0.01, 0.99]), 0).nan_to_num(0)
    return low, torch.where(high > low, high, low + 1)
