"""The models of the reference set: plain Pyro programs, a class for each family.

A family is made of weights and options alone. Where log p(x) can be had exactly, `exact` gives it
in float64; a factor `fine` makes a quadrature's grid finer.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

CHUNK = 4000  # points of a quadrature at once


class Family(nn.Module):
    """A model and an amortised guide of one latent vector "z"; a row that lacks entries has NaN.

    Args:
        weights: Tensors of the model by name; those of the guide begin with "guide_".
        options: What else the family takes.
    """

    def __init__(self, weights: dict[str, Tensor], **options: Any) -> None:
        super().__init__()
        for name, tensor in weights.items():
            self.register_buffer(name, tensor)
        vars(self).update(options)

    @property
    def sites(self) -> dict[str, tuple[int, constraints.Constraint]]:
        """Size and support of each latent vector."""
        return {"z": (self.latents, constraints.real)}

    @property
    def latents(self) -> int:
        """Size of z."""
        return len(self.W)

    @property
    def sizes(self) -> list[int]:
        """Unconstrained size of each latent vector."""
        return [
            biject_to(support).inverse_shape(torch.Size((size,)))[0]
            for size, support in self.sites.values()
        ]

    def prior(self) -> TorchDistribution:
        """p(z)."""
        return normal(self.W.new_zeros(self.latents), 1.0)

    def mean(self, z: Tensor) -> Tensor:
        """E[x | z], linear unless a family says otherwise."""
        return z @ self.W

    def likelihood(self, z: Tensor) -> TorchDistribution:
        """p(x | z), Gaussian about `mean` unless a family says otherwise."""
        return Entries(self.mean(z), self.sigma)

    def latent(self) -> Tensor:
        """Draws the latents."""
        return pyro.sample("z", self.prior())

    def model(self, x: Tensor | None = None, size: int = 1) -> None:
        """The Pyro model; without data it draws `size` rows."""
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            pyro.sample("x", self.likelihood(self.latent()), obs=x)

    def guide(self, x: Tensor) -> None:
        """Independent Normals by a network of one layer, mapped to the supports."""
        unit = ((x - self.guide_loc) / self.guide_scale).nan_to_num(0.0).clamp(-9, 9)
        hidden = torch.tanh(unit @ self.guide_in + self.guide_bias)
        loc, raw = (hidden @ self.guide_out + self.guide_end).chunk(2, -1)
        scale, start = nn.functional.softplus(raw) + 1e-3, 0
        with pyro.plate("data", len(x), dim=-1):
            for (name, (_, support)), size in zip(self.sites.items(), self.sizes):
                q = normal(loc[..., start : start + size], scale[..., start : start + size])
                if support is not constraints.real:
                    q = dist.TransformedDistribution(q, biject_to(support))
                pyro.sample(name, q)
                start += size

    def exact(self, x: Tensor, fine: int = 1) -> Tensor:
        """log p(x) [N], of a module and data in double precision."""
        raise NotImplementedError


class Entries(TorchDistribution):
    """Independent Normals [*B, X] of which those are left out whose value is NaN."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Entries:
        shape = (*batch_shape, *self.event_shape)
        return Entries(self.loc.expand(shape), self.scale.expand(shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        return self.loc + self.scale * torch.randn(
            shape, dtype=self.loc.dtype, device=self.loc.device
        )

    def log_prob(self, value: Tensor) -> Tensor:
        seen = ~value.isnan()
        unit = (value.nan_to_num() - self.loc) / self.scale
        each = -unit.square() / 2 - self.scale.log() - math.log(2 * math.pi) / 2
        return (each * seen).sum(-1)


def normal(loc: Tensor, scale: Tensor | float) -> TorchDistribution:
    """Independent Normals of a vector."""
    return dist.Normal(loc, scale).to_event(1)


def gaussian(x: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
    """log N(x; loc, covariance) [*S, N] of the entries of x [N, X] that are there, loc [*S, X]."""
    parts = []
    for row in x:
        seen = ~row.isnan()
        tril = torch.linalg.cholesky(covariance[seen][:, seen])
        unit = (row - loc)[..., seen] @ torch.linalg.inv(tril).T
        log_det = tril.diagonal().log().sum() + int(seen.sum()) * math.log(2 * math.pi) / 2
        parts.append(-unit.square().sum(-1) / 2 - log_det)
    return torch.stack(parts, -1)


def line(low: float, high: float, points: int) -> tuple[Tensor, Tensor]:
    """Points of a midpoint rule [G, 1] and the logarithm of a cell."""
    cell = (high - low) / points
    return (low + cell * (torch.arange(points, dtype=torch.float64) + 0.5)).unsqueeze(-1), (
        torch.tensor(math.log(cell), dtype=torch.float64)
    )


def square(half: float, points: int) -> tuple[Tensor, Tensor]:
    """The same of a square [G * G, 2]."""
    axis, cell = line(-half, half, points)
    return torch.cartesian_prod(axis[:, 0], axis[:, 0]), 2 * cell


def integral(log_density: Any, grid: tuple[Tensor, Tensor]) -> Tensor:
    """Logarithm of the integral [N] of exp log_density [G, N] over a grid."""
    points, cell = grid
    parts = [log_density(part).logsumexp(0) for part in points.split(CHUNK)]
    return torch.stack(parts).logsumexp(0) + cell


def standard(z: Tensor) -> Tensor:
    """log N(z; 0, I) [G, 1] of z [G, D]."""
    return (-z.square() / 2 - math.log(2 * math.pi) / 2).sum(-1, keepdim=True)


class Linear(Family):
    """x = z W + noise of deviations sigma [X], z ~ N(0, I)."""

    def exact(self, x: Tensor, fine: int = 1) -> Tensor:
        covariance = self.W.T @ self.W + torch.diag(self.sigma**2)
        return gaussian(x, torch.zeros_like(self.sigma), covariance)


FEATURES: dict[str, Any] = {
    "abs": lambda z: z.abs(),
    "uneven": lambda z: (z - 0.35).abs(),
    "waves": lambda z: torch.cat([torch.sin(5 * z), z / 4], -1),
    "curve": lambda z: torch.cat([z, z**2 / 2, torch.sin(2 * z)], -1),
    "ring": lambda z: (z.square().sum(-1, keepdim=True) + 1e-6).sqrt(),
    "banana": lambda z: torch.stack([z[..., 0] + z[..., 1] ** 2, z[..., 1] / 3], -1),
    "pair": lambda z: torch.stack([z.sum(-1), z.prod(-1)], -1),
    "product": lambda z: z.prod(-1, keepdim=True),
}


class Folded(Family):
    """x = f(z_1..m) A + (z_m+1..D) W + noise, m = 1 or 2: bent or folded in few directions."""

    @property
    def latents(self) -> int:
        return self.bent + len(self.W)

    def mean(self, z: Tensor) -> Tensor:
        return FEATURES[self.map](z[..., : self.bent]) @ self.A + z[..., self.bent :] @ self.W

    def exact(self, x: Tensor, fine: int = 1) -> Tensor:
        covariance = self.W.T @ self.W + torch.diag(self.sigma**2)

        def log_density(z: Tensor) -> Tensor:
            return standard(z) + gaussian(x, FEATURES[self.map](z) @ self.A, covariance)

        grid = line(-9, 9, 40_000 * fine) if self.bent == 1 else square(8, 500 * fine)
        return integral(log_density, grid)


class Mixture(Family):
    """z from a mixture of Gaussians with full covariances, x = z W + noise."""

    def prior(self) -> TorchDistribution:
        parts = dist.MultivariateNormal(self.loc, scale_tril=self.tril)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), parts)

    def exact(self, x: Tensor, fine: int = 1) -> Tensor:
        W, noise = self.W, torch.diag(self.sigma**2)
        parts = [
            gaussian(x, loc @ W, W.T @ tril @ tril.T @ W + noise)
            for loc, tril in zip(self.loc, self.tril)
        ]
        return (torch.stack(parts, -1) + self.logits.log_softmax(-1)).logsumexp(-1)


class Units(Family):
    """Each unit of z from a mixture of two Normals of its own, x = z W + noise."""

    def prior(self) -> TorchDistribution:
        shape = (self.latents, 2)
        parts = dist.Normal(self.loc.expand(shape), self.scale.expand(shape))
        weights = dist.Categorical(logits=self.logits.expand(shape))
        return dist.MixtureSameFamily(weights, parts).to_event(1)

    def exact(self, x: Tensor, fine: int = 1) -> Tensor:
        W, noise = self.W, torch.diag(self.sigma**2)
        logits, parts = self.logits.log_softmax(-1), []
        for kinds in torch.cartesian_prod(*[torch.arange(2)] * self.latents):
            covariance = W.T @ torch.diag(self.scale[kinds] ** 2) @ W + noise
            parts.append(gaussian(x, self.loc[kinds] @ W, covariance) + logits[kinds].sum())
        return torch.stack(parts).logsumexp(0)


class Heavy(Family):
    """Independent heavy-tailed units; the first are seen, x = (a * z_seen) Q + noise, Q turns."""

    @property
    def latents(self) -> int:
        return len(self.a) + self.idle

    def unit(self) -> TorchDistribution:
        zero = torch.zeros_like(self.a[0])
        return dist.Laplace(zero, 1.0) if self.df is None else dist.StudentT(self.df, zero, 1.0)

    def prior(self) -> TorchDistribution:
        return self.unit().expand([self.latents]).to_event(1)

    def mean(self, z: Tensor) -> Tensor:
        return (self.a * z[..., : len(self.a)]) @ self.Q

    def exact(self, x: Tensor, fine: int = 1) -> Tensor:
        seen = x @ torch.linalg.inv(self.Q)
        t, cell = line(-40, 40, 80_000 * fine)
        total = -torch.linalg.slogdet(self.Q).logabsdet
        for y, a in zip(seen.T, self.a):
            z = (y + self.sigma * t) / a
            total = total + (self.unit().log_prob(z) + standard(t)).logsumexp(0) + cell - a.log()
        return total


class Funnel(Family):
    """log scale a ~ N(0, spread^2), b ~ N(0, e^2a) for all units alike, x = c b + noise."""

    @property
    def sites(self) -> dict[str, tuple[int, constraints.Constraint]]:
        return {"a": (1, constraints.real), "b": (len(self.c), constraints.real)}

    def latent(self) -> Tensor:
        a = pyro.sample("a", normal(self.c.new_zeros(1), self.spread))
        return pyro.sample("b", normal(torch.zeros_like(self.c), a.exp().expand_as(a * self.c)))

    def mean(self, z: Tensor) -> Tensor:
        return self.c * z

    def exact(self, x: Tensor, fine: int = 1) -> Tensor:
        def log_density(t: Tensor) -> Tensor:
            scale = ((self.spread * t).exp().square() * self.c**2 + self.sigma**2).sqrt()
            return standard(t) + normal(0.0 * scale, scale).log_prob(x[:, None]).T

        return integral(log_density, line(-10, 10, 4000 * fine))


class Precision(Funnel):
    """As the funnel, b ~ N(0, 1 / a) with a precision a ~ Gamma."""

    @property
    def sites(self) -> dict[str, tuple[int, constraints.Constraint]]:
        return {"a": (1, constraints.positive), "b": (len(self.c), constraints.real)}

    def latent(self) -> Tensor:
        a = pyro.sample("a", dist.Gamma(self.shape * torch.ones_like(self.c[:1]), 1.0).to_event(1))
        return pyro.sample("b", normal(torch.zeros_like(self.c), a.rsqrt().expand_as(a * self.c)))

    def exact(self, x: Tensor, fine: int = 1) -> Tensor:
        gamma = dist.Gamma(torch.tensor(self.shape, dtype=torch.float64), 1.0)

        def log_density(t: Tensor) -> Tensor:
            scale = (self.c**2 / t.exp() + self.sigma**2).sqrt()
            inner = normal(0.0 * scale, scale).log_prob(x[:, None]).T
            return gamma.log_prob(t.exp()) + t + inner

        return integral(log_density, line(-40, 8, 20_000 * fine))


class Layers(Family):
    """Two layers: z2 ~ N(0, I), z1 = z2 V + noise, x = z1 W + noise."""

    @property
    def sites(self) -> dict[str, tuple[int, constraints.Constraint]]:
        return {"z2": (len(self.V), constraints.real), "z1": (len(self.W), constraints.real)}

    def latent(self) -> Tensor:
        z2 = pyro.sample("z2", normal(torch.zeros_like(self.V[:, 0]), 1.0))
        return pyro.sample("z1", normal(z2 @ self.V, self.between))

    def exact(self, x: Tensor, fine: int = 1) -> Tensor:
        middle = self.V.T @ self.V + self.between**2 * torch.eye(len(self.W), dtype=x.dtype)
        covariance = self.W.T @ middle @ self.W + torch.diag(self.sigma**2)
        return gaussian(x, torch.zeros_like(self.sigma), covariance)


class Classes(Family):
    """A class that is summed out: x = z W_c + b_c + noise, with weights of the classes."""

    @property
    def latents(self) -> int:
        return self.W.shape[1]

    def likelihood(self, z: Tensor) -> TorchDistribution:
        mean = torch.einsum("...d,cdx->...cx", z, self.W) + self.b
        weights = dist.Categorical(logits=self.logits.expand(mean.shape[:-1]))
        return dist.MixtureSameFamily(weights, normal(mean, self.sigma.expand_as(mean)))

    def exact(self, x: Tensor, fine: int = 1) -> Tensor:
        noise = torch.diag(self.sigma**2)
        parts = [gaussian(x, b, W.T @ W + noise) for W, b in zip(self.W, self.b)]
        return (torch.stack(parts, -1) + self.logits.log_softmax(-1)).logsumexp(-1)


class Network(Family):
    """One or two latents through a hidden layer to Bernoulli pixels or Poisson counts."""

    @property
    def latents(self) -> int:
        return len(self.V)

    def likelihood(self, z: Tensor) -> TorchDistribution:
        raw = torch.tanh(z @ self.V + self.c) @ self.W + self.b
        each = dist.Poisson(raw.exp()) if self.counts else dist.Bernoulli(logits=raw)
        return each.to_event(1)

    def exact(self, x: Tensor, fine: int = 1) -> Tensor:
        def log_density(z: Tensor) -> Tensor:
            return standard(z) + self.likelihood(z.unsqueeze(1)).log_prob(x)

        grid = line(-9, 9, 20_000 * fine) if self.latents == 1 else square(8, 500 * fine)
        return integral(log_density, grid)


class Counts(Family):
    """Rates of a Gamma, one for each of the Poisson counts x, with exposures."""

    @property
    def sites(self) -> dict[str, tuple[int, constraints.Constraint]]:
        return {"z": (len(self.shape), constraints.positive)}

    def prior(self) -> TorchDistribution:
        return dist.Gamma(self.shape, self.rate).to_event(1)

    def likelihood(self, z: Tensor) -> TorchDistribution:
        return dist.Poisson(z * self.exposure).to_event(1)

    def exact(self, x: Tensor, fine: int = 1) -> Tensor:
        return dist.GammaPoisson(self.shape, self.rate / self.exposure).to_event(1).log_prob(x)


class Shares(Family):
    """Shares of a Dirichlet, x counts of so many throws."""

    @property
    def sites(self) -> dict[str, tuple[int, constraints.Constraint]]:
        return {"z": (len(self.concentration), constraints.simplex)}

    def prior(self) -> TorchDistribution:
        return dist.Dirichlet(self.concentration)

    def likelihood(self, z: Tensor) -> TorchDistribution:
        return dist.Multinomial(self.throws, probs=z)

    def exact(self, x: Tensor, fine: int = 1) -> Tensor:
        return dist.DirichletMultinomial(self.concentration, total_count=self.throws).log_prob(x)


class Box(Family):
    """z uniform between -1 and 2 in each dimension, x = (a * z) Q + noise, Q turns."""

    low, high = -1.0, 2.0

    @property
    def sites(self) -> dict[str, tuple[int, constraints.Constraint]]:
        return {"z": (len(self.a), constraints.interval(self.low, self.high))}

    def prior(self) -> TorchDistribution:
        zero = torch.zeros_like(self.a)
        return dist.Uniform(self.low + zero, self.high + zero).to_event(1)

    def mean(self, z: Tensor) -> Tensor:
        return (self.a * z) @ self.Q

    def exact(self, x: Tensor, fine: int = 1) -> Tensor:
        seen = x @ torch.linalg.inv(self.Q)
        upper, lower = ((seen - self.a * end) / self.sigma for end in (self.low, self.high))
        inside = torch.special.ndtr(upper) - torch.special.ndtr(lower)
        log_det = torch.linalg.slogdet(self.Q).logabsdet
        return (inside.log() - self.a.log() - math.log(self.high - self.low)).sum(-1) - log_det


class Trained(Family):
    """A VAE that `pyro_vae.build` declares; with two latents its log p(x) is a quadrature."""

    def __init__(self, weights: dict[str, Tensor], **declaration: Any) -> None:
        from pyro_vae import build

        nn.Module.__init__(self)
        self.vae = build(**declaration)
        self.vae.load_state_dict(weights)
        self.eval()

    @property
    def latents(self) -> int:
        return self.vae.posterior.latent_dim

    def model(self, x: Tensor | None = None, size: int = 1) -> None:
        self.vae.model(x, size=size)

    def guide(self, x: Tensor) -> None:
        self.vae.guide(x)

    def exact(self, x: Tensor, fine: int = 1) -> Tensor:
        def log_density(z: Tensor) -> Tensor:
            return standard(z) + self.vae.likelihood(z.unsqueeze(1)).log_prob(x)

        with torch.no_grad():
            return integral(log_density, square(8, 500 * fine))


FAMILIES = {cls.__name__: cls for cls in Family.__subclasses__() + [Precision]}
