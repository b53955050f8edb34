"""GGUF files become packed models of the same weights and logits; each type is taken apart as gguf dequantizes it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from foreign_folders import logits_of, same_weights
from gguf_models import MINIMA, random_blocks, write_quantized
from torch.utils._python_dispatch import TorchDispatchMode

import subnibble
from subnibble.checkpoint import gguf_source
from subnibble.conversion import foreign
from subnibble.conversion.convert import _linear
from subnibble.conversion.gguf_blocks import BLOCK_TYPES
from subnibble.conversion.offsets import TOLERANCE
from subnibble.conversion.opening import open_foreign
from subnibble.errors import UnsupportedModel
from subnibble.hf.loading import load_model
from subnibble.kernels.native import chosen
from subnibble.runtime.modules import packed_modules


def converted(file: Path, **named: Any) -> Any:
    subnibble.convert(file, file.with_name("out"), **named)
    return load_model(file.with_name("out"), "float32")


def mixed(types: dict[str, str], other: str) -> Any:
    """Type of a matrix: that of the first ending that its path has."""
    return lambda key: next((kind for end, kind in types.items() if key.endswith(f"{end}.weight")), other)


def close_weights(original: Any, packed: Any) -> bool:
    """Whether each weight differs by at most what a row's largest offset allows, and is that of a linear."""
    state = original.state_dict()
    pairs = [(module.dequantize(), state[f"{path}.weight"]) for path, module in packed_modules(packed).items()]
    return all(bool(((mine - own).abs() <= 4 * TOLERANCE * own.abs().max()).all()) for mine, own in pairs)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_are_taken_apart_as_gguf_dequantizes_them(kind: str) -> None:
    blocks = random_blocks(kind, 4, 512, seed=3).reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    block_type = BLOCK_TYPES[kind]
    parts = block_type.take_apart(blocks)
    spread = lambda table: np.repeat(table, block_type.group_size, axis=1)  # noqa: E731
    codes = parts.codes.astype(np.float32)
    weights = spread(parts.scales) * (codes - (2 ** (block_type.bits - 1) if parts.offsets is None else 0))
    if parts.offsets is not None:
        weights = weights + spread(parts.offsets)
    assert (parts.offsets is not None) == (kind in MINIMA)
    assert parts.codes.max() < 2**block_type.bits
    assert np.array_equal(weights, gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize(
    ("arch", "types", "other"),
    [
        ("llama", {"embed_tokens": "Q8_0", "lm_head": "Q6_K"}, "Q4_0"),
        ("qwen2", {"embed_tokens": "Q6_K", "down_proj": "Q5_0", "o_proj": "F16"}, "Q8_0"),
        ("qwen3", {"embed_tokens": "Q4_0"}, "Q4_0"),
        ("llama", {"embed_tokens": "F16", "lm_head": "F32", "k_proj": "Q6_K"}, "Q3_K"),
    ],
)
def test_types_without_offsets_keep_weights_and_logits(
    arch: str, types: dict[str, str], other: str, tmp_path: Path
) -> None:
    original = write_quantized(tmp_path / "in.gguf", arch, mixed(types, other))
    packed = converted(tmp_path / "in.gguf")
    assert same_weights(original, packed)
    with chosen("torch"):
        assert torch.equal(logits_of(packed), logits_of(original))


@pytest.mark.parametrize(
    ("arch", "types", "other"),
    [
        ("llama", {"embed_tokens": "Q8_0", "lm_head": "Q5_1"}, "Q4_1"),
        ("qwen2", {"embed_tokens": "Q5_K", "v_proj": "Q6_K"}, "Q4_K"),
        ("llama", {"embed_tokens": "Q5_1"}, "Q2_K"),
    ],
)
def test_types_with_offsets_keep_weights_to_the_rounding_of_float32(
    arch: str, types: dict[str, str], other: str, tmp_path: Path
) -> None:
    original = write_quantized(tmp_path / "in.gguf", arch, mixed(types, other))
    packed = converted(tmp_path / "in.gguf")
    assert close_weights(original, packed)
    own, wanted = logits_of(packed), logits_of(original)
    assert float((own - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def test_offsets_that_are_zero_points_are_stored_as_such(tmp_path: Path) -> None:
    """What an exporter of integer zero-points writes as Q4_1 becomes the same codes, scales and zero-points again."""
    from subnibble.conversion.offsets import pack_offsets
    from subnibble.tensor.packed import PackedRange, QuantizedMatrix
    from subnibble.tensor.scheme import Scheme

    generator = torch.Generator().manual_seed(0)
    scheme = Scheme(4, 32)
    codes = torch.randint(0, 16, (6, 96), generator=generator, dtype=torch.uint8)
    scales = torch.rand(6, 3, generator=generator).bfloat16().float() / 64
    zeros = torch.randint(0, 16, (6, 3), generator=generator).float()
    ours = PackedRange.pack(QuantizedMatrix(codes, scales, zeros), scheme)
    dense = ours.dequantize()
    again = pack_offsets(ours.codes, 96, scales, -scales * zeros, scheme, lambda rows: dense[rows])
    assert again.scheme.zero_point == "integer"
    assert torch.equal(again.codes, ours.codes)
    assert torch.equal(again.float_zeros(), zeros)
    assert torch.equal(again.scales.float(), scales)


def test_a_group_of_scale_zero_keeps_its_only_value() -> None:
    from subnibble.conversion.offsets import pack_offsets, with_constant_groups
    from subnibble.tensor.packed import pack_codes
    from subnibble.tensor.scheme import Scheme

    codes = torch.arange(8, dtype=torch.uint8).view(1, 8)
    scales, offsets = torch.tensor([[0.0, 0.3]]), torch.tensor([[-0.7, 0.1]])
    dense = torch.cat([torch.full((1, 4), -0.7), codes[:, 4:] * 0.3 + 0.1], dim=1)
    packed_codes = pack_codes(with_constant_groups(codes, scales, 4), 4)
    packed = pack_offsets(packed_codes, 8, scales, offsets, Scheme(4, 4), lambda rows: dense[rows]).dequantize()
    assert torch.equal(packed[:, :4], dense[:, :4])


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation gives."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return result


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q3_K", "Q4_K"])
def test_a_chunk_of_rows_is_dense_at_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_quantized(tmp_path / "in.gguf", "llama", mixed({}, kind))
    rows, columns = 12, 256
    monkeypatch.setattr(foreign, "_WEIGHTS_AT_ONCE", rows * columns)
    model = open_foreign(tmp_path / "in.gguf")
    tracemalloc.start()
    with Largest() as largest:
        converted = _linear(model, "model.layers.0.self_attn.q_proj", ())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # No tensor is larger than the packed codes, no array than a chunk: all codes unpacked would take 2 to 4 times that.
    codes = converted.linear.weight.main.ranges[0].codes
    assert codes.nbytes == 256 * columns * BLOCK_TYPES[kind].bits // 8
    assert largest.nbytes == max(codes.nbytes, 4 * rows * columns)
    assert peak < 256 * columns * 4


@pytest.mark.parametrize(("arch", "kind"), [("llama", "Q4_0"), ("llama", "Q4_1"), ("llama", "Q2_K"), ("qwen2", "Q6_K")])
def test_chunks_give_the_matrix_that_is_read_whole(
    arch: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_quantized(tmp_path / "in.gguf", arch, mixed({}, kind))
    model, path = open_foreign(tmp_path / "in.gguf"), "model.layers.1.self_attn.k_proj"
    whole = _linear(model, path, ())
    # Rows of a chunk come from several heads, and the last chunk is shorter.
    monkeypatch.setattr(foreign, "_WEIGHTS_AT_ONCE", 10 * 256)
    chunked = _linear(model, path, ())
    assert chunked.difference == whole.difference
    assert chunked.error == pytest.approx(whole.error)
    states = [one.linear.weight.main.state() for one in (whole, chunked)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_type_that_cannot_be_packed_is_named_or_kept_dense(tmp_path: Path) -> None:
    file = tmp_path / "in.gguf"
    original = write_quantized(file, "qwen2", mixed({"down_proj": "IQ4_NL"}, "Q4_0"))
    with pytest.raises(
        UnsupportedModel, match=r"layers\.0\.mlp\.down_proj\.weight .2 in all. is stored as IQ4_NL.*--dense"
    ):
        subnibble.convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    packed = converted(file, dense=True)
    assert same_weights(original, packed)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not any("down_proj" in path for path in config["quantization_config"]["modules"])


def test_a_wrong_order_of_rows_is_found_by_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write_quantized(tmp_path / "in.gguf", "llama", mixed({}, "Q4_0"))
    monkeypatch.setattr(gguf_source, "_split_rotary_pairs", lambda rows, heads: rows)
    packed = converted(tmp_path / "in.gguf")
    assert not same_weights(original, packed)
    assert float((logits_of(packed) - logits_of(original)).abs().max()) > 0.01
