"""Every benchmark of speed, peers included: tables in results/speed.json, results/speed.svg.

pip install '.[benchmarks]' && python benchmarks/all.py [--threads 2] [--draw]

Takes about a quarter of an hour on two cores, on which nothing else may run. `--draw` draws the
figure again from the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pyro_vae import plots

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "results"


def measure(script: str, *options: str) -> Any:
    """What a script of this folder measures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(FOLDER / script), "--out", str(out), *options]
        subprocess.run(command, check=True)
        return json.loads(out.read_text())


WORKLOADS = {
    "mlp-100": "MLP, batch 100",
    "mlp-512": "MLP, batch 512",
    "iwae": "IWAE, k = 50",
    "vamp": "VampPrior, 500",
    "conv": "conv, 32 x 32 x 3",
    "K = 5000": "log p(x), K = 5000",
}
LOOKS = {  # of a candidate: colour of the palette, marker, size
    "pyro_vae, compiled": (0, "*", 11),
    "pyro_vae": (0, "o", 6),
    "by hand, compiled": (6, "D", 5),
    "NumPyro": (4, "s", 5),
    "Pyro's example": (1, "^", 6),
}


@plots.style()
def draw(processors: dict[str, Any], path: Path) -> None:
    """Time of each workload by that of hand-written PyTorch, a panel for each processor."""
    figure = Figure(figsize=(7.4, 3.4), layout="constrained")
    axes = figure.subplots(1, len(processors), sharey=True)
    for ax, (title, found) in zip(axes, processors.items()):
        last = [{"workload": "K = 5000", **row} for row in found["importance"]["rows"]]
        rows = found["steps"]["rows"] + last
        for name, (colour, marker, size) in LOOKS.items():
            mine = [row for row in rows if row["candidate"] == name]
            places = [list(WORKLOADS).index(row["workload"]) for row in mine]
            ratios = [row["ratio"] for row in mine]
            ax.plot(
                ratios, places, marker, color=plots.PALETTE[colour], ms=size, label=name, mew=0
            )
        ax.axvline(1, color="#000000", lw=0.8, zorder=0)
        ax.set_yticks(range(len(WORKLOADS)), list(WORKLOADS.values()))
        ax.grid(axis="y", lw=0.4)
        ax.tick_params(axis="y", length=0)
        ax.set(title=title, xlim=(0, 1.8), xlabel="time, hand-written PyTorch = 1")
    axes[0].invert_yaxis()
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=len(names), columnspacing=1)
    plots.save(figure, str(path))


def main(arguments: argparse.Namespace) -> None:
    """Measures, writes, draws."""
    path = RESULTS / "speed.json"
    if not arguments.draw:
        threads = ["--threads", str(arguments.threads)]
        found = {
            "steps": measure("steps.py", *threads),
            "importance": measure("importance.py", *threads),
            "growth": measure("growth.py", *threads),
        }
        path.write_text(json.dumps(found, indent=1))
    files = {"Zen 5": path, "Zen 4": RESULTS / "speed_2.json"}
    draw({name: json.loads(f.read_text()) for name, f in files.items()}, RESULTS / "speed.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draw", action="store_true")
    main(parser.parse_args())
