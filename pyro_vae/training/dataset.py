"""Datasets for `fit`, and what it measures on them between epochs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.arguments import as_tensor, check_finite, digest_of, is_rows
from pyro_vae.densities import evaluating, run_program
from pyro_vae.densities.programs import is_random
from pyro_vae.estimators.importance import unchecked_lower_bound
from pyro_vae.processes import Group

CHUNK = 1000  # number of validation rows processed at once
UNIT_ROWS = 1000  # largest number of rows on which active units are counted
MIN_VARIANCE = 0.01  # a unit is active if its posterior mean varies more than this over data


@dataclass(frozen=True, eq=False)
class TensorDataset:
    """A dataset whose rows are held in tensors.

    `fit` takes any object with the methods `__len__`, `batch`, `fixed` and `to` of this class; a
    run also records the results of `describe` and `digest`, if the object has them.

    Attributes:
        x: Data [N, *E].
        y: Values that the model is conditioned on [N, C], or None.
    """

    x: Tensor
    y: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns x [B, *E], and y [B, C] or None, of the rows at `index` [B], on their device.

        A class that draws new noise at each visit takes it from torch's global generator.
        """
        return self.x[index], None if self.y is None else self.y[index]

    def fixed(self, seed: int) -> TensorDataset:
        """Returns the rows with their noise drawn once, for evaluation; tensors have no noise."""
        return self

    def to(self, device: torch.device) -> TensorDataset:
        """Returns the same rows on a device."""
        return TensorDataset(self.x.to(device), None if self.y is None else self.y.to(device))

    def describe(self) -> dict[str, Any]:
        """Returns the type and shape of x and of y."""
        parts = {"x": self.x, "y": self.y}
        return {
            name: None if part is None else f"{str(part.dtype)[6:]} {list(part.shape)}"
            for name, part in parts.items()
        }

    def digest(self) -> str:
        """Returns the SHA-256 of types, shapes and bytes."""
        return digest_of(self.x, self.y)


def as_dataset(data: Any, name: str, missing: bool = False) -> TensorDataset:
    """Returns `data` as a dataset; see `check_finite` for `missing`.

    Raises:
        ValueError: If `data` is of another kind or empty, x and y differ in length, or a value is
            not finite.
    """
    is_pair = (  # whether `data` is (x, y) or (x, None), and not a list of rows
        isinstance(data, tuple | list)
        and len(data) == 2
        and is_rows(data[0])
        and (data[1] is None or isinstance(data, tuple) or hasattr(data[1], "ndim"))
        and getattr(data[0], "ndim", 2) > 1
    )
    if not is_pair and not is_rows(data):
        if not all(hasattr(data, part) for part in ("__len__", "batch", "fixed", "to")):
            raise ValueError(
                f"{name} must be rows [N, *E] (a tensor, array, frame or list), a pair (x, y) of "
                "them, or an object with __len__, batch, fixed and to, such as splits.train; got "
                f"{type(data).__name__}"
            )
        if len(data) < 1:
            raise ValueError(f"{name} must have at least one row; got none")
        return data
    x, y = data if is_pair else (data, None)
    x = as_tensor(name, x)
    if x.ndim < 2 or len(x) < 1:
        raise ValueError(
            f"{name} must be of shape [N, *E] with at least one row; got {list(x.shape)}"
        )
    check_finite(name, x, missing)
    if y is not None:
        y = as_tensor(f"y of {name}", y)
        y = y.unsqueeze(1) if y.ndim == 1 else y  # one label, or one number, per row
        if y.ndim != 2 or len(y) != len(x):
            raise ValueError(
                f"y of {name} must be of shape [{len(x)}, C], a row for each of x; got "
                f"{list(y.shape)}"
            )
        remedy = ", or give -1 for a label that is unknown" if y.shape[1] == 1 else ""
        check_finite(f"y of {name}", y, remedy=remedy)
    return TensorDataset(x, y)


def describe(rows: TensorDataset) -> dict[str, Any]:
    """Returns what a run records of its data: row count, and description and digest if defined."""
    names = [name for name in ("describe", "digest") if hasattr(rows, name)]
    return {"rows": len(rows), **{name: getattr(rows, name)() for name in names}}


def fetch(rows: TensorDataset, index: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Returns x, and y if any, of the rows at `index` [B], in the type and device of `like`."""
    x, y = rows.batch(index)
    return (x.to(like),) if y is None else (x.to(like), y.to(like))


def fetch_few(rows: TensorDataset, at_most: int, like: Tensor) -> tuple[Tensor, ...]:
    """Returns x, and y if any, of at most `at_most` evenly spaced rows, as `fetch` does."""
    index = torch.linspace(0, len(rows) - 1, min(len(rows), at_most), dtype=torch.float64)
    return fetch(rows, index.long().to(like.device), like)


def validation_bound(
    vae: Any, rows: TensorDataset | None, like: Tensor, seed: int, group: Group
) -> dict[str, float | None]:
    """Returns the mean beta = 1 ELBO, reconstruction and KL of validation rows, in nats per datum.

    Each is None without rows. Rows are converted to the type and device of the weight `like`.
    The noise depends on `seed` alone, so it is the same at every call. All processes of the
    group must call this function: each evaluates its share of the rows.
    """
    names = ("elbo", "reconstruction", "kl")
    if rows is None:
        return {f"validation_{name}": None for name in names}
    values = torch.zeros(3, len(rows), dtype=torch.float64)
    chunks = list(enumerate(torch.arange(len(rows)).split(CHUNK)))
    for i, chunk in chunks[group.rank :: group.size]:  # this rank's share
        x, *y = fetch(rows, chunk.to(like.device), like)
        bound = unchecked_lower_bound(vae.model, vae.guide, x, y[0] if y else None, seed=seed + i)
        values[:, chunk] = torch.stack([getattr(bound, name) for name in names])
    (total,) = group.all_reduce_mean(1.0, (), values.to(like.device))
    return {f"validation_{name}": each.mean().item() for name, each in zip(names, total)}


def active_units(vae: Any, rows: tuple[Tensor, ...], seed: int) -> dict[str, tuple[int, int]]:
    r"""Returns the number of active units and of all units, for each latent site by name.

    A unit is active if :math:`\mathrm{Var}_x(E_q[z_d \mid x]) > 0.01`; where a site depends on
    other sites, these are at their means. The result is empty for fewer than two rows, or if a
    site's distribution in the guide has no mean.

    References:
        Burda, Grosse and Salakhutdinov. Importance weighted autoencoders. 2016.
    """
    x, *y = rows
    if len(x) < 2:
        return {}
    at_means = AtMeans()
    with evaluating(vae.guide, seed=seed, device=x.device):
        try:
            run_program(vae.guide, x, y[0] if y else None, 1, at_means)
        except NotImplementedError:
            return {}
    means = {name: mean.reshape(len(x), -1) for name, mean in at_means.means.items()}
    active = {name: mean.var(0) > MIN_VARIANCE for name, mean in means.items()}
    return {name: (int(units.sum()), len(units)) for name, units in active.items()}


class AtMeans(Messenger):
    """Sets reparameterised sites of a guide to their means; records all means [1, B, *event]."""

    def __init__(self) -> None:
        super().__init__()
        self.means: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        summed = msg["infer"].get("enumerate") == "parallel"  # a summed-out site has no units
        if msg["is_observed"] or not is_random(msg) or summed:
            return
        self.means[msg["name"]] = msg["fn"].mean
        if msg["fn"].has_rsample:
            msg["value"] = self.means[msg["name"]]
