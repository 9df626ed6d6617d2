"""Discrete sites of a model summed out: each joint value is one more block of particles."""

from __future__ import annotations

from math import prod
from typing import Any

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.densities.evaluating import evaluating
from pyro_vae.densities.particles import folds, run_program
from pyro_vae.densities.programs import (
    Program,
    Sites,
    check_latents,
    is_random,
    is_traced,
    known_of,
    sample_sites,
)
from pyro_vae.densities.result import Densities, Latents, Site

__all__ = ["fields", "summed_densities", "summed_values"]

MOST = 10_000  # joint values
Values = dict[str, Tensor]


def summed_values(model: Program, x: Tensor, y: Tensor | None = None) -> Values:
    """The joint values [C, *event] of the latent sites marked `infer={"enumerate": "parallel"}`.

    They are found by one run on one row, once for each program; empty without such a site.

    Raises:
        ValueError: If there are more than 10,000 joint values, or a site has no list of them.
    """
    marked = {name: v for name, v in _latents(model, x, y).items() if v is not None}
    if not marked:
        return {}
    sizes = [len(support) for support in marked.values()]
    if prod(sizes) > MOST:
        raise ValueError(
            f"the discrete sites {sorted(marked)} have {prod(sizes)} joint values, more than "
            f"{MOST} to sum over: leave infer={{'enumerate': 'parallel'}} out of some"
        )
    index = torch.cartesian_prod(*map(torch.arange, sizes)).reshape(-1, len(sizes))
    return {name: v[index[:, i].to(v.device)] for i, (name, v) in enumerate(marked.items())}


def _latents(program: Program, x: Tensor, y: Tensor | None) -> dict[str, Tensor | None]:
    """The latent sites of a program; the support [C, *event] of one marked to be summed."""
    known, key = known_of(program), ("latents", y is None, x.dtype, x.device)
    if key in known:
        return known[key]
    if is_traced(x):
        return {}
    x, y = x[:1], None if y is None else y[:1]
    with poutine.block(), evaluating(program, seed=None, device=x.device):
        try:
            nodes: Any = run_program(program, x, y, 1, fold=folds(program, x, y)).nodes
        except Exception:  # which the run itself will show: other data may do
            return {}
    known[key] = {
        name: _support(name, site["infer"], site["fn"])
        for name, site in nodes.items()
        if site["type"] == "sample" and is_random(site) and not site["is_observed"]
    }
    return known[key]


def _support(name: str, infer: dict[str, Any], fn: Any) -> Tensor | None:
    if infer.get("enumerate") != "parallel":
        return None
    if not fn.has_enumerate_support:
        raise ValueError(
            f"site {name!r} cannot be summed out, for {type(fn).__name__} has no list of values: "
            "leave infer={'enumerate': 'parallel'} out, or give Categorical, Bernoulli or Binomial"
        )
    support = fn.enumerate_support(expand=False).detach()
    return support.reshape(len(support), *fn.event_shape)


class Given(Messenger):
    """Gives sites the joint values, each to a block of K particles, and latents their draws."""

    def __init__(self, values: Values, latents: Latents) -> None:
        super().__init__()
        self.values, self.latents = values, latents

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"] or name not in self.values | self.latents:
            return
        msg["value"], msg["done"] = self.latents.get(name), True
        if name in self.values:
            value, batch = self.values[name], msg["fn"].batch_shape
            blocks = value.repeat_interleave(batch[0] // len(value), 0).unsqueeze(1)
            msg["value"] = blocks.expand(*batch, *value.shape[1:])


class OverValues(dist.TorchDistribution):
    """Distributions of the C joint values, a batch [C * K, B], as one of batch [K, B].

    Args:
        base: The distribution of batch [C * K, B].
        log_weights: Of the values [C, K, B].
        scored: A value, and its log densities under each of the C [C, K, B].
    """

    arg_constraints = {}

    def __init__(self, base: Any, log_weights: Tensor, scored: tuple[Tensor, Tensor]) -> None:
        super().__init__(log_weights.shape[1:], base.event_shape, validate_args=False)
        self.base_dist, self.log_weights, self.scored = base, log_weights, scored

    @property
    def support(self) -> Any:
        return self.base_dist.support

    @property
    def mean(self) -> Tensor:
        means = self.base_dist.mean.unflatten(0, self.log_weights.shape[:2])
        weights = self.log_weights.exp().reshape(means.shape[:3] + (1,) * (means.ndim - 3))
        return (weights * means).sum(0)

    def terms(self, value: Tensor) -> Tensor:
        """Log densities under each of the C [C, K, B]."""
        known, terms = self.scored
        return terms if value is known else _terms(self.base_dist, value, self.log_weights)


class Mixture(OverValues):
    """p(value) with a discrete latent summed out."""

    def log_prob(self, value: Tensor) -> Tensor:
        return (self.log_weights + self.terms(value)).logsumexp(0)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        rows = self.base_dist.sample(sample_shape)
        rows = rows.unflatten(len(sample_shape), self.log_weights.shape[:2])
        chosen = dist.Categorical(logits=self.log_weights.movedim(0, -1)).sample(sample_shape)
        index = chosen.unsqueeze(len(sample_shape))
        index = index.reshape(index.shape + (1,) * len(self.event_shape))
        return rows.take_along_dim(index, len(sample_shape)).squeeze(len(sample_shape))


class Average(OverValues):
    """Log densities averaged over a discrete latent: of draws that depend on its value."""

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.base_dist.has_rsample

    def log_prob(self, value: Tensor) -> Tensor:
        weights = self.log_weights.exp()
        return (weights * self.terms(value).masked_fill(weights == 0, 0.0)).sum(0)


class Posterior(Average):
    """p(value | x, draws) of the discrete latent itself, which the weights are."""

    has_rsample = True  # type: ignore[assignment]

    @property
    def mean(self) -> Tensor:
        return self.log_weights.new_empty(*self.batch_shape, 0)  # it has no units


def summed_densities(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    num_particles: int,
    values: Values,
) -> Densities:
    r"""Densities with discrete latents c of the model summed out.

    .. math:: \log w_k = \log \sum_c \frac{p(x, c, z_{kc})}{q(z_{kc} \mid x, c)}

    Where the guide has no site c its draws serve every value, and what depends on c becomes a
    mixture: all terms are those of the model without c. Where it has one, of which the value
    alone counts, each value has draws of its own. Then c stays a site, whose distribution in
    the guide is p(c | x, z), and all else is averaged over it; every KL is sampled. Only with
    infer={"classifier": True} is its q(c | x) looked at: see `_classifier_term`.
    """
    C, K = len(next(iter(values.values()))), num_particles
    others = _latents(model, x, y).keys() - values
    q, own = _guided(guide, x, y, K, values)
    proposed = {n: q.pop(n) for n in values if n in q}
    own = own or not others
    rows = C * K
    draws = {n: s["value"] for n, s in q.items()}
    if not own:
        draws = {n: z.repeat(C, *(1,) * (z.ndim - 1)) for n, z in draws.items()}
    given, fold = Given(values, draws), folds(model, x, y, rows)
    p = sample_sites(run_program(model, x, y, rows, given, fold=fold), "model")
    latent = [n for n, s in p.items() if not s["is_observed"] and n not in values]
    if latent or q:
        check_latents(latent, q)
    apart = fields(p, q)
    shape = torch.zeros(()).expand(C, K, apart["num_data"])
    log_p = {n: _terms(s["fn"], s["value"], shape) for n, s in p.items()}
    log_q = {n: _terms(s["fn"], s["value"], shape if own else shape[:1]) for n, s in q.items()}
    parts = _averages(p, q, log_p, log_q, values) if own else _mixtures(p, q, log_p, values)
    label_term = _label_term(p, log_p, log_q)
    if any(s["infer"].get("classifier") for s in proposed.values()):
        log_c = _total({n: _terms(s["fn"], s["value"], shape) for n, s in proposed.items()})
        label_term = _classifier_term(p, log_p, log_q, log_c)
    return Densities(
        **apart | dict(zip(("sites", "observed"), parts)),
        num_particles=K,
        each=Densities(**apart, num_particles=rows) if own else None,
        label_term=label_term,
    )


def fields(p: Sites, q: Sites) -> dict[str, Any]:
    """What `Densities` is made of, from a model's sites and a guide's; others are observed."""
    (plate,) = (f for f in next(iter(p.values()))["cond_indep_stack"] if f.name == "data")
    return {
        "sites": {n: Site(s["value"], q[n]["fn"], s["fn"]) for n, s in p.items() if n in q},
        "observed": {n: (s["fn"], s["value"]) for n, s in p.items() if n not in q},
        "same_order": [n for n in p if n in q] == list(q),
        "num_data": plate.size,
        "scale": (plate.full_size or plate.size) / plate.size,
        "site_scales": [(n, s["scale"]) for sites in (p, q) for n, s in sites.items()],
    }


def _guided(
    guide: Program, x: Tensor, y: Tensor | None, num_particles: int, values: Values
) -> tuple[Sites, bool]:
    """Sites of a guide, and whether it has those of `values`, and so draws for each of them."""
    own = bool(values.keys() & _latents(guide, x, y).keys())
    rows = num_particles * (len(next(iter(values.values()))) if own else 1)
    given, fold = Given(values if own else {}, {}), folds(guide, x, y, rows)
    sites = sample_sites(run_program(guide, x, y, rows, given, fold=fold), "guide")
    if values.keys() & sites.keys() and not own:
        raise ValueError(
            f"guide site {sorted(values)} was not seen in a run on one row: let the guide take "
            "any number of rows"
        )
    return sites, own


def _mixtures(
    p: Sites, q: Sites, log_p: dict[str, Tensor], values: Values
) -> tuple[dict[str, Site], dict[str, tuple[Any, Tensor]]]:
    """Sites of a model without c: each given those before it, with c summed out."""
    latents, observed = {}, {}
    joint = torch.zeros_like(next(iter(log_p.values())))  # log p(c, sites so far) [C, K, B]
    for name, site in p.items():
        constant, value = site["infer"].get("constant"), site["value"]
        if name not in values:
            value = q[name]["value"] if name in q else value
            if constant is not None:
                fn = constant.expand(joint.shape[1:])
            else:
                fn = Mixture(site["fn"], joint - joint.logsumexp(0), (value, log_p[name]))
            if name in q:
                latents[name] = Site(value, q[name]["fn"], fn)
            else:
                observed[name] = fn, value
        if name in values or constant is None:
            joint = joint + log_p[name]
    return latents, observed


def _averages(
    p: Sites, q: Sites, log_p: dict[str, Tensor], log_q: dict[str, Tensor], values: Values
) -> tuple[dict[str, Site], dict[str, tuple[Any, Tensor]]]:
    """Sites given c, averaged over p(c | x, draws), and c itself."""
    weights = (_total(log_p) - _total(log_q)).log_softmax(0)
    latents, observed = {}, {}
    first = next(iter(values))
    for name, site in p.items():
        fn, value = site["fn"], site["value"]
        of_model = Average(fn, weights, (value, log_p[name]))
        if name in q:
            of_guide = Average(q[name]["fn"], weights, (value, log_q[name]))
            latents[name] = Site(value, of_guide, of_model)
        elif name in values:  # all of them are one joint latent
            log_posterior = weights if name == first else torch.zeros_like(weights)
            latents[name] = Site(value, Posterior(fn, weights, (value, log_posterior)), of_model)
        else:
            observed[name] = of_model, value
    return latents, observed


def _label_term(p: Sites, log_p: dict[str, Tensor], log_q: dict[str, Tensor]) -> Tensor | None:
    """Sum over sites with infer={"label_weight": w} of w log p(label | x) [B], or None."""
    weights = {n: s["infer"].get("label_weight") for n, s in p.items()}
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        return None
    rest = _total({n: v for n, v in log_p.items() if n not in weights}) - _total(log_q)
    terms = {n: w * (rest + log_p[n]).logsumexp((0, 1)) for n, w in weights.items()}
    return _total(terms) - sum(weights.values()) * rest.logsumexp((0, 1))


def _classifier_term(
    p: Sites, log_p: dict[str, Tensor], log_q: dict[str, Tensor], log_classifier: Tensor
) -> Tensor:
    r"""What a classifier q(c | x) of the guide adds [B], its log densities [C, K, B].

    .. math:: w \log q(l \mid x) - \mathrm{KL}(q(c \mid x, l) \,\|\, p(c \mid x, l))

    for a label l of weight w, certain or none. The bound less the KL, which is 0 at a certain
    label, is that of a guide that draws c from it.
    """
    weights = {n: s["infer"]["label_weight"] for n, s in p.items() if "label_weight" in s["infer"]}
    labels = {n: log_p[n][:, 0] for n in weights}
    rest = _total({n: v for n, v in log_p.items() if n not in weights}) - _total(log_q)
    log_w, log_c, said = rest.logsumexp(1), log_classifier.mean(1), _total(labels)
    posterior = (log_c + said).softmax(0)
    kl = (posterior * (log_c - log_w)).sum(0)
    kl = kl - (log_c + said).logsumexp(0) + (log_w + said).logsumexp(0)
    return _total({n: w * (log_c + labels[n]).logsumexp(0) for n, w in weights.items()}) - kl


def _total(terms: dict[str, Tensor]) -> Tensor:
    return sum(terms.values(), torch.zeros(()))


def _terms(fn: Any, value: Tensor, like: Tensor) -> Tensor:
    """Log densities [C, K, B] of a value [*K, B, *event] under a batch [C * K, B]."""
    C, K = like.shape[:2]
    dim = value.ndim - len(fn.event_shape) - 2
    if dim >= 0 and value.shape[dim] == K:
        value = value.repeat(*(1,) * dim, C, *(1,) * (value.ndim - dim - 1))
    return fn.log_prob(value).unflatten(0, (C, K)).expand(like.shape)
