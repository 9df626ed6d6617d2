"""Commands that judge runs: log p(x), what it is made of, and how runs differ in it."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, compress
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyro_vae import plots
from pyro_vae.cli.figures import NAMES, decompose, keep, layer_lines, limits, shown_terms
from pyro_vae.cli.folder import load_run, pairs, placed
from pyro_vae.cli.report import declaration
from pyro_vae.data import Data, Splits, spread
from pyro_vae.estimators import (
    Evidence,
    column_log_prob,
    evidence_lower_bound,
    importance_sampling,
    log_evidence,
)
from pyro_vae.estimators.log_evidence import REACH, kept_audit
from pyro_vae.files import write
from pyro_vae.metrics import Decomposition, Difference, active_units, paired_difference
from pyro_vae.training import read_run
from pyro_vae.vae import VAE

__all__ = ["compare", "compared", "evaluate"]

ALONE = "{encoder_bound:.2f}, a lower bound, K = {encoder_bound_samples}"
ODD, OTHERS = 5, 100  # rows that are shown, and those that say what is usual
PATTERNS = 5  # of missing values that are shown


def evaluate(options: Namespace) -> None:
    """The table of a run: log p(x) with its error, ELBO and its terms, active units."""
    vae, splits = load_run(options.run, options.data_root)
    vae, data = placed(vae, held_out(splits, options.part, options.limit), options.accelerator)
    x, y = data.batch(torch.arange(len(data)))
    bound = evidence_lower_bound(vae.model, vae.guide, x, y, num_samples=options.elbo_samples)
    alone = encoder_bound(vae, data, options)
    evidence = estimate(vae, data, options)
    evidence.save(Path(options.run) / "evidence.safetensors")
    draw_audit(vae, data, evidence, options)
    draw_extremes(data, evidence, Path(options.run) / "figures")
    with torch.no_grad():
        active = active_units(torch.cat([vae.encode(*pair).mean for pair in pairs(data)]))
    layers = layer_lines(vae, data)
    parts = decompose(vae, getattr(splits, options.part).fixed(), num_rows=500)
    gap = evidence.log_prob - bound.elbo
    monte_carlo, over_data = evidence.mean_stderr()
    numbers: dict[str, Any] = {
        "part": options.part,
        "rows": len(data),
        "rows_of": rows_of(splits, options.part, data),
        "log_prob": evidence.mean(),
        "log_jacobian": data.log_jacobian,
        "stderr_monte_carlo": monte_carlo,
        "stderr_data": over_data,
        "verdicts": dict(Counter(evidence.verdict)),
        "methods": dict(Counter(evidence.method)),
        "audit": evidence.audit,
        **alone,
        "elbo": bound.elbo.mean().item(),
        "kl": bound.kl.mean().item(),
        "reconstruction": bound.reconstruction.mean().item(),
        "inference_gap": gap.mean().item(),
        **errors({**vars(bound), "inference_gap": gap}),
        **parts_numbers(parts),
        "active_units": int(active.sum()),
        **({"layers": layers} if layers else {}),
        "khat_below_threshold": evidence.share_below_threshold(),
        "bits_per_dim": data.bits_per_dim(evidence.log_prob).mean().item(),
        "of_one_unit": of_one_unit(data),
        "odd_rows": odd_rows(vae, data, evidence),
        "missing": missing_columns(data),
        "missing_patterns": missing_patterns(data),
    }
    text = json.dumps(numbers, indent=1)
    write(Path(options.run) / "evaluation.json", text)
    if options.json:
        print(text)
        return
    units = (
        {}
        if not data.log_jacobian
        else {"log p(x), data's units": with_errors(shifted(evidence, data))}
    )
    lines = {
        "log p(x)": with_errors(evidence),
        **units,
        "verdict": counted(evidence),
        "audit": evidence.audit or "none",
        **({"encoder alone": ALONE.format_map(alone)} if alone else {}),
        "ELBO": with_error(bound.elbo),
        "KL": f"{with_error(bound.kl)}, {', '.join(sorted(set(bound.rules.values())))}",
        "reconstruction": with_error(bound.reconstruction),
        "inference gap": with_error(gap) + ", log p(x) less ELBO",
        **parts_lines(parts),
        "active units": f"{numbers['active_units']} of {len(active)}",
        **layers,
        "k-hat below threshold": f"{numbers['khat_below_threshold']:.1%} of data",
    }
    if of_one_unit(data):
        bits = f"{numbers['bits_per_dim']:.3f} (transform: {splits.transform})"
        lines["bits per dimension"] = bits
    table(f"{options.run}: {rows_of(splits, options.part, data)}", lines)


def encoder_bound(vae: VAE, data: Data, options: Namespace) -> dict[str, float]:
    """The bound of the encoder's own draws, where their number is given."""
    if options.num_samples is None:
        return {}
    names = ("num_samples", "chunk_size", "compile", "devices", "seed")
    x, y = data.batch(torch.arange(len(data)))
    found = importance_sampling(
        vae.model, vae.guide, x, y, progress=shown(options), **{n: options[n] for n in names}
    )
    return {"encoder_bound": found.mean(), "encoder_bound_samples": options.num_samples}


def shown(options: Namespace) -> bool:
    """Whether progress is shown: where asked for, and the output is not JSON."""
    return bool(options.progress and not options.get("json"))


def errors(terms: dict[str, Any]) -> dict[str, float]:
    """Standard errors over data of the mean of each of `terms` [N], by name."""
    tensors = {name: term for name, term in terms.items() if isinstance(term, torch.Tensor)}
    return {f"stderr_{n}": (t.std() / len(t) ** 0.5).item() for n, t in tensors.items()}


def parts_lines(parts: Decomposition | None) -> dict[str, str]:
    """Lines of the table for the parts of the KL, which are of all rows of the part."""
    if parts is None:
        return {}
    of = f"(draws, data; all {parts.num_data} rows)"
    terms = shown_terms(parts.per_dimension is not None)
    lines = {NAMES[term]: f"{getattr(parts, term)} {of}" for term in terms}
    if parts.at_ceiling:
        lines[NAMES["mutual_information"]] += f", at its ceiling log N = {parts.ceiling:.3f}"
    return lines


def parts_numbers(parts: Decomposition | None) -> dict[str, Any]:
    """The parts of the KL with their errors over data, for evaluation.json."""
    if parts is None:
        return {}
    terms = {name: getattr(parts, name) for name in NAMES}
    return {
        **{name: term.value for name, term in terms.items()},
        **{f"stderr_{name}": term.stderr_data for name, term in terms.items()},
        "parts_rows": parts.num_data,
        "prior_factorises": parts.per_dimension is not None,
        "at_ceiling": parts.at_ceiling,
    }


def by_column(vae: VAE, data: Data, **options: Any) -> Tensor:
    """log p(x_c | the other columns) [N, C] in the units of the data; NaN where one is missing.

    Raises:
        ValueError: If the data are no table.
    """
    if len(data.data_shape) != 1:
        raise ValueError("columns are those of tables: leave --columns out")
    x, y = data.batch(torch.arange(len(data)))
    found = column_log_prob(vae, x, y, **options)
    return found + torch.as_tensor(data.transform.log_slope()).to(found)


def odd_rows(vae: VAE, data: Data, evidence: Evidence) -> list[dict[str, Any]]:
    """The rows of least log p(x), and the column that is farthest below its usual log p."""
    if data.schema is None:
        return []
    lowest = evidence.log_prob.argsort()[:ODD]
    shown = torch.cat([lowest, spread(len(data), OTHERS, 0)])
    each = by_column(vae, data.subset(shown))
    below = (each - each.nanmedian(0).values)[: len(lowest)].nan_to_num(torch.inf)
    cells = data.schema.decode(data.transform.inverse(data.x[lowest].float()))
    columns = below.argmin(1).tolist()
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


def missing_columns(data: Data) -> dict[str, float]:
    """The share of rows that lack each column, where some do."""
    if data.columns is None or not data.missing:
        return {}
    shares = data.x[:].isnan().double().mean(0).tolist()
    return {name: share for name, share in zip(data.columns, shares) if share}


def missing_patterns(data: Data) -> list[dict[str, Any]]:
    """The commonest sets of columns that rows lack, and how many rows lack just these."""
    if data.columns is None or not data.missing:
        return []
    sets, counts = data.x[:].isnan().unique(dim=0, return_counts=True)
    common = counts.argsort(descending=True)[:PATTERNS].tolist()
    return [
        {"columns": list(compress(data.columns, sets[i].tolist())), "rows": counts[i].item()}
        for i in common
    ]


def compare(options: Namespace) -> None:
    """Runs on the same rows: log p(x) of each, and paired differences with their errors."""
    if len(set(options.runs)) < 2:
        raise ValueError("compare needs two runs or more; for one: pyro-vae evaluate RUN")
    models = {run: replicas(run) for run in options.runs}
    every = [run for runs in models.values() for run in runs]
    loaded = {run: load_run(run, options.data_root) for run in every}
    for run in every[1:]:
        check_comparable(every[0], run, loaded, options.part)
    found: dict[str, Evidence] = {}
    for run, (vae, splits) in loaded.items():
        rows = held_out(splits, options.part, options.limit)
        vae, data = placed(vae, rows, options.accelerator)
        found[run] = shifted(estimate(vae, data, options), data)
    where = rows_of(loaded[every[0]][1], options.part, rows)
    of_model = {model: [found[run] for run in runs] for model, runs in models.items()}
    firsts = {model: runs[0] for model, runs in models.items()}
    differs = differing({name: described(run, loaded[run][0]) for name, run in firsts.items()})
    if options.json:
        print(json.dumps(compared(of_model, where) | {"differs": differs}, indent=1))
        return
    options_table = Table("", *firsts, title="what differs between them")
    for name, values in differs.items():
        options_table.add_row(name, *values.values())
    for table in (ranking(of_model, where), options_table, differences(of_model)):
        Console().print(table)
    for a, b in combinations(models, 2):
        print(told(a, b, difference(of_model[a], of_model[b])))


def described(run: str, vae: VAE) -> dict[str, str]:
    """What a run declares of its model and its training."""
    tables = declaration(Path(run), read_run(run), vae)
    return tables["Model"] | tables["Training"]


def differing(declared: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The options in which runs differ: of each, its value in each run."""
    names = dict.fromkeys(name for options in declared.values() for name in options)
    each = {name: {run: declared[run].get(name, "") for run in declared} for name in names}
    return {name: values for name, values in each.items() if len(set(values.values())) > 1}


def told(a: str, b: str, d: Difference) -> str:
    """Which of two is better and by how much, where that is beyond two standard errors."""
    by = f"{abs(d.mean):.2f} +- {d.stderr:.2g} nats per datum"
    if not abs(d.mean) > 2 * d.stderr:
        return f"{a} and {b} are not told apart: they differ by {by}"
    better, worse = (a, b) if d.mean > 0 else (b, a)
    return f"{better} is better than {worse} by {by}"


def replicas(run: str) -> list[str]:
    """The runs of a folder that `train --seeds` made; the run itself of another."""
    runs = [] if (Path(run) / "run.json").exists() else sorted(Path(run).glob("seed-*"))
    return [str(path) for path in runs] or [run]


def ranking(models: dict[str, list[Evidence]], where: str) -> Table:
    """Models from the best, with their errors over data and over seeds."""
    title = f"nats per datum, of {where}"
    shown = Table("", "run", "log p(x), in the units of the data", "verdict", title=title)
    for rank, name in enumerate(sorted(models, key=lambda m: -mean_of(models[m])), start=1):
        runs = models[name]
        every = Evidence.cat(runs)
        value = with_errors(runs[0])
        if len(runs) > 1:
            value = (
                f"{mean_of(runs):.2f}, of {len(runs)} seeds that deviate by {over_seeds(runs):.2f}"
            )
        shown.add_row(str(rank), name, value, counted(every))
    return shown


def differences(models: dict[str, list[Evidence]]) -> Table:
    """Differences of each two models with their errors over data and seeds, and which is worse."""
    shown = Table("first less second", title="paired differences, nats")
    for name in ("difference", "+- over seeds", "P(first is worse)"):
        shown.add_column(name, no_wrap=True)
    for a, b in combinations(models, 2):
        d = difference(models[a], models[b])
        seeds = "unknown" if math.isnan(d.stderr_seeds) else f"{d.stderr_seeds:.3f}"
        shown.add_row(
            f"{a} - {b}", f"{d.mean:.3f} +- {d.stderr_data:.3f}", seeds, f"{d.p_worse:.2g}"
        )
    return shown


def mean_of(runs: list[Evidence]) -> float:
    """Average log p(x) over seeds and data."""
    return sum(evidence.mean() for evidence in runs) / len(runs)


def over_seeds(runs: list[Evidence]) -> float:
    """Standard deviation of the average log p(x) over seeds."""
    return torch.tensor([evidence.mean() for evidence in runs]).std().item()


def difference(a: list[Evidence], b: list[Evidence]) -> Difference:
    """How two models differ, by the replicas of each."""
    return paired_difference(*(torch.stack([e.log_prob for e in runs]) for runs in (a, b)))


def compared(models: dict[str, list[Evidence]], where: str) -> dict[str, Any]:
    """What `compare` prints, for JSON."""
    runs = {
        model: {
            "log_prob": mean_of(runs),
            **dict(zip(("stderr_monte_carlo", "stderr_data"), runs[0].mean_stderr())),
            "seeds": [evidence.mean() for evidence in runs],
            "verdicts": dict(Counter(Evidence.cat(runs).verdict)),
        }
        for model, runs in models.items()
    }
    pairs = [
        {
            "first": a,
            "second": b,
            "difference": d.mean,
            "stderr": d.stderr,
            "stderr_data": d.stderr_data,
            "stderr_seeds": None if math.isnan(d.stderr_seeds) else d.stderr_seeds,
            "p_worse": d.p_worse,
        }
        for a, b in combinations(models, 2)
        for d in [difference(models[a], models[b])]
    ]
    ranks = sorted(models, key=lambda model: -mean_of(models[model]))
    return {"rows_of": where, "ranks": ranks, "runs": runs, "differences": pairs}


def estimate(vae: VAE, data: Data, options: Namespace) -> Evidence:
    """log p(x) of all rows, by the one estimator to call."""
    x, y = data.batch(torch.arange(len(data)))
    return log_evidence(
        vae.model,
        vae.guide,
        x,
        y,
        tolerance=options.tolerance,
        chunk_size=options.chunk_size,
        compile=options.compile,
        devices=options.devices,
        seed=options.seed,
        progress=shown(options),
    )


def draw_audit(vae: VAE, data: Data, evidence: Evidence, options: Namespace) -> None:
    """The figure of the audit behind the verdicts, if there was one: it was kept."""
    if not evidence.audit or evidence.audit.startswith("none"):
        return
    x, y = data.batch(torch.arange(len(data)))
    names = ("tolerance", "chunk_size", "devices", "seed", "progress")
    given = {name: getattr(options, name) for name in names}
    found = kept_audit(vae.model, vae.guide, x, y, budget=None, **given)
    figures = Path(options.run) / "figures"
    figures.mkdir(exist_ok=True)
    keep(plots.audit(found.gap, found.reliable, REACH), figures / "audit")


def draw_extremes(data: Data, evidence: Evidence, figures: Path) -> None:
    """The images of least and of most log p(x), ten each."""
    if len(data.data_shape) != 3 or len(data) < 20:
        return
    order = evidence.log_prob.argsort()
    chosen = torch.cat([order[:10], order[-10:]])
    x = data.transform.inverse(data.batch(chosen)[0].cpu()).unflatten(0, (2, 10))
    least, most = (
        [f"{v:.0f}" for v in evidence.log_prob[ends].tolist()]
        for ends in order[[0, 9, -10, -1]].view(2, 2)
    )
    names = [f"least: {' to '.join(least)}", f"most: {' to '.join(most)}"]
    figures.mkdir(exist_ok=True)
    keep(plots.image_rows(x, names, "log p(x), nats", limits(data)), figures / "extremes")


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


def of_one_unit(data: Data) -> bool:
    """Whether all values are of one kind, as those of images: columns of a table seldom are."""
    return data.levels is not None or len(data.data_shape) > 1


def check_comparable(
    first_run: str, run: str, loaded: dict[str, tuple[VAE, Splits]], part: str
) -> None:
    """Refuses runs whose log p(x) are of different things."""
    first, data = (getattr(loaded[name][1], part) for name in (first_run, run))
    masses = {
        name: vae.likelihood.measure if splits.transform != "dequantise" else [True]
        for name, (vae, splits) in loaded.items()
    }
    if data.digest() != first.digest():
        raise ValueError(
            f"{run} and {first_run} have other rows, or other values missing: train both on the "
            "same split"
        )
    if data.transform.binary != first.transform.binary:
        raise ValueError(
            f"{run} and {first_run} do not compare: one models binarised data, the other does not"
        )
    given = {name: vae.likelihood.of for name, (vae, _) in loaded.items()}
    if given[run] != given[first_run]:
        what = ", ".join(
            f"{name} log p(x{' | ' + of if of else ''})" for name, of in given.items()
        )
        raise ValueError(f"{run} and {first_run} do not compare: {what}")
    size = data.data_shape.numel()
    a, b = (masses[name] * (size // len(masses[name])) for name in (run, first_run))
    if a != b:
        raise ValueError(
            f"{run} and {first_run} do not compare: one gives the probability of whole numbers "
            "or intervals, the other a density; train the second on dequantised data, or give "
            "columns the same resolution"
        )


def shifted(evidence: Evidence, data: Data) -> Evidence:
    """Evidence in the units of the data before their transform."""
    return replace(evidence, log_prob=evidence.log_prob + data.log_jacobians)


def with_errors(evidence: Evidence) -> str:
    """Mean log p(x) with both standard errors."""
    monte_carlo, over_data = evidence.mean_stderr()
    return f"{evidence.mean():.2f} +- {monte_carlo:.2g} (Monte Carlo) +- {over_data:.2g} (data)"


def counted(evidence: Evidence) -> str:
    """How many data have which verdict, and how many needed annealing."""
    verdicts = Counter(evidence.verdict)
    counts = [f"{count} of {len(evidence)} {verdict}" for verdict, count in verdicts.items()]
    annealed = sum(method.startswith("annealed") for method in evidence.method)
    return ", ".join(counts) + (f", {annealed} by AIS" if annealed else "")


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
