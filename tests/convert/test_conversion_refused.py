"""What cannot be converted exactly is refused by name; planted faults are found; the command and its report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_folders import Grid, Quantized, Tensors, gptq_parts, same_weights, write_ct, write_gptq
from safetensors.torch import load_file

import subnibble
from conftest import Run
from subnibble.conversion import grouped
from subnibble.errors import CheckpointError, NotSame, OutputError, SubnibbleError, UnsupportedModel
from subnibble.hf.loading import load_model
from subnibble.tensor.packed import PackedRange, QuantizedMatrix
from subnibble.tensor.scheme import Scheme

DOWN = "model.layers.1.mlp.down_proj"
QKV = "model.layers.0.self_attn.q_proj"


def refuses(folder: Path, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        subnibble.convert(folder, folder.with_name("out"))
    assert not folder.with_name("out").exists()


def spoiled(key: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Tensors], None]:
    """Change one tensor, or leave it out."""

    def spoil(tensors: Tensors) -> None:
        new = change(tensors.pop(key))
        if new is not None:
            tensors[key] = new

    return spoil


@pytest.mark.parametrize(
    ("settings", "kind", "match"),
    [
        ({"quant_method": "awq"}, UnsupportedModel, "quantized as 'awq'; formats that can be converted: gptq, comp"),
        ({"checkpoint_format": "marlin"}, UnsupportedModel, "checkpoint_format is 'marlin'"),
        ({"bits": 5}, UnsupportedModel, "have 5 bits, and only 2, 3, 4, 8"),
        ({"bits": 4, "group_size": 32}, CheckpointError, r"qzeros is I32 of shape \(3, .*of shape \(2, "),
        ({"group_size": 0}, CheckpointError, "the group_size of model.layers.0.self_attn.q_proj is 0"),
        ({"bits": 8}, CheckpointError, r"qweight is I32 of shape \(6, 96\), and gptq stores I32 of shape \(12, 96\)"),
        ({"sym": True}, CheckpointError, "is symmetric by its config, but has zero-points other than 8"),
    ],
)  # fmt: skip
def test_settings_of_gptq_that_do_not_fit(
    settings: dict[str, Any], kind: type[Exception], match: str, tmp_path: Path
) -> None:
    write_gptq(tmp_path / "in", "llama", Grid(4), settings=settings)
    refuses(tmp_path / "in", kind, match)


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"settings": {"format": "int-quantized"}}, UnsupportedModel, "have the format 'int-quantized'"),
        ({"settings": {"kv_cache_scheme": {"num_bits": 8}}}, UnsupportedModel, "has kv_cache_scheme, which changes"),
        ({"settings": {"transform_config": {"u": 1}}}, UnsupportedModel, "has transform_config, which changes"),
        ({"settings": {"config_groups": None}}, CheckpointError, "has no config_groups"),
        ({"of_group": {"input_activations": {"num_bits": 8}}}, UnsupportedModel, "has input_activations, which"),
        ({"of_group": {"targets": ["re:.*q_proj"]}}, CheckpointError, "no config_group has it among its targets"),
        ({"weights": {"num_bits": 6}}, UnsupportedModel, "have 6 bits"),
        ({"weights": {"type": "float"}}, UnsupportedModel, "only integers with the strategy group, channel or tensor"),
        ({"weights": {"strategy": "block"}}, UnsupportedModel, "'strategy': 'block'"),
        ({"weights": {"symmetric": True, "num_bits": 8}}, CheckpointError, "weight_packed is I32 of shape"),
        ({"spoil": spoiled(f"{DOWN}.weight_zero_point", lambda t: None)}, CheckpointError, "zero_point is missing"),
        ({"spoil": spoiled(f"{DOWN}.weight_scale", lambda t: None)}, CheckpointError, "weight_scale is missing"),
        ({"spoil": spoiled(f"{DOWN}.weight_shape", lambda t: t[:1])}, CheckpointError, "weight_shape is"),
        ({"spoil": spoiled(f"{DOWN}.weight_scale", lambda t: t * torch.nan)}, CheckpointError, "has .* NaN or inf"),
    ],
)  # fmt: skip
def test_folders_of_compressed_tensors_that_do_not_fit(
    changes: dict[str, Any], kind: type[Exception], match: str, tmp_path: Path
) -> None:
    write_ct(tmp_path / "in", "llama", Grid(4), **changes)
    refuses(tmp_path / "in", kind, match)


@pytest.mark.parametrize(
    ("key", "change", "match"),
    [
        (f"{DOWN}.qweight", lambda t: t[:-1], "qweight is I32 of shape"),
        (f"{DOWN}.qweight", lambda t: t.long(), "qweight is I64"),
        (f"{DOWN}.scales", lambda t: t[:, :-1], "scales is F16 of shape"),
        (f"{DOWN}.scales", lambda t: None, f"{DOWN}.scales is missing"),
        (f"{DOWN}.g_idx", lambda t: t[:-1], r"qweight is I32|has shape \(48, 79\)"),
        (f"{DOWN}.g_idx", lambda t: t + 1, f"{DOWN}.g_idx names group 5, and there are 5 groups"),
        (f"{DOWN}.g_idx", lambda t: t // 2, "its g_idx puts 32 columns into group 0, and groups of 16 are expected"),
        (f"{QKV}.qweight", lambda t: None, f"{QKV}.(qzeros|scales|g_idx|weight)"),
    ],
)  # fmt: skip
def test_tensors_of_gptq_that_do_not_fit(key: str, change: Any, match: str, tmp_path: Path) -> None:
    write_gptq(tmp_path / "in", "llama", Grid(4, orders="own"), spoil=spoiled(key, change))
    refuses(tmp_path / "in", CheckpointError, match)


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    write_gptq(tmp_path / "in", "llama", Grid(4))
    file = tmp_path / "in" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuses(tmp_path / "in", CheckpointError, "model.safetensors is truncated")


@pytest.mark.parametrize(
    ("key", "change"),
    [
        # A zero-point one higher; two columns of two groups exchanged; two codes exchanged.
        (f"{DOWN}.qzeros", lambda t: t + 1),
        (f"{DOWN}.g_idx", lambda t: t[torch.tensor([79, *range(1, 79), 0])]),
        (f"{DOWN}.qweight", lambda t: torch.cat([t[1:2], t[:1], t[2:]])),
    ],
)
def test_planted_faults_change_the_weights(key: str, change: Any, tmp_path: Path) -> None:
    original = write_gptq(tmp_path / "in", "llama", Grid(4), 2, spoil=spoiled(key, change))
    subnibble.convert(tmp_path / "in", tmp_path / "out")
    assert not same_weights(original, load_model(tmp_path / "out", "float32"))


def test_a_fault_in_packing_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Faulty(PackedRange):
        @classmethod
        def pack(cls, quantized: QuantizedMatrix, scheme: Scheme) -> PackedRange:
            quantized.codes[0, 0] ^= 1
            return PackedRange.pack(quantized, scheme)

    write_gptq(tmp_path / "in", "llama", Grid(4))
    monkeypatch.setattr(grouped, "PackedRange", Faulty)
    refuses(tmp_path / "in", NotSame, f"{QKV}: a packed weight differs by")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_that_format_gptq_cannot_store(bits: int, tmp_path: Path) -> None:
    """Tools other than GPTQModel lose them; GPTQModel subtracts from whole words, and at 3 bits from each field."""
    grid = Grid(bits)

    def parts(q: Quantized) -> dict[str, np.ndarray]:
        q.zeros[3, :] = 0
        stored = gptq_parts(q, grid, (q.zeros - 1) % 2**bits)
        if bits != 3:
            stored["qzeros"] = gptq_parts(q, grid, q.zeros)["qzeros"] - np.int32(
                sum(1 << shift for shift in range(0, 32, bits))
            )
        return stored

    write_gptq(tmp_path / "a" / "in", "llama", grid, parts=parts)
    refuses(tmp_path / "a" / "in", CheckpointError, f"qzeros stores a zero-point as {2**bits - 1}")
    meta = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    original = write_gptq(tmp_path / "b" / "in", "llama", grid, parts=parts, settings=meta)
    subnibble.convert(tmp_path / "b" / "in", tmp_path / "b" / "out")
    assert same_weights(original, load_model(tmp_path / "b" / "out", "float32"))


def test_linears_without_quantization_and_rules_for_single_ones(tmp_path: Path) -> None:
    of_this = {"bits": 4, "group_size": 16}
    rules = {"-:.*gate_proj": {}, ".*down_proj": of_this, "+:model.*": of_this}
    settings = {"bits": 8, "group_size": 64, "dynamic": rules}
    original = write_gptq(tmp_path / "in", "qwen2", Grid(4), settings=settings, but=("gate_proj",))
    subnibble.convert(tmp_path / "in", tmp_path / "out")
    assert same_weights(original, load_model(tmp_path / "out", "float32"))


def test_biases_that_the_model_does_not_have(tmp_path: Path) -> None:
    """Old tools gave a zero bias to each linear; any other one changes the model."""
    for value, name in ((0.0, "a"), (0.5, "b")):
        write_gptq(
            tmp_path / name / "in", "mistral", Grid(4),
            spoil=lambda tensors, value=value: tensors.update({f"{DOWN}.bias": torch.full((48,), value)}),
        )  # fmt: skip
    subnibble.convert(tmp_path / "a" / "in", tmp_path / "a" / "out")
    assert f"{DOWN}.bias" not in load_file(tmp_path / "a" / "out" / "model-00002-of-00003.safetensors")
    refuses(tmp_path / "b" / "in", CheckpointError, f"tensor {DOWN}.bias .* has no place in a mistral model")


def test_models_that_are_not_quantized_by_another_tool(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not quantized by its config; `subnibble quantize` quantizes it"):
        subnibble.convert(folders["llama"], tmp_path / "out")
    write_gptq(tmp_path / "in", "llama", Grid(4))
    subnibble.convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a subnibble checkpoint already"):
        subnibble.convert(tmp_path / "out", tmp_path / "again")


def test_out_is_refused_as_by_quantize(tmp_path: Path) -> None:
    write_gptq(tmp_path / "in", "llama", Grid(4))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            subnibble.convert(tmp_path / "in", out, overwrite=overwrite)
    assert (out / "mine.txt").read_text() == "keep"
    with pytest.raises(SubnibbleError):
        subnibble.convert(tmp_path / "in", tmp_path / "in", overwrite=True)


def test_the_command_says_what_it_kept(run: Run, tmp_path: Path) -> None:
    write_gptq(tmp_path / "in", "llama", Grid(3, orders="shared"))
    (tmp_path / "in" / "generation_config.json").write_text('{"eos_token_id": 7}')
    code, out, err = run("convert", tmp_path / "in", tmp_path / "out")
    assert (code, "14 of 14 matrices equal the original's bit for bit" in out) == (0, True), err
    assert "convert from gptq, w3g16" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["method"] == "convert from gptq"
    assert f"{report['size']['effective_bits']:.3f} effective bits" in out
    assert {linear["weight_error"] for linear in report["linears"]} == {0.0}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 7
    assert run("convert", tmp_path / "in", tmp_path / "out")[0] == 2
    assert run("convert", tmp_path / "in", tmp_path / "out", "--overwrite")[0] == 0
    code, out, _ = run("inspect", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["effective_bits"] == report["size"]["effective_bits"]
