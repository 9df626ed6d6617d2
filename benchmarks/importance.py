"""Importance sampling at K = 5000 beside its peers, interleaved: ratios of time, peak memory.

python benchmarks/importance.py [--images 20] [--threads 2] [--matmul medium] [--beside CHECKOUT]

Peers: PyTorch by hand in chunks of 1000, pyro_vae, NumPyro jitted, pythae's get_nll; those that
are not installed are left out. All score the same weights (784-500 tanh-20, Bernoulli) on the same
images, each in a process of its own; the means are checked to agree. `--beside` compares the
eager call alone with that of another checkout of this repository, by processor time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from turns import Turns, compare

K, CHUNK, D = 5000, 1000, 20
Run = Callable[[], float]


def weights() -> tuple[dict[str, Any], Any]:
    """Named arrays of both networks, and images, as numpy."""
    import numpy as np

    rng = np.random.default_rng(0)
    sizes = {"e1": (784, 500), "e2": (500, 2 * D), "d1": (D, 500), "d2": (500, 784)}
    arrays = {
        name: rng.normal(0, (0.1 if name == "d2" else 1.0) / i**0.5, (i, o)).astype("float32")
        for name, (i, o) in sizes.items()
    }
    return arrays, lambda n: (rng.random((n, 784)) > 0.8).astype("float32")


def plain_torch(images: int) -> Run:
    """What one writes by hand: per image, chunks of draws, one logsumexp."""
    import torch
    import torch.nn.functional as F

    arrays, draw = weights()
    w = {name: torch.from_numpy(a.T.copy()) for name, a in arrays.items()}
    x = torch.from_numpy(draw(images))
    half_log = 0.5 * math.log(2 * math.pi)

    @torch.no_grad()
    def run() -> float:
        total = 0.0
        for row in x:
            loc, raw = F.linear(F.linear(row, w["e1"]).tanh(), w["e2"]).chunk(2)
            scale = 1e-4 + F.softplus(raw)
            parts = []
            for _ in range(K // CHUNK):
                eps = torch.randn(CHUNK, D)
                z = loc + scale * eps
                log_q = (-0.5 * eps**2 - scale.log() - half_log).sum(-1)
                log_p = (-0.5 * z**2 - half_log).sum(-1)
                logits = F.linear(F.linear(z, w["d1"]).tanh(), w["d2"])
                pixels = row.expand(CHUNK, -1)
                log_x = -F.binary_cross_entropy_with_logits(logits, pixels, reduction="none")
                parts.append(log_x.sum(-1) + log_p - log_q)
            total += (torch.cat(parts).logsumexp(0) - math.log(K)).item()
        return total / len(x)

    return run


def pyro_vae(images: int, compiled: bool = False, matmul: str | None = None) -> Run:
    """`importance_sampling` with its defaults: errors, effective sample sizes, k-hat as well."""
    import torch

    from pyro_vae import Evidence, build, importance_sampling

    arrays, draw = weights()
    vae = build(784, D)
    encoder, decoder = vae.posterior.encoder, vae.likelihood.decoder
    layers = {
        "e1": encoder.hidden[0],
        "e2": encoder.output,
        "d1": decoder.hidden[0],
        "d2": decoder.output,
    }
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(torch.from_numpy(arrays[name].T))
            layer.bias.zero_()
    x = torch.from_numpy(draw(images))
    if matmul:
        torch.set_float32_matmul_precision(matmul)
    if not compiled:
        return lambda: importance_sampling(vae.model, vae.guide, x, num_samples=K).mean()
    from pyro_vae.estimators.importance import _estimate, compiled_joint
    from pyro_vae.estimators.run import map_batches
    from pyro_vae.estimators.target import Compiler

    joint = partial(
        compiled_joint, Compiler()
    )  # kept, so that what is timed is the code and not its compilation
    options = {"num_samples": K, "rows": CHUNK, "proposal": "guide", "joint": joint}

    def run() -> float:
        parts = map_batches(
            partial(_estimate, **options),
            vae.model,
            vae.guide,
            x,
            None,
            size=1,
            seed=0,
            devices=1,
            progress=False,
        )
        return Evidence.cat(parts).mean()

    return run


def numpyro(images: int) -> Run:
    """NumPyro's handlers, one image at a time under lax.map, jitted."""
    import jax
    import jax.numpy as jnp
    import numpyro.distributions as dist
    from jax.scipy.special import logsumexp
    from numpyro import handlers, plate, sample

    arrays, draw = weights()
    w = {name: jnp.asarray(a) for name, a in arrays.items()}
    x = jnp.asarray(draw(images))

    def model(row: Any) -> None:
        with plate("particles", K):
            z = sample("z", dist.Normal(jnp.zeros(D), 1.0).to_event(1))
            logits = jnp.tanh(z @ w["d1"]) @ w["d2"]
            sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=row)

    def guide(row: Any) -> None:
        loc, raw = jnp.split(jnp.tanh(row @ w["e1"]) @ w["e2"], 2)
        with plate("particles", K):
            sample("z", dist.Normal(loc, 1e-4 + jax.nn.softplus(raw)).to_event(1))

    def one(pair: Any) -> Any:
        key, row = pair
        drawn = handlers.trace(handlers.seed(guide, key)).get_trace(row)
        scored = handlers.trace(handlers.replay(handlers.seed(model, key), trace=drawn)).get_trace(
            row
        )
        log_q = drawn["z"]["fn"].log_prob(drawn["z"]["value"])
        sites = [site for site in scored.values() if site["type"] == "sample"]
        log_p = sum(site["fn"].log_prob(site["value"]) for site in sites)
        return logsumexp(log_p - log_q) - math.log(K)

    every = jax.jit(lambda keys: jax.lax.map(one, (keys, x)))
    keys = jax.random.split(jax.random.PRNGKey(0), images)
    return lambda: float(every(keys).mean())


def pythae(images: int) -> Run:
    """pythae's get_nll, which returns the mean log p(x), with batches of 1000."""
    import torch
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from torch import nn

    arrays, draw = weights()
    w = {name: torch.from_numpy(a.T.copy()) for name, a in arrays.items()}

    class Encoder(BaseEncoder):
        def forward(self, x: Any) -> Any:
            loc, raw = nn.functional.linear(
                nn.functional.linear(x.flatten(1), w["e1"]).tanh(), w["e2"]
            ).chunk(2, -1)
            scale = 1e-4 + nn.functional.softplus(raw)
            return ModelOutput(embedding=loc, log_covariance=2 * scale.log())

    class Decoder(BaseDecoder):
        def forward(self, z: Any) -> Any:
            h = nn.functional.linear(z, w["d1"]).tanh()
            logits = nn.functional.linear(h, w["d2"])
            return ModelOutput(reconstruction=logits.sigmoid())

    config = VAEConfig(input_dim=(784,), latent_dim=D, reconstruction_loss="bce")
    model = VAE(config, Encoder(), Decoder()).eval()
    x = torch.from_numpy(draw(images))

    @torch.no_grad()
    def run() -> float:
        return float(model.get_nll(x, n_samples=K, batch_size=CHUNK))

    return run


CANDIDATES = {
    "by hand": plain_torch,
    "pyro_vae": pyro_vae,
    "pyro_vae, compiled": partial(pyro_vae, compiled=True),
    "pyro_vae, compiled, medium": partial(pyro_vae, compiled=True, matmul="medium"),
    "NumPyro": numpyro,
    "pythae": pythae,
}
NEEDS = {"NumPyro": "numpyro", "pythae": "pythae"}


def score(name: str, images: int, matmul: str, beside: str | None, turns: Turns) -> Run:
    """One candidate, a scoring of all images a step; gives its last mean."""
    if name == "the other":
        sys.path.insert(0, str(beside))
    if name != "NumPyro":
        import torch

        torch.set_float32_matmul_precision(matmul)
    run, mean = CANDIDATES.get(name, pyro_vae)(images), math.nan
    for _ in turns:
        mean = run()
    return lambda: mean


def main() -> None:
    """Runs all candidates in turn; prints ratios to PyTorch by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="JSON file")
    parser.add_argument("--matmul", default="highest", help="torch's float32 matmul precision")
    parser.add_argument("--beside", metavar="CHECKOUT", help="folder of another checkout")
    arguments = parser.parse_args()
    given = arguments.images, arguments.matmul, arguments.beside
    names = [name for name in CANDIDATES if name not in NEEDS or find_spec(NEEDS[name])]
    names = ["by hand", "pyro_vae", "the other"] if arguments.beside else names
    results = compare(
        {name: partial(score, name, *given) for name in names},
        turns=arguments.repeats,
        steps=1,
        warm=1,
        threads=arguments.threads,
        clock=time.process_time if arguments.beside else time.perf_counter,
    )
    print(f"{arguments.threads} threads, {arguments.images} images, K = {K}")
    rows = []
    for name, result in results.items():
        ratio = result.ratio(results["by hand"])
        rate = arguments.images * K / statistics.median(result.ms) / 1e3
        row = {"candidate": name, "ratio": ratio, "mean": result.loss}
        rows.append({**row, "M draws x images / s": rate, "MB": result.memory})
        print(
            f"{name:26} {ratio:.3f} of by hand, {rate:.3f} M draws x images / s, mean "
            f"{result.loss:.2f}, {result.memory:.0f} MB more"
        )
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump({"threads": arguments.threads, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
