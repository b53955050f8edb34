"""Distill an existing packed checkpoint (`distill/train.py`); can be repeated."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from subnibble.calibrate.text import absolute_text
from subnibble.calibrate.windows import calibration_windows
from subnibble.checkpoint.edit import change_checkpoint, open_packed, read_report
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.source import Source
from subnibble.device import resolve_device, resolve_dtype
from subnibble.distill.train import distill
from subnibble.pipeline.check import check_can_distill, given_distillation
from subnibble.progress import Progress, given_progress
from subnibble.recipe import AnyRecipe, Recipe
from subnibble.report import DistillReport


def distill_checkpoint(
    folder: str | Path, original: str | Path | Source, recipe: AnyRecipe, *, progress: Progress | None = None
) -> DistillReport:
    """Tune a packed checkpoint as a whole towards the model that it was quantized from.

    The folder is replaced in one step. Its recipe.toml is not changed; report.json records the run under
    `distilled_later`.

    folder: the packed checkpoint.
    original: the unquantized model.
    recipe: calibration (None: "c4"), num_windows, window, seed, device, dtype, distill_steps and distill are used, the
        other settings are ignored.
    progress: called after each step.
    """
    recipe, on_progress = Recipe.of(recipe), given_progress(progress)
    settings = given_distillation(recipe)
    packed, config = open_packed(folder)
    source = open_source(original, "original")
    check_can_distill(settings, recipe.window, source, packed, config)
    device = resolve_device(recipe.device)
    dtype = resolve_dtype(recipe.dtype, source.config.dtype, device)
    calibration = absolute_text(recipe.calibration or "c4")
    windows = calibration_windows(
        calibration, packed.load_tokenizer, recipe.num_windows, recipe.window, recipe.seed, source.config.vocab_size
    )
    earlier = read_report(packed.path).get("distilled_later", [])
    distilled = distill(source, packed, config, settings, windows, dtype, device, recipe.seed, on_progress)
    entry = {
        **asdict(distilled.report), **settings.to_dict(), "original": str(source.path), "calibration": calibration,
        "num_windows": recipe.num_windows, "window": recipe.window, "seed": recipe.seed, "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    change_checkpoint(packed, distilled.config, distilled.tensors, {"distilled_later": [*earlier, entry]})
    return distilled.report
