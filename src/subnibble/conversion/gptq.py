"""Read a GPTQ folder, as GPTQModel, AutoGPTQ, optimum and AutoRound write it.

A linear (m, k) is stored as `qweight` (codes along the inputs), `qzeros` (zero-points along the outputs), `scales`
(groups, m) and, optionally, `g_idx` (k,), the group of each input. With desc_act the inputs of a group are scattered.

Format "gptq" (v1) stores each zero-point less one, "gptq_v2" the zero-point itself. A zero-point 0 cannot be stored in
v1: GPTQModel subtracts from whole words, which borrows from the neighbour and is undone by adding to whole words (at 3
bits it wraps around instead); other tools overwrite neighbours, and then the zero-points are lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.conversion.folder import QuantizedFolder
from subnibble.conversion.grouped import GroupedMatrix
from subnibble.conversion.words import unpack_words, word_count
from subnibble.errors import CheckpointError, UnsupportedModel
from subnibble.tensor.groups import WHOLE_CHANNEL, group_bounds

_FORMATS = ("gptq", "gptq_v2")


class GptqFolder(QuantizedFolder):
    """A GPTQ folder as a `Foreign` model."""

    format = "gptq"
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, stored: SafetensorsSource) -> None:
        super().__init__(stored)
        settings = self.settings
        layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if layout not in _FORMATS:
            raise UnsupportedModel(
                f"{self.path}: its checkpoint_format is {layout!r}, and only {' and '.join(_FORMATS)} can be "
                "converted; save it in one of these with the tool that wrote it"
            )
        self._is_v1 = layout == "gptq"
        meta = settings.get("meta")
        self._borrows = "gptqmodel" in str(meta.get("quantizer", "") if isinstance(meta, Mapping) else "").lower()
        self._rules = settings.get("dynamic") or {}
        self.checked_bits(settings.get("bits"))

    def matrix_shape(self, path: str) -> tuple[int, int]:
        """Shape (m, k): inputs from g_idx, or as many as fill all words of qweight."""
        words, rows = self.stored.shape(f"{path}.qweight")
        if self.has(path, "g_idx"):
            return rows, self.stored.shape(f"{path}.g_idx")[0]
        return rows, words * 32 // self._bits(path)

    def check_parts(self, path: str) -> None:
        """Check types and shapes of the tensors of a linear."""
        bits, (rows, columns) = self._bits(path), self.matrix_shape(path)
        groups = len(group_bounds(self._group_size(path), columns))
        self.expect(path, "qweight", "I32", (word_count(columns, bits), rows))
        self.expect(path, "qzeros", "I32", (groups, word_count(rows, bits)))
        self.expect(path, "scales", "float", (groups, rows))
        if self.has(path, "g_idx"):
            self.expect(path, "g_idx", "I32", (columns,))

    def matrix(self, path: str) -> GroupedMatrix:
        """Read a linear."""
        bits, size, (rows, columns) = self._bits(path), self._group_size(path), self.matrix_shape(path)
        qweight, qzeros = (self.stored.load_raw(f"{path}.{part}") for part in ("qweight", "qzeros"))
        scales = self.checked_scales(path, "scales").T.contiguous()
        codes = unpack_words(qweight.T, bits, columns)
        zeros = self._zeros(path, qzeros, bits, rows).T.contiguous()
        if self._of(path, "sym") is True and bool((zeros != 2 ** (bits - 1)).any()):
            raise CheckpointError(
                f"{self.path}: {path} is symmetric by its config, but has zero-points other than {2 ** (bits - 1)}; "
                "its checkpoint_format may be wrong, or a tool with a known fault wrote it (GPTQModel before 7, 3 "
                "bits): write it again with a newer one"
            )
        return GroupedMatrix(
            codes, scales, zeros, self.groups(path, "g_idx", columns, size), bits, size, f"{self.path}: {path}"
        )

    def _zeros(self, path: str, words: Tensor, bits: int, rows: int) -> Tensor:
        """Zero-points (groups, rows) uint8 from qzeros."""
        zeros, most = unpack_words(words, bits, rows), 2**bits - 1
        if not self._is_v1:
            return zeros
        if not bool((zeros == most).any()):
            return zeros + 1
        if not self._borrows:
            raise CheckpointError(
                f"{self.path}: {path}.qzeros stores a zero-point as {most}, which stands for -1 + 1 = 0 in format "
                "gptq; tools write its neighbours differently, so they are lost: save the model as gptq_v2"
            )
        if bits == 3:
            return torch.bitwise_and(zeros + 1, most)
        # Sums of int32 words wrap around.
        ones = torch.full_like(words, sum(1 << shift for shift in range(0, 32, bits)))
        return unpack_words(words + ones, bits, rows)

    def _bits(self, path: str) -> int:
        return self.checked_bits(self._of(path, "bits"))

    def _group_size(self, path: str) -> int:
        size = self._of(path, "group_size")
        if type(size) is not int or (size != WHOLE_CHANNEL and size < 1):
            raise CheckpointError(f"{self.path}: the group_size of {path} is {size!r}; correct config.json")
        return size

    def _of(self, path: str, key: str) -> Any:
        """A setting of the linear at `path`: of the first rule under "dynamic" that matches it, else of the model."""
        for pattern, values in self._rules.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), path):
                return values.get(key, self.settings.get(key))
        return self.settings.get(key)
