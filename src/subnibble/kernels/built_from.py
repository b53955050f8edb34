"""Whether the C++ module was built from the sources beside it. An installed wheel has no sources, and no check."""

from __future__ import annotations

import ctypes
from hashlib import sha256
from pathlib import Path

from subnibble.errors import StaleKernels

_SOURCES = Path(__file__).parent / "cpp"
# As in cpp/CMakeLists.txt.
_PATTERNS = ("*.cpp", "*.h", "*.cmake", "CMakeLists.txt", "step/*.cpp", "step/*.h")
_SYMBOL = "subnibble_built_from"


def sources_hash(folder: Path) -> str:
    """SHA-256 of the C++ sources in a folder, the same that CMake computes."""
    files = {file.relative_to(folder).as_posix(): file for pattern in _PATTERNS for file in folder.glob(pattern)}
    lines = (f"{name} {sha256(file.read_bytes()).hexdigest()}\n" for name, file in sorted(files.items()))
    return sha256("".join(lines).encode()).hexdigest()


def hash_in(module: Path) -> str:
    """The hash of sources that a built module carries; empty if it has none."""
    try:
        text = ctypes.c_char.in_dll(ctypes.CDLL(str(module)), _SYMBOL)
    except ValueError:
        return ""
    return ctypes.string_at(ctypes.addressof(text)).split()[1].decode()


def check(module: Path, sources: Path = _SOURCES) -> None:
    """Raise `StaleKernels` if there are sources and the module was built from others.

    Python passes raw addresses to the module: one that does not fit could read and write anywhere.
    """
    if sources.is_dir() and hash_in(module) != sources_hash(sources):
        raise StaleKernels(
            f"{module} was built from other C++ sources than those in {sources}; build it again: `{how_to_build()}`"
        )


def how_to_build() -> str:
    """The command that builds the kernels of this checkout, or of an installed package."""
    if _SOURCES.is_dir():
        return f"pip install -v --no-deps --editable {_SOURCES.parents[3]}"
    return "pip install -v --force-reinstall --no-deps SOURCE"
