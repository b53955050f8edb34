"""The C++ decoder step against transformers' own forward pass, on every architecture and cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from conftest import CONFIGS, VOCABULARY, random_model
from subnibble.hf.attention import attach_cache_, set_prefix_
from subnibble.hf.decoder import Decoder, why_not
from subnibble.kernels import native as kernels
from subnibble.runtime.kv_cache import CacheView, TensorStore
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds

pytestmark = pytest.mark.skipif(kernels.why_missing() is not None, reason="there are no kernels")

SCHEMES = {
    "none": None,
    "token": CacheScheme(4),
    "8-bits": CacheScheme(8, 6),
    "before-rope": CacheScheme(3, 5, rope="before"),
    "hadamard": CacheScheme(4, key_rotation="hadamard"),
    "channel": CacheScheme(2, 4, "channel", window=4),
    "channel-halves": CacheScheme(4, 16, "channel", window=32),
    "channel-before-rope": CacheScheme(3, 4, "channel", rope="before", window=8),
    "window": CacheScheme(3, window=5, clip=0.9),
}
TOKENS = 90


@pytest.fixture
def half_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reference keep tokens that are not quantized as the step does: at 16 bits."""
    append = TensorStore.append

    def rounded(self: TensorStore, x: Tensor) -> CacheView:
        scheme = self._scheme
        keeps = scheme is None or scheme.window > 0
        return append(self, x.half().to(x.dtype) if keeps else x)

    monkeypatch.setattr(TensorStore, "append", rounded)


def ids(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def reference(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(tokens, use_cache=True).logits[0]
    return result


def assert_near(actual: Tensor, expected: Tensor, most: float, typical: float) -> None:
    """Errors are relative to a token's largest logit. most: of all tokens. typical: of half of them.

    A sum that differs in its last bit may round to another 16-bit number or another code: few tokens show it.
    """
    errors = (actual - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert errors.max() < most, f"{errors.max():.2e} at token {int(errors.argmax())}"
    assert errors.median() < typical, f"{errors.median():.2e}"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("half_caches")
def test_step_equals_transformers(name: str, scheme: str) -> None:
    model = random_model(name)
    attach_cache_(model, SCHEMES[scheme])
    most, typical = (1e-3, 2e-4) if scheme == "none" else (0.05, 2e-3)
    assert_near(Decoder(model).logits(ids()[0].tolist()), reference(model, ids()), most, typical)
