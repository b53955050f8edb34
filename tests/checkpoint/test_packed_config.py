"""`quantization_config` round-trips through JSON, in the first version that can say it."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_config_samples import (
    AMX,
    COMPOSED,
    CONFIG,
    DOWN,
    HEAD,
    MX,
    NORM,
    ONE_TERM,
    SCALED,
    TABLE,
    WHOLE,
    Q,
    through_json,
)

from subnibble.checkpoint.entries import (
    InputMixEntry,
    NormBiasEntry,
    PackedEmbeddingEntry,
    PackedLinearEntry,
    TiedHeadEntry,
)
from subnibble.checkpoint.packed import PackedConfig, packed_config_of, stored_shapes
from subnibble.errors import CheckpointError
from subnibble.runtime.hadamard import hadamard_blocks
from subnibble.runtime.ops import RESIDUALS
from subnibble.scheme import ACTIVATION_BITS, BITS, SCALE_TYPES, ZERO_POINTS, ActivationScheme, Scheme
from subnibble.tensor import PackedLayout

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


def test_names_of_schemes_are_labels_without_meaning() -> None:
    values = json.loads(json.dumps(CONFIG.to_dict()).replace('"w3g128"', '"a"'))
    assert PackedConfig.from_dict(values) == CONFIG


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
        "residual": "salient",
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
