"""How a KV cache is coded, and which tokens go before every text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from subnibble.errors import BadRecipe
from subnibble.tensor.scheme import BITS, WHOLE_CHANNEL, check_clip, check_group_size, group_bounds, known_fields

KEY_AXES = ("token", "channel")
ROPES = ("after", "before")
KEY_ROTATIONS = ("none", "hadamard")
KEY_CENTERS = ("none", "mean")
# A scale and a lowest value, float16 each.
GROUP_BITS = 32
PLAIN_CACHE = 16


@dataclass(frozen=True)
class CacheScheme:
    """Codes of keys and values: `2**bits` levels from a group's lowest value to its highest, both float16.

    bits: 8, 4, 3 or 2.
    group_size: channels of a token's head that share a scale, the last group shorter where they do not divide it; -1
        for the whole head. Of keys by channel: tokens that share one.
    key_axis: "token" codes each token's key by itself, "channel" each channel of group_size tokens (KIVI, arXiv
        2402.02750).
    rope: keys are coded "after" or "before" rotary positions.
    key_rotation: "hadamard" turns queries and keys by a Hadamard matrix a head (QuaRot, arXiv 2404.00456), or "none".
    window: tokens that stay at 16 bits, the last ones; of keys by channel, which are coded a window at a time, those
        that do not fill one (n mod window of n).
    clip: the share of a group's range that is kept, around its middle.
    key_center: "mean" codes keys less a calibrated mean of each head's channels, which is added when they are read
        (SageAttention's smoothing of keys, arXiv 2410.02367, section 4.2, with a mean that is known before the text);
        the model holds the means (`KeyCenter`). Or "none".
    """

    bits: int
    group_size: int = WHOLE_CHANNEL
    key_axis: str = "token"
    rope: str = "after"
    key_rotation: str = "none"
    window: int = 0
    clip: float = 1.0
    key_center: str = "none"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            known = ", ".join(map(str, BITS))
            raise BadRecipe(f"the cache's bits are {self.bits!r}; choose one of {known}, or 16 to leave it as it is")
        check_group_size(self.group_size, "cache's", "head")
        chosen = (
            ("key_axis", KEY_AXES), ("rope", ROPES), ("key_rotation", KEY_ROTATIONS), ("key_center", KEY_CENTERS)
        )  # fmt: skip
        for name, choices in chosen:
            if getattr(self, name) not in choices:
                raise BadRecipe(f"the cache's {name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if type(self.window) is not int or self.window < 0:
            raise BadRecipe(f"the cache's window is {self.window!r}; give a number of tokens, 0 for none")
        check_clip(self.clip, "cache's")
        if self.key_rotation != "none" and self.rope == "before":
            raise BadRecipe(
                'a Hadamard matrix does not pass rotary positions: use key_rotation = "none" or rope = "after"'
            )
        if self.key_axis == "channel" and self.is_centered:
            raise BadRecipe('keys by channel have a range each and need no centre: use key_center = "none"')
        if self.key_axis == "channel" and (self.group_size < 1 or not self.window or self.window % self.group_size):
            raise BadRecipe(
                f"keys by channel wait at 16 bits until a window is full: window is {self.window} and must be a "
                f"multiple of group_size, which is {self.group_size}; use 128 and 32, for example"
            )

    @property
    def name(self) -> str:
        """Short name for tables, for example `kv4g64`."""
        group = "head" if self.group_size == WHOLE_CHANNEL else f"g{self.group_size}"
        parts = [f"kv{self.bits}{group}"]
        parts += ["channel"] if self.key_axis == "channel" else []
        parts += ["prerope"] if self.rope == "before" else []
        parts += ["hadamard"] if self.key_rotation == "hadamard" else []
        parts += [f"window{self.window}"] if self.window else []
        parts += [f"clip{self.clip!r}"] if self.clip != 1 else []
        parts += ["centered"] if self.is_centered else []
        return "-".join(parts)

    @property
    def is_centered(self) -> bool:
        """Whether keys are coded less a mean."""
        return self.key_center != "none"

    @property
    def key_basis(self) -> tuple[str, str]:
        """In which keys are quantized: rope and key_rotation."""
        return self.rope, self.key_rotation

    def bounds(self, width: int) -> list[tuple[int, int]]:
        """First and stop channel of each group of a head of `width` channels coded token by token."""
        return group_bounds(self.group_size, width)

    def check_width(self, width: int) -> None:
        """Raise `BadRecipe` if a group is larger than a head of `width` channels."""
        if self.key_axis == "token" and self.group_size > width:
            raise BadRecipe(
                f"the cache's group {self.group_size} is larger than a head of {width} channels; use at most {width}, "
                "or -1 for the whole head"
            )

    def quantized_tokens(self, tokens: int, of_keys: bool) -> int:
        """How many of the first `tokens` tokens are coded once so many are there; the others are at 16 bits."""
        if of_keys and self.key_axis == "channel":
            return tokens // self.window * self.window
        return max(tokens - self.window, 0)

    def token_bytes(self, heads: int, width: int) -> float:
        """Bytes of one coded token in one layer, of key and value, for so many key-value heads of `width` channels."""
        row = (width * self.bits + 7) // 8 + len(self.bounds(width)) * GROUP_BITS / 8
        keys = row
        if self.key_axis == "channel":
            group = (self.group_size * self.bits + 7) // 8 + GROUP_BITS / 8
            keys = width * group / self.group_size
        return heads * (keys + row)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, the inverse of `from_dict`; without key_center if it is "none"."""
        return {key: value for key, value in asdict(self).items() if (key, value) != ("key_center", "none")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dictionary; an unknown key is an error."""
        return cls(**known_fields(cls, values, "unknown key {} of the cache"))


@dataclass(frozen=True)
class PrefixIds:
    """Tokens before every text, whose keys and values are computed once and stay at 16 bits.

    bos: the id that the tokenizer puts before texts by itself, None if it puts none.
    """

    ids: tuple[int, ...]
    bos: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, the inverse of `from_dict`."""
        return {"ids": list(self.ids), "bos": self.bos}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dictionary; `ValueError` if it is none of a prefix."""
        if set(values) != {"ids", "bos"} or not values["ids"]:
            raise ValueError(f"a prefix with keys {sorted(values)}")
        found = [*values["ids"], *([] if values["bos"] is None else [values["bos"]])]
        if any(type(token) is not int or token < 0 for token in found):
            raise ValueError("token ids of a prefix are whole numbers")
        return cls(tuple(values["ids"]), values["bos"])
