"""Bits and bytes of a checkpoint, counted in one way for packed and plain ones (docs/format.md)."""

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

    effective_bits: all stored bits that belong to quantized linears (codes, scales, zero-points, low-rank terms,
    gathers, padding) and norm biases, over their weights; of a plain checkpoint, the stored bits of its blocks' linears
    over their weights. activation_bits: bits of the inputs of these linears as they run, with scales, zero-points and
    extra columns, over their channels; 16 where inputs are not quantized.
    model_bits: 8 x bytes of the weight files over all parameters. parameters: weights, tied ones once.
    cache_bytes: of one token in the KV caches of all layers, at 16 bits where they are not coded.
    """

    effective_bits: float
    model_bits: float
    file_bytes: int
    parameters: int
    activation_bits: float = 16.0
    cache_bytes: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """Plain dictionary."""
        return asdict(self)


def measure(source: Source) -> Size:
    """Measure a checkpoint from its headers; no weight is read."""
    packed = readable_config_of(source.config, source.path)
    if packed is not None:
        expect_shapes(source, iter(stored_shapes(packed).items()))
    bits, weights, parameters = _plain(source) if packed is None else _packed(source, packed)
    if not weights:
        # Nothing but a cache, a prefix or tables were packed.
        bits, weights, _ = _plain(source)
    size = source.file_bytes()
    cache = cache_bytes(source.config, None if packed is None else packed.cache)
    activation = _activation_bits(source, packed)
    return Size(bits / weights, 8 * size / parameters, size, parameters, activation, cache)


def cache_bytes(config: Any, scheme: CacheScheme | None) -> float:
    """Bytes of one token in the KV caches of all layers: coded, windows and prefix aside, or (None) at 16 bits."""
    heads = Heads.of(config)
    plain = 2 * 2 * heads.key_value * heads.width
    token = plain if scheme is None else scheme.token_bytes(heads.key_value, heads.width)
    return float(config.num_hidden_layers * token)


def weights_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of the folder's weight files, of those that are read."""
    return weights_checksum({file.name: file_checksum(file) for file in weight_files(folder)})


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a packed checkpoint that are read."""
    return [folder / name for name in sorted({stored.file for stored in find_weights(folder, None).values()})]


def _plain(source: Source) -> tuple[int, int, int]:
    arch = find_arch(source.config.model_type)
    names = [name for name in source.names() if name.removesuffix(".weight").endswith(arch.linears)]
    names = [name for name in names if name.endswith(".weight")]
    weights = sum(numel(source.shape(name)) for name in names)
    bits = sum(source.stored_bits(name) for name in names)
    # Some checkpoints hold the table once more for a head that is tied to it.
    again = {f"{arch.head}.weight"} if source.config.tie_word_embeddings else set()
    return bits, weights, sum(numel(source.shape(name)) for name in source.names() if name not in again)


def _packed(source: Source, packed: PackedConfig) -> tuple[int, int, int]:
    blocks = find_arch(source.config.model_type).blocks
    bits = weights = parameters = 0
    for path, spec in packed.modules.items():
        if isinstance(spec, NormBiasSpec):
            bits += source.stored_bits(f"{path}.bias")
        elif isinstance(spec, PackedLinearSpec) and path.startswith(f"{blocks}."):
            bits += spec.stored_bits
            weights += spec.layout.rows * spec.layout.columns
    for spec in packed.modules.values():
        if isinstance(spec, PackedLinearSpec | PackedEmbeddingSpec):
            parameters += spec.layout.rows * spec.layout.columns
    packed_names = {name for name in stored_shapes(packed) if not name.endswith(".bias")}
    parameters += sum(numel(source.shape(name)) for name in source.names() if name not in packed_names)
    return bits, weights, parameters


def _activation_bits(source: Source, packed: PackedConfig | None) -> float:
    blocks = find_arch(source.config.model_type).blocks
    modules = {} if packed is None else packed.modules
    linears = [e for path, e in modules.items() if isinstance(e, PackedLinearSpec) and path.startswith(f"{blocks}.")]
    channels = sum(spec.layout.columns for spec in linears)
    return sum(spec.token_bits() for spec in linears) / channels if channels else 16.0
