"""Arms of the benches. An arm is a method with its settings, written as changes to another arm or to `SHARED`.

    python bench/arms.py weight_only d2quant-plus-sign > d2quant-plus-sign.toml

prints the recipe of an arm, for `subnibble quantize --recipe`. In a table of changes, names of recipe keys set those
keys; all other names are options of the method.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subnibble.recipe import Recipe

# Arm -> (the arm that it is based on, or "" for none; its changes to that arm).
Arms = Mapping[str, tuple[str, Mapping[str, Any]]]
# Recipe keys that all arms of a bench share. A row overrides bits, group size and activation bits.
SHARED: Mapping[str, Mapping[str, Any]] = {
    "weight_only": {"bits": 2, "embedding_bits": 8},
    "weight_activation": {"bits": 4, "activation_bits": 4, "embedding_bits": 8},
    "weight_activation_kv": {"bits": 4, "activation_bits": 4, "kv_bits": 4, "embedding_bits": 8},
}
_DISTILLED = {"distill_steps": 112}
_CENTERED = {"kv": {"key_center": "mean"}}
_OFFLINE = {"permutation": "offline"}
_WEIGHT_ONLY: Arms = {
    "rtn": ("", {"method": "rtn"}),
    "rtn-rotated": ("rtn", {"rotation": "groups"}),
    "awq": ("", {"method": "awq"}),
    "awq-rotated": ("awq", {"rotation": "groups"}),
    "gptq-gar": ("", {"method": "gptq"}),
    "gptq-natural": ("gptq-gar", {"order": "natural"}),
    "gptq-rotated": ("gptq-gar", {"rotation": "groups"}),
    "gptq-rotated-full": ("gptq-gar", {"rotation": "full"}),
    "gptq-gar-sweeps": ("gptq-gar", {"sweeps": 2}),
    "gptq-gar-real": ("gptq-gar", {"zero_point": "real", "weighting": "hessian"}),
    "gptq-gar-sign": ("gptq-gar", {"grid": "sign", "weighting": "hessian"}),
    "gptq-gar-sign-unweighted": ("gptq-gar", {"grid": "sign"}),
    "gptq-gar-distilled": ("gptq-gar", _DISTILLED),
    # GPTQ with one part of D2Quant each.
    "gptq-gar-dual": ("d2quant-unrotated-no-asymmetry", {"mean_shift": "none"}),
    "gptq-gar-shift": ("d2quant-unrotated-no-asymmetry", {"grid": "uniform", "columns": "none"}),
    "gptaq": ("", {"method": "gptaq"}),
    "gptaq-corrected": ("gptaq", {"asymmetry": "corrected"}),
    "gptaq-shifted": ("gptaq", {"asymmetry": "shifted", "alpha": 0.5}),
    "gptaq-rotated": ("gptaq", {"rotation": "groups"}),
    "gptaq-rotated-full": ("gptaq", {"rotation": "full"}),
    "gptaq-shifted-rotated": ("gptaq-shifted", {"rotation": "groups"}),
    # Clip power 2.0 as in all other arms; the authors' program has 2.4.
    "d2quant": ("", {"method": "d2quant", "clip_power": 2.0}),
    "d2quant-released": ("d2quant", {"clip_power": 2.4}),
    "d2quant-uniform": ("d2quant", {"grid": "uniform"}),
    "d2quant-uniform-unrotated": ("d2quant-uniform", {"rotation": "none"}),
    "d2quant-hessian": ("d2quant", {"weighting": "hessian"}),
    "d2quant-natural": ("d2quant", {"order": "natural"}),
    "d2quant-no-asymmetry": ("d2quant", {"asymmetry": "none"}),
    "d2quant-no-shift": ("d2quant", {"mean_shift": "none"}),
    "d2quant-rows-only": ("d2quant", {"columns": "none"}),
    "d2quant-unrotated": ("d2quant", {"rotation": "none"}),
    "d2quant-unrotated-no-asymmetry": ("d2quant-unrotated", {"asymmetry": "none"}),
    "d2quant-plus": ("", {"method": "d2quant-plus"}),
    "d2quant-plus-distilled": ("d2quant-plus", _DISTILLED),
    "d2quant-plus-integer": ("d2quant-plus", {"zero_point": "integer"}),
    "d2quant-plus-sign": ("d2quant-plus", {"grid": "sign"}),
    "d2quant-plus-no-columns": ("d2quant-plus", {"columns": "none"}),
    "d2quant-plus-down-columns": ("d2quant-plus", {"columns": "down"}),
    "d2quant-plus-unweighted": ("d2quant-plus", {"weighting": "none"}),
    "d2quant-plus-natural": ("d2quant-plus", {"order": "natural"}),
    "d2quant-plus-no-asymmetry": ("d2quant-plus", {"asymmetry": "none"}),
    "d2quant-plus-released": ("d2quant-plus", {"asymmetry": "released", "alpha": 0.25}),
    "d2quant-plus-published-shift": ("d2quant-plus", {"mean_shift": "published"}),
    "d2quant-plus-sweeps": ("d2quant-plus", {"sweeps": 2}),
    "d2quant-plus-unrotated": ("d2quant-plus", {"rotation": "none"}),
}
_WEIGHT_ACTIVATION: Arms = {
    "rtn": ("", {"method": "rtn"}),
    "gptq": ("", {"method": "gptq"}),
    "smoothquant": ("", {"method": "smoothquant"}),
    "l2qer": ("", {"method": "l2qer", "factor_bits": 4}),
    "qera": ("", {"method": "qera", "factor_bits": 4}),
    # Without rotated values, because the KV cache stays at 16 bits.
    "quarot": ("", {"method": "quarot", "value_rotation": "none"}),
    "quarot-rtn": ("quarot", {"rounding": "rtn"}),
    "serq": ("", {"method": "serq"}),
    "serq-rtn": ("serq", {"rounding": "rtn"}),
    **{f"serq-rank-{rank}": ("serq", {"rank": rank}) for rank in (0, 16, 32, 64, 256)},
    **{f"serq-rtn-rank-{rank}": ("serq-rtn", {"rank": rank}) for rank in (0, 16, 32, 64, 256)},
    "serq-flattening": ("serq-rank-0", {"saliency": "none"}),
    "serq-no-flattening": ("serq", {"flattening": "none"}),
    "serq-search": ("serq", {"flattening": "search"}),
    "serq-clip": ("serq", {"clip": "mse"}),
    "serq-offline": ("serq", _OFFLINE),
    "serq-quantized-inputs": ("serq", {"inputs": "quantized"}),
    "serq-residual": ("serq", {"residual": "salient"}),
    "serq-plus": ("", {"method": "serq-plus"}),
    **{f"serq-plus-rank-{rank}": ("serq-plus", {"rank": rank}) for rank in (32, 64)},
    "serq-plus-offline": ("serq-plus", _OFFLINE),
    "serq-plus-search": ("serq-plus", {"flattening": "search"}),
}
_WEIGHT_ACTIVATION_KV: Arms = {
    "rtn": ("", {"method": "rtn"}),
    "atom-asymmetric": ("", {"method": "atom"}),
    "atom": ("atom-asymmetric", {"activation_zero_point": "none", "activation_clip": 0.9}),
    "atom-centered": ("atom", _CENTERED),
    "atom-distilled": ("atom", _DISTILLED),
    "atom-centered-distilled": ("atom-centered", _DISTILLED),
    "quarot-asymmetric": ("", {"method": "quarot"}),
    "quarot": ("quarot-asymmetric", {"zero_point": "none", "activation_zero_point": "none", "activation_clip": 0.9}),
    "quarot-centered": ("quarot", _CENTERED),
    "quarot-distilled": ("quarot", _DISTILLED),
    "quarot-centered-distilled": ("quarot-centered", _DISTILLED),
    "quarot-by-channel": (
        "quarot",
        {"kv": {"key_axis": "channel", "key_rotation": "none", "group_size": 32, "window": 32, "clip": 1.0}},
    ),
    "serq-plus": ("", {"method": "serq-plus", "kv": {"rope": "before"}}),
    "serq-plus-centered-distilled": ("serq-plus", {**_DISTILLED, **_CENTERED}),
    # 64 windows of 512 tokens.
    "omniquant-fast": ("", {"method": "omniquant", "window": 512, "effort": "fast"}),
    "bisup-atom-fast": ("atom", {"method": "bisup", "over": "atom", "window": 512, "effort": "fast"}),
    "bisup-atom-fast-distilled": ("bisup-atom-fast", _DISTILLED),
    "bisup-atom-fast-composed": (
        "bisup-atom-fast-distilled",
        {**_CENTERED, "input_clipping": "site", "low_rank_rate": 0.005},
    ),
    "bisup-quarot-fast": ("quarot", {"method": "bisup", "over": "quarot", "window": 512, "effort": "fast"}),
    "bisup-quarot-fast-asymmetric": (
        "quarot-asymmetric",
        {"method": "bisup", "over": "quarot", "window": 512, "effort": "fast"},
    ),
    "bisup-quarot-fast-centered": ("bisup-quarot-fast", _CENTERED),
    "bisup-quarot-fast-distilled": ("bisup-quarot-fast", _DISTILLED),
    "bisup-quarot-fast-composed": (
        "bisup-quarot-fast-distilled",
        {**_CENTERED, "input_clipping": "site", "low_rank_rate": 0.005},
    ),
    "bisup-quarot-fast-input-clipping": ("bisup-quarot-fast", {"input_clipping": "site"}),
    "bisup-quarot-fast-hard-smoothing": ("bisup-quarot-fast", {"smoothing": "hard"}),
    **{
        f"bisup-quarot-fast-no-{name}": ("bisup-quarot-fast", {name.replace("-", "_"): "none"})
        for name in ("clipping", "smoothing", "low-rank")
    },
    "kv": ("", {"method": "none", "activation_bits": 16, "embedding_bits": 16}),
    "kv-window": ("kv", {"kv": {"window": 32}}),
    # As in KIVI.
    "kv-by-channel": ("kv-window", {"kv": {"key_axis": "channel", "group_size": 32}}),
    "kv-centered": ("kv", _CENTERED),
    "kv-before-rope": ("kv", {"kv": {"rope": "before"}}),
    "kv-before-rope-centered": ("kv-before-rope", _CENTERED),
    "kv-hadamard": ("kv", {"kv": {"key_rotation": "hadamard"}}),
    "kv-hadamard-centered": ("kv-hadamard", _CENTERED),
}
ARMS: Mapping[str, Arms] = {
    "weight_only": _WEIGHT_ONLY,
    "weight_activation": _WEIGHT_ACTIVATION,
    "weight_activation_kv": _WEIGHT_ACTIVATION_KV,
}


def recipe_of(bench: str, arm: str, **settings: Any) -> Recipe:
    """Return the recipe of an arm.

    bench: a key of `ARMS`.
    arm: the name of one of its arms.
    settings: recipe keys that the row sets, such as bits and group_size.
    """
    from subnibble.recipe import Recipe

    return Recipe.from_dict({**_values(bench, arm), **settings})


def _values(bench: str, arm: str) -> dict[str, Any]:
    """Recipe keys of an arm, as a dictionary: those of its base, with the arm's changes."""
    from subnibble.recipe import Recipe

    if not arm:
        return {**SHARED[bench], "options": {}, "kv": {}}
    base, changes = ARMS[bench][arm]
    keys = {item.name for item in fields(Recipe)}
    values = _values(bench, base)
    options = {key: value for key, value in changes.items() if key not in keys}
    plain = {key: value for key, value in changes.items() if key in keys - {"kv"}}
    # Options belong to a method, so an arm of another method does not inherit them.
    same_method = changes.get("method", values.get("method")) == values.get("method")
    inherited = values["options"] if same_method else {}
    return {**values, **plain, "options": {**inherited, **options}, "kv": {**values["kv"], **changes.get("kv", {})}}


def main() -> None:
    """Print the recipe of the arm that the command line names."""
    arguments = sys.argv[1:]
    if len(arguments) != 2 or arguments[0] not in ARMS or arguments[1] not in ARMS[arguments[0]]:
        benches = "\n".join(f"{bench}: {', '.join(arms)}" for bench, arms in ARMS.items())
        sys.exit(f"usage: arms.py BENCH ARM\n{benches}")
    print(recipe_of(*arguments).to_toml(), end="")


if __name__ == "__main__":
    main()
