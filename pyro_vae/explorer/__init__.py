"""Makes one page that runs a decoder in a browser, without server or network."""

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

MAX_BYTES = 10_000_000  # most bytes of a page; a decoder that takes more is replaced by an atlas
DRAWS = 256  # number of draws of the prior
GRID_SIDE = 48  # number of points along a side of the map of two latents
CODES_PER_LATENT = 13  # number of codes of an atlas along each latent
MAX_LATENTS = 10  # most latents that have such codes
MAX_ROUNDING = 0.01  # largest error of outputs by weights in float16, as a share of their range


@dataclass(frozen=True)
class Rows:
    """Data that the page shows, their codes, and what is known of their log p(x).

    Attributes:
        numbers: The number of each row in its part [N].
        codes: q(z | x), batch [N], event (D,).
        elbo: The ELBO of each row [N], in nats.
        log_prob: Estimates of log p(x) [N]; NaN where there is none.
        stderr: Their standard errors [N].
        verdict: How far each estimate can be trusted, in a word or two; "" where there is none.
        shown: The data in their own units [N, *E], or None to leave them out.
        y: The values that they are conditioned on [N, C], or None.
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
    """The content of the page.

    Attributes:
        name: Title of the page.
        about: Sentences that describe the model.
        decoder: Module whose forward takes z [B, D], and y [B, C] if the model is conditional,
            and returns E[x | z] in the data's units, [B, *E].
        prior: p(z), of batch (), or of batch [N] for the rows if it depends on y.
        rows: The rows that the page shows.
        limits: Values shown as black and white, or ends of the bars of columns.
        kl: KL of each latent [D], or the variance of its means, by which latents are ordered.
        order: What `kl` is, in words.
        names: Names of the latents; z0, z1, ... if empty.
        layers: Lengths of the layers of latents, from the data upwards; one layer if empty.
        follow: For each layer but the lowest, a module that takes z [B, D] (and y) and returns
            it with the layers below at their means given this one.
        columns: Names of the columns of a table.
        categories: For each column, the names of its codes, none for numbers; the mean of two
            codes is shown as the share of the second.
        classes: The number of classes, if y is a one-hot class.
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
    """Returns the page, which contains all its scripts, weights and data.

    The decoder is traced into torch's own operations, which the page runs; matrices are held in
    float16. If the page lacks an operation or would be above 10 MB, it holds an atlas instead:
    codes that are decoded beforehand, of which it shows the nearest. The page says so.

    Cost: a trace of the decoder (seconds), 256 draws of the prior, and q(z), the average of
    q(z | x) over the rows, at each of them and on a grid for two latents.

    Raises:
        ValueError: If the page is above 10 MB with an atlas too.
    """
    draws = _draws(content)
    try:
        html = _render(content, draws, _trace_decoder(content, draws))
        if len(html) <= MAX_BYTES:
            return html
        why = f"its page would take {len(html) / 1e6:.1f} MB"
    except CannotRun as error:
        why = str(error)
    html = _render(content, draws, _decode_atlas(content, draws, why))
    if len(html) > MAX_BYTES:
        raise ValueError(
            f"the page would take {len(html) / 1e6:.1f} MB, above the {MAX_BYTES / 1e6:.0f} MB "
            "that open quickly: show fewer rows, or leave the data out"
        )
    return html


def _draws(content: Content) -> tuple[Tensor, ...]:
    """Returns draws of the prior [M, D], and the y [M, C] of each if the model is conditional."""
    prior, y = content.prior, content.rows.y
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        repeats = -(-DRAWS // prior.batch_shape.numel())
        z = prior.sample(Size((repeats,))).flatten(0, -2)[:DRAWS]
    return (z,) if y is None else (z, y[torch.arange(len(z)) % len(y)])


def _trace_decoder(content: Content, draws: tuple[Tensor, ...]) -> dict[str, Any]:
    """Traces the decoder; its weights are float32 if the rounding to float16 would be seen."""
    program = trace(content.decoder, *(part[:1] for part in draws))
    if (error := _error(program, content.decoder, draws)) > MAX_ROUNDING:
        program = program.single()
        error = _error(program, content.decoder, draws)
    weights = sum(constant.numel() for constant in program.constants)
    note = (
        f"The decoder runs in this page, from its {weights:,} weights. It deviates from torch by "
        f"at most {error:.1g} of the range of its values."
    )
    return {"program": program.declare(), "constants": program.constants, "said": note}


def _error(program: Program, decoder: nn.Module, draws: tuple[Tensor, ...]) -> float:
    """Returns the largest deviation of the page from the decoder, as a share of their range."""
    exact = decoder(*(part[:32] for part in draws))
    rounded = torch.cat([program(*(part[i : i + 1] for part in draws)) for i in range(32)])
    width = exact.amax() - exact.amin()
    return ((rounded - exact).abs().max() / width.clamp(min=1e-30)).item()


def _decode_atlas(content: Content, draws: tuple[Tensor, ...], why: str) -> dict[str, Any]:
    """Decodes the codes of which the page will show the nearest.

    They are the codes of the rows, and a grid for two latents, or else draws of the prior and
    lines along latents.
    """
    means = content.rows.codes.mean
    if means.shape[1] == 2:
        z = torch.cat([_grid(content, 32)[0], means])
    else:
        top = content.kl.argsort(descending=True)[:MAX_LATENTS]
        lines = means.mean(0).repeat(len(top), CODES_PER_LATENT, 1)
        lines[torch.arange(len(top)), :, top] = torch.linspace(-3, 3, CODES_PER_LATENT).to(lines)
        z = torch.cat([draws[0], means, lines.flatten(0, 1)])
    y = [y[torch.arange(len(z)) % len(y)] for y in draws[1:]]
    x = torch.cat([content.decoder(*batch) for batch in zip(*(p.split(64) for p in (z, *y)))])
    note = (
        f"This decoder does not run in the page ({why}). The page shows the nearest of "
        f"{len(z)} codes that were decoded beforehand, so pictures move in steps."
    )
    return {"z": z, "x": _as_pixels(x, content), "said": note, **dict(zip("y", y))}


def _grid(content: Content, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns points [side^2, 2], row by row from the top, and the lower and upper ends [2]."""
    means = content.rows.codes.mean
    centre = (means.amax(0) + means.amin(0)) / 2
    half = 1.15 * (means - centre).abs().max().clamp(min=2)
    low, high = centre - half, centre + half
    step = (torch.arange(side) + 0.5) / side
    across = torch.lerp(low[0], high[0], step.to(low))
    down = torch.lerp(high[1], low[1], step.to(low))
    return torch.cartesian_prod(down, across).flip(1), low, high


def _aggregate(codes: Distribution, z: Tensor) -> Tensor:
    """Returns log q(z) [M] at z [M, D]; q(z) is the average of q(z | x) over the rows."""
    count = codes.batch_shape[0]
    parts = [codes.log_prob(p.unsqueeze(1)) for p in z.split(max(1, 10**6 // count))]
    return torch.cat(parts).logsumexp(-1) - torch.tensor(float(count)).log()


def _render(content: Content, draws: tuple[Tensor, ...], decoder: dict[str, Any]) -> str:
    """Returns the page: a template around a JSON header, followed by the header's tensors."""
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

    def add_tensor(x: Tensor) -> dict[str, Any]:
        """Adds a tensor to the others; returns its type, its shape and where it begins."""
        kinds = {torch.float16: "f2", torch.uint8: "u1"}
        x = x.detach().cpu().contiguous()
        x = x if x.dtype in kinds else x.float()
        entry = {"kind": kinds.get(x.dtype, "f4"), "shape": x.shape, "at": sum(map(len, parts))}
        parts.append(data := x.numpy().tobytes())
        parts.append(bytes(-len(data) % 4))
        return entry

    text = json.dumps(header, allow_nan=False, default=add_tensor).encode()
    text += b" " * (-len(text) % 4)
    blob = zlib.compress(struct.pack("<I", len(text)) + text + b"".join(parts))
    return _fill_template(content.name, base64.b64encode(blob).decode())


def _follow(content: Content, draws: tuple[Tensor, ...]) -> list[dict[str, Any]]:
    """Traces the modules `follow`; returns none if one of them cannot run in the page."""
    try:
        programs = [trace(module, *(part[:1] for part in draws)) for module in content.follow]
    except CannotRun:
        return []
    return [{"program": p.declare(), "constants": p.constants} for p in programs]


def _prior(content: Content, draws: tuple[Tensor, ...]) -> dict[str, Any]:
    """Returns draws of the prior, and its parameters if it is a (mixture of) diagonal Normal.

    If all rows have the same prior, there is also log p(z) - log q(z) of each draw, and for two
    latents both on a grid.
    """
    prior: Any = content.prior
    points, grid = dict(zip("zy", draws)), None
    parameters: dict[str, Tensor] = {}
    if not prior.batch_shape:
        normal = getattr(prior, "base_dist", prior)
        if isinstance(normal, torch.distributions.Normal):
            loc, scale = normal.loc[None], normal.scale[None]
            parameters = {"weights": torch.ones(1), "loc": loc, "scale": scale}
        elif all(hasattr(prior, name) for name in ("logits", "loc", "scale")):
            weights = prior.logits.softmax(-1)
            parameters = {"weights": weights, "loc": prior.loc, "scale": prior.scale}
        points["excess"] = prior.log_prob(draws[0]) - _aggregate(content.rows.codes, draws[0])
        if prior.event_shape == (2,):
            z, low, high = _grid(content, GRID_SIDE)
            grid = {"low": low.tolist(), "high": high.tolist(), "side": GRID_SIDE}
            grid |= {"log_p": prior.log_prob(z), "log_q": _aggregate(content.rows.codes, z)}
    if parameters and content.inputs is not None:
        parameters["inputs"] = _as_pixels(content.inputs, content)
    return {"prior": parameters, "draws": points, "grid": grid}


def _rows(content: Content) -> dict[str, Any]:
    rows = content.rows
    parts = {**vars(rows), "means": rows.codes.mean, "scales": rows.codes.stddev}
    parts["shown"] = None if rows.shown is None else _as_pixels(rows.shown, content)
    return {name: part for name, part in parts.items() if part is not None and name != "codes"}


def _as_pixels(x: Tensor, content: Content) -> Tensor:
    """Converts images to 256 levels between the limits; returns columns as they are."""
    if x.ndim != 4:
        return x
    low, high = (end.to(x) for end in content.limits)
    x = x.where(~x.isnan(), low)
    return ((x - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)


def _fill_template(name: str, data: str) -> str:
    """Fills the template; its policy lets only this script and this style run."""
    folder = Path(__file__).parent
    script = SCRIPT + (folder / "explorer.js").read_text("utf-8")
    style = (folder / "explorer.css").read_text("utf-8")
    parts = {"NAME": escape(name), "STYLE": style, "SCRIPT": script, "DATA": data}
    parts["POLICY"] = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    text = (folder / "explorer.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
