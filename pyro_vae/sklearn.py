"""A VAE as an estimator of scikit-learn: arrays and frames in, codes, scores and outliers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    DensityMixin,
    OutlierMixin,
    TransformerMixin,
)
from sklearn.utils import check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from pyro_vae.arguments import check_real
from pyro_vae.config import build, component
from pyro_vae.data import read_table, spread
from pyro_vae.data.schema import as_name
from pyro_vae.data.tables import read_numbers
from pyro_vae.estimators import class_probabilities, impute, log_evidence
from pyro_vae.runtime import forked
from pyro_vae.training import fit

__all__ = ["VariationalAutoencoder"]

SCORED_ROWS = 500  # most training rows whose log p defines what an outlier is
Array = NDArray[np.float64]


class VariationalAutoencoder(  # type: ignore[misc]
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, OutlierMixin, DensityMixin, BaseEstimator
):
    """A VAE of the rows of a table: codes, log p(x) of each row, draws and outliers.

    Columns of an array are real numbers unless `schema` says otherwise; those of a frame are what
    `read_table` infers, text included. NaN is a missing entry: the model describes the observed
    entries. All values and log p are in the table's own units.

    Args:
        n_components: Latent size D.
        schema: Kinds of columns by name, as in `read_table`, or one kind for all; the columns of
            an array are called "x0", "x1" and so on.
        hidden: Widths of the hidden layers of encoder and decoder; a number for one layer.
        prior: Name of a prior, as in `build`.
        posterior: Name of a posterior.
        objective: Name of an objective.
        classes: Number of classes, whose labels may be known for some rows or for none; see
            `ClassVAE`. Estimates of log p then cost that many times as much.
        label_weight: Weight of log p(y | x), which each known label adds to the objective.
        classifier: Whether a network learns q(y | x) beside the model, as in `build`.
        epochs: Passes over the data.
        batch_size: Rows of one step.
        lr: Learning rate of Adam.
        contamination: Share of outliers in the training data, up to 1/2: `predict` returns -1 for
            a row whose log p is below this quantile of 500 training rows, which are kept.
        tolerance: Largest standard error of log p, in nats.
        budget: Largest number of evaluations of the model for log p of one row, as in
            `log_evidence`.
        random_state: Seed of weights, training and draws.

    Attributes:
        vae_: The VAE, in double precision.
        schema_: The schema of the columns.
        history_: The history of the training, as `pyro_vae.fit` returns it.
        classes_: The classes, numbers from 0, if there are any.
        n_features_in_: Number of columns.
        feature_names_in_: Names of the columns, if `fit` was given a frame.

    Example:
        >>> vae = VariationalAutoencoder(2, epochs=1).fit(torch.randn(11, 3))
        >>> vae.transform(torch.randn(5, 3)).shape
        (5, 2)

    References:
        Kingma and Welling. Auto-encoding variational Bayes. 2013.
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        schema: Mapping[str, Any] | str | None = None,
        hidden: int | Sequence[int] = (100,),
        prior: str | Mapping[str, Any] = "StandardNormal",
        posterior: str | Mapping[str, Any] = "DiagonalNormal",
        objective: str | Mapping[str, Any] = "ELBO",
        classes: int = 0,
        label_weight: float = 0.0,
        classifier: bool = False,
        epochs: int = 100,
        batch_size: int = 100,
        lr: float = 1e-3,
        contamination: float = 0.1,
        tolerance: float = 0.05,
        budget: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.schema = schema
        self.hidden = hidden
        self.prior = prior
        self.posterior = posterior
        self.objective = objective
        self.classes = classes
        self.label_weight = label_weight
        self.classifier = classifier
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.contamination = contamination
        self.tolerance = tolerance
        self.budget = budget
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> VariationalAutoencoder:
        """Trains on the rows X [N, C].

        Args:
            X: The rows.
            y: With `classes`, the label of each row, from 0, -1 or NaN where unknown; None if
                all are unknown. Without `classes` it is ignored.
        """
        check_real(above=0, contamination=self.contamination)
        if self.contamination > 0.5:
            raise ValueError(f"contamination must be at most 0.5; got {self.contamination}")
        rows = self._training_rows(X)
        labels = self._labels(y, len(rows))
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        network = {"MLP": {"hidden": np.atleast_1d(self.hidden).tolist()}}
        with forked(torch.device("cpu"), self._seed):
            self.vae_ = build(
                len(self.schema_.columns),
                self.n_components,
                prior=self.prior,
                likelihood=self.schema_.likelihood,
                posterior=self.posterior,
                encoder=network,
                decoder=network,
                missing=True,
                classes=self.classes,
                label_weight=self.label_weight,
                classifier=self.classifier,
            )
        objective, options = component("objective", self.objective)
        self.history_ = fit(
            self.vae_,
            rows if labels is None else (rows, labels),
            objective(**options),
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            seed=self._seed,
            progress=False,
        )
        self.vae_.double().eval()
        self._n_features_out = self.n_components
        self._some = rows[spread(len(rows), SCORED_ROWS, self._seed)]
        self._offset: list[float] = []
        return self

    @property
    def offset_(self) -> float:
        """The log p below which a row is an outlier, in nats; computed when it is first needed."""
        if not self._offset:
            self._offset.append(np.quantile(self._scores(self._some), self.contamination).item())
        return self._offset[0]

    def transform(self, X: Any) -> Array:
        """Returns posterior means [N, D] of rows."""
        rows = self._rows(X)
        with torch.no_grad():
            return self.vae_.encode(rows).mean.numpy()

    def inverse_transform(self, X: Any, y: Any = None) -> Any:
        """Decodes codes [N, D] to rows: the mean of each number, the likeliest category.

        With `classes`, y [N] holds the class of each code.
        """
        check_is_fitted(self)
        codes = check_array(X, dtype=np.float64, input_name="X")
        labels, vae = self._labels(y, len(codes)), self.vae_
        y_one_hot: Tensor | None = None
        if labels is not None:
            vae.check_labels(labels)  # type: ignore[operator]
            if bool((labels < 0).any()):
                raise ValueError("with classes, inverse_transform needs y, the class of each code")
            y_one_hot = torch.nn.functional.one_hot(labels.long(), self.classes).double()
        with torch.no_grad():
            return self._like_input(vae.likelihood(torch.tensor(codes), y_one_hot).mean, X)

    def impute(self, X: Any, num_draws: int = 100) -> Any:
        """Returns rows with missing entries filled in, given the observed entries of each row.

        They are filled in by the mean of real and positive numbers, rounded to the resolution of
        their column; by the median of counts and ordered levels, and by the commonest category of
        `num_draws` draws. Observed entries stay.
        """
        rows = self._rows(X)
        imputation = impute(self.vae_, rows, num_draws=num_draws, seed=self._seed)
        best = self.schema_.rounded(self.schema_.centre(imputation.draws, imputation.mean))
        filled = self._like_input(torch.where(rows.isnan(), best, rows), X)
        if not (self._is_frame and hasattr(X, "iloc")):
            return filled
        frame, missing = X.copy(), dict(zip(self.schema_.columns, rows.isnan().T.numpy()))
        for name, dtype in X.dtypes.items():
            if (empty := missing[str(name)]).any():
                frame[name] = filled[str(name)]
                if str(name) not in self._cells:  # numbers, of all digits
                    with suppress(TypeError, ValueError):  # a mean that is not whole
                        frame[name] = frame[name].astype(dtype)
                    frame[name] = frame[name].where(empty, X[name])
        return frame

    def score_samples(self, X: Any) -> Array:
        """Returns log p of each row's observed entries in nats, in the table's own units."""
        return self._scores(self._rows(X))

    def score(self, X: Any, y: Any = None) -> float:
        """Returns the mean log p(x) of rows."""
        return float(self.score_samples(X).mean())

    def decision_function(self, X: Any) -> Array:
        """Returns log p(x) of each row less `offset_`: negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> NDArray[np.int64]:
        """Returns -1 for outliers, 1 for others."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    @available_if(lambda self: self.classes > 0)
    def predict_proba(self, X: Any) -> Array:
        """Returns p(y | x) of each row [N, C] under the model, by `class_probabilities`."""
        rows = self._rows(X)
        return class_probabilities(self.vae_, rows, **self._options()).probabilities.numpy()

    @available_if(lambda self: self.classes > 0)
    def classify(self, X: Any) -> NDArray[np.int64]:
        """Returns the likeliest class of each row; `predict` returns outliers."""
        return self.classes_[self.predict_proba(X).argmax(1)]

    def sample(self, n_samples: int = 1, random_state: Any = 0) -> Any:
        """Draws rows from the model: an array, or a frame if `fit` was given one."""
        check_is_fitted(self)
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        with forked(torch.device("cpu"), seed), torch.no_grad():
            return self._like_input(self.vae_.sample(n_samples))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.non_deterministic = True  # an estimate depends on the rows that are scored with it
        return tags

    def _scores(self, rows: Tensor) -> Array:
        return log_evidence(self.vae_, rows.double(), **self._options()).log_prob.numpy()

    def _options(self) -> dict[str, Any]:
        """Returns the options of estimators of log p."""
        options = {"tolerance": self.tolerance, "budget": self.budget, "seed": self._seed}
        return options | {"audit": False}

    def _labels(self, y: Any, number: int) -> Tensor | None:
        """Returns labels [N], -1 where unknown; None without classes."""
        if not self.classes:
            return None
        self.classes_ = np.arange(self.classes)
        if y is None:
            return torch.full((number,), -1.0)
        try:
            labels = np.asarray(column_or_1d(y), np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"y must hold classes as numbers from 0, -1 or NaN where unknown; got: {error}; "
                "number them, as scikit-learn's LabelEncoder does"
            ) from error
        check_consistent_length(range(number), labels)
        return torch.from_numpy(np.nan_to_num(labels, nan=-1.0))

    def _training_rows(self, X: Any) -> Tensor:
        """Returns the training rows [N, C], float32; learns the schema."""
        self._is_frame = hasattr(X, "columns")
        if self._is_frame:
            validate_data(self, X, skip_check_array=True)
            rows, self.schema_ = read_table(X, self.schema)
            if self.schema_.ignored:
                raise ValueError("schema: columns cannot be ignored here: drop them from X")
            types = X.dtypes if hasattr(X, "iloc") else {}
            other_types = {name: t for name, t in types.items() if t.kind not in "iuf"}
            self._dtypes = {str(name): t for name, t in other_types.items()}
            self._cells = {  # cells of the frame, by their names in the schema
                str(n): {as_name(c): c for c in getattr(t, "categories", X[n].dropna().unique())}
                for n, t in other_types.items()
                if self.schema_.columns[str(n)].categories
            }
        else:
            rows, self.schema_ = read_numbers(self._array(X, reset=True), self.schema)
        return rows

    def _rows(self, X: Any) -> Tensor:
        """Returns rows [N, C] in double precision, with the codes of the schema."""
        check_is_fitted(self)
        if self._is_frame and hasattr(X, "columns"):
            validate_data(self, X, reset=False, skip_check_array=True)
            return read_table(X, self.schema_)[0].double()
        rows = np.array(self._array(X, reset=False))  # a copy, which may be written
        if not self._is_frame:
            return torch.from_numpy(rows)
        cells = [[None if cell != cell else cell for cell in column] for column in rows.T.tolist()]
        return self.schema_.encode(dict(zip(self.schema_.columns, cells)), "array").double()

    def _array(self, X: Any, reset: bool) -> Array:
        options = {"dtype": np.float64, "ensure_all_finite": "allow-nan"}
        return validate_data(self, X, reset=reset, ensure_min_samples=1 + reset, **options)

    def _like_input(self, rows: Tensor, X: Any = None) -> Any:
        """Returns rows in the form given to `fit`, with the index of X if that is a frame."""
        if not self._is_frame:
            return rows.numpy()
        import pandas

        index, cells = X.index if hasattr(X, "iloc") else None, dict(self.schema_.decode(rows))
        for name, cell_of_name in self._cells.items():
            cells[name] = [cell_of_name.get(as_name(cell), cell) for cell in cells[name]]
        return pandas.DataFrame(cells, index=index).astype(self._dtypes)
