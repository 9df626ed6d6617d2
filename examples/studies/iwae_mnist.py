"""Compares VAE, IWAE and DReG with k draws on dynamically binarised MNIST.

python examples/studies/iwae_mnist.py --root data  # 10 epochs: a fraction of an hour
python examples/studies/iwae_mnist.py --root data --protocol --compile --only "VAE 1" --runs runs
python examples/studies/iwae_mnist.py --root data --layers 2  # two layers of latents
python examples/studies/iwae_mnist.py --smoke  # bundled digits, seconds

The networks are 784-200-200-50 with tanh, as in the paper. `--protocol`, for a GPU, is the paper's
budget for each row: 3280 epochs in batches of 20, with a learning rate that falls from 1e-3 to
1e-4. Without it the table says what a smaller budget gives. `--layers 2` is the paper's second
model, with z1 of 100 and z2 of 50 from the data upwards. Its networks between z1 and z2 have two
layers of 200, the paper's have 100. Training is on 50,000 images, in the paper on all 60,000. A
run in `--runs` that was interrupted goes on where it stopped. log p(x) is by `log_evidence`,
which judges the model and not how well its encoder samples. The bound by 5000 draws of the
encoder, which the paper reports, stands beside it, as do the published bounds.

Burda, Grosse and Salakhutdinov. Importance weighted autoencoders. 2016.
Tucker et al. Doubly reparameterized gradient estimators for Monte Carlo objectives. 2019.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from printing import show, study_options, with_errors
from torch.optim.lr_scheduler import LambdaLR

from pyro_vae import Evidence, build, fit, importance_sampling, log_evidence, metrics
from pyro_vae.data import load_data
from pyro_vae.objectives import ELBO, IWAE, DReG, Objective

# published bound by 5000 draws of the encoder, and active units: VAE and IWAE by Burda et al.
# (2016, table 1), DReG by a later reproduction of the same protocol
PUBLISHED = {
    1: {
        ("VAE", 1): "-86.76 / 19",
        ("VAE", 5): "-86.47 / 20",
        ("VAE", 50): "-86.35 / 20",
        ("IWAE", 5): "-85.54 / 22",
        ("IWAE", 50): "-84.78 / 25",
        ("DReG", 5): "-84.90",
        ("DReG", 50): "-84.32",
    },
    2: {
        ("VAE", 1): "-85.33 / 16 + 5",
        ("IWAE", 5): "-83.89 / 21 + 5",
        ("IWAE", 50): "-82.90 / 26 + 7",
    },
}
NAMES = {f"{name} {k}" for rows in PUBLISHED.values() for name, k in rows}
OBJECTIVES: dict[str, type[Objective]] = {"VAE": ELBO, "IWAE": IWAE, "DReG": DReG}


STAGES = 8  # stage i has 3^i epochs at a rate of 1e-3 * 10^(-i / 7): 3280 in all


def falling(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Returns the schedule of the paper's learning rate."""

    def factor(epoch: int) -> float:
        stage = next((i for i in range(STAGES) if epoch < (3 ** (i + 1) - 1) // 2), STAGES - 1)
        return float(10 ** (-stage / (STAGES - 1)))

    return LambdaLR(optimizer, factor)


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of `fit`."""
    options = {"epochs": arguments.epochs, "batch_size": arguments.batch_size, "lr": 1e-3}
    if arguments.protocol:
        adam = {"class_path": "Adam", "init_args": {"eps": 1e-4}}
        options |= {"optimizer": adam, "schedule": falling}
    return {**options, "compile": arguments.compile, "progress": not arguments.smoke}


def main(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Trains each model, and returns the rows of the table."""
    smoke = arguments.smoke
    options = training(arguments)
    published = PUBLISHED[arguments.layers]
    wanted = [row for row in published if f"{row[0]} {row[1]}" in (arguments.only or NAMES)]
    if not wanted:
        raise ValueError(f"--only must be rows, such as 'IWAE 50'; got {arguments.only!r}")
    data = load_data("digits" if smoke else "MNIST", root=arguments.root, transform="dynamic")
    x, _ = data.test.fixed().batch(torch.arange(7 if smoke else arguments.images))
    network: Any = {"class_path": "MLP", "init_args": {"hidden": [200, 200]}}
    rows: list[dict[str, str]] = []
    found: list[tuple[Evidence, Evidence]] = []
    for name, k in wanted if not smoke else [("VAE", 1), ("IWAE", 5), ("DReG", 5)]:
        torch.manual_seed(arguments.seed)
        layers = {"latent_dim": [100, 50], "hierarchy": "BottomUp"}
        given = layers if arguments.layers == 2 else {"latent_dim": 50}
        vae = build(data.train.data_shape, encoder=network, decoder=network, **given)
        start = time.perf_counter()
        fit(
            vae,
            data.train.subset(torch.arange(min(arguments.rows, len(data.train)))),
            OBJECTIVES[name](num_particles=k),
            run=arguments.runs and f"{arguments.runs}/{name}-{k}",
            resume=arguments.runs is not None,
            **options,
        )
        seconds = time.perf_counter() - start
        vae.eval()
        plain = importance_sampling(vae.model, vae.guide, x, num_samples=50 if smoke else 5000)
        few = x[: arguments.evidence]
        evidence = log_evidence(vae.model, vae.guide, few, audit=not arguments.no_audit)
        found.append((evidence, plain))
        with torch.no_grad():
            active = int(metrics.active_units(vae.encode(x).mean).sum())
        rows.append(
            {
                "objective": name,
                "k": str(k),
                "log p(x)": with_errors(evidence),
                "gain": gain(evidence, found[0][0]),
                "encoder's bound": f"{plain.mean():.2f}",
                "its gain": gain(plain, found[0][1]),
                "active": str(active),
                "seconds": f"{seconds:.0f}",
                "published bound / active": published.get((name, k), ""),
            }
        )
        print(rows[-1], flush=True)
    report(rows, options, arguments.out, len(x))
    return rows


def gain(one: Evidence, first: Evidence) -> str:
    """Formats the mean difference from the first model, with the error of paired differences."""
    nats, stderr = one.difference(first)
    return "" if one is first else f"{nats:+.2f} +- {stderr:.2f}"


def report(
    rows: list[dict[str, str]], options: dict[str, Any], out: str | None, images: int
) -> None:
    """Prints the table, and writes it to `out` if given."""
    title = (
        f"{options['epochs']} epochs, batch {options['batch_size']}; {images} test images, nats, "
        "+- Monte Carlo +- data; gain over the first row on the same images +- data; "
        "published: 3280 epochs, 10,000 images"
    )
    show(rows, title, width=130)
    if out:
        with open(out, "w") as file:
            json.dump({"title": title, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    parser = study_options(__doc__, epochs=10, images=200)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--layers", type=int, choices=PUBLISHED, default=1, help="of latents")
    parser.add_argument("--rows", type=int, default=50_000, help="training images")
    parser.add_argument("--evidence", type=int, help="so many of them alone for log_evidence")
    parser.add_argument("--no_audit", action="store_true", help="log_evidence without its audit")
    parser.add_argument("--protocol", action="store_true", help="the paper's budget")
    parser.add_argument("--only", nargs="+", help="rows of the table, such as 'IWAE 50'")
    parser.add_argument("--runs", help="folder of the runs, which go on where they were left")
    options = parser.parse_args()
    budget = {"epochs": (3**STAGES - 1) // 2, "batch_size": 20} if options.protocol else {}
    parser.set_defaults(**({"epochs": 5, "batch_size": 20} if options.smoke else budget))
    main(parser.parse_args())
