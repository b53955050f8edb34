"""`subnibble inspect`, `subnibble prefix`, `subnibble distill` and `subnibble list`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subnibble.cli import options as o
from subnibble.cli.console import distilled, megabytes, print_json, progress, table
from subnibble.cli.streams import say

if TYPE_CHECKING:
    from subnibble.checkpoint.manifest import PackedConfig


def inspect(model: o.Model, json: o.Json = False) -> None:
    """Show what a checkpoint holds: sizes, bits, and the scheme of every packed module."""
    from subnibble.checkpoint.checksums import check_files
    from subnibble.checkpoint.manifest import packed_config_of
    from subnibble.checkpoint.opening import open_source
    from subnibble.checkpoint.size import measure, weight_files, weights_hash
    from subnibble.kernels import native

    source = open_source(model)
    packed = packed_config_of(source.config)
    content: dict[str, Any] = {
        "path": str(source.path),
        "model_type": source.config.model_type,
        "format": "subnibble" if packed else source.path.suffix.removeprefix(".") or "safetensors",
        **measure(source).to_dict(),
    }
    if packed is not None:
        check_files(weight_files(source.path), source.config.quantization_config)
        content["weights_sha256"] = weights_hash(source.path)
        content["modules"] = packed.to_dict()["modules"]
        content["cache"] = None if packed.cache is None else packed.cache.to_dict()
        content["prefix"] = None if packed.prefix is None else packed.prefix.to_dict()
        content["instruction_sets"] = list(native.instruction_sets())
        content["kernels"] = _kernels(packed)
    if json:
        print_json(content)
        return
    table(("what", "value"), [
        ("path", content["path"]),
        ("model type", content["model_type"]),
        ("format", content["format"]),
        ("parameters", f"{content['parameters'] / 1e6:.1f} M"),
        ("effective bits", f"{content['effective_bits']:.3f}"),
        ("activation bits", f"{content['activation_bits']:.3f}"),
        ("model bits", f"{content['model_bits']:.3f}"),
        ("KV cache", f"{content['cache_bytes']:.0f} bytes per token{_cache_name(packed)}"),
        ("on disk", megabytes(content["file_bytes"])),
        *([("system prompt", f"{len(content['prefix']['ids'])} tokens at 16 bits")] if content.get("prefix") else []),
        *([("weights SHA-256", content["weights_sha256"])] if packed else []),
    ])  # fmt: skip
    if packed is not None:
        rows = [
            (path, entry["kind"], str(entry.get("rows", "-")), _ranges(entry), _kernel_name(content["kernels"], path))
            for path, entry in content["modules"].items()
        ]
        table(("module", "kind", "rows", "columns x scheme", "runs on (CPU)"), rows)


def prefix(
    out: Annotated[Path, typer.Argument(help="A folder that `subnibble quantize` wrote.", metavar="OUT")],
    system_prompt: Annotated[
        str, typer.Option(help="As in `subnibble quantize`, but computed by the packed model.", metavar=o.PROMPTS)
    ],
    device: o.Device = None,
    dtype: o.Dtype = None,
) -> None:
    """Add a system prompt to the checkpoint in OUT, or replace it; its keys and values stay at 16 bits."""
    from subnibble.generate.prefix import add_prefix

    tokens = add_prefix(out, system_prompt, dtype=dtype or "float32", device=device or "auto").ids
    say(f"{out}: system prompt of {len(tokens)} tokens at 16 bits")


def distill(
    out: Annotated[Path, typer.Argument(help="A folder that `subnibble quantize` wrote.", metavar="OUT")],
    original: Annotated[
        str, typer.Option(help="Model that OUT was quantized from: folder, hub id or .gguf file.", metavar="MODEL")
    ],
    steps: Annotated[int, typer.Option(help="Number of tuning steps.", min=1)],
    distill_option: o.DistillOptions = None,
    calibration: o.Calibration = None,
    sampling_option: o.SamplingOptions = None,
    num_windows: o.NumWindows = None,
    window: o.Window = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed for choosing or writing windows, and for their order. Default 0.")
    ] = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    resume: o.Resume = "auto",
) -> None:
    """Tune the checkpoint in OUT as a whole towards the original's predictions; its codes do not change."""
    target = o.build_recipe(
        None, None, None, distill_option, sampling_option, distill_steps=steps, calibration=calibration,
        num_windows=num_windows, window=window, seed=seed, device=device, dtype=dtype,
    )  # fmt: skip
    from subnibble.pipeline.distill_checkpoint import distill_checkpoint

    with progress("distill") as on_progress:
        report = distill_checkpoint(out, original, target, resume=resume, progress=on_progress)
    say(f"{out}: {distilled(report)}")


def _cache_name(packed: PackedConfig | None) -> str:
    return "" if packed is None or packed.cache is None else f", {packed.cache.name}"


def _kernels(packed: PackedConfig) -> dict[str, Any]:
    """What multiplies each packed matrix on the CPU, by path: kernel and reason."""
    from dataclasses import asdict

    from subnibble.checkpoint.module_specs import PackedEmbeddingSpec, PackedLinearSpec, TiedHeadSpec
    from subnibble.runtime.native import choice

    kernels = {}
    for path, spec in packed.modules.items():
        table = packed.modules[spec.table] if isinstance(spec, TiedHeadSpec) else spec
        if isinstance(table, PackedLinearSpec | PackedEmbeddingSpec):
            kernels[path] = asdict(choice(columns=table.layout.num_columns))
    return kernels


def _kernel_name(kernels: dict[str, Any], path: str) -> str:
    chosen = kernels.get(path)
    return "-" if chosen is None else f"{chosen['kernel']}: {chosen['reason']}"


def _ranges(entry: dict[str, Any]) -> str:
    parts = [f"{columns} x {scheme}" for columns, scheme in entry.get("ranges", [])]
    parts += [f"salient {columns} x {scheme}" for columns, scheme in entry.get("salient") or []]
    if entry.get("low_rank"):
        parts.append(f"low rank {entry['low_rank']['rank']} x {entry['low_rank']['down'][0][1]}")
    steps = ("input", "gather", "column_scale", "activation", "residual")
    values = {step: entry.get(step) for step in steps} | {"hadamard": bool(entry.get("hadamard"))}
    labels = {
        "input": f"shares the input of {values['input']}",
        "activation": values["activation"],
        "residual": f"residual on {values['residual']}",
    }
    parts += [str(labels.get(step, step)) for step, value in values.items() if value and value != "none"]
    return ", ".join(parts) or "-"


def _defaults(default_of: dict[str, Any]) -> str:
    """The defaults of one option: the most common one, then each other one with the methods that have it.

    default_of: method -> default of the option.
    """
    values = [str(value) for value in default_of.values()]
    common = max(values, key=values.count)
    others = {
        value: [name for name, default in default_of.items() if str(default) == value]
        for value in values
        if value != common
    }
    return "; ".join([common, *(f"{value} ({', '.join(names)})" for value, names in others.items())])


def _list_runs(json: bool) -> None:
    from dataclasses import asdict

    from subnibble.resume.runs import unfinished_runs

    unfinished = unfinished_runs()
    if json:
        print_json([asdict(run) | {"out": str(run.out), "folder": str(run.folder)} for run in unfinished])
        return
    if not unfinished:
        say("no unfinished runs")
        return
    columns = ("command", "writes", "begun", "last finished step", "size", "folder (remove it to discard the run)")
    table(columns, [
        (run.command, str(run.out), _begun(run.started), run.last, megabytes(run.bytes), str(run.folder))
        for run in unfinished
    ])  # fmt: skip


def _begun(started: float) -> str:
    return datetime.fromtimestamp(started).strftime("%Y-%m-%d %H:%M") if started else "?"


def list_(
    method: Annotated[
        str | None, typer.Argument(help="Show what this method's options mean.", metavar="METHOD")
    ] = None,
    runs: Annotated[bool, typer.Option("--runs", help="List unfinished runs instead.")] = False,
    json: o.Json = False,
) -> None:
    """List methods and their options, presets, architectures, bit widths, grids and zero-points.

    With METHOD, show its options alone: default, choices and meaning of each.
    With --runs, show unfinished runs of quantize, distill, compare and evaluate, which the same commands continue.
    """
    if runs:
        _list_runs(json)
        return
    if method is not None:
        _list_options(method, json)
        return
    from dataclasses import asdict

    from subnibble.arch import ARCHITECTURES
    from subnibble.methods import METHODS
    from subnibble.methods.choices import DISTILL_CHOICES, KV_CHOICES, OPTION_CHOICES, SAMPLING_CHOICES
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
            "sampling_options": SAMPLING_CHOICES,
            "grids": list(GRIDS),
            "zero_points": list(ZERO_POINTS),
            "scale_types": list(SCALE_TYPES),
        })  # fmt: skip
        return
    table(("method", "what it does", "source"), [(m["name"], m["summary"], m["source"]) for m in methods])
    options: dict[str, dict[str, Any]] = {}
    for m in methods:
        for key, value in m["options"].items():
            options.setdefault(key, {})[m["name"]] = value
    table(
        ("option (--option KEY=VALUE)", "choices", "default"),
        [(key, OPTION_CHOICES.get(key, "a number"), _defaults(default_of)) for key, default_of in options.items()],
    )
    table(("what", "choices"), [
        ("presets (--preset)", ", ".join(PRESETS)),
        ("architectures", ", ".join(sorted(ARCHITECTURES))),
        ("bits", ", ".join(map(str, BITS))),
        ("activation bits", ", ".join(map(str, (*ACTIVATION_BITS, 16)))),
        ("KV cache bits", ", ".join(map(str, (*BITS, 16)))),
        *[(f"--kv-option {key}", choices) for key, choices in KV_CHOICES.items()],
        *[(f"--distill-option {key}", choices) for key, choices in DISTILL_CHOICES.items()],
        *[(f"--sampling-option {key}", choices) for key, choices in SAMPLING_CHOICES.items()],
        ("group size", "any; the last group may be shorter; -1: the whole row"),
        ("grids", ", ".join(GRIDS)),
        ("zero-points", ", ".join(ZERO_POINTS)),
        ("scale types", ", ".join(SCALE_TYPES)),
    ])  # fmt: skip


def _list_options(name: str, json: bool) -> None:
    """Print one method's options: default, choices and meaning."""
    from dataclasses import asdict

    from subnibble.methods import find_method
    from subnibble.methods.choices import OPTION_CHOICES
    from subnibble.methods.describe import meanings

    method = find_method(name)
    defaults = asdict(method.options())
    rows = [(key, OPTION_CHOICES.get(key, "a number"), defaults[key], text) for key, text in meanings(method).items()]
    if json:
        print_json({
            "name": method.name,
            "summary": method.summary,
            "source": method.source,
            "options": {
                key: {"choices": choices, "default": default, "meaning": text} for key, choices, default, text in rows
            },
        })  # fmt: skip
        return
    say(f"{method.name}: {method.summary} ({method.source})")
    if not rows:
        say("no options")
        return
    # Not a table: a narrow terminal would cut the meanings.
    for key, choices, default, text in rows:
        say(f"--option {key}={default} ({choices})\n    {text}")
