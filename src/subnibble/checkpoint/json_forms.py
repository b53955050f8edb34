"""Convert fields of module specs to JSON and back; wrong types and sizes are errors."""

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
    """The schemes of a `quantization_config`, by label: `schemes` of weights, `activations` of inputs."""

    schemes: Mapping[str, Scheme]
    activations: Mapping[str, ActivationScheme]

    def layout(self, rows: Any, ranges: Any) -> PackedLayout:
        """Return the layout of a matrix. ranges: [columns, scheme label] of each column range, from JSON."""
        labelled = tuple((count(columns), self.schemes[name]) for columns, name in ranges)
        if not labelled:
            raise ValueError("a packed matrix without column ranges")
        return PackedLayout(count(rows), labelled)


@dataclass(frozen=True)
class Form:
    """Converts one field of a spec to JSON and back.

    write: from the field's value to the values of its JSON keys.
    read: the inverse. Its arguments: the labels, the fields of the spec that were read before, the values in JSON.
    """

    write: Callable[[Any], tuple[Any, ...]]
    read: Callable[..., Any]


def typed(value: Any, kind: type[T]) -> T:
    """Return a JSON value; raise `TypeError` unless its type is exactly `kind`."""
    # isinstance would accept True as an int. 64.0 is no int either.
    if type(value) is not kind:
        raise TypeError(f"{value!r} where {kind.__name__} is expected")
    return value


def count(value: Any) -> int:
    """Return a JSON value; raise `TypeError` or `ValueError` unless it is a positive integer."""
    if typed(value, int) < 1:
        raise ValueError(f"{value} where a positive count is expected")
    return int(value)


def _plain(read: Callable[[Any], Any]) -> Form:
    return Form(lambda value: (value,), lambda labels, earlier, value: read(value))


def _ranges(layout: PackedLayout) -> list[list[Any]]:
    return [[columns, scheme.name] for columns, scheme in layout.ranges]


def _write_factors(factors: tuple[PackedLayout, PackedLayout] | None) -> tuple[Any]:
    if factors is None:
        return (None,)
    return ({"rank": factors[0].rows, "down": _ranges(factors[0]), "up": _ranges(factors[1])},)


def _read_factors(labels: Labels, earlier: Mapping[str, Any], branch: Any) -> tuple[PackedLayout, PackedLayout]:
    if set(branch) != {"rank", "down", "up"}:
        raise KeyError(f"low_rank has keys {sorted(branch)}")
    return labels.layout(branch["rank"], branch["down"]), labels.layout(earlier["layout"].rows, branch["up"])


def _read_residual(labels: Labels, earlier: Mapping[str, Any], value: Any) -> int:
    salient = earlier.get("salient")
    if typed(value, str) != "salient" or salient is None:
        raise ValueError(f"residual is {value!r} with{'' if salient else 'out'} salient columns")
    return int(salient.num_columns)


FLAG = _plain(lambda value: typed(value, bool))
TEXT = _plain(lambda value: typed(value, str))
COUNT = _plain(count)
COUNTS = Form(lambda value: (list(value),), lambda labels, earlier, value: tuple(map(count, value)))
# The label of an activation scheme.
ACTIVATION = Form(
    lambda scheme: (None if scheme is None else scheme.name,), lambda labels, earlier, name: labels.activations[name]
)
# The main matrix of a module, under two keys: rows and ranges.
MATRIX = Form(lambda layout: (layout.rows, _ranges(layout)), lambda labels, earlier, *values: labels.layout(*values))
# The column ranges of another matrix, which has as many rows as the main one; None for no matrix.
RANGES = Form(
    lambda layout: (None if layout is None else _ranges(layout),),
    lambda labels, earlier, ranges: labels.layout(earlier["layout"].rows, ranges),
)
FACTORS = Form(_write_factors, _read_factors)
# The number of channels quantized twice, written as a word: "salient" for all salient channels, "none" for 0.
RESIDUAL = Form(lambda requantized: ("salient" if requantized else "none",), _read_residual)
