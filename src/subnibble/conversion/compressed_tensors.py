"""Read a folder of compressed-tensors in the format pack-quantized, as llm-compressor writes it.

A linear (m, k) is stored as `weight_packed` (codes along the inputs), `weight_scale` (m, groups), `weight_shape` and,
if it is not symmetric, `weight_zero_point` (zero-points along the outputs). Codes and zero-points are signed, and
stored plus half their range. Releases before June 2026 let no integer lie in two words, which differs at 3 bits; older
ones have `weight_g_idx`, the group of each input, and zero-points in int8.
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
from subnibble.conversion.words import gapped_word_count, unpack_gapped_words, unpack_words, word_count
from subnibble.errors import CheckpointError, UnsupportedModel
from subnibble.tensor.groups import WHOLE_CHANNEL, group_bounds

_FORMAT = "pack-quantized"
# Settings of a whole model, or of a group of linears, that change what the model computes.
_OTHER_STEPS = ("kv_cache_scheme", "transform_config"), ("input_activations", "output_activations")


class CompressedTensorsFolder(QuantizedFolder):
    """A pack-quantized folder as a `Foreign` model."""

    format = "compressed-tensors"
    parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")

    def __init__(self, stored: SafetensorsSource) -> None:
        super().__init__(stored)
        groups = self.settings.get("config_groups")
        if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
            raise CheckpointError(f"{self.path}: its quantization_config has no config_groups; fetch config.json again")
        self._groups = list(groups.values())
        self._refuse(self.settings, _OTHER_STEPS[0])
        for group in self._groups:
            self._check_group(group)
        self._shapes: dict[str, tuple[int, int]] = {}

    def matrix_shape(self, path: str) -> tuple[int, int]:
        """Shape (m, k), from `weight_shape`."""
        if path not in self._shapes:
            shape = self.stored.load_raw(f"{path}.weight_shape").tolist()
            if len(shape) != 2:
                raise CheckpointError(f"{self.path}: {path}.weight_shape is {shape}; fetch the model again")
            self._shapes[path] = (shape[0], shape[1])
        return self._shapes[path]

    def check_parts(self, path: str) -> None:
        """Check types and shapes of the tensors of a linear."""
        weights, (rows, columns) = self._weights(path), self.matrix_shape(path)
        bits, groups = weights["num_bits"], len(group_bounds(_group_size(weights), columns))
        words = [(rows, count(columns, bits)) for count in (word_count, gapped_word_count)]
        self.expect(path, "weight_packed", "I32", *dict.fromkeys(words))
        per_row = [(1,), (1, 1)] if weights["strategy"] == "tensor" else [(rows, groups)]
        self.expect(path, "weight_scale", "float", *per_row)
        if self.has(path, "weight_zero_point"):
            is_plain = self.stored.header(f"{path}.weight_zero_point").kind == "I8"
            zeros = [(count(rows, bits), groups) for count in (word_count, gapped_word_count)]
            expected = [(rows, groups), *per_row] if is_plain else zeros
            self.expect(path, "weight_zero_point", "I8" if is_plain else "I32", *dict.fromkeys(expected))
        elif not weights["symmetric"]:
            raise CheckpointError(f"{self.path}: tensor {path}.weight_zero_point is missing; fetch the model again")
        if self.has(path, "weight_g_idx"):
            self.expect(path, "weight_g_idx", "I32", (columns,))

    def matrix(self, path: str) -> GroupedMatrix:
        """Read a linear."""
        weights, (rows, columns) = self._weights(path), self.matrix_shape(path)
        bits, size = weights["num_bits"], _group_size(weights)
        groups = len(group_bounds(size, columns))
        codes = _unpacked(self.stored.load_raw(f"{path}.weight_packed"), bits, columns)
        scales = self.checked_scales(path, "weight_scale").reshape(-1, groups).expand(rows, groups).contiguous()
        zeros = self._zeros(path, bits, rows, groups)
        return GroupedMatrix(
            codes, scales, zeros, self.groups(path, "weight_g_idx", columns, size), bits, size, f"{self.path}: {path}"
        )

    def _zeros(self, path: str, bits: int, rows: int, groups: int) -> Tensor:
        """Zero-points (rows, groups) uint8, as codes."""
        middle = 2 ** (bits - 1)
        if not self.has(path, "weight_zero_point"):
            return torch.full((rows, groups), middle, dtype=torch.uint8)
        stored = self.stored.load_raw(f"{path}.weight_zero_point")
        if stored.dtype == torch.int32:
            return _unpacked(stored.T, bits, rows).T.contiguous()
        zeros: Tensor = (stored.int() + middle).to(torch.uint8)
        return zeros.reshape(-1, groups).expand(rows, groups).contiguous()

    def _weights(self, path: str) -> Mapping[str, Any]:
        """How the weight at `path` is quantized: of the group that names it, else of the one for all linears."""
        named = (group for group in self._groups if any(_names(target, path) for target in group["targets"]))
        others = (group for group in self._groups if "Linear" in group["targets"])
        group = next(named, None) or next(others, None)
        if group is None:
            raise CheckpointError(
                f"{self.path}: {path} is quantized, but no config_group has it among its targets; fetch config.json "
                "again"
            )
        weights: Mapping[str, Any] = group["weights"]
        return weights

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raise `UnsupportedModel` for a group of linears that our format cannot hold."""
        layout, weights = group.get("format") or self.settings.get("format"), group.get("weights")
        if layout != _FORMAT or not isinstance(weights, Mapping):
            raise UnsupportedModel(
                f"{self.path}: its weights have the format {layout!r}, and only {_FORMAT} can be converted"
            )
        self._refuse(group, _OTHER_STEPS[1])
        self.checked_bits(weights.get("num_bits"))
        strategy, size = weights.get("strategy"), weights.get("group_size")
        is_sized = type(size) is int and size > 0
        if (
            weights.get("type", "int") != "int"
            or weights.get("dynamic")
            or strategy not in ("tensor", "channel", "group")
            or (strategy == "group" and not is_sized)
        ):
            raise UnsupportedModel(
                f"{self.path}: its weights are quantized as {dict(weights)}, and only integers with the strategy "
                "group, channel or tensor can be converted; quantize the original model instead"
            )
        if not isinstance(group.get("targets"), list) or type(weights.get("symmetric")) is not bool:
            raise CheckpointError(
                f"{self.path}: a config_group has no targets or no symmetric; fetch config.json again"
            )

    def _refuse(self, settings: Mapping[str, Any], keys: tuple[str, ...]) -> None:
        for key in keys:
            if settings.get(key):
                raise UnsupportedModel(
                    f"{self.path}: its quantization_config has {key}, which changes what the model computes, and only "
                    "weights can be converted; quantize the original model instead"
                )


def _group_size(weights: Mapping[str, Any]) -> int:
    return int(weights["group_size"]) if weights["strategy"] == "group" else WHOLE_CHANNEL


def _names(target: str, path: str) -> bool:
    return re.match(target[3:], path) is not None if target.startswith("re:") else target == path


def _unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack words (n, ..) int32 to (n, count) uint8, in the layout that has this number of words.

    Widths below 160 may have as many words in both layouts; then it is the one without gaps.
    """
    unpack = unpack_words if words.shape[1] == word_count(count, bits) else unpack_gapped_words
    return unpack(words, bits, count)
