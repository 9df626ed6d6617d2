"""Trains a conditional VAE of digits given their label, and draws samples of each class.

python examples/conditional.py            # bundled digits, under a minute; writes a picture
python examples/conditional.py --smoke

It also estimates log p(x | y) for every class y. Bayes' rule turns these into a classifier.

Sohn, Lee and Yan. Learning structured output representation using deep conditional generative
models. 2015.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pyro_vae import build, fit, importance_sampling, plots
from pyro_vae.data import load_data


def main(smoke: bool = False, out: str = "conditional.png") -> float:
    """Trains, draws ten images of each class, and returns the accuracy of Bayes' rule."""
    torch.manual_seed(0)
    data = load_data(
        "digits", transform="threshold", conditional=True, limit=100 if smoke else None
    )
    classes = data.train.classes
    vae = build(data.train.data_shape, latent_dim=8, condition_dim=classes)
    fit(
        vae,
        data.train,
        epochs=2 if smoke else 80,
        batch_size=64,
        lr=2e-3,
        validation=data.validation,
        progress=not smoke,
    )

    y = torch.eye(classes).repeat_interleave(10, 0)
    with torch.no_grad():
        samples = vae.sample(len(y), y, mean=True)
    plots.save(plots.images(samples, "ten samples of each class, E[x | z, y]"), out)

    x, labels = data.test.fixed().batch(torch.arange(len(data.test)))[0], data.test.labels
    num_samples = 20 if smoke else 500
    given = [
        importance_sampling(
            vae.model, vae.guide, x, torch.eye(classes)[[c]].expand(len(x), -1),
            num_samples=num_samples,
        ).log_prob
        for c in range(classes)
    ]  # fmt: skip
    log_prob = torch.stack(given, 1)
    right = log_prob.gather(1, labels[:, None]).mean()
    accuracy = (log_prob.argmax(1) == labels).double().mean().item()
    print(f"log p(x | y) of the true class, at least {right:.2f} nats per image")
    print(f"most likely class, uniform p(y): {accuracy:.1%} of test images right")
    print(f"samples of each class in {Path(out).resolve()}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two epochs on 100 images")
    parser.add_argument("--out", default="conditional.png", help="picture to write")
    arguments = parser.parse_args()
    main(arguments.smoke, arguments.out)
