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
    "--data_root": option(str, "data", "folder of the named data sets"),
    "--transform": option(
        str, "auto", "auto, none, threshold, static, dynamic, dequantise, rescale or standardise"
    ),
    "--validation": option(int | float | None, None, "number or share of rows held out"),
    "--split_seed": option(int, 0, "seed of the split and of fixed noise"),
    "--conditional": option(bool, False, "condition on labels or on y"),
    "--schema": option(dict | None, None, "kinds of columns of a table, by name"),
    "--limit": option(int | None, None, "at most this many rows of each part, spread over it"),
}
MODEL: Options = {
    "--latent_dim": option(
        int | list[int], 20, "latent size D, or of each layer from the data upwards, [40,40]"
    ),
    "--hierarchy": option(
        str | None, None, "order of inference of several layers: TopDown, BottomUp or Ladder"
    ),
    "--skip": option(bool, False, "let p(x | z) see all layers of several"),
    "--classes": option(
        int, 0, "number of classes, known for some rows (label -1 elsewhere) or none; 0: none"
    ),
    "--label_weight": option(float, 0.0, "weight of the gradient of log p(label | x)"),
    "--classifier": option(bool, False, "train a classifier q(label | x) beside the model"),
    "--missing": option(
        bool | None, None, "whether rows may lack values; null: if some of the data do"
    ),
}
SPEED: Options = {
    "--matmul": option(
        Literal["highest", "high", "medium"],
        "highest",
        "precision of float32 matrix products: the others may round to bfloat16",
    ),
    "--threads": option(int | None, None, "threads of each process; torch chooses if not given"),
}
IMPORT: Options = {
    "--import": option(str | None, None, "Python module that defines your own classes"),
}
TRAINING: Options = {
    "--epochs": option(int, 100, "passes over the training part"),
    "--batch_size": option(int, 100, "rows of a step"),
    "--optimizer": option(str | dict, "Adam", "of torch.optim, by name"),
    "--lr": option(float, 1e-3, "learning rate"),
    "--schedule": option(str | dict | None, None, "of torch.optim.lr_scheduler"),
    "--clip_norm": option(float | None, None, "largest norm of the gradient"),
    "--patience": option(int | None, None, "stop after so many epochs without a better bound"),
    "--seed": option(int, 0, "of weights, order and noise"),
    "--seeds": option(int, 1, "number of runs, from --seed on, whose spread compare shows"),
    "--devices": option(
        int, 1, "number of GPUs, or of processes without one; with --seeds, runs at a time"
    ),
    "--accelerator": option(str, "auto", "auto, cpu or cuda; auto: a GPU where there is one"),
    "--precision": option(str, "32-true", "32-true, 64-true, bf16-mixed or 16-mixed"),
    **SPEED,
    "--compile": option(bool | None, None, "compile the step; if training is long"),
    "--tensorboard": option(bool, False, "also log for TensorBoard; needs pyro-vae[tensorboard]"),
    "--progress": option(bool, True, "show a progress bar"),
    "--run": option(str | None, None, "new folder of the run; runs/NAME-n"),
    "--resume": option(str | None, None, "folder of a run to go on with"),
    **IMPORT,
    "--config": option(str | None, None, "YAML file of these options"),
    "--print_config": option(bool, False, "print these options as YAML"),
}
ROOT: Options = {
    "--data_root": option(str | None, None, "folder of the named data sets; the run's"),
    **IMPORT,
}
RUN: Options = {"run": {"help": "folder of a run"}, **ROOT}
FILE: Options = {**RUN, "file": {"help": "table, .npz or .npy file, or a folder of images"}}
JSON: Options = {"--json": {"action": "store_true", "help": "print JSON, and no progress"}}
PART: Options = {
    "--part": option(Literal["test", "validation", "train"], "test", "of the data"),
    "--limit": option(int | None, 1000, "rows, spread over the part; null for all"),
}
SEEDED: Options = {
    "--seed": option(int, 0, "of all draws"),
    "--progress": option(bool, True, "show a progress bar"),
}
WORK: Options = {
    "--chunk_size": option(int | None, None, "draws x rows in one pass of the model; null: 1000"),
    "--devices": option(int, 1, "number of GPUs, or of processes, that share the rows"),
    "--accelerator": option(
        Literal["auto", "cpu", "cuda"], "auto", "auto: a GPU where there is one"
    ),
    **SPEED,
    "--compile": option(bool, False, "compile what is repeated"),
    **SEEDED,
}
ESTIMATE: Options = {
    "--tolerance": option(float, 0.05, "largest standard error, nats"),
    **WORK,
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
        "train on bundled digits, evaluate, draw figures: three minutes",
        {"--run": option(str | None, None, "new folder of the run")},
    ),
    "train": Command(
        "train.train",
        "train a VAE on a data set, file or image folder; leaves a run folder",
        {**DATA, **MODEL, **TRAINING, **PARTS},
    ),
    "evaluate": Command(
        "evaluate.evaluate",
        "log p(x) with its error, ELBO, KL, active units of a run",
        {
            **RUN,
            **JSON,
            **PART,
            **ESTIMATE,
            "--num_samples": option(
                int | None, None, "draws K of the encoder's own bound; null: leave it out"
            ),
            "--elbo_samples": option(int, 100, "draws for the ELBO"),
        },
        example="runs/mnist-1 --limit 200 --json",
    ),
    "score": Command(
        "score.score",
        "log p(x), error and verdict of each row of a file, as CSV",
        {
            **FILE,
            **out(".csv file"),
            "--columns": option(bool, False, "also log p of each value, given the others"),
            "--num_samples": option(
                int | None, None, "draws of the encoder, a cheap lower bound; null: log_evidence"
            ),
            "--p_values": option(int, 0, "also rank rows among N held-out ones and N drawn ones"),
            **ESTIMATE,
        },
        example="runs/mnist-1 new.npz --out scores.csv",
    ),
    "compare": Command(
        "compare.compare",
        "paired differences of log p(x) of runs on the same data",
        {
            "runs": {"nargs": "+", "help": "folders of two runs or more"},
            **JSON,
            **ROOT,
            **PART,
            **ESTIMATE,
        },
        example="runs/mnist-1 runs/mnist-2 --limit 200",
    ),
    "sample": Command(
        "use.sample",
        "draws of a run's model, as a picture and an .npz file",
        {
            **RUN,
            "--size": option(int, 100, "number of draws"),
            "--mean": option(bool, False, "E[x | z] of drawn z instead of draws of x"),
            "--label": option(int | None, None, "class, for a conditional model"),
            "--seed": option(int, 0, "of the draws"),
            **out(".npz file, RUN/samples.npz; .csv of tables"),
        },
        example="runs/mnist-1 --size 64 --mean",
    ),
    "encode": Command(
        "use.encode",
        "posterior means and scales of a file's rows, as .npz or .csv",
        {**FILE, **out(".npz or .csv file")},
        example="runs/mnist-1 new.npz --out codes.csv",
    ),
    "impute": Command(
        "use.impute",
        "a file with its missing values filled in, and files of draws of them",
        {
            **RUN,
            "file": {"help": ".npz, .npy or .csv file"},
            **out("file of the same kind"),
            "--draws": option(int, 20, "more files, each filled in by another draw; 0: none"),
            "--num_samples": option(
                int | None, None, "draws of the encoder, such as 200: faster; null: refined ones"
            ),
            **WORK,
        },
        example="runs/people-1 new.csv --draws 5",
    ),
    "classify": Command(
        "use.classify",
        "class of each row of a file, with probabilities, as .csv",
        {
            **FILE,
            "--num_samples": option(
                int | None, 100, "draws of the encoder for each class; null: log_evidence, slower"
            ),
            **SEEDED,
            **out(".csv file; FILE.classes.csv"),
        },
        example="runs/few new.csv --out classes.csv",
    ),
    "plot": Command("figures.plot", "the figures of a run again", RUN),
    "report": Command(
        "report.report",
        "one HTML page of a run: configuration, curves, numbers, figures",
        {**RUN, **out(".html file; RUN/report.html")},
        example="runs/mnist-1 --out report.html",
    ),
    "explore": Command(
        "explore.command",
        "one HTML page that runs the decoder: move in latent space, pick data",
        {
            **RUN,
            **out(".html file; RUN/explore.html"),
            "--no_data": {"action": "store_true", "help": "leave the rows themselves out"},
            "--judged": option(
                int, 50, "rows whose log p(x) is estimated where evaluate has not done so"
            ),
            **PART,
            **ESTIMATE,
        },
        example="runs/mnist-1 --out explore.html --no-data",
    ),
}

TRAIN_HELP = """\
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
  --latent-dim N        latent size, or of several layers, "[40,40]" [20]

training:
  --epochs N            [100]           --lr X             learning rate [0.001]
  --batch-size N        [100]           --optimizer NAME   of torch.optim [Adam]
  --patience N          end after N epochs without a better validation bound
  --seed N              [0]             --devices N        GPUs or processes [1]
  --seeds N             runs from N seeds, whose spread compare shows
  --compile             compile the step; --no-compile: never

run:
  --run FOLDER          new folder of the run [runs/NAME-n]
  --resume FOLDER       go on with a run
  --config FILE         options from YAML; --print-config writes them
  --no-progress         no progress bar

Options may be written with - or _. All of them: pyro-vae train --help-all
"""


PATHS = {"--out": "FILE", "--run": "FOLDER", "--data_root": "FOLDER"}


def help_of(name: str) -> str:
    """Returns the help of a command, in 50 lines of 80 columns; of `train`, the main options."""
    from argparse import ArgumentParser

    command = COMMANDS[name]
    if name == "train":
        return TRAIN_HELP
    parser = ArgumentParser(**command.about(name))
    for key, settings in command.options.items():
        kind, default = settings.get("type"), settings.get("default")
        told = "" if isinstance(default, bool | None) else f" [{str(default).lower()}]"
        shown: dict[str, Any] = {k: settings[k] for k in ("action", "nargs") if k in settings}
        if kind in (bool, bool | None):
            shown = {"action": "store_true"}
        elif get_origin(kind) is Literal:
            shown = {"choices": get_args(kind)}
        elif key.startswith("--") and not shown:
            plain = "X" if kind is float else "N" if "int" in str(kind) else "NAME"
            shown = {"metavar": PATHS.get(key, plain)}
        spelled = key.replace("_", "-") if key.startswith("--") else key
        said = settings.get("help", "") + told
        if default is True:
            spelled, said = spelled.replace("--", "--no-"), f"do not {said}"
        parser.add_argument(spelled, help=said, **shown)
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
