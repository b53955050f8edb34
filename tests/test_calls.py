"""What a Python caller may give, and that anything else is refused at once with what to give instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch

import subnibble
from conftest import random_model
from subnibble import Evaluation, Recipe
from subnibble.errors import BadArgument, BadRecipe, SubnibbleError

RTN = {"method": "rtn", "bits": 4, "group_size": 16}
CALLS: dict[str, Callable[..., Any]] = {
    "quantize": subnibble.quantize,
    "estimate": subnibble.estimate,
    "evaluate": subnibble.evaluate,
    "compare": subnibble.compare,
    "convert": subnibble.convert,
    "add_prefix": subnibble.add_prefix,
    "distill_checkpoint": subnibble.distill_checkpoint,
    "fold_norm_biases_": subnibble.fold_norm_biases_,
    "preset": subnibble.preset,
    "unverified": subnibble.unverified,
}
# What each argument has where another one is wrong.
GOOD: dict[str, Any] = {
    "recipe": Recipe(**RTN, distill_steps=8),
    "recipes": [Recipe(**RTN)],
    "evaluation": Evaluation("text.txt"),
    "prompt": "w1 w2",
    "name": "w3",
}
MODELS = {"model", "original", "reference", "folder"}
PATHS = {*MODELS, "out"}


def arguments(call: str, folders: dict[str, Path], packed: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """Arguments of a call that has nothing wrong."""
    result = {}
    for name, parameter in inspect.signature(CALLS[call]).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            result[name] = GOOD.get(name, folders["llama"])
    if "out" in result:
        result["out"] = tmp_path / "out"
    return result | ({"folder": packed["llama"]} if "folder" in result else {})


WRONG = [
    (call, name, value)
    for call, function in CALLS.items()
    for name in inspect.signature(function).parameters
    for value in (None, 3, b"text", ["text"], object(), "")
    if (name in PATHS - {"reference"} or (name in GOOD and value != "" and not isinstance(value, list)))
    and not (name == "out" and call == "compare" and value is None)
]


@pytest.mark.parametrize(("call", "name", "value"), WRONG)
def test_an_argument_of_another_kind_is_refused_by_name_with_what_to_give(
    call: str, name: str, value: Any, folders: dict[str, Path], packed: dict[str, Path], tmp_path: Path
) -> None:
    call_arguments = arguments(call, folders, packed, tmp_path)
    with pytest.raises(BadArgument, match="; give ") as caught:
        CALLS[call](**call_arguments | {name: value})
    assert isinstance(caught.value, TypeError)
    assert name.removesuffix("s") in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("call", "name"), [
    (call, name)
    for call, function in CALLS.items()
    for name in inspect.signature(function).parameters
    if name in MODELS and call != "fold_norm_biases_"
])  # fmt: skip
def test_a_loaded_model_is_refused_with_where_it_came_from(
    call: str, name: str, folders: dict[str, Path], packed: dict[str, Path], tmp_path: Path
) -> None:
    model = random_model("llama")
    call_arguments = arguments(call, folders, packed, tmp_path) | {name: model}
    with pytest.raises(BadArgument, match=r"a loaded LlamaForCausalLM; give .*save_pretrained"):
        CALLS[call](**call_arguments)
    model.config.name_or_path = "here/it/is"
    with pytest.raises(BadArgument, match=r"loaded from \(here/it/is\), or"):
        CALLS[call](**call_arguments)


def test_every_public_call_is_tried() -> None:
    public = {name for name in subnibble.__all__ if inspect.isfunction(getattr(subnibble, name))}
    assert public == set(CALLS)


@pytest.mark.parametrize("name", ["gptq", "no-such-file.toml", "."])
def test_the_name_of_no_recipe_file_is_refused_with_what_a_recipe_is(name: str) -> None:
    with pytest.raises(BadRecipe, match=r"not a file; give a Recipe, as Recipe\(method"):
        subnibble.estimate("model", name)


def test_a_recipe_may_be_a_table_or_a_file(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = Recipe(**RTN)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml())
    expected = subnibble.estimate(folders["llama"], recipe).file_bytes
    for recipe_argument in (RTN, file, str(file), PurePosixPath(file)):
        assert Recipe.of(recipe_argument) == recipe
        assert subnibble.estimate(folders["llama"], recipe_argument).file_bytes == expected
    subnibble.quantize(folders["llama"], str(tmp_path / "out"), RTN)
    assert Recipe.from_toml(tmp_path / "out" / "recipe.toml").method == "rtn"
    with pytest.raises(BadRecipe, match="unknown recipe key 'bit'"):
        subnibble.estimate(folders["llama"], {"bit": 4})
    with pytest.raises(BadRecipe, match="unknown recipe key 4"):
        subnibble.estimate(folders["llama"], {4: "bits", "bits": 4})


def test_an_evaluation_may_be_a_table_or_a_text(packed: dict[str, Path], text_file: Path) -> None:
    evaluation = Evaluation(str(text_file), window=16)
    expected = subnibble.evaluate(packed["llama"], evaluation)["perplexity"]
    assert subnibble.evaluate(packed["llama"], {"text": text_file, "window": 16})["perplexity"] == expected
    assert Evaluation.of(text_file) == Evaluation.of(str(text_file)) == Evaluation(str(text_file))
    with pytest.raises(BadRecipe, match="unknown evaluation key 'windows'"):
        subnibble.evaluate(packed["llama"], {"text": text_file, "windows": 16})
    for key, value in {"text": None, "window": "16", "kv": None, "max_windows": 2.0, "kv_bits": True}.items():
        with pytest.raises(BadRecipe, match=f"{key} is {value!r}; expected"):
            subnibble.evaluate(packed["llama"], {"text": text_file, key: value})


def test_one_recipe_alone_is_compared_like_a_list_of_one(folders: dict[str, Path], text_file: Path) -> None:
    evaluation = {"text": text_file, "window": 16, "max_windows": 2}
    names = [row.name for row in subnibble.compare(folders["llama"], RTN, evaluation)]
    assert names == [row.name for row in subnibble.compare(folders["llama"], (r for r in [RTN]), evaluation)]
    with pytest.raises(BadArgument, match="give a Recipe"):
        subnibble.compare(folders["llama"], [RTN, None], evaluation)


def test_paths_devices_and_types_may_be_objects() -> None:
    recipe = Recipe(
        calibration=Path("a.txt"), system_prompt=Path("b.txt"), dtype=torch.float16, device=torch.device("cpu")
    )
    assert recipe == Recipe(calibration="a.txt", system_prompt="b.txt", dtype="float16", device="cpu")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    evaluation = Evaluation(Path("a.txt"), dtype=torch.float16, device=torch.device("cpu"))
    assert evaluation == Evaluation("a.txt", dtype="float16", device="cpu")


def test_progress_may_be_nothing_and_must_be_a_function(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match=r"progress is a bool; give a function of \(done, total, doing\)"):
        subnibble.quantize(folders["llama"], tmp_path / "out", RTN, progress=True)
    subnibble.quantize(folders["llama"], tmp_path / "out", RTN, progress=None)


def test_a_prompt_of_other_bytes_is_refused(packed: dict[str, Path], run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = run("generate", packed["llama"], "--prompt", "caf\udce9")
    assert code == 2
    assert "the prompt: character 4" in err
    with pytest.raises(SubnibbleError, match="the system prompt: character 4"):
        subnibble.add_prefix(packed["llama"], "caf\udce9")


def test_all_refusals_are_subnibbles_own() -> None:
    assert issubclass(BadArgument, SubnibbleError)
