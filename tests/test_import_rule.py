"""The dependency rule of the architecture, over every import of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import subnibble

ROOT = Path(subnibble.__file__).parent
# A module may import from its own rank and below.
RANK = {
    "errors": 0, "version": 0, "progress": 0, "paths": 0, "text_file": 0, "arguments": 0, "device": 0,
    "kernels": 0, "resume": 0,
    "tensor": 1, "arch": 1, "packaged": 1,
    "runtime": 2,
    "checkpoint": 3, "model": 3,
    "calibrate": 5,
    "transforms": 6, "rounding": 6, "corrections": 6,
    "tuning": 7, "report": 7,
    "distill": 8, "recipe": 8, "methods": 8, "presets": 8, "hf": 8,
    "generate": 9,
    "pipeline": 10,
    "export": 11, "conversion": 11,
    "evaluation": 12,
    "cli": 13,
    "__main__": 14,
}  # fmt: skip


# What runtime/ may import: it runs without the rest of the package.
BELOW_RUNTIME = {"errors", "kernels", "tensor", "runtime"}


def imports_of(file: Path) -> set[str]:
    result = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("subnibble"):
            parts = (node.module or "").split(".")
            result |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            result |= {a.name.split(".")[1] for a in node.names if a.name.startswith("subnibble.")}
    return result


def modules_of(file: Path) -> set[str]:
    """Modules of the package that a file imports, in functions or not, those that only types need left out."""
    result = set()
    tree = ast.parse(file.read_text())
    typed = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {inner for node in typed for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("subnibble.") and node not in skipped:
            module = str(node.module)
            inner = [f"{module}.{alias.name}" for alias in node.names]
            result |= {name if is_module(name) else module for name in inner}
    return result


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one found; empty if there is none."""
    state: dict[str, str] = {}
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if state.get(name) == "open":
            return path[path.index(name) :]
        if name in state:
            return []
        state[name] = "open"
        path.append(name)
        for other in sorted(imports.get(name, ())):
            if result := visit(other):
                return result
        path.pop()
        state[name] = "done"
        return []

    for name in sorted(imports):
        if result := visit(name):
            return result
    return []


def violations(files: dict[str, set[str]]) -> list[str]:
    wrong = []
    for name, imports in files.items():
        for other in imports:
            if RANK[other] > RANK[name] or (name == "runtime" and other not in BELOW_RUNTIME):
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


def test_no_modules_import_each_other_in_a_circle() -> None:
    imports = {}
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        imports[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = modules_of(file)
    assert sum(map(len, imports.values())) > 500
    # Importing the package registers the plug-in, once it is asked for; see its docstring.
    del imports["subnibble"]
    assert circle(imports) == []


def test_the_search_finds_a_planted_circle() -> None:
    assert circle({"a": {"b"}, "b": {"c", "d"}, "d": {"b"}}) == ["b", "d"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []
