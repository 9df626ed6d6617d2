"""Several layers of latents: a joint prior, and a joint posterior for each order of inference.

Layers are counted from the data upwards: the sites are "z1", next to the data, "z2", ...
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from pyro.distributions import Independent, Normal
from torch import Tensor, nn

from pyro_vae.distributions import Draw, Joint
from pyro_vae.posteriors import DiagonalNormal, Posterior
from pyro_vae.priors import ConditionalNormal, Prior

__all__ = ["BottomUp", "Inference", "Ladder", "Layers", "Lowest", "TopDown"]

EncoderInput = tuple[tuple[int, ...], int]  # shape of an encoder's input, length of its condition


class Layers(nn.Module):
    r"""The prior of L layers, each given the one above it.

    .. math:: p(z_1, \dots, z_L) = p(z_L) \prod_{l < L} p(z_l \mid z_{l+1})

    Args:
        priors: One for each layer, from the data upwards. The last is any prior; those below it
            take the layer above (and `y`) as their condition and know their `latent_dim`, as
            `priors.ConditionalNormal` does.
    """

    layers: Any
    posterior: nn.Module | None

    def __init__(self, priors: Sequence[Prior]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(priors)
        vars(self)["posterior"] = priors[-1].posterior  # not registered: only the VAE owns it

    def forward(self, y: Tensor | None = None) -> Joint:
        """Returns p(z1, ..., zL | y)."""
        top = self.layers[-1](y)
        sizes = sizes_by_site([*(p.latent_dim for p in self.layers[:-1]), top.event_shape.numel()])
        priors = dict(zip(sizes, self.layers))
        return joint_from_top(sizes, top, lambda name, above: priors[name](above), y)

    def initialise(self, x: Tensor) -> None:
        """Does nothing, for `Inference.initialise` knows what the top layer's posterior sees."""


class Inference(nn.Module):
    """The posterior of L layers, q(z1, ..., zL | x), in an order that the subclass sets.

    A subclass returns from `forward` a `Joint`, whose program draws one layer after another.
    See `TopDown` for an example.

    Args:
        posteriors: One for each layer, from the data upwards.
        prior: The prior of the same layers; not a submodule.

    Attributes:
        sizes: Latent size of each layer by its site.
        condition_dim: Length of the vector `y` that all layers are conditioned on; 0 for none.

    Raises:
        ValueError: If there is not one posterior for each prior, or their sizes do not chain.
    """

    layers: Any
    prior: Layers

    def __init__(self, posteriors: Sequence[Posterior], prior: Layers) -> None:
        super().__init__()
        vars(self)["prior"] = prior  # not registered with torch: only the VAE owns it
        self.layers = nn.ModuleList(posteriors)
        self.sizes = sizes_by_site([q.latent_dim for q in posteriors])
        self.condition_dim = getattr(posteriors[-1].encoder, "condition_dim", 1)
        sizes, encoder = [*self.sizes.items()], posteriors[-1].encoder
        if len(prior.layers) != len(sizes):
            raise ValueError(
                f"{type(self).__name__} needs one posterior for each prior; got {len(sizes)} for "
                f"{len(prior.layers)}"
            )
        for (name, size), p, (_, above) in zip(sizes, prior.layers, sizes[1:]):
            takes = getattr(getattr(p, "network", None), "in_shape", None)
            needs = (above + self.condition_dim,)
            known = takes is not None and hasattr(encoder, "condition_dim")
            if p.latent_dim != size or (known and takes != needs):
                raise ValueError(
                    f"the prior of {name} must map {needs[0]} numbers, those of the layer above "
                    f"(and y), to {size} latents; got {takes} to {p.latent_dim}: "
                    "let neighbours have matching sizes"
                )

    @classmethod
    @abstractmethod
    def reads(cls, in_shape: tuple[int, ...], sizes: Sequence[int]) -> list[EncoderInput]:
        """Returns for each layer the shape its encoder reads, and how many latents as a condition.

        Args:
            in_shape: Shape of what encoders see of one datum.
            sizes: Latent size of each layer.
        """

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor | None = None) -> Joint:
        """Returns q(z1, ..., zL | x, y), batch *S, event (D1 + ... + DL,)."""

    def initialise(self, x: Tensor) -> None:
        """Initialises posteriors and the top layer's prior from training data `x` [N, *E]."""
        for q in self.layers:
            q.initialise(x)
        self.prior.layers[-1].initialise(x)


class TopDown(Inference):
    r"""Infers from the top layer down, in the order in which the model draws.

    .. math:: q(z \mid x) = q(z_L \mid x) \prod_{l < L} q(z_l \mid x, z_{l+1})

    The encoders below the top are conditioned on the layer above (joined with `y`).

    References:
        Tomczak and Welling. VAE with a VampPrior. 2018. (Its HVAE.)
    """

    @classmethod
    def reads(cls, in_shape: tuple[int, ...], sizes: Sequence[int]) -> list[EncoderInput]:
        """Returns the data's shape, and the layer above as a condition."""
        return [(in_shape, above) for above in [*sizes[1:], 0]]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Joint:
        """Returns q(z_L | x), then each layer given x and the one above."""
        top, posteriors = self.layers[-1](x, y), dict(zip(self.sizes, self.layers))
        return joint_from_top(self.sizes, top, lambda name, above: posteriors[name](x, above), y)


class BottomUp(Inference):
    r"""Infers from the data up: the posterior of each layer reads the layer below it.

    .. math:: q(z \mid x) = q(z_1 \mid x) \prod_{l > 1} q(z_l \mid z_{l-1})

    The encoders above the first read the layer below in place of data.

    References:
        Burda, Grosse and Salakhutdinov. Importance weighted autoencoders. 2016.
    """

    @classmethod
    def reads(cls, in_shape: tuple[int, ...], sizes: Sequence[int]) -> list[EncoderInput]:
        """Returns the data's shape, then the size of each layer below; no conditions."""
        return [(in_shape, 0), *(((below,), 0) for below in sizes[:-1])]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Joint:
        """Returns q(z1 | x), then each layer given the one below."""
        first = self.layers[0](x, y)

        def program(draw: Draw) -> None:
            lowest, *higher = self.sizes
            z = draw(lowest, first)
            for name, posterior in zip(higher, list(self.layers)[1:]):
                z = draw(name, posterior(z, y))

        return Joint(program, self.sizes, first.batch_shape)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Initialises the lowest posterior by data, the top prior by draws of the layer below."""
        self.layers[0].initialise(x)
        y = x.new_zeros(len(x), self.condition_dim) if self.condition_dim else None
        for posterior in self.layers[:-1]:
            x = posterior(x, y).sample()
        self.prior.layers[-1].initialise(x)


class Ladder(Inference):
    r"""Infers from the top down: each layer's Normal from x is multiplied by the model's prior.

    The encoder of each layer gives a Normal from x alone, :math:`(\hat\mu_l, \hat\sigma_l)`. Below
    the top it is multiplied by the model's own :math:`p(z_l \mid z_{l+1})`, of mean
    :math:`\mu_l` and scale :math:`\sigma_l`:

    .. math:: \sigma^2 = \frac{1}{\hat\sigma_l^{-2} + \sigma_l^{-2}}, \qquad
        q(z_l \mid x, z_{l+1}) = \mathcal{N}\big(
        (\hat\mu_l \hat\sigma_l^{-2} + \mu_l \sigma_l^{-2}) \, \sigma^2, \; \sigma^2 \big)

    As published, the encoders share their first layers; here each has its own.

    Raises:
        ValueError: If a layer below the top has a posterior other than `DiagonalNormal` or a
            prior other than `ConditionalNormal`.

    References:
        Sonderby, Raiko, Maaloe, Sonderby and Winther. Ladder variational autoencoders. 2016.
    """

    def __init__(self, posteriors: Sequence[Posterior], prior: Layers) -> None:
        super().__init__(posteriors, prior)
        for q, p in list(zip(posteriors, prior.layers))[:-1]:
            if not (isinstance(q, DiagonalNormal) and isinstance(p, ConditionalNormal)):
                raise ValueError(
                    "Ladder merges Normals: below the top it needs posterior DiagonalNormal and "
                    f"prior ConditionalNormal; got {type(q).__name__} and {type(p).__name__}"
                )

    @classmethod
    def reads(cls, in_shape: tuple[int, ...], sizes: Sequence[int]) -> list[EncoderInput]:
        """Returns the data's shape, and no condition."""
        return [(in_shape, 0) for _ in sizes]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Joint:
        """Returns q(z_L | x), then each layer given x and, through the model, the one above."""
        seen = {name: q(x, y) for name, q in zip(self.sizes, self.layers)}
        priors = dict(zip(self.sizes, self.prior.layers))
        *_, top = seen.values()
        return joint_from_top(
            self.sizes, top, lambda name, above: normal_product(seen[name], priors[name](above)), y
        )


class Lowest(nn.Module):
    """A decoder that reads, of all layers joined, only the one next to the data.

    Args:
        decoder: Network from z1 (and `y`).
        latent_dim: Size D1 of that layer, or of the lowest few together.
    """

    def __init__(self, decoder: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.decoder, self.latent_dim = decoder, latent_dim
        self.condition_dim = getattr(decoder, "condition_dim", 1)

    @property
    def output_bias(self) -> Any:
        """Bias of the decoder's last layer."""
        return self.decoder.output_bias

    def check(self, sizes: Sequence[int]) -> None:
        """Raises a ValueError unless the decoder reads whole layers of these sizes."""
        whole = list(accumulate(sizes))
        if self.latent_dim not in whole:
            raise ValueError(
                f"a decoder of layers {list(sizes)} sees whole ones from z1 on, {whole} latents; "
                f"got Lowest(decoder, {self.latent_dim})"
            )

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Returns raw parameters of `z` [*S, D1 + ... + DL]."""
        return self.decoder(z[..., : self.latent_dim], y)


def sizes_by_site(sizes: Sequence[int]) -> dict[str, int]:
    """Returns the sizes of layers by their sites, which are numbered from 1 at the data."""
    return {f"z{number}": size for number, size in enumerate(sizes, 1)}


def joint_from_top(
    sizes: dict[str, int], top: Any, below: Callable[[str, Tensor], Any], y: Tensor | None
) -> Joint:
    """Returns the top layer, then each one below it given the one above, joined with `y`."""

    def program(draw: Draw) -> None:
        *lower, highest = sizes
        z = draw(highest, top)
        for name in reversed(lower):
            if y is not None:
                lead = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
                z = torch.cat([z.expand(*lead, -1), y.to(z.dtype).expand(*lead, -1)], -1)
            z = draw(name, below(name, z))

    return Joint(program, sizes, top.batch_shape or (() if y is None else y.shape[:-1]))


def normal_product(a: Any, b: Any) -> Independent:
    """Returns the normalised product of two diagonal Normals."""
    p, q = (normal.base_dist.scale.pow(-2) for normal in (a, b))
    variance = 1 / (p + q)
    loc = variance * (p * a.base_dist.loc + q * b.base_dist.loc)
    return Normal(loc, variance.sqrt()).to_event(1)
