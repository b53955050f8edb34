"""Translate the rotary positions of a GGUF model into transformers' `rope_parameters`, as llama.cpp interprets them.

- A factor without a type means linear scaling.
- YaRN is the same as in transformers. If the original context length is missing, the file's context length is used.
- Llama 3's scaling has no metadata, only a tensor with a divisor for each frequency: 1 for short wavelengths, the
  factor for long ones, and in between a function of low_freq_factor and high_freq_factor, which are fitted to it here.
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
# Relative tolerance of a divisor, which was computed and stored in float32; decimals of fitted numbers.
_TOLERANCE, _DIGITS = 1e-4, 4


def rope_parameters(metadata: Metadata, width: int, context: int, divisors: Sequence[float] | None) -> dict[str, Any]:
    """Return transformers' `rope_parameters` of a GGUF model.

    metadata: of the file.
    width: channels of a head.
    context: the model's context length, in tokens.
    divisors: (width / 2,), one per rotary frequency; None if all are 1.
    Raises `UnsupportedModel` for scaling that transformers does not have.
    """
    base = float(metadata.of_arch("rope.freq_base", 10000.0))
    factor = float(metadata.of_arch("rope.scaling.factor", metadata.of_arch("rope.scale_linear", 0.0)) or 1.0)
    kind = str(metadata.of_arch("rope.scaling.type", "linear"))
    if kind not in ("none", "linear", "yarn"):
        raise _refusal(metadata, f"rope.scaling.type is {kind!r}, which is not supported")
    yarn_share = float(metadata.of_arch("rope.scaling.yarn_ext_factor", -1.0))
    # A negative value means the default of the scaling type.
    if yarn_share >= 0 and yarn_share != (kind == "yarn"):
        raise _refusal(metadata, f"rope.scaling.yarn_ext_factor is {yarn_share} for a scaling of type {kind!r}")
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
    parameters = {"rope_theta": base, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = int(
            metadata.of_arch("rope.scaling.original_context_length") or context
        )
        for key in ("beta_fast", "beta_slow"):
            value = metadata.of_arch(f"rope.scaling.yarn_{key}")
            parameters |= {} if value is None else {key: float(value)}
    return parameters


def _by_divisors(metadata: Metadata, divisors: Tensor, base: float, context: int) -> dict[str, Any]:
    """Return the `rope_parameters` of the scaling that divides frequencies by these numbers, (width / 2,) float64."""
    factor = round(float(divisors.max()), _DIGITS)
    if bool(((divisors - factor).abs() <= _TOLERANCE * factor).all()):
        return {"rope_type": "linear", "factor": factor}
    waves = 2 * math.pi * base ** (torch.arange(len(divisors), dtype=torch.float64) / len(divisors))
    # The original context length is arbitrary: only its ratios to low and high count. transformers wants it below the
    # model's context length.
    original_context = min(_LLAMA3[2], max(context // 2, 1))
    for low, high, original in (_LLAMA3, *_fitted(divisors, waves, factor, original_context)):
        expected = _llama3_divisors(waves, factor, low, high, original)
        if bool(((divisors - expected).abs() <= _TOLERANCE * expected).all()):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise _refusal(metadata, "the divisors in rope_freqs.weight match no scaling that transformers has")


def _llama3_divisors(waves: Tensor, factor: float, low: float, high: float, original: int) -> Tensor:
    """Return Llama 3's divisor for the frequency of each wavelength."""
    smooth = ((original / waves - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _fitted(divisors: Tensor, waves: Tensor, factor: float, original: int) -> list[tuple[float, float, int]]:
    """Return [(low, high, original)], fitted to the first and last divisor strictly between 1 and factor, else []."""
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
