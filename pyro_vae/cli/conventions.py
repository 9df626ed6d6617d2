"""How options may be written, and the short help of `train`."""

from __future__ import annotations

from textwrap import fill

from pyro_vae import config

__all__ = ["spelled", "train_help"]

FLAGS = {"compile", "conditional", "mean", "progress", "skip", "tensorboard"}

TRAIN = """\
usage: pyro-vae train [options]

Trains a declared VAE and leaves a run folder.

examples:
  pyro-vae train --data mnist --prior VampPrior --prior.num-components 500
  pyro-vae train --data wine.csv --likelihood Normal --likelihood.scale learned
  pyro-vae train --resume runs/mnist-1 --epochs 200

data:
  --data NAME or PATH   digits, mnist, ..., a file or image folder [digits]
  --transform NAME      how values are prepared; chosen to fit the likelihood
  --validation N        rows, or share, held out
  --limit N             at most this many rows of each part
  --conditional         condition on labels or on y

model: a class each, and its options as --prior.OPTION (--prior.help CLASS)
{families}
  --latent-dim N        latent size, or of several layers, "[40,40]" [20]

training:
  --epochs N            [100]           --lr X             learning rate [0.001]
  --batch-size N        [100]           --optimizer NAME   of torch.optim [Adam]
  --patience N          end after N epochs without a better validation bound
  --seed N              [0]             --devices N        GPUs or processes [1]
  --compile             compile the step; --no-compile: never

run:
  --run FOLDER          new folder of the run [runs/NAME-n]
  --resume FOLDER       go on with a run
  --config FILE         options from YAML; --print-config writes them
  --no-progress         no progress bar

Options may be written with - or _. All of them: pyro-vae train --help-all
"""


def spelled(argv: list[str]) -> list[str]:
    """Options as the parsers know them: words joined by `_`, flags with a value.

    `--latent-dim 3` is `--latent_dim 3`, `--compile` is `--compile=true` and `--no-compile` is
    `--compile=false`.
    """
    done = []
    for argument, following in zip(argv, [*argv[1:], ""]):
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or len(name) == 2:
            done.append(argument)
            continue
        key = name[2:].replace("-", "_")
        off = key.removeprefix("no_")
        if not equals and off != key and off in FLAGS:
            done.append(f"--{off}=false")
        elif not equals and key in FLAGS and following.lower() not in ("true", "false", "null"):
            done.append(f"--{key}=true")
        else:
            done.append(f"--{key}{equals}{value}")
    return done


def train_help() -> str:
    """At most 50 lines of 80 columns: what is needed most, with examples."""
    lines = []
    for family in ("prior", "likelihood", "posterior", "encoder", "objective", "hierarchy"):
        names = ", ".join(sorted(config.components(family)))
        head = "  --encoder, --decoder" if family == "encoder" else f"  --{family} CLASS"
        lines.append(fill(names, 80, initial_indent=head.ljust(24), subsequent_indent=" " * 24))
    return TRAIN.format(families="\n".join(lines))
