"""The options that make a recipe, declared once for every command that takes them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from subnibble.cli import options as o

# Parameter -> type of each option, in the order of --help.
RECIPE_OPTIONS: dict[str, Any] = {
    "method": o.MethodName,
    "bits": o.Bits,
    "group_size": o.GroupSize,
    "grid": o.Grid,
    "zero_point": o.ZeroPoint,
    "embedding_bits": o.EmbeddingBits,
    "activation_bits": o.ActivationBits,
    "activation_group_size": o.ActivationGroupSize,
    "kv_bits": o.KvBits,
    "kv_option": o.KvOptions,
    "system_prompt": o.SystemPrompt,
    "calibration": o.Calibration,
    "sampling_option": o.SamplingOptions,
    "num_windows": o.NumWindows,
    "window": o.Window,
    "distill_steps": o.DistillSteps,
    "distill_option": o.DistillOptions,
    "seed": o.Seed,
    "recipe": o.RecipeFile,
    "preset": o.Preset,
    "option": o.MethodOptions,
    "effort": o.Effort,
    "device": o.Device,
    "dtype": o.Dtype,
}


def takes_recipe_options(**changes: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a recipe; their values arrive in its argument `settings`, None if not on the line.

    changes: other types for some options; None leaves an option out.
    """
    chosen = {name: kind for name, kind in {**RECIPE_OPTIONS, **changes}.items() if kind is not None}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        declared = inspect.signature(command, eval_str=True).parameters
        added = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=kind)
            for name, kind in chosen.items()
        ]
        first = [p for p in declared.values() if p.name != "settings" and p.default is inspect.Parameter.empty]
        last = [p for p in declared.values() if p.name != "settings" and p.default is not inspect.Parameter.empty]
        parameters = [*first, *added, *last]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            command(settings={name: values.pop(name) for name in chosen}, **values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate
