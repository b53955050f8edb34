"""Weight-only methods on SmolLM2-135M: perplexity, bits, time and memory of each arm.

    python bench/weight_only.py [--wikitext DIR] [--only headline|table|ablation] [--row ARM:BITS:GROUP:WINDOWS ...]
    python bench/weight_only.py --print

Finished rows are appended to the results file and skipped when they are there, so the table grows over several runs.
Every row runs in a process of its own, so that its peak memory is its own. Arms are the recipes in `recipes/`. Headline
rows calibrate on 64 windows of 2048 tokens and score 64; table and ablation rows 16 and 16. Calibration: the first 2000
news articles, computed in bfloat16; scored in float32 on the last 400 news articles and, with --wikitext, on
WikiText-2 raw test.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rows import Rows

WINDOW = 2048
KEY = ("arm", "bits", "group_size", "windows", "text")
# An arm is a shipped recipe; bits, group size and windows come from the row.
RECIPES = Path(__file__).parent.parent / "recipes"
ARMS = sorted(file.stem for file in RECIPES.glob("*.toml"))
BASELINES = (
    "rtn", "rtn-rotated", "awq", "awq-rotated", "gptq-natural", "gptq-gar", "gptq-rotated", "gptq-rotated-full",
    "gptaq", "gptaq-corrected", "gptaq-shifted", "gptaq-rotated", "gptaq-rotated-full",
)  # fmt: skip
D2QUANT = ("d2quant", "d2quant-uniform", "dualfit")
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
        *(Spec(arm, bits, 128, 64) for arm in ("gptq-gar", "dualfit", "d2quant", "gptaq", "rtn") for bits in (2, 3)),
    ]
    table = [
        Spec("original", 16, 0, 16),
        *(Spec(arm, bits, g, 16) for g in (128, 64) for bits in (2, 3) for arm in (*BASELINES, *D2QUANT)),
        *(Spec(arm, 4, g, 16) for g in (128, 64) for arm in ("rtn", "gptq-gar", "gptaq", "d2quant-uniform", "dualfit")),
    ]
    ablation = [Spec(arm, bits, 128, 16) for bits in (2, 3) for arm in ABLATION]
    chosen = {"headline": headline, "table": table, "ablation": ablation, None: [*headline, *table, *ablation]}
    return chosen[only]


def parse_spec(text: str) -> Spec:
    """A row as written on the command line, for example gptq-gar:3:128:64."""
    arm, bits, group_size, windows = text.split(":")
    if arm not in (*ARMS, "original"):
        raise argparse.ArgumentTypeError(f"{arm!r} is no arm; choose one of original, {', '.join(ARMS)}")
    return Spec(arm, int(bits), int(group_size), int(windows))


def texts(wikitext: Path) -> dict[str, str]:
    """Name -> what `read_text` takes; WikiText is left out, with one message, where its file is not."""
    file = wikitext / "test.raw.txt"
    if not file.is_file():
        print(f"{file} is not there: rows on WikiText-2 are left out (--wikitext DIR)", file=sys.stderr)
        return {"news": "news"}
    return {"news": "news", "wikitext2": str(file)}


def run_row(spec: Spec, names: dict[str, str]) -> list[dict[str, Any]]:
    """Quantize by `spec` and score it on each text. Runs in a process of its own."""
    from subnibble import Recipe, quantize
    from subnibble.calibrate.windows import evaluation_windows
    from subnibble.checkpoint.size import measure
    from subnibble.checkpoint.source import open_source
    from subnibble.cli.demo import find_model
    from subnibble.evaluate.perplexity import bos_token, score
    from subnibble.hf import load_model
    from subnibble.methods import find_method
    from subnibble.version import __version__

    model = find_model()
    facts: dict[str, Any] = {"version": __version__, "window": WINDOW, "scored_in": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        path = model
        if spec.arm != "original":
            shipped = Recipe.from_toml(RECIPES / f"{spec.arm}.toml")
            recipe = replace(
                shipped,
                bits=spec.bits, group_size=spec.group_size, num_windows=spec.windows, window=WINDOW, dtype="bfloat16",
                calibration="news" if find_method(shipped.method).needs_data(shipped.options) else None,
            )  # fmt: skip
            path = Path(folder) / "model"
            report = quantize(model, path, recipe)
            facts |= {
                "calibration": recipe.calibration,
                "calibrated_in": recipe.dtype,
                "seconds": report.seconds["total"],
                "peak_memory": report.peak_memory,
                "weights_sha256": report.weights_sha256,
            }
        source = open_source(path)
        facts |= measure(source).to_dict()
        tokenizer = source.load_tokenizer()
        loaded = load_model(path, "float32")
        rows = []
        for name, where in names.items():
            windows = evaluation_windows(where, tokenizer, WINDOW, spec.windows)
            scored = score({spec.arm: loaded}, windows, bos_token(tokenizer))[spec.arm]
            rows.append({**asdict(spec), "text": name, "perplexity": scored.perplexity, **facts})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table as Markdown, best first in each setting.

    The gap is log(perplexity / original's) over the same of gptq-gar at the same bits, group and windows: 100 % is what
    that leaves, 0 % the original.
    """
    print("| arm | bits | group | windows | effective bits | news | WikiText-2 | gap left | quantize, s | peak, GB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    found: dict[Spec, dict[str, dict[str, Any]]] = {}
    for row in rows:
        spec = Spec(row["arm"], row["bits"], row["group_size"], row["windows"])
        found.setdefault(spec, {})[row["text"]] = row
    for spec in sorted(found, key=lambda s: (-s.windows, s.bits, s.group_size, found[s]["news"]["perplexity"])):
        one = found[spec]["news"]
        scores = {text: row["perplexity"] for text, row in found[spec].items()}
        cells = [
            spec.arm,
            str(spec.bits),
            str(spec.group_size or ""),
            str(spec.windows),
            f"{one['effective_bits']:.3f}",
            *(f"{scores[text]:.2f}" if text in scores else "" for text in ("news", "wikitext2")),
            " / ".join(f"{100 * gap:.0f} %" for text in scores if (gap := _gap(found, spec, text)) is not None),
            *([f"{one['seconds']:.0f}", f"{one['peak_memory'] / 1e9:.1f}"] if "seconds" in one else ["", ""]),
        ]
        print("| " + " | ".join(cells) + " |")


def _gap(found: dict[Spec, dict[str, dict[str, Any]]], spec: Spec, text: str) -> float | None:
    """Share of gptq-gar's log-perplexity gap to the original that an arm leaves; None without the rows for it."""
    original = found.get(Spec("original", 16, 0, spec.windows), {}).get(text)
    base = found.get(replace(spec, arm="gptq-gar"), {}).get(text)
    if original is None or base is None:
        return None
    logs = [math.log(row["perplexity"] / original["perplexity"]) for row in (found[spec][text], base)]
    return logs[0] / logs[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--wikitext", type=Path, default=here.parent.parent / "shared" / "data" / "wikitext-2")
    parser.add_argument("--results", type=Path, default=here / "results" / "weight_only.json")
    parser.add_argument("--only", choices=("headline", "table", "ablation"))
    parser.add_argument("--print", action="store_true", help="print the finished rows and run none")
    parser.add_argument("--row", action="append", type=parse_spec, metavar="ARM:BITS:GROUP:WINDOWS")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        spec, names = json.loads(arguments.child)
        print("ROWS " + json.dumps(run_row(Spec(**spec), names)))
        return
    table = Rows(arguments.results, KEY)
    if not arguments.print:
        available = texts(arguments.wikitext)
        for spec in arguments.row or specs(arguments.only):
            missing = {n: w for n, w in available.items() if not table.has({**asdict(spec), "text": n})}
            if not missing:
                continue
            print(f"{spec} on {', '.join(missing)}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--child", json.dumps([asdict(spec), missing])]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            line = next(line for line in output.splitlines() if line.startswith("ROWS "))
            for row in json.loads(line.removeprefix("ROWS ")):
                table.append(row)
    show(table.rows)


if __name__ == "__main__":
    main()
