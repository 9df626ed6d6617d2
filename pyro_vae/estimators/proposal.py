"""A mixture of multivariate t for each posterior, and its fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Chi2, LowerCholeskyTransform

from pyro_vae.estimators.target import Target, gradients

LEAST_DF = 20  # fewest degrees of freedom of the components
LEAST_PRECISION, MOST_PRECISION = 0.5, 1e12  # bounds of eigenvalues, in units of the prior's
NEWTON_STEPS = 3  # most Newton steps
CONVERGED = 0.01  # nats that a Newton step promises, below which none is taken
STEP_SIZES = (1.0, 0.5, 0.2, 0.05)
ADAM_DECAYS = (0.9, 0.999)
FIT_STEPS = 100
LEAST_DRAWS = 8
FIT_LR = 0.1
FIT_EPS = 1.0  # gradients are in nats per standard deviation
LARGEST_GRADIENT = 1e12  # largest component: its square is still finite in float32
CHECK_DRAWS = 64  # draws that compare the fitted Gaussian with the first
MOST_COMPONENTS = 24
ROUND_DRAWS = 200  # draws of each new component; the first mixture has twice as many
LARGEST_WEIGHT = 10.0  # largest weight, over the average, that needs no further component
EM_STEPS = 8  # steps that fit the weights of the components
LEAST_SHARE = 0.01  # added to each component's share of the draws
exp_diagonal = LowerCholeskyTransform()  # of a lower triangle


@dataclass(frozen=True, eq=False)
class Proposal:
    r"""For each of B data a mixture of up to C multivariate t distributions.

    .. math:: q(u) = \sum_{c=1}^{C} \pi_c \, t_\nu(u; \mu_c, L_c L_c^\top), \qquad
        \nu = \max(20, D)

    nu grows with D so that the radius is spread as for a Gaussian: its logarithm has a standard
    deviation of about the root of 1 / (2 D) + 1 / (2 nu), that of a Gaussian the root of
    1 / (2 D).

    Attributes:
        log_weight: log pi [C, B]; minus infinity where a datum has fewer components.
        loc: Locations [C, B, D].
        tril: Cholesky factors of the scale matrices [C, B, D, D].
    """

    log_weight: Tensor
    loc: Tensor
    tril: Tensor

    def rows(self, index: Tensor) -> Proposal:
        """Returns the proposals of some of the data."""
        return Proposal(self.log_weight[:, index], self.loc[:, index], self.tril[:, index])

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factor of the heaviest component of each datum [B, D, D]."""
        heaviest = self.log_weight.argmax(0)
        return self.tril[heaviest, torch.arange(len(heaviest), device=heaviest.device)]

    def draw(self, num_draws: int) -> Tensor:
        """Draws u [K, B, D]."""
        _, B, D = self.loc.shape
        noise = torch.randn_like(self.loc[:1].expand(num_draws, B, D))
        df = torch.full_like(noise[..., 0], max(LEAST_DF, D))
        noise = noise * (df / Chi2(df).sample()).sqrt().unsqueeze(-1)
        component = torch.multinomial(self.log_weight.exp().T, num_draws, True).T
        draws = torch.zeros_like(noise)
        for c, (loc, tril) in enumerate(zip(self.loc, self.tril)):
            drawn = loc + torch.einsum("bij,kbj->kbi", tril, noise)
            draws = torch.where((component == c).unsqueeze(-1), drawn, draws)
        return draws

    def log_prob(self, u: Tensor) -> Tensor:
        """Returns log q(u) [K, B] of u [K, B, D]."""
        D, df, terms = u.shape[-1], max(LEAST_DF, u.shape[-1]), []
        for log_weight, loc, tril in zip(self.log_weight, self.loc, self.tril):
            whitened = torch.linalg.solve_triangular(tril, (u - loc).permute(1, 2, 0), upper=False)
            height = log_weight - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            log_distance = torch.log1p(whitened.pow(2).sum(1).T / df)
            terms.append(height - (df + D) / 2 * log_distance)
        constant = math.lgamma((df + D) / 2) - math.lgamma(df / 2)
        return torch.stack(terms).logsumexp(0) + constant - D / 2 * math.log(df * math.pi)


def laplace(target: Target, u: Tensor) -> tuple[Tensor, Tensor]:
    """Returns modes [B, D], by Newton's steps from `u`, and covariance factors [B, D, D].

    The covariance is the inverse of the exact negative Hessian, whose |eigenvalues| are floored
    at 0.5: a saddle or a flat direction still gets a finite width. Each of at most three rounds
    costs D gradients and D second gradients, of the data that are not at their mode yet. A step
    has the best of a few lengths, or is not taken.
    """
    u, tril = u.clone(), u.new_empty(*u.shape, u.shape[1])
    rows = torch.arange(len(u), device=u.device)
    sizes = u.new_tensor((0.0, *STEP_SIZES)).view(-1, 1, 1)
    for _ in range(NEWTON_STEPS):
        grad, precision = curvature(target, u[rows])
        tril[rows] = root = covariance_factor(precision)
        whitened = root.mT @ grad.unsqueeze(-1)
        unconverged = ~(whitened.square().sum((-2, -1)) / 2 < CONVERGED)  # also where it is NaN
        if not unconverged.any():
            break
        rows, target = rows[unconverged], target.rows(unconverged)
        candidates = u[rows] + sizes * (root[unconverged] @ whitened[unconverged]).squeeze(-1)
        best = target.log_joint(candidates).nan_to_num(-torch.inf).argmax(0)
        u[rows] = candidates[best, torch.arange(len(rows), device=u.device)]
    return u, tril


def curvature(target: Target, u: Tensor) -> tuple[Tensor, Tensor]:
    """Returns gradient [B, D] and negative Hessian [B, D, D] of log p(x, u) at `u` [B, D]."""
    rows = []
    for part in torch.arange(u.shape[1], device=u.device).split(target.draws_at_once):
        leaf = u.expand(len(part), *u.shape).detach().requires_grad_()
        with torch.enable_grad():
            value = target.run_log_joint(leaf).sum()
            (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
            column = grad.gather(-1, part.view(-1, 1, 1).expand(-1, len(u), 1)).sum()
        if column.requires_grad:
            rows.append(torch.autograd.grad(column, leaf, materialize_grads=True)[0])
        else:  # the density is linear in u
            rows.append(torch.zeros_like(grad))
    hessian = torch.cat(rows).transpose(0, 1)
    return grad[0].detach(), -(hessian + hessian.mT) / 2


def covariance_factor(precision: Tensor) -> Tensor:
    """Returns the Cholesky factor [B, D, D] of a precision's inverse, |eigenvalues| floored."""
    values, vectors = torch.linalg.eigh(precision.nan_to_num(0.0, 0.0, 0.0))
    variance = 1 / values.abs().clamp(LEAST_PRECISION, MOST_PRECISION)
    return torch.linalg.cholesky((vectors * variance.unsqueeze(-2)) @ vectors.mT)


class Adam:
    """Moves `parameters` in place, by steps that fall to zero as a half cosine.

    Adam works element by element, so that data do not affect one another. A gradient that is
    not finite counts as zero. Written out because `torch.optim` takes seconds to import.

    Args:
        parameters: Tensors to move; no gradient is recorded.
        num_steps: Number of steps.
        lr: Size of the first step.
        eps: Gradients below it are followed in proportion, those above it by their sign alone.

    References:
        Kingma and Ba. Adam: a method for stochastic optimization. 2015.
    """

    def __init__(
        self, parameters: Sequence[Tensor], *, num_steps: int, lr: float, eps: float
    ) -> None:
        self.state = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        self.num_steps, self.lr, self.eps, self.steps_done = num_steps, lr, eps, 0

    def ascend(self, *grads: Tensor) -> None:
        """Takes one step along the gradients."""
        rate = self.lr * (1 + math.cos(math.pi * self.steps_done / self.num_steps)) / 2
        self.steps_done += 1
        unbias = [1 / (1 - decay**self.steps_done) for decay in ADAM_DECAYS]
        for (p, m, v), grad in zip(self.state, grads):
            grad = grad.nan_to_num(0.0, 0.0, 0.0)
            m.lerp_(grad, 1 - ADAM_DECAYS[0])
            v.mul_(ADAM_DECAYS[1]).addcmul_(grad, grad, value=1 - ADAM_DECAYS[1])
            p.addcdiv_(m, v.mul(unbias[1]).sqrt_().add_(self.eps), value=rate * unbias[0])


def fit_gaussian(
    target: Target, loc: Tensor, tril: Tensor, num_steps: int = FIT_STEPS
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Fits the Gaussian of highest ELBO from a first one, which is kept where it is better.

    .. math:: u = \mu + A (m + L \epsilon), \qquad
        \nabla_m = \mathbb{E}[g], \quad \nabla_L = \mathbb{E}[g \epsilon^\top], \quad
        g = A^\top \nabla_u \log p(x, u) + L^{-\top} \epsilon

    in coordinates whitened by the first Gaussian, :math:`\mathcal{N}(\mu, A A^\top)`. The
    gradient is that of sticking the landing, without noise where the fit is exact. Noise comes
    in opposite pairs, so that odd terms cancel in the first average and even ones in the second.

    Returns:
        Mean [B, D], Cholesky factor [B, D, D], and the bound [B] in nats.

    References:
        Roeder, Wu and Duvenaud. Sticking the landing. 2017.
    """
    B, D = loc.shape
    mean = loc.new_zeros(B, D, 1, dtype=torch.float32)  # exact enough for numbers of order one
    raw_tril = mean.new_zeros(B, D, D)  # L, with the logarithm of its diagonal
    adam = Adam([mean, raw_tril], num_steps=num_steps, lr=FIT_LR, eps=FIT_EPS)
    for _ in range(num_steps):
        noise = torch.randn(B, D, fit_draws(D) // 2, dtype=mean.dtype, device=loc.device)
        noise = torch.cat([noise, -noise], -1)
        root = exp_diagonal(raw_tril)
        u = loc + (tril @ (mean + root @ noise).to(loc)).permute(2, 0, 1)
        (grad,) = gradients(lambda u: (target.log_joint(u),), u, target.draws_at_once)[1]
        entropy_grad = torch.linalg.solve_triangular(root.mT, noise, upper=True)
        grad = tril.mT @ grad.permute(1, 2, 0).nan_to_num(0.0, 0.0, 0.0)
        g = grad.clamp(-LARGEST_GRADIENT, LARGEST_GRADIENT).to(mean) + entropy_grad
        tril_grad = (g @ noise.mT).div_(len(u)).tril_()
        tril_grad.diagonal(dim1=-2, dim2=-1).mul_(root.diagonal(dim1=-2, dim2=-1))
        adam.ascend(g.mean(-1, keepdim=True), tril_grad)
    noise = torch.randn(CHECK_DRAWS, B, D, dtype=loc.dtype, device=loc.device)
    entropy = (noise.square().sum(-1) + D * math.log(2 * math.pi)) / 2
    fitted = loc + (tril @ mean.to(loc)).squeeze(-1), tril @ exp_diagonal(raw_tril.to(loc))
    bounds = []
    for a, b in ((loc, tril), fitted):
        log_joint = target.log_joint(a + torch.einsum("bij,kbj->kbi", b, noise))
        log_det = b.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        bounds.append((log_joint + entropy).mean(0) + log_det)
    better = (bounds[1] > bounds[0]).view(-1, 1)
    loc = torch.where(better, fitted[0], loc)
    tril = torch.where(better.unsqueeze(-1), fitted[1], tril)
    return loc, tril, torch.maximum(*bounds)


def fit_draws(dim: int) -> int:
    """Returns how many draws, in opposite pairs, give a gradient of D x D numbers."""
    return max(LEAST_DRAWS, 2 * (dim // 16))


def fit_cost(dim: int, num_steps: int = FIT_STEPS) -> int:
    """Returns how often `fit_gaussian` evaluates the model for one datum."""
    return num_steps * fit_draws(dim) + 2 * CHECK_DRAWS


def add_components(target: Target, proposal: Proposal, visited: Tensor) -> Proposal:
    r"""Adds a component at the draw of the largest weight, up to 24 times.

    Its precision is the curvature of log p(x, u) at that draw. All draws so far count as draws
    of the whole mixture; at the end its weights :math:`\pi` maximise

    .. math:: \sum_k \bar w_k \log \sum_c \pi_c \, t(u_k; \mu_c, \Sigma_c)

    by eight steps of expectation maximisation. No draw is scored again. Components may be needed
    at the points `visited` [R, B, D] too.

    References:
        Raftery and Bao. Estimating and projecting trends in HIV/AIDS generalized epidemics
        using incremental mixture importance sampling. 2010.
        Cappe, Douc, Guillin, Marin and Robert. Adaptive importance sampling in general mixture
        classes. 2008.
    """
    u = torch.cat([proposal.draw(2 * ROUND_DRAWS), visited])
    log_p = target.log_joint(u)
    log_q = [proposal.log_prob(u)]  # log q of the first mixture, then of each component
    parts = [proposal]
    for _ in range(MOST_COMPONENTS):
        log_weight = log_p - _log_mixture(torch.stack(log_q))
        weight, best = log_weight.nan_to_num(-torch.inf).max(0)
        average = log_weight.logsumexp(0) - math.log(len(log_p))
        if bool((weight - average < math.log(LARGEST_WEIGHT)).all()):
            break
        loc = u[best, torch.arange(u.shape[1], device=u.device)]
        tril = covariance_factor(curvature(target, loc)[1]).unsqueeze(0)
        parts.append(Proposal(tril.new_zeros(1, len(loc)), loc.unsqueeze(0), tril))
        new_draws = parts[-1].draw(ROUND_DRAWS)
        u, log_p = torch.cat([u, new_draws]), torch.cat([log_p, target.log_joint(new_draws)])
        log_q = [torch.cat([old, part.log_prob(new_draws)]) for old, part in zip(log_q, parts)]
        log_q.append(parts[-1].log_prob(u))
    return _fit_weights(parts, torch.stack(log_q), log_p)


def components_cost(dim: int) -> int:
    """Returns how often `add_components` evaluates the model for one datum."""
    return 2 * ROUND_DRAWS + MOST_COMPONENTS * (ROUND_DRAWS + dim)


def _log_mixture(log_q: Tensor) -> Tensor:
    """Returns the log density of all draws, up to a constant, from the sources' own [C, S, B].

    The first source has made twice as many draws as each of the others.
    """
    return torch.cat([log_q[:1] + math.log(2.0), log_q[1:]]).logsumexp(0)


def _fit_weights(parts: list[Proposal], log_q: Tensor, log_p: Tensor) -> Proposal:
    """Mixes all components, with shares fitted to the weights of the draws."""
    log_pi = torch.full_like(log_q[:, 0], 1 / len(parts)).log()
    weights = torch.softmax((log_p - _log_mixture(log_q)).nan_to_num(-torch.inf), 0)
    for _ in range(EM_STEPS):
        share = torch.softmax(log_q + log_pi.unsqueeze(1), 0)
        log_pi = ((share * weights).sum(1) + LEAST_SHARE).log().log_softmax(0)
    return mix(parts, log_pi)


def mix(parts: Sequence[Proposal], log_pi: Iterable[float | Tensor]) -> Proposal:
    """Mixes all `parts`, given the logarithms of their shares."""
    return Proposal(
        torch.cat([part.log_weight + pi for part, pi in zip(parts, log_pi)]),
        torch.cat([part.loc for part in parts]),
        torch.cat([part.tril for part in parts]),
    )
