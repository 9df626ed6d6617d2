"""Draws what a VAE's latent space holds: samples, the manifold, classes, paths between images.

python examples/studies/mnist_latent_space.py --root data  # two trainings, a few minutes
python examples/studies/mnist_latent_space.py --smoke  # bundled digits, seconds

With 2 latents everything can be seen at once: draws, E[x | z] on a grid of the prior's
quantiles, and where each class lies. With 20 latents the images are better. The study asks what
lies half-way between two of them: in pixels (a draw from the mean of the two), and on the line
and on the arc between their codes. The table gives log p(x) of these images and of test images,
by `log_evidence` under the VAE of 20 latents.

Kingma and Welling. Auto-encoding variational Bayes. 2013.
White. Sampling generative networks. 2016 (the arc).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from printing import show, study_options, with_error, with_errors
from torch import Tensor

from pyro_vae import VAE, build, fit, log_evidence, plots
from pyro_vae.data import Splits, load_data
from pyro_vae.estimators import evidence_lower_bound


def train(data: Splits, latent_dim: int, arguments: argparse.Namespace) -> VAE:
    """Trains 784-500-latents on thresholded images; keeps the best epoch by validation."""
    torch.manual_seed(arguments.seed)
    vae = build(data.train.data_shape, latent_dim)
    fit(
        vae,
        data.train,
        epochs=arguments.epochs,
        batch_size=250,
        lr=4e-3,
        schedule={"class_path": "CosineAnnealingLR", "init_args": {"T_max": arguments.epochs}},
        validation=data.validation,
        run=Path(arguments.out) / f"latents-{latent_dim}",
        resume=True,
        seed=arguments.seed,
        compile=arguments.compile,
        progress=not arguments.smoke,
    )
    return vae.eval()


def manifold(vae: VAE, side: int) -> Tensor:
    """Returns E[x | z] at the prior's quantiles [side^2, *E], z0 rightwards and z1 upwards."""
    z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(side) + 0.5) / side)
    z1, z0 = torch.meshgrid(z.flip(0), z, indexing="ij")
    return vae.likelihood(torch.stack([z0, z1], -1).flatten(0, 1)).mean


def line(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Returns points (1 - t) a + t b [T, *E] between two images or codes."""
    t = t.view(-1, *[1] * a.ndim)
    return (1 - t) * a + t * b


def arc(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Returns points [T, D] at even angles between two codes; they do not shrink half-way."""
    angle = torch.acos(torch.cosine_similarity(a, b, dim=0))
    t = t[:, None]
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def morph(vae: VAE, pairs: list[tuple[Tensor, Tensor]], steps: int) -> tuple[Tensor, list[str]]:
    """Returns three paths between the images of each pair, [R, T, C, H, W], and their names."""
    t, rows = torch.linspace(0, 1, steps), []
    for x in pairs:
        a, b = vae.encode(torch.stack(x)).mean
        rows.append(line(*x, t))
        rows += [vae.likelihood(way(a, b, t)).mean for way in (line, arc)]
    return torch.stack(rows), ["pixels", "latent, line", "latent, arc"] * len(pairs)


def halfway(vae: VAE, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns what lies half-way between the two halves of x, and the lengths of the codes."""
    first, second = x.chunk(2)
    images = {
        "test images": first,
        "draws of the model": vae.sample(len(first)),
        "half-way, pixels": ((first + second) / 2).bernoulli(),
    }
    codes = {"test images": vae.encode(first).mean}
    pairs, t = list(zip(*vae.encode(x).mean.chunk(2))), torch.tensor([0.5])
    for name, way in {"half-way, line": line, "half-way, arc": arc}.items():
        codes[name] = torch.cat([way(a, b, t) for a, b in pairs])
        images[name] = vae.likelihood(codes[name]).sample()
    return images, {name: z.norm(dim=1) for name, z in codes.items()}


def score(vae: VAE, x: Tensor, name: str, length: Tensor | None = None) -> dict[str, str]:
    """Returns a row of the table, with standard errors."""
    evidence = log_evidence(vae.model, vae.guide, x)
    return {
        "model": f"{vae.posterior.latent_dim} latents",
        "of": f"{len(x)} {name}" if name == "test images" else name,
        "bound": with_error(evidence_lower_bound(vae.model, vae.guide, x).elbo),
        "log p(x)": with_errors(evidence),
        "reliable": str(evidence.verdict.count("reliable")),
        "length of the code": "-" if length is None else with_error(length),
    }


@torch.no_grad()
def main(arguments: argparse.Namespace) -> None:
    """Trains both VAEs, draws the figures, and writes and prints the table."""
    smoke, out = arguments.smoke, Path(arguments.out)
    if smoke:
        arguments.epochs, arguments.images = 10, 7
    name = "digits" if smoke else "MNIST"
    data = load_data(name, root=arguments.root, transform="threshold")
    test = data.test.fixed()
    x, _ = test.batch(torch.arange(2 * arguments.images))
    with torch.enable_grad():
        small, large = (train(data, latents, arguments) for latents in (2, 20))
    torch.manual_seed(arguments.seed)
    seen, _ = test.batch(torch.arange(min(2000, len(test))))
    labels = None if test.labels is None else test.labels[: len(seen)]
    rows, names = morph(large, [(x[i], x[i + 1]) for i in range(0, 6, 2)], steps=11)
    light = (0.0, 1.0)
    figures = {
        "samples_2": plots.images(
            small.sample(100, mean=True), "E[x | z] of draws, 2 latents", light
        ),
        "samples_20": plots.images(
            large.sample(100, mean=True), "E[x | z] of draws, 20 latents", light
        ),
        "manifold": plots.images(manifold(small, 16), "E[x | z] at the prior's quantiles", light),
        "classes": plots.latent(small.encode(seen).mean, labels),
        "reconstructions_2": plots.reconstructions(x[:20], small.reconstruct(x[:20]), light),
        "reconstructions_20": plots.reconstructions(x[:20], large.reconstruct(x[:20]), light),
        "morphing": plots.image_rows(rows, names, "from one image to another, 20 latents", light),
    }
    for title, figure in figures.items():
        plots.save(figure, str(out / f"{title}.{'svg' if title == 'classes' else 'png'}"))
    images, lengths = halfway(large, x)
    with torch.enable_grad():
        table = [score(small, images["test images"], "test images")]
        table += [score(large, x, name, lengths.get(name)) for name, x in images.items()]
    title = f"{name}, nats per image; +- over images; of log p(x), +- Monte Carlo +- over images"
    (out / "table.json").write_text(json.dumps({"title": title, "rows": table}, indent=1))
    show(table, title, width=120)
    print(f"table and figures in {out}")


if __name__ == "__main__":
    given = {"epochs": 40, "images": 200, "out": "runs/mnist_latent_space"}
    main(study_options(__doc__, **given).parse_args())
