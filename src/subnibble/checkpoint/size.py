"""Count the bits and bytes of a checkpoint, in the same way for packed and plain ones (docs/format.md)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from subnibble.arch import find_arch
from subnibble.arch.site import Heads
from subnibble.checkpoint.checksums import file_checksum, weights_checksum
from subnibble.checkpoint.manifest import PackedConfig, readable_config_of, stored_shapes
from subnibble.checkpoint.module_specs import NormBiasSpec, PackedEmbeddingSpec, PackedLinearSpec
from subnibble.checkpoint.source import Source, expect_shapes, numel
from subnibble.checkpoint.weight_files import find_weights
from subnibble.tensor.cache_scheme import CacheScheme


@dataclass(frozen=True)
class Size:
    """How large a checkpoint is.

    effective_bits: stored bits per weight of the blocks' linears. Packed: the bits are codes, scales, zero-points,
        low-rank terms, gathers, padding and the biases that norms gained. Plain: the bits of the linears as stored.
    model_bits: 8 x file_bytes / parameters.
    file_bytes: size of all weight files.
    parameters: number of weights in the model, tied weights counted once.
    activation_bits: bits per input channel of the blocks' packed linears at run time, including scales, zero-points
        and extra columns; 16 if inputs are not quantized.
    cache_bytes: bytes of one token in the KV caches of all layers; 16 bits per number if the cache is not quantized.
    """

    effective_bits: float
    model_bits: float
    file_bytes: int
    parameters: int
    activation_bits: float = 16.0
    cache_bytes: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """Return the fields as a plain dictionary."""
        return asdict(self)


def measure(source: Source) -> Size:
    """Measure a checkpoint from its headers, without reading weights.

    Raises `CheckpointError` if another tool quantized it, or if a packed tensor is missing or has the wrong shape.
    """
    packed = readable_config_of(source.config, source.path)
    if packed is not None:
        expect_shapes(source, iter(stored_shapes(packed).items()))
    bits, weights, parameters = _plain(source) if packed is None else _packed(source, packed)
    if not weights:
        # Only the cache, the prefix or the embedding were packed.
        bits, weights, _ = _plain(source)
    size = source.file_bytes()
    cache = cache_bytes(source.config, None if packed is None else packed.cache)
    activation = _activation_bits(source, packed)
    return Size(bits / weights, 8 * size / parameters, size, parameters, activation, cache)


def cache_bytes(config: Any, scheme: CacheScheme | None) -> float:
    """Return the bytes of one token in the KV caches of all layers.

    scheme: how the cache is quantized; tokens of its window and of a prefix, which stay at 16 bits, are not counted.
        None: 16 bits per number.
    """
    heads = Heads.of(config)
    plain = 2 * 2 * heads.key_value * heads.width
    token = plain if scheme is None else scheme.token_bytes(heads.key_value, heads.width)
    return float(config.num_hidden_layers * token)


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 over the names and contents of the weight files (see `weight_files`)."""
    return weights_checksum({file.name: file_checksum(file) for file in weight_files(folder)})


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a packed checkpoint that loading would read, sorted by name."""
    return [folder / name for name in sorted({stored.file for stored in find_weights(folder, None).values()})]


def _plain(source: Source) -> tuple[int, int, int]:
    arch = find_arch(source.config.model_type)
    names = [name for name in source.names() if name.removesuffix(".weight").endswith(arch.linears)]
    names = [name for name in names if name.endswith(".weight")]
    weights = sum(numel(source.shape(name)) for name in names)
    bits = sum(source.stored_bits(name) for name in names)
    # Some checkpoints store the embedding again for a tied head; it counts once.
    duplicates = {f"{arch.head}.weight"} if source.config.tie_word_embeddings else set()
    return bits, weights, sum(numel(source.shape(name)) for name in source.names() if name not in duplicates)


def _packed(source: Source, packed: PackedConfig) -> tuple[int, int, int]:
    blocks = find_arch(source.config.model_type).blocks
    bits = weights = parameters = 0
    for path, spec in packed.modules.items():
        if isinstance(spec, NormBiasSpec):
            bits += source.stored_bits(f"{path}.bias")
        elif isinstance(spec, PackedLinearSpec) and path.startswith(f"{blocks}."):
            bits += spec.stored_bits
            weights += spec.layout.rows * spec.layout.num_columns
    for spec in packed.modules.values():
        if isinstance(spec, PackedLinearSpec | PackedEmbeddingSpec):
            parameters += spec.layout.rows * spec.layout.num_columns
    packed_names = {name for name in stored_shapes(packed) if not name.endswith(".bias")}
    parameters += sum(numel(source.shape(name)) for name in source.names() if name not in packed_names)
    return bits, weights, parameters


def _activation_bits(source: Source, packed: PackedConfig | None) -> float:
    blocks = find_arch(source.config.model_type).blocks
    modules = {} if packed is None else packed.modules
    linears = [
        spec for path, spec in modules.items() if isinstance(spec, PackedLinearSpec) and path.startswith(f"{blocks}.")
    ]
    channels = sum(spec.layout.num_columns for spec in linears)
    return sum(spec.token_bits() for spec in linears) / channels if channels else 16.0
