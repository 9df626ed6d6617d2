"""The evaluation of a run: log p(x) with its error, ELBO, parts of the KL, odd rows."""

from __future__ import annotations

import json
from collections import Counter
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyro_vae import plots
from pyro_vae.classes import ClassVAE
from pyro_vae.cli.figures import TERMS, TITLES, decompose, layer_lines, limits, save_figure
from pyro_vae.cli.folder import batches, load_run, to_device
from pyro_vae.cli.score import by_column, estimate, held_out, rows_of
from pyro_vae.data import Data, spread
from pyro_vae.estimators import Evidence, evidence_lower_bound, importance_sampling
from pyro_vae.estimators.log_evidence import LARGEST_GAP, kept_audit
from pyro_vae.files import write
from pyro_vae.metrics import active_units
from pyro_vae.vae import VAE

QUANTITIES = {  # title, format and remark of each quantity
    "encoder_bound": ("encoder alone", ".2f", "a lower bound, K = {encoder_bound_samples}"),
    "elbo": ("ELBO", ".2f", "reconstruction less KL"),
    "kl": ("KL", ".2f", "of q(z | x) from p(z)"),
    "reconstruction": ("reconstruction", ".2f", "log p(x | z) under q(z | x)"),
    "inference_gap": ("inference gap", ".2f", "log p(x) less ELBO"),
    "mutual_information": ("mutual information", ".3f", "part of the KL: of x and z"),
    "aggregate_kl": ("KL(q(z) || p(z))", ".3f", "the rest of the KL: of all codes"),
    "total_correlation": ("total correlation", ".3f", "part of that: among the latents"),
    "dimension_wise_kl": ("dimension-wise KL", ".3f", "part of that: of each q(z) from p(z)"),
    "active_units": ("active units", "d", "latent dimensions that depend on x"),
    "khat_below_threshold": ("k-hat below threshold", ".1%", "of the data"),
    "bits_per_dim": ("bits per dimension", ".3f", "of the data before the transform"),
}
ODD_ROWS, USUAL_ROWS = 5, 100  # number of odd rows shown, and of rows that say what is usual
MAX_PATTERNS = 5  # patterns of missing values that are shown


def evaluate(options: Namespace) -> None:
    """Prints and writes log p(x) of a run with its error, the ELBO and its terms, active units."""
    options.progress &= not options.json
    vae, splits = load_run(options.run, options.data_root)
    vae, data = to_device(vae, held_out(splits, options.part, options.limit), options.accelerator)
    bound = evidence_lower_bound(vae, *data.batch(), num_samples=options.elbo_samples)
    encoder: dict[str, Any] = {}
    if options.num_samples is not None:
        names = ("num_samples", "chunk_size", "compile", "devices", "seed", "progress")
        given = {name: options[name] for name in names}
        found = importance_sampling(vae, *data.batch(), **given)
        encoder = {"encoder_bound": found.mean(), "encoder_bound_samples": options.num_samples}
    evidence = estimate(vae, data, options)
    evidence.save(Path(options.run) / "evidence.safetensors")
    draw_audit(vae, data, evidence, options)
    draw_extremes(data, evidence, Path(options.run) / "figures")
    terms = {name: term for name, term in vars(bound).items() if isinstance(term, Tensor)}
    terms["inference_gap"] = evidence.log_prob - bound.elbo
    monte_carlo, over_data = evidence.mean_stderr()
    spread_of: dict[str, Any] = {}  # what one row alone does not tell
    if len(data) > 1:
        with torch.no_grad():
            active = active_units(torch.cat([vae.encode(*pair).mean for pair in batches(data)]))
        spread_of = {
            "stderr_data": over_data,
            **{f"stderr_{n}": (t.std() / len(t) ** 0.5).item() for n, t in terms.items()},
            "active_units": int(active.sum()),
            "units": len(active),
            **({"layers": layers} if (layers := layer_lines(vae, data)) else {}),
        }
    numbers: dict[str, Any] = {
        "part": options.part,
        "rows": len(data),
        "rows_of": rows_of(splits, options.part, data),
        "log_prob": evidence.mean(),
        "log_jacobian": data.log_jacobian,
        "stderr_monte_carlo": monte_carlo,
        "verdicts": dict(Counter(evidence.verdict)),
        "methods": dict(Counter(evidence.method)),
        "audit": evidence.audit,
        **encoder,
        **{name: term.mean().item() for name, term in terms.items()},
        **spread_of,
        "kl_rules": sorted(set(bound.rules.values())),
        **decompose(vae, getattr(splits, options.part).fixed().to(data.x.device), num_rows=500),
        "khat_below_threshold": evidence.share_below_threshold(),
        "bits_per_dim": data.bits_per_dim(evidence.log_prob).mean().item(),
        # values of images have one unit; columns of a table seldom do
        "of_one_unit": data.levels is not None or len(data.data_shape) > 1,
        "odd_rows": odd_rows(vae, data, evidence),
        **missing_values(data),
    }
    text = json.dumps(numbers, indent=1)
    write(Path(options.run) / "evaluation.json", text)
    if options.json:
        print(text)
        return
    table = Table(title=f"{options.run}: {numbers['rows_of']}", show_header=False)
    for name, value, errors, remark, _ in quantity_lines(numbers):
        table.add_row(name, ", ".join(filter(None, [" +- ".join([value, *errors]), remark])))
    Console().print(table)
    print("nats per datum, of held-out data; larger is better but for KL and bits")


def quantity_lines(found: dict[str, Any]) -> list[tuple[str, str, list[str], str, str]]:
    """Returns name, value, errors, remark and row count of each quantity of evaluation.json."""
    errors = [f"{found['stderr_monte_carlo']:.2g} (Monte Carlo)"]
    errors += [f"{found['stderr_data']:.2g} (data)"] if "stderr_data" in found else []
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in found["verdicts"].items())
    rows = f"{found['rows']:,}"
    lines = [("log p(x)", f"{found['log_prob']:.2f}", errors, verdicts, rows)]
    if found.get("log_jacobian"):
        value = f"{found['log_prob'] + found['log_jacobian']:.2f}"
        lines.append(("log p(x), data's units", value, errors, "before the transform", rows))
    if found.get("audit"):
        lines.append(("audit", "", [], found["audit"], ""))
    ceiling = "at its ceiling, the logarithm of their number" if found.get("at_ceiling") else ""
    more = {  # remarks on what files of version 0.1 lack
        "kl": " and ".join(found.get("kl_rules", [])),
        "mutual_information": ceiling,
        "active_units": f"of {found['units']}" if "units" in found else "",
    }
    no_kl = () if found.get("prior_factorises", True) else TERMS[1:]
    mixed = () if found.get("of_one_unit", True) else ("bits_per_dim",)
    for key, (name, form, remark) in QUANTITIES.items():
        if key in found and key not in (*no_kl, *mixed):  # these would mislead
            error = found.get(f"stderr_{key}")
            error_texts = [] if error is None else [f"{error:.2g} (data)"]
            remark = ", ".join(filter(None, [remark.format_map(found), more.get(key)]))
            count = found.get("parts_rows", found["rows"]) if key in TITLES else found["rows"]
            lines.append((name, f"{found[key]:{form}}", error_texts, remark, f"{count:,}"))
    layers = found.get("layers", {}).items()
    return [*lines, *((site, "", [], text, rows) for site, text in layers)]


def odd_rows(vae: VAE, data: Data, evidence: Evidence) -> list[dict[str, Any]]:
    """Returns the rows of least log p(x), each with the column farthest below its usual log p."""
    if data.schema is None or isinstance(vae, ClassVAE):
        return []
    lowest = evidence.log_prob.argsort()[:ODD_ROWS]
    rows = torch.cat([lowest, spread(len(data), USUAL_ROWS, 0)])
    each = by_column(vae, data.subset(rows))
    deficit = (each - each.nanmedian(0).values)[: len(lowest)].nan_to_num(torch.inf)
    cells = data.schema.decode(data.transform.inverse(data.x[lowest].float()))
    columns = deficit.argmin(1).tolist()
    names = list(data.schema.columns)
    return [
        {
            "row": data.rows[row].item(),
            "log_prob": evidence.log_prob[row].item(),
            "column": names[column],
            "cell": str(cells[names[column]][i]),
            "column_log_prob": each[i, column].item(),
        }
        for i, (row, column) in enumerate(zip(lowest.tolist(), columns))
    ]


def missing_values(data: Data) -> dict[str, Any]:
    """Returns each column's share of missing values, and the commonest sets of missing columns."""
    if data.columns is None or not data.missing:
        return {"missing": {}, "missing_patterns": []}
    missing = data.x[:].isnan()
    shares = zip(data.columns, missing.double().mean(0).tolist())
    sets, counts = missing.unique(dim=0, return_counts=True)
    common = counts.argsort(descending=True)[:MAX_PATTERNS].tolist()
    patterns = [
        {"columns": list(compress(data.columns, sets[i].tolist())), "rows": counts[i].item()}
        for i in common
    ]
    return {
        "missing": {name: share for name, share in shares if share},
        "missing_patterns": patterns,
    }


def draw_audit(vae: VAE, data: Data, evidence: Evidence, options: Namespace) -> None:
    """Draws the audit behind the verdicts, which `log_evidence` has kept, if there was one.

    With classes there is an audit for each class, and no figure.
    """
    if not evidence.audit or evidence.audit.startswith("none") or isinstance(vae, ClassVAE):
        return
    same = {name: options[name] for name in ("tolerance", "seed")}
    found = kept_audit(vae.model, vae.guide, *data.batch(), budget=None, **same)
    figure = plots.audit(found.gap, found.reliable, LARGEST_GAP)
    save_figure(figure, Path(options.run) / "figures" / "audit")


def draw_extremes(data: Data, evidence: Evidence, figures: Path) -> None:
    """Draws the ten images of least and the ten of most log p(x)."""
    if len(data.data_shape) != 3 or len(data) < 20:
        return
    order = evidence.log_prob.argsort()
    chosen = torch.cat([order[:10], order[-10:]])
    x = data.transform.inverse(data.batch(chosen)[0].cpu()).unflatten(0, (2, 10))
    values = evidence.log_prob[order].tolist()
    names = [
        f"{end}: {first:.0f} to {last:.0f}"
        for end, first, last in (("least", *values[:10:9]), ("most", *values[-10::9]))
    ]
    save_figure(plots.image_rows(x, names, "log p(x), nats", limits(data)), figures / "extremes")
