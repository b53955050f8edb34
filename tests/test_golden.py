"""The tool of `golden/` finds what differs, reads all that is stored, and its toys are the same bits everywhere."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from golden import content
from golden.__main__ import judge, not_covered, unknown_renames
from golden.compare import Tolerance, compare
from golden.content import Content
from golden.models import TEXT, TOKENS, hashed, write_models
from golden.read import UnreadContentError, content_of, read, stored_in
from golden.recipes import ANY, RECIPES, Rename, recipe_of, translated
from subnibble import quantize
from subnibble.hf import packed_modules
from subnibble.methods import METHODS
from subnibble.runtime.modules import PackedLinear

# Every grid and every term of a linear.
READ = (
    "rtn", "rtn-real", "rtn-symmetric", "rtn-sign", "rtn-mxfp4", "rtn-channel", "d2quant", "d2quant-plus", "qera",
    "serq-plus", "quarot", "atom", "prefix-centered", "tied-rotated-groups",
)  # fmt: skip
every_read = pytest.mark.parametrize("name", READ)
# All kinds of parts are in these.
every_kind = pytest.mark.parametrize(
    "name", ["qera", "serq-plus", "d2quant", "quarot", "prefix-centered", "tied-rotated-groups"]
)
INNER = {"salient": "salient/", "down": "low_rank/down/", "up": "low_rank/up/"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def packed(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recipes of READ -> what they make."""
    root = tmp_path_factory.mktemp("packed")
    for name in READ:
        model = models[RECIPES[name].model]
        quantize(model, root / name, recipe_of(RECIPES[name], model))
    return {name: root / name for name in READ}


@pytest.fixture(scope="module")
def contents(packed: dict[str, Path]) -> dict[str, Content]:
    return {name: content.ordered(read(folder)) for name, folder in packed.items()}


# What is read is complete.


def dense(result: Content, name: str) -> Tensor:
    """The matrix (m, k) float32 of the parts under `name`, by docs/format.md."""
    parts = []
    for index, known in enumerate(json.loads(text_of(result, f"{name}ranges"))):
        codes, scales = (tensor_of(result, f"{name}{index}/{part}") for part in ("codes", "scales"))
        columns, bits, scales = known["stop"] - known["start"], known["bits"], scales.float()
        group = torch.arange(columns) // (columns if known["group_size"] == -1 else known["group_size"])
        if known["grid"] == "sign":
            part = torch.zeros(codes.shape)
            for bit in range(bits):
                part += scales[:, group * bits + bit] * (((codes >> bit) & 1).float() * 2 - 1)
        elif known["grid"] == "mxfp4":
            sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
            part = torch.cat([sizes, -sizes])[codes.long()] * scales[:, group]
        else:
            middle = torch.full_like(scales, 2 ** (bits - 1))
            zeros = middle if known["zero_point"] == "none" else tensor_of(result, f"{name}{index}/zeros").float()
            part = (codes.float() - zeros[:, group]) * scales[:, group]
        parts.append(part)
    return torch.cat(parts, dim=1)


def tensor_of(result: Content, name: str) -> Tensor:
    part = result[name]
    assert isinstance(part, Tensor)
    return part


def text_of(result: Content, name: str) -> str:
    part = result[name]
    assert isinstance(part, str)
    return part


@every_read
def test_what_is_read_gives_the_dense_weights_of_the_package(
    name: str, packed: dict[str, Path], contents: dict[str, Content]
) -> None:
    model, result = AutoModelForCausalLM.from_pretrained(packed[name]), contents[name]
    modules = packed_modules(model)
    for path, module in modules.items():
        outer, _, last = path.rpartition(".")
        prefix = f"{outer}/{INNER[last]}" if outer in modules else f"{path}/"
        assert torch.equal(dense(result, prefix), module.packed.dequantize()), prefix
        if isinstance(module, PackedLinear):
            gather, scale = result.get(f"{path}/gather"), result.get(f"{path}/column_scale")
            terms = module.linear
            assert same(gather, None if terms.input.gather is None else terms.input.gather.long())
            assert same(scale, terms.input.column_scale)
            assert json.loads(str(result.get(f"{path}/hadamard", "[]"))) == list(module.blocks)
            assert result.get(f"{path}/residual", "none") == ("salient" if module.requantized else "none")
            known = None if module.activation is None else {"outliers": 0, **module.activation.to_dict()}
            assert json.loads(str(result.get(f"{path}/activation", "null"))) == known


def same(a: Any, b: Any) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


@every_kind
def test_no_stored_tensor_can_change_unnoticed(
    name: str, packed: dict[str, Path], contents: dict[str, Content]
) -> None:
    config, stored = json.loads((packed[name] / "config.json").read_text()), stored_in(packed[name])
    # The second block has what the first has.
    for key, tensor in ((key, tensor) for key, tensor in stored.items() if ".layers.1." not in key):
        other = tensor.clone()
        # The first bit of the first code or zero-point, the last place of the first number.
        other.view(-1).view(torch.uint8)[0] ^= 1
        result = compare(contents[name], content_of(config, {**stored, key: other}))
        # An input is of all its readers.
        readers = 3 if key.endswith(("gather", "column_scale")) else 1
        assert 1 <= result.parts == result.codes + result.numbers <= readers, key


@every_kind
def test_nothing_that_config_json_says_can_change_unnoticed(
    name: str, packed: dict[str, Path], contents: dict[str, Content]
) -> None:
    config, stored = json.loads((packed[name] / "config.json").read_text()), stored_in(packed[name])
    tried = list(spoiled(config["quantization_config"]))
    assert len(tried) > 10 or name == "tied-rotated-groups"
    for where, other in tried:
        try:
            result = content_of({**config, "quantization_config": other}, stored)
        except Exception:
            continue
        assert not compare(contents[name], result).same, where


def spoiled(packed: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Copies of a `quantization_config` with one value changed or left out; of modules, of one of each kind."""
    kinds: set[tuple[str, ...]] = set()
    # Checksums are of files, of which contents say nothing.
    for table, entries in {**packed, "sha256": None}.items():
        for label, entry in entries.items() if isinstance(entries, dict) else ():
            kind = (table, entry["kind"], *sorted(entry)) if table == "modules" else (table, label)
            if kind in kinds:
                continue
            kinds.add(kind)
            copied = copy.deepcopy(packed)
            del copied[table][label]
            yield f"{table} without {label}", copied
            for key, value in entry.items() if isinstance(entry, dict) else ():
                copied = copy.deepcopy(packed)
                copied[table][label][key] = changed(value)
                yield f"{table} {label} {key}", copied


def changed(value: Any) -> Any:
    """Another value of its type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return {"none": "salient", "salient": "none", "integer": "none"}.get(value, f"{value}x")
        case list():
            return value[:-1] if value else [2]
        case None:
            return "x"
    return {}


def test_a_tensor_that_nothing_names_is_an_error(packed: dict[str, Path]) -> None:
    config, stored = json.loads((packed["rtn"] / "config.json").read_text()), stored_in(packed["rtn"])
    with pytest.raises(UnreadContentError, match="belongs to nothing"):
        content_of(config, {**stored, "model.norm.turn": torch.ones(3)})
    config["quantization_config"]["modules"]["model.norm"] = {"kind": "norm_turn"}
    with pytest.raises(UnreadContentError, match="kind 'norm_turn'"):
        content_of(config, stored)


def test_contents_are_kept_whole_and_in_the_order_of_the_data(contents: dict[str, Content], tmp_path: Path) -> None:
    result = contents["serq-plus"]
    content.save(result, tmp_path / "kept")
    again = content.load(tmp_path / "kept")
    assert list(again) == list(result)
    assert compare(result, again).same
    paths = list(dict.fromkeys(name.partition("/")[0] for name in result))
    block = [path.rpartition(".")[2] for path in paths if ".layers.0." in path]
    assert block == [
        "input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "post_attention_layernorm", "gate_proj", "up_proj",
        "down_proj",
    ]  # fmt: skip
    assert (paths[:2], paths[-2:]) == (["config", "model.embed_tokens"], ["model.norm", "lm_head"])


# What differs is found.


def one_code_off(result: Content) -> str:
    name = "model.layers.1.mlp.up_proj/0/codes"
    tensor_of(result, name)[3, 7] ^= 1
    return f"{name}[3, 7]: "


def one_scale_a_step_off(result: Content) -> str:
    name = "model.layers.0.self_attn.v_proj/0/scales"
    tensor_of(result, name).view(torch.int16)[2, 1] += 1
    return f"{name}[2, 1]: "


def two_channels_swapped(result: Content) -> str:
    name = "model.layers.0.self_attn.o_proj/gather"
    order = tensor_of(result, name)
    order[[4, 5]] = order[[5, 4]]
    return f"{name}[4]: "


def a_gain_changed(result: Content) -> str:
    name = "model.norm/weight"
    tensor_of(result, name)[0] *= 1 + 2.0**-20
    return f"{name}[0]: "


def a_norm_bias_changed(result: Content) -> str:
    name = "model.norm/bias"
    tensor_of(result, name)[5] += 1
    return f"{name}[5]: "


def a_module_missing(result: Content) -> str:
    path = "model.layers.1.self_attn.k_proj/"
    for name in [name for name in result if name.startswith(path)]:
        del result[name]
    return f"{path}ranges, which the new side does not have"


def a_part_more(result: Content) -> str:
    result["model.layers.1.mlp.up_proj/bias"] = torch.zeros(3)
    return "model.layers.1.mlp.up_proj/bias, which the old side does not have"


def an_input_of_another_scheme(result: Content) -> str:
    name = "model.layers.0.mlp.down_proj/activation"
    result[name] = text_of(result, name).replace("0.9", "0.8")
    return f"{name}: ..."


def a_range_of_other_bits(result: Content) -> str:
    name = "model.layers.0.mlp.down_proj/ranges"
    result[name] = text_of(result, name).replace('"bits": 4', '"bits": 3')
    return f"{name}: "


def scales_of_another_type(result: Content) -> str:
    name = "model.layers.0.mlp.down_proj/0/scales"
    result[name] = tensor_of(result, name).float()
    return f"{name}: float16 (80, 3) -> float32 (80, 3)"


def a_salient_zero_point_off(result: Content) -> str:
    name = "model.layers.0.mlp.gate_proj/salient/0/zeros"
    tensor_of(result, name)[0, 0] ^= 1
    return f"{name}[0, 0]: "


def a_number_that_is_none(result: Content) -> str:
    name = "model.norm/weight"
    tensor_of(result, name)[1] = torch.nan
    return f"{name}[1]: "


FAULTS = (
    one_code_off, one_scale_a_step_off, two_channels_swapped, a_gain_changed, a_norm_bias_changed, a_module_missing,
    a_part_more, an_input_of_another_scheme, a_range_of_other_bits, scales_of_another_type, a_salient_zero_point_off,
    a_number_that_is_none,
)  # fmt: skip


@pytest.fixture
def spoilable(contents: dict[str, Content]) -> Content:
    """A content with salient channels, orders and a norm bias, to be spoiled."""
    result = copy.deepcopy(contents["serq-plus"])
    result["model.norm/bias"] = torch.ones(80)
    return content.ordered(result)


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_a_planted_difference_is_found(spoil: Callable[[Content], str], spoilable: Content) -> None:
    new = copy.deepcopy(spoilable)
    assert compare(spoilable, new).same
    where = spoil(new)
    result = compare(spoilable, content.ordered(new))
    assert not result.same
    assert result.first.startswith(where), result.first


def test_differences_are_counted(spoilable: Content) -> None:
    new = copy.deepcopy(spoilable)
    codes = tensor_of(new, "model.layers.0.mlp.up_proj/0/codes")
    codes[:2] ^= 1
    tensor_of(new, "model.norm/bias")[[1, 4]] += torch.tensor([0.5, 2])
    result = compare(spoilable, new)
    assert (result.parts, result.of, result.codes) == (2, len(new), codes[:2].numel())
    assert (result.numbers, result.max_difference) == (2, 2)
    assert "2 of " in str(result)
    assert f"in {codes[:2].numel()} codes and 2 numbers, these by up to 2" in str(result)


def test_a_tolerance_excuses_numbers_alone_and_says_so(spoilable: Content) -> None:
    new = copy.deepcopy(spoilable)
    tensor_of(new, "model.norm/weight").view(torch.int32)[:3] += torch.tensor([1, 2, 2], dtype=torch.int32)
    assert not compare(spoilable, new).same
    assert not compare(spoilable, new, Tolerance.of("1ulp")).same
    for tolerance in ("2ulp", "1e-6"):
        result = compare(spoilable, new, Tolerance.of(tolerance))
        assert (result.same, result.excused, result.ulps) == (True, 3, 2)
        assert "same within its tolerance: 3 numbers differ, by up to 2 ulps" in str(result)
    one_code_off(new)
    assert not compare(spoilable, new, Tolerance(ulps=10**6, relative=0.5)).same
    a_number_that_is_none(new)
    assert compare(spoilable, new, Tolerance(ulps=10**9, relative=0.9)).parts == 2


def test_zero_has_no_sign_and_nan_is_itself() -> None:
    old: Content = {"a/weight": torch.tensor([0.0, torch.nan, 1])}
    assert compare(old, {"a/weight": torch.tensor([-0.0, torch.nan, 1])}).same
    assert not compare(old, {"a/weight": torch.tensor([2.0**-149, torch.nan, 1])}).same
    assert not compare({"a/weight": torch.tensor([torch.inf])}, {"a/weight": torch.tensor([-torch.inf])}).same


@pytest.mark.parametrize("text", ["2", "ulp", "-1ulp", "-1e-6", "1.5", "nan"])
def test_a_tolerance_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"tolerance|convert"):
        Tolerance.of(text)


# The table.


@pytest.fixture
def sides(spoilable: Content, tmp_path: Path) -> Path:
    """Two sides of recipes a, same, and b, different."""
    new = copy.deepcopy(spoilable)
    one_code_off(new)
    for side, spoiled_one in (("old", spoilable), ("new", new)):
        (tmp_path / side).mkdir()
        content.save(spoilable, tmp_path / side / "a")
        content.save(spoiled_one, tmp_path / side / "b")
    return tmp_path


def test_a_difference_is_wrong_unless_it_is_expected(sides: Path) -> None:
    assert (judge("a", sides, [], None).text, judge("a", sides, [], None).wrong) == ("same", False)
    assert judge("b", sides, [], None).wrong
    assert not judge("b", sides, ["b"], None).wrong
    assert "as expected, differs first in" in judge("b", sides, ["b"], None).text
    assert "expected to differ, and is the same" in judge("a", sides, ["a"], None).text


def test_a_recipe_that_fails_is_wrong(sides: Path) -> None:
    (sides / "old" / "a.error").write_text("BadRecipe: what is that")
    assert judge("a", sides, [], None).wrong
    assert not judge("a", sides, ["a"], None).wrong
    (sides / "new" / "a.error").write_text("BadRecipe: what is that")
    assert judge("a", sides, ["a"], None).wrong
    assert judge("a", sides, [], None).text == "fails on both sides: BadRecipe: what is that"


def test_a_kind_of_part_that_nothing_makes_is_named(contents: dict[str, Content]) -> None:
    assert not_covered(list(contents.values())) == []
    without = [
        {name: part for name, part in result.items() if not name.endswith("gather")} for result in contents.values()
    ]
    assert "makes gather" in not_covered(without)[0].text
    assert not_covered(without)[0].wrong


def test_every_method_has_a_recipe() -> None:
    used = {case.keys["method"] for case in RECIPES.values()}
    assert set(METHODS) - used <= {"d2quant-uniform"}


# Names of before.


def test_recipes_are_translated_to_older_words() -> None:
    recipe = {"method": "serq", "options": {"rank": 32, "permutation": "offline"}, "kv": {"center": "mean"}}
    renames = [
        Rename({"options": {"permutation": "offline"}}, {"options": {"residual_order": "global", "heads": "whole"}}),
        Rename({"kv": {"center": ANY}}, {"kv": {"key_center": ANY}}),
        Rename({"method": "serq", "options": {"rank": ANY}}, {"method": "salient", "options": {"count": ANY}}),
        Rename({"method": "gptq"}, {"method": "wrong"}),
    ]
    assert translated(recipe, renames) == {
        "method": "salient",
        "options": {"count": 32, "residual_order": "global", "heads": "whole"},
        "kv": {"key_center": "mean"},
    }
    assert recipe["options"] == {"rank": 32, "permutation": "offline"}
    assert translated(recipe, []) == recipe


def test_renames_that_a_tree_lists_itself_are_known_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Rename({"a": 1}, {"b": 1}), Rename({"c": ANY}, {"d": ANY})
    monkeypatch.setattr("golden.__main__.RENAMES", (second, first))
    assert unknown_renames(tmp_path) == [second, first]
    (tmp_path / "golden").mkdir()
    lines = ["from golden.recipes import Rename", 'RENAMES = (Rename({"a": 1}, {"b": 1}),)']
    (tmp_path / "golden" / "recipes.py").write_text("\n".join(lines))
    assert unknown_renames(tmp_path) == [second]


# The toys.


def test_toys_are_the_same_bits_everywhere(models: dict[str, Path]) -> None:
    assert hashed(4, 1).tolist() == HASHED
    assert {name: digest(folder) for name, folder in models.items()} == DIGESTS


def digest(folder: Path) -> str:
    """Of weights, text and token ids."""
    stored = stored_in(folder)
    parts = [stored[name].view(torch.uint8).numpy().tobytes() for name in sorted(stored)]
    parts += [(folder / TEXT).read_bytes(), np.load(folder / TOKENS).tobytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


HASHED = [2073711911, 257578909, 940087459, 1815093501]
DIGESTS = {
    "llama": "217da38f4b336394",
    "llama-tied": "f29d129ad8f57846",
    "qwen2": "e206aa2d1a915a2b",
    "qwen3": "bf4c7a853a0c0f52",
}
