"""Output error of every linear of SmolLM2-135M by the number of salient channels: whether it falls as the rank grows.

    python bench/rank_error.py [--row ARM ...]
    python bench/rank_error.py --print

ARM is one of SERQ's in `arms.py`, with rounding to nearest or GPTQ, at ranks from 0 to 256. Each is
quantized to 4 bits, inputs at 4 bits, in groups of 128, on 4 windows of 2048 tokens of news. Finished rows are appended
to the results file and skipped when they are there.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import arms
from measure import HERE, print_table, with_data
from rows import Rows

WINDOWS = 4
RANKS = (0, 16, 32, 64, 128, 256)
ARMS = {f"{method}{'' if rank == 128 else f'-rank-{rank}'}": rank for method in ("serq-rtn", "serq") for rank in RANKS}


def measured(arm: str) -> dict[str, Any]:
    """The row of one arm; output_errors: of every linear, in the model's order, over the output's energy."""
    from subnibble import quantize
    from subnibble.packaged.model import find_model

    recipe = with_data(arms.recipe_of("weight_activation", arm), WINDOWS)
    with tempfile.TemporaryDirectory() as folder:
        report = quantize(find_model(), Path(folder) / "model", recipe)
    errors = [float(f"{linear.output_error:.5g}") for linear in report.linears if linear.output_error is not None]
    return {"arm": arm, "rank": ARMS[arm], "windows": WINDOWS, "version": report.version, "output_errors": errors}


def show(rows: list[dict[str, Any]]) -> None:
    """Print mean errors, and in how many linears they fall from the rank before, as Markdown."""
    print_table(("arm", "rank", "mean output error", "linears where it falls"), _cells(rows))


def _cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    found = {row["arm"]: row["output_errors"] for row in rows}
    made = [arm for arm in ARMS if arm in found]
    falls = dict.fromkeys(made, "")
    for one, more in itertools.pairwise(made):
        if ARMS[one] < ARMS[more]:
            pairs = zip(found[one], found[more], strict=True)
            falls[more] = f"{sum(b < a for a, b in pairs)} of {len(found[more])}"
    return [[arm, str(ARMS[arm]), f"{statistics.mean(found[arm]):.5f}", falls[arm]] for arm in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", choices=tuple(ARMS), metavar="ARM")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "rank_error.json")
    parser.add_argument("--print", action="store_true", help="print the finished rows and run none")
    arguments = parser.parse_args()
    table = Rows(arguments.results, ("arm", "windows"))
    for arm in () if arguments.print else arguments.row or ARMS:
        if not table.has({"arm": arm, "windows": WINDOWS}):
            print(arm, file=sys.stderr, flush=True)
            table.append(measured(arm))
    show(table.rows)


if __name__ == "__main__":
    main()
