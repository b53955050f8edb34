"""`quantization_config` round-trips through JSON and rejects what versions 1 and 2 do not know."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subnibble.checkpoint.packed import (
    NormBiasEntry,
    PackedConfig,
    PackedEmbeddingEntry,
    PackedLinearEntry,
    TiedHeadEntry,
    packed_config_of,
    stored_shapes,
)
from subnibble.errors import CheckpointError
from subnibble.scheme import BITS, SCALE_TYPES, ZERO_POINTS, Scheme
from subnibble.tensor import PackedLayout

W3, W8 = Scheme(3, 128), Scheme(8, -1, "none", "bfloat16")
TABLE, HEAD = "model.embed_tokens", "lm_head"
Q, NORM = "model.layers.0.self_attn.q_proj", "model.layers.0.input_layernorm"
DOWN = "model.layers.0.mlp.down_proj"
CONFIG = PackedConfig(
    {
        TABLE: PackedEmbeddingEntry(PackedLayout(100, ((64, W8),))),
        HEAD: TiedHeadEntry(TABLE),
        Q: PackedLinearEntry(PackedLayout(64, ((48, W3), (16, W8))), True),
        DOWN: PackedLinearEntry(PackedLayout(64, ((192, W3),)), False),
        NORM: NormBiasEntry(64),
    }
)
SCALED = PackedConfig(
    {**CONFIG.modules, DOWN: PackedLinearEntry(PackedLayout(64, ((192, W3),)), False, column_scale=True)}
)

schemes = st.builds(
    Scheme,
    bits=st.sampled_from(BITS),
    group_size=st.one_of(st.just(-1), st.integers(1, 300)),
    zero_point=st.sampled_from(ZERO_POINTS),
    scale_type=st.sampled_from(sorted(SCALE_TYPES)),
)
ranges = st.lists(st.tuples(st.integers(1, 500), schemes), min_size=1, max_size=3).map(tuple)
layouts = st.builds(PackedLayout, rows=st.integers(1, 1000), ranges=ranges)
entries = st.one_of(
    st.builds(PackedLinearEntry, layout=layouts, bias=st.booleans(), column_scale=st.booleans()),
    st.builds(PackedEmbeddingEntry, layout=layouts),
    st.builds(TiedHeadEntry, table=st.text(max_size=8)),
    st.builds(NormBiasEntry, rows=st.integers(1, 1000)),
)


def through_json(config: PackedConfig) -> dict:
    return json.loads(json.dumps(config.to_dict()))


def test_every_kind_of_entry_survives_json() -> None:
    assert PackedConfig.from_dict(through_json(CONFIG)) == CONFIG
    assert PackedConfig.from_dict(through_json(SCALED)) == SCALED


@given(st.dictionaries(st.text(max_size=12), entries, max_size=5))
@settings(deadline=None)
def test_any_config_survives_json(modules) -> None:
    config = PackedConfig(modules)
    assert PackedConfig.from_dict(through_json(config)) == config
    scaled = any(isinstance(entry, PackedLinearEntry) and entry.column_scale for entry in modules.values())
    assert config.to_dict()["format_version"] == (2 if scaled else 1)


def test_the_dictionary_is_the_specified_one() -> None:
    small = PackedConfig({path: CONFIG.modules[path] for path in (Q, HEAD, NORM, TABLE)})
    w3 = {"bits": 3, "group_size": 128, "zero_point": "integer", "scale_type": "float16", "grid": "uniform"}
    w8 = {"bits": 8, "group_size": -1, "zero_point": "none", "scale_type": "bfloat16", "grid": "uniform"}
    two = [[48, "w3g128"], [16, "w8channel-sym-bfloat16"]]
    assert through_json(small) == {
        "quant_method": "subnibble",
        "format_version": 1,
        "schemes": {"w3g128": w3, "w8channel-sym-bfloat16": w8},
        "modules": {
            Q: {"kind": "linear", "rows": 64, "ranges": two, "bias": True},
            HEAD: {"kind": "tied_head", "table": "model.embed_tokens"},
            NORM: {"kind": "norm_bias", "rows": 64},
            TABLE: {"kind": "embedding", "rows": 100, "ranges": [[64, "w8channel-sym-bfloat16"]]},
        },
    }


def test_a_column_scale_makes_a_scaled_linear_of_version_2_and_changes_nothing_else() -> None:
    plain, scaled = through_json(CONFIG), through_json(SCALED)
    assert (plain["format_version"], scaled["format_version"]) == (1, 2)
    assert scaled["modules"][DOWN] == {"kind": "scaled_linear", "rows": 64, "ranges": [[192, "w3g128"]], "bias": False}
    scaled["format_version"] = 1
    scaled["modules"][DOWN]["kind"] = "linear"
    assert scaled == plain
    assert list(scaled["modules"]) == list(plain["modules"])


def test_version_2_may_hold_no_column_scale_and_version_1_must_not() -> None:
    assert PackedConfig.from_dict({**through_json(CONFIG), "format_version": 2}) == CONFIG
    with pytest.raises(CheckpointError, match=r"^mine: scaled_linear came with version 2 and this says version 1"):
        PackedConfig.from_dict({**through_json(SCALED), "format_version": 1}, "mine")


def test_a_scaled_linear_stores_one_float16_number_an_input_column() -> None:
    plain, scaled = stored_shapes(CONFIG), stored_shapes(SCALED)
    assert scaled == plain | {f"{DOWN}.column_scale": (192,)}
    assert plain[f"{Q}.bias"] == (64,)
    assert plain[f"{NORM}.bias"] == (64,)
    assert not any(name.startswith(HEAD) for name in plain)
    two = PackedConfig({Q: PackedLinearEntry(PackedLayout(64, ((48, W3), (16, W8))), True, True)})
    assert stored_shapes(two)[f"{Q}.column_scale"] == (64,)
    assert {"codes", "scales", "zeros", "codes_1", "scales_1", "bias", "column_scale"} == {
        name.removeprefix(f"{Q}.") for name in stored_shapes(two)
    }


def test_names_of_schemes_are_labels_without_meaning() -> None:
    values = json.loads(json.dumps(CONFIG.to_dict()).replace('"w3g128"', '"a"'))
    assert PackedConfig.from_dict(values) == CONFIG


@pytest.mark.parametrize("version", [0, 3, -1, "1", "2", 1.0, 2.0, True, False, [1], None])
@pytest.mark.parametrize("config", [CONFIG, SCALED], ids=["plain", "scaled"])
def test_another_version_is_an_error_that_says_so(config, version) -> None:
    values = {**through_json(config), "format_version": version}
    said = re.escape(f"mine: format version {version!r}; this subnibble reads versions 1 and 2")
    with pytest.raises(CheckpointError, match=f"^{said}"):
        PackedConfig.from_dict(values, "mine")


def test_a_missing_version_is_an_error() -> None:
    values = through_json(CONFIG)
    del values["format_version"]
    with pytest.raises(CheckpointError, match="format version None"):
        PackedConfig.from_dict(values)


def changed(path: list, value: object, config: PackedConfig = CONFIG) -> dict:
    """The example with one value set, or removed where `value` is `KeyError`."""
    values = copy.deepcopy(through_json(config))
    table = values
    for key in path[:-1]:
        table = table[key]
    if value is KeyError:
        del table[path[-1]]
    else:
        table[path[-1]] = value
    return values


BROKEN = {
    "unknown top key": (["activations"], {}, "unknown key 'activations'"),
    "no schemes": (["schemes"], KeyError, "schemes"),
    "no modules": (["modules"], KeyError, "modules"),
    "schemes no table": (["schemes"], [], "damaged"),
    "modules no table": (["modules"], ["a"], "damaged"),
    "unknown scheme key": (["schemes", "w3g128", "outliers"], 3, "unknown scheme key 'outliers'"),
    "unknown grid": (["schemes", "w3g128", "grid"], "mxfp4", "choose one of uniform, sign"),
    "sign grid with zero-points": (["schemes", "w3g128", "grid"], "sign", "no zero-point"),
    "scheme without bits": (["schemes", "w3g128", "bits"], KeyError, "bits"),
    "scheme out of range": (["schemes", "w3g128", "bits"], 5, "bits is 5"),
    "scheme bits a float": (["schemes", "w3g128", "bits"], 4.0, "bits is 4.0"),
    "scheme no table": (["schemes", "w3g128"], 3, "damaged"),
    "scheme type unhashable": (["schemes", "w3g128", "scale_type"], ["float16"], "damaged"),
    "unknown kind": (["modules", Q, "kind"], "convolution", "kind 'convolution'"),
    "kind of another entry": (["modules", Q, "kind"], "embedding", "kind 'embedding'"),
    "no kind": (["modules", Q, "kind"], KeyError, "kind"),
    "kind unhashable": (["modules", Q, "kind"], ["linear"], "damaged"),
    "unknown module key": (["modules", Q, "gather"], True, "gather"),
    "linear without rows": (["modules", Q, "rows"], KeyError, "kind 'linear'"),
    "linear without bias": (["modules", Q, "bias"], KeyError, "kind 'linear'"),
    "linear without ranges": (["modules", Q, "ranges"], KeyError, "kind 'linear'"),
    "head without table": (["modules", HEAD, "table"], KeyError, "kind 'tied_head'"),
    "norm bias without rows": (["modules", NORM, "rows"], KeyError, "kind 'norm_bias'"),
    "embedding with bias": (["modules", TABLE, "bias"], False, "kind 'embedding'"),
    "unknown scheme name": (["modules", Q, "ranges"], [[64, "w5"]], "w5"),
    "range of one value": (["modules", Q, "ranges"], [[64]], "damaged"),
    "range of three values": (["modules", Q, "ranges"], [[64, "w3g128", 1]], "damaged"),
    "ranges a number": (["modules", Q, "ranges"], 64, "damaged"),
    "rows null": (["modules", Q, "rows"], None, "damaged"),
    "entry no table": (["modules", Q], "linear", "damaged"),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("config", [CONFIG, SCALED], ids=["version 1", "version 2"])
def test_what_no_version_knows_is_an_error(config, broken) -> None:
    path, value, message = BROKEN[broken]
    with pytest.raises(CheckpointError, match=message):
        PackedConfig.from_dict(changed(path, value, config), "folder/config.json")


SCALED_BROKEN = {
    "column_scale as a key": (["modules", DOWN, "column_scale"], True, "kind 'scaled_linear' has keys"),
    "scaled without bias": (["modules", DOWN, "bias"], KeyError, "kind 'scaled_linear' has keys"),
    "scaled without ranges": (["modules", DOWN, "ranges"], KeyError, "kind 'scaled_linear' has keys"),
    "an embedding scaled": (["modules", TABLE, "kind"], "scaled_embedding", "kind 'scaled_embedding'"),
    "an embedding as a scaled linear": (["modules", TABLE, "kind"], "scaled_linear", "kind 'scaled_linear' has keys"),
}


@pytest.mark.parametrize("broken", SCALED_BROKEN)
def test_a_scaled_linear_has_the_keys_of_a_linear_and_no_others(broken) -> None:
    path, value, message = SCALED_BROKEN[broken]
    with pytest.raises(CheckpointError, match=message):
        PackedConfig.from_dict(changed(path, value, SCALED), "folder/config.json")


COERCED = {
    "rows a fraction": (["modules", Q, "rows"], 64.5),
    "rows a string": (["modules", Q, "rows"], "64"),
    "rows negative": (["modules", Q, "rows"], -64),
    "columns a fraction": (["modules", Q, "ranges"], [[64.5, "w3g128"]]),
    "columns zero": (["modules", Q, "ranges"], [[0, "w3g128"]]),
    "no range": (["modules", Q, "ranges"], []),
    "bias a string": (["modules", Q, "bias"], "false"),
    "table a number": (["modules", HEAD, "table"], 3),
}


@pytest.mark.parametrize("wrong", COERCED)
def test_a_value_of_the_wrong_type_or_size_is_an_error_and_not_converted(wrong) -> None:
    with pytest.raises(CheckpointError):
        PackedConfig.from_dict(changed(*COERCED[wrong]))


def test_a_transformers_config_is_packed_only_if_it_says_so() -> None:
    values = through_json(CONFIG)
    assert packed_config_of(SimpleNamespace(quantization_config=values)) == CONFIG
    assert packed_config_of(SimpleNamespace(quantization_config=CONFIG)) == CONFIG
    assert packed_config_of(SimpleNamespace(quantization_config={"quant_method": "gptq", "bits": 4})) is None
    assert packed_config_of(SimpleNamespace(quantization_config=None)) is None
    assert packed_config_of(SimpleNamespace()) is None
