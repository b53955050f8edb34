"""The C++ decoder step against transformers' own forward pass, on every architecture and cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import subnibble
from conftest import CONFIGS, VOCABULARY, random_model
from kv_calls import cache_of, passing
from subnibble import Recipe
from subnibble.errors import UnsupportedModel
from subnibble.hf.attention import attach_cache_, attached_cache, set_prefix_
from subnibble.hf.decoder import Decoder, why_not
from subnibble.kernels import native as kernels
from subnibble.model.transformers_api.blocks import keys_and_values
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
    """Errors are relative to a token's largest logit. most: of nine tokens in ten. typical: of half of them.

    A sum that differs a little may round to another 16-bit number or another code, which later tokens read: few show
    it, and those by a few times `most`.
    """
    errors = (actual - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert errors.max() < 5 * most, f"{errors.max():.2e} at token {int(errors.argmax())}"
    assert errors.quantile(0.9) < most
    assert errors.median() < typical, f"{errors.median():.2e}"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("half_caches")
def test_step_equals_transformers(name: str, scheme: str) -> None:
    model = random_model(name)
    attach_cache_(model, SCHEMES[scheme])
    most, typical = (1e-3, 2e-4) if scheme == "none" else (0.05, 1e-2)
    assert_near(Decoder(model).logits(ids()[0].tolist()), reference(model, ids()), most, typical)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pieces_batches_and_saved_sequences_give_the_same_bits(scheme: str) -> None:
    model = random_model("qwen3")
    attach_cache_(model, SCHEMES[scheme])
    decoder, tokens = Decoder(model), ids()[0].tolist()
    whole, other = decoder.logits(tokens), ids(20, 1)[0].tolist()
    first, second = decoder.open(), decoder.open()
    decoder.forward([second], [other])
    decoder.forward([first], [tokens[:37]])
    copy_of_first = decoder.load(decoder.save(first))
    for i in range(37, TOKENS):
        both = decoder.forward([second, first], [[tokens[i]], [tokens[i]]])
        assert torch.equal(both[1], whole[i])
        assert torch.equal(decoder.forward([copy_of_first], [[tokens[i]]])[0], whole[i])
    assert torch.equal(both[0], decoder.logits([*other, *tokens[37:]])[-1])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.usefixtures("half_caches")
def test_saved_sequences_hold_what_the_reference_stores(scheme: str) -> None:
    """Of the first layer, which reads embedded tokens only."""
    model, tokens = random_model("llama"), ids(77)
    attach_cache_(model, SCHEMES[scheme])
    with torch.no_grad():
        layer = cache_of(model(tokens, use_cache=True)).layers[0].store
    decoder = Decoder(model)
    sequence = decoder.open()
    decoder.forward([sequence], [tokens[0].tolist()])
    state = decoder.save(sequence)
    for kind, store in (("keys", layer.keys), ("values", layer.values)):
        rows = (
            {}
            if store.quantized is None
            else dict(zip(("codes", "scales", "lows"), store.quantized.tensors, strict=True))
        )
        exact = {} if store.exact is None else {"exact": store.exact}
        names = {name for name in state if name.startswith(f"layers.0.{kind}.")}
        assert names == {f"layers.0.{kind}.{name}" for name in (*rows, *exact)}
        for name, expected in {**rows, **exact}.items():
            actual = state[f"layers.0.{kind}.{name}"]
            assert actual.shape == expected[0].shape
            if name == "codes":
                assert (actual != expected[0]).float().mean() < 0.01
            else:
                torch.testing.assert_close(actual.float(), expected[0].float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scheme", ["none", "token", "hadamard", "before-rope", "channel-halves", "window"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("length", [3, 40])
@pytest.mark.usefixtures("half_caches")
def test_a_prefix_is_before_every_sequence(name: str, scheme: str, length: int) -> None:
    model, prefix = random_model(name), ids(length, 3)
    states = [(keys.half(), values.half()) for keys, values in keys_and_values(model.model, prefix)]
    attach_cache_(model, SCHEMES[scheme], PrefixIds(tuple(prefix[0].tolist())))
    set_prefix_(model, states)
    most, typical = (1e-3, 2e-4) if scheme == "none" else (0.05, 1e-2)
    assert_near(Decoder(model).logits(ids(60)[0].tolist()), reference(model, ids(60)), most, typical)


RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "bits": 4, "embedding_bits": 8},
    "d2quant-plus": {"method": "d2quant-plus", "bits": 3},
    "serq": {"method": "serq", "bits": 4, "activation_bits": 8, "options": {"rank": 16}},
    "serq-plus": {"method": "serq-plus", "bits": 4, "activation_bits": 4, "embedding_bits": 8, "options": {"rank": 16}},
    "quarot": {"method": "quarot", "bits": 4, "activation_bits": 4, "kv_bits": 4},
    "atom": {"method": "atom", "bits": 4, "activation_bits": 4, "kv_bits": 4, "options": {"outliers": 8}},
    "l2qer": {"method": "l2qer", "bits": 3, "activation_bits": 8, "options": {"rank": 4}},
}


def packed_model(recipe: str, folder: Path, tokens: Path, out: Path) -> Any:
    common = {"group_size": 16, "calibration": str(tokens), "num_windows": 8, "window": 32}
    subnibble.quantize(folder, out / "packed", Recipe(**(common | RECIPES[recipe])))
    return AutoModelForCausalLM.from_pretrained(out / "packed", dtype=torch.float32).eval()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.usefixtures("half_caches")
def test_packed_models_equal_transformers(
    recipe: str, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    for name in ("llama", "qwen2") if recipe in ("rtn", "serq-plus") else ("qwen3",):
        model = packed_model(recipe, short[name], token_file, tmp_path / name)
        if attached_cache(model) is None:
            attach_cache_(model, None)
        assert_near(Decoder(model).logits(ids()[0].tolist()), reference(model, ids()), 0.1, 1e-2)


def test_planted_faults_are_seen() -> None:
    model, tokens = random_model("qwen3"), ids()[0].tolist()
    attach_cache_(model, None)
    expected = reference(model, ids())

    def fault(change: Any) -> None:
        changed = copy.deepcopy(model)
        with torch.no_grad():
            change(changed)
        with pytest.raises(AssertionError):
            assert_near(Decoder(changed).logits(tokens), expected, 1e-3, 2e-4)

    block = 1
    for path in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"):
        fault(lambda m, path=path: m.model.layers[block].get_submodule(path).weight.mul_(1.01))
    for path in ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        fault(lambda m, path=path: m.model.layers[block].get_submodule(path).weight[0].mul_(1.1))
    fault(lambda m: m.model.norm.weight[2].mul_(1.1))
    fault(lambda m: m.model.rotary_emb.inv_freq.mul_(1.01))


def test_rotary_positions_of_every_kind() -> None:
    shorter = {"original_max_position_embeddings": 32}
    kinds: dict[str, dict[str, Any]] = {
        "linear": {"factor": 3.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, **shorter},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **shorter},
        "longrope": {"factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [1.5] * 8, **shorter},
    }
    for kind, settings in kinds.items():
        config = copy.deepcopy(CONFIGS["llama"])
        config.max_position_embeddings = 64
        config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, **settings}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        attach_cache_(model, None)
        decoder = Decoder(copy.deepcopy(model))
        sequence, tokens = decoder.open(), ids()
        # Frequencies may change as the text grows: both see the same calls.
        actual = [
            decoder.forward([sequence], [tokens[0, :20].tolist()]),
            decoder.forward([sequence], [tokens[0, 20:].tolist()]),
        ]
        with torch.no_grad():
            first = model(tokens[:, :20], use_cache=True)
            second = model(tokens[:, 20:], **passing(model, cache_of(first)), use_cache=True)
        for a, e in zip(actual, (first, second), strict=True):
            assert_near(a, e.logits[0, -1:], 1e-3, 1e-3)


def test_what_the_step_cannot_run_is_named() -> None:
    model = random_model("llama")
    model.config = copy.deepcopy(model.config)
    model.config.hidden_act = "tanh"
    assert "tanh" in str(why_not(model))
    with pytest.raises(UnsupportedModel, match="tanh"):
        Decoder(model)
    model = random_model("llama")
    model.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.extra"):
        Decoder(model)
    with kernels.chosen("torch"):
        assert why_not(random_model("llama")) == "torch operations were chosen"


def test_impossible_tokens_are_refused_and_nothing_is_appended() -> None:
    decoder = Decoder(random_model("llama"))
    sequence = decoder.open()
    with pytest.raises(IndexError, match=f"token id {VOCABULARY} is outside the vocabulary"):
        decoder.forward([sequence], [[1, VOCABULARY]])
    with pytest.raises(ValueError, match="twice"):
        decoder.forward([sequence, sequence], [[1], [2]])
    assert sequence.length == 0
