"""A training step of pyro_vae beside its peers, in turns: ratios of time, losses, peak memory.

python benchmarks/steps.py [WORKLOAD ...] [--threads 2] [--turns 5] [--device cuda] [--out F]
                           [--beside CHECKOUT]

Workloads: mlp-100 and mlp-512 (784-500 tanh-20, Bernoulli, of that batch), iwae (50 draws, batch
20), vamp (500 components), layers (two of 20, top-down), conv (32 x 32 x 3, Gaussian decoder),
counts (2000 genes, negative binomial, a latent library).
Every candidate trains on the same drawn data with Adam at 1e-3 for the same number of steps, and
must end at the same loss.
Peers that are not installed (extra `benchmarks`) are left out. On a GPU (`--device cuda`, better
with `--steps 1000`) no candidate reads its loss at every step, and a step by hand in a CUDA graph
is one of them. `--beside` compares the eager step alone with that of another checkout of this
repository. It and `--threads 1` tell processor time, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import runpy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from turns import Done, Result, Turns, compare

ROWS = 20_000
CHECKED = 1000  # rows on which the loss is compared
WORKLOADS: dict[str, dict[str, Any]] = {
    "mlp-100": {"shape": (784,), "batch": 100},
    "mlp-512": {"shape": (784,), "batch": 512},
    "iwae": {"shape": (784,), "batch": 20, "draws": 50},
    "vamp": {"shape": (784,), "batch": 100, "components": 500},
    "layers": {"shape": (784,), "batch": 100, "layers": 2},
    "conv": {"shape": (3, 32, 32), "batch": 100},
    "counts": {"shape": (2000,), "batch": 128, "counts": True},
}
D = 20


def data(shape: tuple[int, ...], device: str = "cpu") -> Any:
    """Rows with ten directions to encode, binary or real, the same for every candidate."""
    import torch

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(ROWS, 10, generator=generator)
    w = torch.randn(10, math.prod(shape), generator=generator)
    if shape == (2000,):
        share = (0.3 * z @ w).softmax(-1)
        size = (7 + 0.5 * torch.randn(ROWS, 1, generator=generator)).exp()
        return torch.poisson(size * share, generator=generator).to(device)
    if len(shape) == 3:
        return (0.3 * z @ w).tanh().reshape(ROWS, *shape).to(device)
    return torch.bernoulli((z @ w - 2).sigmoid(), generator=generator).to(device)


# --- by hand ------------------------------------------------------------------------------------


def networks(workload: dict[str, Any]) -> tuple[Any, Any]:
    """Encoder and decoder."""
    from torch import nn

    from pyro_vae.networks import Conv, ConvTranspose

    if len(workload["shape"]) == 3:
        return Conv(workload["shape"], 2 * D), ConvTranspose(D, workload["shape"])
    size = math.prod(workload["shape"])
    encoder = nn.Sequential(nn.Linear(size, 500), nn.Tanh(), nn.Linear(500, 2 * D))
    return encoder, nn.Sequential(nn.Linear(D, 500), nn.Tanh(), nn.Linear(500, size))


def make_loss(workload: dict[str, Any]) -> tuple[Any, Callable[[Any], Any]]:
    """Modules of a hand-written VAE, and its loss of a batch."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    encoder, decoder = networks(workload)
    modules = nn.ModuleList([encoder, decoder])
    half_log = 0.5 * math.log(2 * math.pi)

    def posterior(x: Any) -> tuple[Any, Any]:
        loc, raw = encoder(x).chunk(2, -1)
        return loc, F.softplus(raw)

    def log_likelihood(z: Any, x: Any) -> Any:
        out = decoder(z)
        if len(workload["shape"]) == 3:
            return (-0.5 * (x - out) ** 2 - half_log).flatten(1).sum(-1)
        x = x.expand_as(out)
        return -F.binary_cross_entropy_with_logits(out, x, reduction="none").sum(-1)

    def elbo(x: Any) -> Any:
        loc, scale = posterior(x)
        z = loc + scale * torch.randn_like(scale)
        kl = (0.5 * (loc**2 + scale**2 - 1) - scale.log()).sum(-1)
        return -(log_likelihood(z, x) - kl).mean()

    def iwae(x: Any) -> Any:
        loc, scale = posterior(x)
        noise = torch.randn(workload["draws"], *loc.shape, device=loc.device)
        z = loc + scale * noise
        log_q = (-0.5 * noise**2 - scale.log()).sum(-1)
        weights = log_likelihood(z, x) - 0.5 * (z**2).sum(-1) - log_q
        return -(weights.logsumexp(0) - math.log(workload["draws"])).mean()

    def vamp(x: Any) -> Any:
        loc, scale = posterior(x)
        z = loc + scale * torch.randn_like(scale)
        log_q = (-0.5 * ((z - loc) / scale) ** 2 - scale.log()).sum(-1)
        means, widths = posterior(inputs.sigmoid())
        parts = -0.5 * ((z.unsqueeze(1) - means) / widths) ** 2 - widths.log()
        log_p = parts.sum(-1).logsumexp(-1) - math.log(len(inputs))
        return -(log_likelihood(z, x) + log_p - log_q).mean()

    def normal(out: Any) -> tuple[Any, Any]:
        loc, raw = out.chunk(2, -1)
        return loc, 1e-4 + F.softplus(raw)

    def layers(x: Any) -> Any:
        loc2, scale2 = normal(encoder(x))
        z2 = loc2 + scale2 * torch.randn_like(scale2)
        loc1, scale1 = normal(lower(torch.cat([x, z2], -1)))
        z1 = loc1 + scale1 * torch.randn_like(scale1)
        loc, scale = normal(between(z2))
        kl2 = (0.5 * (loc2**2 + scale2**2 - 1) - scale2.log()).sum(-1)
        ratio = scale1 / scale
        kl1 = 0.5 * (((loc1 - loc) / scale) ** 2 + ratio**2 - 1) - ratio.log()
        return -(log_likelihood(z1, x) - kl2 - kl1.sum(-1)).mean()

    def counts(x: Any) -> Any:
        loc, scale = posterior(x.log1p())
        z = loc + scale * torch.randn_like(scale)
        total = x.sum(1)
        mean = (1 + total).log() + own[0]
        spread = F.softplus(own[1] - 3) + F.softplus(own[2]) / (1 + total).sqrt()
        log_size = mean + spread * torch.randn_like(mean)
        log_rate = decoder(z).log_softmax(-1) + log_size.unsqueeze(1)
        r = 1e-3 + F.softplus(own[3:])
        logits = log_rate - r.log()
        each = x * F.logsigmoid(logits) + r * F.logsigmoid(-logits)
        each = each + torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(1 + x)
        kl = (0.5 * (loc**2 + scale**2 - 1) - scale.log()).sum(-1)
        kl = kl + 0.5 * (((mean - 7) / 0.5) ** 2 + (spread / 0.5) ** 2 - 1) - (spread / 0.5).log()
        return -(each.sum(-1) - kl).mean()

    if "counts" in workload:
        own = nn.Parameter(torch.zeros(2003))
        modules.register_parameter("own", own)
        return modules, counts
    if "layers" in workload:
        lower, between = (
            nn.Sequential(nn.Linear(size, 500), nn.Tanh(), nn.Linear(500, 2 * D))
            for size in (784 + D, D)
        )
        return modules.extend([lower, between]), layers
    if "components" in workload:
        inputs = nn.Parameter(torch.randn(workload["components"], 784))
        modules.register_parameter("inputs", inputs)
        return modules, vamp
    return modules, iwae if "draws" in workload else elbo


def by_hand(
    name: str,
    turns: Turns,
    compiled: bool = False,
    matmul: str = "highest",
    device: str = "cpu",
    graph: bool = False,
) -> Any:
    """What one writes without a library; on a GPU also as one CUDA graph."""
    import torch

    torch.manual_seed(0)
    torch.set_float32_matmul_precision(matmul)
    workload = WORKLOADS[name]
    x, batch = data(workload["shape"], device), workload["batch"]
    modules, loss = make_loss(workload)
    modules.to(device)
    on_gpu = device != "cpu"
    options = {"capturable": True} if graph else {}
    optimizer = torch.optim.Adam(modules.parameters(), lr=1e-3, fused=True, **options)
    of_batch = torch.compile(loss) if compiled else loss
    if on_gpu:
        turns.wait = torch.cuda.synchronize

    def step(rows: Any) -> None:
        value = of_batch(rows)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if not on_gpu:
            value.item()

    if graph:
        step = recorded(step, x[:batch].clone())
    for index in turns.batches(ROWS, batch, device):
        step(x[index])
    return lambda: loss_of(loss, x)


def recorded(step: Callable[[Any], None], rows: Any) -> Callable[[Any], None]:
    """A step as a CUDA graph, as torch's manual has it: after three on a stream of its own."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(rows)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(rows)

    def replay(batch: Any) -> None:
        rows.copy_(batch)
        graph.replay()

    return replay


def loss_of(loss: Callable[[Any], Any], x: Any) -> float:
    """Mean over ten draws of the noise."""
    import torch

    with torch.no_grad():
        return sum(float(loss(x[:CHECKED])) for _ in range(10)) / 10


def matrix_products(name: str, turns: Turns, matmul: str = "highest") -> Any:
    """The products of matrices of the step and nothing else: the limit of torch's BLAS.

    Of oneDNN with "medium", which on processors without AMX is as exact.
    """
    import torch

    torch.set_float32_matmul_precision(matmul)
    B = WORKLOADS[name]["batch"]
    sizes = [(784, 500), (500, 2 * D), (D, 500), (500, 784)]
    layers = [(torch.randn(B, i), torch.randn(i, o), torch.randn(B, o)) for i, o in sizes]
    for _ in turns:
        for number, (x, w, slope) in enumerate(layers):
            x @ w
            x.T @ slope
            if number:  # the data need no gradient
                slope @ w.T
    return lambda: math.nan


# --- pyro_vae -----------------------------------------------------------------------------------


def pyro_vae(
    name: str,
    turns: Turns,
    compile: bool | str = False,
    matmul: str = "highest",
    device: str = "cpu",
) -> Any:
    """`fit`, with all that its loop does."""
    import torch

    from pyro_vae import build
    from pyro_vae.estimators import evidence_lower_bound
    from pyro_vae.objectives import ELBO, IWAE

    torch.manual_seed(0)
    torch.set_float32_matmul_precision(matmul)
    workload = WORKLOADS[name]
    images = len(workload["shape"]) == 3
    prior: Any = "StandardNormal"
    if "components" in workload:
        prior = {"class_path": "VampPrior", "init_args": {"num_components": 500}}
    network = "Conv" if images else {"class_path": "MLP", "init_args": {"hidden": [500]}}
    latent = {"class_path": "NegativeBinomial", "init_args": {"library": "latent"}}
    real = "Normal" if images else "Bernoulli"
    vae = build(
        workload["shape"],
        [D] * workload["layers"] if "layers" in workload else D,
        prior=prior,
        likelihood=latent if "counts" in workload else real,
        encoder=network,
        decoder="ConvTranspose" if images else network,
    )
    if "counts" in workload:
        vae.likelihood.log_total.copy_(torch.tensor([7.0, 0.5]))
    x = data(workload["shape"])
    objective = IWAE(workload["draws"]) if "draws" in workload else ELBO()
    options = {"batch_size": workload["batch"], "lr": 1e-3, "accelerator": device}
    if device != "cpu":
        turns.wait = torch.cuda.synchronize
    turns.fit(vae, x.to(device), objective, compile=compile, **options)
    if "draws" in workload:
        return lambda: objective.loss(vae.model, vae.guide, x[:CHECKED]) / CHECKED
    return lambda: -evidence_lower_bound(vae.model, vae.guide, x[:CHECKED]).elbo.mean().item()


def other_checkout(name: str, turns: Turns, checkout: str, device: str) -> Any:
    """The same from another checkout, by its own benchmark."""
    sys.path.insert(0, checkout)
    other = runpy.run_path(f"{checkout}/benchmarks/steps.py", run_name="other_steps")
    return other["pyro_vae"](name, turns, device=device)


# --- peers --------------------------------------------------------------------------------------


def pyro_example(name: str, turns: Turns) -> Any:
    """Pyro's VAE example as its users write it: SVI, Trace_ELBO, pyro.optim, a loader."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI, Trace_ELBO
    from torch import nn
    from torch.utils.data import DataLoader

    torch.manual_seed(0)
    workload = WORKLOADS[name]
    x = data(workload["shape"])

    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = networks(workload)

        def model(self, x: Any) -> None:
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), D), 1.0).to_event(1))
                logits = self.decoder(z)
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

        def guide(self, x: Any) -> None:
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", len(x)):
                loc, raw = self.encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))

    vae = VAE()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
    loader = DataLoader(x, batch_size=workload["batch"], shuffle=True, drop_last=True)
    with contextlib.suppress(Done):
        while True:
            for batch in loader:
                turns.tick()
                svi.step(batch)
    return lambda: sum(svi.evaluate_loss(x[:CHECKED]) for _ in range(10)) / 10 / CHECKED


def numpyro(name: str, turns: Turns, device: str = "cpu") -> Any:
    """NumPyro's SVI with a jitted update, on JAX's device."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import numpyro.distributions as dist
    from numpyro import module, optim, plate, sample
    from numpyro.infer import SVI, TraceMeanField_ELBO

    workload = WORKLOADS[name]
    x = jnp.asarray(data(workload["shape"]).numpy())

    def linear(rng: Any, i: int, o: int) -> Any:
        return tuple(rng.uniform(-1, 1, s).astype("float32") / i**0.5 for s in ((i, o), o))

    rng = np.random.default_rng(0)
    start = {
        "encoder": [linear(rng, 784, 500), linear(rng, 500, 2 * D)],
        "decoder": [linear(rng, D, 500), linear(rng, 500, 784)],
    }

    def network(which: str) -> Any:
        def apply(p: Any, x: Any) -> Any:
            return jnp.tanh(x @ p[0][0] + p[0][1]) @ p[1][0] + p[1][1]

        return module(which, (lambda *_: (None, start[which]), apply), (1,))

    def model(x: Any) -> None:
        with plate("data", len(x)):
            z = sample("z", dist.Normal(jnp.zeros(D), 1.0).to_event(1))
            sample("x", dist.Bernoulli(logits=network("decoder")(z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        loc, raw = jnp.split(network("encoder")(x), 2, -1)
        with plate("data", len(x)):
            sample("z", dist.Normal(loc, jax.nn.softplus(raw)).to_event(1))

    svi = SVI(model, guide, optim.Adam(1e-3), TraceMeanField_ELBO())
    state = svi.init(jax.random.PRNGKey(0), x[: workload["batch"]])
    update = jax.jit(lambda state, index: svi.update(state, x[index]))
    last = [jnp.zeros(())]
    turns.wait = lambda: last[0].block_until_ready()
    for index in turns.batches(ROWS, workload["batch"]):
        state, loss = update(state, index.numpy())
        last[0] = loss
        if device == "cpu":
            loss.block_until_ready()
    return lambda: float(svi.evaluate(state, x[:CHECKED])) / CHECKED


def pythae(name: str, turns: Turns) -> Any:
    """pythae's trainer."""
    import logging

    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    workload = WORKLOADS[name]
    x = data(workload["shape"])

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.body = networks(workload)[0]

        def forward(self, x: Any) -> Any:
            loc, raw = self.body(x).chunk(2, -1)
            scale = torch.nn.functional.softplus(raw)
            return ModelOutput(embedding=loc, log_covariance=2 * scale.log())

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.body = networks(workload)[1]

        def forward(self, z: Any) -> Any:
            return ModelOutput(reconstruction=self.body(z).sigmoid())

    class Rows(BaseDataset):
        def __getitem__(self, index: int) -> Any:
            counter["rows"] += 1
            if counter["rows"] % workload["batch"] == 1:
                turns.tick()
            return super().__getitem__(index)

    counter = {"rows": 0}
    config = VAEConfig(input_dim=(784,), latent_dim=D, reconstruction_loss="bce")
    model = VAE(config, Encoder(), Decoder())
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        options = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=10_000,
            learning_rate=1e-3,
            per_device_train_batch_size=workload["batch"],
            optimizer_cls="Adam",
            no_cuda=True,
        )
        trainer = BaseTrainer(model, Rows(x, torch.zeros(len(x))), training_config=options)
        with contextlib.suppress(Done):
            trainer.train()
    return lambda: loss_of(lambda x: model(Rows(x, torch.zeros(len(x)))[:]).loss, x)


# --- all ----------------------------------------------------------------------------------------


def candidates(name: str, device: str, beside: str | None) -> dict[str, Any]:
    """Those of a workload that can run here."""
    hand, ours = partial(by_hand, name, device=device), partial(pyro_vae, name, device=device)
    found: dict[str, Any] = {
        "by hand": hand,
        "pyro_vae": ours,
        "pyro_vae, traced": partial(ours, compile="trace"),
    }
    if beside is not None:
        other = partial(other_checkout, name, checkout=beside, device=device)
        return {**found, f"pyro_vae of {beside}": other}
    found["by hand, compiled"] = partial(hand, compiled=True)
    found["pyro_vae, compiled"] = partial(ours, compile=True)
    if device != "cpu":
        found["by hand, graph"] = partial(hand, graph=True)
        found["by hand, compiled, graph"] = partial(hand, compiled=True, graph=True)
    elif name.startswith("mlp"):
        found |= {
            "by hand, medium": partial(hand, matmul="medium"),
            "pyro_vae, compiled, medium": partial(ours, compile=True, matmul="medium"),
            "Pyro's example": partial(pyro_example, name),
            "matrix products alone": partial(matrix_products, name),
            "matrix products alone, medium": partial(matrix_products, name, matmul="medium"),
        }
        found |= {"pythae": partial(pythae, name)} if find_spec("pythae") else {}
    if name.startswith("mlp") and find_spec("numpyro"):
        found["NumPyro"] = partial(numpyro, name, device=device)
    return found


def rows(name: str, results: dict[str, Result]) -> list[dict[str, Any]]:
    """The table of a workload."""
    base = results["by hand"]
    return [
        {
            "workload": name,
            "candidate": candidate,
            "ratio": result.ratio(base),
            "ms": sorted(result.ms)[len(result.ms) // 2],
            "loss": result.loss,
            "first step after s": result.first,
            "MB": result.memory,
        }
        for candidate, result in results.items()
    ]


def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the workloads, prints their tables, and says whose loss is another."""
    warnings.simplefilter("ignore")
    table = []
    busy = arguments.beside or (arguments.threads == 1 and arguments.device == "cpu")
    for name in arguments.workloads or WORKLOADS:
        results = compare(
            candidates(name, arguments.device, arguments.beside),
            turns=arguments.turns,
            steps=arguments.steps,
            warm=20,
            threads=arguments.threads,
            clock=time.process_time if busy else time.perf_counter,
        )
        part = rows(name, results)
        expected = results["by hand"].loss
        for row in part:
            odd = abs(row["loss"] - expected) > 0.02 * abs(expected)
            note = "  ANOTHER LOSS: not the same work" if odd else ""
            print(
                f"{name:8} {row['candidate']:28} {row['ratio']:.3f}  {row['ms']:7.2f} ms  "
                f"loss {row['loss']:.2f}  {row['MB']:.0f} MB{note}",
                flush=True,
            )
        table += part
    if arguments.out:
        with open(arguments.out, "w") as file:
            settings = {"threads": arguments.threads, "device": arguments.device}
            json.dump({**settings, "rows": table}, file, indent=1)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", choices=[*WORKLOADS, []])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--beside", metavar="CHECKOUT", help="folder of another checkout")
    parser.add_argument("--out", help="JSON file for the table")
    main(parser.parse_args())
