"""One side of a comparison, in a process of its own: quantize every recipe, read what was written, keep the content.

PYTHONPATH decides whose package is imported; --source says whose it must be.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from golden import content


def main() -> None:
    """Command of `__main__.py`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", type=Path, required=True, help="the folder that subnibble must come from")
    parser.add_argument("--reader", type=Path, required=True, help="the side's own read.py")
    parser.add_argument("--jobs", type=Path, required=True, help='JSON: name -> {"model": folder, "recipe": keys}')
    parser.add_argument("--out", type=Path, required=True, help="where contents go")
    given = parser.parse_args()
    import subnibble

    found = Path(subnibble.__file__).resolve()
    if not found.is_relative_to(given.source.resolve()):
        raise SystemExit(f"subnibble came from {found}, not from {given.source}")
    make(json.loads(given.jobs.read_text()), reader(given.reader), given.out)


def make(jobs: Mapping[str, Any], read: Callable[[Path], content.Content], out: Path) -> None:
    """Write the content of every job into `out`, as `NAME`, or why there is none, as `NAME.error`."""
    import subnibble

    for name, job in jobs.items():
        folder = out / "packed"
        try:
            subnibble.quantize(job["model"], folder, job["recipe"])
            content.save(content.ordered(read(folder)), out / name)
        except Exception as error:
            # A recipe that fails is one row of the table; the others still say something.
            (out / f"{name}.error").write_text(f"{type(error).__name__}: {error}")
        shutil.rmtree(folder, ignore_errors=True)


def reader(file: Path) -> Callable[[Path], content.Content]:
    """`read` of a read.py, whichever tree it is in."""
    spec = importlib.util.spec_from_file_location("golden_reader", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    read: Callable[[Path], content.Content] = module.read
    return read


if __name__ == "__main__":
    main()
