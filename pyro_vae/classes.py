"""A VAE with a class for each datum, for few labels or none."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import one_hot

from pyro_vae.arguments import as_tensor, check_real, check_whole
from pyro_vae.distributions import Label, mixture
from pyro_vae.hierarchy import Inference, Layers
from pyro_vae.likelihoods import Likelihood
from pyro_vae.posteriors import Posterior
from pyro_vae.priors import Prior
from pyro_vae.vae import VAE, register

SUM_OUT: Any = {"enumerate": "parallel"}


class ClassWeights(nn.Module):
    """The prior p(y) of classes, with learned weights that start equal."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        check_whole(2, classes=classes)
        self.logits = nn.Parameter(torch.zeros(classes))

    def forward(self) -> Any:
        """Returns the distribution of one-hot classes, batch (), event (C,)."""
        return dist.OneHotCategorical(logits=self.logits)


class ClassVAE(VAE):
    r"""A VAE whose data have a class, known for all, some or none of them.

    .. math:: p(x, y, z) = p(y) \, p(z \mid y) \, p(x \mid z, y), \qquad q(z \mid x, y)

    The class is summed out wherever it is not known, so that no classifier network is needed:
    p(y | x) follows from the model, by `class_probabilities`. Labels are numbers from 0, -1 where
    unknown. The log p of a datum is log p(x, y) if it has a label, else log p(x).

    A `classifier` q(y | x) may be trained beside the model. It learns the labels that are known;
    elsewhere KL(q(y | x) || p(y | x)) ties it to the model, which so learns from few labels.

    Sites are "y", "z" and "x", and "label" where labels are given; a hierarchy has one for each
    layer in place of "z". Each pass runs the networks on all C classes.

    Args:
        prior: y -> p(z | y), or p(z) for a prior that ignores y; `Layers` for a hierarchy.
        likelihood: z, y -> p(x | z, y).
        posterior: x, y -> q(z | x, y), or an order of inference; networks are conditioned on
            one-hot classes.
        missing: As in `VAE`.
        classes: Number of classes C.
        label_weight: Weight of log p(y | x) at known labels, or of the classifier's log q(y | x):
            objectives add its gradient, but not its value to the reported bound.
        classifier: Network from what the encoder sees to C raw numbers, or None.

    References:
        Kingma, Rezende, Mohamed and Welling. Semi-supervised learning with deep generative
        models. 2014.
    """

    def __init__(
        self,
        prior: Prior | Layers,
        likelihood: Likelihood,
        posterior: Posterior | Inference,
        missing: bool = False,
        *,
        classes: int,
        label_weight: float = 0.0,
        classifier: nn.Module | None = None,
    ) -> None:
        super().__init__(prior, likelihood, posterior, missing)
        self.class_weights = ClassWeights(classes)
        check_real(0, label_weight=label_weight)
        self.classes, self.label_weight = classes, label_weight
        self.classifier = classifier

    def model(self, x: Tensor | None = None, y: Tensor | None = None, size: int = 1) -> Tensor:
        """Pyro model: y ~ p(y), z ~ p(z | y), x ~ p(x | z, y), and labels where they are given.

        Args:
            x: Data [B, *E] to condition on; drawn if None.
            y: Labels [B] or [B, 1], -1 where unknown; or one-hot rows [B, C], zero where unknown.
            size: Number of data to draw if neither `x` nor `y` is given.
        """
        register(classes=self.class_weights, prior=self.prior, likelihood=self.likelihood)
        labels_of = self.check_labels if is_validation_enabled() else self._labels
        x = None if x is None else self._checked_data(x)
        labels = labels_of(y, None if x is None else len(x))
        size = next((len(part) for part in (x, labels) if part is not None), size)
        with pyro.plate("data", size, dim=-1):
            c = pyro.sample("y", self.class_weights(), infer=SUM_OUT)
            if labels is not None:
                weight: Any = {"label_weight": self.label_weight}
                pyro.sample("label", Label(c), obs=labels, infer=weight)
            return self._sample_model(x, c)

    def guide(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Pyro guide: z ~ q(z | x, y) for each class; y ~ p(y), or the classifier's q(y | x)."""
        register(classes=self.class_weights, posterior=self.posterior)
        q, infer = self.class_weights(), SUM_OUT
        if self.classifier is not None:
            register(classifier=self.classifier)
            q, infer = self.classify(x), SUM_OUT | {"classifier": True}
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("y", q, infer=infer)
            return self._sample_guide(x, super().encode(x, c))

    def classify(self, x: Tensor) -> Any:
        """Returns q(y | x) of the classifier, over one-hot classes, batch [B]; `.probs` is [B, C].

        Raises:
            ValueError: If there is no classifier.
        """
        if self.classifier is None:
            raise ValueError(
                "this VAE has no classifier: use class_probabilities, or build it with "
                "classifier=True"
            )
        q: Any = self.posterior
        scale = (q.layers[0] if isinstance(q, Inference) else q).input_scale
        logits = self.classifier(self.likelihood.inputs(self._cast(x)) / scale)
        return dist.OneHotCategorical(logits=logits.to(self.class_weights.logits))

    def encode(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns q(z | x), batch [B], event (D,): the mixture of q(z | x, y) over classes.

        Without a label, the weights of the classes are computed at the means of q(z | x, y) alone;
        see `class_probabilities` for estimates with an error.
        """
        logits, q = self._class_logits_and_posterior(x, y)
        return mixture(logits, q)

    def reconstruct(
        self, x: Tensor, y: Tensor | None = None, num_samples: int | None = None
    ) -> Tensor:
        """Reconstructs data from their latents, at the label or else the most probable class.

        Args:
            x: Data [B, *E].
            y: Labels as in `model`, or None.
            num_samples: None for E[x | z, y] at the posterior's mean; else how many draws of x,
                each at a class and latents of its own.
        """
        if num_samples is None:
            logits, _ = self._class_logits_and_posterior(x, y)
            y = one_hot(logits.argmax(-1), self.classes).to(logits.dtype)
        return super().reconstruct(x, y, num_samples)

    def _drawn(self, x: Tensor, y: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
        """Draws latents [number, B, D], each at a class of its own, and returns these classes."""
        logits, _ = self._class_logits_and_posterior(x, y)
        c = dist.OneHotCategorical(logits=logits).sample(torch.Size((number,)))
        return super().encode(x, c).sample(), c

    def sample(self, size: int, y: Tensor | None = None, mean: bool = False) -> Tensor:
        """Draws x [size, *E], or E[x | z, y] if `mean`, of the classes `y` [size] where known."""
        check_whole(size=size)
        c = self.class_weights().sample(torch.Size((size,)))
        labels = self.check_labels(y, size)
        if labels is not None:
            given = one_hot(labels.clamp(min=0), self.classes).to(c)
            c = torch.where(labels.unsqueeze(1) < 0, c, given)
        return super().sample(size, c, mean)

    def check_labels(self, y: Tensor | None, rows: int | None = None) -> Tensor | None:
        """Checks that labels are classes, and returns them [B], -1 where unknown.

        Raises:
            ValueError: If a label is not a whole number from -1 to C - 1, or there are not `rows`.
        """
        labels = self._labels(y, rows)
        if labels is None:
            return None
        numbers = as_tensor("y", y).double()
        whole = numbers == numbers.round()
        bad = numbers[(numbers < -1) | (numbers >= self.classes) | ~whole]
        if len(bad):
            raise ValueError(
                f"labels must be from 0 to {self.classes - 1}, for {self.classes} classes, or -1 "
                f"where unknown; got {bad[0]:g}"
            )
        return labels

    def check_training_labels(self, y: Tensor | None) -> None:
        """Checks labels as `check_labels` does; warns if the classifier will not learn them."""
        labels = self.check_labels(y)
        unseen = self.classifier is not None and not self.label_weight
        if unseen and labels is not None and bool((labels >= 0).any()):
            message = "the classifier learns no label at label_weight=0: give one, such as 50"
            warnings.warn(message, UserWarning, stacklevel=3)

    def _labels(self, y: Tensor | None, rows: int | None = None) -> Tensor | None:
        """Returns labels [B], -1 where unknown; raises a ValueError if there are not `rows`."""
        if y is None:
            return None
        y = as_tensor("y", y)
        if y.ndim and len(y) != (len(y) if rows is None else rows):
            raise ValueError(f"y must have one row for each datum or draw: {rows}; got {len(y)}")
        if y.ndim == 2 and y.shape[1] == self.classes:
            return torch.where(y.sum(1) > 0, y.double().argmax(1), -1)
        if y.ndim != 1 and y.shape[1:] != (1,):
            raise ValueError(
                f"y must be labels [B] or [B, 1], or one-hot rows [B, {self.classes}]; "
                f"got shape {list(y.shape)}"
            )
        return y.flatten().long()

    def _class_logits_and_posterior(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Any]:
        """Returns log weights of classes at the means of q(z | x, y), and this q, both [B, C]."""
        x = self._cast(x).unsqueeze(1)
        labels = self.check_labels(y, len(x))
        c = torch.eye(self.classes).to(self.class_weights.logits)
        q: Any = super().encode(x, c)
        z, prior = q.mean, self.prior(c)
        extra = {name: fn.mean for name, fn in self.likelihood.propose(x).items()}
        p: Any = self.likelihood.observed(self.likelihood(z, c, **extra))
        logits = self.class_weights().logits + p.log_prob(x)
        logits = logits + prior.log_prob(z) - q.log_prob(z)
        return logits if labels is None else logits + Label(c).log_prob(labels.unsqueeze(1)), q
