"""The recipe as it is kept: files by their full names, words as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from subnibble import Recipe
from subnibble.methods.rtn import Options
from subnibble.pipeline.resolved_recipe import resolved_recipe


@pytest.mark.parametrize("calibration", ["news", "c4", "wikitext2", "self"])
@pytest.mark.parametrize("prompt", ["auto", "default", "bos"])
def test_words_are_no_files_even_if_there_are_files_of_their_names(
    calibration: str, prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (calibration, prompt, "mine"):
        Path(name).write_text("text")
    kept = resolved_recipe(
        Recipe(calibration=calibration, system_prompt=prompt), Options(), torch.device("cpu"), torch.half
    )
    assert (kept.calibration, kept.system_prompt) == (calibration, prompt)
    kept = resolved_recipe(Recipe(calibration="mine", system_prompt="mine"), Options(), torch.device("cpu"), torch.half)
    assert kept.calibration == kept.system_prompt == str(tmp_path / "mine")
