"""A small quantization to interrupt, and the comparison of what it wrote with an undisturbed run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from crashes import bytes_of

from subnibble import Recipe, quantize
from subnibble.resume import keeper, pace
from subnibble.resume.journal import Journal
from subnibble.resume.places import work_folders

# What each recipe adds; together they record every kind of step.
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "calibration": None},
    "gptq": {"method": "gptq"},
    "windows of the model": {"method": "gptq", "calibration": "self"},
    "prompt, shift, distilled": {
        "method": "d2quant-plus", "distill_steps": 5, "distill": {"tokens": 96}, "system_prompt": "w5 w9 w2",
    },
    "one order of the residual stream": {
        "method": "serq-plus", "activation_bits": 4, "options": {"permutation": "offline", "rank": 16},
    },
    "tuned, prompt, cache": {
        "method": "bisup", "activation_bits": 4, "kv_bits": 4, "system_prompt": "w5 w9", "options": {"effort": "fast"},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Resumable:
    """A quantization that can be run again and again. model: the model's folder."""

    model: Path
    recipe: Recipe

    def run(self, out: Path, **named: Any) -> None:
        quantize(self.model, out, self.recipe, **named)


def saves_always(patch: pytest.MonkeyPatch) -> None:
    """Save after every step, whatever it costs: the steps of tiny models take less time than a save."""
    patch.setattr(pace, "SHARE", 1e9)
    patch.setattr(keeper, "FIRST", 0.0)


def comparable(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All files of a checkpoint, and its report without times and peak memory."""
    files = bytes_of(folder)
    report = json.loads(files.pop("report.json"))
    for key in ("seconds", "peak_memory"):
        report.pop(key)
    for linear in report["linears"]:
        linear.pop("seconds")
    return files, report


def recorded(out: Path) -> list[str]:
    """Names of the steps in the journal of the unfinished run on `out`."""
    for folder in work_folders(out):
        journal = Journal.read(folder)
        if journal is not None:
            return list(journal.steps)
    return []
