"""Write tiny models as GPTQ and compressed-tensors folders, after the formats' public descriptions, in numpy alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from conftest import random_model
from subnibble.runtime.modules import packed_modules

GROUP = 16
READERS = {
    "q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "o_proj": "values",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "hidden",
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Grid:
    """How linears are quantized. orders: "none", "shared" by linears of one input, or "own" for each linear."""

    bits: int = 4
    symmetric: bool = False
    group: int = GROUP
    orders: str = "none"
    scale_type: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float16))


@dataclass(frozen=True)
class Quantized:
    """A linear: `w[i, j] = scales[i, g_idx[j]] * (codes[i, j] - zeros[i, g_idx[j]])`."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    g_idx: np.ndarray

    def dense(self) -> np.ndarray:
        codes, zeros = self.codes.astype(np.float32), self.zeros.astype(np.float32)
        return (codes - zeros[:, self.g_idx]) * self.scales.astype(np.float32)[:, self.g_idx]


def quantized(weight: np.ndarray, grid: Grid, order: np.ndarray) -> Quantized:
    """Round to nearest, in groups of the columns in this order."""
    levels, (rows, columns) = 2**grid.bits, weight.shape
    g_idx = np.empty(columns, np.int64)
    g_idx[order] = np.arange(columns) // grid.group
    groups = int(g_idx.max()) + 1
    scales, zeros = np.zeros((rows, groups), grid.scale_type), np.zeros((rows, groups), np.int64)
    codes = np.zeros(weight.shape, np.int64)
    for group in range(groups):
        part = weight[:, g_idx == group]
        low, high = np.minimum(part.min(1), -1e-3), np.maximum(part.max(1), 1e-3)
        if grid.symmetric:
            high = np.maximum(-low, high)
            low = -high
        scales[:, group] = (high - low) / (levels - 1)
        wide = scales[:, group].astype(np.float32)[:, None]
        # Format gptq cannot store a zero-point 0.
        zero = np.full(rows, levels // 2) if grid.symmetric else np.clip(np.rint(-low / wide[:, 0]), 1, levels - 1)
        zeros[:, group] = zero
        codes[:, g_idx == group] = np.clip(np.rint(part / wide) + zeros[:, [group]], 0, levels - 1)
    return Quantized(codes, scales, zeros, g_idx)


def packed_words(values: np.ndarray, bits: int) -> np.ndarray:
    """Rows of integers as dense streams of bits in int32 words, the lowest bit first."""
    stream = ((values[..., None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(len(values), -1)
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view("<i4")


def gapped_words(values: np.ndarray, bits: int) -> np.ndarray:
    """The same with no integer in two words, as old compressed-tensors."""
    per_word = 32 // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % per_word))).reshape(len(values), -1, per_word)
    return (padded << (np.arange(per_word) * bits)).sum(-1).astype(np.uint32).view(np.int32)


def gptq_parts(q: Quantized, grid: Grid, stored_zeros: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "qweight": packed_words(q.codes, grid.bits).T,
        "qzeros": packed_words(stored_zeros.T, grid.bits),
        "scales": q.scales.T,
        "g_idx": q.g_idx.astype(np.int32),
    }


def ct_parts(q: Quantized, grid: Grid, pack: Callable[[np.ndarray, int], np.ndarray]) -> dict[str, np.ndarray]:
    parts = {
        "weight_packed": pack(q.codes, grid.bits),
        "weight_scale": q.scales,
        "weight_shape": np.array(q.codes.shape, np.int64),
    }
    if not grid.symmetric:
        parts["weight_zero_point"] = pack(q.zeros.T, grid.bits).T
    if grid.orders != "none":
        parts["weight_g_idx"] = q.g_idx.astype(np.int32)
    return parts


def write_folder(
    folder: Path,
    name: str,
    grid: Grid,
    parts_of: Callable[[Quantized], Mapping[str, np.ndarray]],
    config: Mapping[str, Any],
    spoil: Callable[[Tensors], object] = lambda tensors: None,
    but: tuple[str, ...] = (),
) -> Any:
    """Write a quantized model and give the dequantized one.

    parts_of: gives the tensors of a linear, and may change it before. config: quantization_config. spoil: changes the
    tensors before they are written. but: endings of linears that are not quantized.
    """
    model, rng = random_model(name, blocks=2), np.random.default_rng(0)
    tensors: Tensors = {}
    dense: Tensors = {}
    orders: dict[str, np.ndarray] = {}
    for key, tensor in model.state_dict().items():
        linear = key.removesuffix(".weight").rpartition(".")[2]
        if not key.endswith(".weight") or linear not in READERS or linear in but:
            dense[key] = tensor
            if not (key == "lm_head.weight" and model.config.tie_word_embeddings):
                tensors[key] = tensor
            continue
        path = key.removesuffix(".weight")
        site = path.rpartition(".")[0] + READERS[linear] if grid.orders == "shared" else path
        width = tensor.shape[1]
        if grid.orders == "none":
            orders[site] = np.arange(width)
        order = orders.setdefault(site, rng.permutation(width))
        q = quantized(tensor.numpy(), grid, order)
        for part, values in parts_of(q).items():
            tensors[f"{path}.{part}"] = torch.from_numpy(np.ascontiguousarray(values))
        dense[key] = torch.from_numpy(q.dense())
    spoil(tensors)
    folder.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    values = model.config.to_dict() | {"quantization_config": dict(config), "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(values))
    original = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    original.load_state_dict(dense)
    return original


def write_gptq(folder: Path, name: str, grid: Grid, version: int = 1, **others: Any) -> Any:
    """Write a GPTQ folder; others: of `write_folder`, and `settings` of its config."""
    settings = {
        "quant_method": "gptq", "bits": grid.bits, "group_size": grid.group, "desc_act": grid.orders != "none",
        "sym": grid.symmetric, "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        **others.pop("settings", {}),
    }  # fmt: skip
    parts = others.pop("parts", lambda q: gptq_parts(q, grid, q.zeros - (version == 1)))
    return write_folder(folder, name, grid, parts, settings, **others)


def write_ct(folder: Path, name: str, grid: Grid, **others: Any) -> Any:
    """Write a compressed-tensors folder; others: of `write_folder`, `pack`, and changes of the config."""
    weights = {
        "num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "strategy": "group",
        "group_size": grid.group, "dynamic": False, **others.pop("weights", {}),
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, **others.pop("of_group", {})}
    settings = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": None, "config_groups": {"group_0": group},
        **others.pop("settings", {}),
    }  # fmt: skip
    pack = others.pop("pack", packed_words)
    parts = others.pop("parts", lambda q: ct_parts(q, grid, pack))
    return write_folder(folder, name, grid, parts, settings, **others)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


def same_weights(original: Any, packed: Any) -> bool:
    """Whether all linears, the embedding and all other tensors are equal bit for bit."""
    linears = {f"{path}.weight": module.dequantize() for path, module in packed_modules(packed).items()}
    state = {**packed.state_dict(), **linears}
    tied = {"lm_head.weight"} if original.config.tie_word_embeddings else set()
    wanted = {name: tensor for name, tensor in original.state_dict().items() if name not in tied}
    return all(torch.equal(tensor, state[name].float()) for name, tensor in wanted.items())
