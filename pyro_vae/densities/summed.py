"""Sums discrete sites of a model out: each joint value is one more block of K particles."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import is_validation_enabled
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.densities.particles import listed_values, run_program, trial_result
from pyro_vae.densities.programs import Latents, Program, Sites, check_latents, sample_sites
from pyro_vae.densities.result import Densities, Site, densities_of

__all__ = ["check_values", "summed_densities", "summed_values"]

MOST_VALUES = 10_000  # joint values that may be summed over
EXCLUDED_GAP = 100.0  # nats below the least likely value, for values of log weight -inf


def summed_values(model: Program, x: Tensor, y: Tensor | None = None) -> Latents:
    """Returns the joint values [C, *event] of latent sites with `infer={"enumerate": "parallel"}`.

    Trial runs find them, once for each program; empty without such a site.

    Raises:
        ValueError: If there are more than 10,000 joint values, or a site cannot list its values.
    """
    marked = {name: v for name, v in trial_result(model, x, y).latents.items() if v is not None}
    if not marked:
        return {}
    sizes = [len(support) for support in marked.values()]
    if prod(sizes) > MOST_VALUES:
        raise ValueError(
            f"the discrete sites {sorted(marked)} have {prod(sizes)} joint values, more than "
            f"{MOST_VALUES} to sum over: leave infer={{'enumerate': 'parallel'}} out of some"
        )
    index = torch.cartesian_prod(*map(torch.arange, sizes)).reshape(-1, len(sizes))
    return {name: v[index[:, i].to(v.device)] for i, (name, v) in enumerate(marked.items())}


def check_values(model: Program, x: Tensor, y: Tensor | None, sites: Sites) -> None:
    """Raises a ValueError if the number of values that are summed over depends on the data."""
    tried = {n: v for n, v in trial_result(model, x, y).latents.items() if v is not None}
    for name, values in tried.items() if is_validation_enabled() else ():
        found = listed_values(name, sites[name])
        if found is None or len(found) != len(values):
            raise ValueError(
                f"site {name!r} cannot be summed out, for its list of values depends on the data: "
                "give it one for all rows"
            )


class FixSites(Messenger):
    """Fixes summed sites at the joint values, K particles for each, and latents at given draws."""

    def __init__(self, values: Latents, latents: Latents) -> None:
        super().__init__()
        self.values, self.latents = values, latents

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"] or name not in self.values | self.latents:
            return
        msg["value"] = self.latents.get(name)
        if name in self.values:
            value, batch = self.values[name], msg["fn"].batch_shape
            blocks = value.repeat_interleave(batch[0] // len(value), 0).unsqueeze(1)
            msg["value"] = blocks.expand(*batch, *value.shape[1:])


class CombinedDistribution(dist.TorchDistribution):
    """Wraps distributions under each of C joint values, batch [C * K, B], as one of batch [K, B].

    The values have log weights [C, K, B]. `cached` holds a sample, and its log densities under
    each value [C, K, B], already computed.
    """

    arg_constraints = {}

    def __init__(
        self,
        base: Any,
        log_weights: Tensor,
        cached: tuple[Tensor, Tensor],
        has_rsample: bool = False,
    ) -> None:
        super().__init__(log_weights.shape[1:], base.event_shape)
        self.base_dist, self.log_weights, self.cached = base, log_weights, cached
        self.has_rsample = has_rsample

    def log_probs(self, value: Tensor) -> Tensor:
        """Returns log densities under each of the C values [C, K, B]."""
        cached_value, log_prob = self.cached
        if value is cached_value:
            return log_prob
        return _log_probs(self.base_dist, value, self.log_weights)


class Mixture(CombinedDistribution):
    """The mixture over the C values: a discrete latent is summed out."""

    def log_prob(self, value: Tensor) -> Tensor:
        return (self.log_weights + self.log_probs(value)).logsumexp(0)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        rows = self.base_dist.sample(sample_shape)
        rows = rows.unflatten(len(sample_shape), self.log_weights.shape[:2])
        chosen = dist.Categorical(logits=self.log_weights.movedim(0, -1)).sample(sample_shape)
        index = chosen.unsqueeze(len(sample_shape))
        index = index.reshape(index.shape + (1,) * len(self.event_shape))
        return rows.take_along_dim(index, len(sample_shape)).squeeze(len(sample_shape))


class Average(CombinedDistribution):
    """Log densities averaged over a discrete latent, each of whose values has its own draws."""

    def log_prob(self, value: Tensor) -> Tensor:
        weights = self.log_weights.exp()
        return (weights * self.log_probs(value).masked_fill(weights == 0, 0.0)).sum(0)


def summed_densities(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    num_particles: int,
    values: Latents,
) -> Densities:
    r"""Returns the densities with discrete latents c of the model summed out.

    .. math:: \log w_k = \log \sum_c \frac{p(x, c, z_{kc})}{q(z_{kc} \mid x, c)}

    If the guide has no site c, its draws serve every value, and sites that depend on c become
    mixtures: all terms are those of the model without c. If it has one, it draws its other
    latents for each value, and its distribution of c is ignored. Then, or if the model has no
    other latents, c stays a site whose distribution in the guide is p(c | x, z), the other
    sites are averaged over it, and every KL is sampled. Only with infer={"classifier": True} is
    the guide's q(c | x) used: see `_classifier_term`.
    """
    C, K = len(next(iter(values.values()))), num_particles
    per_value = bool(values.keys() & trial_result(guide, x, y).latents.keys())
    fix_values = FixSites(values if per_value else {}, {})
    q = sample_sites(run_program(guide, x, y, C * K if per_value else K, fix_values), "guide")
    if values.keys() & q.keys() and not per_value:
        raise ValueError(
            f"guide site {sorted(values)} was not seen in a run on one row: let the guide take "
            "any number of rows"
        )
    q_summed = {n: q.pop(n) for n in values if n in q}
    per_value = per_value or trial_result(model, x, y).latents.keys() == values.keys()
    draws = {n: s["value"] for n, s in q.items()}
    if not per_value:
        draws = {n: z.repeat(C, *(1,) * (z.ndim - 1)) for n, z in draws.items()}
    p = sample_sites(run_program(model, x, y, C * K, FixSites(values, draws)), "model")
    check_values(model, x, y, p)
    latent = [n for n, s in p.items() if not s["is_observed"] and n not in values]
    if latent or q:
        check_latents(latent, q)
    expanded = densities_of(p, q, C * K)
    like = torch.zeros(()).expand(C, K, expanded.num_data)
    log_p = {n: _log_probs(s["fn"], s["value"], like) for n, s in p.items()}
    like_q = like if per_value else like[:1]
    log_q = {n: _log_probs(s["fn"], s["value"], like_q) for n, s in q.items()}
    label_term = _label_term(p, log_p, log_q)
    if any(s["infer"].get("classifier") for s in q_summed.values()):
        log_c = {n: _log_probs(s["fn"], s["value"], like) for n, s in q_summed.items()}
        label_term = _classifier_term(p, log_p, log_q, _total(log_c))
    sites, observed = (
        _averages(p, q, log_p, log_q, values) if per_value else _mixtures(p, q, log_p, values)
    )
    return replace(
        expanded,
        sites=sites,
        observed=observed,
        num_particles=K,
        each=expanded if per_value else None,
        label_term=label_term,
    )


def _mixtures(
    p: Sites, q: Sites, log_p: dict[str, Tensor], values: Latents
) -> tuple[dict[str, Site], dict[str, tuple[Any, Tensor]]]:
    """Returns the sites of a model without c: each given those before it, with c summed out."""
    latents, observed = {}, {}
    joint = torch.zeros_like(next(iter(log_p.values())))  # log p(c, sites so far) [C, K, B]
    for name, site in p.items():
        if name in values:
            joint = joint + log_p[name]
            continue
        value, constant = q.get(name, site)["value"], site["infer"].get("constant")
        if constant is None:
            fn = Mixture(site["fn"], joint - joint.logsumexp(0), (value, log_p[name]))
            joint = joint + log_p[name]
        else:
            fn = constant.expand(joint.shape[1:])
        if name in q:
            latents[name] = Site(value, q[name]["fn"], fn)
        else:
            observed[name] = fn, value
    return latents, observed


def _averages(
    p: Sites, q: Sites, log_p: Latents, log_q: Latents, values: Latents
) -> tuple[dict[str, Site], dict[str, tuple[Any, Tensor]]]:
    """Returns the sites given c, averaged over p(c | x, draws), and c itself."""
    weights = (_total(log_p) - _total(log_q)).log_softmax(0)
    latents, observed = {}, {}
    first_summed = next(iter(values))
    for name, site in p.items():
        fn, value = site["fn"], site["value"]
        of_model = Average(fn, weights, (value, log_p[name]))
        if name in q:
            of_draws = q[name]["fn"]
            of_guide = Average(of_draws, weights, (value, log_q[name]), of_draws.has_rsample)
            latents[name] = Site(value, of_guide, of_model)
        elif name in values:  # the summed sites together are one joint latent
            log_posterior = weights if name == first_summed else torch.zeros_like(weights)
            of_guide = Average(fn, weights, (value, log_posterior), has_rsample=True)
            latents[name] = Site(value, of_guide, of_model)
        else:
            observed[name] = of_model, value
    return latents, observed


def _label_term(p: Sites, log_p: Latents, log_q: Latents) -> Tensor | None:
    """Returns the sum of w log p(label | x) [B] for infer={"label_weight": w}, or None."""
    weights = {n: s["infer"].get("label_weight") for n, s in p.items()}
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        return None
    unlabelled = _total({n: v for n, v in log_p.items() if n not in weights}) - _total(log_q)
    terms = {n: w * (unlabelled + log_p[n]).logsumexp((0, 1)) for n, w in weights.items()}
    return _total(terms) - sum(weights.values()) * unlabelled.logsumexp((0, 1))


def _classifier_term(
    p: Sites, log_p: dict[str, Tensor], log_q: dict[str, Tensor], log_classifier: Tensor
) -> Tensor:
    r"""Returns the term [B] of a classifier q(c | x) in the guide, of log densities [C, K, B].

    .. math:: w \log q(l \mid x) - \mathrm{KL}(q(c \mid x, l) \,\|\, p(c \mid x, l))

    for a label l of weight w, which is either certain or missing; the KL is 0 where it is
    certain. The bound minus the KL is the bound of a guide that draws c from the classifier.
    """
    weights = {n: s["infer"]["label_weight"] for n, s in p.items() if "label_weight" in s["infer"]}
    labels = {n: log_p[n][:, 0] for n in weights}
    unlabelled = _total({n: v for n, v in log_p.items() if n not in weights}) - _total(log_q)
    excluded = unlabelled == -torch.inf  # by x: taken as very unlikely, lest the KL be infinite
    lowest = unlabelled.detach().masked_fill(excluded, torch.inf).amin((0, 1))
    unlabelled = torch.where(excluded, lowest - EXCLUDED_GAP, unlabelled)
    log_w, log_c, log_label = unlabelled.logsumexp(1), log_classifier.mean(1), _total(labels)
    posterior = (log_c + log_label).softmax(0)
    kl = (posterior * (log_c - log_w)).sum(0)
    kl = kl - (log_c + log_label).logsumexp(0) + (log_w + log_label).logsumexp(0)
    return _total({n: w * (log_c + labels[n]).logsumexp(0) for n, w in weights.items()}) - kl


def _total(terms: dict[str, Tensor]) -> Tensor:
    return sum(terms.values(), torch.zeros(()))


def _log_probs(fn: Any, value: Tensor, like: Tensor) -> Tensor:
    """Returns log densities [C, K, B] of a value [*K, B, *event] under a batch [C * K, B]."""
    C, K = like.shape[:2]
    dim = value.ndim - len(fn.event_shape) - 2
    if dim >= 0 and value.shape[dim] == K:
        value = value.repeat(*(1,) * dim, C, *(1,) * (value.ndim - dim - 1))
    return fn.log_prob(value).unflatten(0, (C, K)).expand(like.shape)
