"""p(y | x) of a discrete latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.densities import Program, summed_values
from pyro_vae.estimators.classes import ClassProbabilities, for_each_value, probabilities
from pyro_vae.estimators.evidence import Evidence
from pyro_vae.estimators.given import estimator
from pyro_vae.estimators.log_evidence import log_evidence

__all__ = ["class_probabilities"]


@estimator
def class_probabilities(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    site: str | None = None,
    estimator: Callable[..., Evidence] = log_evidence,
    seed: int | None = 0,
    **options: Any,
) -> ClassProbabilities:
    r"""Probabilities of the classes of each datum under the model itself.

    .. math:: p(y \mid x) = \frac{p(x, y)}{\sum_{y'} p(x, y')}

    Each log p(x, y) is an estimate of its own, so that the cost is that of `estimator` times
    the number of classes.

    Args:
        model: Pyro model with a discrete latent marked `infer={"enumerate": "parallel"}`; or a
            VAE, which stands for its model and guide: class_probabilities(vae, x).
        guide: Pyro guide of the same arguments.
        x: Data [N, *E], a tensor, array, frame or list; as is y.
        y: What is conditioned on [N, C], or None.
        site: Name of the latent, needed if there are several: the others are summed out.
        estimator: What gives log p(x, y), such as `importance_sampling`: faster, and less sure.
        seed: Of the draws.
        options: Further arguments of the estimator.

    Returns:
        Probabilities [N, C], their standard errors [N, C], and the verdict of each datum. Classes
        are in the order of the latent's support.

    Raises:
        ValueError: If the model has no such latent, or several and none is named.
    """
    values = summed_values(model, x, y)
    if site is None and len(values) == 1:
        site = next(iter(values))
    if site not in values:
        raise ValueError(
            f"site must name a discrete latent with infer={{'enumerate': 'parallel'}}; the model "
            f"has {sorted(values) or 'none'}, got {site!r}"
        )
    given = {"model": model, "guide": guide, "x": x, "y": y, "seed": seed, **options}
    parts = for_each_value(estimator, given, values)
    rows = values[site].reshape(len(values[site]), -1)
    first = (rows.unsqueeze(1) == rows).all(-1).int().argmax(1)  # of the same value
    return probabilities(parts, torch.unique(first, return_inverse=True)[1].cpu())
