"""Distill an existing packed checkpoint (`distill/train.py`); can be repeated."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from subnibble.calibrate.text import absolute_text
from subnibble.checkpoint.edit import change_checkpoint, check_space, open_packed, read_report
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.source import Source
from subnibble.device import resolve_device, resolve_dtype
from subnibble.distill.train import DISTILLED, DISTILLING, Distilled, distill
from subnibble.pipeline.check import check_can_distill, given_distillation, with_chosen_start
from subnibble.pipeline.size import state_bytes
from subnibble.pipeline.windows import SAMPLED, planned_windows, written_windows
from subnibble.progress import Progress, as_progress
from subnibble.recipe import AnyRecipe, Recipe
from subnibble.report import DistillReport
from subnibble.resume import fingerprint
from subnibble.resume.interrupt import safe_point
from subnibble.resume.keeper import Keeper
from subnibble.resume.run import Run, checked_resume


def distill_checkpoint(
    folder: str | Path,
    original: str | Path | Source,
    recipe: AnyRecipe,
    *,
    resume: str = "auto",
    progress: Progress | None = None,
) -> DistillReport:
    """Tune a packed checkpoint as a whole towards the model that it was quantized from.

    The folder is replaced in one step. Its recipe.toml is not changed; report.json records the run under
    `distilled_later`.

    folder: the packed checkpoint.
    original: the unquantized model.
    recipe: calibration (None: "c4"), num_windows, window, sampling, seed, device, dtype, distill_steps and distill are
        used, the other settings are ignored. Windows that the model writes ("self") come from the original.
    resume: what to do with the unfinished work of an earlier run, as in `quantize`.
    progress: called after each step.
    """
    recipe, on_progress, resume = Recipe.of(recipe), as_progress(progress), checked_resume(resume)
    settings = given_distillation(recipe)
    packed, config = open_packed(folder)
    source = open_source(original, "original")
    check_can_distill(settings, recipe.window, source, packed, config)
    device = resolve_device(recipe.device)
    dtype = resolve_dtype(recipe.dtype, source.config.dtype, device)
    recipe = replace(recipe, calibration=absolute_text(recipe.calibration or "c4"))
    recipe = with_chosen_start(recipe, packed.load_tokenizer)
    windows = planned_windows(recipe, source, packed.load_tokenizer, config.prefix, dtype, device)
    facts = {
        "original": str(source.path), "calibration": recipe.calibration, "num_windows": recipe.num_windows,
        "window": recipe.window, "seed": recipe.seed, "device": str(device),
        "dtype": str(dtype).removeprefix("torch."), **({"sampling": recipe.sampling} if recipe.sampling else {}),
    }  # fmt: skip
    target = {
        "checkpoint": fingerprint.files(packed.files()), "original": fingerprint.files(source.files()),
        "settings": {**settings.to_dict(), **facts}, "calibration tokens": windows.fingerprint,
        "versions": fingerprint.versions(), "machine": fingerprint.machine(device),
    }  # fmt: skip
    with Run(packed.path, "distill", target, resume, of_final=["checkpoint"]) as run:
        check_space(packed, run, state_bytes(packed))
        values = run.journal.value(DISTILLED)
        if values is None:
            ids = windows.ids
            if windows.written is not None:
                ids, _ = written_windows(windows.written, run.journal, dict, on_progress)
            assert ids is not None
            distilled = distill(
                source, packed, config, settings, ids, dtype, device, recipe.seed,
                Keeper(run.journal, DISTILLING), on_progress,
            )  # fmt: skip
            values, tensors = distilled.state()
            run.journal.record({DISTILLED: values}, tensors, forget=[DISTILLING])
            safe_point()
        elif run.is_committed:
            run.finish()
            return DistillReport(**values["report"])
        else:
            distilled = Distilled.of_state(values, run.journal.tensors(DISTILLED))
        earlier = read_report(packed.path).get("distilled_later", [])
        written = run.journal.value(SAMPLED)
        entry = {**asdict(distilled.report), **settings.to_dict(), **facts}
        entry |= {} if written is None else {"sampled": written["report"]}
        change_checkpoint(packed, distilled.config, distilled.tensors, {"distilled_later": [*earlier, entry]}, run)
    return distilled.report
