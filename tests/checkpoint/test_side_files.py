"""What lies beside the weights goes with them: a packed folder speaks like the original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer

from subnibble import Recipe, add_prefix, quantize
from subnibble.checkpoint.opening import download
from subnibble.checkpoint.side_files import copy_side_files
from subnibble.errors import CheckpointError

RECIPE = Recipe("rtn", bits=4, group_size=16)
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
TURNS = [{"role": "user", "content": "w1 w2"}]


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(folders["llama"], tmp_path / "model")


def templates(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize(
    "template", [TEMPLATE, {"default": TEMPLATE, "rag": "rag " + TEMPLATE}, {"rag": TEMPLATE, "tool_use": TEMPLATE}]
)
@pytest.mark.parametrize("in_files", [True, False])
def test_chat_templates_go_with_the_model_wherever_they_lie(
    template: Any, in_files: bool, folder: Path, tmp_path: Path
) -> None:
    original = AutoTokenizer.from_pretrained(folder)
    original.chat_template = template
    original.save_pretrained(folder, save_jinja_files=in_files)
    out = tmp_path / "out"
    quantize(folder, out, RECIPE)
    assert templates(out) == templates(folder) == template
    if "default" in template or isinstance(template, str):
        spoken = [AutoTokenizer.from_pretrained(f).apply_chat_template(TURNS, tokenize=False) for f in (folder, out)]
        assert spoken[0] == spoken[1] == "user w1 w2 "
    # And through a change of the packed folder.
    if isinstance(template, str):
        add_prefix(out, "w3 w4")
        assert templates(out) == template


def test_files_of_every_kind_of_tokenizer_are_copied_as_they_are_and_code_is_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    names = [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "source.spm", "qwen.tiktoken", "tekken.json",
        "chat_template.jinja", "chat_template.json", "additional_chat_templates/rag.jinja", "processor_config.json",
        "preprocessor_config.json", "generation_config.json",
    ]  # fmt: skip
    left = ["own.py", "config.json", "model.safetensors", "README.md", "additional_chat_templates/own.py"]
    for number, name in enumerate([*names, *left]):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(bytes([number, 13, 10, 255]))
    copy_side_files(source, target)
    copied = {str(file.relative_to(target)): file.read_bytes() for file in target.rglob("*") if file.is_file()}
    assert copied == {name: bytes([number, 13, 10, 255]) for number, name in enumerate(names)}


def test_a_file_that_cannot_be_read_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes

    def refuse(self: Path) -> bytes:
        if self.name == "chat_template.jinja":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self)

    (folder / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read \(Permission denied\)"):
        quantize(folder, tmp_path / "out", RECIPE)
    assert not (tmp_path / "out").exists()


def test_the_hub_gives_what_goes_with_a_model_and_no_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **kwargs: asked.update(kwargs) or str(tmp_path)
    )
    download("owner/name")
    downloaded = [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "qwen.tiktoken", "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
    ]  # fmt: skip
    others = [
        "own.py", "pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors", "onnx/config.json",
        "adapter/adapter_model.safetensors", "a/tokenizer.json",
        "additional_chat/x.json", "additional_chat_templates_2/x.json", "additional_chat_templatez/x.json",
    ]  # fmt: skip
    assert list(filter_repo_objects([*downloaded, *others], **asked)) == downloaded


def test_a_packed_config_names_no_code(folder: Path, tmp_path: Path) -> None:
    settings = folder / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"auto_map": {"AutoConfig": "own.Own"}}))
    quantize(folder, tmp_path / "out", RECIPE)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
