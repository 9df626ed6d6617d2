"""One page that runs a decoder in a browser: no server, no network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution

from pyro_vae.explorer.program import SCRIPT, CannotRun, Program, trace

__all__ = ["CannotRun", "Content", "Program", "Rows", "page", "trace"]

LIMIT = 10_000_000  # bytes of a page, beyond which a decoder becomes an atlas
DRAWS = 256
GRID = 48  # points a side, of the map of two latents
AXIS = 13  # codes along each latent, of an atlas
AXES = 10
ROUNDING = 0.01  # of the range of outputs, that weights in float16 may be off


@dataclass(frozen=True)
class Rows:
    """Data that the page shows, their codes, and what is known of their log p(x).

    Attributes:
        numbers: The number of each row in its part [N].
        codes: q(z | x), batch [N], event (D,).
        elbo: [N], in nats.
        log_prob: Estimates of log p(x) [N]; NaN where there is none.
        stderr: Their standard errors [N].
        verdict: What they can be trusted for, a word or two each; "" where there is none.
        shown: The data in their own units [N, *E], or None to leave them out.
        y: What they are conditioned on [N, C], or None.
        labels: Their classes [N], or None.
    """

    numbers: Tensor
    codes: Distribution
    elbo: Tensor
    log_prob: Tensor
    stderr: Tensor
    verdict: list[str]
    shown: Tensor | None = None
    y: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Content:
    """What the page is made of.

    Attributes:
        name: What it is called.
        about: What the model is, in sentences.
        decoder: Its forward takes z [B, D], and y [B, C] where the model is conditional, and
            returns E[x | z] in the data's units, [B, *E].
        prior: p(z), batch () or, of a conditional model that looks at y, that of the rows.
        rows: Data.
        limits: Values shown as black and white, or ends of the bars of columns.
        kl: KL of each latent [D], or the variance of its means, by which latents are ordered.
        order: What `kl` is, in words.
        names: Names of the latents; z0, z1, ... if empty.
        layers: Lengths of the layers of latents, from the data upwards; one layer if empty.
        follow: For each layer but the lowest, the map of z [B, D] (and y) to z with the layers
            below it at their means given it.
        columns: Names of the values of a table.
        categories: For each of them, names of its codes, none for numbers; of two codes the mean
            is shown as the share of the second.
        classes: The number of classes, if y is one of them.
        inputs: Pseudo-inputs of the prior's components in the data's units [C, *E], or None.
    """

    name: str
    about: list[str]
    decoder: nn.Module
    prior: Distribution
    rows: Rows
    limits: tuple[Tensor, Tensor]
    kl: Tensor
    order: str
    names: Sequence[str] = ()
    layers: Sequence[int] = ()
    follow: Sequence[nn.Module] = ()
    columns: tuple[str, ...] | None = None
    categories: Sequence[Sequence[str]] = ()
    classes: int | None = None
    inputs: Tensor | None = None


@torch.no_grad()
def page(content: Content) -> str:
    """The page, complete in itself: its scripts, its weights and its data are inside.

    The decoder is traced into torch's own operations, which the page runs; matrices are held in
    float16. A decoder with an operation that the page lacks, or of a page above 10 MB, is held as
    an atlas instead: the nearest of some codes that were decoded beforehand. The page says so.

    Cost: a trace of the decoder (seconds), 256 draws of the prior, and q(z), the average of
    q(z | x) over the rows, at each of them and on a grid for two latents.

    Raises:
        ValueError: If the page is above 10 MB with an atlas too.
    """
    draws = _draws(content)
    try:
        made = _written(content, draws, _of_program(content, draws))
        if len(made) <= LIMIT:
            return made
        why = f"its page would take {len(made) / 1e6:.1f} MB"
    except CannotRun as error:
        why = str(error)
    made = _written(content, draws, _of_atlas(content, draws, why))
    if len(made) > LIMIT:
        raise ValueError(
            f"the page would take {len(made) / 1e6:.1f} MB, above the {LIMIT / 1e6:.0f} MB that "
            "open quickly: show fewer rows, or leave the data out"
        )
    return made


def _draws(content: Content) -> tuple[Tensor, ...]:
    """Draws of the prior [M, D], and the y [M, C] that each goes with."""
    prior, y = content.prior, content.rows.y
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        repeats = -(-DRAWS // prior.batch_shape.numel())
        z = prior.sample(Size((repeats,))).flatten(0, -2)[:DRAWS]
    return (z,) if y is None else (z, y[torch.arange(len(z)) % len(y)])


def _of_program(content: Content, draws: tuple[Tensor, ...]) -> dict[str, Any]:
    """The decoder traced; its weights are single where half would be seen."""
    program = trace(content.decoder, *(part[:1] for part in draws))
    if (error := _error(program, content.decoder, draws)) > ROUNDING:
        program = program.single()
        error = _error(program, content.decoder, draws)
    weights = sum(constant.numel() for constant in program.constants)
    said = (
        f"The decoder runs in this page, from its {weights:,} weights. It deviates from torch by "
        f"at most {error:.1g} of the range of its values."
    )
    return {"program": program.declare(), "constants": program.constants, "said": said}


def _error(program: Program, decoder: nn.Module, draws: tuple[Tensor, ...]) -> float:
    """Greatest deviation of the page from the decoder at some draws, in parts of the range."""
    exact = decoder(*(part[:32] for part in draws))
    rounded = torch.cat([program(*(part[i : i + 1] for part in draws)) for i in range(32)])
    width = exact.amax() - exact.amin()
    return ((rounded - exact).abs().max() / width.clamp(min=1e-30)).item()


def _of_atlas(content: Content, draws: tuple[Tensor, ...], why: str) -> dict[str, Any]:
    """Codes decoded now, of which the page shows the nearest.

    They are those of the rows, and a grid of two latents, or draws and lines along latents.
    """
    means = content.rows.codes.mean
    if means.shape[1] == 2:
        z = torch.cat([_grid(content, 32)[0], means])
    else:
        top = content.kl.argsort(descending=True)[:AXES]
        lines = means.mean(0).repeat(len(top), AXIS, 1)
        lines[torch.arange(len(top)), :, top] = torch.linspace(-3, 3, AXIS).to(lines)
        z = torch.cat([draws[0], means, lines.flatten(0, 1)])
    y = [y[torch.arange(len(z)) % len(y)] for y in draws[1:]]
    x = torch.cat([content.decoder(*some) for some in zip(*(p.split(64) for p in (z, *y)))])
    said = (
        f"This decoder does not run in the page ({why}). The page shows the nearest of "
        f"{len(z)} codes that were decoded beforehand, so pictures move in steps."
    )
    return {"z": z, "x": _shown(x, content), "said": said, **dict(zip("y", y))}


def _grid(content: Content, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points [side^2, 2], row by row from the top, and the ends [2] of the map."""
    means = content.rows.codes.mean
    centre = (means.amax(0) + means.amin(0)) / 2
    half = 1.15 * (means - centre).abs().max().clamp(min=2)
    low, high = centre - half, centre + half
    step = (torch.arange(side) + 0.5) / side
    across = torch.lerp(low[0], high[0], step.to(low))
    down = torch.lerp(high[1], low[1], step.to(low))
    return torch.cartesian_prod(down, across).flip(1), low, high


def _aggregate(codes: Distribution, z: Tensor) -> Tensor:
    """log q(z) [M], of the average of q(z | x) over the rows."""
    count = codes.batch_shape[0]
    parts = [codes.log_prob(p.unsqueeze(1)) for p in z.split(max(1, 10**6 // count))]
    return torch.cat(parts).logsumexp(-1) - torch.tensor(float(count)).log()


def _written(content: Content, draws: tuple[Tensor, ...], decoder: dict[str, Any]) -> str:
    """The file: a template around a header in JSON, and the tensors of the header behind it."""
    rows, (low, high), parts = content.rows, content.limits, list[bytes]()
    shape = content.decoder(*(part[:1] for part in (rows.codes.mean, *draws[1:]))).shape[1:]
    header = {
        "name": content.name,
        "about": content.about,
        "decoder": decoder,
        "output": {
            "shape": shape,
            "columns": list(content.columns or ()),
            "categories": list(content.categories),
            "low": low.expand(shape),
            "high": high.expand(shape),
        },
        **_prior(content, draws),
        "rows": _rows(content),
        "kl": content.kl.tolist(),
        "order": content.order,
        "names": list(content.names) or [f"z{d}" for d in range(len(content.kl))],
        "layers": list(content.layers),
        "follow": _follow(content, draws),
        "classes": content.classes,
    }

    def place(x: Tensor) -> dict[str, Any]:
        """Where a tensor begins among them all."""
        kinds = {torch.float16: "f2", torch.uint8: "u1"}
        x = x.detach().cpu().contiguous()
        x = x if x.dtype in kinds else x.float()
        entry = {"kind": kinds.get(x.dtype, "f4"), "shape": x.shape, "at": sum(map(len, parts))}
        parts.append(data := x.numpy().tobytes())
        parts.append(bytes(-len(data) % 4))
        return entry

    text = json.dumps(header, allow_nan=False, default=place).encode()
    text += b" " * (-len(text) % 4)
    blob = zlib.compress(struct.pack("<I", len(text)) + text + b"".join(parts))
    return _filled(content.name, base64.b64encode(blob).decode())


def _follow(content: Content, draws: tuple[Tensor, ...]) -> list[dict[str, Any]]:
    """Programs of the layers above the lowest; none where one of them cannot run in the page."""
    try:
        programs = [trace(module, *(part[:1] for part in draws)) for module in content.follow]
    except CannotRun:
        return []
    return [{"program": p.declare(), "constants": p.constants} for p in programs]


def _prior(content: Content, draws: tuple[Tensor, ...]) -> dict[str, Any]:
    """The prior where it is Normal, or a mixture of diagonal Normals; its draws.

    Where it is one for all rows: log p(z) less log q(z) of the draws; both on a grid, for two
    latents.
    """
    prior: Any = content.prior
    drawn, grid = dict(zip("zy", draws)), None
    found: dict[str, Tensor] = {}
    if not prior.batch_shape:
        normal = getattr(prior, "base_dist", prior)
        if isinstance(normal, torch.distributions.Normal):
            loc, scale = normal.loc[None], normal.scale[None]
            found = {"weights": torch.ones(1), "loc": loc, "scale": scale}
        elif all(hasattr(prior, name) for name in ("logits", "loc", "scale")):
            weights = prior.logits.softmax(-1)
            found = {"weights": weights, "loc": prior.loc, "scale": prior.scale}
        drawn["excess"] = prior.log_prob(draws[0]) - _aggregate(content.rows.codes, draws[0])
        if prior.event_shape == (2,):
            z, low, high = _grid(content, GRID)
            grid = {"low": low.tolist(), "high": high.tolist(), "side": GRID}
            grid |= {"log_p": prior.log_prob(z), "log_q": _aggregate(content.rows.codes, z)}
    if found and content.inputs is not None:
        found["inputs"] = _shown(content.inputs, content)
    return {"prior": found, "draws": drawn, "grid": grid}


def _rows(content: Content) -> dict[str, Any]:
    rows = content.rows
    tensors = {
        "numbers": rows.numbers,
        "means": rows.codes.mean,
        "scales": rows.codes.stddev,
        "elbo": rows.elbo,
        "log_prob": rows.log_prob,
        "stderr": rows.stderr,
        "y": rows.y,
        "labels": rows.labels,
        "shown": None if rows.shown is None else _shown(rows.shown, content),
    }
    known = {name: part for name, part in tensors.items() if part is not None}
    return {**known, "verdict": rows.verdict}


def _shown(x: Tensor, content: Content) -> Tensor:
    """Images as 256 levels between the limits; columns as they are."""
    if x.ndim != 4:
        return x
    low, high = (end.to(x) for end in content.limits)
    x = x.where(~x.isnan(), low)
    return ((x - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)


def _filled(name: str, data: str) -> str:
    """The template with its parts; only this very script and style may run."""
    here = Path(__file__).parent
    script = SCRIPT + (here / "explorer.js").read_text("utf-8")
    style = (here / "explorer.css").read_text("utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "NAME": escape(name),
        "POLICY": policy,
        "STYLE": style,
        "SCRIPT": script,
        "DATA": data,
    }
    text = (here / "explorer.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
