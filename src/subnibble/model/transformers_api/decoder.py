"""What a decoder computes beside its linears: norms' eps, activation function, sliding windows, rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subnibble.model.transformers_api.names import unknown

# Activation functions of gated MLPs by transformers' names.
_GATES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu",
          "relu": "relu"}  # fmt: skip
# Kinds of rotary positions whose frequencies depend on the length of the text.
_CHANGING = ("dynamic", "longrope")


def norm_eps(norm: nn.Module) -> float:
    """The eps of an RMSNorm. Raises `UnsupportedTransformers` if the module has none."""
    eps = getattr(norm, "variance_epsilon", None)
    if eps is None:
        raise unknown(f"has a norm without an eps, {type(norm).__name__}")
    return float(eps)


def gate_name(config: Any) -> str | None:
    """The activation function of the MLPs: "silu", "gelu_tanh", "gelu" or "relu"; None for another one."""
    return _GATES.get(str(getattr(config, "hidden_act", None)))


def head_norms(attention: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The norms of each head's queries and keys, or None."""
    query, key = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return None if query is None or key is None else (query, key)


def score_factor(attention: nn.Module, width: int) -> float:
    """The factor of attention's scores. width: channels of a head."""
    factor = getattr(attention, "scaling", None)
    return float(width**-0.5 if factor is None else factor)


def sliding_window(attention: nn.Module, config: Any) -> int:
    """How many of the last tokens an attention sees, itself included; 0 for all."""
    own = getattr(attention, "sliding_window", None)
    if own is None and not hasattr(attention, "layer_type") and config.model_type == "mistral":
        own = getattr(config, "sliding_window", None)
    return 0 if own is None else int(own)


@dataclass
class Angles:
    """Cosines and sines of rotary positions, from a decoder's own module.

    module: the rotary embedding.
    changes: whether frequencies depend on the length of the text.
    """

    module: Any
    changes: bool

    @classmethod
    def of(cls, decoder: Any) -> Angles:
        """From a decoder. Raises `UnsupportedTransformers` if it has no rotary embedding."""
        module = getattr(decoder, "rotary_emb", None)
        if module is None:
            raise unknown(f"has no rotary embedding in {type(decoder).__name__}")
        kind = getattr(module, "rope_type", "default")
        if not isinstance(kind, str):
            raise unknown("has several kinds of rotary positions in one decoder")
        return cls(module, kind in _CHANGING)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions start .. stop - 1, (stop - start, rotated channels / 2) float32 each."""
        positions = torch.arange(start, stop).unsqueeze(0)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            pair = self.module(torch.empty(0, dtype=torch.float32), positions)
        cos, sin = (angles[0, :, : angles.shape[-1] // 2].float().contiguous() for angles in pair)
        return cos, sin
