"""The kernel bench refuses wrong products, and shows what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
import model_speed
from peers import auto_round, ggml, onnxruntime_ops, ours, torch_ops
from peers.build import FOLDER, IK_PRODUCTS, LLAMA_PRODUCTS
from peers.checking import wrong
from peers.product import FLOAT32, Method, Missing, Tolerance, symmetric
from rows import Rows

DOCS = Path(__file__).parent.parent / "docs" / "performance.md"
ADAPTERS = {
    "torch": torch_ops.methods,
    "ours": ours.methods,
    "ours, 8-bit inputs": lambda: ours.methods(8),
    "onnxruntime": onnxruntime_ops.methods,
    "auto-round": auto_round.methods,
    "llama.cpp": lambda: ggml.methods(LLAMA_PRODUCTS, FOLDER),
    "ik_llama.cpp": lambda: ggml.methods(IK_PRODUCTS, FOLDER),
}


def methods_of(adapter: str) -> list[Method]:
    try:
        return ADAPTERS[adapter]()
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_method_multiplies_what_its_codes_stand_for(adapter: str) -> None:
    torch.manual_seed(0)
    dense = torch.randn(64, 512)
    for method in methods_of(adapter):
        weight = method.make(dense, lambda bits: 2)
        assert weight.copies == 2
        assert method.bits <= weight.bits <= method.bits + 1
        assert torch.corrcoef(torch.stack((weight.dense.flatten(), dense.flatten())))[0, 1] > 0.5
        for tokens, copies in ((1, 2), (3, 1), (20, 2)):
            x = torch.randn(tokens, 512)
            assert wrong(weight.inputs(x), weight.dense, weight.bind(x, copies)(), weight.tolerance) is None


def test_onnxruntime_multiplies_every_copy() -> None:
    weight = next(iter(methods_of("onnxruntime"))).make(torch.randn(16, 128), lambda bits: 3)
    outputs = weight.session.get_outputs()  # type: ignore[attr-defined]
    results = weight.session.run(None, {"x": torch.randn(1, 128).numpy()})  # type: ignore[attr-defined]
    assert len(outputs) == 3
    assert (results[0] != results[1]).any()
    assert (results[1] != results[2]).any()


FAULTS = ("scale", "code", "output", "rows", "nan", "shape")


def spoiled(y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, fault: str) -> torch.Tensor:
    if fault == "scale":
        dense[5, 128:256] *= 1.02
    if fault == "code":
        dense[7, 3] += dense.abs().max() / 7
    y = x @ dense.T
    if fault == "output":
        y[2, 11] *= 1.05
    if fault == "rows":
        y[:, [3, 4]] = y[:, [4, 3]]
    if fault == "nan":
        y[0, 0] = float("nan")
    return y[:, 1:] if fault == "shape" else y


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_product_is_refused(fault: str) -> None:
    torch.manual_seed(1)
    x, codes = torch.randn(24, 256), symmetric(torch.randn(32, 256), 4)
    right = x @ codes.dense().T
    assert wrong(x, codes.dense(), right, Tolerance()) is None
    assert wrong(x, codes.dense(), spoiled(right, x, codes.dense(), fault), Tolerance()) is not None


@pytest.mark.parametrize("block", [32, 100, -1])
def test_inputs_of_8_bits_are_within_their_bound_and_of_6_bits_are_not(block: int) -> None:
    torch.manual_seed(2)
    x, w = torch.randn(32, 256), torch.randn(512, 256)
    width = 256 if block == -1 else block
    parts = torch.nn.functional.pad(x, (0, -256 % width)).view(32, -1, width)
    for bits, accepted in ((8, True), (6, False)):
        step = parts.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        rounded = ((parts / step).round() * step).view(32, -1)[:, :256]
        assert (wrong(x, w, rounded @ w.T, Tolerance(block=block)) is None) == accepted
    assert wrong(x, w, x @ w.T, Tolerance(block=block, output=FLOAT32)) is None


def row(**changes: Any) -> dict[str, Any]:
    return {
        "shape": "64x32", "tokens": 1, "threads": 1, "cpu": "a CPU", "instructions": "avx2", "commit": "abc",
        "limits": {"read, GB/s": 10.0, "int8, GOP/s": 100.0, "float32, GFLOP/s": 50.0},
        "bits": {"peer": [4, 4.5], "slower": [4, 4.0], "subnibble w4": [4, 4.25], "wide": [32, 32]},
        "microseconds": {
            "peer": [3.0, 2.0, 6.0], "slower": [9.0, 9.0, 9.0], "subnibble w4": [2.0, 1.0, 2.0], "wide": [7.0] * 3,
        },
        **changes,
    }  # fmt: skip


def test_a_ratio_is_the_median_of_rounds_against_the_best_peer_of_the_same_bits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    kernels.show([row(), row(tokens=16)])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(" | ")[0] for line in lines if line.startswith("| ")]
    assert names == ["| method", "| subnibble w4", "| peer", "| slower", "| wide"]
    ours_line = next(line for line in lines if "subnibble" in line)
    # 64 x 32 weights of 4.25 bits in 1 us are 1.088 GB/s of 10; 16 tokens' 65,536 operations 65.5 GOP/s of 100.
    assert ours_line == "| subnibble w4 | 4.25 | 1 (2.00) | 1 (2.00) | 11 % | 66 % |"


def test_each_row_is_measured_once(tmp_path: Path) -> None:
    table = Rows(tmp_path / "kernels.json", kernels.KEY)
    table.append(row())
    assert table.has(row(commit="other"))
    assert not table.has(row(tokens=4))
    assert not table.has(row(instructions="avx2 avx512f"))


@pytest.mark.parametrize("name", ["kernels", "model_speed"])
def test_docs_show_the_tables_of_finished_rows(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    bench = {"kernels": kernels, "model_speed": model_speed}[name]
    bench.show(Rows(bench.HERE / "results" / f"{name}.json", bench.KEY).rows)
    assert capsys.readouterr().out in DOCS.read_text()
