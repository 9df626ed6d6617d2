"""The variational autoencoder: prior, likelihood and posterior as a Pyro model and guide."""

from __future__ import annotations

from math import prod
from typing import Any

import pyro
import torch
from pyro.distributions import is_validation_enabled
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae.arguments import as_rows, as_tensor, check_finite, check_whole, fill_missing
from pyro_vae.distributions import Joint
from pyro_vae.hierarchy import Inference, Layers, Lowest
from pyro_vae.likelihoods import Likelihood
from pyro_vae.posteriors import Posterior
from pyro_vae.priors import Prior
from pyro_vae.runtime import check_fits


class VAE(nn.Module):
    r"""A latent-variable model and its amortised guide.

    .. math:: p(x, z) = p(z) \, p(x \mid z), \qquad q(z \mid x) \approx p(z \mid x)

    `model` and `guide` are ordinary Pyro programs with one plate, "data", and the sites "z"
    and "x": any of Pyro's inference algorithms can be given them. A hierarchy has a site for
    each layer of latents in place of "z"; elsewhere z is all layers joined.

    Args:
        prior: () -> p(z); `Layers` for a hierarchy.
        likelihood: z -> p(x | z).
        posterior: x -> q(z | x); it sees `likelihood.inputs(x)`. An order of inference, such as
            `TopDown`, for a hierarchy.
        missing: Whether NaN in x stands for a missing entry. The model's site "x" is then the
            density of what was observed, and the encoder sees x (0 where missing) joined with the
            mask, of shape `likelihood.input_shape(data_shape, missing=True)`.

    Raises:
        ValueError: If the prior is made of another VAE's posterior, or only one of prior and
            posterior is that of a hierarchy.

    References:
        Kingma and Welling. Auto-encoding variational Bayes. 2013.
        Rezende, Mohamed and Wierstra. Stochastic backpropagation and approximate inference in
        deep generative models. 2014.
    """

    def __init__(
        self,
        prior: Prior | Layers,
        likelihood: Likelihood,
        posterior: Posterior | Inference,
        missing: bool = False,
    ) -> None:
        super().__init__()
        parts = {"prior": prior, "likelihood": likelihood, "posterior": posterior}
        for name, part in parts.items():
            if not isinstance(part, nn.Module):
                raise ValueError(
                    f"{name} must be a module that returns a distribution; got {part!r}: by "
                    "names, build(data_shape, latent_dim, ...) makes a VAE"
                )
        layers = posterior.prior if isinstance(posterior, Inference) else None
        if layers is not (prior if isinstance(prior, Layers) else None):
            raise ValueError(
                "a hierarchy needs Layers and an order of inference over the same, such as "
                f"TopDown(posteriors, prior); got {type(prior).__name__} and "
                f"{type(posterior).__name__}"
            )
        decoder = getattr(likelihood, "decoder", None)
        if isinstance(decoder, Lowest) and isinstance(posterior, Inference):
            decoder.check(list(posterior.sizes.values()))
        if prior.posterior is not None and prior.posterior not in set(posterior.modules()):
            raise ValueError(
                f"{type(prior).__name__} was built over another VAE's posterior: "
                "build it over the posterior that is given to this VAE"
            )
        self.prior = prior
        self.likelihood = likelihood
        self.likelihood.missing |= missing
        self.posterior = posterior
        self.declaration: dict[str, Any] | None = None  # the arguments of `build`, if it made this
        self.initialised = nn.Buffer(torch.tensor(False))

    def __getstate__(self) -> dict[str, Any]:
        """Its state for a pickle or a copy, less the weak references that Pyro's SVI has left."""
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
        return vars(self)

    def model(self, x: Tensor | None = None, y: Tensor | None = None, size: int = 1) -> Tensor:
        """Pyro model: z ~ p(z), x ~ p(x | z) for each datum of the plate "data".

        Args:
            x: Data [B, *E] to condition on; drawn if None.
            y: Condition of each datum [B, C], or None.
            size: Number of data to draw if neither `x` nor `y` is given.

        Returns:
            The data, [*K, B, *E].
        """
        register(prior=self.prior, likelihood=self.likelihood)
        y = self._checked_condition(y)
        x = None if x is None else self._checked_data(x)
        size = next((len(part) for part in (x, y) if part is not None), size)
        with pyro.plate("data", size, dim=-1):
            return self._sample_model(x, y)

    def _sample_model(self, x: Tensor | None, y: Tensor | None) -> Tensor:
        """Samples the sites of each datum, inside the plate, and returns x."""
        prior: Any = self.prior(y)
        z = prior.draw(self._sample_z) if isinstance(prior, Joint) else self._sample_z("z", prior)
        latents: dict[str, Any] = self.likelihood.latents()
        extra = {name: pyro.sample(name, fn) for name, fn in latents.items()}
        p: Any = self.likelihood.observed(self.likelihood(z, y, **extra))
        return pyro.sample("x", p, obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Pyro guide: z ~ q(z | x) for each datum of the plate "data".

        Args:
            x: Data [B, *E].
            y: Condition of each datum [B, C], or None.

        Returns:
            The latents, [*K, B, D].
        """
        register(posterior=self.posterior)
        with pyro.plate("data", len(x), dim=-1):
            return self._sample_guide(x, self.encode(x, y))

    def _sample_guide(self, x: Tensor, q: Any) -> Tensor:
        """Samples the latents of each datum, inside the plate, and returns z."""
        z = q.draw(pyro.sample) if isinstance(q, Joint) else pyro.sample("z", q)
        extra: dict[str, Any] = self.likelihood.propose(self._cast(x))
        for name, fn in extra.items():
            pyro.sample(name, fn)
        return z

    def encode(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns q(z | x, y), batch [B], event (D,); its mean is the usual embedding.

        Gradients pass through it: under `torch.no_grad()`, `encode(x).mean.numpy()` works.
        For a hierarchy it is a `Joint` of all layers, event (D1 + D2 + ...,).
        """
        return self.posterior(self.likelihood.inputs(self._cast(x)), self._checked_condition(y))

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each layer of latents by its site, in the order in which z joins them."""
        q: Any = self.posterior
        return q.sizes if isinstance(q, Inference) else {"z": q.latent_dim}

    @torch.no_grad()
    def reconstruct(
        self, x: Tensor, y: Tensor | None = None, num_samples: int | None = None
    ) -> Tensor:
        """Reconstructs data from their latents; no gradient passes.

        Args:
            x: Data [B, *E].
            y: Condition of each datum [B, C], or None.
            num_samples: None for E[x | z] at the posterior's mean, else how many draws of x
                at draws of z.

        Returns:
            [B, *E], or [num_samples, B, *E].
        """
        check_whole(optional=True, num_samples=num_samples)
        extra = self.likelihood.propose(self._cast(x))
        if num_samples is None:
            z, y = self.encode(x, y).mean, self._checked_condition(y)
            return self.likelihood(z, y, **{n: d.mean for n, d in extra.items()}).mean
        z, y = self._drawn(x, y, num_samples)
        drawn = {name: d.sample(z.shape[:1]) for name, d in extra.items()}
        return self.likelihood(z, y, **drawn).sample()

    def _drawn(self, x: Tensor, y: Tensor | None, number: int) -> tuple[Tensor, Tensor | None]:
        """Draws latents [number, B, D] from q(z | x, y), and returns what they go with: y."""
        return self.encode(x, y).sample(torch.Size((number,))), self._checked_condition(y)

    @torch.no_grad()
    def normalised(
        self, x: Tensor, y: Tensor | None = None, num_samples: int = 100
    ) -> tuple[Tensor, Tensor]:
        """Estimates the shares of counts in their total under q(z | x, y); no gradient passes.

        Args:
            x: Counts [B, *E].
            y: Condition of each datum [B, C], or None.
            num_samples: Draws of z for each datum.

        Returns:
            Mean and standard deviation of the shares over draws of z, both [B, *E].

        Raises:
            ValueError: If the likelihood is not one of counts.
        """
        check_whole(2, num_samples=num_samples)
        shares = getattr(self.likelihood, "shares", None)
        if shares is None:
            raise ValueError(
                "normalised counts need a likelihood of counts, Poisson or NegativeBinomial; "
                f"got {type(self.likelihood).__name__}"
            )
        found = shares(*self._drawn(x, y, num_samples))
        return found.mean(0), found.std(0)

    @torch.no_grad()
    def sample(self, size: int, y: Tensor | None = None, mean: bool = False) -> Tensor:
        """Draws x [size, *E] from the model, or E[x | z] of drawn z if `mean`; no gradient passes.

        Raises:
            ValueError: If `y` [size, C] has another length, or the draws do not fit in memory.
        """
        check_whole(size=size)
        y = self._checked_condition(y)
        if y is not None and len(y) != size:
            raise ValueError(f"y must have one row per draw: {size}; got {len(y)}")
        check_fits(4 * size * prod(self.likelihood.data_shape), f"{size} draws")
        prior = self.prior(y)
        z = prior.sample(torch.Size(() if prior.batch_shape else (size,)))
        extra = {n: d.sample(torch.Size((size,))) for n, d in self.likelihood.latents().items()}
        p = self.likelihood(z, y, **extra)
        return p.mean if mean else p.sample()

    def initialise(self, x: Tensor) -> None:
        """Initialises each part from training data `x` [N, *E], once, before the first step.

        A second call, as when training goes on, only checks the data.

        Raises:
            ValueError: If the likelihood does not support the data.
        """
        x = self._cast(as_rows("x", x, self.missing))
        self.likelihood.check(x)
        if not self.initialised:
            self.likelihood.initialise(fill_missing(x))
            for part in (self.posterior, self.prior):
                part.initialise(self.likelihood.inputs(x))
            self.initialised.fill_(True)

    @property
    def missing(self) -> bool:
        """Whether NaN in x stands for a missing entry."""
        return self.likelihood.missing

    def _checked_data(self, x: Tensor) -> Tensor:
        """Returns `x` in the type of the weights; raises a ValueError if it has no density."""
        x = self._cast(x)
        if is_validation_enabled():
            if x.shape == self.likelihood.data_shape:
                raise ValueError(
                    f"x must have a row for each datum: give x[None]; got {[*x.shape]}"
                )
            self.likelihood.check(x)
        return x

    def _cast(self, x: Tensor) -> Tensor:
        """Returns `x` in the type of the weights, so that integers and doubles work too."""
        x = as_tensor("x", x)
        if is_validation_enabled():
            check_finite("x", x, self.likelihood.missing)
        known = getattr(self.posterior, "input_scale", None)
        if known is not None and known.dtype == x.dtype:  # looking at parameters takes time
            return x
        parts = (self.posterior, self)
        return x.to(next((p.dtype for part in parts for p in part.parameters()), x.dtype))

    def _checked_condition(self, y: Tensor | None) -> Tensor | None:
        """Returns `y` as a tensor; raises a ValueError if no part of the VAE can use it."""
        if y is None:
            return None
        y = as_tensor("y", y)
        if is_validation_enabled():
            check_finite("y", y)
        parts = (
            self,
            self.prior,
            self.likelihood,
            getattr(self.likelihood, "decoder", None),
            self.posterior,
            getattr(self.posterior, "encoder", None),
        )
        if not any(
            getattr(part, "condition_dim", not type(part).__module__.startswith("pyro_vae."))
            for part in parts
        ):
            raise ValueError(
                f"y of shape {list(y.shape)} was given, but no part of this VAE is conditioned on "
                "it: give its networks condition_dim, the length of a row of y, as "
                "build(..., condition_dim=...) does, or leave y out"
            )
        return y

    def _sample_z(self, name: str, prior: Any) -> Tensor:
        """Samples a latent site of the model, and checks that the guide's draw fits the prior.

        A draw of another size would broadcast; at a draw outside the prior's support the bound
        would be -inf.
        """
        z = pyro.sample(name, prior)
        own, other = type(self.prior).__name__, type(self.posterior).__name__
        if z.shape[-1:] != prior.event_shape:
            raise ValueError(
                f"prior {own} is over {prior.event_shape.numel()} latents, posterior {other} over "
                f"{z.shape[-1]}: build both with one latent_dim"
            )
        if is_validation_enabled() and not bool(prior.support.check(z).all()):
            raise ValueError(
                f"prior {own} has no density at latents that posterior {other} draws: give a "
                "posterior that stays inside the prior's support, or a prior on all real vectors"
            )
        return z


@effectful(type="module")
def register(**parts: nn.Module) -> None:
    """Registers the parameters of `parts` with Pyro's store, if a handler is listening.

    This is `pyro.module` with one difference: the store then holds, and SVI trains, the module's
    own tensor. `pyro.module` would train the tensor that another VAE registered under the same
    name, or a copy of a tensor that is not contiguous.
    """
    store = pyro.get_param_store()
    for part, module in parts.items() if am_i_wrapped() else ():
        for key, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            name = f"{part}$$${key}"
            if name in store and store[name] is not parameter:
                del store[name]
            if name not in store:
                real: dict[str, constraints.Constraint] = {name: constraints.real}
                store.set_state({"params": {name: parameter}, "constraints": real})
            pyro.param(name)
