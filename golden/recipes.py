"""The recipes to compare, with this commit's names, and the renames that translate them for older commits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golden.models import TEXT, TOKENS

# In a `Rename`: any value; it is carried over unchanged.
ANY = "<any>"


@dataclass(frozen=True)
class Case:
    """A recipe on a toy model.

    model: name of the toy in `models.py`.
    keys: recipe keys that `USUAL` does not have or that differ from it.
    """

    model: str
    keys: Mapping[str, Any]


@dataclass(frozen=True)
class Rename:
    """A rename of recipe keys or values.

    new: keys and values of this commit, possibly in nested tables. A recipe that contains all of them is translated.
    old: the keys and values that replace them for commits before the rename.
    """

    new: Mapping[str, Any]
    old: Mapping[str, Any]


# Newest first. README.md says when to add one.
RENAMES: tuple[Rename, ...] = (
    Rename({"method": "d2quant-plus"}, {"method": "dualfit"}),
    Rename({"method": "serq-plus"}, {"method": "twinfit"}),
    Rename({"options": {"permutation": "offline"}}, {"options": {"residual_order": "global", "heads": "whole"}}),
)

USUAL: dict[str, Any] = {
    "bits": 4, "group_size": 32, "embedding_bits": 8, "num_windows": 6, "window": 32, "seed": 1, "device": "cpu",
    "dtype": "float32",
}  # fmt: skip
_A4: dict[str, Any] = {"activation_bits": 4, "activation_clip": 0.9}
_KV4: dict[str, Any] = {"kv_bits": 4, "kv": {"group_size": 8}}


def _case(model: str, method: str, options: Mapping[str, Any] | None = None, **keys: Any) -> Case:
    return Case(model, {"method": method, **({"options": dict(options)} if options else {}), **keys})


RECIPES: dict[str, Case] = {
    # Grids.
    "rtn": _case("llama", "rtn", bits=3),
    "rtn-real": _case("llama", "rtn", bits=2, zero_point="real", scale_type="bfloat16"),
    "rtn-symmetric": _case("llama-tied", "rtn", bits=4, zero_point="none", embedding_bits=4),
    "rtn-sign": _case("llama", "rtn", bits=2, grid="sign"),
    "rtn-mxfp4": _case("llama", "rtn", grid="mxfp4"),
    "rtn-channel": _case("qwen2", "rtn", {"clip": "minmax"}, bits=8, group_size=-1, scale_type="float32"),
    # Weights alone.
    "awq": _case("qwen2", "awq", bits=3),
    "gptq": _case("llama", "gptq", bits=3),
    "gptq-natural": _case("qwen2", "gptq", {"order": "natural", "weighting": "hessian"}, bits=2, group_size=24),
    "gptq-sweeps": _case("llama", "gptq", {"sweeps": 2}, bits=2),
    "gptq-bfloat16": _case("llama-tied", "gptq", bits=3, dtype="bfloat16", embedding_bits=16),
    "gptaq": _case("llama", "gptaq", bits=3),
    "gptaq-corrected": _case("qwen3", "gptaq", {"asymmetry": "corrected"}, bits=2),
    "gptaq-shifted": _case("llama", "gptaq", {"asymmetry": "shifted"}, bits=2),
    "d2quant": _case("llama", "d2quant", bits=2),
    "d2quant-4": _case("qwen2", "d2quant", bits=4),
    "d2quant-plus": _case("qwen3", "d2quant-plus", bits=2),
    "d2quant-plus-tied": _case("llama-tied", "d2quant-plus", bits=3, scale_type="bfloat16"),
    # Weights and activations.
    "smoothquant": _case("llama", "smoothquant", bits=8, activation_bits=8, activation_zero_point="none"),
    "l2qer": _case("llama", "l2qer", {"rank": 8}, activation_bits=8),
    "qera": _case("qwen2", "qera", {"rank": 8, "factor_bits": 4}, **_A4),
    "serq": _case("llama", "serq", {"rank": 32}, **_A4),
    "serq-searched": _case("qwen2", "serq", {"rank": 16, "flattening": "search", "rounding": "rtn"}, **_A4),
    "serq-offline": _case("llama", "serq", {"rank": 32, "permutation": "offline"}, **_A4),
    "serq-mxfp4": _case("qwen3", "serq", {"rank": 32}, grid="mxfp4", activation_bits=4),
    "serq-plus": _case("llama", "serq-plus", {"rank": 32}, **_A4),
    # Weights, activations and KV cache.
    "quarot": _case("llama", "quarot", **_A4, **_KV4),
    "quarot-grouped": _case("qwen3", "quarot", bits=3, activation_bits=3, kv_bits=3),
    "atom": _case("llama", "atom", {"outliers": 16}, **_A4, **_KV4),
    "omniquant": _case("llama", "omniquant", {"effort": "fast"}, **_A4),
    "bisup-atom": _case("llama", "bisup", {"over": "atom", "outliers": 16, "rank": 4, "effort": "fast"}, **_A4, **_KV4),
    "bisup-quarot": _case("qwen2", "bisup", {"over": "quarot", "rank": 4, "effort": "fast"}, **_A4, **_KV4),
    "none-cache": _case("qwen2", "none", kv_bits=4, kv={"rope": "before", "window": 8, "clip": 0.95}),
    "none-cache-channel": _case(
        "llama-tied", "none", kv_bits=2, kv={"key_axis": "channel", "group_size": 8, "window": 16}
    ),
    "none-cache-centered": _case("qwen3", "none", kv_bits=3, kv={"key_rotation": "hadamard", "key_center": "mean"}),
    # Parts of a model other than linears.
    "prefix": _case("llama", "gptq", bits=3, system_prompt="w1 w2 w3"),
    "prefix-quarot": _case("qwen3", "quarot", system_prompt="w5 w6", **_A4, **_KV4),
    "prefix-centered": _case(
        "llama-tied", "rtn", system_prompt="w4 w2", kv_bits=4, kv={"rope": "before", "key_center": "mean"}
    ),
    "tied-rotated": _case("llama-tied", "gptq", {"rotation": "full"}, bits=3),
    "tied-rotated-groups": _case("qwen2", "rtn", {"rotation": "groups"}, embedding_bits=16),
    "overrides": _case(
        "llama",
        "gptq",
        bits=3,
        activation_bits=8,
        overrides={
            "model.layers.0.mlp.down_proj": {"skip": True},
            "re:.*k_proj": {"bits": 8, "group_size": -1, "zero_point": "none"},
            "re:.*layers\\.1\\..*o_proj": {"grid": "sign", "bits": 2, "activation_bits": 16},
        },
    ),
    "distilled": _case("llama", "gptq", bits=2, zero_point="real", distill_steps=4, distill={"tokens": 32}),
    "distilled-inputs": _case(
        "qwen3", "d2quant-plus", bits=2, activation_bits=4, distill_steps=6, distill={"tokens": 32}
    ),
}


def recipe_of(case: Case, model: Path) -> dict[str, Any]:
    """Return the recipe keys of a case. model: folder of its toy model, with the calibration text."""
    # transformers loads Qwen2's own tokenizer class, which does not know the toys' words: calibrate on token ids.
    return {**USUAL, **case.keys, "calibration": str(model / (TOKENS if case.model == "qwen2" else TEXT))}


def translated(recipe: Mapping[str, Any], renames: Sequence[Rename]) -> dict[str, Any]:
    """Return the recipe with the names from before `renames`, which are given newest first."""
    translation = _copy(recipe)
    for rename in renames:
        if _contains(translation, rename.new):
            carried: dict[str, Any] = {}
            _remove_(translation, rename.new, carried)
            _insert_(translation, rename.old, carried)
    return translation


def _copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in table.items()}


def _contains(table: Any, target: Mapping[str, Any]) -> bool:
    """Whether a table has all keys and values of `target`."""
    if not isinstance(table, Mapping):
        return False
    return all(
        key in table and (_contains(table[key], value) if isinstance(value, Mapping) else value in (ANY, table[key]))
        for key, value in target.items()
    )


def _remove_(table: dict[str, Any], target: Mapping[str, Any], carried: dict[str, Any]) -> None:
    """Remove the keys of `target` from a table; the value of the key that has `ANY` goes to `carried`."""
    for key, value in target.items():
        if isinstance(value, Mapping):
            _remove_(table[key], value, carried)
            if not table[key]:
                del table[key]
            continue
        removed = table.pop(key)
        if value == ANY:
            carried[ANY] = removed


def _insert_(table: dict[str, Any], entries: Mapping[str, Any], carried: Mapping[str, Any]) -> None:
    """Insert `entries` into a table; `ANY` stands for the value in `carried`."""
    for key, value in entries.items():
        if isinstance(value, Mapping):
            _insert_(table.setdefault(key, {}), value, carried)
        else:
            table[key] = carried[ANY] if value == ANY else value
