"""What a run folder, configuration or command line may not do: import, leave the folder, crash."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pyro_vae.__main__ import main

SMALL = ["--encoder.hidden=[11]", "--decoder.hidden=[11]", "--latent_dim=3", "--progress=false"]
QUICK = ["--limit=3", "--num_samples=101", "--elbo_samples=7", "--progress=false"]


pytestmark = pytest.mark.xdist_group("hostile")  # they share a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all files that the commands write."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *SMALL, "--limit=53", "--epochs=2", f"--run={folder}"]) == 0
    assert main(["evaluate", str(folder), *QUICK]) == 0
    assert main(["report", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def status(*argv: str) -> int:
    """Of a command that may leave by sys.exit, as --help and --print_config do."""
    try:
        return main(list(argv))
    except SystemExit as stop:
        return int(stop.code or 0)


EVIL = "evil_module.Evil"
GIVEN = "{class_path: " + EVIL + "}"
BETA = "{class_path: ELBO, init_args: {beta: " + GIVEN + "}}"
FILES = {
    "dotted": f"prior.class_path: {EVIL}",
    "dotted beside a good one": f"prior: VampPrior\nprior.class_path: {EVIL}",
    "dotted option": f"objective.beta: {EVIL}",
    "dotted init_args": f"objective.init_args.beta.class_path: {EVIL}",
    "name": f"prior: {EVIL}",
    "mapping": f"likelihood: {GIVEN}",
    "json": json.dumps({"posterior": {"class_path": EVIL}}),
    "init_args": f"encoder: {{class_path: {EVIL}, init_args: {{hidden: [3]}}}}",
    "dotted within": f"prior: {{class_path: StandardNormal, init_args.a.class_path: {EVIL}}}",
    "anchor": f"data: &evil {EVIL}\nprior: *evil",
    "merged": f"x: &evil {GIVEN}\nprior: {{<<: *evil}}",
    "twice": f"prior: VampPrior\nprior: {EVIL}",
    "schedule": f"objective: {BETA}",
    "schedule by name": f"objective: {{class_path: ELBO, init_args: {{beta: {EVIL}}}}}",
    "nested config": "config: evil.yaml",
    "nested configs": "config: [evil.yaml]",
    "resume": "resume: evil",
    "import": "import: evil_module",
    "optimizer": f"optimizer: {GIVEN}",
    "schedule of the rate": f"schedule: {GIVEN}",
    "tag": "prior: !!python/name:evil_module.Evil",
    "module tag": "prior: !!python/module:evil_module",
    "list": f"prior: [{EVIL}]",
    "path of a file": "prior: evil.yaml",
    "help": f"prior.help: {EVIL}",
    "null before": f"prior: null\nprior.class_path: {EVIL}",
}
ARGUMENTS = [
    ["--prior", EVIL],
    [f"--prior={EVIL}"],
    ["--prior.class_path", EVIL],
    [f"--prior.class_path={EVIL}"],
    ["--prior.help", EVIL],
    [f"--prior.help={EVIL}"],
    ["--prior", GIVEN],
    ["--prior", "evil.yaml"],
    ["--prior", "VampPrior", "--prior", EVIL],
    ["--prior.class_path", EVIL, "--prior", "VampPrior"],
    ["--prior", "--", EVIL],
    ["--prior.init_args", GIVEN],
    ["--prior.init_args.class_path", EVIL],
    ["--objective.beta", EVIL],
    ["--objective.beta", GIVEN],
    ["--objective.beta.class_path", EVIL],
    [f"--objective.beta.help={EVIL}"],
    ["--objective.init_args.beta.class_path", EVIL],
    ["--objective.init_args.beta.init_args.class_path", EVIL],
    ["--likelihood.scale", GIVEN],
    ["--optimizer.class_path", EVIL],
    ["--config", "evil.yaml"],
    ["--config=evil.yaml", "--config=good.yaml"],
    ["--config", "good.yaml", "--config", "evil.yaml"],
    ["--config", "prior: " + GIVEN],
    ["--config", "evil.yaml", "--print_config"],
]


@pytest.fixture
def executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """A module that leaves a file when it is imported; whether it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text("open('executed', 'w').close()\n")
    (tmp_path / "evil.yaml").write_text(f"prior.class_path: {EVIL}\n")
    (tmp_path / "good.yaml").write_text("prior: StandardNormal\n")
    monkeypatch.delitem(sys.modules, "evil_module", raising=False)
    return (tmp_path / "executed").exists


def is_one_line(text: str) -> bool:
    return text.startswith("pyro-vae") and len(text.splitlines()) == 1


@pytest.mark.parametrize("argv", ARGUMENTS, ids=" ".join)
def test_arguments_import_nothing(
    argv: list[str], executed: Callable[[], bool], capsys: pytest.CaptureFixture
) -> None:
    assert status("train", *SMALL, "--epochs=1", "--run=new", *argv) == 2
    assert not executed()
    assert is_one_line(capsys.readouterr().err)


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_configurations_import_nothing(
    content: str, run: Path, executed: Callable[[], bool], capsys: pytest.CaptureFixture
) -> None:
    Path("c.yaml").write_text(content + "\n")
    given = ["--config", "c.yaml", *SMALL, "--epochs=1", "--run=new"]
    assert status("train", *given) == 2
    assert is_one_line(capsys.readouterr().err)
    assert status("train", *given, "--config", "good.yaml", "--print_config") in (0, 2)
    shutil.copytree(run, "copy")
    declared = Path("copy/config.yaml")
    declared.write_text(declared.read_text() + content + "\n")
    assert status("train", "--resume", "copy", "--epochs=3", "--progress=false") == 2
    assert not executed()


def test_an_option_of_one_s_own_class_imports_nothing(executed: Callable[[], bool]) -> None:
    Path("own_net.py").write_text(
        "import torch\n"
        "from pyro_vae.priors import StandardNormal\n"
        "class WithNet(StandardNormal):\n"
        "    def __init__(self, latent_dim, net: torch.nn.Module | None = None):\n"
        "        super().__init__(latent_dim)\n"
    )
    given = ["train", *SMALL, "--import=own_net", "--epochs=1", "--limit=53", "--prior=WithNet"]
    for option in ("--prior.net", "--prior.net.class_path", "--prior.net.help"):
        assert status(*given, option, EVIL) == 2
    assert status(*given, "--prior.net", GIVEN) == 2
    assert not executed()
    assert status(*given, "--run=new") == 0


LINKS = {  # a path inside a run, and the command that would go through it
    "run.json": "report",
    "run.json.tmp": "resume",
    "config.yaml": "report",
    "config.yaml.tmp": "resume",
    "data.json": "score",
    "metrics.csv": "plot",
    "metrics.csv.tmp": "resume",
    "parts.csv.tmp": "resume",
    "evaluation.json.tmp": "evaluate",
    "evidence.safetensors": "report",
    "evidence.safetensors.tmp": "evaluate",
    "figures/latent.svg": "plot",
    "figures": "plot",
    "samples.npz": "sample",
    "report.html": "report",
    "checkpoints/current.json": "sample",
    "checkpoints/current.json.tmp": "resume",
    "checkpoints": "resume",
    "lock": "resume",
    "train.lock": "resume",
}


def command(name: str, run: Path) -> list[str]:
    """A command on a run."""
    if name == "resume":
        return ["train", "--resume", str(run), "--epochs=3", "--progress=false"]
    more = {"encode": ["x.npz"], "evaluate": QUICK, "score": ["x.npz", "--progress=false"]}
    return [name, str(run), *more.get(name, [])]


@pytest.mark.parametrize(("inside", "name"), LINKS.items(), ids=LINKS)
def test_links_do_not_lead_out_of_a_run(
    inside: str,
    name: str,
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", x=np.zeros((2, 1, 8, 8), np.uint8))
    path, outside = copy / inside, tmp_path / "outside"
    if path.is_dir():
        shutil.copytree(path, outside)
        (outside / "step-precious").mkdir()
        shutil.rmtree(path)
    else:
        outside.write_bytes(path.read_bytes() if path.exists() else b"precious")
        path.unlink(missing_ok=True)
    path.symlink_to(outside)
    before = content(outside)
    assert status(*command(name, copy)) == 2
    error = capsys.readouterr().err
    assert f"{path} is a link" in error
    assert is_one_line(error)
    assert content(outside) == before


def content(path: Path) -> dict[str, bytes | None]:
    """All files at and below a path."""
    below = [path, *path.rglob("*")]
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in below}


def test_a_special_file_is_refused(copy: Path, capsys: pytest.CaptureFixture) -> None:
    (copy / "metrics.csv").unlink()
    os.mkfifo(copy / "metrics.csv")
    assert main(["plot", str(copy)]) == 2
    assert "metrics.csv is a link or no plain file" in capsys.readouterr().err


def test_the_folder_of_a_run_may_be_a_link(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    assert main(["sample", str(tmp_path / "link"), "--size=2"]) == 0
    assert (copy / "samples.npz").is_file()


def edited(**changes: object) -> Callable[[str], str]:
    """Well-formed JSON with other values; `a__b` is within `a`, an ellipsis removes."""

    def edit(text: str) -> str:
        content = json.loads(text)
        for key, value in changes.items():
            *outer, last = key.split("__")
            inside = content
            for name in outer:
                inside = inside[name]
            inside[last] = value
            if value is ...:
                del inside[last]
        return json.dumps(content)

    return edit


def added(text: str) -> Callable[[str], str]:
    return lambda before: f"{before}\n{text}\n"


def replaced(text: str) -> Callable[[str], str]:
    return lambda _: text


BOMB = "a0: &a0 [1, 1], " + ", ".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)
)
WRONG = [
    ("run.json", "sample", edited(declaration__extra=1)),
    ("run.json", "sample", edited(declaration=[1])),
    ("run.json", "sample", edited(declaration__latent_dim="3")),
    ("run.json", "sample", edited(declaration__data_shape=[])),
    ("run.json", "sample", edited(declaration__prior=None)),
    ("run.json", "sample", edited(declaration__prior={"class_path": ["a"]})),
    ("run.json", "sample", edited(declaration__prior={"class_path": "StandardNormal", "b": 1})),
    ("run.json", "sample", edited(declaration__encoder__init_args=[1])),
    ("run.json", "sample", edited(format=True)),
    ("run.json", "resume", edited(training=[1])),
    ("run.json", "resume", edited(data__train=3)),
    ("run.json", "report", edited(data__train={})),
    ("run.json", "encode", edited(data__train=3)),
    ("run.json", "encode", edited(data={})),
    ("run.json", "report", edited(pyro_vae=...)),
    ("run.json", "sample", replaced("[" * 10**5)),
    ("data.json", "encode", replaced("{}")),
    ("data.json", "sample", replaced("{}")),
    ("data.json", "report", replaced("{}")),
    ("data.json", "report", replaced("[]")),
    ("data.json", "encode", edited(transform__extra=1)),
    ("data.json", "encode", edited(transform__at="8")),
    ("data.json", "encode", edited(transform=...)),
    ("data.json", "encode", edited(seed="x")),
    ("data.json", "sample", edited(description__digests=...)),
    ("config.yaml", "evaluate", replaced("[a]")),
    ("config.yaml", "plot", replaced("text")),
    ("config.yaml", "plot", replaced("a: [")),
    ("config.yaml", "sample", replaced("a: !!python/name:os.system")),
    ("config.yaml", "sample", replaced("limit: 53")),
    ("config.yaml", "evaluate", added("limit: abc")),
    ("config.yaml", "sample", added("data: [digits]")),
    ("config.yaml", "sample", added("data: null")),
    ("config.yaml", "sample", added("validation: {}")),
    ("config.yaml", "resume", replaced("- a")),
    ("config.yaml", "resume", replaced("a: &a [*a]")),
    ("config.yaml", "resume", added("objective: &a {class_path: ELBO, init_args: *a}")),
    ("config.yaml", "resume", added(f"optimizer: {{{BOMB}}}")),
    ("config.yaml", "sample", added(f"bomb: {{{BOMB}}}")),
    ("config.yaml", "resume", added("prior: null")),
    ("config.yaml", "resume", added("prior: 5")),
    ("config.yaml", "resume", added("prior: {init_args: {}}")),
    ("config.yaml", "resume", added("prior: {class_path: [a]}")),
    ("config.yaml", "resume", added("prior: {class_path: null}")),
    ("config.yaml", "resume", added("prior: {class_path: VampPrior, init_args: [1]}")),
    ("config.yaml", "resume", added("data: [digits]")),
    ("config.yaml", "resume", added("data_root: null")),
    ("config.yaml", "resume", added("optimizer: 3")),
    ("config.yaml", "resume", added("1: 2")),
    ("metrics.csv", "plot", replaced("\0")),
    ("metrics.csv", "plot", replaced("epoch,elbo\n1,2,3\n")),
    ("metrics.csv", "report", replaced("epoch,elbo\n1\n")),
    ("metrics.csv", "report", replaced("epoch,epoch\n1,2\n")),
    ("metrics.csv", "plot", replaced("")),
    ("parts.csv", "plot", replaced("{}")),
    ("parts.csv", "plot", replaced("[1, 2]")),
    ("parts.csv", "plot", replaced("epoch,total_correlation\n1,\n")),
    ("parts.csv", "resume", replaced("a\nb\n")),
    ("evaluation.json", "report", edited(log_prob=...)),
    ("evaluation.json", "report", edited(verdicts=[1])),
    ("evaluation.json", "report", edited(elbo="x")),
    ("evaluation.json", "report", replaced("3")),
    ("evidence.safetensors", "report", replaced("garbled")),
    ("checkpoints/current.json", "sample", edited(last=3)),
    ("checkpoints/current.json", "sample", edited(sha256=[1])),
    ("checkpoints/current.json", "resume", edited(best=["x"])),
]


@pytest.mark.parametrize(("file", "name", "edit"), WRONG)
def test_wrong_content_is_one_line(
    file: str,
    name: str,
    edit: Callable[[str], str],
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", x=np.zeros((2, 1, 8, 8), np.uint8))
    path = copy / file
    path.write_text(edit(path.read_text(errors="replace")))
    assert status(*command(name, copy)) == 2
    error = capsys.readouterr().err
    assert is_one_line(error)
    assert path.name in error


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_that_are_none(
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    Image.new("L", (29, 31)).save(images / "a.png")
    shutil.copy(images / "a.png", copy / "figures/a.png")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
        for argv in (["report", str(copy)], ["train", "--data", str(images)]):
            assert main(argv) == 2
            error = capsys.readouterr().err
            assert is_one_line(error)
            assert ".png" in error
    os.mkfifo(images / "b.png")
    assert main(["train", "--data", str(images)]) == 2
    assert "b.png: expected an image file" in capsys.readouterr().err


def test_names_of_columns_are_no_mathematics(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(53, 3))
    head = r"a,$\frac{$,c"
    np.savetxt(tmp_path / "x.csv", x, delimiter=",", header=head, comments="")
    given = ["--data", str(tmp_path / "x.csv"), "--likelihood=Normal", "--epochs=1"]
    assert main(["train", *SMALL, *given, f"--run={tmp_path / 'run'}"]) == 0


@pytest.mark.slow
def test_random_damage_is_refused_or_harmless() -> None:
    """Thirteen files damaged; `python benchmarks/mutate.py 296` damages more."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "benchmarks/mutate.py", "13"],
        capture_output=True,
        text=True,
        cwd=root,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "13 mutations: " in done.stdout
