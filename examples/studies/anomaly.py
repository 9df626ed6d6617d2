"""Uses log p(x) to detect anomalies, and shows where it works and where it misleads.

python examples/studies/anomaly.py --root data --letters images_background_small1  # 5 minutes
python examples/studies/anomaly.py --root data --letters FashionMNIST  # by torchvision
python examples/studies/anomaly.py --smoke  # bundled data, seconds

1. A VAE is trained on thresholded MNIST without its ones. It scores held-out digits, letters,
   inverted digits, and the ones. Letters are a folder of images, such as a part of Omniglot, or a
   named data set. They are made like the digits: light ink on dark, the same size, black and
   white. A pixel is ink if any pixel that falls on it is: an average would lose thin strokes.
2. A VAE is trained on the benign cells of scikit-learn's breast cancer data. It scores benign and
   malignant cells.

Each row of the table has log p(x) by `log_evidence` with its verdicts. The area under the ROC
curve (AUC), with DeLong's standard error, is the probability that an anomaly has a lower log p(x)
than a held-out datum. Below one half the detector is worse than a coin. This happens because
density is not typicality: a simple image, a one or a blank, is more likely than the digits that
the VAE was trained on. The second AUC scores by the distance of log p(x) from its median over
validation data, so too high a log p(x) counts as well.

DeLong, DeLong and Clarke-Pearson. Comparing the areas under two or more correlated receiver
operating characteristic curves. 1988.
Nalisnick et al. Do deep generative models know what they don't know? 2019.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from printing import show
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_curve
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from pyro_vae import VAE, Evidence, build, fit, log_evidence, plots
from pyro_vae.data import Data, load_data

# a VAE, validation rows, and sets of rows by name: first held-out rows, then anomalies
Study = tuple[VAE, Tensor, dict[str, Tensor]]


def like_digits(data: Data, side: int) -> Tensor:
    """Returns images [N, C, H, W] in black and white [N, 1, side, side], light ink on dark."""
    x = data.x.float().mean(1, keepdim=True) / max(1, (data.levels or 2) - 1)
    ink = 1 - x if x.mean() > 0.5 else x
    return (adaptive_max_pool2d(ink, side) >= 0.5).float()


def some(data: Data, keep: Tensor, size: int) -> Data:
    """Draws at most `size` rows of those where `keep` [N] is true."""
    index = keep.nonzero()[:, 0]
    return data.subset(index[torch.randperm(len(index))[:size]])


def images(arguments: argparse.Namespace) -> Study:
    """Trains a VAE on digits without ones; returns it and the rows to score."""
    size, smoke = arguments.size, arguments.smoke
    data = load_data("digits" if smoke else "MNIST", root=arguments.root, transform="threshold")
    letters = load_data("sprites" if smoke else arguments.letters, root=arguments.root).train
    if arguments.letters.lower() == "emnist" and not smoke:  # its balanced split holds digits
        letters = some(letters, letters.labels >= 10, size)
    seen = some(data.train, data.train.labels != 1, len(data.train))
    held = some(data.validation, data.validation.labels != 1, 1000)
    digits = rows(some(data.test, data.test.labels != 1, size))
    vae = build(data.train.data_shape, latent_dim=20)
    vae = train(vae, seen, held, arguments)
    return vae, rows(held)[:size], {
        "held-out digits": digits,
        "letters": like_digits(some(letters, torch.ones(len(letters)), size), digits.shape[-1]),
        "inverted digits": 1 - digits[: max(2, size // 10)],
        "ones": rows(some(data.test, data.test.labels == 1, size)),
    }  # fmt: skip


def cells(arguments: argparse.Namespace) -> Study:
    """Trains a VAE on benign cells; returns it and the rows to score, standardised."""
    x, benign = (torch.as_tensor(values) for values in load_breast_cancer(return_X_y=True))
    own = x[benign == 1]
    own = own[torch.randperm(len(own))]
    mean, scale = own[:214].mean(0), own[:214].std(0)
    own, malignant = (((part - mean) / scale).float() for part in (own, x[benign == 0]))
    network = {"class_path": "MLP", "init_args": {"hidden": [50]}}
    likelihood = {"class_path": "Normal", "init_args": {"scale": "per_dimension"}}
    vae = build((30,), 5, likelihood=likelihood, encoder=network, decoder=network)
    vae = train(vae, own[:214], own[214:285], arguments, epochs=2000, patience=100)
    size = arguments.size
    return vae, own[214:285], {"held-out benign": own[285:][:size], "malignant": malignant[:size]}


def train(
    vae: VAE, data: Data | Tensor, validation: Data | Tensor, arguments: argparse.Namespace,
    epochs: int | None = None, patience: int | None = None,
) -> VAE:  # fmt: skip
    """Trains the VAE and returns it with the weights of its best epoch."""
    epochs = 2 if arguments.smoke else epochs or arguments.epochs
    fit(
        vae,
        data,
        epochs=epochs,
        batch_size=100,
        lr=1e-3,
        validation=validation,
        patience=patience,
        seed=arguments.seed,
        progress=not arguments.smoke,
    )
    return vae.eval()


def rows(data: Data) -> Tensor:
    """Returns all rows as the model sees them."""
    return data.batch(torch.arange(len(data)))[0]


def area(normal: Tensor, anomalous: Tensor) -> tuple[float, float]:
    r"""Returns the area under the ROC curve and its standard error; anomalies score higher.

    The area is the mean of w_ij = [a_i > n_j] + [a_i = n_j] / 2 over anomalies i and others j. Its
    variance is that of the means over j divided by the number of anomalies, plus that of the
    means over i divided by the number of others.
    """
    a, n = anomalous[:, None], normal[None, :]
    wins = (a > n).double() + (a == n).double() / 2
    variance = wins.mean(1).var() / len(anomalous) + wins.mean(0).var() / len(normal)
    return wins.mean().item(), variance.sqrt().item()


def table(found: dict[str, Evidence], middle: float) -> list[dict[str, str]]:
    """Returns log p(x) and verdicts of each set, and both areas for all but the first."""
    normal = next(iter(found.values())).log_prob
    lines = []
    for i, (name, evidence) in enumerate(found.items()):
        verdicts = sorted(set(evidence.verdict), reverse=True)
        line = {
            "data": f"{len(evidence)} {name}",
            "log p(x)": f"{evidence.mean():.1f} +- {evidence.mean_stderr()[1]:.1f}",
            "verdicts": ", ".join(f"{evidence.verdict.count(v)} {v}" for v in verdicts),
        }
        areas = {
            "AUC": (-normal, -evidence.log_prob),
            "AUC, two-sided": ((normal - middle).abs(), (evidence.log_prob - middle).abs()),
        }
        for title, scores in areas.items():
            line[title] = "-" if i == 0 else "{:.3f} +- {:.3f}".format(*area(*scores))
        lines.append(line)
    return lines


@plots.style()
def draw(found: dict[str, Evidence], pictures: dict[str, Tensor], blank: float | None) -> Figure:
    """Draws histograms of log p(x), ROC curves, and the first images of each set."""
    layout = [["left", "left"], ["right", "images"]] if pictures else [["left", "right"]]
    figure = Figure(figsize=(7, 5 if pictures else 2.8), layout="constrained")
    axes = figure.subplot_mosaic(layout, width_ratios=(1, 1.2) if pictures else (1.6, 1))
    histograms(axes["left"], found, blank)
    (_, first), *others = found.items()
    right, areas = axes["right"], [""]
    for i, (_, evidence) in enumerate(others, 1):
        truth = [0] * len(first) + [1] * len(evidence)
        share, power, _ = roc_curve(truth, -torch.cat([first.log_prob, evidence.log_prob]))
        areas.append("\narea {:.3f} ± {:.3f}".format(*area(-first.log_prob, -evidence.log_prob)))
        right.plot(share, power, color=f"C{i}")
    right.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=0)
    right.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    right.set_title("" if pictures else f"ROC,{areas[1].strip()}".replace(",", ", "), fontsize=9)
    if pictures:
        count = min(8, *(len(x) for x in pictures.values()))
        strips = [torch.cat([*x[:count]], -1) for x in pictures.values()]
        ax, height = axes["images"], strips[0].shape[-2]
        ax.imshow(torch.cat(strips, -2)[0].tolist(), cmap="gray", interpolation="nearest")
        ax.set_yticks([height * (i + 0.5) for i in range(len(strips))])
        ax.set_yticklabels([name + words for name, words in zip(pictures, areas)])
        for i, label in enumerate(ax.get_yticklabels()):
            label.set_color(f"C{i}")
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    return figure


def histograms(ax: Any, found: dict[str, Evidence], blank: float | None) -> None:
    """Draws a histogram of each set over the range of the first; says how much lies below."""
    first = next(iter(found.values())).log_prob
    least, most = first.min().item(), first.max().item()
    low = least - (most - least)
    high = max(evidence.log_prob.max().item() for evidence in found.values())
    bins = torch.linspace(low, max(high, blank or high), 40).tolist()
    for i, (name, evidence) in enumerate(found.items()):
        outside = (evidence.log_prob < low).double().mean().item()
        share = [1 / len(evidence)] * len(evidence)
        shown = {"label": name} if outside < 1 else {}
        ax.hist(evidence.log_prob.tolist(), bins, weights=share, alpha=0.5, color=f"C{i}", **shown)
        if outside:
            words = f"\u2190 {outside:.0%} of {name} below {low:.0f}"
            ax.text(0.01, 0.6 - 0.1 * i, words, color=f"C{i}", transform=ax.transAxes, size=8)
    if blank is not None:
        ax.axvline(blank, color="black", linestyle=":", label="a blank image")
    ax.set(xlabel="log p(x), nats per datum", ylabel="share of the set")
    ax.legend(loc="upper left")


def main(arguments: argparse.Namespace) -> None:
    """Trains both VAEs and scores all sets; prints and writes tables, and writes figures."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    tables: dict[str, Any] = {}
    for study in (images, cells):
        torch.manual_seed(arguments.seed)
        vae, validation, sets = study(arguments)
        options = {"seed": arguments.seed, "progress": not arguments.smoke}
        middle = log_evidence(vae.model, vae.guide, validation, **options).log_prob.median()
        found = {
            name: log_evidence(vae.model, vae.guide, x, **options) for name, x in sets.items()
        }
        tables[study.__name__] = table(found, middle.item())
        shown, blank = {}, None
        if study is images:
            empty = torch.zeros_like(validation[:1])
            evidence, shown = log_evidence(vae.model, vae.guide, empty, **options), sets
            blank = evidence.mean()
            beaten = (found["held-out digits"].log_prob < blank).double().mean()
            tables["a blank image"] = (
                f"log p(x) = {blank:.1f} ({evidence.verdict[0]}), more likely than {beaten:.1%} "
                "of held-out digits"
            )
            print("a blank image:", tables["a blank image"])
        plots.save(draw(found, shown, blank), str(out / f"{study.__name__}.svg"))
        show(tables[study.__name__], f"{study.__name__}, nats per datum", width=120)
    (out / "table.json").write_text(json.dumps(tables, indent=1))
    print(f"tables and figures in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data", help="folder of the named data sets")
    parser.add_argument("--letters", default="Omniglot", help="folder of images, or a name")
    parser.add_argument("--epochs", type=int, default=8, help="passes over MNIST")
    parser.add_argument("--size", type=int, default=200, help="rows of each set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/anomaly")
    parser.add_argument("--smoke", action="store_true", help="bundled data, two epochs, few rows")
    given = parser.parse_args()
    main(argparse.Namespace(**{**vars(given), "size": 7}) if given.smoke else given)
