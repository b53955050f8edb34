"""A disk that will be full is known before any work, and no run takes more of it than was estimated."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from subnibble import Recipe, estimate, quantize
from subnibble.errors import OutputError
from subnibble.resume import durable, keeper, pace

# Left free for JSON, tokenizer and headers.
SLACK = 64 * 2**20
# Hidden states of all calibration windows between two blocks, float32.
STREAM = 8 * 24 * 48 * 4
# Those of a prompt of 4 tokens, float32.
PROMPT = 4 * 48 * 4
# What each recipe adds, and the streams that its journal holds at most: hidden states now and after the next block,
# those of the full-precision model, outputs of the last block before its last sites were rounded.
RECIPES = {
    "rtn": ({"method": "rtn"}, 2),
    "prompt": ({"method": "rtn", "system_prompt": "w5 w9 w2 w7"}, 2),
    "reference and norms": ({"method": "d2quant"}, 5),
    "distilled": ({"method": "rtn", "distill_steps": 8, "distill": {"tokens": 96}}, 2),
}


def recipe_of(name: str, token_file: Path) -> Recipe:
    return Recipe(
        bits=4, group_size=16, calibration=str(token_file), num_windows=8, window=24, device="cpu", dtype="float32",
        **RECIPES[name][0],
    )  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_disk_must_hold_what_is_estimated(
    name: str, folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(name, token_file)
    parts = estimate(folders["llama"], recipe).disk_bytes
    assert parts["activation streams"] == RECIPES[name][1] * STREAM + (2 * PROMPT if name == "prompt" else 0)
    assert (parts["distillation"] > 0) == (name == "distilled")
    assert parts["peak"] == parts["checkpoint"] + max(parts["activation streams"], parts["distillation"]) + SLACK
    free = SimpleNamespace(free=parts["peak"] - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with pytest.raises(OutputError, match="GB are needed"):
        quantize(folders["llama"], tmp_path / "out", recipe)
    assert not list(tmp_path.iterdir())
    free.free = parts["peak"]
    quantize(folders["llama"], tmp_path / "out", recipe)


@pytest.mark.parametrize("name", RECIPES)
def test_no_run_takes_more_disk_than_was_estimated(
    name: str, folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At every write, the new file and the one that it replaces are both there.
    recipe, sizes, plain = recipe_of(name, token_file), [], durable.sync_file
    monkeypatch.setattr(pace, "SHARE", 1e9)
    monkeypatch.setattr(keeper, "FIRST", 0.0)

    def noting(path: Path) -> None:
        plain(path)
        files = [file for file in (tmp_path / ".out.partial").rglob("*") if file.is_file()]
        sizes.append({suffix: total(files, suffix) for suffix in (".safetensors", ".tensors")})

    def total(files: list[Path], kind: str) -> int:
        return sum(file.stat().st_size for file in files if kind in file.name)

    monkeypatch.setattr(durable, "sync_file", noting)
    quantize(folders["llama"], tmp_path / "out", recipe)
    parts: dict[str, Any] = estimate(folders["llama"], recipe).disk_bytes
    most = max(each[".tensors"] for each in sizes)
    assert most <= max(parts["activation streams"], parts["distillation"])
    if name != "distilled":
        assert most == parts["activation streams"]
    # Headers of shards come out of the slack.
    headers = 2**16
    assert max(sum(each.values()) for each in sizes) <= parts["peak"] - SLACK + headers


def test_what_an_unfinished_run_has_written_counts_as_free(
    folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("rtn", token_file)

    def stop(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("subnibble.pipeline.driver.write_config", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(folders["llama"], tmp_path / "out", recipe)
    written = sum(file.stat().st_size for file in (tmp_path / ".out.partial").rglob("*") if file.is_file())
    needed = estimate(folders["llama"], recipe).disk_bytes["peak"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - written))
    quantize(folders["llama"], tmp_path / "out", recipe, resume="must")
