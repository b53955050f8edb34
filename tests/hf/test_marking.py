"""A packed folder cannot be loaded as a model of random linears by a program that does not import subnibble."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import subnibble
from subnibble import Recipe
from subnibble.errors import BadArgument
from subnibble.model.transformers_api.marking import marked

KEY = "transformers_weights"
IDS = torch.tensor([[5, 9, 12, 40, 3]])
PROGRAM = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM
for folder in sys.argv[1:]:
    for kind in (AutoModelForCausalLM, LlamaForCausalLM, AutoModel):
        try:
            kind.from_pretrained(folder)
            print(folder, kind.__name__, "loaded")
        except Exception as error:
            print("refused" if "import subnibble" in str(error) else repr(error))
assert "subnibble" not in sys.modules
"""


def words(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return result


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


@pytest.fixture(scope="module")
def saved(
    packed: dict[str, Path], folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Packed folders by what wrote them last."""
    root = tmp_path_factory.mktemp("saved")
    subnibble.quantize(folders["llama"], root / "cache", Recipe(method="none", kv_bits=8, kv={"group_size": 16}))
    # As one that was written before there was a word.
    shutil.copytree(packed["llama"], root / "prefix")
    old = {key: value for key, value in words(root / "prefix").items() if key != KEY}
    (root / "prefix" / "config.json").write_text(json.dumps(old))
    subnibble.add_prefix(root / "prefix", "w5 w9")
    model = load(packed["llama"])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = {
        "saved": model,
        "saved again": None,
        "copied": copy.deepcopy(model),
        "pickled": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(buffer, weights_only=False),
    }
    for name, copied in copies.items():
        (load(root / "saved") if copied is None else copied).save_pretrained(
            save_directory=root / name.replace(" ", "-")
        )
    return {"quantized": packed["llama"], **{folder.name: folder for folder in root.iterdir()}}


def test_a_program_without_the_plug_in_is_told_to_import_it(
    saved: dict[str, Path], packed: dict[str, Path], tmp_path: Path
) -> None:
    # One folder lacks the word, so that the program loads it.
    shutil.copytree(packed["llama"], tmp_path / "plain")
    plain = {key: value for key, value in words(tmp_path / "plain").items() if key != KEY}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(plain))
    folders = [*map(str, saved.values()), str(tmp_path / "plain")]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *folders], capture_output=True, text=True, check=True)
    *told, one, two, three = done.stdout.splitlines()
    assert told == ["refused"] * 3 * len(saved)
    assert all(line.startswith(folders[-1]) and line.endswith(" loaded") for line in (one, two, three))


def test_with_the_plug_in_all_load_as_without_the_word(saved: dict[str, Path], tmp_path: Path) -> None:
    expected = logits(load(saved["quantized"]))
    for name, folder in saved.items():
        assert words(folder) == marked(words(folder))
        if name not in ("cache", "prefix"):
            assert torch.equal(logits(load(folder)), expected)
    config = AutoConfig.from_pretrained(saved["quantized"])
    assert torch.equal(logits(load(saved["quantized"], config=config)), expected)
    again = load(saved["quantized"], config=load(saved["quantized"]).config)
    assert torch.equal(logits(again), expected)
    assert AutoTokenizer.from_pretrained(saved["quantized"])("w5 w9")["input_ids"] == [5, 9]


def test_a_copy_saves_itself_and_not_the_model_that_it_is_a_copy_of(packed: dict[str, Path], tmp_path: Path) -> None:
    model = load(packed["llama"])
    model_copy = copy.deepcopy(model)
    model_copy.model.norm.weight.data.mul_(2)
    model_copy.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(load(tmp_path / "copy")), logits(model_copy))
    assert not torch.equal(logits(model_copy), logits(model))


def test_a_model_that_nobody_needs_is_freed_at_once(packed: dict[str, Path]) -> None:
    import gc
    import weakref

    model = load(packed["llama"])
    kept = weakref.ref(model.model.embed_tokens.codes)
    gc.disable()
    try:
        del model
        assert kept() is None
    finally:
        gc.enable()


def test_a_push_is_sent_the_other_way(packed: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match=r"model\.push_to_hub"):
        load(packed["llama"]).save_pretrained(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()


def test_other_models_are_saved_without_the_word(folders: dict[str, Path], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folders["llama"]).save_pretrained(save_directory=tmp_path / "out")
    assert KEY not in words(tmp_path / "out")
