"""The command line: what scripts rely on, from arguments to checkpoints and numbers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from conftest import Run
from subnibble.cli import console
from subnibble.methods import METHODS
from subnibble.tuning.samples import Samples, TrainingWindows


def test_quantize_evaluate_and_inspect_work_together(
    run: Run, arguments: list[object], folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "effective bits" in out
    code, out, err = run(
        "evaluate", tmp_path / "out", "--text", text_file, "--window", 32, "--max-windows", 5,
        "--reference", folders["llama"], "--layers", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result["windows"] == 5
    assert 3 < result["effective_bits"] < 5
    assert result["model_bits"] > 0
    assert result["perplexity"] > 1
    assert result["kl_divergence"] > 0
    assert 0 <= result["top1_agreement"] <= 1
    assert len(result["output_errors"]) == 21
    wrong = (folders["mistral"], "--layers", "--text", text_file, "--window", 32)
    code, _, err = run("evaluate", tmp_path / "out", "--reference", *wrong)
    assert code == 2
    assert "give the model that it was quantized from" in err
    code, out, _ = run("inspect", tmp_path / "out", "--json")
    assert code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert json.loads(out)["weights_sha256"] == report["weights_sha256"]
    code, out, _ = run("generate", tmp_path / "out", "--prompt", "w1 w2", "--max-new-tokens", 3)
    assert code == 0
    assert len(out.split()) == 3


def test_grid_and_zero_point_reach_the_checkpoint(run: Run, arguments: list[object], tmp_path: Path) -> None:
    for extra, name in ((("--grid", "sign"), "w3g32-sign"), (("--zero-point", "real"), "w3g32-real")):
        code, _, err = run(*arguments, *extra, "--overwrite")
        assert code == 0, err
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert {linear["scheme"] for linear in report["linears"]} == {name}


def test_quantized_inputs_reach_the_checkpoint_and_every_command(
    run: Run, arguments: list[object], folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    extra = ("--method", "serq-plus", "--bits", 4, "--group-size", 16, "--activation-bits", 4, "--option", "rank=16")
    code, out, err = run(*arguments, *extra)
    assert code == 0, err
    assert "activation bits" in out
    code, out, _ = run("inspect", tmp_path / "out")
    assert code == 0
    assert "a4g16" in out
    assert "salient 16 x w4g16" in out
    code, out, err = run("evaluate", tmp_path / "out", "--text", text_file, "--window", 32, "--json")
    assert code == 0, err
    assert 4 < json.loads(out)["activation_bits"] < 16
    code, out, err = run("generate", tmp_path / "out", "--prompt", "w1 w2", "--max-new-tokens", 3)
    assert code == 0, err
    code, out, err = run(
        "compare", folders["llama"], "--methods", "rtn", "--bits", 4, "--group-size", 32, "--grid", "mxfp4",
        "--activation-bits", 4, "--text", text_file, "--window", 32, "--json",
    )  # fmt: skip
    assert code == 0, err
    rows = json.loads(out)
    assert [row["name"] for row in rows] == ["original", "rtn-mxfp4g32-amxfp4g32"]
    assert rows[0]["activation_bits"] == 16
    assert 4 < rows[1]["activation_bits"] < 5


def test_a_coded_cache_and_a_prompt_reach_the_checkpoint_and_every_command(
    run: Run, folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("w4 w5 w6")
    cache = ("--kv-bits", 4, "--kv-option", "group_size=8", "--kv-option", "rope=before")
    code, said, err = run("quantize", folders["llama"], out, "--method", "none", *cache, "--system-prompt", prompt)
    assert code == 0, err
    # Three layers, two heads, key and value of 8 bytes of codes and two groups.
    assert "192 KV-cache bytes per token" in said
    code, said, _ = run("inspect", out)
    assert "192 bytes per token, kv4g8-prerope" in said
    assert "3 tokens at 16 bits" in said
    code, said, _ = run("inspect", out, "--json")
    assert json.loads(said)["prefix"] == {"ids": [4, 5, 6], "bos": None}
    code, said, err = run("estimate", folders["llama"], "--method", "none", *cache, "--json")
    assert code == 0, err
    assert json.loads(said)["cache_bytes"] == 192
    code, more, err = run("estimate", folders["llama"], "--method", "none", *cache, "--json", "--system-prompt", prompt)
    assert code == 0, err
    # Three tokens of three layers' keys and values at 16 bits, two heads of 16 channels.
    assert json.loads(more)["file_bytes"] - json.loads(said)["file_bytes"] == 3 * 3 * 2 * 2 * 16 * 2
    text = ("--text", text_file, "--window", 16, "--json")
    code, said, err = run("evaluate", out, *text, "--reference", folders["llama"])
    assert code == 0, err
    stored = json.loads(said)
    assert (stored["cache_bytes"], stored["prefix_tokens"]) == (192, 3)
    code, said, err = run("evaluate", folders["llama"], *text, *cache, "--system-prompt", prompt)
    assert code == 0, err
    assert abs(json.loads(said)["perplexity"] / stored["perplexity"] - 1) < 0.01
    code, said, err = run("prefix", out, "--system-prompt", "w7")
    assert code == 0, err
    assert "system prompt of 1 tokens" in said
    settings = ("--prompt", "w1 w2", "--max-new-tokens", 3)
    code, said, err = run("generate", out, *settings)
    assert code == 0, err
    code, said, err = run("generate", folders["llama"], *settings, "--kv-bits", 3, "--system-prompt", "w7")
    assert code == 0, err
    for wrong in (("--kv-bits", 5), ("--kv-option", "window=4"), ("--kv-bits", 4, "--kv-option", "windows=4")):
        code, _, err = run("evaluate", folders["llama"], *text, *wrong)
        assert (code, "error:" in err) == (2, True)


def test_effort_reaches_the_method_that_tunes(run: Run, arguments: list[object], tmp_path: Path) -> None:
    tuned = [*arguments, "--method", "bisup", "--activation-bits", 4, "--kv-bits", 4]
    code, _, err = run(*tuned, "--effort", "much")
    assert code == 2
    assert "effort is 'much'; choose one of fast, default, best" in err
    code, _, err = run(*arguments, "--effort", "fast")
    assert code == 2
    assert "method gptq has no option 'effort'" in err
    assert not (tmp_path / "out").exists()
    code, out, err = run(*tuned, "--effort", "fast", "--system-prompt", "w5 w9")
    assert code == 0, err
    assert "bisup" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [block["epochs"] for block in report["blocks"]] == [2, 2, 2]
    assert "skipped" not in err


def test_steps_that_were_not_finite_are_told(
    run: Run, arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    value = TrainingWindows.value.fget

    def spoiled(windows: TrainingWindows) -> Samples:
        result = value(windows)
        result.target[0] = float("nan")
        return result

    monkeypatch.setattr(TrainingWindows, "value", property(spoiled))
    code, _, err = run(*arguments, "--method", "bisup", "--activation-bits", 4, "--effort", "fast")
    assert code == 0, err
    assert "tuning skipped steps that were not finite in 3 of 3 blocks, first in model.layers.0" in err


def test_plain_table_without_json(run: Run, folders: dict[str, Path], text_file: Path) -> None:
    code, out, _ = run("evaluate", folders["llama"], "--text", text_file, "--window", 32)
    assert code == 0
    assert "perplexity" in out


def test_json_holds_null_where_a_number_is_infinite(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5]}


def test_estimate_reads_no_weight_and_knows_the_size(
    run: Run, arguments: list[object], folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*arguments)[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    from subnibble.checkpoint.safetensors_source import SafetensorsSource

    monkeypatch.setattr(SafetensorsSource, "load", lambda *a: pytest.fail("a weight was read"))
    sizes = ("--method", "gptq", "--bits", 3, "--group-size", 32, "--embedding-bits", 8)
    code, out, _ = run("estimate", folders["llama"], *sizes, "--window", 32, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["effective_bits"] == pytest.approx(report["size"]["effective_bits"], rel=1e-12)
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in (tmp_path / "out").glob("*.safetensors"))
    assert result["file_bytes"] + headers == report["size"]["file_bytes"]
    assert result["memory_bytes"]["peak"] == sum(v for k, v in result["memory_bytes"].items() if k != "peak")
    # What quantize would refuse, estimate refuses.
    code, _, err = run("estimate", folders["llama"], *sizes)
    assert code == 2
    assert "2048" in err


def test_list_names_methods_and_architectures(run: Run) -> None:
    code, out, _ = run("list", "--json")
    assert code == 0
    assert [method["name"] for method in json.loads(out)["methods"]] == [
        "rtn", "awq", "gptq", "gptaq", "d2quant", "d2quant-plus", "smoothquant", "l2qer", "qera",
            "quarot", "serq", "serq-plus", "atom", "omniquant", "bisup", "none",
    ]  # fmt: skip
    code, out, _ = run("list")
    assert code == 0
    for method in METHODS.values():
        assert method.name in out
        assert method.summary in out
        for key, value in asdict(method.options()).items():
            assert key in out
            assert str(value) in out
    for word in ("groups", "published", "shifted", "hessian", "natural", "refit"):
        assert word in out


@pytest.mark.parametrize("name", METHODS)
def test_list_explains_every_option_of_a_method(run: Run, name: str) -> None:
    code, out, _ = run("list", name, "--json")
    assert code == 0
    options = json.loads(out)["options"]
    assert {key: option["default"] for key, option in options.items()} == asdict(METHODS[name].options())
    code, out, _ = run("list", name)
    assert code == 0
    assert METHODS[name].summary in out
    for key, option in options.items():
        assert f"--option {key}={option['default']} ({option['choices']})\n    {option['meaning']}\n" in out


def test_list_refuses_an_unknown_method(run: Run) -> None:
    code, _, err = run("list", "gptx")
    assert code == 2
    assert "unknown method 'gptx'; known: rtn" in err


def test_recipe_file_holds_and_options_go_over_it(run: Run, arguments: list[object], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('bits = 2\nzero_point = "real"\n[options]\norder = "natural"\n[overrides]\n"re:.*down": 1\n')
    code, _, err = run(*arguments, "--recipe", recipe)
    assert code == 2
    assert "no valid TOML" in err
    recipe.write_text(
        'method = "gptq"\nbits = 2\nzero_point = "real"\n[options]\norder = "natural"\n'
        '[overrides."re:.*down_proj"]\nbits = 8\n[overrides."model.layers.0.self_attn.q_proj"]\nskip = true\n'
    )
    code, _, err = run(*arguments, "--recipe", recipe, "--option", "damping=0.05")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    schemes = {linear["path"]: linear["scheme"] for linear in report["linears"]}
    assert len(schemes) == 20
    assert schemes["model.layers.1.mlp.down_proj"] == "w8g32-real"
    assert schemes["model.layers.1.mlp.up_proj"] == "w3g32-real"
    written = (tmp_path / "out" / "recipe.toml").read_text()
    assert 'order = "natural"' in written
    assert "damping = 0.05" in written


def test_other_bits_over_a_written_recipe_get_the_grid_of_the_method(
    run: Run, arguments: list[object], tmp_path: Path
) -> None:
    code, _, err = run(*arguments, "--method", "d2quant", "--bits", 4)
    assert code == 0, err
    again = [tmp_path / "again" if part == tmp_path / "out" else part for part in arguments]
    result = {}
    for method, bits in (("d2quant", 2), ("d2quant-plus", 4)):
        code, _, err = run(
            *again, "--recipe", tmp_path / "out" / "recipe.toml", "--method", method, "--bits", bits, "--overwrite"
        )
        assert code == 0, err
        linears = json.loads((tmp_path / "again" / "report.json").read_text())["linears"]
        result[method] = {linear["path"].split(".")[-1]: linear["scheme"] for linear in linears}
    assert result["d2quant"]["down_proj"] == "w2g32-sign"
    assert result["d2quant"]["up_proj"] == "w2g32"
    assert set(result["d2quant-plus"].values()) == {"w4g32-real"}


def test_overwrite_replaces_a_checkpoint(run: Run, arguments: list[object], tmp_path: Path) -> None:
    assert run(*arguments)[0] == 0
    assert run(*arguments)[0] == 2
    assert run(*arguments, "--overwrite", "--bits", 2)[0] == 0
    assert "bits = 2" in (tmp_path / "out" / "recipe.toml").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_progress_is_plain_lines_away_from_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("work") as on_progress:
        on_progress(1, 2, "half")
        on_progress(2, 2, "all")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0] == "work: 2/2 (all), 0 s"


def test_the_time_left_is_told_once_there_is_something_to_tell_it_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 20.0, 40.0, 60.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.progress("work") as on_progress:
        for done in (1, 5, 100):
            on_progress(done, 100, "part")
    assert capsys.readouterr().err.splitlines() == [
        "work: 1/100 (part), 20 s", "work: 5/100 (part), 40 s, about 13 min left", "work: 100/100 (part), 60 s",
    ]  # fmt: skip
