"""A likelihood for tables, in which each column has a likelihood of its own."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import pad

from pyro_vae.arguments import check_options, final_subclasses, name_and_options
from pyro_vae.distributions import Product, Rows
from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.likelihoods.real import LocationScale
from pyro_vae.likelihoods.whole import Categorical

REPEATED_SHARE = 0.1  # share of rows with the same number, above which a density says little
COLUMN_DEFAULTS = {"scale": "predicted", "standardise": True}  # where a kind has them


class Kind(NamedTuple):
    """The likelihood of a column, with its options.

    `has_parameters` says whether it has parameters besides the decoder's, `shares_parameters`
    whether two columns computed as one would share them; the decoder gives `num_params` numbers,
    the encoder takes `num_inputs`.
    """

    cls: type[Likelihood]
    options: dict[str, Any]
    has_parameters: bool
    shares_parameters: bool
    num_params: int
    num_inputs: int


class Given(nn.Module):  # named in pickles of older versions
    """The decoder of one column, which returns that column's part of the common output."""

    def forward(self, raw: Tensor, y: Tensor | None = None) -> Tensor:
        """Returns the raw parameters themselves."""
        return raw


class Columns(Likelihood):
    r"""A row of a table [C], each column with a likelihood of its own.

    .. math:: \log p(x \mid z) = \sum_c \log p_c(x_c \mid z)

    Any scalar likelihood is a kind of column, by its name. One decoder gives the parameters of
    all columns. Columns of the same kind and options are computed as one. Data and log p are in
    the table's own units; locations and scales are in units that `initialise` measures for each
    column, which do not change any density. A density is bounded by `min_scale`, in standard
    deviations of its column. For columns of rounded or repeated numbers give a `resolution`:
    their log p is then a log probability.

    Args:
        decoder: Network to raw parameters of shape `out_shape(data_shape, columns)`.
        data_shape: Number of columns, (C,).
        columns: A list, or a mapping from the columns' names, of their likelihoods in order: a
            name, or `{"class_path": name, "init_args": {option: value}}`. Unless given, a scale is
            "predicted" and `standardise` true. All Normal if None.
        together: Whether columns are also computed as one if they differ in `resolution` alone, or
            if each has parameters of its own. False in runs of version 0.2 and before.

    Raises:
        ValueError: If there is not one likelihood for each column, or one is unknown.

    References:
        Nazabal et al. Handling incomplete heterogeneous data using VAEs. 2020.
    """

    support: Rows
    support_name = "the supports of its columns"
    old_defaults: ClassVar[dict[str, Any]] = {"together": False}

    def __init__(
        self,
        decoder: nn.Module,
        data_shape: tuple[int, ...],
        columns: dict | list | None = None,
        together: bool = True,
    ) -> None:
        super().__init__(decoder, data_shape)
        named = _kinds_by_name(columns, self.data_shape)
        kinds, self.names = list(named.values()), list(named)
        self.columns = _group_columns(kinds, together)
        self.parts, self.sizes = nn.ModuleList(), []
        for group in ([kinds[column] for column in columns] for columns in self.columns):
            widths = [kind.options.get("resolution") for kind in group]
            resolutions = {} if len({*widths}) == 1 else {"resolution": widths}
            options = group[0].options | resolutions
            self.parts.append(group[0].cls(Given(), (len(group),), **options))
            self.sizes.append(sum(kind.num_params for kind in group))
        self.support = Rows([part.support for part, _ in self._groups()], self.columns)
        num_numeric = sum(len(g) for p, g in self._groups() if not isinstance(p, Categorical))
        self.input_loc = nn.Buffer(torch.zeros(num_numeric))
        self.input_scale = nn.Buffer(torch.ones(num_numeric))

    @classmethod
    def num_params(cls) -> int:
        """Returns 2, for a Normal with its scale, the default of every column."""
        return 2

    @classmethod
    def out_shape(
        cls, data_shape: tuple[int, ...], columns: dict | list | None = None, **options: Any
    ) -> tuple[int, ...]:
        """Returns the number of raw parameters of all columns, as a shape."""
        return (sum(kind.num_params for kind in _kinds_by_name(columns, data_shape).values()),)

    @classmethod
    def input_shape(
        cls,
        data_shape: tuple[int, ...],
        missing: bool = False,
        columns: dict | list | None = None,
        **options: Any,
    ) -> tuple[int, ...]:
        """Counts the levels of categories, 1 for other columns, and 1 per column for a mask."""
        kinds = _kinds_by_name(columns, data_shape).values()
        return (sum(kind.num_inputs for kind in kinds) + (len(kinds) if missing else 0),)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns the product of the columns' distributions."""
        raw = self.decoded(z, y, sum(self.sizes))
        pieces = zip(self.parts, raw.split(self.sizes, -1))
        return Product([part(piece).base_dist for part, piece in pieces], self.support).to_event(1)

    def inputs(self, x: Tensor) -> Tensor:
        """Returns categories one-hot, other columns scaled, and a mask if entries may be missing.

        Positive columns enter by their log, counts by log(1 + x); missing entries are 0.
        """
        numbers = (self._numeric_columns(x) - self.input_loc) / self.input_scale
        parts = [numbers.nan_to_num(0.0) if self.missing else numbers]
        parts += [
            (x[..., group, None] == torch.arange(part.levels, device=x.device)).flatten(-2)
            for part, group in self._groups()
            if isinstance(part, Categorical)
        ]
        parts += [~x.isnan()] if self.missing else []
        return torch.cat([part.to(x.dtype) for part in parts], -1)

    @property
    def measure(self) -> list[bool | float]:
        """For each column True for a mass, False for a density, or the width of an interval."""
        found: dict[int, bool | float] = {}
        for part, group in self._groups():
            found |= zip(group, part.measure * len(group))
        return [found[column] for column in range(len(found))]

    def raw_start(self, x: Tensor) -> Tensor:
        """Returns raw parameters of the average row; those that a column does not start are 0."""
        starts = (part.raw_start(x[:, group]).flatten() for part, group in self._groups())
        return torch.cat([pad(s, (0, size - len(s))) for s, size in zip(starts, self.sizes)])

    def check(self, x: Tensor) -> None:
        """Raises a ValueError that names the column if `x` is outside the support."""
        if x.shape[-1] != len(self.names):
            raise ValueError(f"the table has {len(self.names)} columns; got {x.shape[-1]}")
        empty = x.isnan().flatten(0, -2).sum(0).tolist()
        for name, count in zip(self.names, empty):
            if count and not self.missing:
                raise ValueError(
                    f"column {name!r} lacks values in {count} row(s), and the model takes none "
                    "that do: fill them in, or train with missing=True (--missing)"
                )
        for part, group in self._groups():
            values = x[..., group]
            bad = (~(part.support.check(values) | values.isnan())).flatten(0, -2).any(0)
            for i in bad.nonzero().flatten().tolist():
                column = values[..., i][~values[..., i].isnan()]
                raise ValueError(
                    f"column {self.names[group[i]]!r}, {type(part).__name__}, needs data in "
                    f"{part.support_name}; got values in "
                    f"{[column.min().item(), column.max().item()]}: {part.remedy}"
                )

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Measures units, starts and inputs of each column on training rows `x` [N, C]."""
        for part, group in self._groups():
            part.initialise(x[:, group])
            if part.support.is_discrete or getattr(part, "resolution", None) is not None:
                continue
            for column in group:
                value, counts = x[:, column].unique(return_counts=True)
                if counts.max() > max(REPEATED_SHARE * len(x), 2 * counts.min()):
                    message = (
                        f"column {self.names[column]!r}: {counts.max() / len(x):.0%} of rows hold "
                        f"{value[counts.argmax()]:g}, where a density is bounded by min_scale "
                        "alone: give the column a resolution"
                    )
                    warnings.warn(message, UserWarning, stacklevel=2)
        if len(self.input_loc):  # torch warns if all columns are categories
            deviation, mean = torch.std_mean(self._numeric_columns(x), 0, correction=0)
            self.input_loc.copy_(mean)
            self.input_scale.copy_(torch.where(deviation > 0, deviation, 1.0))
        super().initialise(x)

    def _groups(self) -> Iterable[tuple[Any, list[int]]]:
        """Returns each part and the indices of its columns."""
        return zip(self.parts, self.columns)

    def _numeric_columns(self, x: Tensor) -> Tensor:
        """Returns the columns that are no categories, on the scale on which they are measured."""
        parts = [
            (part.line if isinstance(part, LocationScale) else part.inputs)(x[..., group])
            for part, group in self._groups()
            if not isinstance(part, Categorical)
        ]
        return torch.cat([x[..., :0], *parts], -1)


def _kinds_by_name(columns: Mapping | list | None, data_shape: tuple[int, ...]) -> dict[str, Kind]:
    """Returns the kind of each column, by name."""
    if len(data_shape) != 1:
        raise ValueError(f"Columns is for tables, of shape (columns,); got {tuple(data_shape)}")
    listed = ["Normal"] * data_shape[0] if columns is None else columns
    given = listed if isinstance(listed, Mapping) else dict(enumerate(listed))
    if len(given) != data_shape[0]:
        raise ValueError(
            f"columns must give one likelihood for each of the {data_shape[0]} columns; got "
            f"{len(given)}"
        )
    return {str(name): _kind(str(name), declared) for name, declared in given.items()}


def _kind(name: str, declared: Any) -> Kind:
    """Returns the kind that is declared for the column `name`."""
    path, options = name_and_options(f"column {name!r}", declared)
    known = {cls.__name__: cls for cls in final_subclasses(Likelihood) if cls is not Columns}
    if path not in known:
        raise ValueError(
            f"column {name!r}: likelihood {path!r} is unknown: choose one of "
            f"{', '.join(sorted(known))}"
        )
    cls = known[path]
    accepted = [n for n in list(inspect.signature(cls).parameters)[2:] if n != "library"]
    check_options(f"column {name!r}: {path}", options, accepted)
    options = {**{k: v for k, v in COLUMN_DEFAULTS.items() if k in accepted}, **options}
    try:
        part, pair = (cls(Given(), (n,), **options) for n in (1, 2))
    except (TypeError, ValueError) as error:
        raise ValueError(f"column {name!r}: {error}") from error
    parameters = zip(part.parameters(), pair.parameters())
    shares_parameters = any(p.shape == q.shape for p, q in parameters)
    has_parameters = next(part.parameters(), None) is not None
    inputs = part.levels if isinstance(part, Categorical) else 1
    (outputs,) = cls.out_shape((1,), **options)
    return Kind(cls, options, has_parameters, shares_parameters, outputs, inputs)


def _group_columns(kinds: list[Kind], together: bool) -> list[list[int]]:
    """Groups columns that are computed as one: of one kind, with no parameter in common."""
    groups: dict[str, list[int]] = {}
    for column, kind in enumerate(kinds):
        options = dict(kind.options)
        if together and "resolution" in options:
            options["resolution"] = options["resolution"] is not None
        alone = kind.shares_parameters if together else kind.has_parameters
        key = f"{kind.cls.__name__}, {sorted(options.items(), key=str)}, {alone and column}"
        groups.setdefault(key, []).append(column)
    return list(groups.values())
