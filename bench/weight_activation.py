"""Measure methods that quantize weights and activations, on SmolLM2-135M: perplexity, bits, time, memory of each arm.

    python bench/weight_activation.py [--wikitext DIR] [--only NAME] [--row ARM:SETTING:WINDOWS[:CALIBRATED_ON] ...]
    python bench/weight_activation.py --print

Finished rows are appended to the results file; later runs skip them.

ARM is an arm of `arms.py`, or `original` with an empty SETTING.
SETTING is W4A4 or W4A8 in groups of 128 or 64 (for example W4A4g128; activations per token, in groups of the same
size), or MXFP4 weights with MXFP4 inputs (MXFP4) or 8-bit inputs (MXFP4A8). In groups of 24 (W4A4g24), or with 4-bit
low-rank factors (W4A8g128f4), baselines have about as many bits as SERQ with 128 salient channels in groups of 128.
WINDOWS windows of 2048 tokens are scored; CALIBRATED_ON windows, by default as many, calibrate. Headline rows have 64,
others 16.

Calibration uses the first 2000 news articles, in bfloat16. Scores are computed in float32, through the runtime's
integer operations, on the last 400 news articles and, with --wikitext, on WikiText-2 raw test. With 8-bit inputs,
`serq`, `serq-rtn`, `serq-plus` and `rtn` also score the same codes on inputs that are not quantized.
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

FORM = "ARM:SETTING:WINDOWS[:CALIBRATED_ON]"
KEY = ("arm", "setting", "windows", "calibrated_on", "text")
BENCH = "weight_activation"
ARMS = sorted(arms.ARMS[BENCH])
SETTINGS: dict[str, dict[str, Any]] = {
    "W4A4g128": {"activation_bits": 4, "group_size": 128},
    "W4A8g128": {"activation_bits": 8, "group_size": 128},
    "W4A4g64": {"activation_bits": 4, "group_size": 64},
    "W4A8g64": {"activation_bits": 8, "group_size": 64},
    "W4A4g24": {"activation_bits": 4, "group_size": 24},
    "W4A8g128f4": {"activation_bits": 8, "group_size": 128},
    "MXFP4": {"activation_bits": 4, "group_size": 32, "grid": "mxfp4"},
    "MXFP4A8": {"activation_bits": 8, "group_size": 32, "grid": "mxfp4"},
}
BASELINES = ("rtn", "gptq", "smoothquant", "l2qer", "qera", "quarot-rtn", "quarot")
# Bits of low-rank factors where they differ from those of inputs.
FACTOR_BITS = {"W4A8g128f4": 4}
# Baselines with about as many bits as SERQ in groups of 128, and SERQ itself in groups of 24.
EQUAL_BITS = (
    *((arm, "W4A4g24") for arm in (*BASELINES, "serq-rank-32", "serq-plus-rank-32")),
    *(("l2qer", setting) for setting in FACTOR_BITS),
)
FULL = tuple(setting for setting in SETTINGS if setting not in {setting for _, setting in EQUAL_BITS})
SERQ = ("serq-rtn", "serq", "serq-plus")
# SERQ's arms and the best baselines of the table.
HEADLINE = (*SERQ, "quarot", "smoothquant")
RANKS = tuple(arm for arm in ARMS if "-rank-" in arm)
STAGES = tuple(arm for arm in ARMS if arm not in (*BASELINES, *SERQ, *RANKS))


@dataclass(frozen=True)
class Spec:
    """One quantization.

    arm: an arm of `arms.py`, or "original".
    setting: a key of `SETTINGS`; "" for the original.
    windows: windows of 2048 tokens to score.
    calibrated_on: windows of 2048 tokens to calibrate on; 0 for the original.
    """

    arm: str
    setting: str
    windows: int
    calibrated_on: int


def specs(only: str | None) -> list[Spec]:
    """Return the rows of one part of the table (None: of all parts), the most important first."""
    both = (*SERQ, *BASELINES)
    chosen = {
        "headline": [
            Spec("original", "", 64, 0),
            *(Spec(arm, "W4A4g128", 64, 64) for arm in HEADLINE),
            *(Spec(arm, "W4A8g128", 64, 64) for arm in SERQ),
        ],
        "table": [
            Spec("original", "", 16, 0),
            *(Spec(arm, s, 16, 16) for s in FULL for arm in both),
            *(Spec(arm, s, 16, 16) for arm, s in EQUAL_BITS),
        ],
        "ranks": [Spec(arm, "W4A4g128", 16, 16) for arm in RANKS],
        "stages": [Spec(arm, "W4A4g128", 16, 16) for arm in STAGES],
        "calibration": [Spec("serq", "W4A4g128", 16, windows) for windows in (4, 64)],
    }
    return chosen[only] if only else [spec for specs in chosen.values() for spec in specs]


def parse_spec(text: str) -> Spec:
    """Parse a row as written on the command line, for example serq:W4A4g128:16.

    A fourth part, as in serq:W4A4g128:16:64, is the number of windows to calibrate on.
    """
    (arm, setting), (windows, calibrated_on) = parts_of(text, FORM, 2)
    if windows == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: 0 windows to score; give {FORM} with WINDOWS above 0")
    if arm not in (*ARMS, "original") or (arm != "original" and setting not in SETTINGS):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give ARM:SETTING:WINDOWS, ARM one of original, {', '.join(ARMS)}; SETTING one of "
            f"{', '.join(SETTINGS)} (empty for original)"
        )
    if arm == "original" and setting:
        raise argparse.ArgumentTypeError(f"{text!r}: the original has no setting; give original::{windows}")
    return Spec(arm, setting, windows, 0 if arm == "original" else calibrated_on)


def measured(spec: Spec, names: dict[str, str]) -> list[dict[str, Any]]:
    """Measure `spec` and return one row per text."""
    if spec.arm == "original":
        return measure_row(None, spec.windows, names)
    setting = SETTINGS[spec.setting]
    recipe = arms.recipe_of(BENCH, spec.arm, **setting)
    if "factor_bits" in recipe.options:
        factor_bits = FACTOR_BITS.get(spec.setting, setting["activation_bits"])
        recipe = replace(recipe, options={**recipe.options, "factor_bits": factor_bits})
    exact_inputs = setting["activation_bits"] == 8 and spec.arm in (*SERQ, "rtn")
    return measure_row(with_data(recipe, spec.calibrated_on), spec.windows, names, exact_inputs)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table as Markdown, best first in each setting.

    "Gap left" is the share of serq's log-perplexity gap to the original that an arm leaves, at the same setting and
    windows.
    """
    measurements = by_spec(rows, Spec)
    order = sorted(measurements, key=lambda s: (-s.windows, s.setting, measurements[s]["news"]["perplexity"]))
    columns = (
        "arm", "setting", "windows", "weight bits", "activation bits", "news", "WikiText-2", "same codes, A16",
        "gap left", "quantize, s", "peak, GB", "commit",
    )  # fmt: skip
    print_table(columns, (_cells(measurements, spec) for spec in order))


def _cells(measurements: dict[Spec, dict[str, dict[str, Any]]], spec: Spec) -> list[str]:
    by_text = measurements[spec]
    on_news = by_text["news"]
    exact = [row["perplexity_exact_inputs"] for row in by_text.values() if "perplexity_exact_inputs" in row]
    return [
        spec.arm,
        spec.setting,
        f"{spec.calibrated_on} / {spec.windows}" if spec.calibrated_on else str(spec.windows),
        f"{on_news['effective_bits']:.3f}",
        f"{on_news['activation_bits']:.3f}",
        *score_cells(by_text),
        " / ".join(f"{value:.2f}" for value in exact),
        share_cell(by_text, lambda text: _gap(measurements, spec, text), ".0f"),
        *cost_cells(on_news),
    ]


def _gap(measurements: dict[Spec, dict[str, dict[str, Any]]], spec: Spec, text: str) -> float | None:
    """Share of serq's log-perplexity gap to the original that an arm leaves; None if a row for it is missing."""
    rows = (
        measurements.get(other, {}).get(text)
        for other in (
            spec,
            replace(spec, arm="serq", calibrated_on=spec.windows),
            Spec("original", "", spec.windows, 0),
        )
    )
    return gap_left(*rows)


def main() -> None:
    """Run the bench's command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        choices=("headline", "table", "ranks", "stages", "calibration"),
        help="measure the missing rows of one part of the table",
    )
    parser.add_argument(
        "--row", action="append", type=parse_spec, metavar=FORM, help="measure this row only; may be repeated"
    )
    results = HERE / "results" / "weight_activation.json"
    run(parser, results, KEY, Spec, measured, lambda arguments: arguments.row or specs(arguments.only), show)


if __name__ == "__main__":
    main()
