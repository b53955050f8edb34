"""The transformers plug-in: `AutoModelForCausalLM.from_pretrained` on a packed checkpoint gives a working model.

Modules that the checkpoint packs are replaced in the empty model; then transformers loads their tensors by name. No
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
    """The `quantization_config` of a packed checkpoint, as transformers stores it in a model's config.

    values: the table `quantization_config` of config.json.
    """

    def __init__(self, **values: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.packed = PackedConfig.from_dict(values)
        self.checksums = values.get(CHECKSUMS)

    def to_dict(self) -> dict[str, Any]:
        """The table in config.json."""
        checksums = {} if self.checksums is None else {CHECKSUMS: self.checksums}
        return self.packed.to_dict() | checksums

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as `to_dict`: there are no defaults to omit."""
        return self.to_dict()

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the table in config.json: transformers reads a loaded config as it reads the file's table."""
        return self.to_dict().get(key, default)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from the table in config.json; returns (config, unused kwargs) if `return_unused_kwargs`."""
        config = cls(**{"quant_method": QUANT_METHOD, **config_dict})
        return (config, kwargs) if return_unused_kwargs else config


class SubnibbleQuantizer(CheckpointQuantizer):
    """Puts packed modules into an empty transformers model before its weights are loaded."""

    quantization_config: SubnibbleConfig

    def prepare_(self, model: Any, dtype: torch.dtype, files: list[str]) -> None:
        """Replace modules of an empty model, and check the files against it.

        dtype: of the replaced modules' outputs.
        files: that will be loaded, none for a state dict.
        """
        pack_modules_(model, self.quantization_config.packed, dtype)
        if files:
            paths = [Path(file) for file in files]
            _verify(model, paths)
            check_files(paths, self.quantization_config.to_dict())

    def finish_(self, model: Any) -> None:
        """Check the loaded values, and attach the KV cache and prefix that the checkpoint declares."""
        packed = self.quantization_config.packed
        check_values(model, packed)
        model.register_forward_hook(FirstPass())
        if packed.cache is not None or packed.prefix is not None:
            # Imported here: it needs modules that transformers imports later than its quantizers.
            from subnibble.hf.attention import attach_cache_

            attach_cache_(model, packed.cache, packed.prefix)


class FirstPass:
    """A forward hook: after the first forward pass, checks that all hooks and modules of subnibble were called."""

    def __init__(self) -> None:
        self._done = False

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        """Check once. Arguments: as torch passes them to a forward hook."""
        if self._done:
            return
        check_ran(model)
        self._done = True


def _verify(model: Any, files: list[Path]) -> None:
    """Raise `CheckpointError` unless the files hold exactly the tensors of `model`, in the stored shapes and dtypes."""
    if problem := header_problem(model, read_headers(files)):
        raise CheckpointError(f"{files[0].parent}: {problem}; fetch it again, or quantize the model again")


def register() -> None:
    """Register `quant_method: subnibble` in transformers; safe to call again."""
    register_quantization(QUANT_METHOD, SubnibbleConfig, SubnibbleQuantizer)


register()
