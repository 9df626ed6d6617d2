"""Training from the command line."""

from __future__ import annotations

import inspect
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor

from pyro_vae import config
from pyro_vae.arguments import check_whole, closest
from pyro_vae.cli.evaluate import evaluate
from pyro_vae.cli.figures import KlParts, draw
from pyro_vae.cli.folder import check_support, declared_run, load_splits, read_record
from pyro_vae.cli.parsing import NOT_IN_FILES, parse, plain_options
from pyro_vae.data import Data, Schema, Splits, spread
from pyro_vae.data.transforms import default_transform, is_whole_line
from pyro_vae.files import locked, reading
from pyro_vae.likelihoods import Bernoulli, Columns, Likelihood
from pyro_vae.objectives import Objective
from pyro_vae.processes import in_processes, is_first_process, uses_cuda
from pyro_vae.training import History, fit, read_run
from pyro_vae.vae import VAE

NOT_DECLARED = (*NOT_IN_FILES, "progress", "seeds")  # options that config.yaml does not hold
DEMO = {
    "data": "digits",
    "transform": "dynamic",
    "latent_dim": 10,
    "encoder.hidden": [400],
    "decoder.hidden": [400],
    "epochs": 400,
    "patience": 40,
    "batch_size": 64,
    "lr": 0.002,
}
HINT_ROWS = 10_000  # rows that `hints` looks at
SIZE_RATIO = 10.0  # ratio of the 99th to the 1st percentile of row sums that gives a hint
MAX_CODES = 10  # most different values of a column that looks like codes


def demo(options: Namespace) -> None:
    """Trains on the bundled digits, evaluates and draws."""
    arguments = [f"--{key}={value}" for key, value in DEMO.items()]
    arguments += [f"--run={options.run}"] if options.run else []
    folder = train(parse("train", arguments))
    evaluate(parse("evaluate", [str(folder)]))
    quoted = shlex.quote(str(folder))
    print(f"in one page: pyro-vae report {quoted}; to play with: pyro-vae explore {quoted}")


def train(options: Namespace) -> Path:
    """Trains a declared VAE and draws figures; returns the run folder.

    All processes that torchrun starts train; only the first one writes.
    """
    check_whole(seeds=options.seeds)
    if options.seeds > 1:
        return replicas(options)
    first = is_first_process()
    options.data_root = os.path.abspath(options.data_root)
    folder, splits = _run_folder(options), _load_splits(options)
    options.data = splits.name
    vae = _build_vae(options, splits)
    objective = options.objective.make()
    check_support(vae, splits.train)
    arguments = (options, vae, splits, folder, objective)
    if not first:
        _fit(*arguments)
        return folder
    print(_describe(splits, options), flush=True)
    if splits.train.schema is not None:
        print(splits.train.schema)
    for hint in hints(splits.train, vae.likelihood):
        print(f"note: {hint}")
    with locked(folder / "train.lock"):
        declared = plain_options(options, NOT_DECLARED) | {"transform": splits.transform}
        with declared_run(folder, declared, splits):
            history = _fit(*arguments)
        early = ", for the bound had stopped rising" if len(history) < options.epochs else ""
        of = f" of {options.epochs}" if len(history) <= options.epochs else ""
        print(
            f"trained {len(history)}{of} epochs{early}; weights of epoch "
            f"{history.best_epoch} kept, validation ELBO "
            f"{history.final['validation_elbo']:.2f} nats"
        )
        draw(folder, vae.eval(), splits, history.rows)
    print(
        f"run in {folder}, figures in {folder / 'figures'}; log p(x): pyro-vae evaluate "
        f"{shlex.quote(str(folder))}"
    )
    return folder


def replicas(options: Namespace) -> Path:
    """Trains from several seeds, `devices` at a time; resumes the runs that exist already."""
    if options.resume is not None:
        raise ValueError("resume goes on with one run: for several seeds, give the command again")
    folder = _run_folder(options)
    runs = []
    for seed in range(options.seed, options.seed + options.seeds):
        copy, run = options.clone(), folder / f"seed-{seed}"
        copy.seed, copy.seeds, copy.devices, copy.run = seed, 1, 1, str(run)
        copy.resume = copy.run if (run / "run.json").exists() else None
        runs.append(copy)
    shares = [runs[i :: options.devices] for i in range(min(options.devices, len(runs)))]
    if len(shares) == 1:
        train_all(runs)
    else:
        in_processes(train_all, shares, "cuda" if uses_cuda(options.accelerator) else "cpu")
    print(f"{len(runs)} runs in {folder}: pyro-vae compare takes it as one, with their spread")
    return folder


def train_all(runs: list[Namespace]) -> None:
    """Trains one run after another."""
    for options in runs:
        train(options)


def _fit(
    options: Namespace, vae: VAE, splits: Splits, folder: Path, objective: Objective
) -> History:
    data, loggers = splits.train, []
    if options.tensorboard:
        from lightning_fabric.loggers import TensorBoardLogger

        loggers = [TensorBoardLogger(folder, name="tensorboard", version="")]
    if options.classes and data.labels is not None:
        data = replace(data, classes=options.classes).one_hot()
    try:
        arguments = {
            "vae": vae,
            "data": data,
            "objective": objective,
            "run": folder,
            "validation": splits.validation,
            "resume": options.resume is not None,
            "callbacks": [KlParts(folder, splits.validation)],
            "loggers": loggers,
        }
        history: History = config.call_with(fit, {**vars(options), **arguments})
        return history
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_resume_hint(folder, options)) from None
    except OSError as error:
        raise OSError(f"{error}{_resume_hint(folder, options)}") from error


def _load_splits(options: Namespace) -> Splits:
    """Loads the data; if they are a table, sets the likelihood to Columns."""
    known = read_record(options.resume) if options.resume else {}
    is_table = options.likelihood.cls is Columns and Path(options.data).is_file()
    schema = {} if options.schema is None and is_table else options.schema
    splits = load_splits(options, known, transform="none", schema=schema)
    train = splits.train
    if train.schema is not None:
        if (cls := options.likelihood.cls) not in (Columns, Bernoulli):
            raise ValueError(
                f"{options.data} is read as a table of several kinds, which the likelihood "
                f"Columns is for; got {cls.__name__}: leave the likelihood out"
            )
        options.schema = train.schema.plain
        if cls is Bernoulli:  # the default, which nobody asked for
            options.likelihood = config.component("likelihood", "Columns")
    cls, name = options.likelihood.cls, options.transform
    rounded = options.likelihood.options.get("resolution") is not None
    if name == "auto":  # columns and a resolution keep their units
        keeps = rounded or issubclass(cls, Columns)
        name = "none" if keeps else default_transform(cls.support, train.levels, train.x.ndim)
    splits = splits.with_transform(name)
    if rounded and splits.train.log_jacobian:
        raise ValueError(
            f"a resolution is in the units of the data: transform {name} changes them"
        )
    return splits


def _column_options(given: Any, schema: Schema) -> dict[str, Any] | list[Any]:
    if isinstance(given, list | tuple):
        return list(given)
    columns: dict[str, Any] = schema.likelihood["init_args"]["columns"]
    for name in (given or {}).keys() - columns.keys():
        raise ValueError(f"there is no column {name!r}{closest(name, columns)}")
    return columns | (given or {})


def _describe(splits: Splits, options: Namespace) -> str:
    rows = ", ".join(f"{len(part)} {name}" for name, part in splits.parts.items())
    likelihood = options.likelihood.cls.__name__
    why = f", which fits {likelihood}" if options.transform == "auto" else ""
    y = splits.train.y
    notes = "" if y is None else f"; conditional on y of length {y.shape[1]}"
    if splits.missing:
        notes += f"; {splits.train.missing_share:.1%} of the values are missing"
    return f"{options.data}: {rows} rows; transform {splits.transform}{why}{notes}"


def _resume_hint(folder: Path, options: Namespace) -> str:
    if not (folder / "run.json").exists():
        return ""
    module = f" --import {options['import']}" if options["import"] else ""
    return f"; go on with: pyro-vae train --resume {shlex.quote(str(folder))}{module}"


def _build_vae(options: Namespace, splits: Splits) -> VAE:
    data, likelihood = splits.train, options.likelihood
    cls, init_args = likelihood
    if data.levels is not None and "levels" in init_args:
        if init_args["levels"] == inspect.signature(cls).parameters["levels"].default:
            likelihood = likelihood.replace(levels=data.levels)
    if data.schema is not None:
        likelihood = likelihood.replace(columns=_column_options(init_args["columns"], data.schema))
    if options.conditional and data.labels is not None and bool((data.labels < 0).any()):
        raise ValueError("--conditional needs a label in every row: for few labels use --classes")
    check_whole(0, seed=options.seed)
    torch.manual_seed(options.seed)
    from_data = {
        "likelihood": likelihood,
        "condition_dim": 0 if data.y is None else data.y.shape[1],
        "missing": splits.missing if options.missing is None else options.missing,
    }
    vae: VAE = config.call_with(config.build, {**vars(options), **from_data}, data.data_shape)
    if options.resume:
        with reading(Path(options.resume) / "run.json"):
            before = read_run(options.resume)["declaration"]
            now = before and {"likelihood": config.add_new_options(before["likelihood"])}
            if before and {**before, **now} == vae.declaration:
                vae.declaration = before  # the run keeps its declaration
    return vae


def _run_folder(options: Namespace) -> Path:
    if options.run is None:
        stem = Path(os.path.abspath(options.data)).stem.lower()  # for "." too
        free = (Path("runs") / f"{stem}-{n}" for n in range(1, 10_000))
        return next(folder for folder in free if not folder.exists())
    if not options.run.strip():
        raise ValueError(f"run must name a folder; got {options.run!r}")
    folder = Path(options.run)
    if options.resume is not None:
        if folder != Path(options.resume):
            raise ValueError(f"resume goes on in {options.resume} itself: leave --run out")
    elif (folder / "run.json").exists():
        raise ValueError(f"{folder} holds a run: choose another --run, or go on with --resume")
    return folder


def hints(data: Data, likelihood: Likelihood) -> list[str]:
    """Returns hints, a line each, at what a model may learn from a table against the intention."""
    if len(data.data_shape) != 1 or data.levels is not None or data.schema is not None:
        return []
    x = data.x[spread(len(data), HINT_ROWS, 0)].double()
    if library := getattr(likelihood, "library", None):
        low, high = x.nansum(1).quantile(x.new_tensor([0.01, 0.99])).tolist()
        unequal = library == "none" and data.y is None and high >= SIZE_RATIO * max(low, 1.0)
        totals = (
            f"the sums of rows go from {low:.0f} to {high:.0f}: the latents will tell large rows "
            "from small before kinds of rows; to set size aside give --likelihood.library latent"
        )
        return [totals] if unequal else []
    if not is_whole_line(likelihood.support):
        return []
    return _code_hints(x, data.columns, type(likelihood).__name__)


def _code_hints(x: Tensor, columns: tuple[str, ...] | None, likelihood: str) -> list[str]:
    whole = ((x == x.round()) | x.isnan()).all(0).nonzero().flatten().tolist()
    counts = {d: len(x[~x[:, d].isnan(), d].unique()) for d in whole}
    few = [d for d, count in counts.items() if count <= min(MAX_CODES, len(x) // 3)]
    if not few:
        return []
    names = ", ".join(columns[d] if columns else f"number {d} (from 0)" for d in few[:5])
    names += ", ..." if len(few) > 5 else ""
    return [
        f"{len(few)} column(s) hold at most {MAX_CODES} whole numbers, as codes do ({names}): "
        f"under {likelihood} their density, and log p(x), can grow without bound; leave them out, "
        "or give them as y"
    ]
