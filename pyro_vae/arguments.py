"""Checks what callers give: numbers within bounds, names with options, and rows of numbers."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from hashlib import sha256
from numbers import Integral, Real
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn

LARGEST = 2**63 - 1  # largest whole number, and so largest seed, that torch takes
MISSING_HINT = ", or give the VAE missing=True if NaN stands for a missing entry"
PLAIN = (bool, int, float, str, tuple, list)  # types of options that a repr shows
P = ParamSpec("P")
T_co = TypeVar("T_co", covariant=True)


class ReprModule(nn.Module):
    """A module whose repr shows the plain options that it was made with."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Sets the signature to that of `__init__`: early versions of Python show `__new__`'s."""
        super().__init_subclass__(**options)
        _, *own = inspect.signature(cls.__init__).parameters.values()
        cls.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Records the options; a copy gets those of its original."""
        self = super().__new__(cls)
        bound = inspect.signature(cls).bind_partial(*args, **options)
        bound.apply_defaults()
        plain = {n: v for n, v in bound.arguments.items() if isinstance(v, PLAIN)}
        self.__dict__["_made_with"] = ", ".join(f"{n}={reprlib.repr(v)}" for n, v in plain.items())
        return self

    def extra_repr(self) -> str:
        """Returns the options, as one would write them."""
        return self.__dict__["_made_with"]


def check_whole(
    least: int = 1, most: int = LARGEST, *, optional: bool = False, **values: Any
) -> None:
    """Checks that values are whole numbers from `least` to `most`.

    Args:
        least: Smallest number allowed.
        most: Largest number allowed.
        optional: Whether None is allowed.
        values: The values, each by the name of its argument.

    Raises:
        ValueError: If a value is not; the message names it.
    """
    for name, value in values.items():
        if value is None and optional:
            continue
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_whole or not least <= int(value) <= most:
            bound = f"at most {most}" if is_whole and int(value) > most else f"at least {least}"
            bound = bound if is_whole else f"a whole number, {bound}"
            raise ValueError(f"{name} must be {bound}; got {_short(value)}")


def check_real(
    least: float = -math.inf,
    *,
    above: float = -math.inf,
    optional: bool = False,
    **values: Any,
) -> None:
    """Checks that values are finite real numbers within bounds.

    Args:
        least: Smallest number allowed.
        above: Bound that a value must be greater than.
        optional: Whether None is allowed.
        values: The values, each by the name of its argument.

    Raises:
        ValueError: If a value is not; the message names it.
    """
    for name, value in values.items():
        if value is None and optional:
            continue
        is_real = isinstance(value, Real) and not isinstance(value, bool)
        if not is_real or not (math.isfinite(value) and value >= least and value > above):
            bounds = [f"above {above:g}" if above else "positive"] if above > -math.inf else []
            bounds += [f"at least {least:g}"] if least > -math.inf else []
            if not is_real or not math.isfinite(value):
                bounds.insert(0, "a finite number")
            raise ValueError(f"{name} must be {', '.join(bounds)}; got {_short(value)}")


def check_choice(known: Collection[str], **values: Any) -> None:
    """Checks that values are among the known names.

    Raises:
        ValueError: If a value is not; the message names it.
    """
    for name, value in values.items():
        if not (isinstance(value, str) and value in known):
            *first, last = map(repr, known)
            raise ValueError(f"{name} must be {', '.join(first)} or {last}; got {_short(value)}")


def closest(name: str, known: Iterable[str]) -> str:
    """Returns a hint at the known name that is most like `name` in any case, "" if none is."""
    names = {k.lower(): k for k in known}
    close = get_close_matches(name.lower(), names, 1, 0.5)
    return f", did you mean {names[close[0]]!r}?" if close else ""


def name_and_options(what: str, declared: Any) -> tuple[str, dict[str, Any]]:
    """Returns the name and the options of a declared class.

    Args:
        what: What the error message calls it.
        declared: A name, or `{name: {option: value}}`, or `{"class_path": name, "init_args":
            {option: value}}`.

    Raises:
        ValueError: If it is none of these.
    """
    mapping = declared if isinstance(declared, Mapping) else {"class_path": declared}
    if len(mapping) == 1 and "class_path" not in mapping:
        mapping = dict(zip(("class_path", "init_args"), *mapping.items()))
    name, options = mapping.get("class_path"), mapping.get("init_args")
    is_known = {*mapping} <= {"class_path", "init_args"}
    if not (is_known and isinstance(name, str) and isinstance(options, Mapping | None)):
        raise ValueError(
            f"{what} must be a name, {{name: options}} or a mapping of class_path and init_args; "
            f"got {' '.join(repr(declared).split())[:60]}"
        )
    return name, dict(options or {})


def check_options(what: str, options: Iterable[str], known: Collection[str]) -> None:
    """Checks that all options are known.

    Raises:
        ValueError: If one is not; the message lists the known ones.
    """
    for option in options:
        if option not in known:
            raise ValueError(
                f"{what} has no option {option!r}{closest(str(option), known)}: it has "
                f"{', '.join(known) or 'none'}"
            )


def final_subclasses(cls: type) -> list[Any]:
    """Returns `cls` and its subclasses that have no abstract method, in order of definition."""
    subclasses: list[Any] = sum(map(final_subclasses, cls.__subclasses__()), [])
    members = (getattr(cls, name, None) for name in dir(cls))
    is_abstract = any(getattr(member, "__isabstractmethod__", False) for member in members)
    return list(dict.fromkeys(subclasses if is_abstract else [cls, *subclasses]))


def as_plain(value: Any) -> Any:
    """Converts numpy's and torch's numbers and arrays to Python's, in lists and mappings too."""
    if isinstance(value, Mapping):
        return {key: as_plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [as_plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value


def as_shape(name: str, value: Any) -> tuple[int, ...]:
    """Returns the sizes of a shape, given one size or several.

    Raises:
        ValueError: If there is none, or one is not a whole number from 1.
    """
    sizes = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not sizes:
        raise ValueError(f"{name} must have at least one size; got {_short(value)}")
    for size in sizes:
        check_whole(**{name: size})
    return tuple(map(int, sizes))


def as_tensor(name: str, value: Any) -> Tensor:
    """Converts an array, a frame or lists of numbers to a tensor; returns a tensor as it is.

    Real numbers get torch's default type, whole ones int64.

    Raises:
        ValueError: If it is none of these, or does not hold real numbers.
    """
    if isinstance(value, Tensor):
        return value
    if not is_rows(value):
        raise ValueError(
            f"{name} must be a tensor, array, frame or list with a row for each datum; got "
            f"{type(value).__name__}: of a data set give rows, "
            "x, y = data.test.fixed().batch(torch.arange(100))"
        )
    try:
        array = value.to_numpy() if hasattr(value, "to_numpy") else np.asarray(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} must hold rows of one length: {_one_line(error)}") from error
    if array.shape == (0,):
        raise ValueError(f"{name} must have at least one row; got none")
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must hold real numbers; got {array.dtype} values")
    if array.dtype.kind == "u" and array.size and int(array.max()) > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}; got {array.max()}")
    kinds: dict[str, Any] = {"f": torch.zeros(()).numpy().dtype, "b": bool}
    with np.errstate(over="ignore"):  # values that become infinite are refused later
        return torch.from_numpy(np.array(array, dtype=kinds.get(array.dtype.kind, np.int64)))


def digest_of(*parts: Any) -> str:
    """Returns the SHA-256, in hex, of types, shapes and bytes of tensors; skips None."""
    sha = sha256()
    for part in (part for part in parts if part is not None):
        sha.update(f"{part.dtype}{list(part.shape)}".encode())
        for rows in part.split(1024):
            flat = rows.detach().cpu().contiguous().view(-1)
            sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def is_rows(value: Any) -> bool:
    """Returns whether a value is of a kind that `as_tensor` converts."""
    return isinstance(value, Tensor | np.ndarray | list | tuple) or (
        hasattr(value, "to_numpy") and hasattr(value, "shape")
    )


def check_finite(name: str, value: Tensor, missing: bool | None = None, remedy: str = "") -> None:
    """Checks that a tensor holds a row of finite real numbers for each datum.

    Args:
        name: What the messages call the tensor.
        value: The tensor.
        missing: Whether NaN is allowed, for a missing entry; None if no entry can be missing.
        remedy: A further remedy for the message to name.

    Raises:
        ValueError: If it does not; the message names the first rows.
    """
    if value.layout != torch.strided or value.device.type == "meta":
        kind = "meta" if value.device.type == "meta" else str(value.layout)[6:]
        raise ValueError(f"{name} must be a dense tensor of real numbers; got a {kind} one")
    if value.is_complex():
        raise ValueError(f"{name} must hold real numbers; got {str(value.dtype)[6:]} values")
    if value.ndim < 1:
        raise ValueError(f"{name} must have a row for each datum; got shape []")
    if value.is_floating_point() and not bool((finite := value.isfinite()).all()):
        bad = ~finite & ~value.isnan() if missing else ~finite
        rows = (bad.flatten(1).any(1) if bad.ndim > 1 else bad).nonzero().flatten().tolist()
        hint = MISSING_HINT if missing is False and bool(value.isnan().any()) else remedy
        what = "infinite" if missing else "NaN or infinite"
        if rows:
            raise ValueError(
                f"{name} must be finite; {len(rows)} row(s) hold {what} values, "
                f"first {rows[:3]} (from 0): repair or remove them{hint}"
            )


def as_rows(name: str, value: Any, missing: bool | None = None) -> Tensor:
    """Converts a value to finite real numbers with a row for each datum; see `as_tensor`.

    Args:
        name: What the messages call the value.
        value: The value that a caller gave.
        missing: As in `check_finite`.

    Raises:
        ValueError: If the value cannot be converted, or has no rows.
    """
    rows = as_tensor(name, value)
    check_finite(name, rows, missing)
    if len(rows) < 1:
        raise ValueError(f"{name} must have at least one row; got shape {list(rows.shape)}")
    return rows


def fill_missing(x: Tensor) -> Tensor:
    """Returns `x` [N, *E] with missing values of an entry replaced by its observed ones, in turn.

    Mean, deviation and frequencies of an entry stay about those of its observed values.

    Raises:
        ValueError: If an entry is missing in all rows.
    """
    if not bool((missing := x.isnan().flatten(1)).any()):
        return x
    count = len(x) - missing.sum(0)
    if bool((count == 0).any()):
        empty = (count == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"each entry of a datum must be observed in some row; {len(empty)} never are, first "
            f"{empty[:3]} (from 0): remove them"
        )
    source = torch.arange(len(x), device=x.device).unsqueeze(1) % count
    rows = missing.byte().argsort(dim=0, stable=True).gather(0, source)
    flat = x.flatten(1)
    return torch.where(missing, flat.gather(0, rows), flat).view_as(x)


class TakesVAE(Protocol[P, T_co]):
    """A function that can be called as (model, guide, ...) and as (vae, ...)."""

    @overload
    def __call__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T_co: ...

    @overload
    def __call__(self, vae: Any, /, *args: P.args, **kwargs: P.kwargs) -> T_co: ...


def takes_vae(
    function: Callable[Concatenate[Callable[..., Any], Callable[..., Any], P], T_co],
) -> TakesVAE[P, T_co]:
    """Lets a function of (model, guide, x, y) be called as (vae, x, y) too.

    A first argument that has both programs is taken for a VAE, unless a guide follows it.
    """

    @wraps(function)
    def call(*args: Any, **options: Any) -> T_co:
        return function(*programs(args, options), **options)

    return call


def programs(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the arguments, a VAE in first place replaced by its two programs; checks these."""
    found = [getattr(args[0], name, None) for name in ("model", "guide")] if args else [None]
    if all(map(callable, found)) and "guide" not in options and not callable([*args, None][1]):
        args = (*found, *args[1:])
    named = dict(zip(("model", "guide"), args)) | options
    for name in ("model", "guide"):
        if not callable(named.get(name)):
            raise ValueError(
                f"{name} must be a Pyro program, as in (vae.model, vae.guide, x), or give a VAE: "
                f"(vae, x); got {type(named.get(name)).__name__}"
            )
    return args


def _short(value: Any) -> str:
    text = _one_line(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())
