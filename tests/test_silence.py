"""What must happen and is taken away is an error, never a worse model: a test for each hook, patch and stand-in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from conftest import random_model
from subnibble import Recipe, quantize
from subnibble.calibrate.prefix import after_prefix
from subnibble.calibrate.stream import BlockStream
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.errors import BadRecipe, SilentFailure, UnsupportedTransformers
from subnibble.evaluation.layer_error import layer_errors
from subnibble.generate.prefix import compute_prefix
from subnibble.hf import attention
from subnibble.hf.attention import attach_cache_
from subnibble.model.skeleton import Block, Skeleton
from subnibble.model.transformers_api.quantization import CheckpointQuantizer
from subnibble.pipeline import rounded_copy
from subnibble.pipeline.distill_checkpoint import distill_checkpoint
from subnibble.pipeline.input_hook import InputHook
from subnibble.runtime import modules
from subnibble.runtime.kv_cache import CacheQuantizer
from subnibble.runtime.modules import TiedHead
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds
from subnibble.tuning.block import TunedBlock

IDS = torch.arange(1, 9).unsqueeze(0)


def on_a_coded_cache() -> Any:
    model = random_model("llama")
    attach_cache_(model, CacheScheme(4))
    model(IDS)
    return model


def forget_hooks(module: nn.Module, target: Callable[[Any], bool]) -> None:
    """Take away the hooks of a module that `wanted` holds of; at least one."""
    taken = 0
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if target(hook)]:
            del hooks[key]
            taken += 1
    assert taken


def test_without_the_decoders_hook_attention_finds_no_cache() -> None:
    model = on_a_coded_cache()
    forget_hooks(model.model, lambda hook: isinstance(hook, attention._BeforeDecoder))
    with pytest.raises(BadRecipe, match="without the cache that is attached"):
        model(IDS)


def test_without_the_attentions_hook_the_cache_is_not_updated() -> None:
    model = on_a_coded_cache()
    forget_hooks(model.model.layers[1].self_attn, lambda hook: hook is attention._announce)
    with pytest.raises(BadRecipe, match="needs subnibble's own attention"):
        model(IDS)


def test_without_all_hooks_the_attention_function_notices() -> None:
    model = on_a_coded_cache()
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    with pytest.raises(SilentFailure, match="gives an attention its layer"):
        model(IDS)


def test_an_attention_function_that_passes_the_cache_by_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_a_coded_cache()
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.ATTENTION, sdpa_attention_forward)
    with pytest.raises(SilentFailure, match="attention function that reads a quantized KV cache"):
        model(IDS)


def test_a_registry_without_our_masks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, attention.ATTENTION)
    with pytest.raises(UnsupportedTransformers, match="no masks"):
        attach_cache_(random_model("llama"), CacheScheme(4))


def test_a_model_that_keeps_its_attention_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(UnsupportedTransformers, match="does not accept 'subnibble'"):
        attach_cache_(model, CacheScheme(4))


def test_generate_with_another_cache_is_noticed() -> None:
    model = on_a_coded_cache()
    del model._prepare_cache_for_generation
    with pytest.raises(BadRecipe, match="cannot continue with a DynamicCache"):
        model.generate(IDS, max_new_tokens=2)


def test_a_prefix_that_no_attention_caches_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")

    def forward(self: Any, input_ids: torch.Tensor, cache: Any = None, past_key_values: Any = None, **_: Any) -> None:
        pass

    monkeypatch.setattr(type(model.model), "forward", forward)
    with pytest.raises(SilentFailure, match="given a prefix"):
        compute_prefix(model, PrefixIds((1, 2)))


@pytest.fixture(scope="module")
def shifted(folders: dict[str, Path], token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rotated, tied model with norm biases: it has a matrix in front of the head, and a packed table."""
    out = tmp_path_factory.mktemp("shifted") / "out"
    recipe = Recipe(
        method="d2quant", bits=4, group_size=16, embedding_bits=8, calibration=str(token_file), num_windows=8, window=32
    )
    quantize(folders["llama-tied"], out, recipe)
    return out


@pytest.mark.parametrize("part", ["model.layers.1.post_attention_layernorm", "model.norm"])
def test_a_norm_that_adds_no_bias_is_noticed(part: str, shifted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shifted)
    forget_hooks(model.get_submodule(part), lambda hook: hook.__name__ == "_add_bias")
    with pytest.raises(SilentFailure, match=part):
        model(IDS)


def test_a_head_that_meets_no_matrix_is_noticed(shifted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shifted)
    forget_hooks(model.lm_head, lambda hook: hook.__name__ == "_transform_head_input")
    with pytest.raises(SilentFailure, match=r"lm_head\.mix"):
        model(IDS)


def test_a_tied_head_that_is_passed_by_is_noticed(shifted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(shifted)
    assert isinstance(model.lm_head, TiedHead)
    monkeypatch.setattr(model.lm_head, "forward", lambda x: x)
    with pytest.raises(SilentFailure, match="lm_head"):
        model(IDS)


def test_what_ran_once_is_not_asked_again(shifted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shifted)
    model(IDS)
    model.model.norm._forward_hooks.clear()
    assert bool(torch.isfinite(model(IDS).logits).all())


def test_loading_without_packed_modules_is_noticed(shifted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointQuantizer, "_process_model_before_weight_loading", lambda self, model, **_: None)
    with pytest.raises(SilentFailure, match="puts packed modules into an empty model"):
        AutoModelForCausalLM.from_pretrained(shifted)


@pytest.fixture
def block(folders: dict[str, Path]) -> tuple[Block, Any]:
    skeleton = Skeleton(SafetensorsSource(folders["llama"]), torch.float32, torch.device("cpu"))
    return skeleton.load_block(0), skeleton.block_calls(8)[0]


def hidden_states() -> list[torch.Tensor]:
    return [torch.randn(2, 8, 48, generator=torch.Generator().manual_seed(0))]


def bypassed(linear: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a linear multiply without its hooks, as a fused kernel would."""
    monkeypatch.setattr(type(linear), "__call__", lambda self, x: self.forward(x))


@pytest.mark.parametrize("name", ["attention_in", "attention_out", "mlp_in", "mlp_hidden"])
def test_a_reader_that_is_not_called_is_noticed(name: str, block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sample_block, call = block
    site = sample_block.arch.site(name)
    bypassed(sample_block.linear(site.readers[0]), monkeypatch)
    with pytest.raises(SilentFailure, match=site.readers[0]):
        list(BlockStream(sample_block, hidden_states(), call).at(site))


def test_a_module_that_is_not_replayed_is_noticed(block: Any) -> None:
    sample_block, call = block
    stream = BlockStream(sample_block, hidden_states(), call)
    list(stream.at(sample_block.arch.site("mlp_hidden")))
    norm = sample_block.module.post_attention_layernorm
    sample_block.module.forward = lambda x, **_: norm(x)
    with pytest.raises(SilentFailure, match=r"layers\.0\.mlp"):
        list(stream.outputs())


@pytest.mark.parametrize("until", ["attention_out", "the end"])
def test_a_coded_cache_that_calibration_never_asks_is_noticed(until: str, block: Any) -> None:
    sample_block, call = block
    attention_of_block = sample_block.module.self_attn
    forward = attention_of_block.forward
    names = {"cache", "past_key_values"}
    attention_of_block.forward = lambda **named: forward(**{k: v for k, v in named.items() if k not in names})
    stream = BlockStream(sample_block, hidden_states(), after_prefix(call, None, CacheQuantizer(CacheScheme(4))))
    with pytest.raises(SilentFailure, match="the KV cache of"):
        list(stream.outputs() if until == "the end" else stream.at(sample_block.arch.site(until)))


def quantized(folder: Path, tokens: Path, out: Path, method: str, **more: Any) -> Any:
    data = {"calibration": str(tokens), "num_windows": 4, "window": 32}
    return quantize(folder, out, Recipe(method=method, bits=4, group_size=16, **data, **more))


def test_inputs_that_are_not_quantized_while_calibrating_are_noticed(
    folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(folders["llama"], token_file, tmp_path / "a", "atom", activation_bits=4, options={"outliers": 8})
    monkeypatch.setattr(InputHook, "__call__", lambda self, linear, args: None)
    with pytest.raises(SilentFailure, match="quantized input of model"):
        quantized(folders["llama"], token_file, tmp_path / "b", "atom", activation_bits=4, options={"outliers": 8})
    assert not (tmp_path / "b").exists()


def test_a_norm_without_its_bias_while_calibrating_is_noticed(
    folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(module: Any, bias: torch.Tensor) -> None:
        module.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
        module.ran = False

    monkeypatch.setattr(rounded_copy, "add_output_bias_", silent)
    with pytest.raises(SilentFailure, match="the bias of model"):
        quantized(folders["llama"], token_file, tmp_path / "out", "d2quant")


def test_a_tuned_copy_that_learns_nothing_is_noticed(
    folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters, spare = TunedBlock.parameters, nn.Parameter(torch.zeros(2))

    def more(self: TunedBlock) -> dict[str, nn.Parameter]:
        # Of a linear that the copy does not call.
        return {**parameters(self), "clipping.lost": spare}

    monkeypatch.setattr(TunedBlock, "parameters", more)
    with pytest.raises(SilentFailure, match="lost"):
        quantized(folders["llama"], token_file, tmp_path / "out", "omniquant", activation_bits=4)


@pytest.mark.parametrize(("hook", "part"), [("_add_bias", "norm"), ("_transform_head_input", r"lm_head\.mix")])
def test_what_is_not_learned_and_never_runs_while_distilling_is_noticed(
    hook: str,
    part: str,
    shifted: Path,
    folders: dict[str, Path],
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(shifted, out)
    distilled = {"distill_steps": 2, "distill": {"tokens": 32, "norm_biases": False}}
    recipe = Recipe(calibration=str(token_file), num_windows=8, window=32, **distilled)
    distill_checkpoint(out, folders["llama-tied"], recipe)
    # A hook that does nothing.
    monkeypatch.setattr(modules, hook, lambda module, args, *rest: None)
    with pytest.raises(SilentFailure, match=f"adds to .*({part})"):
        distill_checkpoint(out, folders["llama-tied"], recipe)


def test_layer_errors_of_a_linear_that_is_passed_by_are_noticed(
    packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reference = AutoModelForCausalLM.from_pretrained(packed["llama"]), random_model("llama")
    layer_errors(model, reference, IDS)
    bypassed(reference.model.layers[0].mlp.down_proj, monkeypatch)
    with pytest.raises(SilentFailure, match="was never called"):
        layer_errors(model, reference, IDS)
