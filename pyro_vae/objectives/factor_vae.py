"""Total correlation by a discriminator, trained beside the model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Adam, Optimizer

from pyro_vae.arguments import check_real, check_whole
from pyro_vae.densities import Densities
from pyro_vae.objectives.base import Average, Objective, check_kl, draws, total_kl
from pyro_vae.objectives.schedules import Schedule

__all__ = ["FactorVAE", "permute_dimensions"]


class FactorVAE(Objective):
    r"""ELBO less a discriminator's estimate of the total correlation.

    .. math:: \mathrm{ELBO} - \gamma \, E_{q(z)} \log \frac{D(z)}{1 - D(z)}

    D tells draws of q(z) from those whose dimensions are permuted each by itself over the batch,
    which come from the product of the q(z_d); at its best the logarithm is that of their ratio.
    A D that lags behind makes the penalty too small. With gamma = 0 it is the ELBO, exactly.

    It has two players: `fit` trains D after each step of the model, on the same draws (the paper
    permutes a second batch). In a loop of one's own: `start(d)` once, then `after_step(d)` after
    each step of the model. It takes any guide.

    Args:
        gamma: Weight of the total correlation.
        kl: As in `ELBO`.
        width: Units of each of the discriminator's hidden layers.
        layers: Their number.
        adversary_lr: Learning rate of the discriminator's Adam, of decays 0.5 and 0.9.
        num_particles: Draws of z for each datum.

    Raises:
        ValueError: If an option is out of its range; on use, if `start` was not called, or by
            `pyro.infer.SVI`, which has one player.

    References:
        Kim and Mnih. Disentangling by factorising. 2018.
    """

    batch_level = True
    own_step = True
    gamma: Tensor

    def __init__(
        self,
        gamma: float | Schedule = 10.0,
        kl: str = "auto",
        width: int = 1000,
        layers: int = 5,
        adversary_lr: float = 1e-4,
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles)
        check_whole(width=width, layers=layers)
        check_real(above=0, adversary_lr=adversary_lr)
        self.add_weight("gamma", gamma)
        self.kl, self.width, self.layers = check_kl(kl), width, layers
        self.adversary_lr = adversary_lr
        self.discriminator: nn.Module | None = None
        self.adversary: Optimizer | None = None  # of the discriminator

    def start(self, d: Densities) -> None:
        """A new discriminator, of the latent size of `d`, and its optimiser."""
        z = draws(d)
        sizes = [z.shape[-1], *[self.width] * self.layers]
        hidden = [
            layer
            for inner, outer in zip(sizes, sizes[1:])
            for layer in (nn.Linear(inner, outer), nn.LeakyReLU(0.2))
        ]
        self.discriminator = nn.Sequential(*hidden, nn.Linear(self.width, 1)).to(z)
        weights = self.discriminator.parameters()
        self.adversary = Adam(weights, lr=self.adversary_lr, betas=(0.5, 0.9))

    def after_step(self, d: Densities, average: Average | None = None) -> None:
        """One step of the discriminator, on the draws of `d`."""
        network = self._network()
        assert self.adversary is not None
        self.adversary_loss(d).backward()
        if average is not None:
            average(list(network.parameters()))
        self.adversary.step()
        self.adversary.zero_grad()

    def get_extra_state(self) -> dict[str, Any] | None:
        """The state of the discriminator's optimiser."""
        return None if self.adversary is None else self.adversary.state_dict()

    def set_extra_state(self, state: dict[str, Any] | None) -> None:
        """Goes back to that state; without a discriminator there is nothing to set."""
        if self.adversary is not None and state is not None:
            self.adversary.load_state_dict(state)

    def bound(self, d: Densities) -> Tensor:
        """The ELBO less gamma times the estimated log ratio, [B]."""
        elbo = d.log_likelihood.mean(0) - total_kl(d, self.kl)
        return elbo - self.gamma * self.log_ratio(draws(d)).mean(0)

    def log_ratio(self, z: Tensor) -> Tensor:
        """Estimate of log q(z) / prod q(z_d) [*S] of z [*S, D]; no gradient of D's weights."""
        network = self._network()
        frozen = {name: p.detach() for name, p in network.named_parameters()}
        return functional_call(network, frozen, z).squeeze(-1)

    def adversary_loss(self, d: Densities) -> Tensor:
        """Cross entropy of D, in nats, on the draws of `d` and on them permuted."""
        network = self._network()
        z = draws(d).detach().flatten(0, 1)
        joint, product = network(z), network(permute_dimensions(z))
        return 0.5 * (F.softplus(-joint) + F.softplus(product)).mean()

    def _network(self) -> nn.Module:
        if self.discriminator is None:
            raise ValueError(
                "FactorVAE needs a second player, its discriminator, which is not there yet: "
                "train with fit(), or call start(d) first"
            )
        return self.discriminator


def permute_dimensions(z: Tensor) -> Tensor:
    """Draws z [n, D], each column in a random order of its own."""
    order = torch.rand(z.shape, device=z.device).argsort(0)
    return z.gather(0, order)
