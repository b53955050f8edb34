"""Rows of the benches are asked for by name, and what README and docs show of them is what was measured."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from subnibble import Recipe
from subnibble.kernels import verified
from subnibble.methods import find_method
from subnibble.presets import preset

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
        "original::default-added:16", "original:KV4:none:16", "nothing:KV4:none:16",
    ),
}  # fmt: skip


def bench(name: str) -> Any:
    folder = str(ROOT / "bench")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def rows(name: str) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    return result


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


def test_docs_show_the_speeds(capsys: pytest.CaptureFixture[str]) -> None:
    bench("speed").show(rows("speed"))
    table = capsys.readouterr().out
    assert table.count("\n") > 8
    assert table in (ROOT / "docs" / "profile.md").read_text()


def test_docs_show_where_tokens_part(capsys: pytest.CaptureFixture[str]) -> None:
    bench("same_tokens").show(rows("same_tokens"))
    table = capsys.readouterr().out.strip()
    assert table.count("\n") > 8
    assert table in (ROOT / "docs" / "generation.md").read_text()


def test_readme_shows_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    bench("readme_tables").main()
    tables = capsys.readouterr().out.split("\n\n")
    readme = (ROOT / "README.md").read_text()
    assert len(tables) == 3
    assert all(table.count("\n") > 3 and table.strip() in readme for table in tables)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def resolved(recipe: Recipe) -> dict[str, Any]:
    """A recipe's keys, what it leaves to its method filled in."""
    method = find_method(recipe.method)
    values = recipe.to_dict()
    steps = method.build(method.configure(recipe.options))
    return values | {
        "options": dataclasses.asdict(method.configure(recipe.options)),
        "kv": recipe.cache_scheme(steps.cache),
    }


def test_all_rows_of_the_readme_are_of_the_environment_that_it_names() -> None:
    tables = bench("readme_tables")
    lines = {line[-2:] for line in (*tables.PRESETS, *tables.METHODS)}
    rows = [tables.row_of(*line)["news"] for line in lines]
    keys = ("processor", "threads", "torch", "transformers")
    assert {tuple(row[key] for key in keys) for row in rows} == {("x86_64 AVX512", 1, "2.13.0+cpu", "5.24.0")}
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "one thread, x86-64 with AVX-512, torch 2.13.0, transformers 5.24.0" in text


@pytest.mark.parametrize("line", bench("readme_tables").PRESETS[1:], ids=lambda line: line[1])
def test_a_preset_is_what_its_row_measured(line: tuple[str, str, str, str]) -> None:
    _, name, module, text = line
    spec = bench(module).parse_spec(text)
    if module == "weight_only":
        setting = {"bits": spec.bits, "group_size": spec.group_size}
    else:
        setting = {**getattr(bench(module), "CACHES", {}), **bench(module).SETTINGS}[spec.setting]
    assert resolved(bench("arms").recipe_of(module, spec.arm, **setting)) == resolved(preset(name))


def test_a_row_that_was_killed_finds_its_unfinished_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = bench("measure")
    found: list[bool] = []

    def stop(model: Any, path: Path, recipe: Any) -> None:
        unfinished = path.with_name(".model.partial")
        found.append(unfinished.is_dir())
        unfinished.mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "_quantized", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measure.measure_row(Recipe("rtn", 4), 1, {})
    assert found == [False, True]


def test_a_row_that_a_verification_of_the_kernels_prints_is_one_of_their_table() -> None:
    program = bench("verify_kernels")
    row = tomllib.loads(program.row("new", program.processor(), program.commit()))
    table = tomllib.loads(verified.TABLE.read_text())
    assert row["verified"][0].keys() == table["verified"][0].keys()
