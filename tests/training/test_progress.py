"""What is seen of a training while it runs: in a terminal, in a file, in a notebook."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from pyro_vae import build, fit
from pyro_vae.training.progress import Bar, History, units_in_use

X = torch.bernoulli(torch.rand(53, 7))


def row(epoch: int, validation: float | None) -> dict:
    return {
        "epoch": epoch,
        "seconds": 1.25,
        "elbo": -7.5,
        "kl": 2.0,
        "validation_elbo": validation,
    }


def told(validation: list[float | None], patience: int | None) -> None:
    history = History()
    with Bar(True, 11, patience, 4) as bar:
        for epoch, value in enumerate(validation, 1):
            history.rows.append(row(epoch, value))
            bar.end(history)


def test_a_file_has_a_line_for_each_epoch(capsys: pytest.CaptureFixture) -> None:
    told([-9.0, -8.0, -8.5], 5)
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/11  1.2 s  ELBO -7.50  KL 2.00  validation -9.00, best -9.00 (0/5)",
        "epoch 2/11  1.2 s  ELBO -7.50  KL 2.00  validation -8.00, best -8.00 (0/5)",
        "epoch 3/11  1.2 s  ELBO -7.50  KL 2.00  validation -8.50, best -8.00 (1/5)",
    ]


def test_a_notebook_has_one_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    told([None, None], None)
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    assert [part.strip() for part in text.split("\r")] == [
        "",
        "epoch 1/11  1.2 s  ELBO -7.50  KL 2.00",
        "epoch 2/11  1.2 s  ELBO -7.50  KL 2.00",
    ]


def test_fit_shows_every_epoch_once(capsys: pytest.CaptureFixture) -> None:
    vae = build((7,), 2, encoder={"class_path": "MLP", "init_args": {"hidden": [11]}})
    fit(vae, X, validation=X[:13], epochs=3, batch_size=17)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.partition("  ")[0] for line in lines] == [f"epoch {i}/3" for i in (1, 2, 3)]
    fit(vae, X, epochs=1, progress=False)
    assert "epoch" not in capsys.readouterr().out


@pytest.mark.parametrize(("options", "number"), [({}, 1), ({"compile": False}, 0)])
def test_fit_says_what_it_has_decided_about_compiling(
    capsys: pytest.CaptureFixture, options: dict, number: int
) -> None:
    fit(build((7,), 2), X, epochs=2, batch_size=17, **options)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("compile")]
    assert lines == ["compile: 8 steps are planned, and the step runs eagerly"] * number


def test_a_terminal_has_one_bar_over_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Console, "is_terminal", True)
    with Bar(True, 11, None, 4) as bar:
        bar.show(3, 1, {"elbo": -7.0})
        (task,) = bar.progress.tasks
        assert (task.completed, task.total) == (9, 44)
        history = History([row(1, -9.0), row(2, -8.0), row(3, -8.5)])
        bar.end(history)
        assert task.completed == 12
        assert task.fields["metrics"] == "ELBO -7.50  validation -8.50, best -8.00"


def test_a_bar_is_shown_the_batches_done_and_their_means(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    monkeypatch.setattr(Bar, "show", lambda _, epoch, *given: shown.update({epoch: given}))
    vae = build((7,), 2, encoder={"class_path": "MLP", "init_args": {"hidden": [11]}})
    history = fit(vae, X, epochs=2, batch_size=17, progress=False)
    assert [done for done, _ in shown.values()] == [4, 4]
    assert [means["elbo"] for _, means in shown.values()] == pytest.approx(history["elbo"])


def test_units_are_counted_for_each_of_several_sites() -> None:
    assert units_in_use({"z": (1, 3)}) == "1 of 3 latent units are active"
    two = "1 of 8 latent units are active (z 1 of 3, w 0 of 5)"
    assert units_in_use({"z": (1, 3), "w": (0, 5)}) == two
