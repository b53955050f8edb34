"""The transformers plug-in: `AutoModelForCausalLM.from_pretrained` on a packed checkpoint gives a working model.

Modules that the checkpoint packs are replaced on the empty model, then transformers loads their tensors by name. No
modeling file is involved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from subnibble.checkpoint.entries import NormBiasEntry
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.packed import QUANT_METHOD, PackedConfig, readable_config_of
from subnibble.checkpoint.safetensors_source import STORED_TYPES, read_header
from subnibble.checkpoint.source import Source
from subnibble.device import resolve_device, resolve_dtype
from subnibble.errors import CheckpointError
from subnibble.model.arch import ARCHITECTURES
from subnibble.model.packed import pack_modules_
from subnibble.model.skeleton import Skeleton
from subnibble.runtime.modules import PackedModule, StoredModule
from subnibble.scheme import E8M0
from subnibble.tensor import range_key


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
        for path, module in packed_modules(model).items():
            _check_values(path, module)
        packed = self.quantization_config.packed
        for path, entry in packed.modules.items():
            if isinstance(entry, NormBiasEntry):
                _check_finite(f"{path}.bias", model.get_submodule(path).bias)
        if packed.cache is not None or packed.prefix is not None:
            # Not above: it needs what transformers has not imported yet when it imports its quantizers.
            from subnibble.hf_attention import attach_cache_

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


def _check_values(path: str, module: PackedModule) -> None:
    """Raise `CheckpointError` if stored numbers are none that a writer may write."""
    for name, buffer in module.named_buffers(recurse=False):
        _check_finite(f"{path}.{name}", buffer)
        if name == "gather":
            whole = torch.arange(buffer.shape[0], device=buffer.device, dtype=buffer.dtype)
            if not torch.equal(buffer.sort().values, whole):
                raise CheckpointError(
                    f"{path}.gather does not hold each channel once; fetch or quantize the model again"
                )
    for index, part in enumerate(module.packed.ranges):
        if part.scheme.scale_type == E8M0 and bool(((part.scales == 0) | (part.scales == 255)).any()):
            key = range_key("scales", index)
            raise CheckpointError(f"{path}.{key} holds a byte that is no E8M0 scale; fetch or quantize the model again")


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise `CheckpointError` if a stored tensor holds no number somewhere."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} is not finite; fetch or quantize the model again")


def register() -> None:
    """Make transformers know `quant_method: subnibble`; safe to call again."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SubnibbleConfig)
        register_quantizer(QUANT_METHOD)(SubnibbleQuantizer)


def load_model(model: str | Path | Source, dtype: str = "auto", device: str = "auto") -> Any:
    """A transformers model, ready to run: packed or plain folder, hub id or .gguf file.

    dtype, device: see `device.py`.
    """
    source = open_source(model)
    place = resolve_device(device)
    kind = resolve_dtype(dtype, source.config.dtype, place)
    if source.path.suffix == ".gguf":
        # transformers would keep a `gguf` quantization_config and parse the file's metadata twice more.
        return Skeleton(source, kind, place).load_all()
    if readable_config_of(source.config, source.path) is None and source.config.model_type in ARCHITECTURES:
        # transformers would make up missing tensors.
        Skeleton(source, kind, place).check_tied_head()
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(source.path, dtype=kind, trust_remote_code=False)
    return loaded.to(place).eval()


def memory_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """Path -> packed module of a loaded model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedModule)}


register()
