"""A KV cache, a prefix and outlier channels in the format."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from subnibble.checkpoint.manifest import PackedConfig
from subnibble.checkpoint.module_specs import PackedLinearSpec, PrefixSpec
from subnibble.errors import CheckpointError
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds
from subnibble.tensor.packed import PackedLayout
from subnibble.tensor.scheme import Scheme

OUTLIERS = ActivationScheme(4, 8, "none", outliers=8)
CACHED = PackedConfig(
    {"model.layers.0.self_attn": PrefixSpec(2, 3, 16)},
    CacheScheme(3, 8, "channel", window=16),
    PrefixIds((1, 5, 2), 1),
)


def test_a_cache_and_a_prefix_read_back_the_same() -> None:
    values = through_json(CACHED)
    assert PackedConfig.from_dict(values) == CACHED
    assert through_json(PackedConfig({}, CACHED.cache))["prefix"] is None
    assert PackedConfig.from_dict(through_json(PackedConfig({}, CACHED.cache))) == PackedConfig({}, CACHED.cache)


def test_outliers_are_a_key_only_where_there_are_any() -> None:
    layout = PackedLayout(8, ((24, Scheme(4, 8)), (8, Scheme(8, -1, "none"))))
    config = PackedConfig({"model.layers.0.mlp.up_proj": PackedLinearSpec(layout, False, activation=OUTLIERS)})
    assert PackedConfig.from_dict(through_json(config)) == config
    plain = PackedConfig(
        {"model.layers.0.mlp.up_proj": PackedLinearSpec(layout, False, activation=replace(OUTLIERS, outliers=0))}
    )
    assert "outliers" not in json.dumps(through_json(plain))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cache", {"bits": 5}),
        ("cache", {"bits": 4, "shape": 1}),
        ("cache", 4),
        ("prefix", None),
        ("prefix", {"ids": [1, 5], "bos": 1}),
        ("prefix", {"ids": [1, 5, 2.0], "bos": 1}),
        ("prefix", {"ids": [1, 5, True], "bos": 1}),
        ("prefix", {"ids": [1, 5, -2], "bos": 1}),
        ("prefix", {"ids": [1, 5, 2], "bos": "<s>"}),
        ("prefix", {"ids": [1, 5, 2]}),
        ("modules", {}),
        ("modules", {"a": {"kind": "prefix", "heads": 0, "tokens": 3, "width": 4}}),
        ("modules", {"a": {"kind": "prefix", "heads": 1, "tokens": 3, "width": 4, "more": 1}}),
        ("more", 1),
    ],
)
def test_a_damaged_cache_or_prefix_is_an_error(key: str, value: object) -> None:
    with pytest.raises(CheckpointError):
        PackedConfig.from_dict({**through_json(CACHED), key: value})


@pytest.mark.parametrize("key", ["cache", "prefix"])
def test_cache_and_prefix_may_not_be_left_out(key: str) -> None:
    values = through_json(CACHED)
    del values[key]
    with pytest.raises(CheckpointError):
        PackedConfig.from_dict(values)


def through_json(config: PackedConfig) -> dict:
    return json.loads(json.dumps(config.to_dict()))
