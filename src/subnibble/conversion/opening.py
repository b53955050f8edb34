"""Open a model that another tool quantized, by its format."""

from __future__ import annotations

from pathlib import Path

from subnibble.checkpoint.gguf_source import GgufSource
from subnibble.checkpoint.manifest import QUANT_METHOD
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.source import Source
from subnibble.conversion.compressed_tensors import CompressedTensorsFolder
from subnibble.conversion.foreign import Foreign
from subnibble.conversion.gguf import GgufModel
from subnibble.conversion.gptq import GptqFolder
from subnibble.errors import CheckpointError, UnsupportedModel

_FOLDERS = {folder.format: folder for folder in (GptqFolder, CompressedTensorsFolder)}


def open_foreign(model: str | Path | Source, keep_dense: bool = False) -> Foreign:
    """Open a quantized model of another tool.

    model: folder, hub id, .gguf file, or an opened source.
    keep_dense: whether a quantized matrix of a GGUF file that cannot be packed counts as unquantized.
    Raises `UnsupportedModel` for another format, `CheckpointError` for a model that is not quantized or is ours.
    """
    source = open_source(model)
    foreign = _by_format(source, keep_dense)
    if not foreign.quantized:
        raise CheckpointError(f"{source.path} holds no quantized weights; `subnibble quantize` quantizes it")
    return foreign


def _by_format(source: Source, keep_dense: bool) -> Foreign:
    if isinstance(source, GgufSource):
        return GgufModel(source, keep_dense)
    settings = getattr(source.config, "quantization_config", None)
    if not isinstance(source, SafetensorsSource) or not settings:
        raise CheckpointError(
            f"{source.path}: it is not quantized by its config; `subnibble quantize` quantizes it. If it is quantized, "
            "its config.json needs the quantization_config that the other tool wrote"
        )
    method = settings.get("quant_method")
    if method == QUANT_METHOD:
        raise CheckpointError(f"{source.path} is a subnibble checkpoint already")
    if method not in _FOLDERS:
        raise UnsupportedModel(
            f"{source.path} was quantized as {method!r}; formats that can be converted: {', '.join(_FOLDERS)}, GGUF"
        )
    return _FOLDERS[method](source)
