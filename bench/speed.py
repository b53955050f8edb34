"""Compare the speed of packed models with their original: prompt and decoding, one thread, through transformers.

    python bench/speed.py [--row PRESET ...]
    python bench/speed.py --print

Each preset packs SmolLM2-135M, without distillation and calibrated on 2 windows of 512 tokens, because neither changes
the operations that run. The packed model and the original in float32 generate in turn. Figures are tokens per second of
CPU time, the best of several rounds. Finished rows are appended to the results file; later runs skip them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import HERE, environment, print_table
from rows import Rows

PROMPT, DECODED, ROUNDS = 512, 16, 3
KEY = ("preset",)


def main() -> None:
    """Measure the presets that are missing, each in its own process, and print the table."""
    from subnibble.presets import PRESETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--row", action="append", choices=PRESETS, metavar="PRESET", help="measure this preset only; may be repeated"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results" / "speed.json", help="results file")
    parser.add_argument("--print", action="store_true", help="print finished rows, measure none")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    table = Rows(arguments.results, KEY)
    if arguments.child:
        table.append(measured(arguments.row[0]))
        return
    presets = [] if arguments.print else [one for one in arguments.row or PRESETS if not table.has({"preset": one})]
    for preset in presets:
        print(preset, file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--child", "--row", preset, "--results", str(arguments.results)]
        subprocess.run(command, check=True)
    show(Rows(arguments.results, KEY).rows)


def measured(preset: str) -> dict[str, Any]:
    """Pack the model by a preset, time it and its original, and return the row."""
    import torch

    from subnibble import preset as preset_recipe
    from subnibble import quantize
    from subnibble.checkpoint.opening import open_source
    from subnibble.checkpoint.size import measure
    from subnibble.hf import load_model
    from subnibble.packaged.model import find_model

    torch.set_num_threads(1)
    recipe = replace(preset_recipe(preset), distill_steps=0, num_windows=2, window=512, calibration="news")
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "model"
        quantize(find_model(), packed, recipe)
        models = {"original": load_model(find_model(), "float32"), "packed": load_model(packed, "float32")}
        size = measure(open_source(packed))
    ids = torch.arange(1000, 1000 + PROMPT)[None]
    seconds: dict[str, dict[int, float]] = {name: {} for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            for tokens in (1, 1 + DECODED):
                start = time.process_time()
                model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
                spent = time.process_time() - start
                seconds[name][tokens] = min(spent, seconds[name].get(tokens, spent))
    row: dict[str, Any] = {"preset": preset, "file_bytes": size.file_bytes, **environment()}
    for name, spent in seconds.items():
        row[f"{name}_prompt"] = PROMPT / spent[1]
        row[f"{name}_decode"] = DECODED / (spent[1 + DECODED] - spent[1])
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table as Markdown."""
    columns = ("preset", "file, MB", "prompt, t/s", "of float32's", "decoding, t/s", "of float32's", "commit")
    print_table(columns, map(_cells, rows))


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["preset"], f"{row['file_bytes'] / 1e6:.1f}"]
    for what in ("prompt", "decode"):
        packed, original = row[f"packed_{what}"], row[f"original_{what}"]
        cells += [f"{packed:.2f}", f"{packed / original:.2f}"]
    return [*cells, row["commit"]]


if __name__ == "__main__":
    main()
