"""Measure weight-only methods on SmolLM2-135M: perplexity, bits, time and memory of each arm.

    python bench/weight_only.py [--wikitext DIR] [--only headline|table|ablation] [--row ARM:BITS:GROUP:WINDOWS ...]
    python bench/weight_only.py --print

Finished rows are appended to the results file and later runs skip them, so the table grows over several runs. Every row
runs in its own process, so that its peak memory includes no other row's.

ARM is an arm of `arms.py`, or `original` (original:16:0:WINDOWS).
WINDOWS windows of 2048 tokens calibrate, and as many are scored: 64 in headline rows, 16 in table and ablation rows.
The ablation is at 2 bits.

Calibration uses the first 2000 news articles, in bfloat16. Scores are computed in float32 on the last 400 news articles
and, with --wikitext, on WikiText-2 raw test.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import arms
from measure import (
    HERE,
    by_spec,
    cost_cells,
    gap_left,
    measure_row,
    parts_of,
    print_table,
    run,
    score_cells,
    share_cell,
    with_data,
)

FORM = "ARM:BITS:GROUP:WINDOWS"
KEY = ("arm", "bits", "group_size", "windows", "text")
BENCH = "weight_only"
# Bits, group size and windows come from the row.
ARMS = sorted(arms.ARMS[BENCH])
BASELINES = (
    "rtn", "rtn-rotated", "awq", "awq-rotated", "gptq-natural", "gptq-gar", "gptq-rotated", "gptq-rotated-full",
    "gptaq", "gptaq-corrected", "gptaq-shifted", "gptaq-rotated", "gptaq-rotated-full", "gptaq-shifted-rotated",
)  # fmt: skip
D2QUANT = ("d2quant", "d2quant-uniform", "d2quant-plus")
# D2Quant and ours, GPTQ as the reference, and the best baseline of the table.
HEADLINE = ("gptq-gar", "d2quant-plus", "d2quant", "gptaq-shifted-rotated")
ABLATION = tuple(arm for arm in ARMS if arm not in (*BASELINES, *D2QUANT))


@dataclass(frozen=True)
class Spec:
    """One quantization.

    arm: an arm of `arms.py`, or "original".
    bits: bits of a weight's code; 16 for the original.
    group_size: weights per scale, -1 for a whole row; 0 for the original.
    windows: windows of 2048 tokens, both to calibrate and to score.
    """

    arm: str
    bits: int
    group_size: int
    windows: int


def specs(only: str | None) -> list[Spec]:
    """Return the rows of one part of the table (None: of all parts), the most important first."""
    headline = [
        Spec("original", 16, 0, 64),
        *(Spec(arm, bits, 128, 64) for arm in HEADLINE for bits in (2, 3)),
    ]
    table = [
        Spec("original", 16, 0, 16),
        *(Spec(arm, bits, g, 16) for g in (128, 64) for bits in (2, 3) for arm in (*BASELINES, *D2QUANT)),
        *(
            Spec(arm, 4, g, 16)
            for g in (128, 64)
            for arm in ("rtn", "gptq-gar", "gptaq", "d2quant-uniform", "d2quant-plus")
        ),
    ]
    # At 2 bits, where the parts differ most. With integer zero-points d2quant-plus has as many bits as the baselines.
    cheap = [Spec("d2quant-plus-integer", bits, g, 16) for bits, g in ((2, 64), (3, 64), (3, 128))]
    ablation = [*(Spec(arm, 2, 128, 16) for arm in ABLATION), *cheap, Spec("d2quant-plus-sweeps", 3, 128, 16)]
    chosen = {"headline": headline, "table": table, "ablation": ablation, None: [*headline, *table, *ablation]}
    return chosen[only]


def parse_spec(text: str) -> Spec:
    """Parse a row as written on the command line, for example gptq-gar:3:128:64."""
    (arm,), (bits, group_size, windows) = parts_of(text, FORM, 3)
    if arm not in (*ARMS, "original"):
        raise argparse.ArgumentTypeError(f"unknown arm {arm!r}; choose one of original, {', '.join(ARMS)}")
    if arm == "original" and (bits, group_size) != (16, 0):
        raise argparse.ArgumentTypeError(f"{text!r}: the original is not quantized; give original:16:0:{windows}")
    return Spec(arm, bits, group_size, windows)


def measured(spec: Spec, names: dict[str, str]) -> list[dict[str, Any]]:
    """Measure `spec` and return one row per text."""
    if spec.arm == "original":
        return measure_row(None, spec.windows, names)
    recipe = arms.recipe_of(BENCH, spec.arm, bits=spec.bits, group_size=spec.group_size)
    return measure_row(with_data(recipe, spec.windows), spec.windows, names)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table as Markdown, best first in each setting.

    "Gap left" is the share of gptq-gar's log-perplexity gap to the original that an arm leaves, at the same bits, group
    size and windows: 100 % is as bad as gptq-gar, 0 % as good as the original.
    """
    measurements = by_spec(rows, Spec)
    order = sorted(
        measurements, key=lambda s: (-s.windows, s.bits, s.group_size, measurements[s]["news"]["perplexity"])
    )
    columns = (
        "arm", "bits", "group", "windows", "effective bits", "file, MB", "news", "WikiText-2", "gap left",
        "quantize, s", "peak, GB", "commit",
    )  # fmt: skip
    print_table(columns, (_cells(measurements, spec) for spec in order))


def _cells(measurements: dict[Spec, dict[str, dict[str, Any]]], spec: Spec) -> list[str]:
    on_news = measurements[spec]["news"]
    return [
        spec.arm,
        str(spec.bits),
        str(spec.group_size or ""),
        str(spec.windows),
        f"{on_news['effective_bits']:.3f}",
        f"{on_news['file_bytes'] / 1e6:.1f}",
        *score_cells(measurements[spec]),
        share_cell(measurements[spec], lambda text: _gap(measurements, spec, text), ".0f"),
        *cost_cells(on_news),
    ]


def _gap(measurements: dict[Spec, dict[str, dict[str, Any]]], spec: Spec, text: str) -> float | None:
    """Share of gptq-gar's log-perplexity gap to the original that an arm leaves; None if a row for it is missing."""
    rows = (
        measurements.get(other, {}).get(text)
        for other in (spec, replace(spec, arm="gptq-gar"), Spec("original", 16, 0, spec.windows))
    )
    return gap_left(*rows)


def main() -> None:
    """Run the bench's command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=("headline", "table", "ablation"), help="measure the missing rows of one part of the table"
    )
    parser.add_argument(
        "--row", action="append", type=parse_spec, metavar=FORM, help="measure this row only; may be repeated"
    )
    results = HERE / "results" / "weight_only.json"
    run(parser, results, KEY, Spec, measured, lambda arguments: arguments.row or specs(arguments.only), show)


if __name__ == "__main__":
    main()
