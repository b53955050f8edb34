"""Measure what the journal of a quantization costs, on the demo's model: seconds, share of the run, bytes.

    python bench/resume_cost.py [--method rtn --method gptq ...] [--windows 16]

For each method, one run saves whenever a save is due, and another run saves after every block, whatever it costs. Both
runs write everything else as durably. `journal` counts saves, `write` the shards with their fsync. A forward pass is
shown for comparison: to compute the streams again instead of storing them, a resumed run would need one through each
finished block.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from measure import environment, print_table

COLUMNS = (
    "method", "windows", "saves", "seconds", "journal", "share", "write", "one save", "one forward pass of a block",
    "streams, MB",
)  # fmt: skip


def row(method: str, windows: int, always: bool) -> list[str]:
    """Quantize once and return the cells of a row. always: save after every block."""
    from subnibble import Recipe, quantize
    from subnibble.packaged.model import find_model
    from subnibble.pipeline.check import resolve
    from subnibble.pipeline.size import disk_bytes
    from subnibble.resume import pace
    from subnibble.resume.journal import Journal

    saves: list[str] = []
    record, share = Journal.record, pace.SHARE

    def counted(self: Journal, values: Any, *arguments: Any, **named: Any) -> None:
        saves.extend(values)
        record(self, values, *arguments, **named)

    recipe = Recipe(method=method, bits=3, calibration="news", num_windows=windows, dtype="bfloat16")
    resolved = resolve(find_model(), recipe)
    try:
        pace.SHARE = 1e9 if always else share
        Journal.record = counted  # type: ignore[method-assign]
        with tempfile.TemporaryDirectory() as folder:
            seconds = quantize(find_model(), Path(folder) / "out", recipe).seconds
    finally:
        Journal.record, pace.SHARE = record, share  # type: ignore[method-assign]
    blocks, steps = resolved.skeleton.num_blocks, resolved.steps
    passes = blocks * (2 if steps.needs_reference else 1)
    spent = seconds.get("journal", 0.0)
    return [
        method, str(windows), "every block" if always else f"{len(saves)} steps", f"{seconds['total']:.1f}",
        f"{spent:.2f}", f"{100 * spent / seconds['total']:.2f} %", f"{seconds['write']:.2f}",
        f"{spent / max(1, len(saves)):.3f}", f"{seconds.get('forward', 0.0) / passes:.3f}",
        f"{disk_bytes(resolved)['activation streams'] / 2e6:.0f}",
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", help="method; may be repeated (default: rtn, gptq, d2quant-plus)")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 2048 tokens")
    arguments = parser.parse_args()
    print(environment())
    methods = arguments.method or ["rtn", "gptq", "d2quant-plus"]
    print_table(COLUMNS, [row(name, arguments.windows, always) for name in methods for always in (False, True)])


if __name__ == "__main__":
    main()
