"""Profile one GPTQ run on SmolLM2-135M, step by step.

    python bench/profile_gptq.py [--num-windows 16] [--dtype float32]

Prints a Markdown table of seconds and shares, and the speed of the matrix products in GFLOP/s.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

MEANING = {
    "forward": "activations through the blocks (each attention and MLP once, each reader once more)",
    "gram": "Gram matrices of the sites' tensors, up to the diagonal",
    "round": "factorization, clip search and column loop",
    "measure error": "output error of every linear, and of round-to-nearest for comparison",
    "read text": "calibration text and tokenizer",
    "read": "weights, dequantized from GGUF",
    "write": "packed shards, tokenizer, config",
    "embedding": "embedding rounded to 8 bits",
    "check sites": "invariance of two blocks",
}


def main() -> None:
    """Quantize the model once and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-windows", type=int, default=16, help="calibration windows")
    parser.add_argument("--dtype", default="float32", help="type of the activations, float32 or bfloat16")
    arguments = parser.parse_args()
    from subnibble import Recipe, quantize
    from subnibble.checkpoint.opening import open_source
    from subnibble.packaged.model import find_model

    recipe = Recipe(
        method="gptq", bits=3, embedding_bits=8, calibration="news", num_windows=arguments.num_windows,
        dtype=arguments.dtype,
    )  # fmt: skip
    source = open_source(find_model())
    with tempfile.TemporaryDirectory() as folder:
        report = quantize(source, Path(folder) / "model", recipe)
    seconds = report.seconds
    print(f"{arguments.num_windows} windows of {recipe.window} tokens, {arguments.dtype}, {seconds['total']:.0f} s\n")
    print("| step | s | share | what |\n|---|---|---|---|")
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        if name in MEANING:
            print(f"| {name} | {spent:.1f} | {100 * spent / seconds['total']:.0f} % | {MEANING[name]} |")
    config, tokens = source.config, report.calibration_tokens
    wide, narrow = config.intermediate_size, config.hidden_size
    # Only half of each Gram matrix is computed, because it is symmetric.
    gram = tokens * config.num_hidden_layers * (3 * narrow**2 + wide**2)
    forward = 2 * tokens * sum(rows * columns for rows, columns in (linear.shape for linear in report.linears))
    print(
        f"\nforward {forward / seconds['forward'] / 1e9:.0f} GFLOP/s, gram {gram / seconds['gram'] / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
