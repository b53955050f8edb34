"""Rows of the benches are asked for by name, and what README and docs show of them is what was measured."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TABLES = {
    "weight_only": "results.md",
    "weight_activation": "results-activations.md",
    "weight_activation_kv": "results-kv.md",
}
WRONG = {
    "weight_only": (
        "gptq-gar:3:128", "gptq-gar:3:128:16:16", "gptq-gar:3:128:0", "gptq-gar:3:-1:16", "gptq-gar:three:128:16",
        "nothing:3:128:16", "original:8:64:16", "",
    ),
    "weight_activation": (
        "serq", "serq:W4A4g128", "serq:W4A4g128:16:4:9", "serq:W5A4g128:16", "serq::16", "serq:W4A4g128:-4",
        "serq:W4A4g128:0:4", "original:W4A4g128:16", "nothing:W4A4g128:16",
    ),
    "weight_activation_kv": (
        "kv:KV4:bos", "kv:KV4:bos:0", "kv:KV4:nobody:16", "kv:W4A4KV4g128:bos:16", "atom:KV4:none:16",
        "original::default-late:16", "original:KV4:none:16", "nothing:KV4:none:16",
    ),
}  # fmt: skip


def bench(name: str) -> Any:
    folder = str(ROOT / "bench")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    return found


def written(spec: Any) -> str:
    return ":".join(str(value) for value in dataclasses.astuple(spec))


@pytest.mark.parametrize("name", TABLES)
def test_every_row_can_be_asked_for_by_name(name: str) -> None:
    module = bench(name)
    specs = module.specs(None)
    assert len(specs) > 50
    for spec in specs:
        # How many windows the original was calibrated on is left out.
        text = written(spec) if name != "weight_activation" or spec.arm != "original" else f"original::{spec.windows}"
        assert module.parse_spec(text) == spec


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in WRONG.items() for text in texts])
def test_a_row_that_cannot_be_is_refused(name: str, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"give|choose"):
        bench(name).parse_spec(text)


@pytest.mark.parametrize("name", TABLES)
def test_docs_show_the_table_of_all_finished_rows(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    bench(name).show(rows(name))
    table = capsys.readouterr().out
    assert table.count("\n") > 30
    assert table in (ROOT / "docs" / TABLES[name]).read_text()


def test_docs_show_the_errors_by_rank(capsys: pytest.CaptureFixture[str]) -> None:
    bench("rank_error").show(rows("rank_error"))
    table = capsys.readouterr().out
    assert table.count("\n") == 2 + len(bench("rank_error").ARMS)
    assert table in (ROOT / "docs" / "results-activations.md").read_text()


def misquoted(readme: str) -> tuple[list[str], int]:
    """Rows that a text shows with other figures than were measured, and how many it shows.

    A row is a table's line that ends with what `--row` takes, perplexities on news and on WikiText-2 before it.
    """
    wrong, shown = [], 0
    for line in readme.splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        match = re.fullmatch(r"`([a-z0-9-]+:\S*)`", cells[-1])
        if match is None:
            continue
        # Which bench a row is of follows from its form: bits, or a setting, and then a prompt.
        _, setting, *rest = match[1].split(":")
        name = "weight_only" if setting.isdigit() else list(TABLES)[len(rest)]
        module = bench(name)
        measured = module.by_spec(rows(name), module.Spec).get(module.parse_spec(match[1]), {})
        figures = [f"{measured[text]['perplexity']:.2f}" for text in ("news", "wikitext2") if text in measured]
        bits = f"{measured['news']['effective_bits']:.3f}" if measured else ""
        # Where nothing but a cache is coded, weights have 16 bits.
        if cells[-3:-1] != figures or (bits not in cells and "16" not in cells):
            wrong.append(match[1])
        shown += 1
    return wrong, shown


def test_readme_shows_what_was_measured() -> None:
    readme = (ROOT / "README.md").read_text()
    wrong, shown = misquoted(readme)
    assert wrong == []
    assert shown > 30
    line = next(line for line in readme.splitlines() if line.endswith("`gptq-rotated:2:128:16` |"))
    for figure in re.findall(r"\d+\.\d+", line):
        changed = line.replace(figure, f"{float(figure) + 0.01:.{len(figure.partition('.')[2])}f}")
        assert misquoted(readme.replace(line, changed))[0] == ["gptq-rotated:2:128:16"]
