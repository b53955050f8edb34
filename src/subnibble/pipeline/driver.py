"""The driver: stream a checkpoint through a method, one block at a time, into a packed checkpoint.

    may this recipe run on this model   `check.py`, before weights are read
    survey the full-precision model     for its sink tokens, one channel order, if they are asked for
    rotate                              norms fused, the residual stream in another basis, if the method asks
    embed text and system prompt        the prompt's keys and values are the full-precision model's, block by block
    for block in checkpoint:            one block resident
        prepare                         the method's transforms: function unchanged
        tune                            what is learned before anything is rounded, if the method asks
        for site in block.sites:        in data-flow order (`round.py`)
            correct the site's norm     mean shift of what is quantized by now
            observe the site's tensor   upstream is quantized by now
            round the site's readers
        advance the activations
        store                           column scales absorbed, codes unchanged
        write the block's shard
    correct the final norm; pack embedding and head
    tune the packed model as a whole    if the recipe asks

The order lives here and in `round.py` alone; methods say what happens at each step. A block and what comes of it are
frozen values, `Prepared`, `Observed`, `RoundedBlock`, `StoredBlock`; the next block needs the streams alone, and the
end what is left of each `StoredBlock`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from subnibble.calibrate.windows import calibration_windows
from subnibble.checkpoint.manifest import PackedConfig
from subnibble.checkpoint.source import Source
from subnibble.checkpoint.writer import CheckpointWriter, check_output
from subnibble.given import given_path
from subnibble.model.skeleton import Block
from subnibble.model.verify import check_written
from subnibble.pipeline.block_tuning import Tuner, round_tuned
from subnibble.pipeline.check import check_apart, check_disk, resolve
from subnibble.pipeline.finish import tune_whole, write_config, write_report
from subnibble.pipeline.outer_layers import AfterBlocks, Part, embedding
from subnibble.pipeline.passage import Passage
from subnibble.pipeline.plan import Resolved
from subnibble.pipeline.prepare import prepare
from subnibble.pipeline.round import round_block, round_stack
from subnibble.pipeline.store import StoredBlock, store
from subnibble.pipeline.streams import Streams
from subnibble.pipeline.survey import Survey, start, survey
from subnibble.progress import Progress, given_progress
from subnibble.recipe import AnyRecipe, Recipe
from subnibble.report import Report
from subnibble.report.clock import Clock
from subnibble.transforms.invariance import check_sites


def quantize(
    model: str | Path | Source,
    out: str | Path,
    recipe: AnyRecipe,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize `model` (folder, hub id or .gguf file) into the folder `out` as `recipe` says: a `Recipe`, a table
    of its keys or a TOML file.

    Raises a `SubnibbleError` that says what to do, before any weight is read where that can be known; `out` appears
    only when it is complete.
    """
    told, target = given_progress(progress), Recipe.of(recipe)
    final = given_path(out, "out", "the folder to write")
    check_output(final, overwrite)
    clock = Clock()
    resolved = resolve(model, target)
    check_apart(final, resolved.skeleton.source.path, resolved.recipe)
    windows = _windows(resolved, clock)
    with clock.step("check sites"):
        resolved.skeleton.check_tied_head()
        check_sites(resolved.skeleton)
    with CheckpointWriter(final, resolved.skeleton.num_blocks + 1, overwrite) as writer:
        check_disk(resolved, writer.folder, writer.final)
        report = _run(resolved, windows, writer, clock, told)
        writer.commit()
    return report


def _run(
    resolved: Resolved, windows: Tensor | None, writer: CheckpointWriter, clock: Clock, progress: Progress
) -> Report:
    """Quantize and write everything but the commit."""
    skeleton = resolved.skeleton
    steps_a_block = len(skeleton.arch.sites) + 1
    total = skeleton.num_blocks * steps_a_block + 2

    def on_site(index: int, number: int, doing: str) -> None:
        progress(1 + index * steps_a_block + number, total, doing)

    with clock.step("write"):
        skeleton.source.copy_side_files(writer.folder)
    found, streams, (tensors, modules) = _begin(resolved, windows, clock)
    progress(1, total, "embedding")
    tuner = Tuner.of(
        resolved, found.prefix, clock,
        lambda index, loss: on_site(index, 0, f"block {index} tuned to a held-out loss of {loss:.4f}"),
    )  # fmt: skip
    blocks: list[StoredBlock] = []
    for index in range(skeleton.num_blocks):
        block = _load(index, resolved, found, clock)
        stored = _quantize_block(block, resolved, streams, tuner, clock, partial(on_site, index))
        with clock.step("write"):
            writer.write_shard(stored.tensors)
        blocks.append(stored.without_tensors())
        skeleton.release(block.path)
        # Before the next block comes, which is as large as they are.
        del block, stored
        on_site(index + 1, 0, f"block {index}")
    after = AfterBlocks(skeleton, found.edit, clock).stored(streams, resolved.recipe.embedding_scheme)
    for specs in (*(block.specs for block in blocks), after[1]):
        modules |= specs
    packed = PackedConfig(modules, resolved.plan.cache, found.prefix)
    with clock.step("write"):
        writer.write_shard(tensors | after[0])
        write_config(writer, resolved, packed)
    progress(total, total, "written")
    distilled = tune_whole(writer, resolved, found, packed, clock, progress)
    with clock.step("verify"):
        check_written(writer.folder)
    return write_report(writer, resolved, found, blocks, distilled, clock)


def _windows(resolved: Resolved, clock: Clock) -> Tensor | None:
    """Calibration windows (n, t) of ids; None if there is no calibration."""
    recipe, source = resolved.recipe, resolved.skeleton.source
    if recipe.calibration is None:
        return None
    with clock.step("read text"):
        return calibration_windows(
            recipe.calibration, source.load_tokenizer, recipe.num_windows, recipe.window, recipe.seed,
            source.config.vocab_size,
        )  # fmt: skip


def _begin(resolved: Resolved, windows: Tensor | None, clock: Clock) -> tuple[Survey, Streams, Part]:
    """Survey the model and embed the windows. The last is the embedding as it is stored."""
    skeleton = resolved.skeleton
    with clock.step("read"):
        table = skeleton.source.load(f"{skeleton.arch.embedding}.weight").to(skeleton.device)
    found = survey(resolved, windows, table, clock)
    if found.edit is not None:
        table = found.edit.embedding(table)
    with clock.step("embedding"):
        stored, as_it_runs = embedding(skeleton, table, resolved.recipe.embedding_scheme)
        return found, start(resolved, found, table, as_it_runs), stored


def _load(index: int, resolved: Resolved, found: Survey, clock: Clock) -> Block:
    """A float32 block, rotated."""
    with clock.step("read"):
        block = resolved.skeleton.load_block(index)
        if found.edit is not None:
            found.edit.edit_block_(block)
        if resolved.values is not None:
            resolved.values.edit_block_(block)
    return block


def _quantize_block(
    block: Block,
    resolved: Resolved,
    streams: Streams,
    tuner: Tuner | None,
    clock: Clock,
    on_site: Callable[[int, str], None],
) -> StoredBlock:
    """What is stored of a loaded float32 block, which is used up; streams are moved behind it."""
    prepared = prepare(block, resolved, streams, clock)
    if tuner is not None and tuner.tunes(block):
        rounded, tuned = round_tuned(prepared, resolved, streams, tuner, on_site)
        return store(rounded, resolved, tuned)
    passage = Passage.start(prepared, resolved, streams, clock)
    rounded = round_block(passage, resolved, round_stack, on_site)
    passage.advance()
    return store(rounded, resolved)
