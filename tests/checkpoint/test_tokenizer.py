"""A tokenizer is loaded as its files say, or what is the matter is said with a remedy that helps."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from conftest import Run
from subnibble.checkpoint.config import read_config
from subnibble.checkpoint.gguf_source import GgufSource
from subnibble.checkpoint.tokenizer import load_gguf_tokenizer, load_tokenizer
from subnibble.errors import CheckpointError, MissingExtra

PIECES = b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
RANKS = b"IQ== 0\nIg== 1\n"


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(folders["llama"], tmp_path / "model")


def load(folder: Path) -> Any:
    return load_tokenizer(folder, read_config(folder))


def bare(folder: Path) -> Path:
    """The folder without its tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def settings(folder: Path, **values: Any) -> Path:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Let packages be missing, and others be there."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name in modules else object())


def refuse(*arguments: Any, **named: Any) -> Any:
    raise ValueError("`tiktoken` is required to read a `tiktoken` file")


@pytest.mark.parametrize(
    ("name", "content", "missing", "said"),
    [
        ("tokenizer.model", PIECES, ("sentencepiece", "google.protobuf"), "pip install sentencepiece protobuf"),
        ("tokenizer.model", PIECES, ("google.protobuf",), "needs protobuf: pip install protobuf"),
        ("spiece.model", PIECES, ("sentencepiece",), "needs sentencepiece: pip install sentencepiece"),
        ("source.spm", PIECES, ("sentencepiece",), "pip install sentencepiece"),
        ("tokenizer.model", RANKS, ("tiktoken",), "needs tiktoken: pip install tiktoken"),
        ("qwen.tiktoken", RANKS, ("tiktoken",), "pip install tiktoken"),
        ("tekken.json", b"{}", ("mistral_common",), "pip install mistral-common"),
    ],
)
def test_a_vocabulary_names_the_package_that_reads_it(
    name: str, content: bytes, missing: tuple[str, ...], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bare(folder) / name).write_bytes(content)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    without(monkeypatch, *missing)
    with pytest.raises(MissingExtra, match=f"{name}: its tokenizer .*{said}; or put tokenizer.json beside it"):
        load(folder)


def test_a_vocabulary_whose_package_is_there_is_not_said_to_need_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bare(folder) / "tokenizer.model").write_bytes(PIECES)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    without(monkeypatch)
    with pytest.raises(CheckpointError, match=r"cannot be loaded \(ValueError: .*\); compare its files"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "kind"), [(b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer")]
)
def test_only_a_download_that_is_at_fault_is_fetched_again(content: bytes, kind: str, folder: Path) -> None:
    (bare(folder) / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.model is {kind}; fetch it again"):
        load(folder)


def test_code_of_its_own_is_never_run_and_the_way_out_is_named(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('ran')")
    settings(folder, tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    with pytest.raises(CheckpointError, match=r"its own code .*never runs.* remove auto_map and tokenizer_class"):
        load(folder)
    # The remedy helps.
    file = folder / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("auto_map", "tokenizer_class")}
    file.write_text(json.dumps(kept))
    assert load(folder)("w3 w7")["input_ids"] == [3, 7]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", b"{", r"tokenizer\.json cannot be read as JSON .* ends too early: fetch it again"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", r"tokenizer\.json is a pointer .*git lfs"),
        ("tokenizer.json", b"\xef\xbb\xbf{}", r"tokenizer\.json begins with a byte order mark"),
        ("tokenizer.json", b"[]", r"tokenizer\.json holds a list instead of a JSON object"),
        ("tokenizer.json", b"{}", r"cannot be loaded \(.*\); compare its files with the original upload"),
        ("tokenizer.json", b'{"model_type": "llama"}', r"cannot be loaded"),
        ("tokenizer_config.json", b"{", r"tokenizer_config\.json cannot be read as JSON"),
        ("tokenizer_config.json", b"[]", r"tokenizer_config\.json holds a list instead of a JSON object"),
        ("tokenizer_config.json", b'{"tokenizer_class": 5}', r"cannot be loaded"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "a"}]}', r"cannot be loaded"),
        ("special_tokens_map.json", b"{", r"special_tokens_map\.json cannot be read as JSON"),
        ("added_tokens.json", b'{"<x>": "a"}', r"cannot be loaded"),
        ("chat_template.jinja", "grüße".encode("latin-1"), r"chat_template\.jinja is not UTF-8 text"),
        ("chat_template.jinja", b"\xef\xbb\xbfhi", r"chat_template\.jinja begins with a byte order mark"),
        ("additional_chat_templates/rag.jinja", b"\xff", r"rag\.jinja is not UTF-8 text"),
    ],
)
def test_a_file_that_is_at_fault_is_named(name: str, content: bytes, said: str, folder: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        load(folder)


def test_a_tokenizer_that_is_not_there_is_said_to_be_missing(folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no tokenizer; put tokenizer\.json beside the weights, or pass token"
    ):
        load(bare(folder))
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has vocab\.json and no merges\.txt; put merges\.txt beside it"):
        load(folder)


def test_a_tokenizer_without_a_vocabulary_is_refused(folder: Path) -> None:
    # transformers makes one without tokens where it finds no file.
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="gives no tokens for plain text; is a vocabulary file missing"):
        load(folder)


def test_a_tokenizer_that_is_not_that_of_its_file_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    written.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    written.decoder = decoders.ByteLevel()
    written.enable_truncation(4)
    written.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    loaded = load(folder)
    assert loaded.decode(loaded("and there")["input_ids"]) == "and there"
    loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *arguments, **named: loaded)
    with pytest.raises(CheckpointError, match=r'other tokens than tokenizer\.json; set "tokenizer_class": "PreTrained'):
        load(folder)


def test_a_gguf_tokenizer_that_cannot_be_read_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(CheckpointError, match=r"a\.gguf: transformers cannot read its tokenizer .*original checkpoint"):
        load_gguf_tokenizer(tmp_path / "a.gguf")

    def lacking(*arguments: Any, **named: Any) -> Any:
        raise ImportError("requires the protobuf library")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lacking)
    source = object.__new__(GgufSource)
    source.path, source._tokenizer = tmp_path / "a.gguf", None
    with pytest.raises(MissingExtra, match=r"a\.gguf: its tokenizer needs another package \(.*protobuf"):
        source.load_tokenizer()


def test_token_types_do_not_reach_the_model(folder: Path, run: Run) -> None:
    names = ["input_ids", "token_type_ids", "attention_mask"]
    _, plain, _ = run("generate", folder, "--prompt", "w3 w7", "--max-new-tokens", 4)
    assert "token_type_ids" in load(settings(folder, model_input_names=names))("w3")
    code, out, _ = run("generate", folder, "--prompt", "w3 w7", "--max-new-tokens", 4)
    assert (code, out) == (0, plain)


def test_a_bos_beyond_the_models_table_is_refused(folder: Path, text_file: Path, run: Run) -> None:
    file = folder / "tokenizer.json"
    result = json.loads(file.read_text())
    result["added_tokens"].append(
        {"id": 96, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
    )  # fmt: skip
    result["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [96], "tokens": ["<s>"]}},
    }
    file.write_text(json.dumps(result))
    settings(folder, bos_token="<s>")
    code, _, err = run("evaluate", folder, "--text", text_file, "--window", 32)
    assert code == 2
    assert "the tokenizer's BOS token: token ids run from " in err


def test_half_a_character_on_the_command_line_is_refused(folder: Path, tmp_path: Path, run: Run) -> None:
    for option in ("--prompt", "--system-prompt"):
        options = {"--prompt": "w1", option: "w1 \udcff"}
        words = [word for pair in options.items() for word in pair]
        code, _, err = run("generate", folder, *words)
        assert code == 2
        assert "half of a surrogate pair" in err
    code, _, err = run("quantize", folder, tmp_path / "out", "--method", "rtn", "--system-prompt", "w1 \ud83d")
    assert code == 2
    assert "system_prompt: character 4 is" in err
