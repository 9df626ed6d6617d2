"""A table of 32,561 rows: a training step beside PyTorch by hand, `impute`, memory.

python benchmarks/adult.py ADULT [--turns 5] [--steps 100] [--rows 6500]

ADULT is the folder of HI-VAE's table (see tables.py); the cells of its mask of 20 % are empty.
Five columns are Normal with a predicted scale, six Categorical and one Ordinal; one hidden layer
of 128, 10 latents, batches of 100. All candidates train on one thread, in turns, from the same
start, and must end at the same loss; times are of the processor. Memory is the peak of a process
that trains for an epoch with `fit` and imputes 100 rows, above that of its rows alone, for some
numbers of rows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from turns import Turns, compare, peak_memory

BATCH, LATENTS, WIDTH, CHECKED = 100, 10, 128, 1000
KINDS = {"count": "Normal", "pos": "Normal", "real": "Normal", "cat": "Categorical"}


def rows(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Rows with holes, numbers standardised, and the likelihood of each column."""
    import torch
    from tables import load

    truth, hidden, schema, types = load(folder, 20)
    x = truth.masked_fill(hidden, torch.nan)
    columns: dict[str, Any] = {}
    for d, (declared, (name, column)) in enumerate(zip(types, schema.columns.items())):
        kind = KINDS.get(declared, "Ordinal")
        if kind == "Normal":
            seen = x[~x[:, d].isnan(), d]
            x[:, d] = (x[:, d] - seen.mean()) / seen.std()
        levels = {"levels": len(column.categories)}
        columns[name] = kind if kind == "Normal" else {"class_path": kind, "init_args": levels}
    return x, columns


def by_hand(folder: Path, turns: Turns) -> Any:
    """What one writes for this table without a library."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.manual_seed(0)
    x, columns = rows(folder)
    kinds = [c if isinstance(c, str) else c["class_path"] for c in columns.values()]
    normal, categorical, ordinal = (
        [d for d, kind in enumerate(kinds) if kind == wanted]
        for wanted in ("Normal", "Categorical", "Ordinal")
    )
    declared = list(columns.values())
    levels = [declared[d]["init_args"]["levels"] for d in categorical]
    steps = declared[ordinal[0]]["init_args"]["levels"]
    parts = [2 * len(normal), *levels, 1]
    inputs = len(normal) + sum(levels) + 1 + len(declared)
    encoder, decoder = (
        nn.Sequential(nn.Linear(i, WIDTH), nn.ReLU(), nn.Linear(WIDTH, o))
        for i, o in ((inputs, 2 * LATENTS), (LATENTS, sum(parts)))
    )
    edges = torch.logit(torch.arange(1, steps) / steps)
    raw = edges.diff() - 1e-3
    raw = torch.cat([edges[:1], raw + torch.log(-torch.expm1(-raw))])
    modules = nn.ModuleList([encoder, decoder])
    modules.register_parameter("raw", nn.Parameter(raw))

    def loss(x: Any) -> Any:
        seen = ~x.isnan()
        full = x.nan_to_num(0.0)
        codes = full.long()
        hot = [F.one_hot(codes[:, d], n) * seen[:, d, None] for d, n in zip(categorical, levels)]
        loc, scale = encoder(
            torch.cat([full[:, normal], full[:, ordinal], *hot, seen.float()], 1)
        ).chunk(2, -1)
        scale = 1e-4 + F.softplus(scale)
        z = loc + scale * torch.randn_like(scale)
        numbers, *logits, location = decoder(z).split(parts, -1)
        mean, width = numbers.chunk(2, -1)
        width = 0.01 + F.softplus(width)
        found = -0.5 * ((full[:, normal] - mean) / width) ** 2 - width.log()
        found = ((found - 0.5 * math.log(2 * math.pi)) * seen[:, normal]).sum(1)
        for d, part in zip(categorical, logits):
            found = found - F.cross_entropy(part, codes[:, d], reduction="none") * seen[:, d]
        gaps = 1e-3 + F.softplus(modules.raw[1:])
        at = torch.cat([modules.raw[:1], gaps]).cumsum(0) - location
        below, above = F.logsigmoid(at), F.logsigmoid(-at)
        inside = below[:, 1:] + above[:, :-1] + torch.log(-torch.expm1(-at.diff(dim=1)))
        each = torch.cat([below[:, :1], inside, above[:, -1:]], 1)
        d = ordinal[0]
        found = found + each.gather(1, codes[:, d : d + 1])[:, 0] * seen[:, d]
        return (0.5 * (loc**2 + scale**2 - 1) - scale.log()).sum(1).mean() - found.mean()

    optimizer = torch.optim.Adam(modules.parameters(), lr=1e-3, fused=True)
    for index in turns.batches(len(x), BATCH):
        value = loss(x[index])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        value.item()

    def ended() -> float:
        with torch.no_grad():
            return sum(loss(x[:CHECKED]).item() for _ in range(10)) / 10

    return ended


def vae_of(columns: dict[str, Any]) -> Any:
    """The same by pyro_vae."""
    from pyro_vae import build

    network = {"MLP": {"hidden": [WIDTH], "activation": "relu"}}
    likelihood = {"Columns": {"columns": columns}}
    given = {"likelihood": likelihood, "encoder": network, "decoder": network}
    return build(len(columns), LATENTS, **given, missing=True)


def pyro_vae(folder: Path, turns: Turns, compiled: bool = False) -> Any:
    """`fit`, with all that its loop does."""
    import torch

    from pyro_vae.estimators import evidence_lower_bound

    torch.manual_seed(0)
    x, columns = rows(folder)
    vae = vae_of(columns)
    turns.fit(vae, x, batch_size=BATCH, lr=1e-3, compile=compiled)
    return lambda: -evidence_lower_bound(vae, x[:CHECKED], num_samples=10).elbo.mean().item()


def memory(folder: Path, count: int, pipe: Any) -> None:
    """MB above those of the rows, which are repeated up to a number."""
    import torch

    from pyro_vae import fit, impute

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    x, columns = rows(folder)
    x = x.repeat(-(-count // len(x)), 1)[:count]
    before = peak_memory()
    vae = vae_of(columns)
    fit(vae, x, epochs=1, batch_size=1000, progress=False)
    impute(vae, x[:100], num_draws=1, proposal="guide")
    pipe.send(peak_memory() - before)


def measured_memory(folder: Path, count: int) -> float:
    context = get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=memory, args=(folder, count, there), daemon=True).start()
    return here.recv()


def imputing(folder: Path, count: int, proposal: str) -> float:
    """Seconds of this process that `impute` takes, after one epoch."""
    import torch

    from pyro_vae import fit, impute

    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, columns = rows(folder)
    vae = vae_of(columns)
    fit(vae, x, epochs=1, batch_size=BATCH, progress=False)
    start = time.process_time()
    found = impute(vae, x[:count], num_draws=20, proposal=proposal)
    print(found, flush=True)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=6500)
    parser.add_argument("--counts", type=int, nargs="*", default=[32_561, 325_610, 1_302_440])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = arguments.folder.resolve()
    if arguments.turns:
        candidates = {
            "by hand": partial(by_hand, folder),
            "pyro_vae": partial(pyro_vae, folder),
            "pyro_vae, compile=True": partial(pyro_vae, folder, compiled=True),
        }
        found = compare(candidates, turns=arguments.turns, steps=arguments.steps,
                        warm=arguments.steps, threads=1,
                        clock=time.process_time)  # fmt: skip
        for name, result in found.items():
            ratio = result.ratio(found["by hand"])
            each = {"ms": round(statistics.median(result.ms), 3), "ratio": round(ratio, 2)}
            print(json.dumps({"name": name, **each, "loss": round(result.loss, 3)}), flush=True)
    for proposal in ("guide", "refined") if arguments.rows else ():
        seconds = imputing(folder, arguments.rows, proposal)
        print(f"impute {arguments.rows} rows, {proposal}: {seconds:.0f} s", flush=True)
    for count in arguments.counts:
        print(f"{count} rows: {measured_memory(folder, count):.0f} MB", flush=True)


if __name__ == "__main__":
    main()
