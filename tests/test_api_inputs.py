"""Every argument of the Python interface given what it is not made for.

Each call is taken, or refused by one clear line that names the argument. What can mean nothing
(a number that is NaN, text for a number, data that are not finite) must be refused.
"""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from families import make
from torch import Tensor

import pyro_vae
from pyro_vae import data, likelihoods, metrics, networks, objectives, posteriors, priors
from pyro_vae.densities import densities, scale_latents
from pyro_vae.estimators import evidence_lower_bound

N, F, C = 5, 7, 3
NAN, INF = float("nan"), float("inf")
X = (torch.rand(N, F, generator=torch.Generator().manual_seed(0)) > 0.5).float()
Y = torch.eye(C)[torch.arange(N) % C]
LONGEST = 400  # characters of a message
SECONDS = 30

WRONG = ("a", True, 1 + 1j, [], {}, object(), b"3", NAN, torch.ones(2))
WHOLE = (*WRONG, None, 0, -1, 1.5, INF, -INF, [3], "3")  # none is a whole number from 1
REAL = (*WRONG, None, -1, -INF, INF)  # none is a positive number
NOT_NONE = tuple(value for value in WHOLE if value is not None)
DEVICES = (*WRONG, [True], [0, 0], [-1])
CODES = torch.randn(N, F, generator=torch.Generator().manual_seed(1))
FACTORS = torch.stack([torch.arange(N) % 2, torch.arange(N) % 3], 1)
VOTES: dict[Any, dict[str, Any]] = {
    metrics.dci: {"num_train": 3, "num_test": 2, "num_trees": 2},
    metrics.factor_vae_score: {"num_votes": 7, "num_test": 5, "batch_size": 2},
    metrics.mig_of_means: {"bins": 3},
}
BETA = tuple(value for value in (*WRONG, None, -1, INF, -INF) if not isinstance(value, Tensor))
NOT_ZERO = tuple(value for value in WHOLE if type(value) is not int or value != 0)
ROWS = {
    "None": lambda: None,
    "text": lambda: "x",
    "number": lambda: 3.0,
    "NaN": lambda: torch.full((N, F), NAN),
    "infinite": lambda: X / 0,
    "numpy NaN": lambda: np.full((N, F), NAN),
    "numpy too large": lambda: np.full((N, F), 1e300),
    "list of None": lambda: [[None] * F] * N,
    "list of text": lambda: [["a"] * F] * N,
    "ragged list": lambda: [[0.0] * F, [0.0]],
    "empty list": lambda: [],
    "set": lambda: {1, 2},
    "dict": lambda: {"x": X},
    "generator": lambda: (row for row in X),
    "no rows": lambda: X[:0],
    "0-d": lambda: torch.tensor(1.0),
    "complex": lambda: X.to(torch.complex64),
    "numpy complex": lambda: X.numpy().astype(complex),
    "sparse": lambda: X.to_sparse(),
    "meta": lambda: X.to("meta"),
    "frame of text": lambda: frame(np.full((N, F), "a")),
    "frame with a hole": lambda: frame(np.where(np.eye(N, F) > 0, NAN, 1.0)),
    "series": lambda: frame(np.full((N, F), NAN))[0],
    "numpy text": lambda: np.full((N, F), "a"),
    "numpy objects": lambda: np.full((N, F), None),
    "numpy dates": lambda: np.zeros((N, F), "datetime64[s]"),
    "numpy uint64": lambda: np.full((N, F), 2**64 - 1, np.uint64),
    "dataset": lambda: torch.utils.data.TensorDataset(X),
    "loader": lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X)),
    "splits": lambda: data.load_data("digits", limit=11),
    "class": lambda: Tensor,
}
PLAIN = {
    "tensor": lambda: X,
    "int64": lambda: X.long(),
    "bool": lambda: X.bool(),
    "float64": lambda: X.double(),
    "numpy": lambda: X.numpy(),
    "numpy float64": lambda: X.numpy().astype(float),
    "numpy uint8": lambda: X.numpy().astype(np.uint8),
    "numpy bool": lambda: X.numpy().astype(bool),
    "numpy strided": lambda: X.numpy()[::-1],
    "frame": lambda: frame(X.numpy()),
    "list": lambda: X.tolist(),
    "list of arrays": lambda: list(X.numpy()),
    "list of tensors": lambda: list(X),
}


def frame(x: np.ndarray) -> Any:
    return pytest.importorskip("pandas").DataFrame(x)


PROGRAMS = (None, "model", 3, [], object(), X)
SMALL: dict[str, Any] = {"epochs": 1, "progress": False, "accelerator": "cpu"}

Call = Callable[..., Any]


def vae(**options: Any) -> pyro_vae.VAE:
    torch.manual_seed(0)
    return make(**options)


def estimators() -> dict[str, tuple[Call, dict[str, Any]]]:
    """Each estimator, with numbers that make it quick."""
    path = {"num_temperatures": 2, "num_chains": 2, "num_leapfrog": 1}
    return {
        "importance_sampling": (pyro_vae.importance_sampling, {"num_samples": 11}),
        "refined": (pyro_vae.refined_importance_sampling, {"num_samples": 11, "num_starts": 1}),
        "annealed": (pyro_vae.annealed_importance_sampling, {**path, "start": "guide"}),
        "bidirectional": (pyro_vae.bidirectional, {**path, "start": "guide", "num_data": 2}),
        "log_evidence": (pyro_vae.log_evidence, {"budget": 6000, "tolerance": 5.0}),
        "evidence_lower_bound": (evidence_lower_bound, {"num_samples": 2}),
    }


def of_rows() -> Iterator[tuple[str, str, Call]]:
    """What takes rows of data: a name, the argument's name and the call."""
    for name, (estimate, quick) in estimators().items():
        yield name, "x", lambda x, e=estimate, q=quick: _run(e, x, **q)
        yield name, "y", lambda y, e=estimate, q=quick: _run(e, X, y, condition_dim=F, **q)
    yield "fit", "data", lambda x: pyro_vae.fit(vae(), x, **SMALL)
    yield "fit", "validation", lambda x: pyro_vae.fit(vae(), X, validation=x, **SMALL)
    yield "fit", "y", lambda y: pyro_vae.fit(vae(condition_dim=F), (X, y), **SMALL)
    yield "encode", "x", lambda x: vae().encode(x)
    yield "encode", "y", lambda y: vae(condition_dim=F).encode(X, y)
    yield "reconstruct", "x", lambda x: vae().reconstruct(x)
    yield "reconstruct", "y", lambda y: vae(condition_dim=F).reconstruct(X, y)
    yield "initialise", "x", lambda x: vae().initialise(x)
    yield "sample", "y", lambda y: vae(condition_dim=F).sample(N, y)
    for score in (metrics.dci, metrics.sap, metrics.mig_of_means, metrics.factor_vae_score):
        yield score.__name__, "means", lambda x, s=score: s(x, FACTORS, **VOTES.get(s, {}))
    yield "sap", "factors", lambda v: metrics.sap(CODES, v)


def _run(estimate: Call, x: Any, *y: Any, condition_dim: int = 0, **quick: Any) -> Any:
    made = vae(condition_dim=condition_dim)
    return estimate(made.model, made.guide, x, *y, **quick)


def of_numbers() -> Iterator[tuple[str, str, Call, tuple[Any, ...]]]:
    """What takes numbers: a name, the argument, the call, and what it must refuse."""
    for name, (estimate, quick) in estimators().items():
        keywords = set(quick) - {"start"} | {"chunk_size", "seed"}
        keywords |= set() if name == "evidence_lower_bound" else {"devices"}
        for key in sorted(keywords):
            bad: tuple[Any, ...] = REAL if key == "tolerance" else WHOLE
            if key in ("budget", "chunk_size", "num_data"):
                bad = NOT_NONE
            if key == "seed":
                bad = (*(v for v in NOT_ZERO if v is not None), 2**64, 10**30)
            call = lambda v, e=estimate, q=quick, k=key: _run(e, X, **{**q, k: v})  # noqa: E731
            yield name, key, call, bad
    for key in ("epochs", "batch_size"):
        yield "fit", key, lambda v, k=key: pyro_vae.fit(vae(), X, **{**SMALL, k: v}), WHOLE
    for key in ("patience", "checkpoint_every"):
        call = lambda v, k=key: pyro_vae.fit(vae(), X, validation=X, **SMALL, **{k: v})  # noqa: E731
        yield "fit", key, call, NOT_NONE
    yield "fit", "lr", lambda v: pyro_vae.fit(vae(), X, lr=v, **SMALL), (*REAL, 0)
    positive = (*(value for value in REAL if value is not None), 0)
    yield "fit", "clip_norm", lambda v: pyro_vae.fit(vae(), X, clip_norm=v, **SMALL), positive
    yield "fit", "seed", lambda v: pyro_vae.fit(vae(), X, seed=v, **SMALL), (*NOT_ZERO, 2**64)
    yield "fit", "devices", lambda v: pyro_vae.fit(vae(), X, devices=v, **SMALL), DEVICES
    yield "build", "latent_dim", lambda v: pyro_vae.build(F, v), WHOLE
    yield "build", "condition_dim", lambda v: pyro_vae.build(F, 2, condition_dim=v), NOT_ZERO
    yield "build", "data_shape", lambda v: pyro_vae.build(v, 2), (*WRONG, None, 0, -1, (), (0,))
    for made in (vae(), pyro_vae.build(F, 2, classes=C)):
        yield "sample", "size", lambda v, made=made: made.sample(v), WHOLE
    yield "reconstruct", "num_samples", lambda v: vae().reconstruct(X, num_samples=v), NOT_NONE
    floor = (*WRONG, None, -1, INF, -INF)
    encoder, decoder = vae().posterior.encoder, networks.MLP(2, (2 * F,), (5,))
    for kind in (posteriors.DiagonalNormal, posteriors.FullNormal):
        yield kind.__name__, "min_scale", lambda v, k=kind: k(encoder, 2, v), floor
        yield kind.__name__, "latent_dim", lambda v, k=kind: k(encoder, v), WHOLE
    for kind in (likelihoods.Normal, likelihoods.Laplace, likelihoods.StudentT):
        for key in ("scale", "min_scale"):
            bad = floor if key == "min_scale" else (*REAL, 0, "b")
            call = lambda v, k=kind, o=key: k(decoder, (F,), **{o: v})  # noqa: E731
            yield kind.__name__, key, call, bad
    for kind, key in (
        (likelihoods.Beta, "min_concentration"),
        (likelihoods.NegativeBinomial, "min_dispersion"),
        (likelihoods.DiscretizedLogistic, "min_scale"),
    ):
        call = lambda v, k=kind, o=key: k(decoder, (F,), **{o: v})  # noqa: E731
        yield kind.__name__, key, call, floor
    for kind in (likelihoods.DiscretizedLogistic, likelihoods.Categorical):
        yield kind.__name__, "levels", lambda v, k=kind: k(decoder, (F,), levels=v), (*WHOLE, 1)
    yield "StudentT", "df", lambda v: priors.StudentT(2, v), (*REAL, 0)
    for kind in (priors.StandardNormal, priors.Normal, priors.Laplace, priors.StudentT):
        yield kind.__name__, "latent_dim", lambda v, k=kind: k(v), WHOLE
    yield "Mixture", "num_components", lambda v: priors.MixtureOfGaussians(2, v), WHOLE
    posterior = vae().posterior
    yield (
        "VampPrior",
        "num_components",
        lambda v: priors.VampPrior(posterior, (F,), v),
        WHOLE,
    )
    for kind in (networks.MLP, networks.GatedMLP):
        call = lambda v, k=kind: k(F, 2, condition_dim=v)  # noqa: E731
        yield kind.__name__, "condition_dim", call, NOT_ZERO
    yield "scale_latents", "beta", lambda v: scale_latents(vae().model, v), BETA
    yield "ELBO", "beta", lambda v: objectives.ELBO(v), (*WRONG, None, -1, INF, -INF)
    yield "IWAE", "num_particles", lambda v: objectives.IWAE(v), WHOLE
    yield "load_data", "limit", lambda v: data.load_data("digits", limit=v), NOT_NONE
    seeds = (*NOT_ZERO, 2**64)
    yield "load_data", "seed", lambda v: data.load_data("digits", seed=v, limit=11), seeds
    fraction = (*WRONG, 0, -1, -0.5, 1.0, INF)
    yield "load_data", "validation", lambda v: data.load_data("digits", validation=v), fraction
    q, p = vae().encode(X), vae().prior()
    for key in ("num_samples", "num_rows", "seed"):
        bad = tuple(v for v in NOT_ZERO if not (v is None and key == "num_rows"))
        call = lambda v, k=key: metrics.elbo_decomposition(q, p, **{k: v})  # noqa: E731
        yield "elbo_decomposition", key, call, bad
    for score, options in VOTES.items():
        for key in options:
            call = lambda v, s=score, k=key: s(CODES, FACTORS, **{**VOTES[s], k: v})  # noqa: E731
            absent = score is metrics.dci and key != "num_trees"
            yield score.__name__, key, call, NOT_NONE if absent else WHOLE
    yield "active_units", "threshold", lambda v: metrics.active_units(X, v), (*WRONG, None, -1)
    made = vae()
    yield (
        "densities",
        "num_particles",
        lambda v: densities(made.model, made.guide, X, num_particles=v),
        WHOLE,
    )


def of_programs() -> Iterator[tuple[str, str, Call]]:
    made = vae()
    for name, (estimate, quick) in estimators().items():
        yield name, "model", lambda v, e=estimate, q=quick: e(v, made.guide, X, **q)
        yield name, "guide", lambda v, e=estimate, q=quick: e(made.model, v, X, **q)
    yield "fit", "vae", lambda v: pyro_vae.fit(v, X, **SMALL)
    yield "fit", "objective", lambda v: pyro_vae.fit(made, X, v, **SMALL)


class TooLong(Exception):
    """Raised where a call does not end."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def complaint(call: Call, argument: str, value: Any) -> str | None:
    """What is wrong with how a value is refused; None where it is taken, "" if refused well."""
    try:
        with at_most(SECONDS):
            call(value)
    except (ValueError, TypeError) as error:
        text = str(error)
        short = "\n" not in text and len(text) <= LONGEST
        return "" if short and argument in text else f"{type(error).__name__}: {text[:200]!r}"
    except BaseException as error:  # noqa: BLE001
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:200]!r}"
    return None


CASES: dict[str, list[tuple[str, Call, Callable[[], Any], bool]]] = defaultdict(list)
for owner, argument, call in of_rows():
    for kind, make_value in ROWS.items():
        taken = argument == "validation" and kind == "None"
        taken |= owner in ("encode", "reconstruct") and argument == "x" and kind == "no rows"
        CASES[f"{owner}-{argument}"].append((kind, call, make_value, taken))
    quick = owner not in ("refined", "annealed", "bidirectional", "log_evidence")
    for kind, make_value in PLAIN.items() if quick else ():
        CASES[f"{owner}-{argument}"].append((kind, call, make_value, True))
for owner, argument, call, values in of_numbers():
    for value in values:
        CASES[f"{owner}-{argument}"].append((repr(value), call, lambda v=value: v, False))
for owner, argument, call in of_programs():
    for value in PROGRAMS:
        taken = argument == "objective" and value is None
        CASES[f"{owner}-{argument}"].append((repr(value), call, lambda v=value: v, taken))


@pytest.mark.parametrize("name", CASES)
def test_an_argument_is_taken_or_refused_by_one_clear_line(name: str) -> None:
    wrong = {}
    for kind, call, make_value, taken in CASES[name]:
        found = complaint(call, name.partition("-")[2], make_value())
        if found != (None if taken else ""):
            wrong[kind] = found or ("it was refused" if taken else "it was taken")
    assert not wrong
