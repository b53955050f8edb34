"""Measure the output error of every linear of SmolLM2-135M by rank, the number of SERQ's salient channels.

    python bench/rank_error.py [--row ARM ...]
    python bench/rank_error.py --print

ARM is one of SERQ's arms in `arms.py`, with GPTQ or rounding to nearest, at ranks from 0 to 256. Each quantizes weights
and inputs to 4 bits in groups of 128, calibrated on 4 windows of 2048 tokens of news. Finished rows are appended to the
results file; later runs skip them.
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
    """Quantize by one arm and return its row.

    Its output_errors are those of every linear, in the model's order, each over the energy of the linear's output.
    """
    from subnibble import quantize
    from subnibble.packaged.model import find_model

    recipe = with_data(arms.recipe_of("weight_activation", arm), WINDOWS)
    with tempfile.TemporaryDirectory() as folder:
        report = quantize(find_model(), Path(folder) / "model", recipe)
    errors = [float(f"{linear.output_error:.5g}") for linear in report.linears if linear.output_error is not None]
    return {"arm": arm, "rank": ARMS[arm], "windows": WINDOWS, "version": report.version, "output_errors": errors}


def show(rows: list[dict[str, Any]]) -> None:
    """Print mean errors by rank, and in how many linears the error is below that of the next smaller rank."""
    print_table(("arm", "rank", "mean output error", "linears where it falls"), _cells(rows))


def _cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    errors = {row["arm"]: row["output_errors"] for row in rows}
    measured_arms = [arm for arm in ARMS if arm in errors]
    falls = dict.fromkeys(measured_arms, "")
    for smaller, larger in itertools.pairwise(measured_arms):
        if ARMS[smaller] < ARMS[larger]:
            pairs = zip(errors[smaller], errors[larger], strict=True)
            falls[larger] = f"{sum(b < a for a, b in pairs)} of {len(errors[larger])}"
    return [[arm, str(ARMS[arm]), f"{statistics.mean(errors[arm]):.5f}", falls[arm]] for arm in measured_arms]


def main() -> None:
    """Measure the arms that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--row", action="append", choices=tuple(ARMS), metavar="ARM", help="measure this arm only; may be repeated"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results" / "rank_error.json", help="results file")
    parser.add_argument("--print", action="store_true", help="print finished rows, measure none")
    arguments = parser.parse_args()
    table = Rows(arguments.results, ("arm", "windows"))
    for arm in () if arguments.print else arguments.row or ARMS:
        if not table.has({"arm": arm, "windows": WINDOWS}):
            print(arm, file=sys.stderr, flush=True)
            table.append(measured(arm))
    show(table.rows)


if __name__ == "__main__":
    main()
