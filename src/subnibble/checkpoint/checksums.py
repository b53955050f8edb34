"""SHA-256 checksums of a packed checkpoint's weight files, stored in the `quantization_config` of its config.json.

Weights damaged by a broken download or a bad disk sector look like any other numbers. So each file is read once for its
checksum before its weights are loaded.
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

# The key in `quantization_config` of a table: name of a weight file -> 64 hexadecimal digits.
CHECKSUMS = "sha256"
_VERIFIES: ContextVar[bool] = ContextVar("verifies", default=True)


@contextmanager
def unverified() -> Iterator[None]:
    """Skip the checksum comparison inside this context, for slow or trusted disks."""
    token = _VERIFIES.set(False)
    try:
        yield
    finally:
        _VERIFIES.reset(token)


def file_checksum(file: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def weight_checksums(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 for each safetensors file in a folder."""
    return {file.name: file_checksum(file) for file in sorted(folder.glob("*.safetensors"))}


def weights_checksum(checksums: Mapping[str, str]) -> str:
    """Return one SHA-256 for a set of weight files, over their names and checksums in the order of names.

    checksums: file name -> SHA-256 of the file, 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, checksum in sorted(checksums.items()):
        digest.update(name.encode() + bytes.fromhex(checksum))
    return digest.hexdigest()


def check_files(files: Iterable[Path], quantization: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if a weight file's checksum differs from the one in `quantization_config`.

    files: the weight files to check.
    quantization: the `quantization_config`. Other programs may write it without checksums; then nothing is checked.
    """
    checksums = quantization.get(CHECKSUMS)
    if checksums is None:
        return
    if not isinstance(checksums, Mapping) or not all(
        isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in checksums.values()
    ):
        raise CheckpointError(f"quantization_config: {CHECKSUMS} is no table of hexadecimal SHA-256; remove it")
    if not _VERIFIES.get():
        return
    for file in files:
        if file.name not in checksums:
            raise CheckpointError(
                f"{file}: config.json has no checksum of it, so it belongs to another checkpoint; fetch both again, "
                "or quantize the model again"
            )
        if (actual := _checksum(file)) != checksums[file.name]:
            raise CheckpointError(
                f"{file}: its SHA-256 is {actual} and config.json has {checksums[file.name]}: the file is damaged or "
                "of another checkpoint; fetch it again, or quantize the model again"
            )


def _checksum(file: Path) -> str:
    try:
        return file_checksum(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); get an intact copy") from error
