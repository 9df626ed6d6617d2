"""Priors: () -> p(z)."""

from __future__ import annotations

from abc import abstractmethod

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.arguments import ReprModule, as_shape, check_real, check_whole
from pyro_vae.distributions import Flow, make_flow, mixture

__all__ = [
    "ConditionalNormal",
    "FlowPrior",
    "Laplace",
    "MixtureOfGaussians",
    "Normal",
    "NormalPerClass",
    "Prior",
    "StandardNormal",
    "StudentT",
    "VampPrior",
]


class Prior(ReprModule):
    """A distribution over latents z [D].

    A subclass takes `latent_dim` (or `posterior` and `data_shape`) by name, gives every other
    argument a default, and returns from `forward` a distribution with event shape (D,) and
    batch shape (). That is all: it is then found by name, and the laws in the tests apply.
    See `StandardNormal` for an example.

    Attributes:
        posterior: The posterior that this prior is made of, if any; not a submodule.
    """

    posterior: nn.Module | None = None

    @abstractmethod
    def forward(self, y: Tensor | None = None) -> Distribution:
        """Returns p(z), or p(z | y) with the leading dimensions of `y` as its batch."""

    def initialise(self, x: Tensor) -> None:
        """Sets what is learned from training data `x` [N, *E] before the first step."""


class StandardNormal(Prior):
    r"""Unit Normal, :math:`p(z) = \mathcal{N}(z; 0, I)`.

    Args:
        latent_dim: Latent size D.

    References:
        Kingma and Welling. Auto-encoding variational Bayes. 2013.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        check_whole(latent_dim=latent_dim)
        self.loc = nn.Buffer(torch.zeros(latent_dim))
        self.scale = nn.Buffer(torch.ones(latent_dim))

    def forward(self, y: Tensor | None = None) -> Distribution:
        """Returns N(0, I)."""
        return dist.Normal(self.loc, self.scale).to_event(1)


class Normal(Prior):
    r"""Diagonal Normal with learned means and scales, :math:`\mathcal{N}(z; \mu, \sigma^2)`.

    Args:
        latent_dim: Latent size D.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        check_whole(latent_dim=latent_dim)
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, y: Tensor | None = None) -> Distribution:
        """Returns N(mu, sigma^2)."""
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


class ConditionalNormal(Prior):
    r"""Diagonal Normal given `y`, :math:`p(z \mid y) = \mathcal{N}(z; \mu(y), \sigma^2(y))`.

    .. math:: \sigma = \texttt{min\_scale} + \mathrm{softplus}(s(y))

    In a hierarchy `y` is the layer above, with the condition of the whole model if there is one.

    Args:
        network: Network from y to 2 D raw numbers, mean and s.
        latent_dim: Latent size D.
        min_scale: Floor of the standard deviation.

    References:
        Sohn, Lee and Yan. Learning structured output representation using deep conditional
        generative models. 2015.
    """

    def __init__(self, network: nn.Module, latent_dim: int, min_scale: float = 1e-4) -> None:
        super().__init__()
        check_whole(latent_dim=latent_dim)
        check_real(0, min_scale=min_scale)
        self.network, self.latent_dim, self.min_scale = network, latent_dim, min_scale

    @classmethod
    def num_params(cls, latent_dim: int) -> int:
        """Returns 2 D, for the mean and scale of each dimension."""
        return 2 * latent_dim

    def forward(self, y: Tensor | None = None) -> Distribution:
        """Returns N(mu(y), sigma^2(y)).

        Raises:
            ValueError: If there is no `y`.
        """
        if y is None:
            raise ValueError("prior ConditionalNormal is conditioned on y: give it; got none")
        raw = self.network(y)
        raw = raw.float() if raw.dtype in (torch.float16, torch.bfloat16) else raw
        loc, scale = raw.chunk(2, -1)
        return dist.Normal(loc, self.min_scale + F.softplus(scale)).to_event(1)


class MixtureOfGaussians(Prior):
    r"""Mixture of diagonal Normals with learned weights, means and scales.

    .. math:: p(z) = \sum_{c=1}^{C} \pi_c \, \mathcal{N}(z; \mu_c, \mathrm{diag}(\sigma_c^2))

    The means start as draws of N(0, I): equal starts never separate.

    Args:
        latent_dim: Latent size D.
        num_components: Number of components C.

    References:
        Dilokthanakul et al. Deep unsupervised clustering with Gaussian mixture VAEs. 2016.
    """

    def __init__(self, latent_dim: int, num_components: int = 10) -> None:
        super().__init__()
        check_whole(latent_dim=latent_dim, num_components=num_components)
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(torch.randn(num_components, latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(num_components, latent_dim))

    def forward(self, y: Tensor | None = None) -> Distribution:
        """Returns the mixture."""
        return mixture(self.logits, dist.Normal(self.loc, self.log_scale.exp()).to_event(1))


class NormalPerClass(Prior):
    r"""A diagonal Normal for each class, with learned means and scales.

    .. math:: p(z \mid y) = \mathcal{N}(z; \mu_y, \mathrm{diag}(\sigma_y^2))

    Without `y`, or if it has another length, p(z) is the mixture of all classes with equal
    weights. The means start as draws of N(0, I).

    Args:
        latent_dim: Latent size D.
        classes: Number of classes C, that of the VAE.

    References:
        Jiang, Zheng, Tan, Tang and Zhou. Variational deep embedding: an unsupervised and
        generative approach to clustering. 2017.
    """

    def __init__(self, latent_dim: int, classes: int = 10) -> None:
        super().__init__()
        check_whole(latent_dim=latent_dim, classes=classes)
        self.loc = nn.Parameter(torch.randn(classes, latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(classes, latent_dim))

    def forward(self, y: Tensor | None = None) -> Distribution:
        """Returns the mixture, or the Normals of the one-hot classes `y` [*S, C]."""
        if y is None or y.shape[-1] != len(self.loc):
            components = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
            return mixture(torch.zeros_like(self.loc[:, 0]), components)
        y = y.to(self.loc.dtype)
        return dist.Normal(y @ self.loc, (y @ self.log_scale).exp()).to_event(1)


class VampPrior(Prior):
    r"""Variational mixture of posteriors: the posterior at learned pseudo-inputs.

    .. math:: p(z) = \frac{1}{C} \sum_{c=1}^{C} q(z \mid u_c)

    The pseudo-inputs are kept within the range of the data by a sigmoid. They start at
    training data when `initialise` has been called, at random points of the range otherwise.
    A batch norm inside the posterior normalises them by its running statistics, which they
    do not change. Given `y`, the components are q(z | u_c, y).

    Args:
        posterior: The posterior of the same VAE; not a submodule of this module.
        data_shape: Shape of one input of the posterior.
        num_components: Number of pseudo-inputs C.
        data_range: Lowest and highest value of a pseudo-input; those of the data if None.

    References:
        Tomczak and Welling. VAE with a VampPrior. 2018.
    """

    posterior: nn.Module

    def __init__(
        self,
        posterior: nn.Module,
        data_shape: tuple[int, ...],
        num_components: int = 500,
        data_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        check_whole(num_components=num_components)
        vars(self)["posterior"] = posterior  # not registered with torch: only the VAE owns it
        self._range_given = data_range is not None
        ends = (0.0, 1.0) if data_range is None else data_range
        for end in ends if isinstance(ends, tuple | list) else (ends,):
            check_real(data_range=end)
        if not isinstance(ends, tuple | list) or len(ends) != 2 or ends[0] >= ends[1]:
            raise ValueError(f"data_range must be (low, high) with low < high; got {data_range}")
        self.low, self.high = (nn.Buffer(torch.tensor(float(end))) for end in ends)
        self.raw_inputs = nn.Parameter(torch.randn(num_components, *data_shape))

    @property
    def inputs(self) -> Tensor:
        """Pseudo-inputs [C, *E], within the data's range."""
        return self.low + (self.high - self.low) * torch.sigmoid(self.raw_inputs)

    def forward(self, y: Tensor | None = None) -> Distribution:
        """Returns the mixture of posteriors."""
        modules = self.posterior.modules()
        norms = [m for m in modules if m.training and getattr(m, "running_mean", None) is not None]
        for norm in norms:
            norm.training = False  # it uses its running statistics, and does not change them
        try:
            components = self.posterior(self.inputs, None if y is None else y.unsqueeze(-2))
        finally:
            for norm in norms:
                norm.training = True
        return mixture(self.raw_inputs.new_zeros(len(self.raw_inputs)), components)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Sets pseudo-inputs to rows of `x`, at least a hundredth of the range inside it."""
        if not self._range_given:
            self.low.copy_(x.min())
            self.high.copy_(x.max() if x.max() > x.min() else x.min() + 1)
        rows = torch.randint(len(x), (len(self.raw_inputs),), device=x.device)
        unit = (x[rows] - self.low) / (self.high - self.low)
        self.raw_inputs.copy_(torch.logit(unit.clamp(0.01, 0.99)))


class Laplace(Prior):
    r"""Unit Laplace in each dimension, :math:`p(z) = \prod_d \tfrac12 e^{-|z_d|}`.

    Args:
        latent_dim: Latent size D.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        check_whole(latent_dim=latent_dim)
        self.loc = nn.Buffer(torch.zeros(latent_dim))
        self.scale = nn.Buffer(torch.ones(latent_dim))

    def forward(self, y: Tensor | None = None) -> Distribution:
        """Returns Laplace(0, 1)."""
        return dist.Laplace(self.loc, self.scale).to_event(1)


class StudentT(Prior):
    r"""Student's t with `df` degrees of freedom in each dimension.

    Args:
        latent_dim: Latent size D.
        df: Degrees of freedom; the variance df / (df - 2) is finite above 2.
    """

    def __init__(self, latent_dim: int, df: float = 5.0) -> None:
        super().__init__()
        check_whole(latent_dim=latent_dim)
        check_real(above=0, df=df)
        self.df = nn.Buffer(torch.full((latent_dim,), float(df)))

    def forward(self, y: Tensor | None = None) -> Distribution:
        """Returns StudentT(df)."""
        zeros, ones = torch.zeros_like(self.df), torch.ones_like(self.df)  # on the device of df
        return dist.StudentT(self.df, zeros, ones).to_event(1)


class FlowPrior(Prior):
    """A normalising flow over z, from zuko.

    Autoregressive families are made coupling flows by `passes=2`, which are fast both ways.

    Args:
        latent_dim: Latent size D.
        flow: Name of a zuko flow, such as "NSF" (neural spline) or "MAF".
        transforms: Number of transforms.
        hidden: Widths of their networks.

    References:
        Rozet et al. Zuko: normalizing flows in PyTorch. 2022.
        Durkan et al. Neural spline flows. 2019.
    """

    def __init__(
        self,
        latent_dim: int,
        flow: str = "NSF",
        transforms: int = 3,
        hidden: tuple[int, ...] = (64, 64),
    ) -> None:
        super().__init__()
        check_whole(latent_dim=latent_dim, transforms=transforms)
        hidden = as_shape("hidden", hidden) if hidden else ()
        self.flow = make_flow(flow, latent_dim, transforms=transforms, hidden=hidden)

    def forward(self, y: Tensor | None = None) -> Distribution:
        """Returns the flow's distribution."""
        return Flow(self.flow())
