"""`subnibble inspect`, `subnibble prefix`, `subnibble distill` and `subnibble list`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subnibble.cli import options as o
from subnibble.cli.console import distilled, megabytes, print_json, progress, table
from subnibble.cli.streams import say

if TYPE_CHECKING:
    from subnibble.checkpoint.manifest import PackedConfig


def inspect(model: o.Model, json: o.Json = False) -> None:
    """Show what a checkpoint holds: sizes, bits, the scheme of every packed module."""
    from subnibble.checkpoint.checksums import check_files
    from subnibble.checkpoint.manifest import packed_config_of
    from subnibble.checkpoint.opening import open_source
    from subnibble.checkpoint.size import measure, weight_files, weights_hash

    source = open_source(model)
    packed = packed_config_of(source.config)
    found: dict[str, Any] = {
        "path": str(source.path),
        "model_type": source.config.model_type,
        "format": "subnibble" if packed else source.path.suffix.removeprefix(".") or "safetensors",
        **measure(source).to_dict(),
    }
    if packed is not None:
        check_files(weight_files(source.path), source.config.quantization_config)
        found["weights_sha256"] = weights_hash(source.path)
        found["modules"] = packed.to_dict()["modules"]
        found["cache"] = None if packed.cache is None else packed.cache.to_dict()
        found["prefix"] = None if packed.prefix is None else packed.prefix.to_dict()
    if json:
        print_json(found)
        return
    table(("what", "value"), [
        ("path", found["path"]),
        ("model type", found["model_type"]),
        ("format", found["format"]),
        ("parameters", f"{found['parameters'] / 1e6:.1f} M"),
        ("effective bits", f"{found['effective_bits']:.3f}"),
        ("activation bits", f"{found['activation_bits']:.3f}"),
        ("model bits", f"{found['model_bits']:.3f}"),
        ("KV cache", f"{found['cache_bytes']:.0f} bytes a token{_cache_name(packed)}"),
        ("on disk", megabytes(found["file_bytes"])),
        *([("system prompt", f"{len(found['prefix']['ids'])} tokens at 16 bits")] if found.get("prefix") else []),
        *([("weights SHA-256", found["weights_sha256"])] if packed else []),
    ])  # fmt: skip
    if packed is not None:
        rows = [
            (path, entry["kind"], str(entry.get("rows", "-")), _ranges(entry))
            for path, entry in found["modules"].items()
        ]
        table(("module", "kind", "rows", "columns x scheme"), rows)


def prefix(
    out: Annotated[Path, typer.Argument(help="A folder that `subnibble quantize` wrote.", metavar="OUT")],
    system_prompt: Annotated[
        str, typer.Option(help="As of `subnibble quantize`, but as the packed model sees it.", metavar=o.PROMPTS)
    ],
    device: o.Device = None,
    dtype: o.Dtype = None,
) -> None:
    """Give the checkpoint in OUT a system prompt, its keys and values at 16 bits."""
    from subnibble.generate.prefix import add_prefix

    found = add_prefix(out, system_prompt, dtype=dtype or "float32", device=device or "auto")
    say(f"{out}: system prompt of {len(found.ids)} tokens at 16 bits")


def distill(
    out: Annotated[Path, typer.Argument(help="A folder that `subnibble quantize` wrote.", metavar="OUT")],
    original: Annotated[
        str, typer.Option(help="The model that it was quantized from: folder, hub id or .gguf file.", metavar="MODEL")
    ],
    steps: Annotated[int, typer.Option(help="How many steps the packed model is tuned for.", min=1)],
    distill_option: o.DistillOptions = None,
    calibration: o.Calibration = None,
    num_windows: o.NumWindows = None,
    window: o.Window = None,
    seed: Annotated[int | None, typer.Option(help="Draws the windows and their order. Default 0.")] = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
) -> None:
    """Tune the checkpoint in OUT as a whole towards the original's predictions; its codes stay."""
    target = o.build_recipe(
        None, None, None, distill_option, distill_steps=steps, calibration=calibration, num_windows=num_windows,
        window=window, seed=seed, device=device, dtype=dtype,
    )  # fmt: skip
    from subnibble.distill.checkpoint import distill_checkpoint

    with progress("distill") as told:
        found = distill_checkpoint(out, original, target, progress=told)
    say(f"{out}: {distilled(found)}")


def _cache_name(packed: PackedConfig | None) -> str:
    return "" if packed is None or packed.cache is None else f", {packed.cache.name}"


def _ranges(entry: dict[str, Any]) -> str:
    parts = [f"{columns} x {scheme}" for columns, scheme in entry.get("ranges", [])]
    parts += [f"salient {columns} x {scheme}" for columns, scheme in entry.get("salient") or []]
    if entry.get("low_rank"):
        parts.append(f"low rank {entry['low_rank']['rank']} x {entry['low_rank']['down'][0][1]}")
    steps = ("input", "gather", "column_scale", "activation", "residual")
    found = {step: entry.get(step) for step in steps} | {"hadamard": bool(entry.get("hadamard"))}
    named = {
        "input": f"enters as {found['input']}",
        "activation": found["activation"],
        "residual": f"residual on {found['residual']}",
    }
    parts += [str(named.get(step, step)) for step, value in found.items() if value and value != "none"]
    return ", ".join(parts) or "-"


def _defaults(found: dict[str, Any]) -> str:
    """Defaults of one option, method -> value: the commonest, then each other one with the methods that have it."""
    values = [str(value) for value in found.values()]
    usual = max(values, key=values.count)
    others = {value: [name for name, own in found.items() if str(own) == value] for value in values if value != usual}
    return "; ".join([usual, *(f"{value} ({', '.join(names)})" for value, names in others.items())])


def list_(json: o.Json = False) -> None:
    """List methods with their options, architectures, bit widths and zero-points."""
    from dataclasses import asdict

    from subnibble.arch import ARCHITECTURES
    from subnibble.methods import METHODS
    from subnibble.methods.choices import DISTILL_CHOICES, KV_CHOICES, OPTION_CHOICES
    from subnibble.presets import PRESETS
    from subnibble.tensor.activation_scheme import ACTIVATION_BITS
    from subnibble.tensor.scheme import BITS, GRIDS, SCALE_TYPES, ZERO_POINTS

    methods: list[dict[str, Any]] = [
        {"name": m.name, "summary": m.summary, "source": m.source, "options": asdict(m.options())}
        for m in METHODS.values()
    ]
    if json:
        print_json({
            "methods": methods,
            "presets": list(PRESETS),
            "architectures": sorted(ARCHITECTURES),
            "bits": list(BITS),
            "activation_bits": list(ACTIVATION_BITS),
            "kv_bits": list(BITS),
            "kv_options": KV_CHOICES,
            "distill_options": DISTILL_CHOICES,
            "grids": list(GRIDS),
            "zero_points": list(ZERO_POINTS),
            "scale_types": list(SCALE_TYPES),
        })  # fmt: skip
        return
    table(("method", "what it does", "source"), [(m["name"], m["summary"], m["source"]) for m in methods])
    options: dict[str, dict[str, Any]] = {}
    for method in methods:
        for key, value in method["options"].items():
            options.setdefault(key, {})[method["name"]] = value
    table(
        ("option (--option KEY=VALUE)", "choices", "default"),
        [(key, OPTION_CHOICES.get(key, "a number"), _defaults(found)) for key, found in options.items()],
    )
    table(("what", "choices"), [
        ("presets (--preset)", ", ".join(PRESETS)),
        ("architectures", ", ".join(sorted(ARCHITECTURES))),
        ("bits", ", ".join(map(str, BITS))),
        ("activation bits", ", ".join(map(str, (*ACTIVATION_BITS, 16)))),
        ("KV cache bits", ", ".join(map(str, (*BITS, 16)))),
        *[(f"--kv-option {key}", choices) for key, choices in KV_CHOICES.items()],
        *[(f"--distill-option {key}", choices) for key, choices in DISTILL_CHOICES.items()],
        ("group size", "any, ragged last group; -1 for the whole row"),
        ("grids", ", ".join(GRIDS)),
        ("zero-points", ", ".join(ZERO_POINTS)),
        ("scale types", ", ".join(SCALE_TYPES)),
    ])  # fmt: skip
