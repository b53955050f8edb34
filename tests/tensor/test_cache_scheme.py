"""Schemes of a KV cache."""

from __future__ import annotations

import pytest

from subnibble.errors import BadRecipe
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bits": 5}, "choose one of 2, 3, 4, 8, or 16"),
        ({"bits": 4.0}, "choose one of"),
        ({"bits": True}, "choose one of"),
        ({"group_size": 0}, "-1 for the whole head"),
        ({"group_size": True}, "-1 for the whole head"),
        ({"key_axis": "head"}, "choose one of token, channel"),
        ({"rope": "none"}, "choose one of after, before"),
        ({"key_rotation": "full"}, "choose one of none, hadamard"),
        ({"window": -1}, "0 for none"),
        ({"window": 1.0}, "0 for none"),
        ({"clip": 0}, "above 0 and at most 1"),
        ({"clip": 1.5}, "above 0 and at most 1"),
        ({"clip": True}, "above 0 and at most 1"),
        ({"rope": "before", "key_rotation": "hadamard"}, 'rope = "after"'),
        ({"key_center": True}, "choose one of none, mean"),
        ({"key_axis": "channel", "key_center": "mean"}, "one range per channel and need no centre"),
        ({"key_axis": "channel"}, "multiple of group_size"),
        ({"key_axis": "channel", "group_size": 32}, "multiple of group_size"),
        ({"key_axis": "channel", "group_size": 32, "window": 48}, "multiple of group_size"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_remedy(values: dict[str, object], said: str) -> None:
    with pytest.raises(BadRecipe, match=said):
        CacheScheme(**{"bits": 4, **values})


def test_round_trip_and_unknown_keys() -> None:
    scheme = CacheScheme(3, 32, "channel", window=64, clip=0.9)
    assert CacheScheme.from_dict(scheme.to_dict()) == scheme
    centered = CacheScheme(3, key_center="mean")
    assert CacheScheme.from_dict(centered.to_dict()) == centered
    # Checkpoints without a centre stay of the version that they were.
    assert "key_center" not in scheme.to_dict()
    with pytest.raises(BadRecipe, match="unknown key 'width'"):
        CacheScheme.from_dict({"bits": 4, "width": 64})


def test_names_tell_schemes_apart() -> None:
    schemes = [
        CacheScheme(4), CacheScheme(3), CacheScheme(4, 32), CacheScheme(4, rope="before"), CacheScheme(4, window=8),
        CacheScheme(4, key_rotation="hadamard"), CacheScheme(4, 8, "channel", window=8), CacheScheme(4, clip=0.9),
        CacheScheme(4, key_center="mean"),
    ]  # fmt: skip
    assert len({scheme.name for scheme in schemes}) == len(schemes)
    assert CacheScheme(2, 32, "channel", window=128).name == "kv2g32-channel-window128"


def test_groups_of_a_head_may_be_ragged() -> None:
    assert CacheScheme(4).bounds(64) == [(0, 64)]
    assert CacheScheme(4, 24).bounds(64) == [(0, 24), (24, 48), (48, 64)]


def test_coded_tokens_by_token_and_by_channel() -> None:
    assert [CacheScheme(4).quantized_tokens(n, True) for n in (0, 1, 5)] == [0, 1, 5]
    window = CacheScheme(4, window=3)
    assert [window.quantized_tokens(n, False) for n in (0, 3, 4, 9)] == [0, 0, 1, 6]
    channel = CacheScheme(4, 2, "channel", window=4)
    assert [channel.quantized_tokens(n, True) for n in (0, 3, 4, 7, 8)] == [0, 0, 4, 4, 8]
    assert [channel.quantized_tokens(n, False) for n in (0, 3, 4, 7, 8)] == [0, 0, 0, 3, 4]


def test_token_bytes_by_hand() -> None:
    # 64 channels at 4 bits and one scale and low: 32 + 4 bytes, for key and value of each of 3 heads.
    assert CacheScheme(4).token_bytes(3, 64) == 3 * 2 * 36
    assert CacheScheme(3, 24).token_bytes(1, 64) == 2 * (24 + 3 * 4)
    # Keys: a channel's 32 tokens take 8 + 4 bytes. Values: 16 + 2 * 4 bytes a token.
    assert CacheScheme(2, 32, "channel", window=32).token_bytes(1, 64) == 64 * 12 / 32 + 16 + 8


def test_prefix_round_trip() -> None:
    assert PrefixIds.from_dict(PrefixIds((3, 1), None).to_dict()) == PrefixIds((3, 1), None)
    with pytest.raises(ValueError, match="a prefix with keys"):
        PrefixIds.from_dict({"ids": [], "bos": None})
