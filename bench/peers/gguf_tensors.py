"""Sizes of the tensors in a GGUF file, of whatever type."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Kinds of GGUF's facts: bytes of numbers, and the two that have a length.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9
_ALIGNMENT = 32


def tensors_of(file: Path) -> Iterator[tuple[str, int]]:
    """(name, bytes) of the tensors of a GGUF file, of any type: the bytes up to the next tensor.

    The gguf package does not read files with ik_llama.cpp's types.
    """
    with file.open("rb") as content:

        def numbers(form: str) -> tuple[Any, ...]:
            return struct.unpack(f"<{form}", content.read(struct.calcsize(f"<{form}")))

        def text() -> str:
            return content.read(numbers("Q")[0]).decode()

        def skip(kind: int) -> None:
            if kind == _TEXT:
                text()
            elif kind == _LIST:
                inner, count = numbers("IQ")
                for _ in range(count):
                    skip(inner)
            else:
                content.read(_WIDTHS[kind])

        _, _, tensors, facts = numbers("4sIQQ")
        for _ in range(facts):
            text()
            skip(numbers("I")[0])
        starts = []
        for _ in range(tensors):
            name, axes = text(), numbers("I")[0]
            numbers(f"{axes}Q")
            starts.append((numbers("IQ")[1], name))
        starts.sort()
        data = -(-content.tell() // _ALIGNMENT) * _ALIGNMENT
        ends = [*(start for start, _ in starts[1:]), file.stat().st_size - data]
    yield from ((name, end - start) for (start, name), end in zip(starts, ends, strict=True))
