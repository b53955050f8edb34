"""`quantization_config` round-trips through JSON."""

import json
import re
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

from subnibble.checkpoint.manifest import PackedConfig, packed_config_of, stored_shapes
from subnibble.checkpoint.module_specs import (
    HeadInputSpec,
    NormBiasSpec,
    PackedEmbeddingSpec,
    PackedLinearSpec,
    TiedHeadSpec,
)
from subnibble.errors import CheckpointError
from subnibble.tensor.activation_scheme import ACTIVATION_BITS, ActivationScheme
from subnibble.tensor.hadamard import hadamard_blocks
from subnibble.tensor.packed import PackedLayout
from subnibble.tensor.scheme import BITS, SCALE_TYPES, ZERO_POINTS, Scheme

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
def composed(draw) -> PackedLinearSpec:
    """A linear with any terms that fit it, or none."""
    layout, rank = draw(layouts), draw(st.integers(1, 9))
    few = st.tuples(st.integers(1, layout.num_columns), schemes).map(lambda part: (part,))
    salient = draw(st.one_of(st.none(), few.map(lambda part: PackedLayout(layout.rows, part))))
    low_rank = (
        PackedLayout(rank, ((layout.num_columns, draw(schemes)),)),
        PackedLayout(layout.rows, ((rank, draw(schemes)),)),
    )
    return PackedLinearSpec(
        layout,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([(), hadamard_blocks(layout.num_columns), (1,) * layout.num_columns])),
        draw(st.one_of(st.none(), activations)),
        salient,
        draw(st.sampled_from([0, salient.num_columns])) if salient is not None else 0,
        draw(st.sampled_from([None, low_rank])),
    )


specs = st.one_of(
    composed(),
    st.builds(PackedEmbeddingSpec, layout=layouts),
    st.builds(TiedHeadSpec, table=st.text(max_size=8)),
    st.builds(NormBiasSpec, rows=st.integers(1, 1000)),
)


def test_every_kind_of_entry_survives_json() -> None:
    assert PackedConfig.from_dict(through_json(CONFIG)) == CONFIG
    assert PackedConfig.from_dict(through_json(SCALED)) == SCALED
    assert PackedConfig.from_dict(through_json(COMPOSED)) == COMPOSED


@given(st.dictionaries(st.text(max_size=12), specs, max_size=5))
@settings(deadline=None)
def test_any_config_survives_json(modules) -> None:
    config = PackedConfig(modules)
    assert PackedConfig.from_dict(through_json(config)) == config


def test_the_dictionary_is_the_specified_one() -> None:
    small = PackedConfig({path: CONFIG.modules[path] for path in (Q, HEAD, NORM, TABLE)})
    w3 = {"bits": 3, "group_size": 128, "zero_point": "integer", "scale_type": "float16", "grid": "uniform"}
    w8 = {"bits": 8, "group_size": -1, "zero_point": "none", "scale_type": "bfloat16", "grid": "uniform"}
    two = [[48, "w3g128"], [16, "w8channel-sym-bfloat16"]]
    assert through_json(small) == {
        "quant_method": "subnibble",
        "format_version": 1,
        "schemes": {"w3g128": w3, "w8channel-sym-bfloat16": w8},
        "activations": {},
        "cache": None,
        "prefix": None,
        "modules": {
            Q: {"kind": "linear", "rows": 64, "ranges": two, "bias": True},
            HEAD: {"kind": "tied_head", "table": "model.embed_tokens"},
            NORM: {"kind": "norm_bias", "rows": 64},
            TABLE: {"kind": "embedding", "rows": 100, "ranges": [[64, "w8channel-sym-bfloat16"]]},
        },
    }


@pytest.mark.parametrize("version", [0, 2, 1.0, True, "1", None])
def test_another_version_is_refused_by_its_name(version) -> None:
    values = {**through_json(CONFIG), "format_version": version}
    with pytest.raises(CheckpointError, match=re.escape(f"mine: format version {version!r}; this subnibble reads")):
        PackedConfig.from_dict(values, "mine")


def test_names_of_schemes_are_labels_without_meaning() -> None:
    values = json.loads(json.dumps(CONFIG.to_dict()).replace('"w3g128"', '"a"'))
    assert PackedConfig.from_dict(values) == CONFIG


@pytest.mark.parametrize("term", ONE_TERM)
def test_a_term_is_one_key_more_of_its_linear(term) -> None:
    plain = CONFIG.modules[DOWN]
    config = PackedConfig({**CONFIG.modules, DOWN: PackedLinearSpec(plain.layout, plain.bias, **ONE_TERM[term])})
    values = through_json(config)
    assert PackedConfig.from_dict(values) == config
    value = values["modules"][DOWN].pop(term)
    assert values["modules"] == through_json(CONFIG)["modules"]
    # To say that it is absent is no second way to write the same.
    absent = {list: [], bool: False, str: None, dict: None}[type(value)] if term != "salient" else None
    with pytest.raises(CheckpointError, match=f"{term} says {re.escape(repr(absent))}"):
        PackedConfig.from_dict({**values, "modules": {DOWN: {**values["modules"][DOWN], term: absent}}})


def test_an_mxfp4_grid_has_a_plain_linear_and_a_table() -> None:
    for spec in (
        PackedLinearSpec(PackedLayout(64, ((192, MX),)), False),
        PackedEmbeddingSpec(PackedLayout(9, ((64, MX),))),
    ):
        values = through_json(PackedConfig({"at": spec}))
        assert values["modules"]["at"]["kind"] == ("linear" if isinstance(spec, PackedLinearSpec) else "embedding")
        assert values["schemes"] == {
            "mxfp4g32": {"bits": 4, "group_size": 32, "zero_point": "none", "scale_type": "e8m0", "grid": "mxfp4"}
        }
        assert PackedConfig.from_dict(values) == PackedConfig({"at": spec})


@pytest.mark.parametrize("key", ["schemes", "activations", "cache", "prefix", "modules"])
def test_no_key_may_be_left_out(key) -> None:
    values = through_json(CONFIG)
    del values[key]
    with pytest.raises(CheckpointError, match=key):
        PackedConfig.from_dict(values)


def test_the_dictionary_of_a_composed_linear_is_the_specified_one() -> None:
    values = through_json(PackedConfig({DOWN: WHOLE}))
    assert values["activations"] == {
        "a4g128-clip0.9": {"bits": 4, "group_size": 128, "zero_point": "integer", "grid": "uniform", "clip": 0.9}
    }
    w8 = "w8channel-sym-bfloat16"
    assert values["modules"][DOWN] == {
        "kind": "linear",
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
            f"at{i}": PackedLinearSpec(plain.layout, False, activation=ActivationScheme(4, clip=c))
            for i, c in enumerate(clips)
        }
    )
    assert len(through_json(config)["activations"]) == 3
    assert PackedConfig.from_dict(through_json(config)) == config


def test_clips_that_differ_in_the_seventh_digit_keep_apart() -> None:
    plain = CONFIG.modules[DOWN]
    config = PackedConfig(
        {
            str(c): PackedLinearSpec(plain.layout, False, activation=ActivationScheme(4, clip=c))
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
def test_a_matrix_in_front_of_the_head_survives_json(widths) -> None:
    config = PackedConfig({**CONFIG.modules, f"{HEAD}.mix": HeadInputSpec(widths)})
    values = through_json(config)
    assert PackedConfig.from_dict(values) == config
    assert stored_shapes(config)[f"{HEAD}.mix.matrix"] == (sum(widths), max(widths))
