"""What the benches share: one quantization measured in a process of its own, and a table that grows by such rows."""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rows import Rows

if TYPE_CHECKING:
    from subnibble.recipe import Recipe

T = TypeVar("T")
WINDOW = 2048
HERE = Path(__file__).parent


def parts_of(text: str, form: str, numbers: int) -> tuple[list[str], list[int]]:
    """A row as written on the command line, split at colons: words, and at its end so many whole numbers.

    form: how a row is written, for the message of the `ArgumentTypeError`; what it has in brackets may be left out and
    is the number before then. The last number, windows, is above 0.
    """
    parts, most = text.split(":"), form.count(":") + 1
    if "[" in form and len(parts) == most - 1:
        parts.append(parts[-1])
    words, counts = parts[:-numbers], parts[-numbers:]
    if len(parts) != most or not all(part.isdecimal() for part in counts) or int(counts[-1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give {form}, whole numbers at its end and the last above 0")
    return words, [int(part) for part in counts]


def texts(wikitext: Path) -> dict[str, str]:
    """Name -> what `read_text` takes; WikiText is left out, with one message, where its file is not."""
    file = wikitext / "test.raw.txt"
    if not file.is_file():
        print(f"{file} is not there: rows on WikiText-2 are left out (--wikitext DIR)", file=sys.stderr)
        return {"news": "news"}
    return {"news": "news", "wikitext2": str(file)}


def with_data(recipe: Recipe, windows: int) -> Recipe:
    """The recipe calibrated as all rows are, on news in bfloat16, if it needs data.

    On `windows` times 2048 tokens; a recipe with shorter windows has them cut into so many more.
    """
    from subnibble.methods import find_method
    from subnibble.pipeline.plan import needs_data

    needs = needs_data(recipe, find_method(recipe.method).steps(recipe.options))
    window = min(recipe.window, WINDOW)
    windows = windows * WINDOW // window
    return replace(recipe, num_windows=windows, window=window, dtype="bfloat16", calibration="news" if needs else None)


def measure_row(
    recipe: Recipe | None,
    windows: int,
    names: dict[str, str],
    exact_inputs: bool = False,
    change: Callable[[Any, Any], None] | None = None,
) -> list[Any]:
    """Quantize the demo's model by `recipe` (None: not at all) and score it: facts for each text.

    exact_inputs: score the same codes with inputs that are not quantized, too. change: of the loaded model, given with
    its tokenizer, before it is scored.
    """
    from subnibble import quantize
    from subnibble.calibrate.tokens import bos_token
    from subnibble.calibrate.windows import evaluation_windows
    from subnibble.checkpoint.opening import open_source
    from subnibble.checkpoint.size import measure
    from subnibble.evaluation.perplexity import score
    from subnibble.hf import load_model, packed_modules
    from subnibble.packaged.model import find_model
    from subnibble.version import __version__

    model = find_model()
    facts: dict[str, Any] = {"version": __version__, "window": WINDOW, "scored_in": "float32", **environment()}
    with tempfile.TemporaryDirectory() as folder:
        path = model
        if recipe is not None:
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
        if change is not None:
            change(loaded, tokenizer)
        cuts = {name: evaluation_windows(where, tokenizer, WINDOW, windows) for name, where in names.items()}

        def perplexities() -> list[float]:
            bos = bos_token(tokenizer)
            return [score({"m": loaded}, cut, bos)["m"].perplexity for cut in cuts.values()]

        rows = [{"text": name, "perplexity": found} for name, found in zip(cuts, perplexities(), strict=True)]
        if exact_inputs:
            for module in packed_modules(loaded).values():
                module.activation = None
            for row, found in zip(rows, perplexities(), strict=True):
                row["perplexity_exact_inputs"] = found
        return [row | facts for row in rows]


def environment() -> dict[str, Any]:
    """What a row was made with: the commit of this tree, releases, the processor's instruction set and threads."""
    import torch
    import transformers

    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    told = subprocess.run(command, check=False, capture_output=True, text=True)
    return {
        "commit": told.stdout.strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }


def by_spec(rows: list[dict[str, Any]], spec: type[T]) -> dict[T, dict[str, dict[str, Any]]]:
    """Rows by what they are of, then by text. spec: a dataclass whose fields are fields of the rows."""
    found: dict[T, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(spec(**{item.name: row[item.name] for item in fields(spec)}), {})[row["text"]] = row
    return found


def score_cells(of_spec: dict[str, dict[str, Any]]) -> list[str]:
    """Perplexity on news and on WikiText-2, empty where there is none."""
    return [f"{of_spec[text]['perplexity']:.2f}" if text in of_spec else "" for text in ("news", "wikitext2")]


def share_cell(of_spec: dict[str, dict[str, Any]], share: Callable[[str], float | None], style: str) -> str:
    """A share for each text that has one, in percent. style: how a percentage is written, as in format strings."""
    found = (share(text) for text in of_spec)
    return " / ".join(f"{100 * value:{style}} %" for value in found if value is not None)


def cost_cells(row: dict[str, Any]) -> list[str]:
    """Seconds and peak memory of quantizing, empty for what was not quantized; the commit of rows that know theirs."""
    cost = [f"{row['seconds']:.0f}", f"{row['peak_memory'] / 1e9:.1f}"] if "seconds" in row else ["", ""]
    return [*cost, row.get("commit", "")]


def print_table(columns: tuple[str, ...], rows: Iterable[list[str]]) -> None:
    """A table as Markdown."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


def gap_left(row: dict[str, Any] | None, base: dict[str, Any] | None, original: dict[str, Any] | None) -> float | None:
    """log(perplexity / original's) over the same of `base`; None where a row is missing."""
    if row is None or base is None or original is None:
        return None
    logs = [math.log(one["perplexity"] / original["perplexity"]) for one in (row, base)]
    return logs[0] / logs[1]


def run(
    parser: argparse.ArgumentParser,
    results: Path,
    key: tuple[str, ...],
    spec: Callable[..., Any],
    measured: Callable[[Any, dict[str, str]], list[dict[str, Any]]],
    target: Callable[[argparse.Namespace], Iterable[Any]],
    show: Callable[[list[dict[str, Any]]], None],
) -> None:
    """The bench's command line: make the rows that are missing, each in its own process, and print the table.

    spec: a dataclass of what a row is of. measured: rows of one spec on some texts. wanted: specs to make.
    """
    parser.add_argument("--wikitext", type=Path, default=HERE.parent.parent / "shared" / "data" / "wikitext-2")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--print", action="store_true", help="print the finished rows and run none")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        values, names = json.loads(arguments.child)
        print("ROWS " + json.dumps([{**values, **row} for row in _made(measured, spec(**values), names)]))
        return
    table = Rows(arguments.results, key)
    if not arguments.print:
        available = texts(arguments.wikitext)
        for one in target(arguments):
            missing = {n: w for n, w in available.items() if not table.has({**asdict(one), "text": n})}
            if not missing:
                continue
            print(f"{one} on {', '.join(missing)}", file=sys.stderr, flush=True)
            command = [sys.executable, sys.argv[0], "--child", json.dumps([asdict(one), missing])]
            child = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
            if child.returncode:
                sys.exit(f"{one} was not made (exit code {child.returncode}); rows before it are kept")
            line = next(line for line in child.stdout.splitlines() if line.startswith("ROWS "))
            for row in json.loads(line.removeprefix("ROWS ")):
                table.append(row)
    show(table.rows)


def _made(measured: Callable[..., list[dict[str, Any]]], spec: Any, names: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of `spec`; what cannot be asked for ends the process with its message alone."""
    from subnibble.errors import SubnibbleError

    try:
        return measured(spec, names)
    except SubnibbleError as error:
        sys.exit(f"error: {error}")
