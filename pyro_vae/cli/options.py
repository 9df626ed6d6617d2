"""The options of each command, by jsonargparse; names are checked before it imports anything."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

from pyro_vae import config
from pyro_vae.files import reading

__all__ = [
    "PARSERS",
    "check_names",
    "check_options",
    "data_options",
    "import_modules",
    "values",
    "with_configs",
]

DEFAULTS = {
    "prior": "StandardNormal",
    "likelihood": "Bernoulli",
    "posterior": "DiagonalNormal",
    "encoder": "MLP",
    "decoder": "MLP",
    "objective": "ELBO",
}
USAGES = {"train": "", "demo": "", "compare": "RUN RUN"} | dict.fromkeys(
    ("score", "encode", "impute", "classify"), "RUN FILE"
)
EXAMPLES = {
    "evaluate": "runs/mnist-1 --limit 200 --json",
    "score": "runs/mnist-1 new.npz --out scores.csv",
    "compare": "runs/mnist-1 runs/mnist-2 --limit 200",
    "sample": "runs/mnist-1 --size 64 --mean",
    "encode": "runs/mnist-1 new.npz --out codes.csv",
    "report": "runs/mnist-1 --out report.html",
    "explore": "runs/mnist-1 --out explore.html --no-data",
}
LARGEST = 10_000  # values of a configuration
NOT_IN_FILES = ("config", "run", "resume", "import")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """What a configuration file says.

    Raises:
        ValueError: If it cannot be read, or does not hold options.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"configuration {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"configuration {path} cannot be read: {error}") from error
    if not isinstance(content, dict | None):
        raise ValueError(
            f"configuration {path} must hold lines of option: value; got a "
            f"{type(content).__name__}"
        )
    if not _is_small(content):
        raise ValueError(f"configuration {path} holds more than {LARGEST} values, or itself")
    return content or {}


def _is_small(content: Any) -> bool:
    """Whether a parser can walk through it: an alias in YAML may stand for billions of values."""
    count, left = 0, [content]
    while left and count < LARGEST:
        value = left.pop()
        count += 1
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
    return not left


def data_options(path: Path) -> Namespace:
    """The options of the data in a run's configuration, of their types."""
    parser = _parser("train", "")
    _data_options(parser)
    content = read_yaml(path)
    return _typed(path, {k: v for k, v in content.items() if k in _known(parser)}, parser)


def import_modules(argv: list[str]) -> None:
    """Imports the modules named by `--import`, so that their classes are known by name."""
    for name in values(argv, "--import"):
        if os.getcwd() not in sys.path:  # a console script does not look where it is started
            sys.path.insert(0, os.getcwd())
        import_module(name)


def with_configs(argv: list[str], parser: ArgumentParser) -> list[str]:
    """The arguments, with the content of configuration files before all others, which then win."""
    first: list[str] = []
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, path = argument.partition("=")
        given = [path] if equals else list(islice(arguments, name == "--config"))
        if name == "--config" and given:
            first += [name, yaml.safe_dump(_read_config(given[0], parser))]
        else:
            rest.append(argument)
    return [*first, *rest]


def check_options(parser: ArgumentParser, argv: list[str]) -> None:
    """Refuses options that the command does not have, with the closest that it has."""
    known = _known(parser) | {"help", "config", "print_config"}
    for argument in argv:
        name = argument.partition("=")[0].partition(".")[0]
        if name.startswith("--") and name[2:] not in known:
            options = [f"--{option}" for option in known]
            raise ValueError(
                f"there is no option {name}{config.closest(name, options)}: see "
                f"{parser.prog} --help"
            )


def check_names(argv: list[str]) -> None:
    """Refuses unknown classes and options, with the closest known ones.

    jsonargparse imports a class path before it refuses it, so that only names of classes that
    are known reach it, from the checked configurations and from the other arguments.

    Raises:
        ValueError: If a name on the command line is unknown.
    """
    declared: dict[str, Any] = dict(DEFAULTS)
    for text in values(argv, "--config"):
        declared |= yaml.safe_load(text)
    for family in DEFAULTS:
        given = declared[family]
        named = [given if isinstance(given, str) else given["class_path"]]
        keys = [f"--{family}{key}" for key in ("", ".class_path", ".help")]
        for name in [*named, *(name for key in keys for name in values(argv, key))]:
            cls = config.named_class(family, name)
        for key in {a.partition("=")[0] for a in argv if a.startswith(f"--{family}.")}:
            for value in values(argv, key) if key not in keys else ():
                _check_option(family, cls, key, value)


def values(argv: list[str], option: str) -> list[str]:
    """What an option is set to on the command line, each time."""
    pairs = [argument.partition("=") for argument in argv]
    return [
        value if equals else argv[i + 1]
        for i, (key, equals, value) in enumerate(pairs)
        if key == option and (equals or i + 1 < len(argv))
    ]


def _check_option(family: str, cls: type, key: str, text: str) -> None:
    """Whether a class has the option of a key such as --prior.num_components, or part of it."""
    option, *rest = key.removeprefix(f"--{family}.").removeprefix("init_args.").split(".")
    config.check_options(family, cls, [option])
    if not rest:
        config.check_value(cls, option, _loaded(text))
    elif rest in (["class_path"], ["help"]):
        config.check_value(cls, option, text)
    elif rest[:-1] not in ([], ["init_args"]) or rest[-1] in ("class_path", "help"):
        raise ValueError(f"there is no option {key}: see pyro-vae train --help")


def _loaded(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _parser(name: str, description: str) -> ArgumentParser:
    return ArgumentParser(
        prog=f"pyro-vae {name}",
        usage=f"pyro-vae {name} {USAGES.get(name, 'RUN')} [options]",
        epilog=f"example: pyro-vae {name} {EXAMPLES[name]}" if name in EXAMPLES else None,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )


def _read_config(path: str, parser: ArgumentParser) -> dict[str, Any]:
    """The options of a configuration file, each known, its classes too."""
    content, known = read_yaml(path), _known(parser)
    for key in content:
        if key not in known or (key in NOT_IN_FILES and content[key] is not None):
            raise ValueError(
                f"configuration {path} cannot set {key!r}{config.closest(str(key), known)}: "
                f"see {parser.prog} --help"
            )
    with reading(path):
        for family in DEFAULTS.keys() & content.keys():
            config.component(family, content[family])
    _typed(path, content, parser)
    return content


def _typed(path: str | Path, content: dict[str, Any], parser: ArgumentParser) -> Namespace:
    """The options of a file, each of its type; jsonargparse itself takes null for any."""
    defaults = parser.get_defaults()
    with reading(path):
        for key, value in content.items():
            if value is None and defaults[key] is not None:
                raise ValueError(f"{key} cannot be null: leave it out for {defaults[key]!r}")
        try:
            return parser.parse_object(content)
        except ArgumentError as error:
            raise ValueError(str(error)) from error


def _known(parser: ArgumentParser) -> set[str]:
    return {key.partition(".")[0] for key in parser.get_defaults().keys()}


def _train_parser() -> ArgumentParser:
    parser = _parser("train", "Trains a declared VAE.")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of these options")
    _data_options(parser)
    parser.add_argument(
        "--latent_dim",
        type=int | list[int],
        default=20,
        help="latent size D, or of each layer from the data upwards, [40,40]",
    )
    parser.add_argument(
        "--hierarchy",
        type=str | None,
        default=None,
        help="order of inference of several layers: TopDown, BottomUp or Ladder",
    )
    parser.add_argument(
        "--skip", type=bool, default=False, help="let p(x | z) see all layers of several"
    )
    parser.add_argument("--classes", type=int, default=0, help="number of classes, of which "
        "labels are known for some rows (-1 elsewhere) or none; 0: no classes")  # fmt: skip
    parser.add_argument("--label_weight", type=float, default=0.0, help="weight of the gradient "
        "of log p(label | x)")  # fmt: skip
    for family, default in DEFAULTS.items():
        base = config.BASES[family]
        parser.add_subclass_arguments(
            base, family, skip=config.INJECTED, default={"class_path": default}, required=False
        )
    _training_options(parser)
    return parser


def _data_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        type=str,
        default="digits",
        help="name of a data set, or path of a file or image folder",
    )
    add("--data_root", type=str, default="data", help="folder of the named data sets")
    add("--transform", type=str, default="auto", help="none, threshold, static, dynamic, "
        "dequantise, rescale or standardise; auto fits the likelihood")  # fmt: skip
    add("--validation", type=int | float | None, default=None, help="rows or share held out")
    add("--split_seed", type=int, default=0, help="of the split and of fixed noise")
    add("--conditional", type=bool, default=False, help="condition on labels or on y")
    add("--schema", type=dict | None, default=None, help="kinds of columns of a table, by name")
    add(
        "--limit",
        type=int | None,
        default=None,
        help="at most this many rows of each part, spread over it",
    )


def _training_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--epochs", type=int, default=100, help="passes over the training part")
    add("--batch_size", type=int, default=100)
    add("--optimizer", type=str | dict, default="Adam", help="of torch.optim, by name")
    add("--lr", type=float, default=1e-3, help="learning rate")
    add("--schedule", type=str | dict | None, default=None, help="of torch.optim.lr_scheduler")
    add("--clip_norm", type=float | None, default=None, help="greatest norm of all gradients")
    add("--patience", type=int | None, default=None, help="epochs without a better bound")
    add("--seed", type=int, default=0)
    add("--devices", type=int, default=1, help="GPUs, or processes where there is none")
    add("--accelerator", type=str, default="auto")
    add("--precision", type=str, default="32-true")
    _speed_options(parser)
    add("--compile", type=bool | None, default=None, help="compile the step; if training is long")
    add("--tensorboard", type=bool, default=False, help="also log for TensorBoard")
    add("--progress", type=bool, default=True, help="show a progress bar")
    add("--run", type=str | None, default=None, help="new folder of the run; runs/NAME-n")
    add("--resume", type=str | None, default=None, help="folder of a run to go on with")
    add("--import", type=str | None, default=None, help="module that defines classes of yours")


def _speed_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--matmul", default="highest", choices=["highest", "high", "medium"],
        help="precision of float32 matrix products: the others may round to bfloat16")  # fmt: skip
    add("--threads", type=int | None, default=None, help="of each process; torch's own choice")


def _run_parser(name: str, description: str) -> ArgumentParser:
    parser = _parser(name, description)
    parser.add_argument("run", help="folder of a run")
    _root_option(parser)
    parser.add_argument("--import", type=str | None, default=None)
    return parser


def _root_option(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data_root",
        type=str | None,
        default=None,
        help="folder of the named data sets; the run's",
    )


def _demo_parser() -> ArgumentParser:
    parser = _parser("demo", "Trains on the bundled digits.")
    parser.add_argument("--run", type=str | None, default=None, help="new folder of the run")
    return parser


def _evaluate_parser() -> ArgumentParser:
    parser = _run_parser("evaluate", "log p(x) of held-out data, with its error.")
    _json_option(parser)
    _part_options(parser)
    _estimator_options(parser)
    add = parser.add_argument
    add("--num_samples", type=int, default=5000, help="draws K of the encoder's own bound")
    add("--elbo_samples", type=int, default=100, help="draws for the ELBO")
    return parser


def _score_parser() -> ArgumentParser:
    parser = _run_parser("score", "log p(x) of each row of a file, with error and verdict.")
    parser.add_argument("file", help="table, .npz or .npy file, or a folder of images")
    parser.add_argument("--out", type=str | None, default=None, help=".csv file")
    parser.add_argument(
        "--columns",
        type=bool,
        default=False,
        help="also log p of each value, given the others",
    )
    _estimator_options(parser)
    return parser


def _compare_parser() -> ArgumentParser:
    parser = _parser("compare", "log p(x) of runs on the same rows, and differences.")
    parser.add_argument("runs", nargs="+", help="folders of two runs or more")
    _json_option(parser)
    _root_option(parser)
    parser.add_argument("--import", type=str | None, default=None)
    _part_options(parser)
    _estimator_options(parser)
    return parser


def _json_option(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, and no progress")


def _part_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--part", default="test", choices=["test", "validation", "train"])
    add("--limit", type=int | None, default=1000, help="rows, spread over the part; null for all")


def _estimator_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--tolerance", type=float, default=0.05, help="largest standard error, nats")
    _work_options(parser)


def _work_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--chunk_size", type=int | None, default=None, help="draws times rows that the model "
        "sees at once; null: 1000, for the cache of a CPU")  # fmt: skip
    add("--devices", type=int, default=1, help="GPUs, or processes, that share the rows")
    add("--accelerator", default="auto", choices=["auto", "cpu", "cuda"],
        help="auto: a GPU where there is one")  # fmt: skip
    _speed_options(parser)
    add("--compile", type=bool, default=False, help="compile what is repeated")
    add("--seed", type=int, default=0)
    add("--progress", type=bool, default=True, help="show a progress bar")


def _sample_parser() -> ArgumentParser:
    parser = _run_parser("sample", "Draws of a run's model.")
    add = parser.add_argument
    add("--size", type=int, default=100)
    add("--mean", type=bool, default=False, help="E[x | z] of drawn z instead of draws of x")
    add("--label", type=int | None, default=None, help="class, for a conditional model")
    add("--seed", type=int, default=0)
    add("--out", type=str | None, default=None, help=".npz file, RUN/samples.npz; .csv of tables")
    return parser


def _encode_parser() -> ArgumentParser:
    parser = _run_parser("encode", "Posterior means and scales of a file's rows.")
    parser.add_argument("file", help="table, .npz or .npy file, or a folder of images")
    parser.add_argument("--out", type=str | None, default=None, help=".npz or .csv file")
    return parser


def _impute_parser() -> ArgumentParser:
    parser = _run_parser("impute", "A file with its missing values filled in, and draws of them.")
    parser.add_argument("file", help=".npz, .npy or .csv file")
    parser.add_argument("--out", type=str | None, default=None, help="file of the same kind")
    parser.add_argument("--draws", type=int, default=20, help="files of draws beside it; 0: none")
    _work_options(parser)
    return parser


def _classify_parser() -> ArgumentParser:
    parser = _run_parser("classify", "The class of each row of a file, with probabilities.")
    add = parser.add_argument
    add("file", help=".npz, .npy or .csv file, or a folder of images")
    add("--num_samples", type=int | None, default=100, help="draws of the encoder for each row "
        "and class; null: log_evidence, which is slower and judged")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--progress", type=bool, default=True, help="show a progress bar")
    add("--out", type=str | None, default=None, help=".csv file; FILE.classes.csv")
    return parser


def _plot_parser() -> ArgumentParser:
    return _run_parser("plot", "The figures of a run again.")


def _report_parser() -> ArgumentParser:
    parser = _run_parser("report", "One HTML page of a run.")
    parser.add_argument("--out", type=str | None, default=None, help=".html file; RUN/report.html")
    return parser


def _explore_parser() -> ArgumentParser:
    parser = _run_parser("explore", "One HTML page that runs a run's decoder.")
    add = parser.add_argument
    add("--out", type=str | None, default=None, help=".html file; RUN/explore.html")
    add("--no_data", action="store_true", help="leave the rows themselves out")
    add("--judged", type=int, default=50, help="rows whose log p(x) is estimated where evaluate "
        "has not done so")  # fmt: skip
    _part_options(parser)
    _estimator_options(parser)
    return parser


PARSERS: dict[str, Callable[[], ArgumentParser]] = {
    "demo": _demo_parser,
    "train": _train_parser,
    "evaluate": _evaluate_parser,
    "score": _score_parser,
    "compare": _compare_parser,
    "sample": _sample_parser,
    "encode": _encode_parser,
    "impute": _impute_parser,
    "classify": _classify_parser,
    "plot": _plot_parser,
    "report": _report_parser,
    "explore": _explore_parser,
}
