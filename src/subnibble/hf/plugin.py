"""The transformers plug-in: `AutoModelForCausalLM.from_pretrained` on a packed checkpoint gives a working model.

Modules that the checkpoint packs are replaced on the empty model, then transformers loads their tensors by name. No
modeling file is involved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from subnibble.checkpoint.packed import QUANT_METHOD, PackedConfig
from subnibble.checkpoint.safetensors_source import STORED_TYPES, read_header
from subnibble.errors import CheckpointError
from subnibble.model.packed import check_values, pack_modules_
from subnibble.runtime.modules import StoredModule


class SubnibbleConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint, as transformers carries it."""

    def __init__(self, **values: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.packed = PackedConfig.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return self.packed.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: there are no defaults to leave out."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from config.json's table."""
        config = cls(**{"quant_method": QUANT_METHOD, **config_dict})
        return (config, kwargs) if return_unused_kwargs else config


class SubnibbleQuantizer(HfQuantizer):
    """Puts packed modules into an empty transformers model before its weights are loaded."""

    requires_calibration = True
    quantization_config: SubnibbleConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        dtype = kwargs.get("dtype") or model.config.dtype or torch.get_default_dtype()
        pack_modules_(model, self.quantization_config.packed, dtype)
        if files := kwargs.get("checkpoint_files"):
            _verify(model, [Path(file) for file in files])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        packed = self.quantization_config.packed
        check_values(model, packed)
        if packed.cache is not None or packed.prefix is not None:
            # Not above: it needs what transformers has not imported yet when it imports its quantizers.
            from subnibble.hf.attention import attach_cache_

            attach_cache_(model, packed.cache, packed.prefix)
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the packed tensors back as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed codes have no gradient."""
        return False


def _verify(model: Any, files: list[Path]) -> None:
    """Raise `CheckpointError` unless the files hold just the tensors of `model`, in their shapes and stored types.

    transformers would make up missing ones. Tensors that are not packed may have any type: they are cast.
    """
    headers = {name: header for file in files for name, header in read_header(file).items()}
    where = files[0].parent
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    stored = {path: module for path, module in model.named_modules() if isinstance(module, StoredModule)}
    typed = {f"{path}.{name}" for path, module in stored.items() for name, _ in module.named_buffers()}
    for name, tensor in expected.items():
        if name not in headers:
            raise CheckpointError(f"{where}: tensor {name} is missing; fetch it again, or quantize the model again")
        shape, kind = headers[name]
        if shape != tuple(tensor.shape) or (name in typed and kind != STORED_TYPES[tensor.dtype]):
            raise CheckpointError(
                f"{where}: {name} is {kind} of shape {shape} where config.json asks for {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}; config and weights do not belong together"
            )
    spare = sorted(set(headers) - set(expected) - set(model.all_tied_weights_keys))
    if spare:
        raise CheckpointError(f"{where}: tensor {spare[0]} has no place in the model that config.json describes")


def register() -> None:
    """Make transformers know `quant_method: subnibble`; safe to call again."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SubnibbleConfig)
        register_quantizer(QUANT_METHOD)(SubnibbleQuantizer)


register()
