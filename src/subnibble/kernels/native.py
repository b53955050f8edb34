"""The C++ module: whether it was built, and which instruction set its kernels use. The only place that chooses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# torch brings OpenMP's libgomp. Imported first, it is the only one in the process, with one pool of threads.
import torch  # noqa: F401

from subnibble.errors import BadRecipe
from subnibble.kernels import built_from, verified

try:
    import subnibble.kernels._native as _native

    module: Any = _native
    _missing = ""
except ModuleNotFoundError:
    module = None
    _missing = "the kernels were not built"
except ImportError as error:
    module = None
    _missing = f"the kernels cannot be loaded ({error})"
if module is not None:
    built_from.check(Path(module.__file__))

_log = logging.getLogger(__name__)
# As the name of an instruction set: no kernels, torch operations only.
TORCH = "torch"


def instruction_sets() -> tuple[str, ...]:
    """Instruction sets that were compiled and that this processor runs, the fastest first; empty without kernels."""
    return () if module is None else tuple(module.instruction_sets())


def default() -> str:
    """The fastest instruction set that is known to work (verified.toml); "torch" if there is none."""
    return next((name for name in instruction_sets() if name in verified.names()), TORCH)


class _Chosen:
    """The choice of this process. isa: an instruction set, or "torch". said: whether missing kernels were reported."""

    def __init__(self) -> None:
        self.isa = default()
        self.said = False


_chosen = _Chosen()


def isa() -> str:
    """The instruction set whose kernels run; "torch" for none."""
    return _chosen.isa


def choose_(name: str) -> None:
    """Use another instruction set from now on, in all threads; `BadRecipe` if this process has no such kernels.

    name: one of `instruction_sets()`, or "torch" for torch operations.
    """
    known = (*instruction_sets(), TORCH)
    if name not in known:
        raise BadRecipe(f"no kernels for instruction set {name!r} here; choose one of {', '.join(known)}")
    _chosen.isa = name


@contextmanager
def chosen(name: str) -> Iterator[None]:
    """Context in which `choose_(name)` holds."""
    before = isa()
    choose_(name)
    try:
        yield
    finally:
        choose_(before)


def why_missing() -> str | None:
    """Why there are no kernels; None if there are."""
    return _missing if module is None else None


def say_if_missing() -> None:
    """Log a warning, once, if there are no kernels."""
    reason = why_missing()
    if reason is not None and not _chosen.said:
        _chosen.said = True
        _log.warning(
            "%s: packed models run on torch operations, about ten times slower; kernels need a C++ compiler when "
            "subnibble is installed: `%s` builds them and shows the compiler's errors",
            reason,
            built_from.how_to_build(),
        )
