"""Measure a quantized KV cache, alone or with quantized weights and activations, on SmolLM2-135M.

    python bench/weight_activation_kv.py [--wikitext DIR] [--only NAME] [--row ARM:SETTING:PROMPT:WINDOWS ...]
    python bench/weight_activation_kv.py --print

Finished rows have perplexity, bits, and the cache's bytes per token. They are appended to the results file; later runs
skip them.

ARM is an arm of `arms.py`, or `original` with an empty SETTING.
SETTING is KV2, KV3, KV4 or KV8 for arms named kv, which leave weights and inputs at 16 bits. For other arms it is
W4A4KV4 or W3A3KV3 followed by g128, g64 or channel (whole rows of weights and whole tokens). Unless an arm says
otherwise, the keys, and the values, of one token and head share a scale.
PROMPT is put before each window and not scored; its keys and values stay at 16 bits. It is none, bos, default (the chat
template's system turn) or auto (the model's attention sinks). default-added adds default to a model that was quantized
without a prompt, with keys and values computed by the packed model; default-quantized also quantizes these like those
of any token. Compare with `original` after the same prompt.
WINDOWS windows of 2048 tokens of news calibrate, in bfloat16 (arms named fast cut them into windows of 512), and as
many are scored, in float32, on the last 400 news articles and, with --wikitext, on WikiText-2 raw test.
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
PROMPTS = ("none", "bos", "default", "auto", "default-added", "default-quantized")
# Arms whose blocks are tuned or whose model is distilled. At W3A3KV3 they show what each part of tuning gives.
TUNED = tuple(arm for arm in ALL if arm.startswith(("bisup", "omniquant")) or arm.endswith("-distilled"))
SHOWN = (
    "bisup-quarot-fast-composed", "bisup-atom-fast-composed", "quarot-distilled", "atom-distilled",
    "bisup-quarot-fast", "bisup-atom-fast", "omniquant-fast",
)  # fmt: skip
PLAIN = tuple(arm for arm in ALL if arm not in TUNED)
BOTH = ("W4A4KV4g128", "W3A3KV3g128")


@dataclass(frozen=True)
class Spec:
    """One quantization.

    arm: an arm of `arms.py`, or "original".
    setting: a key of `CACHES` or `SETTINGS`; "" for the original.
    prompt: one of `PROMPTS`.
    windows: windows of 2048 tokens, both to calibrate and to score.
    """

    arm: str
    setting: str
    prompt: str
    windows: int


def specs(only: str | None) -> list[Spec]:
    """Return the rows of one part of the table (None: of all parts), the most important first."""
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
    """Parse a row as written on the command line, for example kv:KV4:bos:16 or quarot:W4A4KV4g128:none:16."""
    (arm, setting, prompt), (windows,) = parts_of(text, FORM, 1)
    settings = CACHES if arm in CACHE_ALONE else {"": {}} if arm == "original" else SETTINGS
    # default-added and default-quantized add a prompt after quantization, which the original does not have.
    prompts = [name for name in PROMPTS if arm != "original" or "-" not in name]
    if arm not in (*ARMS, "original") or setting not in settings or prompt not in prompts:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give {FORM}, ARM one of original, {', '.join(ARMS)}; SETTING one of "
            f"{', '.join((*CACHES, *SETTINGS))} (empty for original); PROMPT one of {', '.join(prompts)}"
        )
    return Spec(arm, setting, prompt, windows)


def measured(spec: Spec, names: dict[str, str]) -> list[dict[str, Any]]:
    """Measure `spec` and return one row per text."""
    from subnibble import Recipe

    name, _, kind = spec.prompt.partition("-")
    prompt = None if name == "none" or kind else name
    if spec.arm == "original":
        plain = Recipe(method="none", system_prompt=prompt, num_windows=64, window=512)
        plain = replace(plain, calibration="news") if prompt == "auto" else plain
        return measure_row(plain if prompt else None, spec.windows, names)
    prompted = {} if prompt is None else {"system_prompt": prompt}
    recipe = arms.recipe_of(BENCH, spec.arm, **{**CACHES, **SETTINGS}[spec.setting], **prompted)
    change = {"": None, "added": add_prompt_, "quantized": add_quantized_prompt_}[kind]
    return measure_row(with_data(recipe, spec.windows), spec.windows, names, change=change)


def add_prompt_(model: Any, tokenizer: Any) -> None:
    """Add the chat template's system turn as prefix to a model that was quantized without one."""
    from subnibble.calibrate.prompt import prefix_ids
    from subnibble.generate.prefix import attach_prefix_
    from subnibble.hf.attention import attached_cache

    attached = attached_cache(model)
    attach_prefix_(model, None if attached is None else attached.scheme, prefix_ids("default", tokenizer))


def add_quantized_prompt_(model: Any, tokenizer: Any) -> None:
    """Like `add_prompt_`, but with the prefix's keys and values quantized like those of a text."""
    import torch

    from subnibble.calibrate.prompt import prefix_ids
    from subnibble.generate.prefix import compute_prefix
    from subnibble.hf.attention import attach_cache_, attached_cache, set_prefix_
    from subnibble.runtime.kv_cache import CacheQuantizer
    from subnibble.runtime.quantized_text import quantized_keys, quantized_values

    attached = attached_cache(model)
    assert attached is not None
    assert attached.scheme is not None
    assert attached.scheme.key_center == "none"
    cache_quantizer, prefix = CacheQuantizer(attached.scheme), prefix_ids("default", tokenizer)
    states = compute_prefix(model, prefix)
    positions = model.model.rotary_emb(torch.zeros(1, 1), torch.arange(len(prefix.ids)).unsqueeze(0))
    quantized = [
        (
            quantized_keys(keys[None].float(), cache_quantizer, positions)[0],
            quantized_values(values[None].float(), cache_quantizer)[0],
        )
        for keys, values in states
    ]
    attach_cache_(model, attached.scheme, prefix)
    set_prefix_(model, [(keys.half(), values.half()) for keys, values in quantized])


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table as Markdown, best first in each setting.

    "Over the original" is the increase of perplexity over the original after the same prompt.
    """
    measurements = by_spec(rows, Spec)
    order = sorted(measurements, key=lambda s: (-s.windows, s.setting, s.prompt, measurements[s]["news"]["perplexity"]))
    columns = (
        "arm", "setting", "prompt", "windows", "weight bits", "activation bits", "KV, bytes a token", "news",
        "WikiText-2", "over the original", "quantize, s", "peak, GB", "commit",
    )  # fmt: skip
    print_table(columns, (_cells(measurements, spec) for spec in order))


def _cells(measurements: dict[Spec, dict[str, dict[str, Any]]], spec: Spec) -> list[str]:
    on_news = measurements[spec]["news"]
    return [
        spec.arm,
        spec.setting,
        spec.prompt,
        str(spec.windows),
        f"{on_news['effective_bits']:.3f}",
        f"{on_news['activation_bits']:.3f}",
        f"{on_news['cache_bytes']:.0f}",
        *score_cells(measurements[spec]),
        share_cell(measurements[spec], lambda text: _over(measurements, spec, text), "+.1f"),
        *cost_cells(on_news),
    ]


def _over(measurements: dict[Spec, dict[str, dict[str, Any]]], spec: Spec, text: str) -> float | None:
    """Relative increase of perplexity over the original after the same prompt; None if the original has no row."""
    prompt = spec.prompt.partition("-")[0]
    original = measurements.get(replace(spec, arm="original", setting="", prompt=prompt), {}).get(text)
    if original is None or spec.arm == "original":
        return None
    return float(measurements[spec][text]["perplexity"] / original["perplexity"] - 1)


def main() -> None:
    """Run the bench's command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        choices=("original", "cache", "table", "prompt", "tuned", "ablation"),
        help="measure the missing rows of one part of the table",
    )
    parser.add_argument(
        "--row", action="append", type=parse_spec, metavar=FORM, help="measure this row only; may be repeated"
    )
    results = HERE / "results" / "weight_activation_kv.json"
    run(parser, results, KEY, Spec, measured, lambda arguments: arguments.row or specs(arguments.only), show)


if __name__ == "__main__":
    main()
