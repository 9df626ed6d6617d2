"""Lightning Fabric, without its traces on the process."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["make_fabric"]

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")


def make_fabric(
    accelerator: str, devices: int | list[int], precision: str, loggers: Sequence[Any]
) -> Fabric:
    """A Fabric for one device, made in silence.

    Raises:
        ValueError: If `precision` is unknown.
        NotImplementedError: If `devices` asks for more than one.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if devices != 1 and not (isinstance(devices, list) and len(devices) == 1):
        raise NotImplementedError(
            f"fit trains on one device: expected devices=1 or a list of one; got {devices!r}"
        )
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cpu":
        devices = 1
    with _untouched():
        from lightning_fabric import Fabric

        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        return Fabric(
            accelerator=accelerator,
            devices=devices,
            precision=precision,  # type: ignore[arg-type]
            loggers=list(loggers),
        )


@contextmanager
def _untouched() -> Iterator[None]:
    """Puts the environment, warning filters and Fabric's logger back as they were."""
    logger = logging.getLogger("lightning_fabric")
    before = logger.handlers[:], logger.level, logger.propagate
    environment = dict(os.environ)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
