"""Work in other processes, and what is said when one of them dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from pyro_vae import build
from pyro_vae.cli.parsing import ERRORS
from pyro_vae.estimators import importance_sampling
from pyro_vae.processes import in_processes


def dies(part: int) -> NoReturn:
    os._exit(3 + part)


def fails(part: int) -> NoReturn:
    raise FloatingPointError(f"part {part}")


def threads(part: torch.Tensor) -> tuple[int, torch.Tensor]:
    return torch.get_num_threads(), part + 1


def beats(file: str) -> None:
    """Goes on for ever, whatever signal comes, as what waits for another process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        Path(file).touch()
        time.sleep(0.02)


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them_even_if_it_is_killed(tmp_path: Path) -> None:
    files = [tmp_path / "0", tmp_path / "1"]
    parent = multiprocessing.get_context("spawn").Process(
        target=in_processes, args=(beats, list(map(str, files)), "cpu")
    )
    parent.start()
    wait_until(lambda: all(file.exists() for file in files))
    parent.kill()
    parent.join()
    wait_until(lambda: all(time.time() - file.stat().st_mtime > 2 for file in files))


def wait_until(done: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_process_that_dies_is_one_line() -> None:
    with pytest.raises(ChildProcessError, match="a process ended by itself .*exit code 3"):
        in_processes(dies, [0], "cpu")
    assert issubclass(ChildProcessError, ERRORS)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_an_error_of_a_process_is_the_callers() -> None:
    with pytest.raises(FloatingPointError, match="part 5"):
        in_processes(fails, [5], "cpu")


@pytest.mark.slow
def test_results_come_in_the_order_of_the_parts() -> None:
    found = in_processes(threads, [torch.tensor(2), torch.tensor(7)], "cpu")
    share = max(1, torch.get_num_threads() // 2)
    assert [(n, int(part)) for n, part in found] == [(share, 3), (share, 8)]


@pytest.mark.parametrize(("width", "few"), [(64, True), (500, False)])
def test_an_estimator_of_a_small_module_works_on_one_thread(width: int, few: bool) -> None:
    network = {"class_path": "MLP", "init_args": {"hidden": [width]}}
    vae = build((257,), 2, encoder=network, decoder=network)
    seen = []
    vae.likelihood.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        importance_sampling(vae, torch.zeros(3, 257), num_samples=5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {*seen} == ({1} if few else {2})
