"""Freed memory stays at hand; what can never fit is refused before it is asked for."""

from __future__ import annotations

import platform
import subprocess
import sys
from typing import Any

import pytest
import torch

from pyro_vae import build, importance_sampling

CODE = """
import resource
import torch
from pyro_vae.runtime import keep_memory
torch.set_num_threads(1)
keep_memory()
x = torch.ones(1000, 784)
def temporaries():
    return [x + i for i in range(8)]
for _ in range(20):  # until the heap has grown to what they need
    temporaries()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    temporaries()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library allocates")
def test_pages_are_not_asked_for_again() -> None:
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # of the 60,000 pages of all, those of one temporary may be new; without it, most often all are
    assert int(done.stdout) < 1_000


@pytest.mark.parametrize("hidden", [[10**9], [300_000, 300_000], [10**18]])
def test_parameters_that_do_not_fit_are_refused(hidden: list[int]) -> None:
    encoder = {"class_path": "MLP", "init_args": {"hidden": hidden}}
    with pytest.raises(ValueError, match=r"the parameters .* memory"):
        build((1009,), 2, encoder=encoder)
    with pytest.raises(ValueError, match=r"the parameters .* memory"):
        build((1009,), 10**9)
    assert torch.nn.Linear(2, 3).weight.shape == (3, 2)


def test_draws_that_do_not_fit_are_refused() -> None:
    vae: Any = build((7,), 2)
    with pytest.raises(ValueError, match=r"1000000000000 draws would take .* GiB of memory"):
        vae.sample(10**12)
    with pytest.raises(ValueError, match=r"1000000000000 draws would take .* GiB of memory"):
        importance_sampling(vae.model, vae.guide, torch.zeros(1, 7), num_samples=10**12)
