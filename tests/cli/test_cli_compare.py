"""`subnibble compare`: every method and width side by side, and mistakes known before anything is quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Run


def test_compare_shows_every_method_and_width(
    run: Run, folders: dict[str, Path], text_file: Path, token_file: Path, tmp_path: Path
) -> None:
    common = ("--window", 32, "--num-windows", 4, "--group-size", 16, "--calibration", token_file)
    code, out, err = run(
        "compare",
        folders["llama-tied"],
        "--methods",
        "rtn,gptq",
        "--bits",
        "3,4",
        "--text",
        text_file,
        "--json",
        *common,
    )
    assert code == 0, err
    rows = json.loads(out)
    assert [row["name"] for row in rows] == [
        "original", "rtn-w3g16", "gptq-w3g16", "rtn-w4g16", "gptq-w4g16",
    ]  # fmt: skip
    assert rows[0]["kl_divergence"] == 0
    assert rows[3]["kl_divergence"] < rows[1]["kl_divergence"]
    code, out, _ = run("compare", folders["llama-tied"], "--text", text_file, "--out", tmp_path / "kept", *common)
    assert code == 0
    assert "gptq-w3g16" in out
    assert (tmp_path / "kept" / "gptq-w3g16" / "config.json").is_file()


def test_what_is_recommended_can_be_compared(
    run: Run, folders: dict[str, Path], text_file: Path, token_file: Path
) -> None:
    code, out, err = run(
        "compare", folders["llama-tied"], "--methods", "gptq", "--zero-point", "real", "--embedding-bits", 8,
        "--distill-steps", 2, "--distill-option", "tokens=64", "--window", 32, "--num-windows", 4, "--group-size", 16,
        "--calibration", token_file, "--text", text_file, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert [row["name"] for row in json.loads(out)] == ["original", "gptq-w3g16-real-distilled2"]
    code, out, err = run(
        "compare", folders["llama"], "--methods", "none,rtn", "--bits", "3,4", "--group-size", 16, "--kv-bits", 4,
        "--text", text_file, "--window", 32, "--json",
    )  # fmt: skip
    assert code == 0, err
    names = ["original", "none-kv4head", "rtn-w3g16-kv4head", "rtn-w4g16-kv4head"]
    assert sorted(row["name"] for row in json.loads(out)) == sorted(names)


def test_compare_hands_options_to_the_methods_that_have_them(
    run: Run, folders: dict[str, Path], text_file: Path, token_file: Path
) -> None:
    common = ("--window", 32, "--num-windows", 4, "--group-size", 16, "--calibration", token_file, "--text", text_file)
    code, out, err = run(
        "compare", folders["llama"], "--methods", "rtn,serq", "--bits", 4, "--activation-bits", 4, "--json",
        "--option", "rank=16", *common,
    )  # fmt: skip
    assert code == 0, err
    assert [row["name"] for row in json.loads(out)] == ["original", "rtn-w4g16-a4g16", "serq-w4g16-a4g16-rank=16"]
    code, out, err = run("compare", folders["llama"], "--methods", "rtn,omniquant", "--effort", "much", *common)
    assert code == 2
    assert "effort is 'much'; choose one of fast, default, best" in err


COMPARE_WRONG = {
    "an option of no method": (["--option", "rank=16"], "none of rtn, gptq has it"),
    "no windows": (["--max-windows", 0], "--max-windows at least 1"),
    "negative windows": (["--max-windows", -1], "--max-windows at least 1"),
    "window of one": (["--window", 1], "--window must be at least 2"),
    "a method twice": (["--methods", "rtn,rtn"], "rtn-w3g16 is given 2 times"),
    "no calibration": (["--calibration", "nope.txt"], "no such text file"),
    "unknown method": (["--methods", "rtn,nope"], "unknown method 'nope'"),
    "bits": (["--bits", "three"], "give whole numbers"),
    "a rank that does not fit, behind one that does": (
        ["--methods", "gptq,serq", "--activation-bits", 4], "rank 128 is larger than the 48 inputs",
    ),
    "no methods": (["--methods", ","], "--methods is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPARE_WRONG)
def test_compare_knows_mistakes_before_it_quantizes(
    case: str, run: Run, folders: dict[str, Path], text_file: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from subnibble.checkpoint.writer import CheckpointWriter

    monkeypatch.setattr(CheckpointWriter, "__enter__", lambda self: pytest.fail("a quantization began"))
    extra, message = COMPARE_WRONG[case]
    code, out, err = run(
        "compare", folders["llama-tied"], "--text", text_file, "--group-size", 16, "--num-windows", 4, "--window", 32,
        "--calibration", token_file, *extra,
    )  # fmt: skip
    assert code == 2
    assert message in err
    assert out == ""


def test_compare_computes_in_the_type_it_is_given(run: Run, folders: dict[str, Path], text_file: Path) -> None:
    perplexities = []
    for dtype in ("float32", "bfloat16"):
        common = ("--methods", "rtn", "--group-size", 16, "--window", 32, "--json", "--dtype", dtype)
        code, out, err = run("compare", folders["llama-tied"], "--text", text_file, *common)
        assert code == 0, err
        perplexities.append(json.loads(out)[0]["perplexity"])
    assert perplexities[0] != perplexities[1]
