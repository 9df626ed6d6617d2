"""The command `pyro-vae`: the list of commands without loading anything, the rest by `cli`."""

from __future__ import annotations

import sys

COMMANDS = {
    "demo": "train on bundled digits, evaluate, draw figures: three minutes, no options needed",
    "train": "train a VAE on a data set, file or folder of images; leaves a run folder",
    "evaluate": "log p(x) with its error, ELBO, KL, active units of a run",
    "score": "log p(x), error and verdict of each row of a file, as CSV",
    "compare": "runs on the same data: paired differences of log p(x) with their errors",
    "sample": "draws of a run's model, as a picture and an .npz file",
    "encode": "posterior means and scales of a file's rows, as .npz or .csv",
    "impute": "a file with its missing values filled in, and files of draws of them",
    "classify": "class of each row of a file, with probabilities, as .csv",
    "plot": "the figures of a run again",
    "report": "one HTML page of a run, with all of the above, that opens from disk",
    "explore": "one HTML page that runs a run's decoder: move in its latent space, pick data",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
        print(f"usage: pyro-vae COMMAND [options]\n\n{lines}\n\npyro-vae COMMAND --help for more")
        return 0
    if argv[0] == "--version":
        from pyro_vae import __version__

        print(__version__)
        return 0
    try:
        from pyro_vae.cli import run

        return run(argv)
    except KeyboardInterrupt as stop:
        print(f"\npyro-vae {argv[0]}: interrupted{stop}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
