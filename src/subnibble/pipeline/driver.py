"""The driver: stream a checkpoint through a method, one block at a time, into a packed checkpoint.

    check the recipe on the model       `check.py`, before weights are read
    open the run                        lock OUT, continue from the journal of an earlier run (`journal.py`)
    write the calibration windows       the model writes them itself, if the recipe asks (`windows.py`)
    survey the full-precision model     find sink tokens and a channel order of the residual stream, if needed
    rotate                              fuse norm gains into linears, rotate the residual stream, if the method asks
    embed text and system prompt        the prompt's keys and values come from the full-precision model
    for block in checkpoint:            one block in memory at a time
        prepare                         apply the method's transforms, which do not change the block's function
        tune                            train the block's parameters before rounding, if the method asks
        for site in block.sites:        in data-flow order (`round.py`)
            correct the site's norm     against the mean shift of the linears quantized so far, if the method asks
            observe the site's tensor   with everything before it in the model quantized
            round the site's readers
        advance the activations
        store                           absorb column scales; codes do not change
        write the block's shard, and record block and streams in the journal
    correct the final norm; pack embedding and head
    tune the packed model as a whole    distillation, if the recipe asks

A site is a tensor inside a block; its readers are the linears that multiply it, its writers the modules that produce it
(`arch/site.py`). The streams are the hidden states of all windows between two blocks (`streams.py`).

Only this file and `round.py` define the order; a method defines what each step does. The stages of a block are frozen
values: `Prepared`, `Observed`, `RoundedBlock`, `StoredBlock`. The next block needs only the streams; config and report
need the specs and reports of each `StoredBlock`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from subnibble.arguments import as_path
from subnibble.checkpoint.edit import read_report
from subnibble.checkpoint.manifest import PackedConfig
from subnibble.checkpoint.module_specs import Spec
from subnibble.checkpoint.source import Source
from subnibble.checkpoint.writer import CheckpointWriter, check_output
from subnibble.model.skeleton import Block
from subnibble.model.verify import check_written
from subnibble.pipeline.block_tuning import Tuner, round_tuned
from subnibble.pipeline.check import check_apart, check_disk, resolve
from subnibble.pipeline.finish import tune_whole, write_config, write_report
from subnibble.pipeline.journal import QuantizationJournal, fingerprint_of
from subnibble.pipeline.outer_layers import AfterBlocks, TensorsAndSpecs, embedding
from subnibble.pipeline.passage import Passage
from subnibble.pipeline.plan import Resolved
from subnibble.pipeline.prepare import prepare
from subnibble.pipeline.round import round_block, round_stack
from subnibble.pipeline.store import StoredBlock, store
from subnibble.pipeline.streams import Streams
from subnibble.pipeline.survey import Survey, start, survey
from subnibble.pipeline.windows import Windows, planned_windows
from subnibble.progress import Progress, as_progress
from subnibble.recipe import AnyRecipe, Recipe
from subnibble.report import Report
from subnibble.report.clock import Clock
from subnibble.resume.interrupt import safe_point
from subnibble.resume.run import Run, checked_resume
from subnibble.transforms.invariance import check_sites


def quantize(
    model: str | Path | Source,
    out: str | Path,
    recipe: AnyRecipe,
    *,
    overwrite: bool = False,
    resume: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Quantize a model into a packed checkpoint and return the report.

    model: folder, hub id, .gguf file, or an open source.
    out: folder to write; it appears only when it is complete.
    recipe: a `Recipe`, a table of its keys, or the path of a TOML file.
    overwrite: whether an existing checkpoint at `out` may be replaced.
    resume: what to do with the unfinished work of an earlier run on `out`. "auto": continue it if model, text, recipe,
        versions and machine are the same, else raise `BadJournal`. "never": discard it. "must": raise `BadJournal` if
        there is none.
    progress: called after each step with (done, total, description), or None.

    Raises a `SubnibbleError` that says what to do, before any weight is read if possible.
    """
    on_progress, parsed, resume = as_progress(progress), Recipe.of(recipe), checked_resume(resume)
    final = as_path(out, "out", "the folder to write")
    check_output(final, overwrite)
    clock = Clock()
    resolved = resolve(model, parsed)
    check_apart(final, resolved.skeleton.source.path, (resolved.recipe.calibration, resolved.recipe.system_prompt))
    with clock.step("read text"):
        windows = _planned(resolved)
    with clock.step("check sites"):
        resolved.skeleton.check_tied_head()
        check_sites(resolved.skeleton)
    with Run(final, "quantize", fingerprint_of(resolved, windows), resume) as run:
        if run.is_committed:
            run.finish()
            return Report.from_dict(read_report(run.final))
        with CheckpointWriter(final, resolved.skeleton.num_blocks + 1, overwrite, run) as writer:
            check_disk(resolved, run)
            report = _run(resolved, windows, writer, run, clock, on_progress)
            writer.commit()
    return report


def _run(
    resolved: Resolved, planned: Windows, writer: CheckpointWriter, run: Run, clock: Clock, progress: Progress
) -> Report:
    """Quantize the model and write all files into the writer's temporary folder; the caller commits."""
    skeleton = resolved.skeleton
    journal = QuantizationJournal(run, resolved, writer, clock)
    with clock.step("write"):
        skeleton.source.copy_side_files(writer.folder)
    windows, sampled = journal.windows(planned, progress)
    finished = journal.finished_layers(windows)
    surveyed, modules = finished or _quantize_layers(resolved, windows, journal, clock, progress)
    packed = PackedConfig(modules, resolved.plan.cache, surveyed.prefix)
    with clock.step("write"):
        write_config(writer, resolved, packed)
    distilled = tune_whole(writer, resolved, surveyed, packed, journal, clock, progress)
    with clock.step("verify"):
        check_written(writer.folder)
    return write_report(writer, resolved, surveyed, journal, distilled, sampled, clock)


def _quantize_layers(
    resolved: Resolved, windows: Tensor | None, journal: QuantizationJournal, clock: Clock, progress: Progress
) -> tuple[Survey, dict[str, Spec]]:
    """Quantize and write all layers; return the survey and the specs of all modules by path."""
    skeleton = resolved.skeleton
    steps_per_block = len(skeleton.arch.sites) + 1
    total = skeleton.num_blocks * steps_per_block + 2

    def on_site(index: int, number: int, doing: str) -> None:
        progress(1 + index * steps_per_block + number, total, doing)

    surveyed, streams, (tensors, modules) = _begin(resolved, windows, journal, clock)
    first = len(journal.blocks)
    progress(1 + first * steps_per_block, total, f"resumed after block {first - 1}" if first else "embedding")
    tuner = Tuner.of(
        resolved, surveyed.prefix, clock,
        lambda index, loss: on_site(index, 0, f"block {index} tuned to a held-out loss of {loss:.4f}"),
    )  # fmt: skip
    # From here on, a stop that waits for the end of a block saves work.
    safe_point()
    for index in range(first, skeleton.num_blocks):
        block = _load(index, resolved, surveyed, clock)
        stored = _quantize_block(block, resolved, streams, tuner, clock, partial(on_site, index))
        skeleton.release(block.path)
        journal.add_block(stored, streams)
        # Free this memory before the next block is loaded: it is as large.
        del block, stored
        on_site(index + 1, 0, f"block {index}")
    after = AfterBlocks(skeleton, surveyed.edit, clock).stored(streams, resolved.recipe.embedding_scheme)
    for specs in (*(block.specs for block in journal.blocks), after[1]):
        modules |= specs
    journal.add_final_layers(tensors | after[0], modules)
    progress(total, total, "written")
    return surveyed, modules


def _planned(resolved: Resolved) -> Windows:
    """The calibration windows, as far as they are known before the run begins."""
    skeleton = resolved.skeleton
    source = skeleton.source
    return planned_windows(
        resolved.recipe, source, source.load_tokenizer, resolved.prefix, skeleton.dtype, skeleton.device
    )


def _begin(
    resolved: Resolved, windows: Tensor | None, journal: QuantizationJournal, clock: Clock
) -> tuple[Survey, Streams, TensorsAndSpecs]:
    """Survey the model and embed the windows; return the survey, the streams and the embedding's tensors and specs.

    The streams are those after the blocks in the journal.
    """
    skeleton = resolved.skeleton
    with clock.step("read"):
        table = skeleton.source.load(f"{skeleton.arch.embedding}.weight").to(skeleton.device)
    surveyed = journal.survey(windows)
    if surveyed is None:
        surveyed = survey(resolved, windows, table, clock)
        journal.record_survey(surveyed)
    if surveyed.edit is not None:
        table = surveyed.edit.embedding(table)
    with clock.step("embedding"):
        stored, running_table = embedding(skeleton, table, resolved.recipe.embedding_scheme)
        streams = start(resolved, surveyed, table, running_table)
    with clock.step("journal"):
        journal.restore_(streams)
    return surveyed, streams, stored


def _load(index: int, resolved: Resolved, surveyed: Survey, clock: Clock) -> Block:
    """Load a block in float32, and rotate or reorder its channels as the method asks."""
    with clock.step("read"):
        block = resolved.skeleton.load_block(index)
        if surveyed.edit is not None:
            surveyed.edit.edit_block_(block)
        if resolved.value_rotation is not None:
            resolved.value_rotation.edit_block_(block)
    return block


def _quantize_block(
    block: Block,
    resolved: Resolved,
    streams: Streams,
    tuner: Tuner | None,
    clock: Clock,
    on_site: Callable[[int, str], None],
) -> StoredBlock:
    """Quantize a loaded float32 block, and advance the streams past it. Edits the block in place: do not reuse it.

    tuner: None if the method does not tune.
    on_site: called with the number of finished sites and the name of the last one.
    """
    prepared = prepare(block, resolved, streams, clock)
    if tuner is not None and tuner.tunes(block):
        rounded, tuned = round_tuned(prepared, resolved, streams, tuner, on_site)
        return store(rounded, resolved, tuned)
    passage = Passage.start(prepared, resolved, streams, clock)
    rounded = round_block(passage, resolved, round_stack, on_site)
    passage.advance()
    return store(rounded, resolved)
