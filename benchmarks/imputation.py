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

from pyro_vae import VAE, Imputation, build, fit, impute
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


def matched(x: Tensor, fallback: Tensor, rate: float, wrong: float, noisy: list[int]) -> Tensor:
    """Means of the rows that agree with a row wherever both are observed, beside a fallback.

    Odds of two rows being of one recipe are `rate` times, for each column that both have,
    (1 - wrong) / share of rows with that value where it is the same, or else `wrong`; .7 of
    `noisy` columns, which differ within a recipe. The fallback counts as one row.
    """
    seen, log_odds = ~x.isnan(), torch.full((len(x), len(x)), rate, dtype=torch.float64).log()
    for d in range(x.shape[1]):
        both, same = seen[:, None, d] & seen[:, d], x[:, None, d] == x[:, d]
        share, error = same.sum(1, keepdim=True) / seen[:, d].sum(), 0.7 if d in noisy else wrong
        log_odds += torch.where(same, (1 - error) / share + error, 1.0).log()
        log_odds += torch.where(both & ~same, error, 1.0).log()
    odds = log_odds.fill_diagonal_(-torch.inf).clamp(max=60).exp()
    total = odds @ x.nan_to_num().double() + fallback
    return torch.where(seen, x, (total / (1 + odds @ seen.double())).float())


def best_matched(full: Tensor, x: Tensor, em: Tensor, noisy: list[int]) -> Tensor:
    """`matched` beside the Gaussian, its two numbers chosen on 3 tenths of what is observed."""
    folds = torch.randint(10, x.shape, generator=torch.Generator().manual_seed(0))
    choices = [(rate, wrong) for rate in (1e-4, 1e-3, 0.01, 0.03) for wrong in (0.01, 0.1)]
    errors = dict.fromkeys(choices, 0.0)
    for kept in (~x.isnan() & (folds == k) for k in range(3)):
        fewer = x.masked_fill(kept, torch.nan)
        fallback = gaussian_em(fewer)
        for choice in choices:
            found = matched(fewer, fallback, *choice, noisy)
            errors[choice] += (found - full)[kept].square().sum().item()
    return matched(x, em, *min(errors, key=lambda choice: errors[choice]), noisy)


def forests(x: Tensor, trees: int = 50, most: int = 8) -> Tensor:
    """missForest: columns in turn by forests of the others, until they change more than before."""
    from sklearn.ensemble import RandomForestRegressor

    hidden = x.isnan().numpy()
    filled, last = torch.where(x.isnan(), x.nanmean(0), x).double().numpy(), np.inf
    options = {"max_features": int(x.shape[1] ** 0.5), "min_samples_split": 6}
    for seed in range(most):
        new = filled.copy()
        for d in hidden.sum(0).argsort():
            rest, m = np.delete(new, d, 1), hidden[:, d]
            forest = RandomForestRegressor(trees, random_state=seed, **options)
            new[m, d] = forest.fit(rest[~m], filled[~m, d]).predict(rest[m])
        change = ((new - filled)[hidden] ** 2).sum() / (new[hidden] ** 2).sum()
        if change > last:
            break
        filled, last = new, change
    return torch.from_numpy(filled).float()


def ours(x: Tensor, arguments: argparse.Namespace, seed: int) -> tuple[Tensor, float]:
    """Means imputed by a VAE whose decoder is a linear map with a network beside it; its bound."""
    torch.manual_seed(seed)
    D, hidden = x.shape[1], {"hidden": [arguments.width] * 2, "activation": arguments.activation}
    mixture = {"MixtureOfGaussians": {"num_components": arguments.components}}
    scales = {"scale": arguments.scale, "min_scale": arguments.min_scale}
    vae = build(
        D, arguments.latents, missing=True,
        prior=mixture if arguments.components else "StandardNormal",
        likelihood={arguments.likelihood: scales},
        encoder={"MLP": hidden}, decoder={"__main__.Beside": hidden},
    )  # fmt: skip
    found = fitted(vae, x, arguments, seed, num_draws=1)
    return found.mean, found.log_prob.mean().item()


def fitted(
    vae: VAE, x: Tensor, arguments: argparse.Namespace, seed: int, num_draws: int
) -> Imputation:
    """What is imputed by a VAE, trained on the same rows."""
    epochs = max(1, arguments.steps * arguments.batch_size // len(x))
    decay = {"class_path": "CosineAnnealingLR", "init_args": {"T_max": epochs}}
    options = {"batch_size": arguments.batch_size, "lr": arguments.lr, "schedule": decay}
    options |= {"seed": seed, "progress": False, "compile": arguments.compile}
    fit(vae, x, IWAE(num_particles=arguments.particles), epochs=epochs, **options)
    number = {"num_draws": num_draws, "num_samples": arguments.samples}
    return impute(vae, x, proposal="guide", seed=seed, **number)


def of_levels(x: Tensor, arguments: argparse.Namespace, seed: int) -> tuple[Tensor, float]:
    """The same of a VAE to which every number of a column is a category of its own."""
    torch.manual_seed(seed)
    values = [column[~column.isnan()].unique() for column in x.T]
    codes = [torch.searchsorted(v, column.contiguous()) for v, column in zip(values, x.T)]
    rows = torch.stack(codes, 1).float().masked_fill(x.isnan(), torch.nan)
    kinds = [{"class_path": "Categorical", "init_args": {"levels": len(v)}} for v in values]
    network = {"class_path": "MLP", "init_args": {"hidden": [128], "activation": "relu"}}
    vae = build(
        x.shape[1], arguments.latents, missing=True, encoder=network, decoder=network,
        prior={"MixtureOfGaussians": {"num_components": arguments.components}},
        likelihood={"class_path": "Columns", "init_args": {"columns": kinds}},
    )  # fmt: skip
    found = fitted(vae, rows, arguments, seed, num_draws=400)
    draws = found.draws.long()
    means = torch.stack([v[draws[..., d]].mean(0) for d, v in enumerate(values)], 1)
    return torch.where(x.isnan(), means, x), found.log_prob.mean().item()


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


def squared(found: Tensor, full: Tensor, where: Tensor) -> float:
    return (found - full)[where].square().mean().item()


def mcar(name: str, full: Tensor, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    x = half(full, seed)
    kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) < arguments.hold
    hidden, held = x.isnan(), kept & ~x.isnan()
    x = x.masked_fill(held, torch.nan)
    gaussian = gaussian_em(x)
    filled = {"EM": gaussian}
    if arguments.matched:
        filled["matched"] = best_matched(full, x, gaussian, [7] if name == "concrete" else [])
    if arguments.forests:
        filled["forests"] = forests(x)
    start, bound = time.process_time(), torch.nan
    if arguments.steps:
        way = of_levels if arguments.levels else ours
        filled["ours"], bound = way(x, arguments, seed)
    seconds = time.process_time() - start
    errors = {method: squared(found, full, hidden) for method, found in filled.items()}
    words = " | ".join(
        f"{method} {error:.3f}, held out {squared(filled[method], full, held):.3f}"
        for method, error in errors.items()
    )
    print(f"| {name} | mcar, mask {seed} | {words} | bound {bound:.3f} ({seconds:.0f} s) | "
          f"complete rows {neighbours(full, x):.3f} |", flush=True)  # fmt: skip
    return errors


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
    error = squared(found.mean, full, x.isnan()) ** 0.5
    seconds = time.process_time() - start
    em = squared(gaussian_em(x), full, x.isnan()) ** 0.5
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
    add("--components", type=int, default=0, help="of a mixture as the prior; 0: standard Normal")
    add("--hold", type=float, default=0.0, help="share of what is observed that is hidden too")
    add("--levels", action="store_true", help="every number of a column is a category")
    add("--matched", action="store_true", help="beside it, rows that agree where both are seen")
    add("--forests", action="store_true", help="beside it, missForest by scikit-learn")
    add("--width", type=int, default=64)
    add("--activation", default="relu")
    add("--lr", type=float, default=3e-3)
    add("--likelihood", default="StudentT")
    add("--scale", default="predicted")
    add("--compile", action="store_true", default=None)
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
