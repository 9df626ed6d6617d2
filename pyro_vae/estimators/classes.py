"""p(y | x) of a discrete latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.densities import Program, summed_values
from pyro_vae.estimators.evidence import Evidence, worst
from pyro_vae.estimators.log_evidence import log_evidence
from pyro_vae.estimators.run import estimator, for_each_value


class ClassProbabilities(NamedTuple):
    """p(y | x) of each datum, on the CPU.

    Attributes:
        probabilities: Of the classes [N, C].
        stderr: Their Monte Carlo standard errors [N, C], by the delta method.
        verdict: "reliable", "lower bound" or "doubtful" for each datum: the worst estimate of
            log p(x, y) among the classes of probability above 0.001.
    """

    probabilities: Tensor
    stderr: Tensor
    verdict: list[str]


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

    Example:
        >>> vae = build(3, latent_dim=2, classes=7)
        >>> found = class_probabilities(vae, torch.ones(5, 3), estimator=importance_sampling)
        >>> found.probabilities.shape
        torch.Size([5, 7])
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
    classes = torch.unique(first, return_inverse=True)[1].cpu()
    joint, stderr = (torch.stack([getattr(p, n) for p in parts]) for n in ("log_prob", "stderr"))
    share = (joint - joint.logsumexp(0)).exp()  # [J, N] of the J joint values
    member = torch.nn.functional.one_hot(classes).to(share)  # [J, C]
    found = share.T @ member
    slopes = (member.unsqueeze(1) - found) * (share * stderr).unsqueeze(-1)  # [J, N, C]
    return ClassProbabilities(found, slopes.square().sum(0).sqrt(), worst(parts, share))
