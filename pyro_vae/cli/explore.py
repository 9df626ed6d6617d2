"""Writes the page that runs a decoder: of a run, of a VAE, or of other Pyro programs."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from jsonargparse import Namespace
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.arguments import check_whole
from pyro_vae.classes import ClassVAE
from pyro_vae.cli.figures import lower_layers_at_mean, unit_kl, unit_names
from pyro_vae.cli.folder import destination, load_run, to_device
from pyro_vae.cli.score import estimate, rows_of
from pyro_vae.data import Data, spread
from pyro_vae.data.transforms import Transform
from pyro_vae.densities import densities, evaluating
from pyro_vae.estimators import (
    Evidence,
    class_probabilities,
    evidence_lower_bound,
    importance_sampling,
    log_evidence,
)
from pyro_vae.explorer import Content, Rows, page
from pyro_vae.files import reading, write
from pyro_vae.vae import VAE


def command(options: Namespace) -> None:
    """Writes the page of a run as one file, which opens without server or network."""
    check_whole(0, judged=options.judged)
    folder = Path(options.run)
    out = destination(options.out, folder / "explore.html", (".html",))
    vae, splits = load_run(options.run, options.data_root)
    part: Data = getattr(splits, options.part)
    index = spread(len(part), options.limit, splits.seed)
    data = part.subset(index).fixed()
    where = rows_of(splits, options.part, data)
    vae, rows = to_device(vae, data, options.accelerator)
    elbo = evidence_lower_bound(vae, *rows.batch(), num_samples=100).elbo
    scores = _scores(
        elbo,
        evaluated(folder, where, elbo.mean().item()),
        options.judged,
        splits.seed,
        lambda positions: estimate(vae, rows.subset(positions), options),
    )
    name, with_rows = folder.resolve().name, not options.no_data
    with torch.no_grad():
        text = page(_content(vae.to("cpu"), data, index, scores, name, where, with_rows))
    write(out, text)
    print(f"{len(text) / 1e6:.2f} MB in {out}: open it in a browser")


def evaluated(folder: Path, where: str, elbo: float) -> Evidence | None:
    """Reads what `evaluate` wrote; None if it was of other rows or other weights."""
    path = folder / "evaluation.json"
    if not path.exists() or not (folder / "evidence.safetensors").exists():
        return None
    with reading(path):
        numbers = json.loads(path.read_text())
        same = math.isclose(numbers["elbo"], elbo, rel_tol=1e-4)
        if numbers.get("rows_of") != where or not same:
            return None
    return Evidence.load(folder / "evidence.safetensors")


def explore(
    vae: Any,
    data: Any,
    out: str | os.PathLike[str] = "explore.html",
    *,
    evidence: Evidence | None = None,
    limit: int = 1000,
    judged: int = 50,
    rows: bool = True,
    name: str = "",
    seed: int = 0,
) -> Path:
    """Writes one page that runs the decoder, and opens from disk, without server or network.

    Programs other than a VAE need one latent site, of event (D,), and one that observes x and
    has a mean. If the page lacks an operation of the decoder, it shows points that were decoded
    beforehand, and says so.

    Args:
        vae: A VAE; or any module with a `model` and a `guide` that `fit` would take.
        data: The data whose codes are shown: `Data`, rows x [N, *E], or a pair (x, y).
        out: The .html file, which is overwritten.
        evidence: log p(x) of the rows shown, in their order; if None, `log_evidence` estimates
            it for `judged` of them.
        limit: Largest number of rows shown, from all over the data.
        judged: Number of rows whose log p(x) is estimated.
        rows: Whether the page holds the rows themselves, or their codes alone.
        name: The title; the name of the class if "".
        seed: Seed of the choice of rows and of the estimates.

    Returns:
        The path of the page.

    Raises:
        ValueError: If `vae` has no programs, the data are none of these, the evidence is of other
            rows, the program has other sites, `out` is in no folder, or the page would be above
            10 MB.
    """
    if not (isinstance(vae, nn.Module) and hasattr(vae, "model") and hasattr(vae, "guide")):
        raise ValueError(
            "explore needs a VAE, or a torch module with the programs model and guide; got "
            f"{type(vae).__name__}"
        )
    path = destination(os.fspath(out), Path(), (".html", ".htm"))
    check_whole(0, judged=judged, seed=seed)
    if not isinstance(data, Data):
        data = Data(*data) if isinstance(data, tuple) and len(data) == 2 else Data(data)
    index = spread(len(data), limit, seed)
    data = data.subset(index).fixed()
    if any(part.device.type != "cpu" for part in vae.parameters()):
        vae, data = copy.deepcopy(vae).to("cpu"), data.to("cpu")
    with evaluating(vae.model, vae.guide, seed=seed, device=torch.device("cpu")):
        as_vae: Any = vae if isinstance(vae, VAE) else ProgramsAsVAE(vae, data)
        elbo = evidence_lower_bound(vae.model, vae.guide, *data.batch(), num_samples=100).elbo
        own = partial(log_evidence, vae.model, vae.guide, seed=seed)
        scores = _scores(elbo, evidence, judged, seed, lambda some: own(*data.batch(some)))
        title = name or type(vae).__name__
        text = page(_content(as_vae, data, index, scores, title, f"{len(data)} rows", rows))
    write(path, text)
    return path


class Mean(nn.Module):
    """Computes E[x | z] in the units of the data before their transform.

    Latent sites of the likelihood itself are at their means.
    """

    def __init__(self, vae: Any, transform: Transform) -> None:
        super().__init__()
        self.vae, self.transform = vae, transform

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Returns E[x | z] [B, *E] for z [B, D] and y [B, C]."""
        with pyro.validation_enabled(False):
            latents = self.vae.likelihood.latents() if isinstance(self.vae, VAE) else {}
            own = {name: fn.mean for name, fn in latents.items()}
            return self.transform.inverse(self.vae.likelihood(z, y, **own).mean)


class LowerLayers(nn.Module):
    """Sets the layers of z below that of a unit to their means given those above."""

    def __init__(self, vae: Any, unit: int) -> None:
        super().__init__()
        self.vae, self.unit = vae, unit

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Returns the changed z [B, D] for z [B, D] and y [B, C]."""
        with pyro.validation_enabled(False):
            return lower_layers_at_mean(self.vae.prior(y), z, self.unit)


class ProgramsAsVAE(nn.Module):
    """Gives programs other than a VAE the methods of a VAE that the page needs.

    Args:
        programs: A module with a model and a guide.
        data: Rows; the first is given to the model as x where only z matters.
    """

    def __init__(self, programs: Any, data: Data) -> None:
        super().__init__()
        self.programs = programs
        self.model, self.guide = programs.model, programs.guide
        x, y = data.batch(torch.arange(1))
        found = densities(self.model, self.guide, x, y)
        shapes = {name: tuple(site.model.event_shape) for name, site in found.sites.items()}
        if list(map(len, shapes.values())) != [1]:
            raise ValueError(
                f"explore needs one latent site, of event (D,); the model has {shapes}"
            )
        self.sizes = {name: shape[0] for name, shape in shapes.items()}
        (self.site,) = self.sizes
        (self.observed, *_) = found.observed
        self.x = x

    def prior(self, y: Tensor | None = None) -> Distribution:
        """Returns p(z): batch () if it is one Normal, else batch [B] of y, or [1] without y."""
        fn = self._site(self.model, self.site, 1 if y is None else len(y), y)
        base = getattr(fn, "base_dist", None)
        if y is None and isinstance(base, torch.distributions.Normal):
            return dist.Normal(base.loc[0], base.scale[0]).to_event(1)
        return fn

    def encode(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns q(z | x)."""
        return self._site(self.guide, self.site, x, y)

    def likelihood(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns p(x | z)."""
        with poutine.condition(data={self.site: z}):
            return self._site(self.model, self.observed, len(z), y)

    def _site(self, program: Any, site: str, x: Tensor | int, y: Tensor | None) -> Any:
        """Returns the distribution of a site, given x or a number of rows if only z matters."""
        x = self.x.expand(x, *self.x.shape[1:]) if isinstance(x, int) else x
        args = (x,) if y is None else (x, y)
        trace = poutine.trace(program).get_trace(*args)
        return trace.nodes[site]["fn"]


def _scores(
    elbo: Tensor,
    evidence: Evidence | None,
    judged: int,
    seed: int,
    estimate: Callable[[Tensor], Evidence],
) -> dict[str, Any]:
    """Returns ELBO and log p(x) of each row, for `Rows`; estimates some, if `evidence` is None."""
    index = torch.arange(len(elbo))
    if evidence is None and judged:
        evidence = estimate(index := spread(len(elbo), judged, seed))
    log_prob, stderr = torch.full((2, len(elbo)), math.nan)
    verdict = dict.fromkeys(range(len(elbo)), "")
    if evidence is not None:
        if len(evidence) != len(index):
            raise ValueError(
                f"evidence must be of the {len(index)} rows shown; got {len(evidence)}: give "
                "limit the number of your rows"
            )
        log_prob[index], stderr[index] = evidence.log_prob.float(), evidence.stderr.float()
        verdict |= dict(zip(index.tolist(), evidence.verdict))
    return {"elbo": elbo, "log_prob": log_prob, "stderr": stderr, "verdict": [*verdict.values()]}


def _content(
    vae: Any,
    data: Data,
    numbers: Tensor,
    scores: Mapping[str, Any],
    name: str,
    where: str,
    rows: bool,
) -> Content:
    """Makes the content of the page of a VAE, or of `ProgramsAsVAE` programs.

    `numbers` are the positions of the rows in their part; `where` says which rows they are.
    """
    x, c = data.batch()
    if isinstance(vae, ClassVAE):  # codes given the likeliest class, or the known one
        options: dict[str, Any] = {"estimator": importance_sampling, "num_samples": 10}
        likely = class_probabilities(vae, x, c, **options).probabilities.argmax(-1)
        c = torch.eye(vae.classes)[likely]
    codes = VAE.encode(vae, x, c) if isinstance(vae, ClassVAE) else vae.encode(x, c)
    inverse = data.transform.inverse
    inputs = getattr(vae.prior, "inputs", None)
    if inputs is not None and not (rows and inputs.shape[1:] == x.shape[1:]):
        inputs = None
    kl = None if isinstance(vae, ClassVAE) else unit_kl(vae, data)
    one_hot = c is not None and c.shape[1] == data.classes
    columns = [] if data.schema is None else data.schema.columns.values()
    return Content(
        name=name,
        about=_about(vae, where, rows),
        decoder=Mean(vae, data.transform).eval(),
        prior=vae.prior(c),
        rows=Rows(
            numbers=numbers if data.columns is None else data.rows,
            codes=codes,
            shown=inverse(x).float() if rows else None,
            y=c,
            labels=data.labels,
            **scores,
        ),
        limits=_limits(inverse(x), data),
        kl=codes.mean.var(0, correction=0) if kl is None else kl,
        order="the variance of its codes" if kl is None else "KL, in nats",
        names=unit_names(vae),
        layers=list(vae.sizes.values()),
        follow=[LowerLayers(vae, end).eval() for end in accumulate(list(vae.sizes.values())[:-1])],
        columns=data.columns,
        categories=[list(map(str, column.categories)) for column in columns],
        classes=data.classes if one_hot else None,
        inputs=None if inputs is None else inverse(inputs),
    )


def _about(vae: Any, where: str, rows: bool) -> list[str]:
    count = " + ".join(map(str, vae.sizes.values()))
    sizes = "one latent" if count == "1" else f"{count} latents"
    kind = f"The programs of {type(getattr(vae, 'programs', vae)).__name__}, of {sizes}."
    if isinstance(vae, VAE):
        top = getattr(vae.prior, "layers", [vae.prior])[-1]
        parts = {"prior": top, "likelihood": vae.likelihood, "posterior": vae.posterior}
        named = ", ".join(f"{role} {type(part).__name__}" for role, part in parts.items())
        kind = f"A variational autoencoder of {sizes}: {named}."
    held = "the rows themselves" if rows else "not the rows themselves"
    return [
        kind,
        f"Codes are those of {where}.",
        f"This file holds the decoder's weights, the codes of these rows, and {held}.",
    ]


def _limits(x: Tensor, data: Data) -> tuple[Tensor, Tensor]:
    """Returns the values shown as black and white; of columns, the ends of most values."""
    if data.levels is not None:
        return torch.tensor(0.0), torch.tensor(float(data.levels - 1))
    if x.ndim == 4:
        return x[~x.isnan()].amin(), x[~x.isnan()].amax()
    low, high = x.float().nanquantile(torch.tensor([0.01, 0.99]), 0).nan_to_num(0)
    return low, torch.where(high > low, high, low + 1)
