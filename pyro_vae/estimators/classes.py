"""Models with discrete latents: an estimate for each of their values, and what follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.densities import Program, log_weights
from pyro_vae.densities.evaluating import evaluating
from pyro_vae.estimators.batches import track
from pyro_vae.estimators.evidence import TENSORS, Evidence

__all__ = ["ClassProbabilities", "for_each_value", "over_values", "probabilities"]

MATTERS = 1e-3  # posterior probability from which a value's verdict counts
VERDICTS = ["reliable", "lower bound", "doubtful"]  # from the best to the worst
Values = dict[str, Tensor]


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


class OneValue(nn.Module):
    """A model and a guide with discrete latents at one value, which the model observes."""

    def __init__(self, model: Program, guide: Program, values: Values) -> None:
        super().__init__()
        self.programs, self.values = (model, guide), values
        owners = {id(o): o for o in (getattr(p, "__self__", p) for p in self.programs)}
        self.owners = nn.ModuleList(o for o in owners.values() if isinstance(o, nn.Module))

    def model(self, *args: Any) -> Any:
        """The model, observing the value."""
        with At(self.values, hidden=False):
            return self.programs[0](*args)

    def guide(self, *args: Any) -> Any:
        """The guide, given the value."""
        with At(self.values, hidden=True):
            return self.programs[1](*args)


class At(Messenger):
    """Gives sites a value, and shows them to handlers outside as observed, or not at all."""

    def __init__(self, values: Values, hidden: bool) -> None:
        super().__init__()
        self.values, self.hidden = values, hidden

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            value = self.values[msg["name"]]
            msg["value"] = value.expand(*msg["fn"].batch_shape, *value.shape)
            msg["is_observed"], msg["stop"] = True, self.hidden


def over_values(
    function: Callable[..., Evidence], given: dict[str, Any], values: Values
) -> Evidence:
    """Evidence with discrete latents summed out: log p(x) is the logsumexp of log p(x, c).

    The standard error is by the delta method; k-hat and verdict are the worst of the values of
    posterior probability above 0.001.
    """
    parts = for_each_value(function, given, values)
    joint = torch.stack([part.log_prob for part in parts])
    total = joint.logsumexp(0)
    share = (joint - total).exp()
    stderr, ess, khat = (torch.stack([getattr(p, n) for p in parts]) for n in TENSORS[1:4])
    best = share.argmax(0).tolist()
    return Evidence(
        log_prob=total,
        stderr=(share * stderr).square().sum(0).sqrt(),
        ess=1 / (share.square() / ess).sum(0),
        khat=khat.masked_fill(share <= MATTERS, -torch.inf).amax(0),
        num_samples=torch.stack([part.num_samples for part in parts]).sum(0),
        method=[f"{parts[c].method[n]}, sum of {len(parts)}" for n, c in enumerate(best)],
        verdict=_worst(parts, share),
        audit=_audits([part.audit for part in parts if part.audit]),
    )


def probabilities(parts: list[Evidence], classes: Tensor) -> ClassProbabilities:
    """Probabilities of classes from evidence of log p(x, c) for each joint value.

    Args:
        parts: Evidence for each of J joint values.
        classes: Class of each joint value [J].
    """
    joint = torch.stack([part.log_prob for part in parts])
    share = (joint - joint.logsumexp(0)).exp()
    member = torch.nn.functional.one_hot(classes).to(share)  # [J, C]
    found = share.T @ member
    stderr = torch.stack([part.stderr for part in parts])
    slopes = (member.unsqueeze(1) - found) * (share * stderr).unsqueeze(-1)  # [J, N, C]
    return ClassProbabilities(found, slopes.square().sum(0).sqrt(), _worst(parts, share))


def for_each_value(
    function: Callable[..., Evidence], given: dict[str, Any], values: Values
) -> list[Evidence]:
    """Evidence of log p(x, c) for each joint value c; -inf where the model excludes it.

    Args:
        function: An estimator.
        given: Its arguments, by name.
        values: Joint values [C, *event] of each site.
    """
    parts, count = [], len(next(iter(values.values())))
    for c in track(range(count), f"{count} values", bool(given.get("progress"))):
        one = OneValue(given["model"], given["guide"], {n: v[c] for n, v in values.items()})
        seed = given.get("seed")
        own = {"model": one.model, "guide": one.guide, "seed": None if seed is None else seed + c}
        quiet = {"progress": False} if "progress" in given else {}
        parts.append(_where_possible(function, given | own | quiet))
    return parts


def _where_possible(function: Callable[..., Evidence], given: dict[str, Any]) -> Evidence:
    x, y, N = given["x"], given.get("y"), len(given["x"])
    rows = torch.arange(N, device=x.device)
    if y is not None:
        rows = rows[_possible(given["model"], given["guide"], x, y)]
    impossible = torch.full((N,), -torch.inf, dtype=torch.float64)
    nothing = Evidence(
        log_prob=impossible,
        stderr=torch.zeros_like(impossible),
        ess=torch.ones_like(impossible),
        khat=impossible,
        num_samples=torch.zeros(N, dtype=torch.long),
        method=["excluded by the model"] * N,
        verdict=["reliable"] * N,
    )
    if not len(rows):
        return nothing
    found = function(**given | {"x": x[rows], "y": None if y is None else y[rows]})
    where = torch.full((N,), N)
    where[rows.cpu()] = torch.arange(len(rows))
    both = Evidence.cat([found, nothing])
    chosen = both.rows(torch.where(where < N, where, len(rows) + torch.arange(N)))
    return replace(chosen, audit=found.audit)


def _possible(model: Program, guide: Program, x: Tensor, y: Tensor) -> Tensor:
    """Data [N] that the model does not exclude, such as by a known label."""
    with evaluating(model, guide, seed=0, device=x.device):
        parts = [
            log_weights(model, guide, *pair, num_particles=1, chunk_size=len(pair[0]))[0]
            for pair in zip(x.split(1000), y.split(1000))
        ]
    return torch.cat(parts) > -torch.inf


def _audits(found: list[str]) -> str:
    """One line of the audits of all values: how many there are, and one that failed if any did."""
    if len(set(found)) < 2:
        return "".join(found[:1])
    failed = [audit for audit in found if audit.startswith("FAILED")]
    return f"{(failed or found)[0]} ({len(failed)} of {len(found)} values failed)"


def _worst(parts: list[Evidence], share: Tensor) -> list[str]:
    """The worst verdict of each datum among the values that matter."""
    ranks = torch.tensor([[VERDICTS.index(v) for v in part.verdict] for part in parts])
    return [VERDICTS[i] for i in ranks.masked_fill(share <= MATTERS, 0).amax(0).tolist()]
