"""Count where the native step and the torch operations choose different tokens.

    python bench/same_tokens.py FOLDER ... [--text FILE] [--prompts N] [--tokens N]
    python bench/same_tokens.py --print

Each packed model of the arguments continues prompts greedily on the native step, all prompts in one batch. Then torch
reads the same texts: a token is "other" where torch's most likely token is another one, and "gap" is by how much torch
prefers it, in logits. Both round inputs alike; the step keeps unquantized keys and values in 16 bits and sums in
another order. Finished rows are appended to the results file; later runs skip them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from measure import HERE, environment, print_table
from rows import Rows

KEY = ("model", "weights", "prompts", "tokens", "processor")
PROMPT_TOKENS = 24


def main() -> None:
    """Measure each folder that is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="packed models")
    parser.add_argument("--text", type=Path, help="text whose lines begin the prompts; default: the demo's news")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "same_tokens.json", help="results file")
    parser.add_argument("--print", action="store_true", help="print finished rows, measure none")
    arguments = parser.parse_args()
    rows = Rows(arguments.results, KEY)
    for folder in [] if arguments.print else arguments.folders:
        facts = {**environment(), **identity(folder), "prompts": arguments.prompts, "tokens": arguments.tokens}
        if not rows.has(facts):
            rows.append({**facts, **measured(folder, arguments.text, arguments.prompts, arguments.tokens)})
    show(rows.rows)


def identity(folder: Path) -> dict[str, Any]:
    """Name and hash of a packed model's weights."""
    from subnibble.checkpoint.size import weights_hash

    return {"model": folder.resolve().name, "weights": weights_hash(folder)[:12]}


def measured(folder: Path, text: Path | None, prompts: int, tokens: int) -> dict[str, Any]:
    """Continue prompts on the native step and read the results in torch."""
    import torch

    from subnibble.generate.native_backend import NativeBackend
    from subnibble.hf import load_model
    from subnibble.model.transformers_api.generation import logits_of

    model, tokenizer = load_model(folder, "float32"), _tokenizer(folder)
    texts = _prompts(tokenizer, text, prompts)
    backend = NativeBackend(model)
    slots = [backend.open() for _ in texts]
    chosen = backend.forward(slots, texts).argmax(-1).tolist()
    results = [[*ids, token] for ids, token in zip(texts, chosen, strict=True)]
    for _ in range(tokens - 1):
        chosen = backend.forward(slots, [[token] for token in chosen]).argmax(-1).tolist()
        for ids, token in zip(results, chosen, strict=True):
            ids.append(token)
    gaps, firsts = [], []
    for ids in results:
        with torch.inference_mode():
            logits = logits_of(model, torch.tensor([ids[:-1]]))[0, PROMPT_TOKENS - 1 :].float()
        new = torch.tensor(ids[PROMPT_TOKENS:])
        gap = logits.amax(-1) - logits.gather(1, new.unsqueeze(1))[:, 0]
        other = gap.nonzero()[:, 0]
        firsts.append(int(other[0]) if len(other) else tokens)
        gaps += gap[other].tolist()
    return {
        "compared": prompts * tokens, "other": len(gaps), "largest_gap": max(gaps, default=0.0),
        "equal_prompts": sum(first == tokens for first in firsts), "first_other": min(firsts),
    }  # fmt: skip


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _prompts(tokenizer: Any, text: Path | None, count: int) -> list[list[int]]:
    """Token ids of the beginnings of long lines, evenly spread over the text."""
    from subnibble.packaged.news import test_text

    content = test_text() if text is None else text.read_text()
    lines = [line for line in content.split("\n") if len(line) > 200]
    chosen = lines[:: max(1, len(lines) // count)][:count]
    return [tokenizer(line, add_special_tokens=False).input_ids[:PROMPT_TOKENS] for line in chosen]


def show(rows: list[dict[str, Any]]) -> None:
    """Print all rows."""
    columns = ("model", "tokens", "other", "largest gap", "prompts without another token")
    print_table(
        columns,
        [
            (row["model"], str(row["compared"]), str(row["other"]), f"{row['largest_gap']:.3f}",
             f"{row['equal_prompts']} of {row['prompts']}")
            for row in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
