"""The commands: from options to run folders, tables and figures."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyro_vae import config, plots
from pyro_vae.data import Data, Splits, declare, load_data, read_rows, restore
from pyro_vae.estimators import evidence_lower_bound, importance_sampling
from pyro_vae.metrics import active_units
from pyro_vae.options import PARSERS, check_names, import_modules
from pyro_vae.training import fit, read_run
from pyro_vae.vae import VAE

__all__ = ["demo", "encode", "evaluate", "plot", "run", "sample", "train"]

DATA = ("data", "data_root", "transform", "validation", "split_seed", "conditional", "limit")
MODEL = ("latent_dim", "prior", "likelihood", "posterior", "encoder", "decoder")
NOT_DECLARED = ("config", "run", "resume", "progress", "import", "data_root")
DEMO = {
    "data": "digits",
    "latent_dim": 8,
    "encoder.hidden": [256],
    "decoder.hidden": [256],
    "epochs": 200,
    "patience": 30,
    "batch_size": 64,
    "lr": 0.002,
}


def run(argv: list[str]) -> int:
    """Runs a command; wrong input is one line, not a traceback."""
    commands = {
        "demo": demo,
        "train": train,
        "evaluate": evaluate,
        "sample": sample,
        "encode": encode,
        "plot": plot,
    }
    name, *rest = argv
    try:
        if name not in commands:
            raise ValueError(f"unknown command{config.closest(name, commands)}")
        commands[name](_parse(name, rest))
    except (ValueError, OSError, FloatingPointError, NotImplementedError, ImportError) as error:
        print(f"pyro-vae {name}: {error}", file=sys.stderr)
        return 2
    return 0


def demo(options: Namespace) -> None:
    """Trains on the bundled digits, evaluates and draws."""
    arguments = [f"--{key}={json.dumps(value)}" for key, value in DEMO.items()]
    arguments += [f"--run={options.run}"] if options.run else []
    folder = train(_parse("train", arguments))
    evaluate(_parse("evaluate", [str(folder)]))


def train(options: Namespace) -> Path:
    """Trains a declared VAE; returns its run folder, with figures."""
    splits = _splits(options)
    vae = _build(options, splits.train)
    folder = _run_folder(options)
    objective, settings = config.component("objective", _declared(options.objective))
    vae.likelihood.check(splits.train.fixed().batch(torch.arange(len(splits.train)))[0])
    _write(folder / "config.yaml", yaml.safe_dump(_declaration(options, splits), sort_keys=False))
    _write(folder / "data.json", json.dumps(_record(splits), indent=1))
    history = fit(
        vae,
        splits.train,
        objective(**settings),
        run=folder,
        epochs=options.epochs,
        batch_size=options.batch_size,
        optimizer=options.optimizer,
        lr=options.lr,
        schedule=options.schedule,
        clip_norm=options.clip_norm,
        validation=splits.validation,
        patience=options.patience,
        devices=options.devices,
        accelerator=options.accelerator,
        precision=options.precision,
        seed=options.seed,
        resume=options.resume is not None,
        progress=options.progress,
        loggers=_loggers(options, folder),
    )
    _draw(folder, vae.eval(), splits, history.rows)
    print(f"run in {folder}, figures in {folder / 'figures'}")
    return folder


def evaluate(options: Namespace) -> None:
    """The table of a run: log p(x) with its error, ELBO and its terms, active units."""
    vae, splits = _load(options)
    part: Data = getattr(splits, options.part)
    rows = torch.arange(min(len(part), options.limit or len(part)))
    x, y = part.fixed().batch(rows)
    bound = evidence_lower_bound(vae.model, vae.guide, x, y, num_samples=options.elbo_samples)
    evidence = importance_sampling(
        vae.model, vae.guide, x, y, num_samples=options.num_samples, seed=options.seed
    )
    evidence.save(Path(options.run) / "evidence.safetensors")
    with torch.no_grad():
        means = torch.cat([vae.encode(*_pair(x, y, i)).mean for i in rows.split(1000)])
    monte_carlo, data = evidence.mean_stderr()
    bits = part.bits_per_dim(evidence.log_prob).mean().item()
    active = active_units(means)
    share = evidence.share_below_threshold()
    lines = {
        "log p(x)": f"{evidence.mean():.2f} +- {monte_carlo:.2f} (Monte Carlo) "
        f"+- {data:.2f} (data)",
        "estimator": f"{evidence.method[0]}, K = {options.num_samples}: {evidence.verdict[0]}",
        "ELBO": _with_error(bound.elbo),
        "KL": f"{_with_error(bound.kl)}, {', '.join(sorted(set(bound.rules.values())))}",
        "reconstruction": _with_error(bound.reconstruction),
        "active units": f"{int(active.sum())} of {len(active)}",
        "k-hat below its threshold": f"{share:.1%} of data",
        "bits per dimension": f"{bits:.3f} (data transform: {splits.transform})",
    }
    _table(f"{options.run}: {len(x)} of {len(part)} rows of the {options.part} part", lines)
    numbers = {
        "part": options.part,
        "rows": len(x),
        "num_samples": options.num_samples,
        "log_prob": evidence.mean(),
        "stderr_monte_carlo": monte_carlo,
        "stderr_data": data,
        "elbo": bound.elbo.mean().item(),
        "kl": bound.kl.mean().item(),
        "reconstruction": bound.reconstruction.mean().item(),
        "active_units": int(active.sum()),
        "khat_below_threshold": share,
        "bits_per_dim": bits,
    }
    _write(Path(options.run) / "evaluation.json", json.dumps(numbers, indent=1))


def sample(options: Namespace) -> None:
    """Draws of a run's model: an .npz file, and a picture where they are images."""
    vae, splits = _load(options)
    y = _condition(splits.train, options.size, options.label)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(options.seed)
        x = vae.sample(options.size, y, mean=options.mean)
    x = splits.train.transform.inverse(x)
    out = Path(options.out or Path(options.run) / "samples.npz")
    np.savez(out, x=x.numpy())
    if x.ndim == 4:
        plots.save(plots.images(x, limits=_limits(splits.train)), str(out.with_suffix(".png")))
    print(f"{len(x)} samples in {out}")


def encode(options: Namespace) -> None:
    """Posterior means and scales of the rows of a file, in its order."""
    vae = config.load(options.run)
    record = json.loads((Path(options.run) / "data.json").read_text())
    rows = read_rows(options.file).with_transform(restore(record["transform"]))
    if record["conditional"] and rows.y is None:
        rows = Data(rows.x, labels=rows.labels, classes=record["classes"]).one_hot()
        rows = rows.with_transform(restore(record["transform"]))
    x, y = rows.fixed(record["seed"]).batch(torch.arange(len(rows)))
    vae.likelihood.check(x)
    with torch.no_grad():
        q = [vae.encode(*_pair(x, y, i)) for i in torch.arange(len(x)).split(1000)]
        means = torch.cat([d.mean for d in q]).numpy()
        scales = torch.cat([d.stddev for d in q]).numpy()
    out = Path(options.out or Path(options.file).with_suffix(".encoded.npz"))
    _write_codes(out, means, scales)
    print(f"means and scales of {len(x)} rows in {out}")


def plot(options: Namespace) -> None:
    """The figures of a run again."""
    vae, splits = _load(options)
    with (Path(options.run) / "metrics.csv").open() as file:
        rows = [
            {k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)
        ]
    _draw(Path(options.run), vae, splits, rows)
    print(f"figures in {Path(options.run) / 'figures'}")


def _parse(command: str, argv: list[str]) -> Namespace:
    if command == "train":
        argv = _resumed(argv)
    import_modules(argv)
    check_names(argv)
    return PARSERS[command]().parse_args(argv)


def _resumed(argv: list[str]) -> list[str]:
    """With `--resume RUN`, the options of that run come first."""
    for i, argument in enumerate(argv):
        key, _, value = argument.partition("=")
        if key == "--resume":
            folder = value or argv[i + 1]
            return ["--config", str(Path(folder) / "config.yaml"), "--run", folder, *argv]
    return argv


def _splits(options: Namespace) -> Splits:
    splits = load_data(
        options.data,
        root=options.data_root,
        validation=options.validation,
        seed=options.split_seed,
        conditional=options.conditional,
        limit=options.limit,
    )
    name = options.transform
    if name == "auto":
        likelihood = config.named_class("likelihood", options.likelihood["class_path"])
        name = config.default_transform(likelihood, splits.train.levels, splits.train.x)
    return splits.with_transform(name)


def _build(options: Namespace, data: Data) -> VAE:
    parts: dict[str, Any] = {name: _declared(options[name]) for name in MODEL[1:]}
    arguments = parts["likelihood"].setdefault("init_args", {})
    cls = config.named_class("likelihood", parts["likelihood"]["class_path"])
    if "levels" in config.option_names(cls) and data.levels is not None:
        arguments["levels"] = data.levels
    condition = 0 if data.y is None else data.y.shape[1]
    torch.manual_seed(options.seed)
    return config.build(
        tuple(data.data_shape), options.latent_dim, **parts, condition_dim=condition
    )


def _load(options: Namespace) -> tuple[VAE, Splits]:
    folder = Path(options.run)
    vae = config.load(folder)
    try:
        declared = yaml.safe_load((folder / "config.yaml").read_text())
        record = json.loads((folder / "data.json").read_text())
    except OSError as error:
        raise ValueError(f"{folder} is not a run of pyro-vae train: {error}") from error
    splits = load_data(
        declared["data"],
        root=options.data_root,
        transform=declared["transform"],
        validation=declared["validation"],
        seed=declared["split_seed"],
        conditional=declared["conditional"],
        limit=declared["limit"],
    )
    splits.check(record["description"])
    return vae, splits


def _run_folder(options: Namespace) -> Path:
    if options.run is None:
        stem = Path(options.data).stem.lower()
        free = (Path("runs") / f"{stem}-{n}" for n in range(1, 10_000))
        return next(folder for folder in free if not folder.exists())
    folder = Path(options.run)
    if options.resume is None and (folder / "run.json").exists():
        raise ValueError(f"{folder} holds a run: choose another --run, or go on with --resume")
    if options.resume is not None:
        read_run(folder)
    return folder


def _declaration(options: Namespace, splits: Splits) -> dict[str, Any]:
    """What `--config` needs to make this run again."""
    plain = options.clone().as_dict()
    declared = {key: value for key, value in plain.items() if key not in NOT_DECLARED}
    for family in (*MODEL[1:], "objective"):
        declared[family] = config.short_names(family, declared[family])
    return {**declared, "transform": splits.transform}


def _record(splits: Splits) -> dict[str, Any]:
    """What `encode` needs of the data, and what `evaluate` checks."""
    return {
        "description": splits.describe(),
        "transform": declare(splits.train.transform),
        "conditional": splits.conditional,
        "classes": splits.train.classes,
        "seed": splits.seed,
    }


def _draw(folder: Path, vae: VAE, splits: Splits, rows: list[Any]) -> None:
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    data, limits = splits.validation, _limits(splits.validation)
    shown = torch.arange(min(len(data), 2000))
    x, y = data.fixed().batch(shown)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        means = torch.cat([vae.encode(*_pair(x, y, i)).mean for i in shown.split(500)])
        condition = _condition(splits.train, 100, None)
        draws = {mean: vae.sample(100, condition, mean=mean) for mean in (False, True)}
        again = vae.reconstruct(*_pair(x, y, shown[:30]))
    plots.save(plots.curves(rows), str(figures / "curves.png"))
    labels = None if data.labels is None else data.labels[shown]
    plots.save(plots.latent(means, labels), str(figures / "latent.png"))
    back = data.transform.inverse
    if x.ndim == 4:
        for mean, name in ((False, "samples"), (True, "sample_means")):
            title = "E[x | z] of drawn z" if mean else "draws of x"
            figure = plots.images(back(draws[mean]), title, limits)
            plots.save(figure, str(figures / f"{name}.png"))
        figure = plots.reconstructions(back(x[:30]), back(again), limits)
        plots.save(figure, str(figures / "reconstructions.png"))
    else:
        figure = plots.columns(back(x).flatten(1), back(draws[False]).flatten(1))
        plots.save(figure, str(figures / "samples.png"))


def _condition(data: Data, size: int, label: int | None) -> Tensor | None:
    """`y` of `size` draws: of one class, of all in turn, or of the first rows of the data."""
    if data.y is None:
        if label is not None:
            raise ValueError("label needs a conditional model: train with --conditional true")
        return None
    if data.classes is None or data.y.shape[1] != data.classes:
        return data.y[torch.arange(size) % len(data)]
    if label is not None and not 0 <= label < data.classes:
        raise ValueError(f"label must be from 0 to {data.classes - 1}; got {label}")
    labels = torch.arange(size) % data.classes if label is None else torch.full((size,), label)
    return torch.eye(data.classes)[labels]


def _limits(data: Data) -> tuple[float, float] | None:
    return None if data.levels is None else (0.0, float(data.levels - 1))


def _pair(x: Tensor, y: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    return x[rows], None if y is None else y[rows]


def _loggers(options: Namespace, folder: Path) -> list[Any]:
    if not options.tensorboard:
        return []
    from lightning_fabric.loggers import TensorBoardLogger

    return [TensorBoardLogger(folder, name="tensorboard", version="")]


def _declared(value: Any) -> dict[str, Any]:
    return value.as_dict() if isinstance(value, Namespace) else dict(value)


def _with_error(values: Tensor) -> str:
    return f"{values.mean().item():.2f} +- {values.std().item() / len(values) ** 0.5:.2f} (data)"


def _table(title: str, lines: dict[str, str]) -> None:
    table = Table(title=title, show_header=False)
    for name, text in lines.items():
        table.add_row(name, text)
    Console().print(table)
    print("nats per datum, of held-out data; larger is better but for KL and bits")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _write_codes(out: Path, means: np.ndarray, scales: np.ndarray) -> None:
    if out.suffix == ".npz":
        np.savez(out, mean=means, scale=scales)
    elif out.suffix == ".csv":
        head = [f"{kind}{d}" for kind in ("mean", "scale") for d in range(means.shape[1])]
        both = np.concatenate([means, scales], 1)
        np.savetxt(out, both, "%.9g", ",", header=",".join(head), comments="")
    else:
        raise ValueError(f"out must end in .npz or .csv; got {out}")
