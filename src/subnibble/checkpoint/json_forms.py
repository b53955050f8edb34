"""How fields of a module's spec are spelled in JSON, each way with its inverse; wrong types and sizes are errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.packed import PackedLayout
from subnibble.tensor.scheme import Scheme

T = TypeVar("T")


@dataclass(frozen=True)
class Labels:
    """The schemes that the labels of a `quantization_config` name."""

    schemes: Mapping[str, Scheme]
    activations: Mapping[str, ActivationScheme]

    def layout(self, rows: Any, ranges: Any) -> PackedLayout:
        """The layout of a matrix of that many rows."""
        found = tuple((count(columns), self.schemes[name]) for columns, name in ranges)
        if not found:
            raise ValueError("a packed matrix without column ranges")
        return PackedLayout(count(rows), found)


@dataclass(frozen=True)
class Form:
    """write: a field's value to the values of its keys in JSON.

    read: the inverse; its arguments are the labels, the fields of the spec that were read before, and these values.
    """

    write: Callable[[Any], tuple[Any, ...]]
    read: Callable[..., Any]


def typed(value: Any, kind: type[T]) -> T:
    """A value of JSON that must have this very type."""
    # bool is an int to isinstance, and 64.0 must not pass for 64.
    if type(value) is not kind:
        raise TypeError(f"{value!r} where {kind.__name__} is expected")
    return value


def count(value: Any) -> int:
    """A value of JSON that must be a positive integer."""
    if typed(value, int) < 1:
        raise ValueError(f"{value} where a positive count is expected")
    return int(value)


def _plain(read: Callable[[Any], Any]) -> Form:
    return Form(lambda value: (value,), lambda labels, made, value: read(value))


def _ranges(layout: PackedLayout) -> list[list[Any]]:
    return [[columns, scheme.name] for columns, scheme in layout.ranges]


def _write_factors(factors: tuple[PackedLayout, PackedLayout] | None) -> tuple[Any]:
    if factors is None:
        return (None,)
    return ({"rank": factors[0].rows, "down": _ranges(factors[0]), "up": _ranges(factors[1])},)


def _read_factors(labels: Labels, made: Mapping[str, Any], branch: Any) -> tuple[PackedLayout, PackedLayout]:
    if set(branch) != {"rank", "down", "up"}:
        raise KeyError(f"low_rank has keys {sorted(branch)}")
    return labels.layout(branch["rank"], branch["down"]), labels.layout(made["layout"].rows, branch["up"])


def _read_residual(labels: Labels, made: Mapping[str, Any], value: Any) -> int:
    salient = made.get("salient")
    if typed(value, str) != "salient" or salient is None:
        raise ValueError(f"residual is {value!r} with{'' if salient else 'out'} salient columns")
    return int(salient.columns)


FLAG = _plain(lambda value: typed(value, bool))
TEXT = _plain(lambda value: typed(value, str))
COUNT = _plain(count)
COUNTS = Form(lambda value: (list(value),), lambda labels, made, value: tuple(map(count, value)))
# The label of an activation scheme.
ACTIVATION = Form(
    lambda scheme: (None if scheme is None else scheme.name,), lambda labels, made, name: labels.activations[name]
)
# A module's own matrix, by two keys: rows and ranges.
MATRIX = Form(lambda layout: (layout.rows, _ranges(layout)), lambda labels, made, *values: labels.layout(*values))
# The ranges of another matrix with as many rows.
RANGES = Form(
    lambda layout: (None if layout is None else _ranges(layout),),
    lambda labels, made, ranges: labels.layout(made["layout"].rows, ranges),
)
FACTORS = Form(_write_factors, _read_factors)
# The number of salient channels quantized twice, by a word: "salient" for all of them, "none".
RESIDUAL = Form(lambda repeated: ("salient" if repeated else "none",), _read_residual)
