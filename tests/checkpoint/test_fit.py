"""Tensors that are not those of the config are refused before any is read, with the cause and what would help."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import save_model
from subnibble import Recipe, quantize
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.weight_files import SINGLE
from subnibble.errors import CheckpointError
from subnibble.hf import load_model
from subnibble.model.skeleton import Skeleton
from subnibble.report import Report

Change = Callable[[dict[str, Tensor]], object]
Q = "model.layers.0.self_attn.q_proj"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def changed(folder: Path, change: Change, name: str = "llama", **config: object) -> Path:
    """A tiny model with other tensors and another config."""
    save_model(name, folder)
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def refusal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said of it, without having read a weight."""
    monkeypatch.setattr(SafetensorsSource, "load_raw", lambda *a: pytest.fail("a weight was read"))
    with pytest.raises(CheckpointError) as error:
        Skeleton(open_source(folder), torch.float32, torch.device("cpu"))
    assert "again" not in str(error.value)
    return str(error.value)


def nothing(tensors: dict[str, Tensor]) -> None:
    pass


def gptq(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{Q}.weight"]
    tensors[f"{Q}.qweight"] = torch.zeros(6, 48, dtype=torch.int32)


def scaled(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{Q}.weight_scale_inv"] = torch.ones(1, 1)


def bits_and_bytes(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.weight"] = torch.zeros(2304, 1, dtype=torch.uint8)
    tensors[f"{Q}.weight.absmax"] = torch.ones(72)


def adapted(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.base_layer.weight"] = tensors.pop(f"{Q}.weight")
    tensors[f"{Q}.lora_A.default.weight"] = torch.zeros(2, 48)


def fused(tensors: dict[str, Tensor]) -> None:
    for part in "qkv":
        del tensors[f"model.layers.0.self_attn.{part}_proj.weight"]
    tensors["model.layers.0.self_attn.qkv_proj.weight"] = torch.zeros(160, 48)


def of_type(kind: torch.dtype) -> Change:
    return lambda tensors: tensors.update({f"{Q}.weight": tensors[f"{Q}.weight"].to(kind)})


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (gptq, {}, f"another tool quantized these weights ({Q}.qweight is stored with them)"),
        (scaled, {}, f"another tool quantized these weights ({Q}.weight_scale_inv is stored with them)"),
        (bits_and_bytes, {}, f"another tool quantized these weights ({Q}.weight.absmax is stored with them)"),
        (adapted, {}, f"{Q}.base_layer.weight belongs to an adapter that is not merged"),
        (fused, {}, "the file has model.layers.0.self_attn.qkv_proj.weight instead"),
        (nothing, {"num_hidden_layers": 4}, "the file has 3 blocks and config.json says 4"),
        (nothing, {"num_hidden_layers": 2}, "the file has 3 blocks and config.json says 2"),
        (nothing, {"vocab_size": 100}, "its vocab_size is 100, but the table has 96 rows"),
        (nothing, {"intermediate_size": 96}, "config and weights do not belong together"),
        (lambda t: t.pop(f"{Q}.weight"), {}, f"{Q}.weight is missing (1 of 51 in all)"),
        (lambda t: t.pop(HEAD), {}, '"tie_word_embeddings": true'),
        (lambda t: t.pop(EMBEDDING), {}, f'if this model uses {HEAD} for both, set "tie_word_embeddings": true'),
        (lambda t: t.pop(EMBEDDING) + t.pop(HEAD), {}, f"{EMBEDDING} is missing (2 of 51"),
        (
            lambda t: t.pop(EMBEDDING) + t.pop(HEAD),
            {"tie_word_embeddings": True},
            "no other tensor is the model's",
        ),
        (of_type(torch.int8), {}, f"{Q}.weight is stored as I8, and weights are read only from"),
        (of_type(torch.float8_e8m0fnu), {}, f"{Q}.weight is stored as F8_E8M0"),
        (of_type(torch.float8_e4m3fnuz), {}, f"{Q}.weight is stored as F8_E4M3FNUZ"),
        (of_type(torch.complex64), {}, f"{Q}.weight is stored as C64"),
    ],
)
def test_what_does_not_fit_is_told_with_its_cause(
    change: Change, config: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert message in refusal(changed(tmp_path / "model", change, **config), monkeypatch)


def test_a_packed_checkpoint_that_lost_its_config_is_told(
    packed: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    for file in packed["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"its config\.json has lost the quantization_config"):
        Skeleton(open_source(tmp_path), torch.float32, torch.device("cpu"))


def test_a_type_that_safetensors_does_not_know_is_told(tmp_path: Path) -> None:
    folder = changed(tmp_path / "model", nothing)
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content.replace(b'"F32"', b'"Q99"', 1))
    with pytest.raises(CheckpointError, match="has a tensor type that the installed safetensors does not know"):
        open_source(folder)


def errors(report: Report) -> list[tuple[str, float]]:
    return [(linear.path, linear.weight_error) for linear in report.linears]


def narrow(kind: torch.dtype) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: part.to(kind) for name, part in tensors.items() if "_proj" in name})

    return change


def widened(kind: torch.dtype) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: part.to(kind).float() for name, part in tensors.items() if "_proj" in name})

    return change


@pytest.mark.parametrize("kind", FLOAT8)
def test_every_8_bit_float_is_read_exactly(kind: torch.dtype, tmp_path: Path) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(kind)
    every = torch.where(torch.isfinite(every.float()), every.float(), 0).to(kind)
    folder = changed(tmp_path / "model", lambda t: t.update({f"{Q}.weight": every.repeat(18).view(96, 48)}))
    read = open_source(folder).load(f"{Q}.weight")
    assert read.dtype == torch.bfloat16
    assert torch.equal(read.double(), every.repeat(18).view(96, 48).double())


@pytest.mark.parametrize("kind", FLOAT8)
@pytest.mark.parametrize("said", ["float32", "float8_e4m3fn"])
def test_8_bit_floats_quantize_as_the_same_numbers_in_more_bits(kind: torch.dtype, said: str, tmp_path: Path) -> None:
    recipe = Recipe(method="rtn", bits=8, group_size=16, dtype="float32")
    reports = []
    for name, change in (("narrow", narrow(kind)), ("wide", widened(kind))):
        folder = changed(tmp_path / name, change, dtype=said if name == "narrow" else "float32")
        reports.append(quantize(folder, tmp_path / f"{name}-packed", recipe))
        models = load_model(folder, "float32", "cpu"), load_model(tmp_path / f"{name}-packed", "float32", "cpu")
        ids = torch.arange(20).view(2, 10)
        with torch.no_grad():
            target, actual = (model(ids).logits for model in models)
        assert (actual - target).norm() < 0.1 * target.norm()
    assert errors(reports[0]) == errors(reports[1])


@pytest.mark.parametrize("kind", FLOAT8)
def test_an_8_bit_float_that_is_not_finite_is_named(kind: torch.dtype, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.weight"].view(-1)[7] = torch.nan
        narrow(kind)(tensors)

    folder = changed(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight has 1 NaN or infinite"):
        open_source(folder).load(f"{Q}.weight")


def test_doubles_quantize_as_the_same_numbers_in_fewer_bits(tmp_path: Path) -> None:
    double = changed(tmp_path / "double", lambda t: t.update({n: p.double() for n, p in t.items()}), dtype="float64")
    single = changed(tmp_path / "single", nothing)
    recipe = Recipe(method="rtn", bits=8, group_size=16)
    reports = [quantize(folder, tmp_path / f"{folder.name}-packed", recipe) for folder in (double, single)]
    assert errors(reports[0]) == errors(reports[1])
