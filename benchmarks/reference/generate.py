"""Makes the reference set: weights, guides, data and their log p(x).

python -m benchmarks.reference.generate [NAME ...]

Every model has a seed of its own, so that one can be made again without the others. The digits
are those of scikit-learn. Takes about a quarter of an hour on one core; what a machine's
arithmetic changes in the weights changes the data and their truth alike.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor, nn

from benchmarks.reference.families import FAMILIES, FEATURES, Family
from benchmarks.reference.store import FOLDER, Problem, save
from pyro_vae import build, fit
from pyro_vae.data import load_data
from pyro_vae.estimators import annealed_importance_sampling, refined_importance_sampling
from pyro_vae.objectives import ELBO

HIDDEN = 24  # of a guide
STEPS = 1000
ROWS = 128
LONG = "200,000 draws of fitted proposals, agreeing with annealing from the prior"
AGREEMENT = 4.0  # standard errors within which two long estimates of a datum must be
Weights = tuple[dict[str, Tensor], dict[str, Any]]  # with the options of the family
Recipe = Callable[[], Weights]
RECIPES: dict[str, tuple[str, str, int, Recipe]] = {}  # kind, family, data, weights and options


def add(
    name: str, kind: str, family: str, num_data: int, recipe: Any, *args: Any, **options: Any
) -> None:
    """Adds a model to the set."""
    RECIPES[name] = kind, family, num_data, partial(recipe, *args, **options)


def noise(size: int, scale: float) -> Tensor:
    """Deviations of the data's noise."""
    return torch.full((size,), scale)


def rotation(size: int) -> Tensor:
    """A random rotation or reflection."""
    return torch.linalg.qr(torch.randn(size, size)).Q


def linear(D: int, X: int, sigma: float, missing: float = 0.0) -> Weights:
    return {"W": torch.randn(D, X), "sigma": noise(X, sigma)}, {"missing": missing}


def folded(map: str, D: int, X: int, sigma: float, size: float = 1.5, **options: Any) -> Weights:
    bent = 2 if map in ("ring", "banana", "pair", "product") else 1
    A = torch.randn(FEATURES[map](torch.zeros(1, bent)).shape[-1], X)
    A = size * A / A.norm(dim=1, keepdim=True)
    weights = {"A": A, "W": torch.randn(D - bent, X) * 0.7, "sigma": noise(X, sigma)}
    return weights, {"map": map, "bent": bent, **options}


def mixture(D: int, X: int, C: int, sigma: float) -> Weights:
    tril = 0.3 * torch.randn(C, D, D).tril(-1) / D**0.5 + 0.4 * torch.eye(D)
    weights = {"loc": 1.5 * torch.randn(C, D), "tril": tril, "logits": torch.randn(C)}
    return {**weights, "W": torch.randn(D, X), "sigma": noise(X, sigma)}, {}


def units(D: int, X: int, sigma: float, loc: list[float], scale: list[float]) -> Weights:
    weights = {"loc": torch.tensor(loc), "scale": torch.tensor(scale)}
    weights |= {"logits": torch.tensor([0.4, 0.0]), "W": torch.randn(D, X)}
    return {**weights, "sigma": noise(X, sigma)}, {}


def heavy(df: float | None, seen: int, idle: int, sigma: float) -> Weights:
    weights = {"a": 0.5 + torch.rand(seen), "Q": rotation(seen), "sigma": noise(1, sigma)}
    return weights, {"df": df, "idle": idle}


def scales(sigma: float, size: int, **options: Any) -> Weights:
    return {"c": 0.5 + torch.rand(size), "sigma": noise(size, sigma)}, options


def layers(top: int, bottom: int, X: int, between: float, sigma: float) -> Weights:
    weights = {"V": torch.randn(top, bottom), "W": torch.randn(bottom, X) / 2}
    return {**weights, "sigma": noise(X, sigma)}, {"between": between}


def classes(C: int, D: int, X: int, sigma: float) -> Weights:
    weights = {"W": torch.randn(C, D, X), "b": torch.randn(C, X), "logits": torch.randn(C)}
    return {**weights, "sigma": noise(X, sigma)}, {}


def network(D: int, X: int, size: float, counts: bool) -> Weights:
    hidden = 11
    weights = {"V": 2 * torch.randn(D, hidden), "c": torch.randn(hidden)}
    weights |= {"W": size * torch.randn(hidden, X) / hidden**0.5, "b": torch.randn(X)}
    return weights, {"counts": counts}


def rates(size: int) -> Weights:
    weights = {"shape": 0.6 + 2 * torch.rand(size), "rate": 0.3 + torch.rand(size)}
    return {**weights, "exposure": 0.2 + 3 * torch.rand(size)}, {}


def shares(size: int, throws: int, low: float, high: float) -> Weights:
    return {"concentration": low + (high - low) * torch.rand(size)}, {"throws": throws}


def box(size: int, sigma: float) -> Weights:
    return {"a": 0.7 + torch.rand(size), "Q": rotation(size), "sigma": noise(1, sigma)}, {}


add("linear_3", "plain", "Linear", 150, linear, 3, 7, 0.4)
add("linear_17", "plain", "Linear", 60, linear, 17, 23, 0.25)
add("linear_50", "plain", "Linear", 20, linear, 50, 61, 0.6)
add("fewer_data_than_latents_12", "plain", "Linear", 60, linear, 12, 5, 0.15)
add("fold_4", "multimodal", "Folded", 60, folded, "abs", 4, 6, 0.15)
add("fold_13", "multimodal", "Folded", 40, folded, "abs", 13, 16, 0.3)
add("fold_34", "multimodal", "Folded", 30, folded, "abs", 34, 43, 0.12)
add("uneven_fold_23", "multimodal", "Folded", 40, folded, "uneven", 23, 29, 0.2)
add("waves_7", "multimodal", "Folded", 50, folded, "waves", 7, 11, 0.2)
add("ring_9", "multimodal", "Folded", 40, folded, "ring", 9, 13, 0.15)
add("ring_28", "multimodal", "Folded", 30, folded, "ring", 28, 35, 0.25)
add("pair_5", "multimodal", "Folded", 40, folded, "pair", 5, 9, 0.15, size=2.0)
add("pair_18", "multimodal", "Folded", 40, folded, "pair", 18, 23, 0.2, size=2.5)
add("product_10", "multimodal", "Folded", 40, folded, "product", 10, 13, 0.3)
add("banana_2", "bent", "Folded", 150, folded, "banana", 2, 3, 0.25)
add("banana_19", "bent", "Folded", 40, folded, "banana", 19, 23, 0.3)
add("mixture_5", "mixture prior", "Mixture", 100, mixture, 5, 3, 4, 1.5)
add("mixture_26", "mixture prior", "Mixture", 40, mixture, 26, 9, 6, 3.0)
add("two_humps_6", "mixture prior", "Units", 40, units, 6, 4, 0.7, [-1.3, 1.1], [0.4, 0.5])
add("spike_and_slab_7", "mixture prior", "Units", 40, units, 7, 9, 0.4, [0.0, 0.0], [0.1, 1.5])
add("laplace_3", "heavy tails", "Heavy", 100, heavy, None, 3, 0, 0.3)
add("laplace_18", "heavy tails", "Heavy", 40, heavy, None, 7, 11, 0.15)
add("student_13", "heavy tails", "Heavy", 40, heavy, 3.0, 4, 9, 0.12)
add("student_31", "heavy tails", "Heavy", 30, heavy, 4.0, 6, 25, 0.2)
add("cauchy_6", "heavy tails", "Heavy", 40, heavy, 1.0, 2, 4, 0.2)
add("funnel_4", "hierarchical", "Funnel", 60, scales, 0.4, 3, spread=1.2)
add("funnel_14", "hierarchical", "Funnel", 40, scales, 0.6, 13, spread=0.8)
add("precision_7", "hierarchical", "Precision", 40, scales, 0.5, 6, shape=1.7)
add("layers_11", "hierarchical", "Layers", 60, layers, 4, 7, 13, 0.5, 0.3)
add("classes_4", "discrete", "Classes", 60, classes, 5, 4, 9, 0.5)
add("pixels_1", "discrete", "Network", 100, network, 1, 9, 4.0, False)
add("pixels_2", "discrete", "Network", 60, network, 2, 17, 4.0, False)
add("counts_2", "discrete", "Network", 60, network, 2, 7, 1.2, True)
add("missing_6", "incomplete", "Linear", 60, linear, 6, 11, 0.35, missing=0.4)
add("missing_fold_8", "incomplete", "Folded", 40, folded, "abs", 8, 11, 0.25, missing=0.3)
add("sharp_5", "near-deterministic", "Linear", 60, linear, 5, 9, 0.003)
add("sharp_curve_3", "near-deterministic", "Folded", 40, folded, "curve", 3, 7, 0.02)
add("rates_8", "constrained", "Counts", 60, rates, 8)
add("shares_5", "constrained", "Shares", 60, shares, 6, 23, 0.7, 2.5)
add("sparse_shares_3", "constrained", "Shares", 60, shares, 4, 9, 0.3, 0.4)
add("box_4", "constrained", "Box", 60, box, 4, 0.3)


def digits(likelihood: Any, latent_dim: int, prior: Any = "StandardNormal") -> dict[str, Any]:
    parts = {"prior": prior, "likelihood": likelihood}
    for network in ("encoder", "decoder"):
        parts[network] = {"class_path": "MLP", "init_args": {"hidden": [48]}}
    return {"data_shape": [1, 8, 8], "latent_dim": latent_dim, **parts}


GAUSSIAN = {"class_path": "Normal", "init_args": {"scale": "learned"}}
MIXTURE = {"class_path": "MixtureOfGaussians", "init_args": {"num_components": 5}}
VAES = {  # transform of the digits, declaration
    "digits_2": ("threshold", digits("Bernoulli", 2)),
    "digits_8": ("threshold", digits("Bernoulli", 8)),
    "digits_mixture_6": ("threshold", digits("Bernoulli", 6, MIXTURE)),
    "digits_gaussian_14": ("dequantise", digits(GAUSSIAN, 14)),
}


def draw(program: Family, size: int, missing: float) -> Tensor:
    """Data of the model, some entries of which are taken away."""
    with torch.no_grad():
        nodes: Any = poutine.trace(program.model).get_trace(size=size).nodes
    x = nodes["x"]["value"]
    return x.masked_fill(torch.rand(x.shape) < missing, torch.nan)


def with_guide(family: str, weights: dict[str, Tensor], options: dict[str, Any]) -> Family:
    """The program with a guide fitted for some steps to draws of the model."""
    missing = options.get("missing", 0.0)
    bare = FAMILIES[family](weights, **options)
    x = draw(bare, 2000, missing)
    quartiles = x.nanquantile(torch.tensor([0.25, 0.5, 0.75]), dim=0)
    free = {
        "guide_in": torch.randn(x.shape[1], HIDDEN) / x.shape[1] ** 0.5,
        "guide_bias": torch.zeros(HIDDEN),
        "guide_out": 0.1 * torch.randn(HIDDEN, 2 * sum(bare.sizes)),
        "guide_end": torch.zeros(2 * sum(bare.sizes)),
    }
    fixed = {"guide_loc": quartiles[1], "guide_scale": (quartiles[2] - quartiles[0]).clamp(0.5)}
    program = FAMILIES[family]({**weights, **fixed, **free}, **options)
    parameters = [getattr(program, name).requires_grad_() for name in free]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        loss = ELBO().differentiable_loss(
            program.model, program.guide, draw(program, ROWS, missing)
        )
        optimizer.zero_grad()
        (loss / ROWS).backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        schedule.step()
    return program.requires_grad_(False)


def trained(transform: str, declaration: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """The weights of a VAE of digits, and test data."""
    data = load_data("digits", transform=transform)
    vae = build(**declaration)
    options = {"epochs": 60, "lr": 3e-3, "batch_size": 100, "validation": data.validation}
    fit(vae, data.train, ELBO(), **options, progress=False, accelerator="cpu")
    return vae.state_dict(), data.test.fixed().batch(torch.arange(30))[0]


def exact(program: Family, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """log p(x), its standard error, and what a grid of twice the points changes."""
    coarse, truth = (program.double().exact(x.double(), fine) for fine in (1, 2))
    return truth, torch.zeros_like(truth), (truth - coarse).abs().max().item()


def long_runs(program: Family, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """The same by 200,000 draws of fitted proposals, held to annealing from the prior."""
    options = {"num_temperatures": 3000, "num_chains": 48, "start": "prior"}
    programs = program.model, program.guide, x
    draws = refined_importance_sampling(*programs, num_samples=200_000, seed=11)
    chains = annealed_importance_sampling(*programs, **options, seed=13)
    difference = chains.log_prob - draws.log_prob
    error = (draws.stderr**2 + chains.stderr**2).sqrt()
    print(
        f"  draws: se {draws.stderr.max():.4f}, k-hat {draws.khat.max():.2f}; chains less draws: "
        f"{difference.mean():.4f} +- {error.square().sum().sqrt() / len(x):.4f} on average, "
        f"{(difference / error).abs().max():.1f} standard errors at most"
    )
    if (difference.abs() > AGREEMENT * error).any() or draws.stderr.max() > 0.01:
        raise RuntimeError("the two long estimates do not agree, or are too rough")
    return draws.log_prob, draws.stderr, draws.stderr.max().item()


def make(name: str, seed: int = 0) -> tuple[Problem, dict[str, Tensor]]:
    """One model in float64, and its weights as they are stored; those of the set have seed 0.

    Raises:
        RuntimeError: If its log p(x) is not known to 0.01 nats.
    """
    torch.manual_seed(zlib.crc32(name.encode(), seed))
    if name in VAES:
        kind, family, (transform, options) = "trained", "Trained", VAES[name]
        weights, x = trained(transform, options)
        program = FAMILIES[family](weights, **options)
    else:
        kind, family, size, recipe = RECIPES[name]
        weights, options = recipe()
        program = with_guide(family, weights, options)
        weights = dict(program.named_buffers())
        x = draw(program, size, options.get("missing", 0.0))
    saved = {n: t.clone() for n, t in weights.items()}
    how = how_known(family, program)
    truth, stderr, error = (long_runs if how == LONG else exact)(program, x)
    if not truth.isfinite().all() or error > 0.01:
        raise RuntimeError(f"{name}: log p(x) is not known well enough, to {error}")
    declaration = {
        "kind": kind,
        "family": family,
        "latents": sum(program.sizes),
        "data": len(x),
        "truth": how,
        "error": float(f"{max(error, 1e-9):.1e}"),
        "options": options,
    }
    return Problem(name, program.double(), x.double(), truth, stderr, declaration), saved


def how_known(family: str, program: Family) -> str:
    """How log p(x) is had."""
    if family == "Trained":
        return "quadrature" if sum(program.sizes) == 2 else LONG
    grids = ("Folded", "Heavy", "Funnel", "Precision", "Network")
    return "quadrature" if family in grids else "closed form"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[])
    for name in parser.parse_args().names or [*RECIPES, *VAES]:
        start = time.perf_counter()
        problem, weights = make(name)
        save(replace(problem, x=problem.x.float()), weights, [*RECIPES, *VAES])
        size = (FOLDER / "models" / f"{name}.safetensors").stat().st_size
        print(f"{name}: {time.perf_counter() - start:.0f} s, {size / 1024:.0f} KiB", flush=True)
