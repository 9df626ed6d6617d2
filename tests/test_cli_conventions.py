"""How options may be written, help that fits a screen, and JSON on demand."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_vae.__main__ import main
from pyro_vae.cli import COMMANDS
from pyro_vae.cli.compare import comparison, differing, which_is_better
from pyro_vae.cli.parsing import make_parser, normalise
from pyro_vae.config import BASES, components
from pyro_vae.estimators import Evidence
from pyro_vae.metrics import Difference, paired_difference


@pytest.mark.parametrize(
    ("written", "known"),
    [
        (["--latent-dim", "3"], ["--latent_dim=3"]),
        (["--prior.num-components=3"], ["--prior.num_components=3"]),
        (["--data=my-file_1.csv"], ["--data=my-file_1.csv"]),
        (["a-b", "-h", "--"], ["a-b", "-h", "--"]),
        (["--compile", "--no-progress", "run"], ["--compile=true", "--progress=false", "run"]),
        (["--compile", "false", "--mean=true"], ["--compile=false", "--mean=true"]),
        (["--no-data", "run", "--seed", "-1"], ["--no_data", "run", "--seed=-1"]),
        (["--limit", "--json"], ["--limit", "--json"]),
    ],
)
def test_options_are_taken_as_people_write_them(written: list[str], known: list[str]) -> None:
    assert normalise(written) == known


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen(
    command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["--help"], [command, "--help"]):
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 50
        assert max(map(len, lines)) <= 80


def test_help_of_train_names_what_there_is(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "-h"]) == 0
    text = capsys.readouterr().out
    for family in set(BASES) - {"schedule"}:
        ours = (n for n, c in components(family).items() if c.__module__.startswith("pyro_vae."))
        assert all(name in text for name in ours), family
    defaults = make_parser("train").get_defaults()
    known = {key.partition(".")[0] for key in defaults.keys()} | {"help_all", "print_config"}
    for option in re.findall(r"(?<![\w-])--([a-z-]+)", text):
        assert option.replace("-", "_").removeprefix("no_") in known, option
    for default, option in re.findall(r"--([a-z-]+) [^[\n]*\[([\w.]+)\]", text):
        found = defaults[default.replace("-", "_")]
        assert str(found) == option, default
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    everything = capsys.readouterr().out
    assert len(everything) > 2 * len(text)
    assert all(name in everything for name in ("VampPrior", "Poisson", "FullNormal", "BetaTC"))


@pytest.mark.parametrize("command", ["evaluate", "score", "compare", "train"])
def test_more_devices_than_there_are_are_refused_before_anything_is_read(
    command: str, capsys: pytest.CaptureFixture
) -> None:
    given = ["--data", "nowhere"] if command == "train" else ["nowhere", "nowhere"]
    given = given[:1] if command == "evaluate" else given
    assert main([command, *given, "--devices=100000"]) == 2
    assert "devices=100000 were asked for; this machine has" in capsys.readouterr().err


def test_help_loads_no_torch() -> None:
    script = "import sys; from pyro_vae.__main__ import main; main(['evaluate', '-h']); "
    script += "main(['train', '-h']); main(['--completion']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_a_shell_completes_commands_options_and_files(capsys: pytest.CaptureFixture) -> None:
    main(["--completion"])
    script = capsys.readouterr().out

    def completed(*words: str) -> list[str]:
        line = f"COMP_WORDS=(pyro-vae {' '.join(words)}); COMP_CWORD={len(words)}"
        show = 'echo "${COMPREPLY[@]}"'
        command = ["bash", "-c", f"{script}\n{line}\n_pyro_vae\n{show}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    assert completed("ev") == ["evaluate"]
    assert completed("train", "--po") == ["--posterior"]
    assert completed("evaluate", "runs/a", "--tol") == ["--tolerance"]
    assert completed("evaluate", "ru") == []  # left to the shell, which knows files


@pytest.mark.slow
def test_evaluate_prints_its_file_as_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = ["--encoder.hidden=[11]", "--decoder.hidden=[11]", "--latent-dim=3", "--limit=211"]
    run = str(tmp_path / "run")
    assert main(["train", *small, "--epochs=1", "--no-progress", f"--run={run}"]) == 0
    capsys.readouterr()
    few = ["--limit=7", "--num-samples=101", "--json"]
    assert main(["evaluate", run, *few]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((Path(run) / "evaluation.json").read_text())
    assert printed["rows"] == 7


def test_compare_for_json_is_paired() -> None:
    def evidence(values: list[float]) -> Evidence:
        found = torch.tensor(values)
        rest = (torch.full((3,), i / 10) for i in range(1, 5))
        return Evidence(found, *rest, ["AIS"] * 3, ["reliable", "reliable", "doubtful"])

    found = {"a": [evidence([-3.0, -5.0, -7.0])], "b": [evidence([-4.0, -7.0, -10.0])]}
    declared = {"a": {"prior": "VampPrior()", "lr": "0.1"}, "b": {"lr": "0.1"}}
    assert differing(declared) == {"prior": {"a": "VampPrior()", "b": ""}}
    printed = comparison(found, "all 3 rows")
    assert printed["runs"]["a"]["log_prob"] == pytest.approx(-5)
    assert printed["runs"]["b"]["verdicts"] == {"reliable": 2, "doubtful": 1}
    (difference,) = printed["differences"]
    assert (difference["first"], difference["second"]) == ("a", "b")
    assert difference["difference"] == pytest.approx(2)
    assert difference["stderr"] == pytest.approx(1 / 3**0.5)


def test_who_is_better_is_said_where_it_is_known() -> None:
    def said(mean: float) -> str:
        return which_is_better("a", "b", Difference(mean, 0.3, 0.4, 7.0))

    assert said(2.0) == "a is better than b by 2.00 +- 0.5 nats per datum"
    assert said(-2.0) == "b is better than a by 2.00 +- 0.5 nats per datum"
    assert said(-0.9).startswith("a and b are not told apart: they differ by 0.90 +- 0.5")
    assert "not told apart" in which_is_better("a", "b", Difference(math.nan, 0.3, 0.4, 7.0))


def test_one_of_two_equal_models_is_called_better_in_a_twentieth_of_comparisons() -> None:
    """Also with two seeds of each, whose spread has few degrees of freedom."""
    torch.manual_seed(0)
    runs = torch.randn(1000, 2, 2, 1) + 0.01 * torch.randn(1000, 2, 2, 20)
    said = [which_is_better("a", "b", paired_difference(*both)) for both in runs]
    assert 0.005 < sum("is better" in words for words in said) / len(said) < 0.06
