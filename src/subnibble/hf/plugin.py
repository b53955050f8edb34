"""The transformers plug-in: `AutoModelForCausalLM.from_pretrained` on a packed checkpoint gives a working model.

Modules that the checkpoint packs are replaced on the empty model, then transformers loads their tensors by name. No
modeling file is involved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from subnibble.checkpoint.checksums import CHECKSUMS, check_files
from subnibble.checkpoint.manifest import QUANT_METHOD, PackedConfig
from subnibble.checkpoint.weight_files import read_headers
from subnibble.errors import CheckpointError
from subnibble.model.load_packed import pack_modules_
from subnibble.model.transformers_api.quantization import (
    CheckpointQuantizer,
    QuantizationConfigMixin,
    register_quantization,
)
from subnibble.model.verify import check_ran, check_values, header_problem


class SubnibbleConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint, as transformers carries it."""

    def __init__(self, **values: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.packed = PackedConfig.from_dict(values)
        self.checksums = values.get(CHECKSUMS)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        checksums = {} if self.checksums is None else {CHECKSUMS: self.checksums}
        return self.packed.to_dict() | checksums

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: there are no defaults to leave out."""
        return self.to_dict()

    def get(self, key: str, default: Any = None) -> Any:
        """A value of config.json's table: transformers asks a loaded model's config as it asks a file's."""
        return self.to_dict().get(key, default)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from config.json's table."""
        config = cls(**{"quant_method": QUANT_METHOD, **config_dict})
        return (config, kwargs) if return_unused_kwargs else config


class SubnibbleQuantizer(CheckpointQuantizer):
    """Puts packed modules into an empty transformers model before its weights are loaded."""

    quantization_config: SubnibbleConfig

    def prepare_(self, model: Any, dtype: torch.dtype, files: list[str]) -> None:
        """See `CheckpointQuantizer`."""
        pack_modules_(model, self.quantization_config.packed, dtype)
        if files:
            paths = [Path(file) for file in files]
            _verify(model, paths)
            check_files(paths, self.quantization_config.to_dict())

    def finish_(self, model: Any) -> None:
        """See `CheckpointQuantizer`."""
        packed = self.quantization_config.packed
        check_values(model, packed)
        model.register_forward_hook(FirstPass())
        if packed.cache is not None or packed.prefix is not None:
            # Not above: it needs what transformers has not imported yet when it imports its quantizers.
            from subnibble.hf.attention import attach_cache_

            attach_cache_(model, packed.cache, packed.prefix)


class FirstPass:
    """A forward hook: after a model's first pass, checks that all ran that was hooked or put into the model."""

    def __init__(self) -> None:
        self._done = False

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        """As torch calls it."""
        if self._done:
            return
        check_ran(model)
        self._done = True


def _verify(model: Any, files: list[Path]) -> None:
    """Raise `CheckpointError` unless the files hold just the tensors of `model`, in their shapes and stored types."""
    if problem := header_problem(model, read_headers(files)):
        raise CheckpointError(f"{files[0].parent}: {problem}; fetch it again, or quantize the model again")


def register() -> None:
    """Make transformers know `quant_method: subnibble`; safe to call again."""
    register_quantization(QUANT_METHOD, SubnibbleConfig, SubnibbleQuantizer)


register()
