"""Freed memory stays at hand: operations wait for no pages."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import torch
from pyro_vae.memory import keep_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_memory()
x = torch.ones(1000, 784)
def temporaries():
    a, b = x.exp(), x.abs()
    return (a * b + a).sum()
for _ in range(3):
    temporaries()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    temporaries()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library allocates")
def test_pages_are_not_asked_for_again() -> None:
    faults = {}
    for how in ("keep", "leave"):
        command = [sys.executable, "-c", CODE, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["keep"] < max(1, faults["leave"] / 10)
