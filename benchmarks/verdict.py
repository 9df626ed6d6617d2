"""How often "reliable" is wrong: worlds whose log p(x) is known, built against the verdict.

python benchmarks/verdict.py [FAMILY ...] [--rows 20] [--seed 0] [--out results/verdict.json]

Each family comes in two sizes. Its data are drawn from the model; the guide is the linear
regression of the latents on the data, of one mode where there are several.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae import Evidence, log_evidence

Program = Callable[..., None]


@dataclass(eq=False)
class World:
    """A model, a guide, data [N, E], their log p(x) [N], and whether its posteriors are plain."""

    model: Program
    guide: Program
    x: Tensor
    truth: Tensor
    plain: bool = False


@dataclass(eq=False)
class Block:
    """Some of the latents, which make some of the data on their own.

    Attributes:
        prior: Distribution of its latents, event (d,).
        likelihood: Distribution of its data given latents [*, d], event (e,); None if idle.
        log_evidence: log p(x) [N] of data [N, e].
        canonical: Brings latents into one mode.
    """

    prior: Any
    likelihood: Callable[[Tensor], Any] | None
    log_evidence: Callable[[Tensor], Tensor]
    canonical: Callable[[Tensor], Tensor] = lambda z: z


def normal(dim: int) -> Any:
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


def grid_evidence(block: Block, axes: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """log p(x) by the trapezoid rule on a grid of latents."""
    grid = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    log_prior = block.prior.log_prob(grid)
    cell = sum(math.log((axis[1] - axis[0]).item()) for axis in axes)
    likely = log_prior > log_prior.max() - 60
    grid, log_prior = grid[likely], log_prior[likely]

    def log_evidence(x: Tensor) -> Tensor:
        fn = block.likelihood(grid)
        rows = [(fn.log_prob(row) + log_prior).logsumexp(0) for row in x]
        return torch.stack(rows) + cell

    return log_evidence


def on_grid(
    prior: Any,
    loc: Callable[[Tensor], Tensor],
    sigma: float,
    axes: Sequence[Tensor],
    canonical: Callable[[Tensor], Tensor] = lambda z: z,
) -> Block:
    block = Block(prior, lambda z: dist.Normal(loc(z), sigma).to_event(1), None, canonical)
    block.log_evidence = grid_evidence(block, axes)
    return block


def line(limit: float = 9.0, number: int = 20_001) -> Tensor:
    return torch.linspace(-limit, limit, number)


def linear(dim: int, number: int, sigma: float) -> Block:
    W = torch.randn(dim, number) / dim**0.5
    evidence = dist.MultivariateNormal(torch.zeros(number), W.T @ W + sigma**2 * torch.eye(number))
    return Block(normal(dim), lambda z: dist.Normal(z @ W, sigma).to_event(1), evidence.log_prob)


def mirror(sigma: float, at: float = 0.0) -> Block:
    return on_grid(
        normal(1), lambda z: (z - at).abs(), sigma, [line()], lambda z: at + (z - at).abs()
    )


def ring(sigma: float) -> Block:
    r = torch.linspace(1e-4, 9, 40_001)

    def log_evidence(x: Tensor) -> Tensor:
        log_prior = r.log() - r.square() / 2
        log_p = log_prior + dist.Normal(r, sigma).log_prob(x)
        return log_p.logsumexp(-1) + (r[1] - r[0]).log()

    def likelihood(z: Tensor) -> Any:
        return dist.Normal(z.norm(dim=-1, keepdim=True), sigma).to_event(1)

    return Block(
        normal(2),
        likelihood,
        log_evidence,
        lambda z: z.norm(dim=-1, keepdim=True) / 2**0.5 * torch.ones(2),
    )


def pair(sigma: float) -> Block:
    """Two units that can be exchanged."""

    def loc(z: Tensor) -> Tensor:
        return torch.stack([z.sum(-1), z.prod(-1)], -1)

    axes = [line(6.5, 1301)] * 2
    return on_grid(normal(2), loc, sigma, axes, lambda z: z.sort(-1).values)


def banana(sigma: float) -> Block:
    return on_grid(
        normal(2), lambda z: z[..., :1] + z[..., 1:].square(), sigma, [line(7, 1401)] * 2
    )


def wave(sigma: float, frequency: float) -> Block:
    return on_grid(normal(1), lambda z: (frequency * z).sin() + z / 3, sigma, [line()])


def bumps(number: int) -> Block:
    """Binary pixels through a sine."""
    A = 2 * torch.randn(2, number)

    def likelihood(z: Tensor) -> Any:
        return dist.Bernoulli(logits=z.sin() @ A + z @ A / 3).to_event(1)

    block = Block(normal(2), likelihood, None)
    block.log_evidence = grid_evidence(block, [line(7, 701)] * 2)
    return block


def seen(prior: Any, sigma: float, limit: float = 60.0) -> Block:
    """A latent with noise, of a prior of one's own."""
    t = torch.linspace(-14.0, 14.0, 40_001)

    def log_evidence(x: Tensor) -> Tensor:
        z = torch.sinh(t) * sigma + x  # fine near the datum, far in the tails
        log_p = prior.log_prob(z.unsqueeze(-1)) + dist.Normal(z, sigma).log_prob(x)
        prior_z = torch.sinh(t) * 0.01
        wide = prior.log_prob(prior_z.unsqueeze(-1)) + dist.Normal(prior_z, sigma).log_prob(x)
        step = (t[1] - t[0]).log()
        near = (log_p + (sigma * t.cosh()).log()).logsumexp(-1) + step
        wide = (wide + (0.01 * t.cosh()).log()).logsumexp(-1) + step
        assert (near - wide).abs().max() < 1e-3, (near - wide).abs().max()
        return near

    return Block(prior, lambda z: dist.Normal(z, sigma).to_event(1), log_evidence)


def voted(prior: Any, number: int, slope: float) -> Block:
    """A latent that binary pixels saturate on, so that the prior's tail is the posterior's."""
    t = torch.linspace(-20.0, 20.0, 80_001)
    z = torch.sinh(t).unsqueeze(-1)

    def likelihood(z: Tensor) -> Any:
        logits = slope * z.expand(*z.shape[:-1], number)
        return dist.Bernoulli(logits=logits).to_event(1)

    def log_evidence(x: Tensor) -> Tensor:
        weight = prior.log_prob(z) + t.cosh().log() + (t[1] - t[0]).log()
        return torch.stack([(likelihood(z).log_prob(row) + weight).logsumexp(0) for row in x])

    return Block(prior, likelihood, log_evidence)


def idle(prior: Any) -> Block:
    return Block(prior, None, lambda x: x.new_zeros(len(x)))


def each(fn: Any, dim: int) -> Any:
    return fn.expand([dim]).to_event(1)


def student(df: float, dim: int) -> Any:
    return each(dist.StudentT(df, 0.0, 1.0), dim)


def laplace(dim: int) -> Any:
    return each(dist.Laplace(torch.zeros(()), 1.0), dim)


def spike_and_slab(width: float, dim: int) -> Any:
    parts = dist.Normal(torch.zeros(2), torch.tensor([width, 1.0]))
    return each(dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts), dim)


def split(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return list(x.split(list(sizes), -1))


def world(
    blocks: Sequence[Block], rows: int, *, rotated: bool = False, plain: bool = False
) -> World:
    """Independent blocks side by side; Normal latents may be mixed by a rotation."""
    sizes = [block.prior.event_shape[0] for block in blocks]
    used = [block for block in blocks if block.likelihood is not None]
    D = sum(sizes)
    Q = torch.linalg.qr(torch.randn(D, D)).Q if rotated else torch.eye(D)
    joint = normal(D) if rotated else None

    def likelihood(z: Tensor) -> Any:
        parts = split(z @ Q, sizes) if rotated else split(z, sizes)
        fns = [b.likelihood(part) for b, part in zip(blocks, parts) if b.likelihood is not None]
        bases = [fn.base_dist for fn in fns]
        if isinstance(bases[0], dist.Bernoulli):
            return dist.Bernoulli(logits=torch.cat([fn.logits for fn in bases], -1)).to_event(1)
        scale = torch.cat([fn.scale for fn in bases], -1)
        return dist.Normal(torch.cat([fn.loc for fn in bases], -1), scale).to_event(1)

    def draw(number: int) -> tuple[Tensor, Tensor]:
        parts = [block.prior.sample((number,)) for block in blocks]
        z = torch.cat(parts, -1) @ Q.T if rotated else torch.cat(parts, -1)
        one = torch.cat([b.canonical(part) for b, part in zip(blocks, parts)], -1)
        return likelihood(z).sample(), one @ Q.T

    x, _ = draw(rows)
    many, z = draw(2000)
    ones = torch.cat([many.clamp(-9, 9), torch.ones(2000, 1)], -1)
    z = z.clamp(-5, 5)
    B = torch.linalg.lstsq(ones, z).solution
    spread = (z - ones @ B).std(0).clamp(0.05, 1.0)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            if joint is not None:
                z = pyro.sample("z", joint)
            else:
                parts = [pyro.sample(f"z{i}", block.prior) for i, block in enumerate(blocks)]
                z = torch.cat(parts, -1)
            pyro.sample("x", likelihood(z), obs=x)

    def guide(x: Tensor) -> None:
        loc = torch.cat([x.clamp(-9, 9), x.new_ones(len(x), 1)], -1) @ B
        with pyro.plate("data", len(x), dim=-1):
            if rotated:
                pyro.sample("z", dist.Normal(loc, spread).to_event(1))
                return
            places = zip(loc.split(sizes, -1), spread.split(sizes))
            for i, (part, scale) in enumerate(places):
                pyro.sample(f"z{i}", dist.Normal(part, scale).to_event(1))

    widths = [block.likelihood(block.prior.sample((1,))).event_shape[0] for block in used]
    evidence = [block.log_evidence(part) for block, part in zip(used, split(x, widths))]
    return World(model, guide, x, sum(evidence[1:], evidence[0]), plain)


def mixture_prior(dim: int, components: int, rows: int) -> World:
    """A mixture prior under a weak likelihood."""
    means, scale, sigma = 4 * torch.randn(components, dim) / dim**0.5, 0.3, 2.0
    which = dist.Categorical(torch.rand(components) + 0.2)
    W = torch.randn(dim, 5) / dim**0.5
    prior = dist.MixtureSameFamily(which, dist.Normal(means, scale).to_event(1))
    covariance = scale**2 * W.T @ W + sigma**2 * torch.eye(5)
    evidence = dist.MixtureSameFamily(which, dist.MultivariateNormal(means @ W, covariance))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z @ W, sigma).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(means[0], scale).to_event(1))

    x = evidence.sample((rows,))
    return World(model, guide, x, evidence.log_prob(x))


def funnel(width: int, rows: int) -> World:
    """One latent sets the scale of others."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
            scale = a.exp().unsqueeze(-1).expand(*a.shape, width)
            b = pyro.sample("b", dist.Normal(torch.zeros(()), scale).to_event(1))
            pyro.sample("x", dist.Normal(b, 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("a", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("b", dist.Normal(0.8 * x, 0.4).to_event(1))

    a = torch.randn(rows, 1)
    x = a.exp() * torch.randn(rows, width) + 0.5 * torch.randn(rows, width)
    grid = line(9.0, 20_001)
    scale = (grid.exp().square() + 0.25).sqrt().unsqueeze(-1)
    log_prior = dist.Normal(0.0, 1.0).log_prob(grid)
    rows_ = [dist.Normal(0.0, scale).log_prob(row).sum(-1) + log_prior for row in x]
    truth = torch.stack([row.logsumexp(0) for row in rows_]) + (grid[1] - grid[0]).log()
    return World(model, guide, x, truth)


def two_layers(dim: int, rows: int) -> World:
    """z2 -> z1 -> x, all linear and Gaussian."""
    A, W = torch.randn(dim, dim) / dim**0.5, torch.randn(dim, 7) / dim**0.5

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", normal(dim))
            z1 = pyro.sample("z1", dist.Normal(z2 @ A, 0.5).to_event(1))
            pyro.sample("x", dist.Normal(z1 @ W, 0.2).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", normal(dim).expand([len(x)]))
            pyro.sample("z2", dist.Normal(z1 @ A.T / 2, 0.7).to_event(1))

    covariance = W.T @ (A.T @ A + 0.25 * torch.eye(dim)) @ W + 0.04 * torch.eye(7)
    evidence = dist.MultivariateNormal(torch.zeros(7), covariance)
    x = evidence.sample((rows,))
    return World(model, guide, x, evidence.log_prob(x), True)


def simplex(concentration: float, classes: int, count: int, rows: int) -> World:
    """A Dirichlet under counts; near its corners where the concentration is low."""
    a = torch.full((classes,), concentration)
    evidence = dist.DirichletMultinomial(a, total_count=count)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            p = pyro.sample("p", dist.Dirichlet(a))
            pyro.sample("x", dist.Multinomial(count, probs=p, validate_args=False), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("p", dist.Dirichlet(1 + x))

    x = evidence.sample((rows,))
    return World(model, guide, x, evidence.log_prob(x))


def rates(dim: int, shape: float, rows: int) -> World:
    """Independent Gamma rates under Poisson counts."""
    prior = dist.Gamma(torch.full((dim,), shape), 0.5).to_event(1)
    evidence = dist.GammaPoisson(torch.full((dim,), shape), 0.5).to_event(1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            rate = pyro.sample("rate", prior)
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("rate", dist.LogNormal((x + 0.5).log(), 0.2).to_event(1))

    x = evidence.sample((rows,))
    return World(model, guide, x, evidence.log_prob(x), shape >= 1)


FAMILIES: dict[str, Sequence[Callable[[int], World]]] = {
    "linear": [
        lambda n: world([linear(5, 9, 0.5)], n, plain=True),
        lambda n: world([linear(37, 23, 0.1)], n, plain=True),
    ],
    "two layers": [lambda n: two_layers(3, n), lambda n: two_layers(13, n)],
    "rates": [lambda n: rates(2, 2.0, n), lambda n: rates(17, 3.0, n)],
    "small rates": [lambda n: rates(2, 0.3, n), lambda n: rates(9, 0.2, n)],
    "logistic": [
        lambda n: world([voted(normal(1), 7, 1.0) for _ in range(2)], n, plain=True),
        lambda n: world([voted(normal(1), 11, 1.5) for _ in range(19)], n, plain=True),
    ],
    "sines": [
        lambda n: world([bumps(11)], n),
        lambda n: world([bumps(7), bumps(13), idle(normal(5))], n),
    ],
    "mirror": [
        lambda n: world([mirror(0.15), linear(10, 13, 0.2)], n),
        lambda n: world([mirror(0.08), linear(42, 31, 0.15)], n),
    ],
    "two mirrors, rotated": [
        lambda n: world([mirror(0.2), mirror(0.1), linear(6, 7, 0.2)], n, rotated=True),
        lambda n: world([mirror(0.1), mirror(0.2), linear(25, 20, 0.1)], n, rotated=True),
    ],
    "unequal mirror": [
        lambda n: world([mirror(0.15, 0.4), linear(8, 11, 0.3)], n),
        lambda n: world([mirror(0.1, 0.6), linear(27, 29, 0.2)], n, rotated=True),
    ],
    "exchange": [
        lambda n: world([pair(0.2), linear(5, 5, 0.3)], n),
        lambda n: world([pair(0.1), linear(22, 23, 0.2)], n),
    ],
    "ring": [
        lambda n: world([ring(0.1), linear(3, 5, 0.3)], n),
        lambda n: world([ring(0.15), linear(21, 19, 0.2)], n),
    ],
    "banana": [
        lambda n: world([banana(0.2)], n),
        lambda n: world([banana(0.3), linear(13, 17, 0.3)], n),
    ],
    "waves": [
        lambda n: world([wave(0.2, 4.0)], n),
        lambda n: world([wave(0.3, 3.0), wave(0.4, 5.0), linear(11, 9, 0.2)], n),
    ],
    "Student's t, idle": [
        lambda n: world(
            [*(seen(student(3.0, 1), 0.1) for _ in range(3)), idle(student(3.0, 5))], n
        ),
        lambda n: world(
            [*(seen(student(2.0, 1), 0.07) for _ in range(7)), idle(student(2.0, 11))], n
        ),
    ],
    "Laplace, idle": [
        lambda n: world([*(seen(laplace(1), 0.1) for _ in range(4)), idle(laplace(7))], n),
        lambda n: world([*(seen(laplace(1), 0.2) for _ in range(11)), idle(laplace(23))], n),
    ],
    "Student's t, saturated": [
        lambda n: world([voted(student(3.0, 1), 5, 2.0), voted(student(3.0, 1), 9, 1.0)], n),
        lambda n: world([voted(student(2.0, 1), 7, 1.5) for _ in range(7)], n),
    ],
    "spike and slab": [
        lambda n: world([seen(spike_and_slab(0.03, 1), 0.2) for _ in range(3)], n),
        lambda n: world(
            [
                *(seen(spike_and_slab(0.05, 1), 0.3) for _ in range(7)),
                idle(spike_and_slab(0.02, 4)),
            ],
            n,
        ),
    ],
    "simplex": [lambda n: simplex(0.3, 4, 7, n), lambda n: simplex(0.1, 7, 5, n)],
    "mixture prior": [lambda n: mixture_prior(2, 3, n), lambda n: mixture_prior(11, 7, n)],
    "funnel": [lambda n: funnel(1, n), lambda n: funnel(7, n)],
}


def make(family: str, size: int, rows: int, seed: int) -> World:
    """A world of its seed, in float64."""
    torch.manual_seed(1000 * seed + 10 * list(FAMILIES).index(family) + size)
    return FAMILIES[family][size](rows)


def summary(name: str, world: World, evidence: Evidence, seconds: float) -> dict[str, Any]:
    """What came of a world."""
    error = evidence.log_prob - world.truth
    good = torch.tensor([verdict == "reliable" for verdict in evidence.verdict])
    wrong = error.abs() > 5 * evidence.stderr + 1e-3
    within = error.abs() < 2 * evidence.stderr + 1e-3
    return {
        "world": name,
        "rows": len(error),
        "reliable": int(good.sum()),
        "false": int((good & wrong).sum()),
        "within 2 se": int((good & within).sum()),
        "bias": error[good].mean().item() if good.any() else math.nan,
        "rms": error[good].square().mean().sqrt().item() if good.any() else math.nan,
        "worst z": (error / (evidence.stderr + 1e-3))[good].abs().max().item()
        if good.any()
        else 0.0,
        "plain": world.plain,
        "audit": str(getattr(evidence, "audit", "")),
        "methods": sorted(set(evidence.method)),
        "seconds": round(seconds, 1),
    }


def judge(
    families: Sequence[str], rows: int, seed: int, **options: Any
) -> Iterator[dict[str, Any]]:
    """A summary of each world."""
    for family in families:
        for size in (0, 1):
            world = make(family, size, rows, seed)
            start = time.perf_counter()
            evidence = log_evidence(world.model, world.guide, world.x, **options)
            yield summary(
                f"{family}, {'small' if size == 0 else 'large'}",
                world,
                evidence,
                time.perf_counter() - start,
            )


def main() -> None:
    """Prints a row for each world, and the totals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--audit", default="true")
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    done = []
    options = {} if arguments.audit == "default" else {"audit": arguments.audit == "true"}
    print(
        f"{'world':32}{'reliable':>9}{'false':>6}{'2 se':>6}{'bias':>8}{'rms':>7}"
        f"{'worst z':>8}{'s':>7}"
    )
    for row in judge(arguments.families, arguments.rows, arguments.seed, **options):
        done.append(row)
        print(
            f"{row['world']:32}{row['reliable']:>5}/{row['rows']:<3}{row['false']:>6}"
            f"{row['within 2 se']:>6}{row['bias']:>8.3f}{row['rms']:>7.3f}{row['worst z']:>8.1f}"
            f"{row['seconds']:>7} {row['audit']}",
            flush=True,
        )
    total = {
        key: sum(row[key] for row in done) for key in ("rows", "reliable", "false", "within 2 se")
    }
    print(total, "coverage", total["within 2 se"] / max(1, total["reliable"]))
    plain = [row for row in done if row["plain"]]
    if plain:
        print(
            "plain:",
            sum(row["reliable"] for row in plain),
            "of",
            sum(row["rows"] for row in plain),
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(done, indent=1))


if __name__ == "__main__":
    main()
