"""How a KV cache is quantized, and which tokens precede every text (the prompt prefix)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from subnibble.errors import BadRecipe
from subnibble.tensor.groups import WHOLE_CHANNEL, check_group_size, group_bounds, group_name
from subnibble.tensor.scheme import BITS
from subnibble.tensor.scheme_checks import check_choice, check_clip, known_fields

KEY_AXES = ("token", "channel")
ROPES = ("after", "before")
KEY_ROTATIONS = ("none", "hadamard")
KEY_CENTERS = ("none", "mean")
# A scale and a lowest value, float16 each.
GROUP_BITS = 32
PLAIN_CACHE = 16


@dataclass(frozen=True)
class CacheScheme:
    """How keys and values are quantized: `2**bits` levels from a group's lowest value to its highest.

    A group stores its scale and lowest value in float16.

    bits: 8, 4, 3 or 2.
    group_size: channels of a token's head that share a scale; -1 for the whole head. If it does not divide the head,
        the last group is shorter. For keys quantized by channel: tokens that share a scale.
    key_axis: "token" quantizes each token's key separately, "channel" each channel over group_size tokens (KIVI, arXiv
        2402.02750).
    rope: quantize keys "after" or "before" rotary positions are applied.
    key_rotation: "hadamard" rotates queries and keys by one Hadamard matrix per head (QuaRot, arXiv 2404.00456), or
        "none".
    window: number of last tokens that stay at 16 bits. Keys by channel are quantized one full window at a time: of n
        tokens, the last n mod window stay at 16 bits.
    clip: the share of a group's range that is kept, around its middle.
    key_center: "none", or "mean": subtract a calibrated mean of each head's channels before keys are quantized, and add
        it when they are read; the model holds the means (`KeyCenter`). SageAttention smooths keys in the same way
        (arXiv 2410.02367, section 4.2), but computes the mean from the text itself.
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
        check_choice(self.bits, BITS, "the cache's bits are", ", or 16 to keep it unquantized")
        check_group_size(self.group_size, "the cache's group_size", "head")
        check_choice(self.key_axis, KEY_AXES, "the cache's key_axis is")
        check_choice(self.rope, ROPES, "the cache's rope is")
        check_choice(self.key_rotation, KEY_ROTATIONS, "the cache's key_rotation is")
        check_choice(self.key_center, KEY_CENTERS, "the cache's key_center is")
        if type(self.window) is not int or self.window < 0:
            raise BadRecipe(f"the cache's window is {self.window!r}; give a number of tokens, 0 for none")
        check_clip(self.clip, "the cache's clip")
        if self.key_rotation != "none" and self.rope == "before":
            raise BadRecipe(
                'a Hadamard rotation does not commute with rotary positions: use key_rotation = "none" or '
                'rope = "after"'
            )
        if self.key_axis == "channel" and self.is_centered:
            raise BadRecipe(
                'keys quantized by channel have one range per channel and need no centre: use key_center = "none"'
            )
        if self.key_axis == "channel" and (self.group_size < 1 or not self.window or self.window % self.group_size):
            raise BadRecipe(
                f"keys quantized by channel stay at 16 bits until a window is full: window is {self.window} and must "
                f"be a multiple of group_size, which is {self.group_size}; use 128 and 32, for example"
            )

    @property
    def name(self) -> str:
        """Short name for tables, for example `kv4g64`."""
        parts = [f"kv{self.bits}{group_name(self.group_size, 'head')}"]
        parts += ["channel"] if self.key_axis == "channel" else []
        parts += ["prerope"] if self.rope == "before" else []
        parts += ["hadamard"] if self.key_rotation == "hadamard" else []
        parts += [f"window{self.window}"] if self.window else []
        parts += [f"clip{self.clip!r}"] if self.clip != 1 else []
        parts += ["centered"] if self.is_centered else []
        return "-".join(parts)

    @property
    def is_centered(self) -> bool:
        """Whether a mean is subtracted from keys before they are quantized."""
        return self.key_center != "none"

    @property
    def key_basis(self) -> tuple[str, str]:
        """The basis in which keys are quantized: (rope, key_rotation)."""
        return self.rope, self.key_rotation

    def bounds(self, width: int) -> list[tuple[int, int]]:
        """First and stop channel of each group in a head of `width` channels, for keys and values by token."""
        return group_bounds(self.group_size, width)

    def check_width(self, width: int) -> None:
        """Raise `BadRecipe` if a group is larger than a head of `width` channels."""
        if self.key_axis == "token" and self.group_size > width:
            raise BadRecipe(
                f"the cache's group {self.group_size} is larger than a head of {width} channels; use at most {width}, "
                "or -1 for the whole head"
            )

    def quantized_tokens(self, tokens: int, of_keys: bool) -> int:
        """How many of a cache's `tokens` tokens are quantized: the first ones; the others are at 16 bits.

        of_keys: True for keys, False for values.
        """
        if of_keys and self.key_axis == "channel":
            return tokens // self.window * self.window
        return max(tokens - self.window, 0)

    def can_crop(self, length: int, target: int) -> bool:
        """Whether a cache of `length` tokens can drop all tokens after the first `target`.

        Only the last tokens are kept at 16 bits, and quantized tokens cannot return to 16 bits.
        """
        return self.window == 0 or all(
            self.quantized_tokens(length, of_keys) == self.quantized_tokens(target, of_keys)
            for of_keys in (True, False)
        )

    def token_bytes(self, heads: int, width: int) -> float:
        """Bytes of one quantized token in one layer: key and value of `heads` key-value heads of `width` channels."""
        row = (width * self.bits + 7) // 8 + len(self.bounds(width)) * GROUP_BITS / 8
        keys = row
        if self.key_axis == "channel":
            group = (self.group_size * self.bits + 7) // 8 + GROUP_BITS / 8
            keys = width * group / self.group_size
        return heads * (keys + row)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, the inverse of `from_dict`; omits `key_center` if it is "none"."""
        return {key: value for key, value in asdict(self).items() if (key, value) != ("key_center", "none")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dictionary; an unknown key is an error."""
        return cls(**known_fields(cls, values, "unknown key {} of the cache"))


@dataclass(frozen=True)
class PrefixIds:
    """A prompt prefix: tokens before every text. Their keys and values are computed once and stay at 16 bits.

    ids: the prefix's token ids.
    bos: the id that the tokenizer itself puts before texts, None if it puts none.
    """

    ids: tuple[int, ...]
    bos: int | None = None

    def repeated(self, text: Sequence[int]) -> int:
        """Number of tokens at the start of a text that repeat the prefix or its BOS; never the text's last token.

        text: token ids.
        """
        if tuple(text[: len(self.ids)]) == self.ids:
            count = len(self.ids)
        else:
            has_bos = len(text) > 0 and text[0] == self.bos
            count = int(has_bos and self.bos in (self.ids[0], self.ids[-1]))
        return min(count, max(len(text) - 1, 0))

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, the inverse of `from_dict`."""
        return {"ids": list(self.ids), "bos": self.bos}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dictionary; `ValueError` if it does not describe a prefix."""
        if set(values) != {"ids", "bos"} or not values["ids"]:
            raise ValueError(
                f"a prefix with keys {sorted(values)}; it must have bos and ids, and ids must not be empty"
            )
        tokens = [*values["ids"], *([] if values["bos"] is None else [values["bos"]])]
        if any(type(token) is not int or token < 0 for token in tokens):
            raise ValueError("a prefix's token ids must be whole numbers, 0 or larger")
        return cls(tuple(values["ids"]), values["bos"])
