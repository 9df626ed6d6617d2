"""A training step with ten classes summed out: by hand, by pyro_vae, by Pyro's own sum, in turns.

python benchmarks/classes.py [--threads 1] [--turns 5] [--steps 10]

Networks 784-500-50 that see the class, batches of 100 rows without labels, Adam. Pyro's is its
semi-supervised example: a classifier q(y | x) in the guide, `TraceEnum_ELBO`, ClippedAdam.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from typing import Any

from turns import Turns, compare

ROWS, BATCH, C, D, HIDDEN, X = 2000, 100, 10, 50, 500, 784


def rows() -> Any:
    """Binary rows, the same for every candidate."""
    import torch

    generator = torch.Generator().manual_seed(0)
    z, w = (torch.randn(*shape, generator=generator) for shape in ((ROWS, 10), (10, X)))
    return torch.bernoulli((z @ w - 2).sigmoid(), generator=generator)


def network(ins: int, outs: int) -> Any:
    """One hidden layer."""
    from torch import nn

    return nn.Sequential(nn.Linear(ins, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, outs))


def by_hand(turns: Turns) -> Any:
    """The sum in a dozen lines of PyTorch."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    x, eye = rows(), torch.eye(C).unsqueeze(1).expand(C, BATCH, C)
    encoder, decoder = network(X + C, 2 * D), network(D + C, X)
    weights = torch.zeros(C, requires_grad=True)
    parameters = [*encoder.parameters(), *decoder.parameters(), weights]
    optimizer = torch.optim.Adam(parameters, 1e-3, fused=True)

    def loss(x: Any) -> Any:
        loc, raw = encoder(torch.cat([x.expand(C, -1, -1), eye], -1)).chunk(2, -1)
        scale, noise = F.softplus(raw), torch.randn_like(loc)
        z = loc + scale * noise
        logits = decoder(torch.cat([z, eye], -1))
        each = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        ratio = scale.log() + (noise**2 - z**2) / 2
        joint = weights.log_softmax(0).unsqueeze(1) - each.sum(-1) + ratio.sum(-1)
        return -joint.logsumexp(0).mean()

    for index in turns.batches(ROWS, BATCH):
        optimizer.zero_grad()
        loss(x[index]).backward()
        optimizer.step()
    return lambda: loss(x[:BATCH]).item()


def pyro_vae(options: dict[str, Any], turns: Turns) -> Any:
    """`fit` of a declared VAE with classes."""
    import torch

    from pyro_vae import build
    from pyro_vae.estimators import evidence_lower_bound

    torch.manual_seed(0)
    wide: Any = {"class_path": "MLP", "init_args": {"hidden": [HIDDEN], "activation": "softplus"}}
    vae, x = build(X, D, encoder=wide, decoder=wide, classes=C), rows()
    turns.fit(vae, x, batch_size=BATCH, **options)
    return lambda: -evidence_lower_bound(vae, x[:BATCH]).elbo.mean().item()


def pyro_example(turns: Turns) -> Any:
    """The model and guide of Pyro's semi-supervised example, under its own sum."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
    from torch import nn

    torch.manual_seed(0)
    x = rows()
    nets = nn.ModuleList([network(X + C, 2 * D), network(D + C, X), network(X, C)])

    def joined(x: Any, y: Any) -> Any:
        lead = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        return torch.cat([x.expand(*lead, -1), y.expand(*lead, -1)], -1)

    def model(x: Any) -> None:
        pyro.module("nets", nets)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), D), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(len(x), C) / C))
            logits = nets[1](joined(z, y))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=nets[2](x)))
            loc, raw = nets[0](joined(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))

    loss = TraceEnum_ELBO(max_plate_nesting=1)
    svi = SVI(model, config_enumerate(guide), pyro.optim.ClippedAdam({"lr": 1e-3}), loss)
    for index in turns.batches(ROWS, BATCH):
        svi.step(x[index])
    return lambda: svi.evaluate_loss(x[:BATCH]) / BATCH


def main() -> None:
    """Prints milliseconds a step, the ratio to the sum by hand, and the loss at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    candidates: Any = {
        "by hand": by_hand,
        "pyro_vae": partial(pyro_vae, {"compile": False}),
        "pyro_vae, compiled": partial(pyro_vae, {"compile": True}),
        "the same, bf16": partial(pyro_vae, {"compile": True, "precision": "bf16-mixed"}),
        "Pyro, TraceEnum_ELBO": pyro_example,
    }
    # processor time, so that other work beside it counts less
    found = compare(candidates, warm=3, clock=time.process_time, **vars(options))
    for name, result in found.items():
        ms, ratio = math.fsum(result.ms) / len(result.ms), result.ratio(found["by hand"])
        print(f"{name:<22}{ms:8.1f} ms a step, {ratio:.2f} of by hand, loss {result.loss:.1f}")


if __name__ == "__main__":
    main()
