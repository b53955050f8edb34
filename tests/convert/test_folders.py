"""Folders of GPTQ and compressed-tensors become packed models of the same weights and logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_folders import (
    Grid,
    Quantized,
    ct_parts,
    gapped_words,
    logits_of,
    packed_words,
    same_weights,
    write_ct,
    write_gptq,
)

import subnibble
from subnibble.conversion.convert import DIFFERENCE
from subnibble.hf.loading import load_model
from subnibble.kernels.native import chosen
from subnibble.report import Report

Write = Callable[..., Any]
FLIP = "model.layers.1.mlp.down_proj"


def converted(folder: Path) -> tuple[Any, Report, dict[str, Any]]:
    """The packed model, the report and the modules of its config."""
    out = folder.with_name("out")
    report = subnibble.convert(folder, out)
    modules = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    return load_model(out, "float32"), report, modules


def scheme_of(folder: Path, modules: dict[str, Any], path: str = FLIP) -> dict[str, Any]:
    config = json.loads((folder.with_name("out") / "config.json").read_text())["quantization_config"]
    return config["schemes"][modules[path]["ranges"][0][1]]


def check(original: Any, folder: Path, exact_logits: bool = True) -> dict[str, Any]:
    """Convert and compare; gives the modules of the config."""
    packed, report, modules = converted(folder)
    assert same_weights(original, packed)
    assert {linear.notes[DIFFERENCE] for linear in report.linears} == {0.0}
    with chosen("torch"):
        logits = logits_of(packed)
    if exact_logits:
        # The same float32 products in the same order.
        assert torch.equal(logits, logits_of(original))
    else:
        torch.testing.assert_close(logits, logits_of(original), rtol=1e-4, atol=1e-4)
    return modules


@pytest.mark.parametrize(
    ("name", "grid", "version"),
    [
        ("llama", Grid(4, symmetric=True), 1),
        ("qwen2", Grid(3), 1),
        ("mistral", Grid(2), 2),
        ("qwen3", Grid(8, symmetric=True), 2),
        ("llama-tied", Grid(3, symmetric=True, group=10**6), 1),
    ],
)
def test_a_gptq_folder_keeps_its_weights(name: str, grid: Grid, version: int, tmp_path: Path) -> None:
    whole = {"group_size": -1} if grid.group == 10**6 else {}
    original = write_gptq(tmp_path / "in", name, grid, version, settings=whole)
    modules = check(original, tmp_path / "in")
    scheme = scheme_of(tmp_path / "in", modules)
    assert scheme["zero_point"] == ("none" if grid.symmetric else "integer")
    assert (scheme["bits"], scheme["scale_type"]) == (grid.bits, "float16")
    assert not any("gather" in entry for entry in modules.values())


@pytest.mark.parametrize("write", [write_gptq, write_ct])
@pytest.mark.parametrize(("name", "orders"), [("llama", "shared"), ("qwen2", "own")])
def test_inputs_in_any_order_keep_their_weights(write: Write, name: str, orders: str, tmp_path: Path) -> None:
    original = write(tmp_path / "in", name, Grid(4, orders=orders))
    modules = check(original, tmp_path / "in", exact_logits=False)
    attention = "model.layers.0.self_attn"
    assert modules[f"{attention}.q_proj"]["gather"] is True
    assert modules[f"{attention}.v_proj"].get("input") == (f"{attention}.q_proj" if orders == "shared" else None)


@pytest.mark.parametrize(
    ("name", "grid", "pack"),
    [
        ("llama", Grid(4, symmetric=True), packed_words),
        ("qwen2", Grid(3, scale_type=np.dtype(np.float32)), packed_words),
        ("mistral", Grid(2), packed_words),
        ("qwen3", Grid(8), gapped_words),
    ],
)
def test_a_compressed_tensors_folder_keeps_its_weights(name: str, grid: Grid, pack: Any, tmp_path: Path) -> None:
    original = write_ct(tmp_path / "in", name, grid, pack=pack)
    modules = check(original, tmp_path / "in")
    assert scheme_of(tmp_path / "in", modules)["zero_point"] == ("none" if grid.symmetric else "integer")


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_one_scale_per_row_or_per_matrix(strategy: str, tmp_path: Path) -> None:
    grid = Grid(4, symmetric=True, group=10**6)

    def parts(q: Quantized) -> dict[str, np.ndarray]:
        if strategy == "channel":
            return ct_parts(q, grid, packed_words)
        q.scales[:] = q.scales.max()
        return ct_parts(q, grid, packed_words) | {"weight_scale": q.scales[0]}

    weights = {"strategy": strategy, "group_size": None}
    check(write_ct(tmp_path / "in", "llama", grid, weights=weights, parts=parts), tmp_path / "in")


def test_three_bits_of_old_compressed_tensors(tmp_path: Path) -> None:
    from subnibble.conversion.compressed_tensors import _unpacked

    values = np.random.default_rng(0).integers(0, 8, (5, 192))
    for pack, words in ((packed_words, 18), (gapped_words, 20)):
        stored = torch.from_numpy(pack(values, 3))
        assert stored.shape[1] == words
        assert np.array_equal(_unpacked(stored, 3, 192).numpy(), values)
