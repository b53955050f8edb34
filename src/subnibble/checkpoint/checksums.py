"""SHA-256 of a packed checkpoint's weight files, in the `quantization_config` of its config.json.

A download that was cut and a disk that lost a sector give numbers that look like others, so files are read once for
their checksum before their weights are loaded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from subnibble.errors import CheckpointError

# Its key in `quantization_config`: name of a weight file -> 64 hexadecimal digits.
CHECKSUMS = "sha256"
_VERIFIES: ContextVar[bool] = ContextVar("verifies", default=True)


@contextmanager
def unverified() -> Iterator[None]:
    """Inside, checkpoints are loaded without reading their files for checksums: on slow disks, or from trusted ones."""
    token = _VERIFIES.set(False)
    try:
        yield
    finally:
        _VERIFIES.reset(token)


def file_checksum(file: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def weight_checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each safetensors file in a folder, by name."""
    return {file.name: file_checksum(file) for file in sorted(folder.glob("*.safetensors"))}


def weights_checksum(checksums: Mapping[str, str]) -> str:
    """One SHA-256 for a set of weight files: over their names and checksums, in the order of names."""
    digest = hashlib.sha256()
    for name, checksum in sorted(checksums.items()):
        digest.update(name.encode() + bytes.fromhex(checksum))
    return digest.hexdigest()


def check_files(files: Iterable[Path], quantization: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if a weight file is not the one whose checksum `quantization_config` has.

    A table without checksums, which other programs may write, is taken as it is.
    """
    checksums = quantization.get(CHECKSUMS)
    if checksums is None:
        return
    if not isinstance(checksums, Mapping) or not all(
        isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in checksums.values()
    ):
        raise CheckpointError(f"quantization_config: {CHECKSUMS} is no table of SHA-256 in hexadecimal; take it out")
    if not _VERIFIES.get():
        return
    for file in files:
        if file.name not in checksums:
            raise CheckpointError(
                f"{file}: config.json has no checksum of it, so it belongs to another checkpoint; fetch both again, or "
                "quantize the model again"
            )
        if (found := _read(file)) != checksums[file.name]:
            raise CheckpointError(
                f"{file}: its SHA-256 is {found} and config.json has {checksums[file.name]}: the file is damaged or "
                "of another checkpoint; fetch it again, or quantize the model again"
            )


def _read(file: Path) -> str:
    try:
        return file_checksum(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); get an intact copy") from error
