"""Rotary positions of a GGUF model, as transformers' `rope_parameters`, with what llama.cpp makes of its metadata.

llama.cpp scales linearly where a factor comes without a type. YaRN is transformers' own but for what the file leaves
out: the original context is then the file's. Llama 3 has no metadata, but a tensor of what each frequency is divided
by: 1 for short waves, the factor for long ones, and between them a function of two numbers, which are found from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subnibble.errors import UnsupportedModel

if TYPE_CHECKING:
    from subnibble.checkpoint.gguf_config import Metadata

# Llama 3.1 and 3.2: low and high frequency factors, original context.
_LLAMA3 = (1.0, 4.0, 8192)
# Of a divisor; stored ones are float32, computed by way of float32.
_TOLERANCE, _DIGITS = 1e-4, 4


def rope_parameters(metadata: Metadata, width: int, context: int, divisors: Sequence[float] | None) -> dict[str, Any]:
    """width: channels of a head. context: the longest text. divisors: of frequencies, (width / 2,), None for 1."""
    base = float(metadata.of_arch("rope.freq_base", 10000.0))
    factor = float(metadata.of_arch("rope.scaling.factor", metadata.of_arch("rope.scale_linear", 0.0)) or 1.0)
    kind = str(metadata.of_arch("rope.scaling.type", "linear"))
    if kind not in ("none", "linear", "yarn"):
        raise _refusal(metadata, f"rope.scaling.type is {kind!r}, which is not read here")
    mixed = float(metadata.of_arch("rope.scaling.yarn_ext_factor", -1.0))
    # Below zero stands for what the type has.
    if mixed >= 0 and mixed != (kind == "yarn"):
        raise _refusal(metadata, f"rope.scaling.yarn_ext_factor is {mixed} for a scaling of type {kind!r}")
    kind = "none" if kind == "linear" and factor == 1.0 else kind
    if divisors is not None and any(abs(divisor - 1) > _TOLERANCE for divisor in divisors):
        if kind != "none" or len(divisors) != width // 2:
            raise _refusal(metadata, f"rope.scaling.type {kind!r} with {len(divisors)} rope_freqs for {width} channels")
        return {
            "rope_theta": base,
            **_by_divisors(metadata, torch.tensor(divisors, dtype=torch.float64), base, context),
        }
    if kind == "none":
        return {"rope_theta": base, "rope_type": "default"}
    found = {"rope_theta": base, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        found["original_max_position_embeddings"] = int(
            metadata.of_arch("rope.scaling.original_context_length") or context
        )
        for key in ("beta_fast", "beta_slow"):
            value = metadata.of_arch(f"rope.scaling.yarn_{key}")
            found |= {} if value is None else {key: float(value)}
    return found


def _by_divisors(metadata: Metadata, divisors: Tensor, base: float, context: int) -> dict[str, Any]:
    """The scaling that divides frequencies by these numbers."""
    factor = round(float(divisors.max()), _DIGITS)
    if bool(((divisors - factor).abs() <= _TOLERANCE * factor).all()):
        return {"rope_type": "linear", "factor": factor}
    waves = 2 * math.pi * base ** (torch.arange(len(divisors), dtype=torch.float64) / len(divisors))
    # What it is called is free, as only its ratios to the others count; transformers wants less than the whole.
    free = min(_LLAMA3[2], max(context // 2, 1))
    for low, high, original in (_LLAMA3, *_fitted(divisors, waves, factor, free)):
        expected = _llama3_divisors(waves, factor, low, high, original)
        if bool(((divisors - expected).abs() <= _TOLERANCE * expected).all()):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise _refusal(metadata, "what rope_freqs.weight divides frequencies by is no scaling that transformers has")


def _llama3_divisors(waves: Tensor, factor: float, low: float, high: float, original: int) -> Tensor:
    """What Llama 3's scaling divides frequencies of these wavelengths by."""
    smooth = ((original / waves - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _fitted(divisors: Tensor, waves: Tensor, factor: float, original: int) -> list[tuple[float, float, int]]:
    """(low, high, original) for which the first and last wave between short and long ones have these divisors."""
    between = ((divisors > 1 + _TOLERANCE) & (divisors < factor * (1 - _TOLERANCE))).nonzero().flatten()
    if len(between) < 2:
        return []
    ends = between[[0, -1]]
    # The share of the undivided frequency is linear in 1 / wave.
    share = (1 / divisors[ends] - 1 / factor) / (1 - 1 / factor)
    slope = float((share[0] - share[1]) / (1 / waves[ends[0]] - 1 / waves[ends[1]]))
    if slope <= 0:
        return []
    span = original / slope
    low = original / float(waves[ends[0]]) - float(share[0]) * span
    return [(round(low, _DIGITS), round(low + span, _DIGITS), original)]


def _refusal(metadata: Metadata, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{metadata.path}: rotary positions: {reason}; use the original checkpoint instead of the GGUF file"
    )
