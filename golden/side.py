"""One side of a comparison, in its own process: quantize by every recipe, read the checkpoint, save the content.

PYTHONPATH decides which tree's package is imported; --source says which one it must be.
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
    """Run the command that `__main__.py` starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", type=Path, required=True, help="the folder that subnibble must come from")
    parser.add_argument("--reader", type=Path, required=True, help="the read.py of this side")
    parser.add_argument("--jobs", type=Path, required=True, help='JSON: name -> {"model": folder, "recipe": keys}')
    parser.add_argument("--out", type=Path, required=True, help="folder for the contents")
    arguments = parser.parse_args()
    import subnibble

    imported = Path(subnibble.__file__).resolve()
    if not imported.is_relative_to(arguments.source.resolve()):
        raise SystemExit(f"subnibble was imported from {imported}, not from {arguments.source}; check PYTHONPATH")
    make(json.loads(arguments.jobs.read_text()), reader(arguments.reader), arguments.out)


def make(jobs: Mapping[str, Any], read: Callable[[Path], content.Content], out: Path) -> None:
    """Run every job and write its content into `out` as `NAME`, or the error of a failed one as `NAME.error`.

    jobs: name -> {"model": folder, "recipe": keys}.
    read: reads the content of a packed checkpoint's folder.
    """
    import subnibble

    for name, job in jobs.items():
        folder = out / "packed"
        try:
            subnibble.quantize(job["model"], folder, job["recipe"])
            content.save(content.ordered(read(folder)), out / name)
        except Exception as error:
            # A failed recipe is one row of the table; the others still run.
            (out / f"{name}.error").write_text(f"{type(error).__name__}: {error}")
        shutil.rmtree(folder, ignore_errors=True)


def reader(file: Path) -> Callable[[Path], content.Content]:
    """Return the function `read` of the given read.py."""
    spec = importlib.util.spec_from_file_location("golden_reader", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    read: Callable[[Path], content.Content] = module.read
    return read


if __name__ == "__main__":
    main()
