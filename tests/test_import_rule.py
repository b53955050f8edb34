"""The dependency rule of the architecture, over every import of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import subnibble

ROOT = Path(subnibble.__file__).parent
# A module may import from its own rank and below.
RANK = {
    "errors": 0, "version": 0, "progress": 0,
    "scheme": 1, "cache_scheme": 1, "tensor": 1, "mxfp4": 1, "device": 1,
    "runtime": 2,
    "checkpoint": 3, "model": 3, "calibrate": 3,
    "transforms": 4, "rounding": 4, "corrections": 4, "tuning": 4,
    "recipe": 5, "methods": 5,
    "pipeline": 6, "filled_in": 6, "plan": 6, "resolve": 6, "block_run": 6, "block_tuning": 6, "streams": 6, "stack": 6,
    "block_transforms": 6, "after_blocks": 6, "prompt": 6, "evaluate": 6, "report": 6, "distill": 6,
    "distill_checkpoint": 6,
    "cli": 7, "hf": 7, "hf_cache": 7, "hf_attention": 7, "prefix": 7, "compare": 7,
    "evaluation": 7, "estimate": 7, "fold": 7, "speak": 7,
}  # fmt: skip


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("subnibble"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("subnibble.")}
    return found


def violations(files: dict[str, set[str]]) -> list[str]:
    wrong = []
    for name, imports in files.items():
        for other in imports:
            if RANK[other] > RANK[name] or (
                name == "runtime" and other not in {"errors", "scheme", "cache_scheme", "tensor", "mxfp4", "runtime"}
            ):
                wrong.append(f"{name} imports {other}")
    return wrong


def test_imports_follow_the_dependency_rule() -> None:
    files: dict[str, set[str]] = {}
    for file in ROOT.rglob("*.py"):
        name = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if name != "__init__":
            files.setdefault(name, set()).update(imports_of(file))
    assert set(files) == set(RANK)
    assert violations(files) == []


def test_the_rule_finds_a_planted_violation() -> None:
    assert violations({"tensor": {"pipeline"}}) == ["tensor imports pipeline"]
    assert violations({"runtime": {"errors", "version"}}) == ["runtime imports version"]
