"""Register a format of quantized checkpoints with transformers.

This file is imported while transformers imports its own quantizers, so it must import nothing else of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from subnibble.errors import BadArgument
from subnibble.model.transformers_api.calls import wrap_calls
from subnibble.model.transformers_api.marking import unmark_
from subnibble.model.transformers_api.names import never_called, unknown

__all__ = ["CheckpointQuantizer", "QuantizationConfigMixin", "register_quantization"]

_LOADING = (
    "_process_model_before_weight_loading",
    "_process_model_after_weight_loading",
    "update_attn_implementation",
)


class CheckpointQuantizer(HfQuantizer):
    """Base of a transformers quantizer that only loads checkpoints that are already quantized."""

    requires_calibration = True
    _prepared = False
    # Why the model must not be saved, or "" if it may be.
    unsaved_because = ""

    def prepare_(self, model: Any, dtype: torch.dtype, files: list[str]) -> None:
        """Replace modules of an empty model by packed ones, in place.

        dtype: dtype of their outputs.
        files: weight files that will be loaded; empty if transformers loads a state dict.
        """
        raise NotImplementedError

    def finish_(self, model: Any) -> None:
        """Check and complete a model after its weights are loaded, in place."""
        raise NotImplementedError

    def update_attn_implementation(self, config: Any) -> Any:
        """Remove the marker of `marking.py`: no other hook sees the config before transformers looks for files."""
        unmark_(config)
        return config

    def _process_model_before_weight_loading(self, model: Any, **named: Any) -> None:
        if "checkpoint_files" not in named:
            raise unknown("does not tell quantizers which files it loads")
        dtype = named.get("dtype") or model.config.dtype or torch.get_default_dtype()
        self.prepare_(model, dtype, list(named["checkpoint_files"] or ()))
        self._prepared = True

    def _process_model_after_weight_loading(self, model: Any, **named: Any) -> Any:
        if not self._prepared:
            raise never_called("the hook that puts packed modules into an empty model")
        self.finish_(model)
        wrap_calls(self.quantization_config.quant_method)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        raise BadArgument(
            "a packed model cannot be dequantized as a whole; use the original model for dense weights, or "
            "`dequantize()` of a single packed module"
        )

    def is_serializable(self) -> bool:
        """True: `save_pretrained` writes the packed tensors. Raises `BadArgument` if the model is more than those."""
        if self.unsaved_because:
            raise BadArgument(self.unsaved_because)
        return True

    @property
    def is_trainable(self) -> bool:
        """False: packed codes have no gradient."""
        return False


def register_quantization(method: str, config: type, quantizer: type) -> None:
    """Register config and quantizer of a checkpoint format with transformers; safe to call again.

    method: `quant_method` in the `quantization_config` of such checkpoints.
    config: a subclass of `QuantizationConfigMixin`.
    quantizer: a subclass of `CheckpointQuantizer`.
    """
    if method in AUTO_QUANTIZER_MAPPING:
        return
    for name in _LOADING:
        if not hasattr(HfQuantizer, name):
            raise unknown(f"has no {name} in its quantizers")
    register_quantization_config(method)(config)
    register_quantizer(method)(quantizer)
