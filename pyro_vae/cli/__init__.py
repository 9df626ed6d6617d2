"""The table of commands and of the options of each; it imports nothing that takes time."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args, get_origin

Options = dict[str, dict[str, Any]]


def option(type: Any, default: Any, help: str = "") -> dict[str, Any]:
    """Returns the arguments of `ArgumentParser.add_argument` for an option."""
    return {"type": type, "default": default, "help": help}


FAMILIES = {
    "prior": "StandardNormal",
    "likelihood": "Bernoulli",
    "posterior": "DiagonalNormal",
    "encoder": "MLP",
    "decoder": "MLP",
    "objective": "ELBO",
}
"""The parts that `train` composes, each a class with options; and the default class of each."""

PARTS: Options = {
    f"--{family}": option(str, name, f"a class (--{family}.help CLASS), and its --{family}.OPTION")
    for family, name in FAMILIES.items()
}

DATA: Options = {
    "--data": option(str, "digits", "name of a data set, or path of a file or image folder"),
    "--data_root": option(str, "data", "folder where the named data sets are kept"),
    "--transform": option(
        str, "auto", "auto, none, threshold, static, dynamic, dequantise, rescale or standardise"
    ),
    "--validation": option(int | float | None, None, "number or share of validation rows"),
    "--split_seed": option(int, 0, "seed of the split and of noise that is drawn once"),
    "--conditional": option(bool, False, "condition the model on y, or else on the labels"),
    "--schema": option(dict | None, None, "kinds of a table's columns, {COLUMN: KIND}"),
    "--limit": option(int | None, None, "use at most this many rows of each part"),
}
MODEL: Options = {
    "--latent_dim": option(
        int | list[int], 20, "number of latents; for several layers, from the data up: [40,40]"
    ),
    "--hierarchy": option(
        str | None, None, "how several layers are inferred: TopDown, BottomUp or Ladder"
    ),
    "--skip": option(bool, False, "let p(x | z) see all layers, not only the lowest"),
    "--classes": option(
        int, 0, "number of classes; an unknown label is -1; 0: a model without classes"
    ),
    "--label_weight": option(float, 0.0, "weight of the gradient of log p(label | x)"),
    "--classifier": option(bool, False, "train a network q(label | x) beside the model"),
    "--missing": option(bool | None, None, "allow missing values; null: if the data have some"),
}
SPEED: Options = {
    "--matmul": option(
        Literal["highest", "high", "medium"],
        "highest",
        "precision of float32 matrix products; high and medium may round to bfloat16",
    ),
    "--threads": option(int | None, None, "most threads of a process; a small model uses one"),
}
IMPORT: Options = {
    "--import": option(str | None, None, "Python module that defines your own classes"),
}
TRAINING: Options = {
    "--epochs": option(int, 100, "passes over the training part"),
    "--batch_size": option(int, 100, "rows in a step"),
    "--optimizer": option(str | dict, "Adam", "name of a class of torch.optim"),
    "--lr": option(float, 1e-3, "learning rate"),
    "--schedule": option(str | dict | None, None, "name of a class of torch.optim.lr_scheduler"),
    "--clip_norm": option(float | None, None, "clip the norm of the gradient to this"),
    "--patience": option(int | None, None, "stop after this many epochs without a better bound"),
    "--seed": option(int, 0, "seed of weights, order of rows and noise"),
    "--seeds": option(int, 1, "train this many runs, with seeds from --seed on"),
    "--devices": option(
        int, 1, "number of GPUs, or of CPU processes; with --seeds, runs at a time"
    ),
    "--accelerator": option(str, "auto", "auto, cpu or cuda; auto: a GPU if there is one"),
    "--precision": option(str, "32-true", "32-true, 64-true, bf16-mixed or 16-mixed"),
    **SPEED,
    "--compile": option(
        bool | Literal["trace"] | None, None, "compile steps; null: if training is long"
    ),
    "--tensorboard": option(bool, False, "also log for TensorBoard; needs pyro-vae[tensorboard]"),
    "--progress": option(bool, True, "show a progress bar"),
    "--run": option(str | None, None, "new folder for the run; null: runs/NAME-n"),
    "--resume": option(str | None, None, "folder of a run to continue"),
    **IMPORT,
    "--config": option(str | None, None, "YAML file of these options"),
    "--print_config": option(bool, False, "print these options as YAML"),
}
ROOT: Options = {
    "--data_root": option(str | None, None, "folder of the named data sets, if not the run's own"),
    **IMPORT,
}
RUN: Options = {"run": {"help": "folder of a run"}, **ROOT}
FILE: Options = {**RUN, "file": {"help": "table, .npz or .npy file, or a folder of images"}}
JSON: Options = {"--json": {"action": "store_true", "help": "print JSON, and no progress"}}
PART: Options = {
    "--part": option(Literal["test", "validation", "train"], "test", "part of the data to use"),
    "--limit": option(int | None, 1000, "number of rows, spread over the part; null: all"),
}
SEEDED: Options = {
    "--seed": option(int, 0, "seed of all draws"),
    "--progress": option(bool, True, "show a progress bar"),
}
COMPUTE: Options = {
    "--chunk_size": option(int | None, None, "draws x rows in one pass; chosen if not given"),
    "--devices": option(int, 1, "number of GPUs, or of CPU processes, that share the rows"),
    "--accelerator": option(Literal["auto", "cpu", "cuda"], "auto", "auto: a GPU if there is one"),
    **SPEED,
    "--compile": option(bool, False, "compile the model: pays for some hundred rows"),
    **SEEDED,
}
ESTIMATE: Options = {
    "--tolerance": option(float, 0.05, "largest standard error of a reliable row, nats"),
    **COMPUTE,
}


def out(help: str) -> Options:
    """Returns the option that names the file to write."""
    return {"--out": option(str | None, None, help)}


class Command(NamedTuple):
    """A command of `pyro-vae`.

    Args:
        function: The module of this package and the function in it that runs the command.
        help: What the command does, in a line.
        options: The arguments of its parser.
        example: Arguments of an example call.
    """

    function: str
    help: str
    options: Options
    example: str = ""

    def about(self, name: str) -> dict[str, Any]:
        """Returns usage, description and example, as arguments of a parser."""
        named = [key.upper() for key in self.options if not key.startswith("--")]
        return {
            "usage": " ".join(["pyro-vae", name, *named, "[options]"]),
            "description": f"{self.help[0].upper()}{self.help[1:]}.",
            "epilog": f"example: pyro-vae {name} {self.example}" if self.example else None,
        }


COMMANDS = {
    "demo": Command(
        "train.demo",
        "train on bundled digits, evaluate and draw figures in three minutes",
        {"--run": option(str | None, None, "new folder of the run")},
    ),
    "train": Command(
        "train.train",
        "train a VAE on a data set, file or image folder; write a run folder",
        {**DATA, **MODEL, **TRAINING, **PARTS},
    ),
    "evaluate": Command(
        "evaluate.evaluate",
        "estimate log p(x) and its error; print ELBO, KL and active units",
        {
            **RUN,
            **JSON,
            **PART,
            **ESTIMATE,
            "--num_samples": option(
                int | None, None, "also print the bound by this many draws of the encoder"
            ),
            "--elbo_samples": option(int, 100, "number of draws for the ELBO"),
        },
        example="runs/mnist-1 --limit 200 --json",
    ),
    "score": Command(
        "score.score",
        "write log p(x), its error and verdict for each row of a file",
        {
            **FILE,
            **out(".csv file to write"),
            "--columns": option(bool, False, "also log p of each value given the others"),
            "--num_samples": option(
                int | None,
                None,
                "draws of the encoder, for a cheap lower bound; null: log_evidence",
            ),
            "--p_values": option(int, 0, "also rank rows among N held-out and N simulated ones"),
            **ESTIMATE,
        },
        example="runs/mnist-1 new.npz --out scores.csv",
    ),
    "compare": Command(
        "compare.compare",
        "compare log p(x) of runs row by row on the same data",
        {
            "runs": {"nargs": "+", "help": "folders of two or more runs"},
            **JSON,
            **ROOT,
            **PART,
            **ESTIMATE,
        },
        example="runs/mnist-1 runs/mnist-2 --limit 200",
    ),
    "sample": Command(
        "use.sample",
        "draw rows from a run's model, as a picture and an .npz file",
        {
            **RUN,
            "--size": option(int, 100, "number of draws"),
            "--mean": option(bool, False, "write the mean E[x | z] at drawn z, not draws of x"),
            "--label": option(
                str | None, None, "class to draw: its name in the file, or else its number"
            ),
            "--seed": option(int, 0, "seed of the draws"),
            **out(".npz file, or .csv for tables; default RUN/samples.npz or .csv"),
        },
        example="runs/mnist-1 --size 64 --mean",
    ),
    "encode": Command(
        "use.encode",
        "write posterior means and scales of a file's rows",
        {**FILE, **out(".npz or .csv file to write")},
        example="runs/mnist-1 new.npz --out codes.csv",
    ),
    "impute": Command(
        "use.impute",
        "fill in the missing values of a file, and write files of draws",
        {
            **RUN,
            "file": {"help": ".npz, .npy or .csv file"},
            **out("file to write, of the same kind"),
            "--draws": option(int, 20, "number of further files, each filled in by another draw"),
            "--num_samples": option(
                int | None,
                None,
                "draws of the encoder, such as 200: faster; null: a fitted proposal",
            ),
            **COMPUTE,
        },
        example="runs/people-1 new.csv --draws 5",
    ),
    "classify": Command(
        "use.classify",
        "write the class of each row of a file, with probabilities",
        {
            **FILE,
            "--num_samples": option(
                int | None, 100, "draws of the encoder for each class; null: log_evidence, slower"
            ),
            **SEEDED,
            **out(".csv file to write; default FILE.classes.csv"),
        },
        example="runs/few new.csv --out classes.csv",
    ),
    "plot": Command("figures.plot", "draw the figures of a run again", RUN),
    "report": Command(
        "report.report",
        "write an HTML page of a run: configuration, curves, numbers, figures",
        {**RUN, **out(".html file to write; default RUN/report.html")},
        example="runs/mnist-1 --out report.html",
    ),
    "explore": Command(
        "explore.command",
        "write an HTML page that runs the decoder at any latent or row",
        {
            **RUN,
            **out(".html file to write; default RUN/explore.html"),
            "--no_data": {
                "action": "store_true",
                "help": "leave the rows themselves out of the page",
            },
            "--judged": option(
                int, 50, "number of rows to estimate log p(x) of, if evaluate has not"
            ),
            **PART,
            **ESTIMATE,
        },
        example="runs/mnist-1 --out explore.html --no-data",
    ),
}

TRAIN_HELP = """\
usage: pyro-vae train [options]

Trains a VAE and writes a run folder.

examples:
  pyro-vae train --data mnist --prior VampPrior --prior.num-components 500
  pyro-vae train --data wine.csv --likelihood Normal --likelihood.scale learned
  pyro-vae train --resume runs/mnist-1 --epochs 200

data:
  --data NAME or PATH   digits, mnist, ..., a file or image folder [digits]
  --transform NAME      how values are prepared; chosen to fit the likelihood
  --validation N        number or share of validation rows
  --limit N             use at most this many rows of each part
  --conditional         condition the model on y, or else on the labels

model: choose classes; their options are --prior.OPTION (--prior.help CLASS)
  --prior CLASS         ConditionalNormal, FlowPrior, Laplace,
                        MixtureOfGaussians, Normal, NormalPerClass,
                        StandardNormal, StudentT, VampPrior
  --likelihood CLASS    Bernoulli, Beta, Categorical, Columns,
                        ContinuousBernoulli, DiscretizedLogistic, Laplace,
                        LogNormal, MixtureOfLogistics, NegativeBinomial, Normal,
                        Ordinal, Poisson, StudentT
  --posterior CLASS     DiagonalNormal, FlowPosterior, FullNormal
  --encoder, --decoder  Conv, ConvTranspose, GatedMLP, MLP, ResNet,
                        ResNetTranspose
  --objective CLASS     BetaTC, CIWAE, Capacity, DIP, DReG, ELBO, FactorVAE,
                        FreeBits, HierarchicallyFactorized, IWAE, InfoVAE,
                        MIWAE, PIWAE, Renyi, StickingTheLanding
  --hierarchy CLASS     BottomUp, Ladder, TopDown
  --latent-dim N        number of latents; of several layers "[40,40]" [20]

training:
  --epochs N            [100]           --lr X             learning rate [0.001]
  --batch-size N        [100]           --optimizer NAME   of torch.optim [Adam]
  --patience N          stop after N epochs without a better validation bound
  --seed N              [0]             --devices N        GPUs or processes [1]
  --seeds N             train N runs with different seeds
  --compile             compile the step; --compile=trace, --no-compile: less

run:
  --run FOLDER          new folder for the run [runs/NAME-n]
  --resume FOLDER       continue a run
  --config FILE         read options from YAML; --print-config prints them
  --no-progress         show no progress bar

Option names take - or _. To list all options: pyro-vae train --help-all
"""


PATHS = {"--out": "FILE", "--run": "FOLDER", "--data_root": "FOLDER"}  # words in the help


def help_of(name: str) -> str:
    """Returns the help of a command, in 50 lines of 80 columns; of `train`, the main options."""
    from argparse import ArgumentParser

    command = COMMANDS[name]
    if name == "train":
        return TRAIN_HELP
    parser = ArgumentParser(**command.about(name))
    for key, settings in command.options.items():
        kind, default = settings.get("type"), settings.get("default")
        default_text = "" if isinstance(default, bool | None) else f" [{str(default).lower()}]"
        arguments: dict[str, Any] = {k: settings[k] for k in ("action", "nargs") if k in settings}
        if kind in (bool, bool | None):
            arguments = {"action": "store_true"}
        elif get_origin(kind) is Literal:
            arguments = {"choices": get_args(kind)}
        elif key.startswith("--") and not arguments:
            metavar = "X" if kind is float else "N" if "int" in str(kind) else "NAME"
            arguments = {"metavar": PATHS.get(key, metavar)}
        flag = key.replace("_", "-") if key.startswith("--") else key
        text = settings.get("help", "") + default_text
        if default is True:
            flag, text = flag.replace("--", "--no-"), f"do not {text}"
        parser.add_argument(flag, help=text, **arguments)
    return parser.format_help()


def completion() -> str:
    """Returns a script for bash (zsh: bashcompinit) that completes commands, options and files."""
    cases = ""
    for name, command in COMMANDS.items():
        flags = [key.replace("_", "-") for key in command.options if key.startswith("--")]
        cases += f"    {name}) words='{' '.join(flags)}';;\n"
    return f"""\
_pyro_vae() {{
  local words='{" ".join(COMMANDS)}' word=${{COMP_WORDS[COMP_CWORD]}}
  if (( COMP_CWORD > 1 )); then case ${{COMP_WORDS[1]}} in
{cases}  esac; fi
  [[ $word != -* ]] && (( COMP_CWORD > 1 )) && words=
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _pyro_vae pyro-vae
"""
