"""Quantize toy models by a commit and by this tree, in one run on one machine, and say where the contents differ.

    python -m golden --base COMMIT [--only NAME] [--expect NAME] [--within NAME=1e-6] [--within NAME=2ulp]

Exit code 1 on any difference that was not expected, and where a recipe fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from golden import content
from golden.compare import Comparison, Tolerance, compare
from golden.models import write_models
from golden.recipes import RECIPES, RENAMES, Rename, recipe_of, translated

ROOT = Path(__file__).parent.parent
# Equal on both sides; what is not here is inherited by both. COMPATIBLE: results of MKL do not depend on where
# in memory a matrix begins, which a refactor may move.
SETTINGS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
DEFAULTS = {"MKL_CBWR": "COMPATIBLE"}


@dataclass(frozen=True)
class Row:
    """One recipe's line of the table. wrong: whether it makes the run fail."""

    name: str
    text: str
    wrong: bool


def main() -> int:
    """The command; its exit code."""
    given = _arguments()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="golden-") as made:
        folder = Path(made)
        base = check_out(given.base, folder / "base")
        models = write_models(folder / "models")
        names = given.only or list(RECIPES)
        recipes = {name: recipe_of(RECIPES[name], models[RECIPES[name].model]) for name in names}
        old = {name: translated(recipe, unknown_renames(base)) for name, recipe in recipes.items()}
        print(f"{given.base} against the tree in {ROOT}, {len(names)} recipes; torch {torch.__version__}, "
              f"{torch.backends.cpu.get_cpu_capability()}, one thread a side")  # fmt: skip
        rows, times = [], []
        sides = {"old": (base, old), "new": (ROOT, recipes)}
        for side, (tree, keys) in sides.items():
            jobs = {name: {"model": str(models[RECIPES[name].model]), "recipe": keys[name]} for name in names}
            times.append(run_side(tree, jobs, folder / side))
        for name in names:
            rows.append(judge(name, folder, given.expect, given.within.get(name)))
        if not given.only:
            rows += not_covered([content.load(folder / "new" / row.name) for row in rows if not row.wrong])
        report(rows)
    print(f"{times[0]:.0f} s and {times[1]:.0f} s for the sides, {time.perf_counter() - start:.0f} s in all")
    return int(any(row.wrong for row in rows))


def check_out(commit: str, folder: Path) -> Path:
    """The tree of a commit, in a folder of its own: no worktree that a stopped run would leave behind."""
    found = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True)
    if found.returncode:
        raise SystemExit(f"--base {commit}: {found.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as packed:
        packed.extractall(folder, filter="data")
    return folder


def unknown_renames(base: Path) -> list[Rename]:
    """Renames since a tree, newest first: those of this tree that it does not list itself."""
    file = base / "golden" / "recipes.py"
    if not file.is_file():
        return list(RENAMES)
    spec = importlib.util.spec_from_file_location("base_recipes", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["base_recipes"] = module
    spec.loader.exec_module(module)
    known = [(rename.new, rename.old) for rename in module.RENAMES]
    return [rename for rename in RENAMES if (rename.new, rename.old) not in known]


def run_side(tree: Path, jobs: Mapping[str, Any], out: Path) -> float:
    """Make the contents of all jobs by the package of a tree; seconds that it took."""
    out.mkdir()
    (out / "jobs.json").write_text(json.dumps(jobs))
    own = tree / "golden" / "read.py"
    reader = own if own.is_file() else ROOT / "golden" / "read.py"
    environment = {**DEFAULTS, **os.environ, **SETTINGS, "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(ROOT)])}
    command = [sys.executable, "-P", "-m", "golden.side", "--source", tree / "src", "--reader", reader]
    command += ["--jobs", out / "jobs.json", "--out", out]
    start, log = time.perf_counter(), out / "log.txt"
    with log.open("w") as file:
        ended = subprocess.run([*map(str, command)], env=environment, cwd=out, stdout=file, stderr=subprocess.STDOUT)
    if ended.returncode:
        raise SystemExit(f"the side of {tree} stopped:\n{log.read_text()[-4000:]}")
    return time.perf_counter() - start


def judge(name: str, folder: Path, expected: Sequence[str], tolerance: Tolerance | None) -> Row:
    """The line of a recipe whose contents are in `folder`/old and `folder`/new."""
    errors = {side: folder / side / f"{name}.error" for side in ("old", "new")}
    failed = {side: file.read_text() for side, file in errors.items() if file.is_file()}
    if len(set(failed.values())) == 1 == len(failed) - 1:
        return Row(name, f"fails on both sides: {failed['new']}", True)
    if "new" in failed or (failed and name not in expected):
        return Row(name, "; ".join(f"fails on the {side} side: {text}" for side, text in failed.items()), True)
    if failed:
        return Row(name, f"as expected, fails on the old side: {failed['old']}", False)
    found = compare(content.load(folder / "old" / name), content.load(folder / "new" / name), tolerance)
    return Row(name, _words(found, name in expected), not found.same and name not in expected)


def not_covered(contents: Sequence[Mapping[str, object]]) -> list[Row]:
    """A line if there is a kind of part that no content has: nothing would notice if it changed."""
    made = {content.kind_of(name) for found in contents for name in found}
    unmade = sorted(content.KINDS - made)
    return [Row("(coverage)", f"no recipe that is the same makes {', '.join(unmade)}", True)] if unmade else []


def report(rows: Sequence[Row]) -> None:
    """Print the table and what it comes to."""
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{'!' if row.wrong else ' '} {row.name:{width}}  {row.text}")
    wrong = [row.name for row in rows if row.wrong]
    print(f"{len(wrong)} of {len(rows)} recipes differ: {', '.join(wrong)}" if wrong else "no unexpected difference")


def _words(found: Comparison, expected: bool) -> str:
    if not expected:
        return str(found)
    return f"expected to differ, and is the {found}" if found.same else f"as expected, {found}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m golden", description=str(__doc__).splitlines()[0])
    parser.add_argument("--base", required=True, help="the commit that is right")
    parser.add_argument("--only", action="append", choices=RECIPES, default=[], metavar="NAME", help="leave out others")
    parser.add_argument(
        "--expect", action="append", choices=RECIPES, default=[], metavar="NAME", help="is meant to differ"
    )
    parser.add_argument(
        "--within", action="append", default=[], metavar="NAME=SIZE",
        help="real numbers of this recipe may be so far apart: 2ulp, or a share as 1e-6",
    )  # fmt: skip
    given = parser.parse_args()
    try:
        pairs = [text.split("=") for text in given.within]
        given.within = {name: Tolerance.of(size) for name, size in pairs}
    except ValueError:
        parser.error("--within takes NAME=2ulp or NAME=1e-6")
    for name in given.within:
        if name not in RECIPES:
            parser.error(f"--within {name}: no such recipe")
    return given


if __name__ == "__main__":
    sys.exit(main())
