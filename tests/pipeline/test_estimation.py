"""Estimates follow what quantizing holds and does; what both refuse is in `test_check.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from subnibble import Recipe, quantize
from subnibble.errors import SubnibbleError
from subnibble.pipeline import estimate as estimation
from subnibble.pipeline.passage import Passage


@pytest.fixture
def recipe(token_file: Path) -> Recipe:
    return Recipe(
        method="gptq", bits=3, group_size=16, calibration=str(token_file), num_windows=4, window=32, device="cpu",
    )  # fmt: skip


# With which methods, and what of them, a checkpoint holds more than codes.
COUNTED: dict[str, dict[str, Any]] = {
    "norm biases": {"method": "d2quant"},
    "norm biases of some blocks": {"method": "d2quant", "overrides": {r"re:model\.layers\.1\.": {"skip": True}}},
    "column scales of output projections": {"method": "d2quant-plus"},
    "column scales of a reader left alone": {"method": "d2quant-plus", "overrides": {"re:.*up_proj": {"skip": True}}},
    "gathers": {"method": "serq", "options": {"rank": 16}},
    "none": {"method": "serq", "options": {"rank": 16, "permutation": "offline"}},
    "gathers where a reader was left alone": {
        "method": "serq",
        "options": {"rank": 16, "permutation": "offline"},
        "overrides": {"re:.*down_proj": {"skip": True}},
    },
    "no order": {"method": "serq", "options": {"rank": 0, "saliency": "none"}},
    "outliers": {"method": "atom", "options": {"outliers": 16}},
    "factors": {"method": "qera", "options": {"rank": 8}},
    "remainders that run again": {"method": "serq-plus", "options": {"rank": 16}},
    "inputs of some linears": {"method": "rtn", "overrides": {"re:.*mlp": {"activation_bits": 8}}},
    "online transforms": {"method": "quarot", "options": {"rotation": "groups"}},
}


@pytest.mark.each_value
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2-untied"])
@pytest.mark.parametrize("case", COUNTED)
def test_sizes_are_those_of_what_is_written(
    case: str, name: str, recipe: Recipe, short: dict[str, Path], tmp_path: Path
) -> None:
    chosen = replace(recipe, activation_bits=16 if case.startswith(("norm", "column")) else 4, **COUNTED[case])
    report, result = quantize(short[name], tmp_path / "out", chosen), estimation.estimate(short[name], chosen)
    assert report.size["effective_bits"] == pytest.approx(result.effective_bits, rel=1e-12)
    assert report.size["activation_bits"] == pytest.approx(result.activation_bits, rel=1e-12)
    tensors = [tensor for file in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(file).values()]
    assert sum(tensor.nbytes for tensor in tensors) == result.file_bytes


@pytest.mark.parametrize(
    "wrong", [{"method": "nope"}, {"options": {"bogus": 1}}, {"method": "bisup", "num_windows": 1}], ids=str
)
def test_what_no_model_would_change_is_known_before_one_is_fetched(
    wrong: dict[str, Any], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subnibble.checkpoint.opening.download", lambda name: pytest.fail(f"{name} was fetched"))
    with pytest.raises(SubnibbleError):
        estimation.estimate("owner/name", replace(recipe, **wrong))
    with pytest.raises(SubnibbleError):
        quantize("owner/name", tmp_path / "out", replace(recipe, **wrong))


@pytest.mark.parametrize(("method", "streams"), [("gptq", 1), ("gptaq", 2)])
def test_activation_streams_are_what_a_run_holds(
    method: str, streams: int, recipe: Recipe, short: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    advance = Passage.advance

    def record(run: Passage) -> None:
        result = [run.streams.hidden] + ([] if run.reference is None else [list(run.reference.outputs())])
        held.append(sum(batch.nbytes for stream in result for batch in stream))
        assert len(result) == streams
        advance(run)

    monkeypatch.setattr(Passage, "advance", record)
    for windows in (4, 8):
        chosen = replace(recipe, method=method, num_windows=windows)
        quantize(short["llama"], tmp_path / f"{windows}", chosen)
        result = estimation.estimate(short["llama"], chosen).memory_bytes
        # Between a block's sites the inputs of its output and down projections are kept, too, beside 48 channels.
        assert result["activation streams"] == max(held) * (48 + 96 + 80) // 48
        assert result["peak"] == sum(size for part, size in result.items() if part != "peak")
    assert held[-1] == 2 * held[0]


def test_time_grows_with_tokens_steps_and_slowness(
    recipe: Recipe, short: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = 1e6

    def seconds(**changes: Any) -> float:
        monkeypatch.setattr(estimation, "_product_speed", lambda *_: speed)
        return estimation.estimate(short["llama"], replace(recipe, **changes)).seconds

    one, two, three = (seconds(num_windows=n) for n in (4, 8, 12))
    assert one > 0
    assert two - one == pytest.approx(three - two)
    # Rounding does not depend on tokens, all else does.
    assert two - one > 0.9 * one
    assert seconds(method="gptaq") > 1.3 * one
    assert seconds(distill_steps=20) - one == pytest.approx((seconds(distill_steps=40) - one) / 2, rel=0.2)
    speed /= 2
    assert seconds() == pytest.approx(2 * one, rel=0.1)


def test_statistics_are_as_large_as_the_widest_input(recipe: Recipe, short: dict[str, Path]) -> None:
    def statistics(method: str) -> int:
        return estimation.estimate(short["llama"], replace(recipe, method=method)).memory_bytes["statistics"]

    # The Gram matrix of 96 channels (6 heads of 16), at least, and with it a drift of the same size.
    matrix = 96 * 96 * torch.float32.itemsize
    assert statistics("gptq") >= matrix
    assert statistics("gptaq") - statistics("gptq") == matrix
    without = estimation.estimate(short["llama"], replace(recipe, method="rtn", calibration=None))
    assert without.memory_bytes["statistics"] == 0
