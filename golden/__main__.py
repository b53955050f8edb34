"""Quantize toy models with a commit and with this tree, in one run on one machine, and report what differs.

    python -m golden --base COMMIT [--only NAME] [--expect NAME] [--within NAME=1e-6] [--within NAME=2ulp]

The exit code is 1 on any unexpected difference and if a recipe fails.
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
# Environment of both sides, besides what they inherit. With COMPATIBLE, MKL's results do not depend on the address of a
# matrix, which a refactor may change.
SETTINGS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
DEFAULTS = {"MKL_CBWR": "COMPATIBLE"}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    name: the recipe.
    text: the result, in words.
    wrong: whether it makes the run fail.
    """

    name: str
    text: str
    wrong: bool


def main() -> int:
    """Run the command and return its exit code."""
    arguments = _arguments()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        folder = Path(temporary)
        base = check_out(arguments.base, folder / "base")
        models = write_models(folder / "models")
        names = arguments.only or list(RECIPES)
        recipes = {name: recipe_of(RECIPES[name], models[RECIPES[name].model]) for name in names}
        old = {name: translated(recipe, unknown_renames(base)) for name, recipe in recipes.items()}
        print(f"{arguments.base} against the tree in {ROOT}, {len(names)} recipes; torch {torch.__version__}, "
              f"{torch.backends.cpu.get_cpu_capability()}, one thread a side")  # fmt: skip
        rows, times = [], []
        sides = {"old": (base, old), "new": (ROOT, recipes)}
        for side, (tree, keys) in sides.items():
            jobs = {name: {"model": str(models[RECIPES[name].model]), "recipe": keys[name]} for name in names}
            times.append(run_side(tree, jobs, folder / side))
        for name in names:
            rows.append(judge(name, folder, arguments.expect, arguments.within.get(name)))
        if not arguments.only:
            rows += not_covered([content.load(folder / "new" / row.name) for row in rows if not row.wrong])
        report(rows)
    print(f"{times[0]:.0f} s and {times[1]:.0f} s for the sides, {time.perf_counter() - start:.0f} s in all")
    return int(any(row.wrong for row in rows))


def check_out(commit: str, folder: Path) -> Path:
    """Write the files of a commit into `folder` and return it.

    Not as a git worktree, which a stopped run would leave registered.
    """
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True)
    if archive.returncode:
        raise SystemExit(f"--base {commit}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


def unknown_renames(base: Path) -> list[Rename]:
    """Return the renames of this tree that the tree `base` does not list, newest first."""
    file = base / "golden" / "recipes.py"
    if not file.is_file():
        return list(RENAMES)
    spec = importlib.util.spec_from_file_location("base_recipes", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their module by name.
    sys.modules["base_recipes"] = module
    spec.loader.exec_module(module)
    known = [(rename.new, rename.old) for rename in module.RENAMES]
    return [rename for rename in RENAMES if (rename.new, rename.old) not in known]


def run_side(tree: Path, jobs: Mapping[str, Any], out: Path) -> float:
    """Run all jobs with the package of a tree, in its own process, and return the seconds that it took.

    tree: root of the tree, with src/.
    jobs: recipe name -> {"model": folder, "recipe": keys}.
    out: new folder for the contents.
    """
    out.mkdir()
    (out / "jobs.json").write_text(json.dumps(jobs))
    reader = tree / "golden" / "read.py"
    if not reader.is_file():
        reader = ROOT / "golden" / "read.py"
    environment = {**DEFAULTS, **os.environ, **SETTINGS, "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(ROOT)])}
    command = [sys.executable, "-P", "-m", "golden.side", "--source", tree / "src", "--reader", reader]
    command += ["--jobs", out / "jobs.json", "--out", out]
    start, log = time.perf_counter(), out / "log.txt"
    with log.open("w") as file:
        ended = subprocess.run([*map(str, command)], env=environment, cwd=out, stdout=file, stderr=subprocess.STDOUT)
    if ended.returncode:
        raise SystemExit(f"the side of {tree} failed with exit code {ended.returncode}:\n{log.read_text()[-4000:]}")
    return time.perf_counter() - start


def judge(name: str, folder: Path, expected: Sequence[str], tolerance: Tolerance | None) -> Row:
    """Compare the contents of a recipe, in `folder`/old and `folder`/new, and return its line.

    expected: recipes that are meant to differ.
    tolerance: how far floating-point numbers may differ, or None for not at all.
    """
    errors = {side: folder / side / f"{name}.error" for side in ("old", "new")}
    failed = {side: file.read_text() for side, file in errors.items() if file.is_file()}
    if len(set(failed.values())) == 1 == len(failed) - 1:
        return Row(name, f"fails on both sides: {failed['new']}", True)
    if "new" in failed or (failed and name not in expected):
        return Row(name, "; ".join(f"fails on the {side} side: {text}" for side, text in failed.items()), True)
    if failed:
        return Row(name, f"as expected, fails on the old side: {failed['old']}", False)
    comparison = compare(content.load(folder / "old" / name), content.load(folder / "new" / name), tolerance)
    return Row(name, _words(comparison, name in expected), not comparison.same and name not in expected)


def not_covered(contents: Sequence[Mapping[str, object]]) -> list[Row]:
    """Return a line with the kinds of parts that no content has, if any: no recipe would notice a change in them."""
    covered = {content.kind_of(name) for parts in contents for name in parts}
    missing = sorted(content.KINDS - covered)
    return [Row("(coverage)", f"no recipe that is the same makes {', '.join(missing)}", True)] if missing else []


def report(rows: Sequence[Row]) -> None:
    """Print the table and a summary."""
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{'!' if row.wrong else ' '} {row.name:{width}}  {row.text}")
    wrong = [row.name for row in rows if row.wrong]
    print(f"{len(wrong)} of {len(rows)} recipes differ: {', '.join(wrong)}" if wrong else "no unexpected difference")


def _words(comparison: Comparison, expected: bool) -> str:
    if not expected:
        return str(comparison)
    return f"expected to differ, and is the {comparison}" if comparison.same else f"as expected, {comparison}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m golden", description=str(__doc__).splitlines()[0])
    parser.add_argument("--base", required=True, help="the commit to compare with")
    parser.add_argument(
        "--only",
        action="append",
        choices=RECIPES,
        default=[],
        metavar="NAME",
        help="run only this recipe; may be repeated",
    )
    parser.add_argument(
        "--expect", action="append", choices=RECIPES, default=[], metavar="NAME", help="this recipe is meant to differ"
    )
    parser.add_argument(
        "--within", action="append", default=[], metavar="NAME=SIZE",
        help="floating-point numbers of this recipe may differ by this much: 2ulp, or a share such as 1e-6",
    )  # fmt: skip
    arguments = parser.parse_args()
    try:
        pairs = [text.split("=") for text in arguments.within]
        arguments.within = {name: Tolerance.of(size) for name, size in pairs}
    except ValueError:
        parser.error("--within: give NAME=2ulp or NAME=1e-6")
    for name in arguments.within:
        if name not in RECIPES:
            parser.error(f"--within {name}: unknown recipe; choose one of {', '.join(RECIPES)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
