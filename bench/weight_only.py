"""Weight-only methods on SmolLM2-135M: perplexity, bits, time and memory of each arm.

    python bench/weight_only.py [--wikitext DIR] [--only headline|table|ablation] [--row ARM:BITS:GROUP:WINDOWS ...]
    python bench/weight_only.py --print

Finished rows are appended to the results file and skipped when they are there, so the table grows over several runs.
Every row runs in a process of its own, so that its peak memory is its own. Arms are those of `arms.py`. Headline
rows calibrate on 64 windows of 2048 tokens and score 64; table and ablation rows 16 and 16, the ablation at 2 bits.
Calibration: the first 2000 news articles, computed in bfloat16; scored in float32 on the last 400 news articles and,
with --wikitext, on WikiText-2 raw test.
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
# The methods, what they are built on, and the best of the other baselines in the table.
HEADLINE = ("gptq-gar", "d2quant-plus", "d2quant", "gptaq-shifted-rotated")
ABLATION = tuple(arm for arm in ARMS if arm not in (*BASELINES, *D2QUANT))


@dataclass(frozen=True)
class Spec:
    """One quantization: which arm at which size, with how many windows of calibration and of text."""

    arm: str
    bits: int
    group_size: int
    windows: int


def specs(only: str | None) -> list[Spec]:
    """All rows to make, most telling first."""
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
    # At 2 bits, where the parts differ most. An integer zero-point leaves d2quant-plus as many bits as baselines have.
    cheap = [Spec("d2quant-plus-integer", bits, g, 16) for bits, g in ((2, 64), (3, 64), (3, 128))]
    ablation = [*(Spec(arm, 2, 128, 16) for arm in ABLATION), *cheap, Spec("d2quant-plus-sweeps", 3, 128, 16)]
    chosen = {"headline": headline, "table": table, "ablation": ablation, None: [*headline, *table, *ablation]}
    return chosen[only]


def parse_spec(text: str) -> Spec:
    """A row as written on the command line, for example gptq-gar:3:128:64."""
    (arm,), (bits, group_size, windows) = parts_of(text, FORM, 3)
    if arm not in (*ARMS, "original"):
        raise argparse.ArgumentTypeError(f"{arm!r} is no arm; choose one of original, {', '.join(ARMS)}")
    if arm == "original" and (bits, group_size) != (16, 0):
        raise argparse.ArgumentTypeError(f"{text!r}: the original has no bits or groups; give original:16:0:{windows}")
    return Spec(arm, bits, group_size, windows)


def measured(spec: Spec, names: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of `spec` on each text."""
    if spec.arm == "original":
        return measure_row(None, spec.windows, names)
    recipe = arms.recipe_of(BENCH, spec.arm, bits=spec.bits, group_size=spec.group_size)
    return measure_row(with_data(recipe, spec.windows), spec.windows, names)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table as Markdown, best first in each setting.

    The gap is log(perplexity / original's) over the same of gptq-gar at the same bits, group and windows: 100 % is what
    that leaves, 0 % the original.
    """
    found = by_spec(rows, Spec)
    order = sorted(found, key=lambda s: (-s.windows, s.bits, s.group_size, found[s]["news"]["perplexity"]))
    columns = (
        "arm", "bits", "group", "windows", "effective bits", "file, MB", "news", "WikiText-2", "gap left",
        "quantize, s", "peak, GB", "commit",
    )  # fmt: skip
    print_table(columns, (_cells(found, spec) for spec in order))


def _cells(found: dict[Spec, dict[str, dict[str, Any]]], spec: Spec) -> list[str]:
    one = found[spec]["news"]
    return [
        spec.arm,
        str(spec.bits),
        str(spec.group_size or ""),
        str(spec.windows),
        f"{one['effective_bits']:.3f}",
        f"{one['file_bytes'] / 1e6:.1f}",
        *score_cells(found[spec]),
        share_cell(found[spec], lambda text: _gap(found, spec, text), ".0f"),
        *cost_cells(one),
    ]


def _gap(found: dict[Spec, dict[str, dict[str, Any]]], spec: Spec, text: str) -> float | None:
    """Share of gptq-gar's log-perplexity gap to the original that an arm leaves; None without the rows for it."""
    rows = (
        found.get(other, {}).get(text)
        for other in (spec, replace(spec, arm="gptq-gar"), Spec("original", 16, 0, spec.windows))
    )
    return gap_left(*rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("headline", "table", "ablation"))
    parser.add_argument("--row", action="append", type=parse_spec, metavar=FORM)
    results = HERE / "results" / "weight_only.json"
    run(parser, results, KEY, Spec, measured, lambda given: given.row or specs(given.only), show)


if __name__ == "__main__":
    main()
