"""`quantization_config` round-trips through JSON and rejects what versions 1 to 5 do not know."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subnibble.checkpoint.entries import (
    InputMixEntry,
    NormBiasEntry,
    PackedEmbeddingEntry,
    PackedLinearEntry,
    TiedHeadEntry,
    gather_type,
)
from subnibble.checkpoint.packed import PackedConfig, packed_config_of, stored_shapes
from subnibble.errors import CheckpointError
from subnibble.runtime.hadamard import hadamard_blocks
from subnibble.runtime.ops import RESIDUALS
from subnibble.scheme import ACTIVATION_BITS, BITS, SCALE_TYPES, ZERO_POINTS, ActivationScheme, Scheme
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
MX = Scheme(4, 32, "none", "e8m0", "mxfp4")
A4, A8, AMX = ActivationScheme(4, 128, clip=0.9), ActivationScheme(8), ActivationScheme(4, 32, "none", "mxfp4")
# Every term there is.
WHOLE = PackedLinearEntry(
    PackedLayout(64, ((128, W3), (64, W8))),
    True,
    column_scale=True,
    gather=True,
    blocks=(128, 64),
    activation=A4,
    salient=PackedLayout(64, ((32, MX),)),
    residual="weight",
    low_rank=(PackedLayout(8, ((192, W8),)), PackedLayout(64, ((8, W8),))),
)
COMPOSED = PackedConfig({**CONFIG.modules, DOWN: WHOLE})
# Each is the plain linear with one term that version 2 does not know.
ONE_TERM = {
    "gather": {"gather": True},
    "hadamard": {"blocks": (128, 64)},
    "activation": {"activation": A8},
    "salient": {"salient": PackedLayout(64, ((16, W8),))},
    "low_rank": {"low_rank": (PackedLayout(4, ((192, W8),)), PackedLayout(64, ((4, W8),)))},
}

schemes = st.builds(
    Scheme,
    bits=st.sampled_from(BITS),
    group_size=st.one_of(st.just(-1), st.integers(1, 300)),
    zero_point=st.sampled_from(ZERO_POINTS),
    scale_type=st.sampled_from(sorted(SCALE_TYPES)),
)
ranges = st.lists(st.tuples(st.integers(1, 500), schemes), min_size=1, max_size=3).map(tuple)
layouts = st.builds(PackedLayout, rows=st.integers(1, 1000), ranges=ranges)
activations = st.one_of(
    st.just(AMX),
    st.builds(
        ActivationScheme,
        bits=st.sampled_from(ACTIVATION_BITS),
        group_size=st.one_of(st.just(-1), st.integers(1, 300)),
        zero_point=st.sampled_from(["none", "integer"]),
        clip=st.sampled_from([1.0, 0.95, 0.5]),
    ),
)


@st.composite
def composed(draw) -> PackedLinearEntry:
    """A linear with any terms that fit it, or none."""
    layout, rank = draw(layouts), draw(st.integers(1, 9))
    few = st.tuples(st.integers(1, layout.columns), schemes).map(lambda part: (part,))
    salient = draw(st.one_of(st.none(), few.map(lambda part: PackedLayout(layout.rows, part))))
    low_rank = (
        PackedLayout(rank, ((layout.columns, draw(schemes)),)),
        PackedLayout(layout.rows, ((rank, draw(schemes)),)),
    )
    return PackedLinearEntry(
        layout,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([(), hadamard_blocks(layout.columns), (1,) * layout.columns])),
        draw(st.one_of(st.none(), activations)),
        salient,
        draw(st.sampled_from(RESIDUALS)) if salient is not None else "none",
        draw(st.sampled_from([None, low_rank])),
    )


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
    assert PackedConfig.from_dict(through_json(COMPOSED)) == COMPOSED


@given(st.dictionaries(st.text(max_size=12), entries, max_size=5))
@settings(deadline=None)
def test_any_config_survives_json(modules) -> None:
    config = PackedConfig(modules)
    assert PackedConfig.from_dict(through_json(config)) == config
    scaled = any(isinstance(entry, PackedLinearEntry) and entry.column_scale for entry in modules.values())
    assert config.to_dict()["format_version"] == (2 if scaled else 1)


@given(st.dictionaries(st.text(max_size=12), st.one_of(entries, composed()), max_size=4))
@settings(deadline=None)
def test_any_config_of_version_3_survives_json(modules) -> None:
    config = PackedConfig(modules)
    assert PackedConfig.from_dict(through_json(config)) == config
    linears = [entry for entry in modules.values() if isinstance(entry, PackedLinearEntry)]
    news = [(entry.gather, entry.blocks, entry.activation, entry.salient, entry.low_rank) for entry in linears]
    if any(term not in (False, (), None) for new in news for term in new):
        assert config.to_dict()["format_version"] == 3
    else:
        assert config.to_dict()["format_version"] == 1 + any(entry.column_scale for entry in linears)


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
    with pytest.raises(CheckpointError, match=r"^mine: what it describes came with version 2 and it says version 1$"):
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


@pytest.mark.parametrize(
    "version", [0, 7, -1, "1", "2", "3", "4", "5", "6", 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, True, False, [1], None]
)
@pytest.mark.parametrize("config", [CONFIG, SCALED, COMPOSED], ids=["plain", "scaled", "composed"])
def test_another_version_is_an_error_that_says_so(config, version) -> None:
    values = {**through_json(config), "format_version": version}
    said = re.escape(f"mine: format version {version!r}; this subnibble reads versions 1, 2, 3, 4, 5, 6")
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
    "unknown grid": (["schemes", "w3g128", "grid"], "nvfp4", "grid is 'nvfp4'; choose one of uniform, sign, mxfp4"),
    "mxfp4 grid of another width": (["schemes", "w3g128", "grid"], "mxfp4", "an mxfp4 grid has 4 bits"),
    "e8m0 scales of a uniform grid": (["schemes", "w3g128", "scale_type"], "e8m0", "scale_type is 'e8m0'"),
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


@pytest.mark.parametrize("term", ONE_TERM)
def test_one_new_term_makes_a_composed_linear_of_version_3(term) -> None:
    plain = CONFIG.modules[DOWN]
    config = PackedConfig({**CONFIG.modules, DOWN: PackedLinearEntry(plain.layout, plain.bias, **ONE_TERM[term])})
    values = through_json(config)
    assert values["format_version"] == 3
    assert values["modules"][DOWN]["kind"] == "composed_linear"
    assert set(values) == {"quant_method", "format_version", "schemes", "activations", "modules"}
    assert PackedConfig.from_dict(values) == config
    for version in (1, 2):
        # `activations` is a key of version 3.
        with pytest.raises(CheckpointError, match="unknown key 'activations'"):
            PackedConfig.from_dict({**values, "format_version": version})
        older = {key: value for key, value in values.items() if key != "activations"}
        if term != "activation":
            with pytest.raises(CheckpointError, match=f"came with version 3 and it says version {version}"):
                PackedConfig.from_dict({**older, "format_version": version})
    # The other modules are written as they were.
    others = {path: entry for path, entry in values["modules"].items() if path != DOWN}
    assert others == {path: entry for path, entry in through_json(CONFIG)["modules"].items() if path != DOWN}


def test_an_mxfp4_grid_makes_version_3_of_a_plain_linear_and_of_a_table() -> None:
    for entry in (
        PackedLinearEntry(PackedLayout(64, ((192, MX),)), False),
        PackedEmbeddingEntry(PackedLayout(9, ((64, MX),))),
    ):
        values = through_json(PackedConfig({"at": entry}))
        assert (values["format_version"], values["activations"]) == (3, {})
        assert values["modules"]["at"]["kind"] == ("linear" if isinstance(entry, PackedLinearEntry) else "embedding")
        assert values["schemes"] == {
            "mxfp4g32": {"bits": 4, "group_size": 32, "zero_point": "none", "scale_type": "e8m0", "grid": "mxfp4"}
        }
        assert PackedConfig.from_dict(values) == PackedConfig({"at": entry})
        older = {key: value for key, value in values.items() if key != "activations"}
        with pytest.raises(CheckpointError, match="came with version 3 and it says version 2"):
            PackedConfig.from_dict({**older, "format_version": 2})


def test_what_versions_1_and_2_can_say_is_read_as_version_3_and_written_as_1_and_2() -> None:
    for config, version in ((CONFIG, 1), (SCALED, 2)):
        values = through_json(config)
        assert values["format_version"] == version
        assert "activations" not in values
        newer = {**values, "format_version": 3, "activations": {}}
        assert PackedConfig.from_dict(newer) == config
        assert through_json(PackedConfig.from_dict(newer)) == values
        with pytest.raises(CheckpointError, match="activations"):
            PackedConfig.from_dict({**values, "format_version": 3})


def test_the_dictionary_of_a_composed_linear_is_the_specified_one() -> None:
    values = through_json(PackedConfig({DOWN: WHOLE}))
    assert values["activations"] == {
        "a4g128-clip0.9": {"bits": 4, "group_size": 128, "zero_point": "integer", "grid": "uniform", "clip": 0.9}
    }
    w8 = "w8channel-sym-bfloat16"
    assert values["modules"][DOWN] == {
        "kind": "composed_linear",
        "rows": 64,
        "ranges": [[128, "w3g128"], [64, w8]],
        "bias": True,
        "column_scale": True,
        "gather": True,
        "hadamard": [128, 64],
        "activation": "a4g128-clip0.9",
        "salient": [[32, "mxfp4g32"]],
        "residual": "weight",
        "low_rank": {"rank": 8, "down": [[192, w8]], "up": [[8, w8]]},
    }
    assert set(values["schemes"]) == {"w3g128", w8, "mxfp4g32"}


def test_names_of_activations_are_labels_without_meaning() -> None:
    values = json.loads(json.dumps(through_json(COMPOSED)).replace('"a4g128-clip0.9"', '"w3g128"'))
    assert PackedConfig.from_dict(values) == COMPOSED


def test_two_activation_schemes_keep_apart() -> None:
    plain = CONFIG.modules[DOWN]
    clips = [1.0, 0.9, 0.5]
    config = PackedConfig(
        {
            f"at{i}": PackedLinearEntry(plain.layout, False, activation=ActivationScheme(4, clip=c))
            for i, c in enumerate(clips)
        }
    )
    assert len(through_json(config)["activations"]) == 3
    assert PackedConfig.from_dict(through_json(config)) == config


def test_clips_that_differ_in_the_seventh_digit_keep_apart() -> None:
    plain = CONFIG.modules[DOWN]
    config = PackedConfig(
        {
            str(c): PackedLinearEntry(plain.layout, False, activation=ActivationScheme(4, clip=c))
            for c in (0.9, 0.9000001)
        }
    )
    assert PackedConfig.from_dict(through_json(config)) == config


COMPOSED_BROKEN = {
    "blocks of another sum": ("hadamard", [128, 32], "do not add up to 192"),
    "a block of zero": ("hadamard", [192, 0], "positive count"),
    "a block a fraction": ("hadamard", [192.0], "where int is expected"),
    "blocks null": ("hadamard", None, "damaged"),
    "blocks a number": ("hadamard", 192, "damaged"),
    "a block without a Hadamard matrix": ("hadamard", [92, 100], "92"),
    "salient wider than the weight": ("salient", [[193, "mxfp4g32"]], "193 salient columns"),
    "salient of no range": ("salient", [], "without column ranges"),
    "salient of an unknown scheme": ("salient", [[32, "w5"]], "w5"),
    "salient true": ("salient", True, "damaged"),
    "residual without salient": ("salient", None, "residual is 'weight' without salient"),
    "unknown residual": ("residual", "input", "residual is 'input'"),
    "residual null": ("residual", None, "where str is expected"),
    "unknown activation": ("activation", "a5", "a5"),
    "a weight scheme as an activation": ("activation", "w3g128", "w3g128"),
    "an activation in place": ("activation", {"bits": 4}, "damaged"),
    "gather a number": ("gather", 1, "where bool is expected"),
    "gather null": ("gather", None, "where bool is expected"),
    "column_scale a number": ("column_scale", 0, "where bool is expected"),
    "bias null": ("bias", None, "where bool is expected"),
    "a rank of zero": ("low_rank", {"rank": 0, "down": [[192, "w3g128"]], "up": [[8, "w3g128"]]}, "positive count"),
    "down too narrow": ("low_rank", {"rank": 8, "down": [[191, "w3g128"]], "up": [[8, "w3g128"]]}, "does not fit"),
    "up of another rank": ("low_rank", {"rank": 8, "down": [[192, "w3g128"]], "up": [[9, "w3g128"]]}, "does not fit"),
    "down of an unknown scheme": ("low_rank", {"rank": 8, "down": [[192, "w5"]], "up": [[8, "w3g128"]]}, "w5"),
    "a branch without up": ("low_rank", {"rank": 8, "down": [[192, "w3g128"]]}, "low_rank has keys"),
    "a branch with a bias": (
        "low_rank",
        {"rank": 8, "down": [[192, "w3g128"]], "up": [[8, "w3g128"]], "bias": False},
        "low_rank has keys",
    ),
    "a branch that is a list": ("low_rank", [[192, "w3g128"]], "damaged"),
    "an unknown key": ("kv_cache", 4, "kind 'composed_linear' has keys"),
    **{
        f"no {key}": (key, KeyError, "kind 'composed_linear' has keys")
        for key in ("rows", "ranges", "bias", "column_scale", "gather", "hadamard", "activation", "salient", "residual")
    },
    "no low_rank": ("low_rank", KeyError, "kind 'composed_linear' has keys"),
}


@pytest.mark.parametrize("broken", COMPOSED_BROKEN)
def test_a_damaged_composed_linear_is_an_error(broken) -> None:
    key, value, message = COMPOSED_BROKEN[broken]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        PackedConfig.from_dict(changed(["modules", DOWN, key], value, COMPOSED), "folder/config.json")


def test_a_composed_linear_without_a_term_of_its_own_is_an_error() -> None:
    values = through_json(COMPOSED)
    nothing = {
        "gather": False,
        "hadamard": [],
        "activation": None,
        "salient": None,
        "residual": "none",
        "low_rank": None,
    }
    values["modules"][DOWN] |= nothing
    with pytest.raises(CheckpointError, match="without a term of its own"):
        PackedConfig.from_dict(values)
    for key in ("gather", "activation"):
        one = copy.deepcopy(values)
        one["modules"][DOWN][key] = through_json(COMPOSED)["modules"][DOWN][key]
        PackedConfig.from_dict(one)


ACTIVATIONS_BROKEN = {
    "no activations": (["activations"], KeyError, "activations"),
    "activations null": (["activations"], None, "damaged"),
    "activations a list": (["activations"], [], "damaged"),
    "unknown key": (
        ["activations", "a4g128-clip0.9", "scale_type"],
        "e8m0",
        "unknown activation scheme key 'scale_type'",
    ),
    "no bits": (["activations", "a4g128-clip0.9", "bits"], KeyError, "bits"),
    "bits out of range": (["activations", "a4g128-clip0.9", "bits"], 5, "bits are 5"),
    "bits a float": (["activations", "a4g128-clip0.9", "bits"], 4.0, "bits are 4.0"),
    "group of zero": (["activations", "a4g128-clip0.9", "group_size"], 0, "group_size is 0"),
    "real zero-points": (["activations", "a4g128-clip0.9", "zero_point"], "real", "zero_point is 'real'"),
    "a sign grid": (["activations", "a4g128-clip0.9", "grid"], "sign", "grid is 'sign'"),
    "clip of zero": (["activations", "a4g128-clip0.9", "clip"], 0, "clip is 0"),
    "clip a string": (["activations", "a4g128-clip0.9", "clip"], "1", "clip is '1'"),
}


@pytest.mark.parametrize("broken", ACTIVATIONS_BROKEN)
def test_a_damaged_activation_scheme_is_an_error(broken) -> None:
    path, value, message = ACTIVATIONS_BROKEN[broken]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        PackedConfig.from_dict(changed(path, value, COMPOSED), "folder/config.json")


def test_a_composed_linear_stores_the_tensors_of_all_its_matrices() -> None:
    shapes = {
        name.removeprefix(f"{DOWN}."): shape for name, shape in stored_shapes(PackedConfig({DOWN: WHOLE})).items()
    }
    assert shapes == {
        "codes": (64, 48),
        "scales": (64, 1),
        "zeros": (64, 1),
        "codes_1": (64, 64),
        "scales_1": (64, 1),
        "bias": (64,),
        "column_scale": (192,),
        "gather": (192,),
        "salient.codes": (64, 16),
        "salient.scales": (64, 1),
        "down.codes": (8, 192),
        "down.scales": (8, 1),
        "up.codes": (64, 8),
        "up.scales": (64, 1),
    }


@pytest.mark.parametrize(("columns", "stored"), [(1, torch.int16), (32767, torch.int16), (32768, torch.int32)])
def test_a_gather_is_stored_in_16_bits_where_that_holds_its_channels(columns, stored) -> None:
    assert gather_type(columns) == stored


@pytest.mark.parametrize(
    ("change", "bits"),
    [
        ({}, 16 * 192),
        # 192 codes of 8 bits, one scale of 16, one zero-point of 8.
        ({"activation": A8}, 192 * 8 + 24),
        # 16 extra columns repeat codes, scale and zero-point; a residual repeats them once more.
        ({"activation": A8, **ONE_TERM["salient"]}, 192 * 8 + 24 + 16 * 8 + 24),
        ({"activation": A8, **ONE_TERM["salient"], "residual": "weight"}, 192 * 8 + 24 + 2 * (16 * 8 + 24)),
        ({"activation": A8, **ONE_TERM["salient"], "residual": "salient"}, 192 * 8 + 24 + 2 * (16 * 8 + 24)),
        ({"activation": A8, **ONE_TERM["low_rank"]}, 192 * 8 + 24 + 4 * 8 + 24),
        # 6 groups of 32 with a scale of 8 bits.
        ({"activation": AMX}, 192 * 4 + 6 * 8),
        (ONE_TERM["salient"], 16 * 192),
    ],
)
def test_bits_of_a_token_count_extra_columns_and_the_low_rank_input(change, bits) -> None:
    plain = CONFIG.modules[DOWN]
    assert PackedLinearEntry(plain.layout, False, **change).token_bits() == bits


def test_a_transformers_config_is_packed_only_if_it_says_so() -> None:
    values = through_json(CONFIG)
    assert packed_config_of(SimpleNamespace(quantization_config=values)) == CONFIG
    assert packed_config_of(SimpleNamespace(quantization_config=CONFIG)) == CONFIG
    assert packed_config_of(SimpleNamespace(quantization_config={"quant_method": "gptq", "bits": 4})) is None
    assert packed_config_of(SimpleNamespace(quantization_config=None)) is None
    assert packed_config_of(SimpleNamespace()) is None


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5).map(tuple))
def test_a_matrix_in_front_of_the_head_is_of_version_6(widths) -> None:
    config = PackedConfig({**CONFIG.modules, f"{HEAD}.mix": InputMixEntry(widths)})
    values = through_json(config)
    assert values["format_version"] == 6
    assert PackedConfig.from_dict(values) == config
    assert stored_shapes(config)[f"{HEAD}.mix.matrix"] == (sum(widths), max(widths))
    with pytest.raises(CheckpointError, match="came with version 6 and it says version 5"):
        PackedConfig.from_dict({**values, "format_version": 5})


@pytest.mark.parametrize("widths", [[], [0], [16, -1], [1.0], "16", 16, None])
def test_damaged_widths_of_such_a_matrix_are_refused(widths) -> None:
    values = through_json(PackedConfig({f"{HEAD}.mix": InputMixEntry((16,))}))
    values["modules"][f"{HEAD}.mix"]["widths"] = widths
    with pytest.raises(CheckpointError, match="mine is damaged"):
        PackedConfig.from_dict(values, "mine")
