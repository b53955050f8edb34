"""Calls that reach for a dense weight: right where it is there, else refused with the cause and what to do."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import wrapt
from transformers import AutoModelForCausalLM, PreTrainedModel

import subnibble
from conftest import VOCABULARY
from subnibble.errors import BadArgument, NoWeight, SubnibbleError
from subnibble.hf import packed_modules
from subnibble.model.transformers_api.calls import wrap_calls

IDS = torch.tensor([[5, 9, 12, 40, 3]])
RTN = {"method": "rtn", "bits": 4, "group_size": 16}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_rows_cannot_be_added_to_a_packed_table(name: str, packed: dict[str, Path]) -> None:
    model = load(packed[name])
    for settings in ({"new_num_tokens": VOCABULARY + 8}, {"new_num_tokens": VOCABULARY, "pad_to_multiple_of": 64}):
        with pytest.raises(BadArgument, match=r"embedding or head is quantized.*embedding_bits = 16"):
            model.resize_token_embeddings(**settings)
    expected = logits(load(packed[name]))
    for size in (None, VOCABULARY):
        assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    model.tie_weights()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_table_at_16_bits_takes_new_rows_which_are_saved(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    subnibble.quantize(folders[name], tmp_path / "out", RTN)
    model = load(tmp_path / "out")
    before = logits(model)
    model.resize_token_embeddings(VOCABULARY + 8)
    assert torch.equal(logits(model)[..., :VOCABULARY], before)
    model.save_pretrained(tmp_path / "more")
    new = torch.tensor([[5, VOCABULARY + 7]])
    assert torch.equal(logits(load(tmp_path / "more"), new), logits(model, new))


def test_a_head_that_meets_a_matrix_is_not_replaced(folders: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    more = {"method": "quarot", "calibration": token_file, "num_windows": 8, "window": 24}
    subnibble.quantize(folders["llama-tied"], tmp_path / "out", RTN | more)
    model = load(tmp_path / "out")
    assert hasattr(model.lm_head, "mix")
    with pytest.raises(BadArgument, match="embedding or head is quantized"):
        model.resize_token_embeddings(VOCABULARY + 8)


def test_a_plain_model_is_resized_as_always(folders: dict[str, Path], packed: dict[str, Path]) -> None:
    load(packed["llama"])
    model = load(folders["llama"])
    model.resize_token_embeddings(VOCABULARY + 8)
    assert logits(model).shape[-1] == VOCABULARY + 8


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_packed_module_says_what_became_of_its_weight(name: str, packed: dict[str, Path]) -> None:
    model = load(packed[name])
    for module in (*packed_modules(model).values(), model.get_input_embeddings(), model.get_output_embeddings()):
        assert not hasattr(module, "weight")
        with pytest.raises(NoWeight, match=r"holds codes .* call `dequantize\(\)`"):
            _ = module.weight
        with pytest.raises(AttributeError, match="no attribute 'wait'"):
            _ = module.wait
    table = model.get_input_embeddings()
    assert torch.equal(table.dequantize()[IDS], table(IDS))


def test_a_packed_model_has_no_dense_form(packed: dict[str, Path]) -> None:
    with pytest.raises(SubnibbleError, match="use the original model"):
        load(packed["llama"]).dequantize()


@pytest.mark.parametrize("ids", [-1, -VOCABULARY, VOCABULARY])
def test_tokens_that_are_none_are_refused_as_by_a_plain_table(
    ids: int, packed: dict[str, Path], folders: dict[str, Path]
) -> None:
    for folder in (packed["llama"], folders["llama"]):
        with pytest.raises(IndexError, match="index out of range"):
            load(folder).get_input_embeddings()(torch.tensor([[3, ids]]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int16])
def test_ids_of_a_type_that_a_plain_table_refuses_are_refused(dtype: torch.dtype, packed: dict[str, Path]) -> None:
    with pytest.raises(RuntimeError):
        load(packed["llama"]).get_input_embeddings()(torch.ones(1, 3, dtype=dtype))


def test_calls_are_wrapped_once_however_many_models_are_loaded() -> None:
    for _ in range(3):
        wrap_calls("subnibble")
    for name in ("save_pretrained", "resize_token_embeddings"):
        wrapped = inspect.getattr_static(PreTrainedModel, name)
        assert isinstance(wrapped, wrapt.FunctionWrapper)
        assert not isinstance(wrapped.__wrapped__, wrapt.FunctionWrapper)
