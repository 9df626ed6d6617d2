"""Every benchmark of speed, peers included: tables in results/speed.json, results/speed.png.

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

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "results"


def measure(script: str, *options: str) -> Any:
    """What a script of this folder measures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(FOLDER / script), "--out", str(out), *options]
        subprocess.run(command, check=True)
        return json.loads(out.read_text())


def draw(found: dict[str, Any]) -> None:
    """Ratios of each workload as bars, and the growth of a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = found["steps"]["rows"]
    evaluation = [{"workload": "K = 5000", **row} for row in found["importance"]["rows"]]
    bars = [row for row in steps + evaluation if "products" not in row["candidate"]]
    names = list(dict.fromkeys(row["workload"] for row in bars))
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.18 * len(bars) + 1.6), width_ratios=[2, 1])
    y, ticks, label = 0.0, [], {"fc": "white", "ec": "none", "pad": 0.4}
    for name in names:
        for row in (row for row in bars if row["workload"] == name):
            ours = row["candidate"].startswith("pyro_vae")
            axes[0].barh(y, row["ratio"], color="#3b6fb6" if ours else "#b8bec9")
            axes[0].text(
                row["ratio"] + 0.03, y, f"{row['ratio']:.2f}", va="center", fontsize=7, bbox=label
            )
            ticks.append((y, f"{name}: {row['candidate']}"))
            y += 1
        y += 0.6
    axes[0].set_yticks(*zip(*ticks), fontsize=7)
    axes[0].invert_yaxis()
    axes[0].axvline(1, color="k", lw=0.8, zorder=0)
    axes[0].margins(x=0.08, y=0.01)
    axes[0].set_xlabel("time by that of hand-written PyTorch (less is better)")
    for series in dict.fromkeys(row["series"] for row in found["growth"]["rows"]):
        rows = [row for row in found["growth"]["rows"] if row["series"] == series]
        axes[1].loglog(
            [row["value"] / rows[0]["value"] for row in rows],
            [row["ratio"] for row in rows],
            "o-",
            ms=3,
            label=f"{series}, {rows[0]['value']:,} to {rows[-1]['value']:,}",
        )
    axes[1].set_xlabel("by the least of the series")
    axes[1].set_ylabel("time of a step by that of the least")
    axes[1].legend(fontsize=7, loc="upper left")
    axes[1].set_ylim(top=30)
    figure.tight_layout()
    figure.savefig(RESULTS / "speed.png", dpi=150)


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
    draw(json.loads(path.read_text()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draw", action="store_true")
    main(parser.parse_args())
