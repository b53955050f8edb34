"""Weights, activations and KV cache quantized, or the cache alone, on SmolLM2-135M: perplexity, bits, bytes a token.

    python bench/weight_activation_kv.py [--wikitext DIR] [--only NAME] [--row ARM:SETTING:PROMPT:WINDOWS ...]
    python bench/weight_activation_kv.py --print

Finished rows are appended to the results file and skipped when they are there. Arms are those of
`arms.py`, and `original`. Those named kv leave weights and inputs at 16 bits: their settings are
KV2, KV3, KV4 and KV8. The others have W4A4KV4 and W3A3KV3, in groups of 128, 64 or of whole channels and tokens
(`channel`); cached keys and values share a scale a head and token. PROMPT is none, bos, default (the chat template's
system turn) or auto (the model's sink tokens): its keys and values stay at 16 bits, it stands before each window and is
not scored; compare with `original` and the same prompt. default-late is default for a model that was quantized without
it, its keys and values the packed model's own; default-coded the same with these coded like any token's. WINDOWS of
2048 tokens calibrate (news, computed in bfloat16; arms that are named fast cut them into windows of 512) and as many
are scored, in float32, on the last 400 news articles and, with --wikitext, on WikiText-2 raw test.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import arms
from measure import (
    HERE,
    by_spec,
    cost_cells,
    measure_row,
    parts_of,
    print_table,
    run,
    score_cells,
    share_cell,
    with_data,
)

FORM = "ARM:SETTING:PROMPT:WINDOWS"
KEY = ("arm", "setting", "prompt", "windows", "text")
BENCH = "weight_activation_kv"
ARMS = sorted(arms.ARMS[BENCH])
CACHE_ALONE = tuple(arm for arm in ARMS if arm.startswith("kv"))
ALL = tuple(arm for arm in ARMS if arm not in CACHE_ALONE)
CACHES = {f"KV{bits}": {"kv_bits": bits} for bits in (8, 4, 3, 2)}
SETTINGS: dict[str, dict[str, Any]] = {
    f"W{bits}A{bits}KV{bits}{name}": {
        "bits": bits,
        "activation_bits": bits,
        "kv_bits": bits,
        "group_size": size,
    }
    for bits in (4, 3)
    for name, size in (("g128", 128), ("g64", 64), ("channel", -1))
}
PROMPTS = ("none", "bos", "default", "auto", "default-late", "default-coded")
# Arms at W3A3KV3 that show what each part of tuning gives.
TUNED = tuple(arm for arm in ALL if arm.startswith(("bisup", "omniquant")) or arm.endswith("-distilled"))
SHOWN = (
    "bisup-quarot-fast-composed", "bisup-atom-fast-composed", "quarot-distilled", "atom-distilled",
    "bisup-quarot-fast", "bisup-atom-fast", "omniquant-fast",
)  # fmt: skip
PLAIN = tuple(arm for arm in ALL if arm not in TUNED)


BOTH = ("W4A4KV4g128", "W3A3KV3g128")


@dataclass(frozen=True)
class Spec:
    """One quantization: which arm at which setting, behind which system prompt, on how many windows."""

    arm: str
    setting: str
    prompt: str
    windows: int


def specs(only: str | None) -> list[Spec]:
    """All rows to make, most telling first."""
    chosen = {
        "original": [Spec("original", "", prompt, 16) for prompt in PROMPTS[:4]],
        "cache": [Spec(arm, s, p, 16) for p in PROMPTS[:3] for s in CACHES for arm in CACHE_ALONE],
        "table": [Spec(arm, s, "none", 16) for s in SETTINGS for arm in PLAIN],
        "prompt": [Spec(arm, s, p, 16) for p in PROMPTS[1:3] for s in BOTH for arm in PLAIN],
        "tuned": [Spec(arm, s, "none", 16) for s in BOTH for arm in SHOWN],
        "ablation": [
            *(Spec(arm, "W3A3KV3g128", "none", 16) for arm in TUNED),
            *(Spec("bisup-quarot-fast", "W3A3KV3g128", prompt, 16) for prompt in PROMPTS),
        ],
    }
    return chosen[only] if only else [spec for specs in chosen.values() for spec in specs]


def parse_spec(text: str) -> Spec:
    """A row as written on the command line, for example kv:KV4:bos:16 or quarot:W4A4KV4g128:none:16."""
    (arm, setting, prompt), (windows,) = parts_of(text, FORM, 1)
    settings = CACHES if arm in CACHE_ALONE else {"": {}} if arm == "original" else SETTINGS
    # How a model is put behind a prompt afterwards is asked of quantized ones alone.
    prompts = [name for name in PROMPTS if arm != "original" or "-" not in name]
    if arm not in (*ARMS, "original") or setting not in settings or prompt not in prompts:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give {FORM}, ARM one of original, {', '.join(ARMS)}; SETTING one of "
            f"{', '.join((*CACHES, *SETTINGS))} (empty for original); PROMPT one of {', '.join(prompts)}"
        )
    return Spec(arm, setting, prompt, windows)


def measured(spec: Spec, names: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of `spec` on each text."""
    from subnibble import Recipe

    name, _, kind = spec.prompt.partition("-")
    prompt = None if name == "none" or kind else name
    if spec.arm == "original":
        plain = Recipe(method="none", system_prompt=prompt, num_windows=64, window=512)
        plain = replace(plain, calibration="news") if prompt == "auto" else plain
        return measure_row(plain if prompt else None, spec.windows, names)
    prompted = {} if prompt is None else {"system_prompt": prompt}
    recipe = arms.recipe_of(BENCH, spec.arm, **{**CACHES, **SETTINGS}[spec.setting], **prompted)
    change = {"": None, "late": put_behind_, "coded": put_behind_coded_}[kind]
    return measure_row(with_data(recipe, spec.windows), spec.windows, names, change=change)


def put_behind_(model: Any, tokenizer: Any) -> None:
    """Put a model that was quantized without a prompt behind the chat template's."""
    from subnibble.calibrate.prompt import prefix_ids
    from subnibble.generate.prefix import attach_prefix_
    from subnibble.hf.attention import attached_cache

    attached = attached_cache(model)
    attach_prefix_(model, None if attached is None else attached.scheme, prefix_ids("default", tokenizer))


def put_behind_coded_(model: Any, tokenizer: Any) -> None:
    """The same, the prompt's keys and values coded as a text's."""
    import torch

    from subnibble.calibrate.prompt import prefix_ids
    from subnibble.generate.prefix import compute_prefix
    from subnibble.hf.attention import attach_cache_, attached_cache, set_prefix_
    from subnibble.runtime.kv_cache import Coding
    from subnibble.runtime.quantized_text import quantized_keys, quantized_values

    attached = attached_cache(model)
    assert attached is not None
    assert attached.scheme is not None
    assert attached.scheme.key_center == "none"
    coding, prefix = Coding(attached.scheme), prefix_ids("default", tokenizer)
    states = compute_prefix(model, prefix)
    positions = model.model.rotary_emb(torch.zeros(1, 1), torch.arange(len(prefix.ids)).unsqueeze(0))
    quantized = [
        (quantized_keys(keys[None].float(), coding, positions)[0], quantized_values(values[None].float(), coding)[0])
        for keys, values in states
    ]
    attach_cache_(model, attached.scheme, prefix)
    set_prefix_(model, [(keys.half(), values.half()) for keys, values in quantized])


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table as Markdown, best first in each setting.

    "Over the original" is by how much perplexity is above that of the original behind the same prompt.
    """
    found = by_spec(rows, Spec)
    order = sorted(found, key=lambda s: (-s.windows, s.setting, s.prompt, found[s]["news"]["perplexity"]))
    columns = (
        "arm", "setting", "prompt", "windows", "weight bits", "activation bits", "KV, bytes a token", "news",
        "WikiText-2", "over the original", "quantize, s", "peak, GB", "commit",
    )  # fmt: skip
    print_table(columns, (_cells(found, spec) for spec in order))


def _cells(found: dict[Spec, dict[str, dict[str, Any]]], spec: Spec) -> list[str]:
    one = found[spec]["news"]
    return [
        spec.arm,
        spec.setting,
        spec.prompt,
        str(spec.windows),
        f"{one['effective_bits']:.3f}",
        f"{one['activation_bits']:.3f}",
        f"{one['cache_bytes']:.0f}",
        *score_cells(found[spec]),
        share_cell(found[spec], lambda text: _over(found, spec, text), "+.1f"),
        *cost_cells(one),
    ]


def _over(found: dict[Spec, dict[str, dict[str, Any]]], spec: Spec, text: str) -> float | None:
    """By which share of it an arm's perplexity is above the original's behind the same prompt; None without its row."""
    prompt = spec.prompt.partition("-")[0]
    original = found.get(replace(spec, arm="original", setting="", prompt=prompt), {}).get(text)
    if original is None or spec.arm == "original":
        return None
    return float(found[spec][text]["perplexity"] / original["perplexity"] - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("original", "cache", "table", "prompt", "tuned", "ablation"))
    parser.add_argument("--row", action="append", type=parse_spec, metavar=FORM)
    results = HERE / "results" / "weight_activation_kv.json"
    run(parser, results, KEY, Spec, measured, lambda given: given.row or specs(given.only), show)


if __name__ == "__main__":
    main()
