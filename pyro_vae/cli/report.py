"""Writes one page about a run: its declaration, training, evaluation and figures."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from jsonargparse import Namespace
from matplotlib.figure import Figure
from PIL import Image
from pyro.infer.inspect import get_model_relations

from pyro_vae import config, plots
from pyro_vae.cli.evaluate import QUANTITIES, quantity_lines
from pyro_vae.cli.folder import destination, read_table
from pyro_vae.estimators import Evidence
from pyro_vae.files import reading, write
from pyro_vae.runtime import forked
from pyro_vae.training import read_run
from pyro_vae.vae import VAE

Picture = dict[str, Any]  # its source, its width on the page and its caption

CAPTIONS = {
    "sample_means": "What the decoder makes of z drawn from the prior: E[x | z].",
    "classes": "What the decoder makes of z drawn for each class: E[x | z, y].",
    "pairs": "Pairs of columns that depend most on each other, by rank: data above draws.",
    "samples": "Draws of x from the whole model: z from the prior, then x from p(x | z).",
    "reconstructions": "Held-out data, and the mean of p(x | z) at the mean of their q(z | x).",
    "extremes": "The held-out data of least and of most log p(x).",
    "pseudo_inputs": "The inputs of the prior's components.",
    "manifold": "What the decoder makes of z on a grid.",
    "traversals": "What the decoder makes of one datum as each latent moves by itself.",
    "latent": "Posterior means of held-out data.",
    "audit": "What an exact draw adds to log p(x) of simulated data: little where reliable.",
    "parts": "Parts of the KL of validation data after each epoch.",
    "unit_kl": "KL of each latent dimension, of validation data, after each epoch.",
}


def report(options: Namespace) -> None:
    """Writes the page of a run as one file, which opens without server or network."""
    folder = Path(options.run)
    recorded = read_run(folder)
    vae = config.load(folder)
    out = destination(options.out, folder / "report.html", (".html",))
    pictures = figures(folder)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text("utf-8"))
    with reading(folder / "run.json"):
        shown = declaration(folder, recorded, vae)
        sites = programs(vae, recorded["declaration"])
        version = str(recorded["pyro_vae"])
    page = template.render(
        name=folder.resolve().name,
        command=lambda name: f"pyro-vae {name} {shlex.quote(str(folder))}",
        version=version,
        explorer=(folder / "explore.html").exists() and out.resolve().parent == folder.resolve(),
        declaration=shown,
        yaml=_read(folder / "config.yaml", Path.read_text),
        training=_read(folder / "metrics.csv", training),
        evaluation=_read(folder / "evaluation.json", evaluation),
        evidence=_read(folder / "evidence.safetensors", evidence),
        parts=[pictures.pop(name) for name in ("parts", "unit_kl") if name in pictures],
        figures=pictures.values(),
        programs=sites,
    )
    write(out, page.encode("ascii", "xmlcharrefreplace"))
    print(f"report in {out}")


def declaration(folder: Path, recorded: dict[str, Any], vae: VAE) -> dict[str, dict[str, str]]:
    """Returns tables of names and values: data, model, training, and when and how it was made."""
    model = recorded["declaration"]
    file = folder / "data.json"
    description = _read(file, lambda path: dict(json.loads(path.read_text())["description"])) or {}
    data = {key: str(description[key]) for key in ("name", "transform") if key in description}
    rows = {f"{part} rows": f"{info['rows']:,}" for part, info in recorded["data"].items()}
    families = {key: _as_call(value) for key, value in model.items() if isinstance(value, dict)}
    size = sum(parameter.numel() for parameter in vae.parameters())
    settings = {key: value for key, value in recorded["training"].items() if value is not None}
    made = {key: str(value) for key, value in (recorded.get("made") or {}).items()}
    return {
        "Data": {**data, **rows, "shape": " x ".join(map(str, model["data_shape"]))},
        "Model": {"latent size": str(model["latent_dim"]), **families, "parameters": f"{size:,}"},
        "Training": {key.replace("_", " "): _as_call(value) for key, value in settings.items()},
        **({"Made": {"pyro_vae": str(recorded["pyro_vae"]), **made}} if made else {}),
    }


def training(path: Path) -> dict[str, Any] | None:
    """Returns the curves, and numbers of the best and the last epoch; None before the first."""
    rows: list[dict[str, Any]] = read_table(path.parent, path.name)
    if not rows:
        return None
    validated = [row for row in rows if row.get("validation_elbo") is not None]
    best = max(validated, key=lambda row: row["validation_elbo"], default=rows[-1])
    epochs = {"last": best} if best is rows[-1] else {"best validation": best, "last": rows[-1]}
    numbers = {
        f"{QUANTITIES[term][0]}, {part}": [row.get(start + term) for row in epochs.values()]
        for part, start in (("training", ""), ("validation", "validation_"))
        for term in ("elbo", "kl", "reconstruction")
    }
    return {
        "curves": _picture(plots.svg(plots.curves(rows)), "Bound and its terms after each epoch."),
        "epochs": {name: f"{row['epoch']:.0f}" for name, row in epochs.items()},
        "numbers": {
            name: [f"{value:.2f}" for value in values]
            for name, values in numbers.items()
            if None not in values
        },
        "seconds": f"{sum(row['seconds'] for row in rows):,.0f}",
        "rises": bool(validated) and best is rows[-1] and len(rows) > 1,
    }


def evaluation(path: Path) -> dict[str, Any]:
    """Returns the numbers that `evaluate` wrote: a table with errors and remarks, and odd rows."""
    found = json.loads(path.read_text())
    first = f"the first {found['rows']} rows of the {found['part']} part"
    return {
        "rows": found.get("rows_of", first),
        "lines": quantity_lines(found),
        "odd": [
            (str(one["row"]), f"{one['log_prob']:.2f}", one["column"], one["cell"],
             f"{one['column_log_prob']:.2f}")
            for one in found.get("odd_rows", [])
        ],
        "missing": {name: f"{share:.1%}" for name, share in found.get("missing", {}).items()},
        "patterns": [
            (", ".join(one["columns"]) or "none", one["rows"])
            for one in found.get("missing_patterns", [])
        ],
    }  # fmt: skip


def evidence(path: Path) -> dict[str, Any]:
    """Returns a table of log p(x) by verdict and method, and a figure of each datum."""
    found = Evidence.load(path)
    kinds, lines = list(zip(found.verdict, found.method)), []
    for kind, count in Counter(kinds).most_common():
        group = found.rows(torch.tensor([i for i, other in enumerate(kinds) if other == kind]))
        worst = group.stderr.max().item()
        lines.append((*kind, str(count), f"{group.mean():.2f}", f"{worst:.2g}"))
    gap = "; its ELBO against it, which lies below the line by the inference gap"
    against = gap if "regret" in found.extras else ""
    caption = f"log p(x) of each datum{against}; and k-hat, the tail of its weights."
    return {"lines": lines, "each": _picture(plots.svg(each_datum(found)), caption)}


@plots.style()
def each_datum(found: Evidence) -> Figure:
    """Draws log p(x) of each datum by verdict, against its ELBO if that is known, and k-hat."""
    figure = Figure(figsize=(7.2, 2.5), layout="constrained")
    regret = found.extras.get("regret")
    axes = list(figure.subplots(1, 2 if regret is None else 3))
    names = sorted(set(found.verdict), reverse=True)
    finite = found.log_prob.isfinite()
    rows = [finite & torch.tensor([v == name for v in found.verdict]) for name in names]
    values = [found.log_prob[index].tolist() for index in rows]
    labels = [name.replace("$", r"\$") for name in names]
    axes[0].hist(values, bins=30, stacked=True, label=labels)
    axes[0].set(xlabel="log p(x), nats", ylabel="data")
    axes[0].legend()
    if regret is not None:
        elbo = found.log_prob - regret
        for index in rows:
            axes[1].plot(found.log_prob[index], elbo[index], ".", ms=3)
        axes[1].axline((found.log_prob[finite].median().item(),) * 2, slope=1, color="0.6", lw=0.8)
        axes[1].set(xlabel="log p(x), nats", ylabel="ELBO, nats")
    axes[-1].hist(found.khat[found.khat.isfinite()].tolist(), bins=30, color=plots.PALETTE[6])
    axes[-1].axvline(found.khat_threshold[0].item(), color=plots.PALETTE[1], ls="--")
    axes[-1].set(xlabel="k-hat, threshold dashed", ylabel="data")
    for ax in (axes[0], axes[-1]):
        ax.yaxis.get_major_locator().set_params(integer=True)
    return figure


def figures(folder: Path) -> dict[str, Picture]:
    """Reads the figures of the run, in the order of `CAPTIONS`; not the curves, drawn anew."""
    found = [*(folder / "figures").glob("*.png"), *(folder / "figures").glob("*.svg")]
    paths = {path.stem: path for path in sorted(found)}
    paths.pop("curves", None)
    pictures = {}
    for name in sorted(paths, key=lambda name: [*CAPTIONS, name].index(name)):
        with reading(paths[name]):
            caption = CAPTIONS.get(name, name.replace("_", " "))
            pictures[name] = _picture(paths[name].read_bytes(), caption)
    return pictures


def _picture(data: bytes, caption: str) -> Picture:
    """Returns a PNG or SVG for the page, and its width there: an inch is 96 dots or 72 points."""
    if points := re.search(rb'<svg [^>]*width="([\d.]+)pt"', data):
        kind, width = "svg+xml", float(points[1]) * 96 / 72
    else:
        image = Image.open(io.BytesIO(data))
        kind, width = "png", image.width * 96 / image.info.get("dpi", (96.0,))[0]
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"source": source, "width": round(width), "caption": caption}


def programs(vae: VAE, declared: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the sites of model and guide as Pyro sees them, and where to draw them."""
    conditions = declared["encoder"].get("init_args", {}).get("condition_dim", 0)
    y = torch.zeros(2, conditions) if conditions else None
    with forked(torch.device("cpu"), 0), torch.no_grad():
        arguments = (vae.sample(2, y), y)
    found = {}
    for name in ("model", "guide"):
        related = get_model_relations(getattr(vae, name), arguments)
        places, arrows, sites = dict[str, tuple[int, int]](), [], []
        for site, parents in related["sample_sample"].items():  # in the order of their draws
            down = max((80 + places[parent][1] for parent in parents), default=60)
            across = 70 + 100 * sum(place[1] == down for place in places.values())
            places[site] = across, down
            arrows += [(*places[parent], across, down) for parent in parents]
            plates = (plate for plate, inside in related["plate_sample"].items() if site in inside)
            kind = "observed" if site in related["observed"] else "latent"
            distribution = related["sample_dist"][site]
            sites.append((site, distribution, ", ".join(parents), ", ".join(plates), kind))
        width, height = (max(ends) for ends in zip(*places.values()))
        drawing = {"places": places, "arrows": arrows, "width": width + 70, "height": height + 60}
        found[name] = {"sites": sites, "drawing": drawing}
    return found


def _as_call(declared: Any) -> str:
    """Returns a declared component as a call, such as "MLP(hidden=[400])"."""
    if not isinstance(declared, dict):
        return str(declared)
    named = declared.get("init_args", {}) if "class_path" in declared else declared
    options = ", ".join(f"{key}={_as_call(value)}" for key, value in named.items())
    return f"{declared.get('class_path', 'dict')}({options})"


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    """Returns `read(path)`, or None if there is no such file."""
    if not path.exists():
        return None
    with reading(path):
        return read(path)
