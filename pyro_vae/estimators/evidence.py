"""The result of an estimator of log p(x)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pyro_vae.densities import log_mean_exp
from pyro_vae.files import reading, write

DIGEST = "sha256"
LEAST_PROBABILITY = 1e-3  # posterior probability above which a discrete value's verdict counts
VERDICTS = ["reliable", "lower bound", "doubtful"]  # from the best to the worst
TENSORS = ("log_prob", "stderr", "ess", "khat", "num_samples")


@dataclass(frozen=True, eq=False)
class Evidence:
    """log p(x) of each datum, with what is known of its error; on the CPU, in nats.

    Attributes:
        log_prob: Estimates of log p(x) [N].
        stderr: Their Monte Carlo standard errors [N], by the delta method.
        ess: Effective sample sizes [N], (sum w)^2 / sum w^2.
        khat: Shapes of the Pareto tails of the weights [N]; NaN below 21 samples.
        num_samples: Weights behind each estimate [N].
        method: Method of each estimate.
        verdict: "reliable", "doubtful" or "lower bound" for each.
        extras: Other numbers of each datum [N], by name; if entries are missing, "missing"
            identifies which ones.
        audit: Result of the audit behind the verdicts, or "" without one.
    """

    log_prob: Tensor
    stderr: Tensor
    ess: Tensor
    khat: Tensor
    num_samples: Tensor
    method: list[str]
    verdict: list[str]
    extras: dict[str, Tensor] = field(default_factory=dict)
    audit: str = ""

    def __len__(self) -> int:
        return len(self.log_prob)

    def mean(self) -> float:
        """Returns the average log p(x) over data."""
        return self.log_prob.mean().item()

    def mean_stderr(self) -> tuple[float, float]:
        """Returns the standard errors of the mean: that by Monte Carlo, and that over data."""
        n = len(self)
        monte_carlo = (self.stderr.pow(2).sum().sqrt() / n).item()
        return monte_carlo, (self.log_prob.std().item() / math.sqrt(n) if n > 1 else math.nan)

    @property
    def khat_threshold(self) -> Tensor:
        """Highest k-hat [N] at which K weights can be trusted, min(1 - 1 / log10 K, 0.7).

        References:
            Vehtari, Simpson, Gelman, Yao and Gabry. Pareto smoothed importance sampling. 2024.
        """
        return (1 - 1 / self.num_samples.double().log10()).clamp(max=0.7)

    def share_below_threshold(self) -> float:
        """Returns the share of data whose k-hat is below its threshold; NaN counts as above."""
        return (self.khat < self.khat_threshold).double().mean().item()

    def difference(self, other: Evidence) -> tuple[float, float]:
        """Returns the mean of log p(x) minus that of `other` on the same data, and its error.

        It is the standard error over data of the paired differences, Monte Carlo error included.

        Raises:
            ValueError: If `other` has another number of data, or other missing entries.
        """
        if len(other) != len(self):
            raise ValueError(f"evidences of {len(self)} and {len(other)} data do not compare")
        if different := int((self.missing != other.missing).sum()):
            raise ValueError(
                f"evidences do not compare: {different} of {len(self)} data lack other entries: "
                "estimate both on the same rows"
            )
        each = self.log_prob - other.log_prob
        return each.mean().item(), each.std().item() / math.sqrt(len(each))

    @property
    def missing(self) -> Tensor:
        """A number for each datum [N] that identifies its missing entries; 0 if none."""
        return self.extras.get("missing", torch.zeros(len(self), dtype=torch.int64))

    def of(self, x: Tensor) -> Evidence:
        """Returns the evidence with a record of which entries of x [N, *E] are missing."""
        mask = x.isnan().reshape(len(x), -1).cpu()
        if "missing" in self.extras or not bool(mask.any()):
            return self
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randint(1, 2**40, mask.shape[1:], generator=generator)
        found = torch.where(mask, numbers, 0).sum(1)
        return replace(self, extras={**self.extras, "missing": found})

    @classmethod
    def cat(cls, parts: Sequence[Evidence]) -> Evidence:
        """Joins the data of all `parts`, in order."""
        tensors = {name: torch.cat([getattr(p, name) for p in parts]) for name in TENSORS}
        some = any("missing" in p.extras for p in parts)
        missing = {"missing": torch.cat([p.missing for p in parts])} if some else {}
        return cls(
            **tensors,
            method=[m for p in parts for m in p.method],
            verdict=[v for p in parts for v in p.verdict],
            extras={
                name: torch.cat([p.extras[name] for p in parts])
                for name in parts[0].extras
                if all(name in p.extras for p in parts)
            }
            | missing,
            audit="; ".join(dict.fromkeys(p.audit for p in parts if p.audit)),
        )

    @classmethod
    def mixed(cls, parts: Sequence[Evidence]) -> Evidence:
        """Sums a discrete latent c out: log p(x) is the logsumexp of log p(x, c) over values.

        The standard error is by the delta method; k-hat and verdict are the worst of the values
        of posterior probability above 0.001.
        """
        joint = torch.stack([part.log_prob for part in parts])
        total = joint.logsumexp(0)
        probability = (joint - total).exp()
        stderr, ess, khat = (torch.stack([getattr(p, n) for p in parts]) for n in TENSORS[1:4])
        missing = torch.stack([part.missing for part in parts]).amax(0)
        audits = [part.audit for part in parts if part.audit]
        failed = [audit for audit in audits if audit.startswith("FAILED")]
        return cls(
            log_prob=total,
            stderr=(probability * stderr).square().sum(0).sqrt(),
            ess=1 / (probability.square() / ess).sum(0),
            khat=khat.masked_fill(probability <= LEAST_PROBABILITY, -torch.inf).amax(0),
            num_samples=torch.stack([part.num_samples for part in parts]).sum(0),
            method=[
                f"{parts[c].method[n]}, sum of {len(parts)}"
                for n, c in enumerate(probability.argmax(0).tolist())
            ],
            verdict=worst_verdicts(parts, probability),
            extras={"missing": missing} if bool(missing.any()) else {},
            audit=f"{(failed or audits)[0]} ({len(failed)} of {len(audits)} values failed)"
            if len(set(audits)) > 1
            else "".join(audits[:1]),
        )

    def known(self, index: Tensor, log_prob: float, how: str) -> Evidence:
        """Returns the evidence with log p(x) of some data replaced by a value without error."""
        exact = {"log_prob": log_prob, "stderr": 0.0, "khat": -math.inf}
        new = {name: getattr(self, name).index_fill(0, index, v) for name, v in exact.items()}
        number = self.num_samples[index].clamp(min=1).to(self.ess)  # 0 where excluded before
        new["ess"] = self.ess.index_copy(0, index, number)
        method, verdict = list(self.method), list(self.verdict)
        for i in index.tolist():
            method[i], verdict[i] = how, "reliable"
        return replace(self, **new, method=method, verdict=verdict)

    def excluded(self, index: Tensor) -> Evidence:
        """Returns the evidence with log p(x) = -inf for some data, which the model excludes."""
        numbers, missing = (t.index_fill(0, index, 0) for t in (self.num_samples, self.missing))
        found = self.known(index, -math.inf, "excluded")
        return replace(found, num_samples=numbers, extras={"missing": missing})

    def rows(self, index: Tensor) -> Evidence:
        """Returns the evidence of some of the data, by their indices."""
        return Evidence(
            **{name: getattr(self, name)[index] for name in TENSORS},
            method=[self.method[i] for i in index.tolist()],
            verdict=[self.verdict[i] for i in index.tolist()],
            extras={name: value[index] for name, value in self.extras.items()},
            audit=self.audit,
        )

    def __getitem__(self, index: Any) -> Evidence:
        """Returns the evidence of some data, by any index of a vector: 3, a slice, a mask."""
        return self.rows(torch.arange(len(self))[index].reshape(-1))

    def to_frame(self) -> Any:
        """Returns a pandas frame with a row for each datum."""
        import pandas as pd

        tensors = {name: getattr(self, name) for name in TENSORS} | self.extras
        columns = {name: value.numpy() for name, value in tensors.items()}
        return pd.DataFrame({**columns, "method": self.method, "verdict": self.verdict})

    def to_inference_data(self) -> Any:
        """Returns ArviZ's InferenceData: `log_likelihood` is log p(x), `sample_stats` the rest.

        Each datum has one draw, so that `arviz.waic` gives the sum of log p(x) with its error over
        data, and `arviz.compare(..., ic="waic")` paired differences.
        """
        import arviz

        frame = {name: column.to_numpy()[None, None] for name, column in self.to_frame().items()}
        x, dims = {"x": frame.pop("log_prob")}, dict.fromkeys([*frame, "x"], ["row"])
        return arviz.from_dict(log_likelihood=x, sample_stats=frame, dims=dims)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with its digest, completely or not at all."""
        from safetensors.torch import save

        texts = {name: json.dumps(getattr(self, name)) for name in ("method", "verdict", "audit")}
        tensors = {name: getattr(self, name) for name in TENSORS}
        tensors |= {f"extras.{name}": value for name, value in self.extras.items()}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        write(path, save(tensors, metadata={**texts, DIGEST: _sha256(tensors, texts)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evidence:
        """Reads what `save` wrote.

        Raises:
            ValueError: If the file is damaged or of another kind.
        """
        from safetensors import safe_open

        with reading(path), safe_open(os.fspath(path), "pt") as file:
            texts = dict(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            digest = texts.pop(DIGEST, None)  # older files have none
            if digest is not None and digest != _sha256(tensors, texts):
                raise TypeError("its digest is that of other content")
            extras = {
                name.removeprefix("extras."): tensors.pop(name)
                for name in list(tensors)
                if name.startswith("extras.")
            }
            found = cls(**tensors, **{k: json.loads(v) for k, v in texts.items()}, extras=extras)
            number = len(found)
            columns = [*tensors.values(), *extras.values()]
            if any(t.ndim != 1 or t.is_complex() or len(t) != number for t in columns) or any(
                type(v) is not list or len(v) != number or {*map(type, v)} - {str}
                for v in (found.method, found.verdict)
            ):
                raise TypeError("expected columns of one length")
            return found

    def _repr_html_(self) -> str:
        monte_carlo, data = self.mean_stderr()
        columns = (*TENSORS, "method", "verdict")
        head = "".join(f"<th>{name}</th>" for name in columns)
        shown = range(min(len(self), 10))
        rows = "".join(
            "<tr>"
            + "".join(f"<td>{getattr(self, name)[i].item():.4g}</td>" for name in TENSORS)
            + f"<td>{escape(self.method[i])}</td><td>{escape(self.verdict[i])}</td></tr>"
            for i in shown
        )
        title = (
            f"log p(x) = {self.mean():.2f} &plusmn; {monte_carlo:.2f} (Monte Carlo) "
            f"&plusmn; {data:.2f} (data), {len(self)} data, first {len(shown)} shown"
        )
        return f"<table><caption>{title}</caption><tr>{head}</tr>{rows}</table>"

    def __repr__(self) -> str:
        monte_carlo, data = self.mean_stderr()
        verdicts = ", ".join(f"{n} {verdict}" for verdict, n in Counter(self.verdict).items())
        return (
            f"Evidence(log p(x) = {self.mean():.2f} +- {monte_carlo:.2f} (Monte Carlo) "
            f"+- {data:.2f} (data), {len(self)} data: {verdicts})"
        )


def summarise(log_weights: Tensor, method: str, verdict: str) -> Evidence:
    r"""Returns the evidence of B data from all their log weights [K, B].

    The standard error is that of the delta method, NaN for one weight; it says nothing of a tail
    that was not visited. It and the effective sample size are

    .. math:: \frac{s_w}{\sqrt{K} \, \bar w}, \quad s_w^2 = \frac{1}{K-1} \sum (w - \bar w)^2,
        \qquad \frac{(\sum w)^2}{\sum w^2}

    Raises:
        ValueError: If a weight is NaN or infinitely large.
    """
    if not bool((log_weights < torch.inf).all()):
        bad = (~(log_weights < torch.inf)).any(0).nonzero().flatten().tolist()
        raise ValueError(f"importance weights of data {bad[:5]} are NaN or infinite")
    K, B = log_weights.shape
    log_prob = log_mean_exp(log_weights)
    square = ((log_weights - log_prob).exp() - 1).square().sum(0)
    return Evidence(
        log_prob=log_prob,
        stderr=(square / (K * (K - 1))).sqrt() if K > 1 else torch.full_like(log_prob, math.nan),
        ess=(2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp(),
        khat=pareto_khat(log_weights),
        num_samples=torch.full((B,), K),
        method=[method] * B,
        verdict=[verdict] * B,
    )


def worst_verdicts(parts: Sequence[Evidence], probability: Tensor) -> list[str]:
    """Returns the worst verdict of each datum among values of enough posterior probability."""
    ranks = torch.tensor([[VERDICTS.index(v) for v in part.verdict] for part in parts])
    worst = ranks.masked_fill(probability <= LEAST_PROBABILITY, 0).amax(0)
    return [VERDICTS[rank] for rank in worst.tolist()]


def _sha256(tensors: dict[str, Tensor], texts: dict[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.cpu().numpy().data)
    return sha.hexdigest()


def pareto_khat(log_weights: Tensor) -> Tensor:
    """Fits a generalised Pareto to the tail of weights with logs [K, B]; returns its shape [B].

    The tail is the largest min(K / 5, 3 sqrt(K)) weights. The shape is NaN below 21 weights, and
    -inf where no weight exceeds the one just below the tail, as for equal weights.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry. Pareto smoothed importance sampling. 2024.
        Zhang and Stephens. A new and efficient estimation method for the generalized Pareto
        distribution. 2009.
    """
    K = len(log_weights)
    tail_size = math.ceil(min(K / 5, 3 * math.sqrt(K)))
    if tail_size < 5:
        return torch.full_like(log_weights[0], math.nan)
    top = log_weights.double().topk(tail_size + 1, 0).values
    weights = (top - top[0]).exp()
    cutoff = weights[-1].clamp(min=torch.finfo(torch.float64).tiny)
    khat = []
    for w, c in zip(weights.T, cutoff):
        excess = w[w > c] - c
        default = math.inf if len(excess) else -math.inf
        khat.append(default if len(excess) < 5 else _pareto_shape(excess))
    return log_weights.new_tensor(khat)


def _pareto_shape(excess: Tensor) -> float:
    """Returns the shape of a Pareto fitted to `excess`; NaN if the fit fails."""
    try:
        return float(fit_generalized_pareto(excess)[0])
    except ZeroDivisionError:
        return math.nan
