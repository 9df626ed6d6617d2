"""The reference set: it loads, its truths are right, and its judge counts what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.reference.functions import functions  # noqa: E402
from benchmarks.reference.judge import Outcome, judge, table, total  # noqa: E402
from benchmarks.reference.store import FOLDER, Problem, declarations, load  # noqa: E402
from pyro_vae.densities import densities  # noqa: E402

MODELS = declarations()


def test_the_set_is_small_and_varied() -> None:
    kinds = {facts["kind"] for facts in MODELS.values()}
    assert kinds == {
        "plain", "multimodal", "bent", "mixture prior", "heavy tails", "hierarchical", "discrete",
        "incomplete", "near-deterministic", "constrained", "trained",
    }  # fmt: skip
    files = list((FOLDER / "models").iterdir())
    assert {path.stem for path in files} == set(MODELS)
    assert sum(path.stat().st_size for path in files) < 2_000_000


@pytest.mark.parametrize("name", MODELS)
def test_every_model_loads_and_has_densities(name: str) -> None:
    problem = load(name)
    x, facts = problem.x, problem.declaration
    assert len(x) == facts["data"] == len(problem.log_prob) == len(problem.stderr)
    assert 20 <= len(x) <= 200
    assert 1 <= facts["latents"] <= 50
    assert facts["error"] <= 0.01
    assert problem.stderr.max() <= 0.01
    assert problem.log_prob.dtype == torch.float64
    assert problem.log_prob.isfinite().all()
    assert x.isnan().any() == (facts["kind"] == "incomplete")
    found = densities(problem.program.model, problem.program.guide, x, num_particles=3)
    assert found.log_weights.isfinite().all()
    sizes = [site.guide.event_shape.numel() for site in found.sites.values()]
    assert sum(sizes) - (facts["family"] == "Shares") == facts["latents"]


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ValueError, match="no model 'linear_4': expected one of linear_3"):
        load("linear_4")


@pytest.mark.parametrize(
    "name", ["fewer_data_than_latents_12", "funnel_4", "laplace_3", "missing_fold_8", "box_4"]
)
def test_a_truth_is_what_the_program_says(name: str) -> None:
    problem = load(name)
    torch.testing.assert_close(
        problem.program.exact(problem.x), problem.log_prob, atol=1e-6, rtol=0
    )


def linear(program: Any, x: Tensor) -> np.ndarray:
    W, noise = program.W.numpy(), program.sigma.numpy()
    return stats.multivariate_normal(np.zeros(len(noise)), W.T @ W + np.diag(noise**2)).logpdf(x)


def negative_binomials(program: Any, x: Tensor) -> np.ndarray:
    shape, rate, exposure = (p.numpy() for p in (program.shape, program.rate, program.exposure))
    return stats.nbinom(shape, rate / (rate + exposure)).logpmf(x).sum(-1)


@pytest.mark.parametrize(
    ("name", "truth"), [("linear_3", linear), ("rates_8", negative_binomials)]
)
def test_a_truth_is_what_scipy_says(name: str, truth: Callable[..., np.ndarray]) -> None:
    problem = load(name)
    found = truth(problem.program, problem.x.numpy())
    np.testing.assert_allclose(problem.log_prob, found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["pixels_1", "mixture_5", "shares_5", "box_4", "counts_2"])
def test_likelihoods_of_prior_draws_average_to_the_truth(name: str) -> None:
    problem = load(name)
    draw_prior, log_densities, _ = functions(problem.program, problem.x[:23])
    log_likelihood = log_densities(draw_prior(20_011, 0))[1]
    weights = np.exp(log_likelihood - problem.log_prob[:23].numpy()).mean(1)
    assert abs(weights.mean() - 1) < 5 * weights.std() / 20_011**0.5
    assert weights.std() / 20_011**0.5 < 0.04


@pytest.mark.parametrize("name", ["rates_8", "shares_5", "box_4", "precision_7"])
def test_the_density_of_prior_draws_has_mass_one(name: str) -> None:
    """The mean of r(u) / p(u) over draws of p is the mass of r, here a Normal amid the draws."""
    problem = load(name)
    draw_prior, log_densities, _ = functions(problem.program, problem.x[:1])
    u = draw_prior(20_011, 0)
    amid = stats.norm(np.median(u, 0), 0.4 * u.std(0)).logpdf(u).sum(-1)
    weights = np.exp(amid - log_densities(u)[0])
    assert abs(weights.mean() - 1) < 5 * weights.std() / 20_011**0.5
    assert weights.std() / 20_011**0.5 < 0.1


@pytest.mark.parametrize("name", ["precision_7", "sparse_shares_3", "box_4", "missing_6"])
def test_the_functions_are_the_density_and_its_gradient(name: str) -> None:
    problem = load(name)
    draw_prior, log_densities, gradient = functions(problem.program, problem.x)
    u = draw_prior(5, 1)
    assert u.shape == (5, len(problem.x), problem.declaration["latents"])
    step = 1e-6 * np.random.default_rng(0).normal(size=u.shape)
    change = sum(log_densities(u + step)) - sum(log_densities(u - step))
    np.testing.assert_allclose(change, 2 * (gradient(u) * step).sum(-1), atol=1e-8, rtol=1e-4)


def saying(
    shift: float, noise: float, stderr: float, verdict: Callable[[int], Any]
) -> Callable[..., Any]:
    """An estimator that knows the truth of linear_3 and bends it."""

    def estimate(model: Any, guide: Any, x: Tensor) -> tuple[Any, Any, Any]:
        truth = load("linear_3").log_prob
        return truth + shift + noise * torch.randn(len(x)), [stderr] * len(x), verdict(len(x))

    return estimate


def said(estimate: Callable[..., Any]) -> Outcome:
    (outcome,) = judge(estimate, ["linear_3"])
    return outcome


def test_a_biased_estimator_that_vouches_for_itself_is_caught() -> None:
    found = said(saying(-0.5, 0.0, 0.02, lambda n: ["reliable"] * (n - 7) + ["doubtful"] * 7))
    assert found.false.sum() == 143
    assert found.reliable.mean() == pytest.approx(143 / 150)
    assert found.error.mean() == pytest.approx(-0.5)
    assert not found.covered.any()
    assert "| -0.500 | 0.500 | 0.00 | 0.00 | 0.95 | 143 |" in found.line()


def test_one_that_doubts_itself_or_has_the_error_it_says_is_not() -> None:
    doubtful = said(saying(-0.5, 0.0, 0.02, lambda n: ["lower bound"] * n))
    assert (doubtful.false.sum(), doubtful.reliable.sum()) == (0, 0)
    honest = said(saying(0.0, 0.1, 0.1, lambda n: None))
    assert (honest.false.sum(), honest.reliable.sum()) == (0, 150)
    assert 0.90 < honest.covered.mean() < 0.99
    assert abs(honest.error.std() - 0.1) < 0.02


@pytest.mark.parametrize(("errors", "false"), [(4.95, 0), (5.05, 150), (-4.95, 0), (-5.05, 150)])
def test_false_begins_at_five_standard_errors_and_a_thousandth(errors: float, false: int) -> None:
    shift = errors * 0.1 + (0.001 if errors > 0 else -0.001)
    assert said(saying(shift, 0.0, 0.1, lambda n: [True] * n)).false.sum() == false


def test_what_is_not_a_number_is_false() -> None:
    assert said(saying(float("nan"), 0.0, 0.1, lambda n: None)).false.all()


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (lambda model, guide, x: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda model, guide, x: (x[:3, 0], x[:, 0], None), "expected 150 rows, got shape"),
    ],
)
def test_an_estimator_that_fails_has_refused(estimate: Callable[..., Any], words: str) -> None:
    refused = said(estimate)
    assert words in refused.line()
    both = [refused, said(saying(0.0, 0.0, 0.1, lambda n: None))]
    assert total(both, "all").kind == "150 rows refused"
    assert len(total(both, "all").error) == 150
    assert table(both).count("\n") == 5


def test_what_is_known_of_the_truth_counts() -> None:
    problem: Problem = load("digits_8")
    off = problem.log_prob + 4 * problem.stderr + 5e-4
    (found,) = judge(lambda *_: (off, torch.zeros(len(off)), None), ["digits_8"])
    assert found.false.sum() == 0
    assert (found.covered == (4 * problem.stderr + 5e-4 < 2 * problem.stderr + 1e-3).numpy()).all()


@pytest.mark.slow
def test_the_command() -> None:
    command = [sys.executable, "-m", "benchmarks.reference", "--models", "pixels_1"]
    command += ["--numpy", "benchmarks.reference.example:from_prior"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *_, line, _, last = result.stdout.splitlines()
    assert line.startswith("| pixels_1 | discrete | 1 | 100 | ")
    assert last.startswith("| **all** |")
