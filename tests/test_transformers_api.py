"""Names of transformers live in one package; what must happen is an error where it does not happen."""

from __future__ import annotations

import ast
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import subnibble
from conftest import CONFIGS, random_model
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.errors import SilentFailure, UnsupportedTransformers
from subnibble.model.skeleton import Skeleton
from subnibble.model.transformers_api.blocks import BlockCache, record_block_calls, run_block
from subnibble.model.transformers_api.empty import empty_causal_lm
from subnibble.model.transformers_api.names import cache_argument

ROOT = Path(subnibble.__file__).parent
HOME = ROOT / "model" / "transformers_api"
# What transformers may call otherwise in its next release.
NAMES = {
    "past_key_values", "position_embeddings", "position_ids", "attention_mask", "inputs_embeds", "use_cache",
    "hidden_states", "layer_idx", "_attn_implementation", "set_attn_implementation", "all_tied_weights_keys",
    "_tied_weights_keys", "_prepare_cache_for_generation", "checkpoint_files", "model_kwargs",
    "_process_model_before_weight_loading", "_process_model_after_weight_loading", "inv_freq",
    "update_attn_implementation", "transformers_weights",
}  # fmt: skip
# What transformers documents, and has kept since its first releases.
OFFERED = {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"}


def spelled(source: str) -> set[str]:
    """Names of transformers' that a source file spells, and what it imports of transformers beyond `OFFERED`."""
    result: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.keyword(arg=str(name)) | ast.arg(arg=name):
                result.add(name)
            case ast.Constant(value=str(name)):
                result.add(name)
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] == "transformers":
                result |= {
                    f"{module}.{name.name}" for name in names if module != "transformers" or name.name not in OFFERED
                }
    return {name for name in result if name in NAMES or (name.startswith("transformers.") and " " not in name)}


def test_names_of_transformers_are_spelled_in_one_package() -> None:
    files = [*ROOT.rglob("*.py"), *(ROOT.parents[1] / "bench").glob("*.py")]
    elsewhere = {str(file): spelled(file.read_text()) for file in files if HOME not in file.parents}
    # The registry whose import registers the plug-in: `subnibble` itself knows its module's name.
    elsewhere[str(ROOT / "__init__.py")] -= {"transformers.quantizers.auto"}
    assert {file: names for file, names in elsewhere.items() if names} == {}
    assert spelled((HOME / "attention.py").read_text()) > {"position_ids", "transformers.cache_utils.Cache"}


@pytest.mark.parametrize(
    "planted",
    [
        "decoder(use_cache=False)", "x = kwargs['position_ids']", "model._attn_implementation",
        "from transformers.cache_utils import Cache", "from transformers import DynamicCache",
    ],
)  # fmt: skip
def test_a_planted_name_is_found(planted: str) -> None:
    assert spelled(planted)


class _Renamed(nn.Module):
    def forward(self, hidden_states: torch.Tensor, kv_store: Any = None) -> torch.Tensor:
        return hidden_states


def test_a_cache_of_another_name_is_an_error_that_names_the_release() -> None:
    with pytest.raises(UnsupportedTransformers, match=r"transformers \d.*_Renamed.*README"):
        cache_argument(_Renamed())


class _Cache(BlockCache):
    def attended(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return keys, values


def skeleton_of(folder: Path) -> Skeleton:
    return Skeleton(SafetensorsSource(folder), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_block_updates_the_cache_it_is_called_with(name: str, folders: dict[str, Path]) -> None:
    skeleton = skeleton_of(folders[name])
    block, call, cache = skeleton.load_block(0), skeleton.block_calls(6)[0], _Cache()
    hidden = torch.randn(2, 6, skeleton.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = run_block(block.module, hidden, call)
        assert torch.equal(run_block(block.module, hidden, call.with_cache(cache)), expected)
    assert cache.updates == 1


def test_a_block_that_updates_no_cache_is_an_error(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = skeleton_of(folders["llama"])
    block, call = skeleton.load_block(0), skeleton.block_calls(6)[0].with_cache(_Cache())
    attention = block.module.self_attn
    forward = attention.forward
    argument = cache_argument(attention)
    monkeypatch.setattr(attention, "forward", lambda *args, **named: forward(*args, **{**named, argument: None}))
    with pytest.raises(SilentFailure, match="the KV cache of a LlamaDecoderLayer was never called"), torch.no_grad():
        run_block(block.module, torch.zeros(1, 6, 48), call)


def test_a_decoder_that_skips_its_blocks_is_an_error() -> None:
    model = random_model("llama").model
    kept = model.forward
    hidden = torch.zeros(1, 4, 48)
    assert len(record_block_calls(model, "layers", "norm", hidden, prefix_length=2)) == 3
    model.config.num_hidden_layers = 2
    try:
        with pytest.raises(SilentFailure, match="block 2 was never called"):
            record_block_calls(model, "layers", "norm", hidden, prefix_length=0)
    finally:
        model.config.num_hidden_layers = 3
    assert model.forward == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_empty_model_has_the_buffers_of_a_full_one(name: str, dtype: torch.dtype) -> None:
    empty, full = empty_causal_lm(CONFIGS[name], dtype), random_model(name)
    assert all(parameter.is_meta and parameter.dtype == dtype for parameter in empty.parameters())
    expected = dict(full.named_buffers())
    actual = dict(empty.named_buffers())
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) and actual[key].dtype == expected[key].dtype for key in expected)


def test_empty_models_leave_other_threads_alone() -> None:
    stop, devices = threading.Event(), set[str]()

    def make() -> None:
        while not stop.is_set():
            devices.add(nn.Linear(2, 2).weight.device.type)

    other = threading.Thread(target=make)
    other.start()
    try:
        for _ in range(5):
            empty_causal_lm(CONFIGS["llama"], torch.bfloat16)
    finally:
        stop.set()
        other.join()
    assert devices == {"cpu"}
    assert torch.get_default_dtype() == torch.float32
