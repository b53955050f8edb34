"""A disk that will be full is known before any work, to the byte."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from subnibble import Recipe, estimate, quantize
from subnibble.errors import OutputError

# Left free for JSON, tokenizer and headers.
SLACK = 64 * 2**20
# Embedding and head of `llama`, 96 tokens of 48 channels at 16 bits.
TABLES = 2 * 2 * 96 * 48


@pytest.mark.parametrize(("more", "again"), [
    ({}, 0),
    ({"system_prompt": "w5 w9 w2 w7"}, 0),
    ({"distill_steps": 8, "distill": {"tokens": 96}}, TABLES),
])  # fmt: skip
def test_the_disk_must_hold_what_is_estimated_and_what_distillation_writes_again(
    more: dict[str, Any],
    again: int,
    folders: dict[str, Path],
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe(
        method="rtn", bits=4, group_size=16, calibration=str(token_file), num_windows=8, window=24, device="cpu",
        dtype="float32", **more,
    )  # fmt: skip
    needed = estimate(folders["llama"], recipe).file_bytes + SLACK + again
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with pytest.raises(OutputError, match="GB are needed"):
        quantize(folders["llama"], tmp_path / "out", recipe)
    assert not list(tmp_path.iterdir())
    free.free = needed
    quantize(folders["llama"], tmp_path / "out", recipe)
