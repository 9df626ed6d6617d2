"""One page of a run: what it is, how it was trained, how good it is, what it makes."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jinja2 import Environment, StrictUndefined
from jsonargparse import Namespace
from PIL import Image
from pyro.infer.inspect import get_model_relations, render_model

from pyro_vae import config, plots
from pyro_vae.cli.folder import read_table
from pyro_vae.estimators import Evidence
from pyro_vae.files import reading, write
from pyro_vae.generators import forked
from pyro_vae.training import read_run
from pyro_vae.vae import VAE

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

__all__ = ["report"]

CAPTIONS = {
    "sample_means": "What the decoder makes of z drawn from the prior: E[x | z].",
    "classes": "What the decoder makes of z drawn for each class: E[x | z, y].",
    "samples": "Draws of x from the whole model: z from the prior, then x from p(x | z).",
    "reconstructions": "Held-out data, and the mean of p(x | z) at the mean of their q(z | x).",
    "manifold": "What the decoder makes of z on a grid.",
    "traversals": "What the decoder makes of one datum as each latent moves by itself.",
    "latent": "Posterior means of held-out data.",
    "audit": "What an exact draw adds to log p(x) of simulated data: little where reliable.",
    "parts": "Parts of the KL of validation data after each epoch.",
    "unit_kl": "KL of each latent dimension, of validation data, after each epoch.",
}
QUANTITIES = {
    "encoder_bound": ("encoder alone", ".2f", "a lower bound, K = {encoder_bound_samples}"),
    "elbo": ("ELBO", ".2f", "reconstruction less KL"),
    "kl": ("KL", ".2f", "of q(z | x) from p(z)"),
    "reconstruction": ("reconstruction", ".2f", "log p(x | z) under q(z | x)"),
    "inference_gap": ("inference gap", ".2f", "log p(x) less ELBO"),
    "mutual_information": ("mutual information", ".3f", "part of the KL: of x and z{of_rows}"),
    "aggregate_kl": ("KL(q(z) || p(z))", ".3f", "the rest of the KL: of all codes{of_rows}"),
    "total_correlation": ("total correlation", ".3f", "part of that: among the latents{of_rows}"),
    "dimension_wise_kl": (
        "dimension-wise KL",
        ".3f",
        "part of that: of each q(z) from p(z){of_rows}",
    ),
    "active_units": ("active units", "d", "latent dimensions that depend on x"),
    "khat_below_threshold": ("k-hat below threshold", ".1%", "of the data"),
    "bits_per_dim": ("bits per dimension", ".3f", "of the data before the transform"),
}
PARTS = ("parts", "unit_kl")
BOUND = ("elbo", "kl", "reconstruction")
DOTS = 150 / 96  # of a figure in a pixel of the page


class Picture(NamedTuple):
    """A figure inside the page."""

    source: str
    width: int
    caption: str


def report(options: Namespace) -> None:
    """Writes the page; it opens from disk and asks for nothing else."""
    folder = Path(options.run)
    recorded = read_run(folder)
    vae = config.load(folder)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    out = Path(options.out or folder / "report.html")
    drawn = figures(folder)
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
        yaml=_text(folder / "config.yaml"),
        training=training(folder),
        evaluation=evaluation(folder),
        evidence=evidence(folder),
        parts=[drawn.pop(name) for name in PARTS if name in drawn],
        figures=drawn.values(),
        programs=sites,
    )
    write(out, page.encode("ascii", "xmlcharrefreplace"))
    print(f"report in {out}")


def declaration(folder: Path, recorded: dict[str, Any], vae: VAE) -> dict[str, dict[str, str]]:
    """Tables of names and values: data, model, training."""
    model = recorded["declaration"]
    with reading(folder / "data.json"):
        given = json.loads(_text(folder / "data.json") or '{"description": {}}')["description"]
        data = {key: str(given[key]) for key in ("name", "transform") if key in given}
    rows = {f"{part} rows": f"{known['rows']:,}" for part, known in recorded["data"].items()}
    families = {key: _called(value) for key, value in model.items() if isinstance(value, dict)}
    size = sum(parameter.numel() for parameter in vae.parameters())
    settings = recorded["training"]
    return {
        "Data": {**data, **rows, "shape": " x ".join(map(str, model["data_shape"]))},
        "Model": {
            "latent size": str(model["latent_dim"]),
            **families,
            "parameters": f"{size:,}",
        },
        "Training": {
            key.replace("_", " "): _called(value) if isinstance(value, dict) else str(value)
            for key, value in settings.items()
            if value is not None
        },
    }


def training(folder: Path) -> dict[str, Any] | None:
    """Curves, and the epochs that matter; None without metrics.csv."""
    if not (folder / "metrics.csv").exists():
        return None
    rows: list[dict[str, Any]] = read_table(folder, "metrics.csv")
    with reading(folder / "metrics.csv"):
        return _trained(rows) if rows else None


def _trained(rows: list[dict[str, Any]]) -> dict[str, Any]:
    validated = [row for row in rows if row.get("validation_elbo") is not None]
    chosen = {"last": rows[-1]}
    if validated:
        best = max(validated, key=lambda row: row["validation_elbo"])
        chosen = {"best validation": best, **chosen}
    numbers = {
        f"{QUANTITIES[term][0]}, {part}": [row.get(start + term) for row in chosen.values()]
        for part, start in (("training", ""), ("validation", "validation_"))
        for term in BOUND
    }
    return {
        "curves": _drawn(plots.curves(rows), "Bound and its terms after each epoch."),
        "epochs": {name: f"{row['epoch']:.0f}" for name, row in chosen.items()},
        "numbers": {
            name: [f"{value:.2f}" for value in values]
            for name, values in numbers.items()
            if None not in values
        },
        "seconds": f"{sum(row['seconds'] for row in rows):,.0f}",
    }


def evaluation(folder: Path) -> dict[str, Any] | None:
    """The table that `evaluate` printed: value, error, remark; None without evaluation.json."""
    text = _text(folder / "evaluation.json")
    if text is None:
        return None
    with reading(folder / "evaluation.json"):
        return _evaluated(json.loads(text))


def _evaluated(found: dict[str, Any]) -> dict[str, Any]:
    errors = [
        f"{found['stderr_monte_carlo']:.2g} (Monte Carlo)",
        f"{found['stderr_data']:.2g} (data)",
    ]
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in found["verdicts"].items())
    lines = [("log p(x)", f"{found['log_prob']:.2f}", errors, verdicts)]
    if found.get("log_jacobian"):
        value = f"{found['log_prob'] + found['log_jacobian']:.2f}"
        lines.append(("log p(x), data's units", value, errors, "before the transform"))
    found["of_rows"] = f"; all {found['parts_rows']} rows" if "parts_rows" in found else ""
    for key, (name, form, remark) in QUANTITIES.items():
        if key in found and key not in hidden(found):
            error = found.get(f"stderr_{key}")
            shown = [] if error is None else [f"{error:.2g} (data)"]
            remark = remark.format_map(found)
            if key == "mutual_information" and found.get("at_ceiling"):
                remark += ", at its ceiling, the logarithm of their number"
            lines.append((name, f"{found[key]:{form}}", shown, remark))
    first = f"the first {found['rows']} rows of the {found['part']} part"  # before 0.2
    odd = [
        (str(row["row"]), f"{row['log_prob']:.2f}", row["column"], row["cell"],
         f"{row['column_log_prob']:.2f}")
        for row in found.get("odd_rows", [])
    ]  # fmt: skip
    missing = {name: f"{share:.1%}" for name, share in found.get("missing", {}).items()}
    patterns = [
        (", ".join(one["columns"]) or "none", one["rows"])
        for one in found.get("missing_patterns", [])
    ]
    return {
        "rows": found.get("rows_of", first), "lines": lines, "odd": odd, "missing": missing,
        "patterns": patterns,
    }  # fmt: skip


def hidden(found: dict[str, Any]) -> set[str]:
    """Numbers that would mislead: what is no KL, and bits of columns of different units."""
    no_kl = set() if found.get("prior_factorises", True) else {"total_correlation"}
    no_kl |= {"dimension_wise_kl"} if no_kl else set()
    return no_kl if found.get("of_one_unit", True) else no_kl | {"bits_per_dim"}


def evidence(folder: Path) -> dict[str, Any] | None:
    """log p(x) of each datum: verdicts, methods, a histogram; None where there is no file."""
    path = folder / "evidence.safetensors"
    if not path.exists():
        return None
    found = Evidence.load(path)
    kinds, lines = list(zip(found.verdict, found.method)), []
    for kind, count in Counter(kinds).most_common():
        here = found.rows(torch.tensor([i for i, other in enumerate(kinds) if other == kind]))
        worst = here.stderr.max().item()
        lines.append((*kind, str(count), f"{here.mean():.2f}", f"{worst:.2g}"))
    return {"lines": lines, "histogram": _drawn(histogram(found), "log p(x) of each datum.")}


def histogram(found: Evidence) -> Figure:
    """log p(x) of each datum, the verdicts stacked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.6), layout="constrained")
    ax = figure.subplots()
    names = sorted(set(found.verdict), reverse=True)
    values = [
        [v for v, verdict in zip(found.log_prob.tolist(), found.verdict) if verdict == name]
        for name in names
    ]
    ax.hist(values, bins=40, stacked=True, label=[name.replace("$", r"\$") for name in names])
    ax.set_xlabel("log p(x), nats")
    ax.set_ylabel("data")
    ax.legend(frameon=False)
    return figure


def figures(folder: Path) -> dict[str, Picture]:
    """The PNG files of the run but for curves, which are drawn anew; ours first, in order."""
    paths = {path.stem: path for path in sorted((folder / "figures").glob("*.png"))}
    paths.pop("curves", None)
    drawn = {}
    for name in sorted(paths, key=lambda name: [*CAPTIONS, name].index(name)):
        data = paths[name].read_bytes()
        with reading(paths[name]):
            width = Image.open(io.BytesIO(data)).width
        caption = CAPTIONS.get(name, name.replace("_", " "))
        drawn[name] = Picture(_inside("png", data), round(width / DOTS), caption)
    return drawn


def programs(vae: VAE, declared: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sites of the model and of the guide as Pyro sees them, and its drawing of them.

    The drawing is None where Graphviz, or its Python package, is missing.
    """
    conditions = declared["encoder"].get("init_args", {}).get("condition_dim", 0)
    y = torch.zeros(2, conditions) if conditions else None
    with forked(torch.device("cpu"), 0), torch.no_grad():
        arguments = (vae.sample(2, y), y)
    return {name: _program(getattr(vae, name), arguments) for name in ("model", "guide")}


def _program(program: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    related = get_model_relations(program, arguments)
    plates = related["plate_sample"].items()
    sites = [
        (
            site,
            related["sample_dist"][site],
            ", ".join(parents),
            ", ".join(plate for plate, inside in plates if site in inside),
            "observed" if site in related["observed"] else "latent",
        )
        for site, parents in related["sample_sample"].items()
    ]
    return {"sites": sites, "drawing": _graph(program, arguments)}


def _graph(program: Callable[..., Any], arguments: tuple[Any, ...]) -> Picture | None:
    try:
        from graphviz import ExecutableNotFound
    except ImportError:
        return None
    graph = render_model(program, arguments, render_distributions=True)
    try:
        data = graph.pipe("svg")
    except ExecutableNotFound:
        return None
    points = re.search(rb'width="(\d+)pt"', data)
    width = round(int(points[1]) * 96 / 72) if points else 300
    return Picture(_inside("svg+xml", data), width, "Drawn by pyro.render_model.")


def _drawn(figure: Figure, caption: str) -> Picture:
    """A figure as SVG, the same bytes each time."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "pyro_vae"}):
        figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return Picture(_inside("svg+xml", file.getvalue()), round(figure.get_figwidth() * 96), caption)


def _inside(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _called(declared: dict[str, Any]) -> str:
    """A declared component as one would call it."""
    options = ", ".join(f"{key}={value}" for key, value in declared.get("init_args", {}).items())
    return f"{declared['class_path']}({options})" if "class_path" in declared else str(declared)


def _text(path: Path) -> str | None:
    if not path.exists():
        return None
    with reading(path):
        return path.read_text()
