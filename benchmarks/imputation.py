"""Errors of imputed values on UCI tables, beside a Gaussian fitted by EM.

python benchmarks/imputation.py --root uci --compile [--data banknote red] [--kind mcar mnar]

The root holds banknote.csv, concrete.xls (needs xlrd), winequality-red.csv and
winequality-white.csv of the UCI repository. Columns are standardised before entries are hidden;
the class, quality or strength is left out, but for --whole. All rows are trained on, and what was
hidden is imputed.

mcar: each entry is missing with probability 1/2; mean squared error, after Mattei and Frellsen
(2019). mnar: in the first half of the columns what is above the mean is missing; root mean
squared error, after Ipsen, Mattei and Frellsen (2021), by the program of
examples/studies/not_at_random.py: linear, or with the network of --mnar_hidden.
"""

from __future__ import annotations

import argparse
import runpy
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae import build, fit, impute
from pyro_vae.networks import MLP
from pyro_vae.objectives import IWAE

STUDY = Path(__file__).parent.parent / "examples" / "studies" / "not_at_random.py"


class Beside(MLP):
    """A linear map with a network beside it."""

    def __init__(
        self,
        in_shape: int | tuple[int, ...],
        out_shape: int | tuple[int, ...],
        hidden: tuple[int, ...] = (128, 128),
        activation: str = "tanh",
    ) -> None:
        super().__init__(in_shape, out_shape, hidden, activation)
        self.linear = nn.Linear(in_shape[0], out_shape[0], bias=False)

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of both."""
        return super().body(x, y) + self.linear(x)


def table(root: Path, name: str, whole: bool = False) -> Tensor:
    """A table with standardised columns, float32 [N, D]; if not whole, without the last."""
    if name == "concrete":
        import pandas

        x = pandas.read_excel(root / "concrete.xls").to_numpy(float)
    elif name == "banknote":
        x = np.loadtxt(root / "banknote.csv", delimiter=",")
    else:
        x = np.loadtxt(root / f"winequality-{name}.csv", delimiter=";", skiprows=1)
    x = x if whole else x[:, :-1]
    return torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)


def gaussian_em(x: Tensor, iterations: int = 100) -> Tensor:
    """E[x_m | x_o] under one Gaussian with a full covariance, fitted by EM."""
    x = x.double()
    missing = x.isnan()
    mean, covariance = x.nanmean(0), torch.eye(x.shape[1], dtype=torch.float64)
    patterns, which = missing.unique(dim=0, return_inverse=True)
    filled = torch.where(missing, mean, x)
    for _ in range(iterations):
        spread = torch.zeros_like(covariance)
        before = covariance
        for p, m in enumerate(patterns):
            o, rows = ~m, (which == p).nonzero()[:, 0]
            gain = torch.linalg.lstsq(covariance[o][:, o], covariance[o][:, m]).solution.T
            guess = mean[m] + (x[rows][:, o] - mean[o]) @ gain.T
            filled[rows[:, None], m.nonzero()[:, 0]] = guess
            rest = covariance[m][:, m] - gain @ covariance[o][:, m]
            index = m.nonzero()[:, 0]
            spread[index[:, None], index] += len(rows) * rest
        mean = filled.mean(0)
        covariance = ((filled - mean).T @ (filled - mean) + spread) / len(x)
        if (covariance - before).abs().max() < 1e-4:
            break
    return filled.float()


def ours(x: Tensor, arguments: argparse.Namespace, seed: int) -> Tensor:
    """Means imputed by a VAE whose decoder is a linear map with a network beside it."""
    torch.manual_seed(seed)
    D, hidden = x.shape[1], {"hidden": [arguments.width] * 2, "activation": arguments.activation}
    vae = build(
        D, arguments.latents, missing=True,
        likelihood={
            "class_path": arguments.likelihood,
            "init_args": {"scale": arguments.scale, "min_scale": arguments.min_scale},
        },
        encoder={"class_path": "MLP", "init_args": hidden},
        decoder={"class_path": "__main__.Beside", "init_args": hidden},
    )  # fmt: skip
    epochs = max(1, arguments.steps * arguments.batch_size // len(x))
    decay = {"class_path": "CosineAnnealingLR", "init_args": {"T_max": epochs}}
    options = {"batch_size": arguments.batch_size, "lr": arguments.lr, "schedule": decay}
    options |= {"seed": seed, "progress": False, "compile": arguments.compile}
    fit(vae, x, IWAE(num_particles=arguments.particles), epochs=epochs, **options)
    return impute(
        vae, x, num_draws=1, num_samples=arguments.samples, proposal="guide", seed=seed
    ).mean


def neighbours(full: Tensor, x: Tensor) -> float:
    """Mean squared error of the nearest rows, all complete, by what is observed of each row.

    No method has such rows; it is the least over the number of neighbours, and says what is left
    to predict.
    """
    errors = {}
    for count in (3, 5, 10, 20, 40):
        total = 0.0
        for n, (row, truth) in enumerate(zip(x, full)):
            seen = ~row.isnan()
            distance = (full[:, seen] - row[seen]).square().sum(1)
            distance[n] = torch.inf
            near = distance.topk(count, largest=False).indices
            total += (full[near].mean(0) - truth)[~seen].square().sum().item()
        errors[count] = total / x.isnan().sum().item()
    return min(errors.values())


def half(full: Tensor, seed: int) -> Tensor:
    """Each entry missing with probability one half."""
    generator = torch.Generator().manual_seed(seed)
    return full.masked_fill(torch.rand(full.shape, generator=generator) < 0.5, torch.nan)


def squared(found: Tensor, full: Tensor, x: Tensor) -> float:
    return (found - full)[x.isnan()].square().mean().item()


def mcar(name: str, full: Tensor, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    x = half(full, seed)
    start = time.process_time()
    em = squared(gaussian_em(x), full, x)
    middle = time.process_time()
    vae = squared(ours(x, arguments, seed), full, x)
    seconds = time.process_time() - middle
    print(f"| {name} | mcar, mask {seed} | {em:.3f} ({middle - start:.0f} s) | "
          f"{vae:.3f} ({seconds:.0f} s) | {neighbours(full, x):.3f} |", flush=True)  # fmt: skip
    return {"EM": em, "ours": vae}


def mnar(name: str, full: Tensor, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    study = runpy.run_path(str(STUDY))
    torch.manual_seed(seed)
    x = study["large_missing"](full)
    size, D = arguments.mnar_batch_size, x.shape[1]
    start = time.process_time()
    scale = arguments.mnar_scale, arguments.mnar_min_scale
    vae = study["normal"](D, D - 1, arguments.mnar_hidden, *scale)
    found = study["imputed"](
        study["SelfMasking"](vae, x.isnan().any(0)), x,
        epochs=max(1, arguments.mnar_steps * size // len(x)), lr=arguments.mnar_lr, seed=seed,
        compile=arguments.compile, batch_size=size, decay=not arguments.mnar_constant,
    )  # fmt: skip
    error = squared(found.mean, full, x) ** 0.5
    seconds = time.process_time() - start
    em = squared(gaussian_em(x), full, x) ** 0.5
    print(f"| {name} | mnar, seed {seed} | {em:.3f} | {error:.3f} ({seconds:.0f} s) | log p "
          f"{found.log_prob.mean():.3f} |", flush=True)  # fmt: skip
    return {"EM": em, "ours": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--root", type=Path, required=True)
    add("--data", nargs="+", default=["banknote", "concrete", "red", "white"])
    add("--whole", action="store_true", help="with the class, quality or strength")
    add("--kind", nargs="+", default=["mcar", "mnar"])
    add("--masks", type=int, nargs="+", default=[0, 1, 2], help="seeds of mask and training")
    add("--steps", type=int, default=16_000)
    add("--mnar_steps", type=int, default=5000)
    add("--mnar_lr", type=float, default=1e-2)
    add("--mnar_hidden", type=int, nargs="*", default=[])
    add("--mnar_batch_size", type=int, default=100)
    add("--mnar_scale", default="learned", help="or predicted, or per_dimension")
    add("--mnar_min_scale", type=float, default=0.01)
    add("--mnar_constant", action="store_true", help="no decay of the learning rate")
    add("--batch_size", type=int, default=32)
    add("--particles", type=int, default=20)
    add("--samples", type=int, default=1000)
    add("--latents", type=int, default=10)
    add("--width", type=int, default=64)
    add("--activation", default="relu")
    add("--lr", type=float, default=3e-3)
    add("--likelihood", default="StudentT")
    add("--scale", default="predicted")
    add("--compile", action="store_true")
    add("--min_scale", type=float, default=0.2)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="training ended")
    for kind in arguments.kind:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.data}
        for seed in arguments.masks:
            for name, errors in found.items():
                full = table(arguments.root, name, arguments.whole)
                errors.append((mcar if kind == "mcar" else mnar)(name, full, seed, arguments))
        for name, errors in found.items():
            for method in errors[0]:
                values = torch.tensor([error[method] for error in errors])
                se = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.nan
                print(f"{kind} {name} {method}: {values.mean():.3f} +- {se:.3f}", flush=True)


if __name__ == "__main__":
    main()
