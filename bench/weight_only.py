"""Weight-only methods on SmolLM2-135M: perplexity, bits, time and memory of each arm.

    python bench/weight_only.py [--wikitext DIR] [--only headline|table] [--row ARM:BITS:GROUP:WINDOWS ...] [--print]

Finished rows are appended to the results file and skipped when they are there, so the table grows over several runs.
Every row runs in a process of its own, so that its peak memory is its own. Headline rows calibrate on 64 windows of
2048 tokens and score 64; table rows 16 and 16. Calibration: the first 2000 news articles, computed in bfloat16;
scored in float32 on the last 400 news articles and, with --wikitext, on WikiText-2 raw test.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rows import Rows

WINDOW = 2048
KEY = ("arm", "bits", "group_size", "windows", "text")
ARMS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq-natural": {"method": "gptq", "options": {"order": "natural"}},
    "gptq-gar": {"method": "gptq", "options": {"order": "gar"}},
    "gptq-gar-sign": {"method": "gptq", "options": {"order": "gar", "weighting": "hessian"}, "grid": "sign"},
}
# The sign-basis grid is ahead of its method (D2Quant): it has rows below 4 bits only.
TABLE_ARMS = ("rtn", "gptq-natural", "gptq-gar")


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
        *(Spec(arm, bits, group, 64) for bits, group in ((3, 128), (2, 64), (4, 128)) for arm in ("gptq-gar", "rtn")),
    ]
    table = [
        Spec("original", 16, 0, 16),
        *(Spec(arm, bits, group, 16) for bits in (3, 2, 4) for group in (128, 64) for arm in TABLE_ARMS),
        *(Spec("gptq-gar-sign", bits, group, 16) for bits in (2, 3) for group in (64, 128)),
    ]
    chosen = {"headline": headline, "table": table, None: headline[:2] + table + headline[2:]}
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
    from subnibble.version import __version__

    model = find_model()
    facts: dict[str, Any] = {"version": __version__, "window": WINDOW, "scored_in": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        path = model
        if spec.arm != "original":
            recipe = Recipe(
                bits=spec.bits, group_size=spec.group_size, embedding_bits=8,
                calibration="news" if spec.arm != "rtn" else None, num_windows=spec.windows, window=WINDOW,
                dtype="bfloat16", **ARMS[spec.arm],
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
    """Print the table as Markdown."""
    print("| arm | bits | group | windows | effective bits | news | WikiText-2 | quantize, s | peak memory, GB |")
    print("|---|---|---|---|---|---|---|---|---|")
    seen: dict[Spec, dict[str, dict[str, Any]]] = {}
    for row in rows:
        spec = Spec(row["arm"], row["bits"], row["group_size"], row["windows"])
        seen.setdefault(spec, {})[row["text"]] = row
    for spec, found in sorted(seen.items(), key=lambda item: (-item[0].windows, item[0].bits, item[0].group_size)):
        one = next(iter(found.values()))
        scores = [f"{found[text]['perplexity']:.2f}" if text in found else "" for text in ("news", "wikitext2")]
        cost = [f"{one['seconds']:.0f}", f"{one['peak_memory'] / 1e9:.1f}"] if "seconds" in one else ["", ""]
        cells = [
            spec.arm,
            str(spec.bits),
            str(spec.group_size or ""),
            str(spec.windows),
            f"{one['effective_bits']:.3f}",
        ]
        print("| " + " | ".join([*cells, *scores, *cost]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--wikitext", type=Path, default=here.parent.parent / "shared" / "data" / "wikitext-2")
    parser.add_argument("--results", type=Path, default=here / "results" / "weight_only.json")
    parser.add_argument("--only", choices=("headline", "table"))
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
