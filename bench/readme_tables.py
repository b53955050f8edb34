"""Print the README's tables from stored results of the other benches.

    python bench/readme_tables.py

Every line names its row. `python bench/weight_only.py --row ROW` measures it; so do `weight_activation.py` and
`weight_activation_kv.py` for rows with quantized inputs or KV cache, and `speed.py` for speeds. The third table is of
`kernels.py`.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

from measure import HERE, print_table, score_cells

# What it is for, the preset, the row of that recipe.
PRESETS = (
    ("nothing quantized", "", "weight_only", "original:16:0:16"),
    ("4-bit weights", "w4", "weight_only", "d2quant-plus:4:128:16"),
    ("3-bit weights", "w3", "weight_only", "d2quant-plus:3:128:16"),
    ("2-bit weights, tuned", "w2", "weight_only", "d2quant-plus-distilled:2:128:16"),
    ("4-bit weights and inputs", "w4a4", "weight_activation", "serq-plus:W4A4g128:16"),
    ("the same in MXFP4", "mxfp4", "weight_activation", "serq-plus:MXFP4:16"),
    ("4-bit KV cache", "kv4", "weight_activation_kv", "kv-by-channel:KV4:none:16"),
    ("4-bit weights, inputs and cache, tuned", "w4a4kv4", "weight_activation_kv",
     "atom-centered-distilled:W4A4KV4g128:none:16"),
    ("3-bit weights, inputs and cache, tuned", "w3a3kv3", "weight_activation_kv",
     "atom-centered-distilled:W3A3KV3g128:none:16"),
)  # fmt: skip
# What is quantized, the method, programs that have it, the row.
METHODS = (
    ("3-bit weights", "round to nearest", "all, without calibration", "weight_only", "rtn:3:128:16"),
    ("", "AWQ", "AutoAWQ, llm-compressor", "weight_only", "awq:3:128:16"),
    ("", "GPTQ", "GPTQModel, llm-compressor", "weight_only", "gptq-gar:3:128:16"),
    ("", "D2Quant as published", "", "weight_only", "d2quant:3:128:16"),
    ("", "**d2quant-plus**", "subnibble", "weight_only", "d2quant-plus:3:128:16"),
    ("2-bit weights", "GPTQ", "GPTQModel, llm-compressor", "weight_only", "gptq-gar:2:128:16"),
    ("", "**d2quant-plus**", "subnibble", "weight_only", "d2quant-plus:2:128:16"),
    ("W4A4", "SmoothQuant", "llm-compressor, ModelOpt", "weight_activation", "smoothquant:W4A4g128:16"),
    ("", "QuaRot", "", "weight_activation", "quarot:W4A4g128:16"),
    ("", "SERQ as published", "", "weight_activation", "serq:W4A4g128:16"),
    ("", "**serq-plus**", "subnibble", "weight_activation", "serq-plus:W4A4g128:16"),
    ("W4A4KV4", "QuaRot", "", "weight_activation_kv", "quarot:W4A4KV4g128:none:16"),
    ("", "Atom", "", "weight_activation_kv", "atom:W4A4KV4g128:none:16"),
    ("", "**Atom, centred keys, tuned**", "subnibble", "weight_activation_kv",
     "atom-centered-distilled:W4A4KV4g128:none:16"),
)  # fmt: skip
RESULTS = HERE / "results"


def row_of(bench: str, text: str) -> dict[str, dict[str, Any]]:
    """The finished row of a bench, by the name of the text."""
    module = importlib.import_module(bench)
    rows = json.loads((RESULTS / f"{bench}.json").read_text())
    row: dict[str, dict[str, Any]] = module.by_spec(rows, module.Spec)[module.parse_spec(text)]
    return row


def presets() -> list[list[str]]:
    """Lines of the table of presets."""
    speeds = {row["preset"]: row for row in json.loads((RESULTS / "speed.json").read_text())}
    lines = []
    for what, preset, bench, text in PRESETS:
        row, speed = row_of(bench, text), speeds.get(preset)
        name = f"`{preset}`" if preset else ""
        size = "" if preset == "kv4" else f"{row['news']['file_bytes'] / 1e6:.1f}"
        decoding = "" if speed is None else f"{speed['packed_decode'] / speed['original_decode']:.2f}"
        lines.append([what, name, size, *score_cells(row), decoding, f"`{text}`"])
    return lines


def methods() -> list[list[str]]:
    """Lines of the table of methods."""
    lines = []
    for setting, method, programs, bench, text in METHODS:
        row = row_of(bench, text)
        scores = [f"**{cell}**" if method.startswith("**") else cell for cell in score_cells(row)]
        lines.append([setting, method, programs, f"{row['news']['effective_bits']:.2f}", *scores, f"`{text}`"])
    return lines


def kernels() -> list[list[str]]:
    """Lines of the table of kernels: of 4096x4096 on one thread, by bits."""
    module = importlib.import_module("kernels")
    rows = json.loads((RESULTS / "kernels.json").read_text())
    one, many = (
        next(row for row in rows if (row["shape"], row["threads"], row["tokens"]) == ("4096x4096", 1, tokens))
        for tokens in (1, 512)
    )
    lines = []
    for bits in (2, 3, 4):
        line = [str(bits)]
        for row in (one, many):
            for inputs in ("a8", "a16"):
                name = f"subnibble w{bits}{inputs}"
                line += [module.share(row, name, row is many), module.of_best_peer(row, name)]
        lines.append(line)
    return lines


def main() -> None:
    print_table(("for", "preset", "file, MB", "news", "WikiText-2", "speed", "row"), presets())
    print()
    print_table(("what", "method", "in", "bits a weight", "news", "WikiText-2", "row"), methods())
    print()
    heads = [f"{tokens}, {inputs}" for tokens in ("1 token", "512") for inputs in ("int8", "bfloat16")]
    print_table(("bits", *(head for each in heads for head in (each, "of best"))), kernels())


if __name__ == "__main__":
    main()
