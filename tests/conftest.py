"""What every test starts from: an empty parameter store and a known seed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pyro
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(autouse=True)
def _clean_start() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Double precision, where the truth is exact."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
