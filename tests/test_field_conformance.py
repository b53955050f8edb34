"""Every field of a recipe, and of the schemes it stands for, goes through quantize, load and evaluate.

First one field at a time, at each of its values, which must be what was written; then values of different fields in
pairs. The cases are looked up by the dataclasses' own fields: a new one fails here until it says what to try.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pairs import Row, pairs_of, pairwise
from subnibble import Recipe, quantize
from subnibble.calibrate.sampling import WindowSampling
from subnibble.checkpoint.manifest import packed_config_of
from subnibble.checkpoint.module_specs import PackedEmbeddingSpec
from subnibble.checkpoint.safetensors_source import STORED_TYPES, SafetensorsSource
from subnibble.checkpoint.weight_files import read_headers
from subnibble.device import DTYPES
from subnibble.distill.settings import Distillation
from subnibble.errors import BadRecipe
from subnibble.evaluation.evaluate import Evaluation, evaluate
from subnibble.methods import METHODS
from subnibble.pipeline.check import resolve
from subnibble.recipe import EMBEDDING_BITS
from subnibble.recipe.overrides import OVERRIDE_KEYS
from subnibble.tensor.activation_scheme import ACTIVATION_BITS, ActivationScheme
from subnibble.tensor.cache_scheme import KEY_AXES, KEY_CENTERS, KEY_ROTATIONS, ROPES, CacheScheme
from subnibble.tensor.packed import range_key, scale_dtype
from subnibble.tensor.scheme import BITS, E8M0, GRIDS, SCALE_TYPES, ZERO_POINTS, Scheme

BASE: dict[str, Any] = {
    "method": "rtn", "bits": 4, "group_size": 16, "num_windows": 3, "window": 16, "device": "cpu", "dtype": "float32",
    "options": {"clip": "minmax"},
}  # fmt: skip
# Small ranks and little tuning for a small model.
OPTIONS: dict[str, dict[str, Any]] = {
    "serq": {"rank": 16}, "serq-plus": {"rank": 16}, "l2qer": {"rank": 4}, "qera": {"rank": 4}, "atom": {"outliers": 8},
    "omniquant": {"effort": "fast"}, "bisup": {"effort": "fast", "rank": 4},
}  # fmt: skip
# Learned ranges and the cache alone need what a recipe for all does not say.
ALONE: dict[str, dict[str, Any]] = {"none": {"kv_bits": 4}, "bisup": {"activation_bits": 4}}
BY_CHANNEL = {"key_axis": "channel", "group_size": 8, "window": 8}
DOWN = "re:.*down_proj"


@dataclass(frozen=True)
class Tried:
    """A value that a field is to have in what was written, and the recipe's keys that bring it there."""

    value: Any
    keys: Mapping[str, Any] = field(default_factory=dict)


def each(key: str, values: Iterable[Any], **others: Any) -> list[Tried]:
    return [Tried(value, {key: value, **others}) for value in values]


def in_table(table: str, key: str, values: Iterable[Any], **others: Any) -> list[Tried]:
    return [Tried(value, {table: {key: value}, **others}) for value in values]


CASES: dict[type, dict[str, list[Tried]]] = {
    Scheme: {
        "bits": each("bits", BITS),
        "group_size": each("group_size", (-1, 32, 7)),
        "zero_point": each("zero_point", ZERO_POINTS),
        "scale_type": [*each("scale_type", SCALE_TYPES), Tried(E8M0, {"grid": "mxfp4", "group_size": 32})],
        "grid": each("grid", GRIDS, group_size=32),
    },
    ActivationScheme: {
        "bits": each("activation_bits", ACTIVATION_BITS),
        "group_size": each("activation_group_size", (-1, 32, 7), activation_bits=8),
        "zero_point": each("activation_zero_point", ("none", "integer"), activation_bits=4),
        "grid": [Tried(grid, {"grid": grid, "group_size": 32, "activation_bits": 4}) for grid in ("uniform", "mxfp4")],
        "clip": each("activation_clip", (0.9, 1), activation_bits=4),
        "outliers": [Tried(8, {"method": "atom", "options": OPTIONS["atom"], "activation_bits": 4})],
    },
    CacheScheme: {
        "bits": each("kv_bits", BITS),
        "group_size": in_table("kv", "group_size", (-1, 8, 5), kv_bits=4),
        "key_axis": [Tried(axis, {"kv_bits": 4, "kv": {**BY_CHANNEL, "key_axis": axis}}) for axis in KEY_AXES],
        "rope": in_table("kv", "rope", ROPES, kv_bits=4),
        "key_rotation": in_table("kv", "key_rotation", KEY_ROTATIONS, kv_bits=4),
        "window": in_table("kv", "window", (0, 8), kv_bits=4),
        "clip": in_table("kv", "clip", (0.95, 1), kv_bits=4),
        "key_center": in_table("kv", "key_center", KEY_CENTERS, kv_bits=4),
    },
    Distillation: {
        "steps": each("distill_steps", (1, 3)),
        "tokens": in_table("distill", "tokens", (8,), distill_steps=1),
        "rate": in_table("distill", "rate", (0.1,), distill_steps=1),
        "scales": in_table("distill", "scales", (True, False), distill_steps=1),
        "zero_points": in_table("distill", "zero_points", (True, False), distill_steps=1, zero_point="real"),
        "column_scales": in_table("distill", "column_scales", (True, False), distill_steps=1),
        "norms": in_table("distill", "norms", (True, False), distill_steps=1),
        "norm_biases": in_table("distill", "norm_biases", (True, False), distill_steps=1),
        "clips": in_table("distill", "clips", (True, False), distill_steps=1, activation_bits=8),
    },
    WindowSampling: {
        "start": in_table("sampling", "start", ("vocabulary",), calibration="self"),
        "prompts": [Tried(("w1 w2", "w3"), {"calibration": "self", "sampling": {"prompts": ["w1 w2", "w3"]}})],
        "temperature": in_table("sampling", "temperature", (0.5, 2), calibration="self"),
        "top_k": in_table("sampling", "top_k", (0, 5), calibration="self"),
        "top_p": in_table("sampling", "top_p", (0.9, 1), calibration="self"),
        "min_p": in_table("sampling", "min_p", (0, 0.1), calibration="self"),
    },
    Recipe: {
        "method": [Tried(m, {"method": m, "options": OPTIONS.get(m, {}), **ALONE.get(m, {})}) for m in METHODS],
        "bits": each("bits", (2, 8)),
        "group_size": each("group_size", (-1, 7)),
        "zero_point": each("zero_point", ("auto", "real")),
        "scale_type": each("scale_type", SCALE_TYPES, embedding_bits=8),
        "grid": each("grid", ("auto", "sign")),
        "embedding_bits": each("embedding_bits", EMBEDDING_BITS),
        "activation_bits": each("activation_bits", (16, 8)),
        "activation_group_size": each("activation_group_size", (None, -1), activation_bits=8),
        "activation_zero_point": each("activation_zero_point", ("none", "integer"), activation_bits=8),
        "activation_clip": each("activation_clip", (0.9, 1.0), activation_bits=8),
        "kv_bits": each("kv_bits", (16, 2)),
        "kv": [Tried(kv, {"kv": kv, "kv_bits": 4}) for kv in ({}, BY_CHANNEL, {"rope": "before", "window": 4})],
        "system_prompt": each("system_prompt", (None, "w1 w2 w3")),
        "calibration": [],
        "num_windows": each("num_windows", (1, 5)),
        "window": each("window", (8, 24)),
        "sampling": [Tried(table, {"calibration": "self", "sampling": table}) for table in ({}, {"top_k": 3})],
        "distill_steps": each("distill_steps", (0, 2)),
        "distill": [Tried(table, {"distill": table, "distill_steps": 1}) for table in ({}, {"norms": False})],
        "seed": each("seed", (0, 2**63 - 1)),
        "device": each("device", ("cpu",)),
        "dtype": each("dtype", DTYPES),
        "options": [Tried({"clip": "minmax", "clip_power": 2.4}, {"options": {"clip": "minmax", "clip_power": 2.4}})],
        "overrides": [],
    },
}
# Of one linear a block, by the keys that an override may have.
OVERRIDES: dict[str, list[Any]] = {
    "bits": [2, 8], "group_size": [8, -1], "grid": ["sign", "uniform"], "zero_point": ["none", "real"],
    "activation_bits": [4, 16], "skip": [True],
}  # fmt: skip
CASES[Recipe]["overrides"] = [
    Tried({DOWN: {key: value}}, {"overrides": {DOWN: {key: value}}, "activation_bits": 8})
    for key, values in OVERRIDES.items()
    for value in values
]
SINGLE = [(kind, name, tried) for kind, table in CASES.items() for name, cases in table.items() for tried in cases]


@pytest.fixture(scope="module")
def small(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two blocks, with biases, grouped heads and widths that no group size divides."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=40, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for part in model.parameters():
            noise = torch.randn(part.shape)
            part.copy_(1 + 0.3 * noise if part.dim() == 1 else 0.15 * noise)
    folder = tmp_path_factory.mktemp("small")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders["llama"] / name, folder / name)
    return folder


def go_through(small: Path, out: Path, text: Path, recipe: Recipe) -> None:
    """Quantize, load and evaluate; every scale is stored in the type that its scheme names."""
    quantize(small, out, recipe)
    packed, headers = packed_config_of(SafetensorsSource(out).config), read_headers(out.glob("*.safetensors"))
    assert packed is not None
    for path, spec in packed.modules.items():
        tables = {"": spec.layout} if isinstance(spec, PackedEmbeddingSpec) else getattr(spec, "matrices", {})
        for prefix, layout in tables.items():
            for index, (_, scheme) in enumerate(layout.ranges):
                _, kind = headers[f"{path}.{prefix}{range_key('scales', index)}"]
                assert kind == STORED_TYPES[scale_dtype(scheme)]
    scores = evaluate(out, Evaluation(str(text), window=16, max_windows=2, device="cpu", dtype="float32"))
    assert math.isfinite(scores["perplexity"])


@pytest.fixture(scope="module")
def checkpoint_of(small: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """The folder of a recipe that went through; each is quantized once."""
    folders: dict[str, Path] = {}

    def folder(recipe: Recipe) -> Path:
        key = recipe.to_toml()
        if key not in folders:
            out = tmp_path_factory.mktemp("field") / "out"
            go_through(small, out, text_file, recipe)
            folders[key] = out
        return folders[key]

    return folder


def written(kind: type, name: str, out: Path) -> list[Any]:
    """What a field is in a checkpoint: in the schemes that config.json has, or in recipe.toml."""
    packed, recipe = packed_config_of(SafetensorsSource(out).config), Recipe.from_toml(out / "recipe.toml")
    assert packed is not None
    layouts = [layout for spec in packed.linears for layout in spec.matrices.values()]
    held: dict[type, list[Any]] = {
        Scheme: [scheme for layout in layouts for _, scheme in layout.ranges],
        ActivationScheme: [spec.activation for spec in packed.linears],
        CacheScheme: [packed.cache],
        Recipe: [recipe],
        Distillation: [recipe.distillation],
        WindowSampling: [recipe.window_sampling],
    }
    return [getattr(one, name) for one in held[kind] if one is not None]


@pytest.mark.parametrize("kind", CASES)
def test_every_field_has_a_case(kind: type) -> None:
    assert set(CASES[kind]) == {item.name for item in fields(kind)}


def test_every_word_that_a_field_may_be_has_a_case() -> None:
    assert set(OVERRIDES) == set(OVERRIDE_KEYS)
    for kind, name, choices in (
        (Scheme, "bits", BITS), (Scheme, "zero_point", ZERO_POINTS), (Scheme, "grid", GRIDS),
        (Scheme, "scale_type", (*SCALE_TYPES, E8M0)), (ActivationScheme, "bits", ACTIVATION_BITS),
        (CacheScheme, "bits", BITS), (CacheScheme, "key_axis", KEY_AXES), (CacheScheme, "rope", ROPES),
        (CacheScheme, "key_rotation", KEY_ROTATIONS), (CacheScheme, "key_center", KEY_CENTERS),
        (Recipe, "method", METHODS), (Recipe, "dtype", DTYPES), (Recipe, "embedding_bits", EMBEDDING_BITS),
    ):  # fmt: skip
        assert [tried.value for tried in CASES[kind][name]] == list(choices), (kind, name)


@pytest.mark.parametrize(
    ("kind", "name", "tried"), SINGLE, ids=[f"{kind.__name__}.{name}={tried.value}" for kind, name, tried in SINGLE]
)
def test_a_field_is_what_it_was_asked_to_be_once_written_and_runs(
    kind: type, name: str, tried: Tried, checkpoint_of: Callable[[Recipe], Path], token_file: Path
) -> None:
    recipe = Recipe(**{**BASE, "calibration": str(token_file), **tried.keys})
    stored = written(kind, name, checkpoint_of(recipe))
    if isinstance(tried.value, dict) and kind is Recipe:
        # Defaults are filled in.
        assert tried.value.items() <= stored[0].items()
    else:
        assert tried.value in stored


@pytest.mark.parametrize("calibration", ["ids", "text", "self", "none"])
def test_a_calibration_of_every_kind_runs(
    calibration: str, small: Path, token_file: Path, text_file: Path, tmp_path: Path
) -> None:
    calibration_setting = {"ids": str(token_file), "text": str(text_file), "self": "self", "none": None}[calibration]
    go_through(small, tmp_path / "out", text_file, Recipe(**{**BASE, "calibration": calibration_setting}))
    assert written(Recipe, "calibration", tmp_path / "out") == [calibration_setting]


# What two fields, or groups of them, do to each other: the keys of each of their values.
FACTORS: dict[str, list[dict[str, Any]]] = {
    "method": [
        {"method": name, "options": OPTIONS.get(name, {}) | quick}
        for name, quick in (
            ("d2quant-plus", {"iterations": 2}),
            ("d2quant", {"iterations": 2}),
            *((name, {"clip": "minmax"}) for name in ("serq", "qera", "atom", "quarot")),
        )
    ],
    "bits": [{"bits": bits} for bits in BITS],
    "group_size": [{"group_size": size} for size in (-1, 32, 20)],
    "zero_point": [{"zero_point": word} for word in ("auto", *ZERO_POINTS)],
    "scale_type": [{"scale_type": word} for word in SCALE_TYPES],
    "grid": [{"grid": word} for word in ("auto", "sign", "mxfp4")],
    "embedding": [{"embedding_bits": bits} for bits in EMBEDDING_BITS],
    "inputs": [
        {},
        {"activation_bits": 8, "activation_group_size": -1},
        {"activation_bits": 4, "activation_clip": 0.9},
        {"activation_bits": 3, "activation_zero_point": "none"},
    ],
    "cache": [
        {},
        {"kv_bits": 4, "kv": {"key_center": "mean", "window": 4}},
        {"kv_bits": 2, "kv": BY_CHANNEL},
        {"kv_bits": 8, "kv": {"rope": "before"}},
    ],
    "prompt": [{}, {"system_prompt": "w1 w2 w3"}],
    "distill": [{}, {"distill_steps": 1}],
    "dtype": [{"dtype": word} for word in DTYPES],
    "override": [
        {},
        {"overrides": {DOWN: {"skip": True}}},
        {"overrides": {"re:.*(q|up)_proj": {"bits": 2, "grid": "uniform"}}},
    ],
}  # fmt: skip
# What they refuse of each other: MXFP4 groups, clips and corrections, QuaRot keys that are coded without positions.
REFUSED = {("bits", "grid"), ("grid", "group_size"), ("grid", "inputs"), ("grid", "method"), ("cache", "method")}
# So that the rows are shared out.
PARTS = 4


def keys_of(row: Row) -> dict[str, Any]:
    settings = dict(BASE)
    for name, index in row.items():
        settings |= FACTORS[name][index]
    return settings


@pytest.fixture(scope="module")
def rows(small: Path, token_file: Path) -> list[Row]:
    def plausible(row: Row) -> bool:
        try:
            Recipe(**keys_of(row))
        except BadRecipe:
            return False
        return True

    def allowed(row: Row) -> bool:
        try:
            resolve(small, Recipe(**{**keys_of(row), "calibration": str(token_file)}))
        except BadRecipe:
            return False
        return True

    rows, impossible = pairwise(FACTORS, plausible, allowed)
    assert {pair for row in rows for pair in pairs_of(row)}.isdisjoint(impossible)
    assert {tuple(sorted({a[0], b[0]})) for a, b in impossible} <= REFUSED
    return rows


@pytest.mark.parametrize("part", range(PARTS))
def test_values_of_any_two_fields_run_together(
    part: int, rows: list[Row], small: Path, token_file: Path, text_file: Path, tmp_path: Path
) -> None:
    for number, row in enumerate(rows[part::PARTS]):
        keys = keys_of(row)
        try:
            recipe = Recipe(**{**keys, "calibration": str(token_file)})
            go_through(small, tmp_path / str(number), text_file, recipe)
        except Exception as error:
            raise AssertionError(f"{keys}: {error}") from error
