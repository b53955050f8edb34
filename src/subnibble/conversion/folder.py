"""A folder whose linears another tool stored as several tensors, as a `Source` of dequantized weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.source import checked
from subnibble.conversion.grouped import SCALE_TYPES, GroupedMatrix, plain_groups
from subnibble.errors import CheckpointError, UnsupportedModel
from subnibble.model.transformers_api.empty import empty_causal_lm
from subnibble.tensor.groups import group_bounds
from subnibble.tensor.scheme import BITS

_FLOATS = ("F16", "BF16", "F32")


class QuantizedFolder:
    """Base of the `Foreign` models in folders; it is its own `source`.

    parts: endings of the tensors of a quantized linear; the first one marks it.
    """

    format: str
    parts: ClassVar[tuple[str, ...]]

    def __init__(self, stored: SafetensorsSource) -> None:
        self.stored = stored
        self.path, self.described_by, self.renamed = stored.path, stored.described_by, stored.renamed
        self.settings: Mapping[str, Any] = stored.config.quantization_config
        self.config = copy.deepcopy(stored.config)
        del self.config.quantization_config
        names = stored.names()
        self._stored_names = set(names)
        paths = [name.removesuffix(f".{self.parts[0]}") for name in names if name.endswith(f".{self.parts[0]}")]
        self._paths = {f"{path}.weight": path for path in paths}
        inner = {f"{path}.{part}" for path in paths for part in self.parts}
        self._names = [*self._paths, *(name for name in names if name not in inner)]
        self._drop_zero_biases()

    @property
    def source(self) -> QuantizedFolder:
        """The folder itself."""
        return self

    @property
    def quantized(self) -> Set[str]:
        """Names of the quantized weights."""
        return self._paths.keys()

    def read(self, name: str) -> GroupedMatrix:
        """Read a quantized weight."""
        path = self._paths[name]
        self.check_parts(path)
        return self.matrix(path)

    def matrix_shape(self, path: str) -> tuple[int, int]:
        """Shape (m, k) of the linear at `path`."""
        raise NotImplementedError

    def check_parts(self, path: str) -> None:
        """Raise `CheckpointError` if a tensor of the linear at `path` has another type or shape than expected."""
        raise NotImplementedError

    def matrix(self, path: str) -> GroupedMatrix:
        """Read the linear at `path`, whose parts have been checked."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """Return the names of all tensors of the dequantized model."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.matrix_shape(self._paths[name]) if name in self._paths else self.stored.shape(name)

    def stored_bits(self, name: str) -> int:
        """Return the bits that a tensor, or all parts of a quantized one, takes in its file."""
        path = self._paths.get(name)
        return self.stored.stored_bits(name) if path is None else sum(map(self.stored.stored_bits, self._stored(path)))

    def check_type(self, name: str) -> None:
        """Raise `CheckpointError` if a tensor cannot be read; from the header."""
        if name in self._paths:
            self.check_parts(self._paths[name])
        else:
            self.stored.check_type(name)

    def load(self, name: str) -> Tensor:
        """Read one tensor, dequantized to float32 if it is quantized."""
        return checked(self.read(name).dense(), name, self.path) if name in self._paths else self.stored.load(name)

    def file_bytes(self) -> int:
        """Return the size of all weight files together, in bytes."""
        return self.stored.file_bytes()

    def files(self) -> list[Path]:
        """Return all files of the folder."""
        return self.stored.files()

    def load_tokenizer(self) -> Any:
        """Load the transformers tokenizer from the folder."""
        return self.stored.load_tokenizer()

    def copy_side_files(self, folder: Path) -> None:
        """Copy tokenizer, chat templates and generation config into `folder`, if they exist."""
        self.stored.copy_side_files(folder)

    def has(self, path: str, part: str) -> bool:
        """Whether the linear at `path` stores this part."""
        return f"{path}.{part}" in self._stored_names

    def expect(self, path: str, part: str, kind: str, *shapes: tuple[int, ...]) -> None:
        """Raise `CheckpointError` unless a part has this type and one of the shapes.

        kind: safetensors type, or "float" for any that a scale may have.
        """
        header, kinds = self.stored.header(f"{path}.{part}"), _FLOATS if kind == "float" else (kind,)
        if header.kind not in kinds or header.shape not in shapes:
            raise CheckpointError(
                f"{self.path}: {path}.{part} is {header.kind} of shape {header.shape}, and {self.format} stores "
                f"{' or '.join(kinds)} of shape {' or '.join(map(str, shapes))} there; fetch the model again"
            )

    def checked_bits(self, bits: Any) -> int:
        """Return a width of codes from the settings; `UnsupportedModel` if our format does not have it."""
        if type(bits) is not int or bits not in BITS:
            raise UnsupportedModel(
                f"{self.path}: its weights have {bits!r} bits, and only {', '.join(map(str, BITS))} can be converted; "
                "quantize the original model instead"
            )
        return bits

    def checked_scales(self, path: str, part: str) -> Tensor:
        """Read a part that holds scales; `CheckpointError` if one is not finite."""
        scales = checked(self.stored.load_raw(f"{path}.{part}"), f"{path}.{part}", self.path)
        assert scales.dtype in SCALE_TYPES
        return scales

    def groups(self, path: str, part: str, columns: int, group_size: int) -> Tensor:
        """The group of each input of a linear, (columns,) int64; side by side if `part` is not stored or all -1.

        Raises `CheckpointError` for a group that does not exist.
        """
        stored = self.stored.load_raw(f"{path}.{part}").long() if self.has(path, part) else None
        if stored is None or bool((stored == -1).all()):
            return plain_groups(columns, group_size)
        count = len(group_bounds(group_size, columns))
        wrong = stored[(stored < 0) | (stored >= count)]
        if len(wrong):
            raise CheckpointError(
                f"{self.path}: {path}.{part} names group {int(wrong[0])}, and there are {count} groups (0 to "
                f"{count - 1}); fetch the model again"
            )
        return stored

    def _stored(self, path: str) -> list[str]:
        return [f"{path}.{part}" for part in self.parts if self.has(path, part)]

    def _drop_zero_biases(self) -> None:
        """Leave out biases that the model does not have and that are zero: old tools gave one to each linear."""
        biases = {f"{path}.bias" for path in self._paths.values()} & set(self._names)
        if not biases:
            return
        try:
            expected = {
                name for name, _ in empty_causal_lm(copy.deepcopy(self.config), torch.float32).named_parameters()
            }
        # The config has impossible values; building the model's skeleton reports them.
        except Exception:
            return
        zero = {name for name in biases - expected if not bool(self.stored.load_raw(name).any())}
        self._names = [name for name in self._names if name not in zero]
