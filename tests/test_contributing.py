"""The programs of CONTRIBUTING.md run, and show what the text says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def run(having: str) -> dict[str, Any]:
    """The names that the one program with `having` in it defines."""
    (program,) = [text for text in PROGRAMS if having in text]
    names: dict[str, Any] = {"__name__": __name__}
    exec(program, names)
    return names


def test_gptq_on_one_weight_beats_rounding_to_nearest() -> None:
    names = run("output_error")
    assert names["gptq"] < 0.7 * names["rtn"]


def test_the_example_of_a_method_builds_its_steps() -> None:
    method = run("DAMPED")["DAMPED"]
    assert method.steps({}).rounder_of("attention_in").damping == 0.1
    assert method.steps({"damping": 0.2}).rounder_of("attention_in").damping == 0.2
