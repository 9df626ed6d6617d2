"""Compares one, two and three layers of latents, and two priors, on binarised MNIST.

python examples/studies/hierarchy_mnist.py --root data    # 6 short epochs, minutes on one core
python examples/studies/hierarchy_mnist.py --root data --epochs 2000 --components 500 \
    --warm_up 100 --patience 50 --lr 5e-4 --images 10000   # the published budget
python examples/studies/hierarchy_mnist.py --smoke        # bundled digits, seconds

The model of one layer is 784-300-300-40 with gated units. More layers have 40 latents each, with
the top-down inference of the HVAE, and p(x | z) sees all layers. The table has log p(x) by
`log_evidence`, and the bounds by 100 and 1000 draws of the encoder, which the papers report. The
gain of a layer differs between them.

Tomczak and Welling. VAE with a VampPrior. 2018. It has -81.24 for two layers with a VampPrior. A
rerun (Norouzi, Fleet and Norouzi. Exemplar VAE. 2020) has -81.56, and -82.39 without.
"""

import argparse
import json
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from printing import show, verdicts

from pyro_vae import VAE, Evidence, build, fit, importance_sampling, log_evidence
from pyro_vae.data import Splits, load_data
from pyro_vae.files import write
from pyro_vae.objectives import ELBO, Linear

MODELS = ("one layer", "two layers", "two layers, VampPrior", "three layers")
LAYERS = {"one": 1, "two": 2, "three": 3}


def main(options: argparse.Namespace) -> None:
    """Trains and judges each model; writes and prints the tables."""
    if options.smoke:
        warnings.filterwarnings("ignore", message="posterior collapse")  # so few epochs
    source = "digits" if options.smoke else "MNIST"
    data = load_data(source, root=options.root, transform="dynamic")
    x, _ = data.test.fixed().batch(torch.arange(options.images))
    rows, found = [], dict[str, Evidence]()
    for name in options.models:
        torch.manual_seed(0)
        vae = declared(name, data.train.data_shape, options.components)
        row = trained(vae, name, data, options)
        evidence = log_evidence(vae, x)
        found[name] = evidence
        for K in (100, 1000):
            row[f"encoder, K = {K}"] = importance_sampling(vae, x, num_samples=K).mean()
        row |= {"log p(x)": evidence.mean(), "+- Monte Carlo": evidence.mean_stderr()[0]}
        row["verdict"] = verdicts(evidence)
        rows.append(row)
        print(row, flush=True)
    gains = []
    for a, b in combinations(found, 2):
        nats, error = found[b].difference(found[a])
        gains.append({"pair": f"{b} less {a}", "nats": nats, "+- data": error})
    write(Path(options.out, "table.json"), json.dumps({"rows": rows, "paired": gains}, indent=1))
    for table in (rows, gains):
        show(table, f"{len(x)} test images, nats per image", width=150)


def declared(name: str, data_shape: tuple[int, ...], components: int) -> VAE:
    """Builds the VAE of that name."""
    vamp = {"class_path": "VampPrior", "init_args": {"num_components": components}}
    gated = {"class_path": "GatedMLP", "init_args": {"hidden": [300, 300]}}
    given = {"prior": vamp if "Vamp" in name else "StandardNormal"}
    layers = LAYERS[name.split()[0]]
    given |= {"hierarchy": "TopDown", "skip": True} if layers > 1 else {}
    latent_dim = [40] * layers if layers > 1 else 40
    return build(data_shape, latent_dim, encoder=gated, decoder=gated, **given)


def trained(vae: VAE, name: str, data: Splits, options: argparse.Namespace) -> dict[str, Any]:
    """Trains the VAE; returns the first cells of its row."""
    # a short run gains from a falling learning rate; a long one keeps the rate and stops early
    falling = {"class_path": "CosineAnnealingLR", "init_args": {"T_max": options.epochs}}
    history = fit(
        vae,
        data.train.subset(torch.arange(min(options.rows, len(data.train)))),
        ELBO(beta=Linear(length=options.warm_up, unit="epoch")),
        run=Path(options.out, name.replace(", ", "-").replace(" ", "-")),
        resume=True,
        epochs=options.epochs,
        lr=options.lr,
        schedule=None if options.patience else falling,
        validation=data.validation.subset(torch.arange(min(1000, len(data.validation)))),
        patience=options.patience,
        compile=not options.smoke,
    )
    units = f"{history.active_units} of {history.num_units}"
    return {"model": name, "epochs": len(history), "active units": units}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data", help="folder of MNIST")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rows", type=int, default=50_000, help="training images")
    parser.add_argument("--components", type=int, default=100, help="of the VampPrior")
    parser.add_argument("--warm_up", type=float, default=2, help="epochs until beta is 1")
    parser.add_argument("--patience", type=int, help="stop early, at a constant learning rate")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=200, help="test images for log p(x)")
    parser.add_argument("--out", default="runs/hierarchy_mnist", help="folder of runs and tables")
    parser.add_argument("--smoke", action="store_true", help="bundled digits, one epoch")
    options = parser.parse_args()
    if options.smoke:
        options.epochs, options.warm_up, options.components, options.images = 1, 0.5, 5, 3
    main(options)
