"""The driver: stream a checkpoint through a method, one block at a time, into a packed checkpoint.

    survey the full-precision model     for its sink tokens, one channel order, if they are asked for
    rotate                              norms fused, the residual stream in another basis, if the method asks
    embed text and system prompt        the prompt's keys and values are the full-precision model's, block by block
    for block in checkpoint:            one block resident
        method's transforms             function unchanged
        tune the block                  what is learned before anything is rounded, if the method asks
        for site in block.sites:        in data-flow order
            correct the site's norm     mean shift of what is quantized by now
            observe the site's tensor   upstream is quantized by now
            round the site's readers
        absorb column scales            codes unchanged
        write the block's shard; advance the activations
    correct the final norm; pack embedding and head
    tune the packed model as a whole    if the recipe asks

The order lives here and in `block_run.py` alone; methods say what happens at each step.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from subnibble.calibrate.prefix import PrefixStream
from subnibble.calibrate.prompt import AUTO, sink_prefix
from subnibble.calibrate.sinks import sink_tokens
from subnibble.calibrate.stream import BlockStream
from subnibble.calibrate.survey import full_precision_blocks
from subnibble.calibrate.tokens import check_vocabulary
from subnibble.calibrate.windows import calibration_windows, check_positions
from subnibble.checkpoint.checksums import CHECKSUMS, weights_checksum
from subnibble.checkpoint.manifest import PackedConfig
from subnibble.checkpoint.module_specs import PackedEmbeddingSpec, Spec, TiedHeadSpec
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.size import measure
from subnibble.checkpoint.source import Source
from subnibble.checkpoint.writer import CheckpointWriter, check_output
from subnibble.distill.train import distill
from subnibble.errors import OutputError
from subnibble.given import given_path
from subnibble.methods.method import Steps
from subnibble.model.skeleton import Block, Skeleton
from subnibble.model.transformers_api.blocks import BlockCall
from subnibble.model.transformers_api.marking import marked
from subnibble.model.verify import check_written
from subnibble.paths import expanded, is_file
from subnibble.pipeline.block_run import BlockRun, better
from subnibble.pipeline.block_tuning import Tuner
from subnibble.pipeline.final_layers import AfterBlocks
from subnibble.pipeline.plan import Plan
from subnibble.pipeline.prepared import prepare
from subnibble.pipeline.resolve import resolve
from subnibble.pipeline.size import packed_bytes, table_bytes
from subnibble.pipeline.store import store
from subnibble.pipeline.streams import Streams
from subnibble.progress import Progress, given_progress
from subnibble.recipe import AnyRecipe, Recipe
from subnibble.report import BlockReport, DistillReport, LinearReport, Report
from subnibble.report.clock import Clock, peak_memory
from subnibble.rounding.table import as_stored, pack_table
from subnibble.runtime import ops
from subnibble.tensor.cache_scheme import PrefixIds
from subnibble.transforms.invariance import check_sites
from subnibble.transforms.residual_order import residual_order
from subnibble.transforms.rotate import ResidualEdit
from subnibble.transforms.rotate_values import ValueRotation
from subnibble.tuning.tuning import EFFORTS
from subnibble.version import __version__

# Tokens forwarded together: enough to keep the matrix products large.
_TOKENS_PER_BATCH = 4096
# As many as PrefixQuant looks at.
_WINDOWS_FOR_SINKS = 64


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
    told, wanted = given_progress(progress), Recipe.of(recipe)
    final = given_path(out, "out", "the folder to write")
    check_output(final, overwrite)
    run = _Run.prepare(model, final, wanted)
    with CheckpointWriter(final, run.skeleton.num_blocks + 1, overwrite) as writer:
        _check_disk(run, writer)
        report = run.execute(writer, told)
        writer.commit()
    return report


@dataclass
class _Run:
    """One quantization: what was resolved, and what has been made so far."""

    skeleton: Skeleton
    recipe: Recipe
    steps: Steps
    plan: Plan
    edit: ResidualEdit | None
    values: ValueRotation | None
    prefix: PrefixIds | None
    windows: Tensor | None
    clock: Clock
    modules: dict[str, Spec] = field(default_factory=dict)
    linears: list[LinearReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)

    @classmethod
    def prepare(cls, model: str | Path | Source, out: Path, recipe: Recipe) -> _Run:
        """Check everything that can be checked before weights are read, and read the calibration windows."""
        clock = Clock()
        found = resolve(model, recipe)
        recipe, source, windows = found.recipe, found.skeleton.source, None
        _check_apart(out, source.path, recipe)
        if recipe.calibration is not None:
            with clock.step("read text"):
                windows = calibration_windows(
                    recipe.calibration,
                    source.load_tokenizer,
                    recipe.num_windows,
                    recipe.window,
                    recipe.seed,
                    source.config.vocab_size,
                )
        with clock.step("check sites"):
            found.skeleton.check_tied_head()
            check_sites(found.skeleton)
        return cls(
            found.skeleton, recipe, found.steps, found.plan, found.rotation, found.values, found.prefix, windows, clock
        )  # fmt: skip

    def execute(self, writer: CheckpointWriter, progress: Progress) -> Report:
        """Quantize and write everything but the commit."""
        skeleton, clock = self.skeleton, self.clock
        sites = len(skeleton.arch.sites)
        total = skeleton.num_blocks * (sites + 1) + 2
        with clock.step("write"):
            skeleton.source.copy_side_files(writer.folder)
        streams, outer = self._embed(self._surveyed_table())
        progress(1, total, "embedding")
        unquantized_tail: list[Tensor] = []
        tuner = self._tuner(lambda index, loss: progress(1 + index * (sites + 1), total, _losing(index, loss)))
        for index in range(skeleton.num_blocks):
            done = 1 + index * (sites + 1)
            with clock.step("read"):
                block = skeleton.load_block(index)
                if self.edit is not None:
                    self.edit.edit_block_(block)
                if self.values is not None:
                    self.values.edit_block_(block)
            run = self._round(block, streams, tuner, partial(_on_site, progress, done, total))
            unquantized_tail = run.unquantized_tail
            run.advance()
            stored = store(run.rounded())
            with clock.step("write"):
                writer.write_shard({name: self._as_stored(name, tensor) for name, tensor in stored.tensors.items()})
            self.modules |= stored.specs
            self.linears += stored.linears
            self.blocks += [] if run.tuned is None else [run.tuned]
            skeleton.release(block.path)
            # Before the next block comes: what was tuned, and streams, are as large as it.
            del run, block, stored
            progress(done + sites + 1, total, f"block {index}")
        outer |= self._after_blocks(unquantized_tail, streams.hidden)
        with clock.step("write"):
            writer.write_shard(outer)
            self._write_config(writer)
        progress(total, total, "written")
        distilled = self._distill(writer, progress)
        with clock.step("verify"):
            check_written(writer.folder)
        return self._report(writer, distilled)

    def _round(
        self, block: Block, streams: Streams, tuner: Tuner | None, on_site: Callable[[int, str], None]
    ) -> BlockRun:
        """Round a loaded block. Where it is tuned, the method's own block without tuning is a candidate, too, and the
        one that has the smaller held-out loss as it runs is given.
        """
        prepared = prepare(block, self.steps, self.plan, self.clock, streams, self.skeleton.dtype)
        own = None if tuner is None else prepared.twin()
        run = BlockRun.begin(prepared, self.steps, self.plan, self.clock, streams, self.skeleton.dtype, tuner)
        self._round_sites(run, on_site)
        if own is None or run.tuning is None:
            return run
        base = BlockRun.begin(own, self.steps, self.plan, self.clock, streams, self.skeleton.dtype)
        self._round_sites(base, lambda number, site: None)
        return better(run, base)

    def _round_sites(self, run: BlockRun, on_site: Callable[[int, str], None]) -> None:
        """Round the readers of a block's sites, in data-flow order. on_site: is told how many are done, and which."""
        arch, index = self.skeleton.arch, run.block.index
        last_norm = [site for site in arch.sites if site.norm is not None][-1]
        corrects_final_norm = self.steps.corrects_norms and self.windows is not None
        for number, site in enumerate(arch.sites, start=1):
            run.correct_norm(site)
            if corrects_final_norm and index == self.skeleton.num_blocks - 1 and site == last_norm:
                run.unquantized_tail = run.outputs()
            run.round_site(site)
            on_site(number, f"block {index} {site.name}")

    def _surveyed_table(self) -> Tensor:
        """The embedding's table, edited, once what must be known of the full-precision model was found in it."""
        with self.clock.step("read"):
            table = self.skeleton.source.load(f"{self.skeleton.arch.embedding}.weight").to(self.skeleton.device)
        if self.windows is not None:
            with self.clock.step("survey"):
                self._survey(table, self.windows)
        return table if self.edit is None else self.edit.embedding(table)

    def _survey(self, table: Tensor, windows: Tensor) -> None:
        """Find what steps must know of all blocks before the first. table: the embedding's, as it is."""
        if self.recipe.system_prompt == AUTO:
            self._find_prefix(table, windows)
        if self.steps.orders_residual:
            self.edit = residual_order(self._full_precision(table, windows))

    def _embed(self, weight: Tensor) -> tuple[Streams, dict[str, Tensor]]:
        """Pack the embedding; give the hidden states of all windows, and the tensors to write. weight: edited."""
        skeleton, path = self.skeleton, self.skeleton.arch.embedding
        with self.clock.step("embedding"):
            tensors, packed = pack_table(path, weight, self.recipe.embedding_scheme)
            if packed is not None:
                self.modules[path] = PackedEmbeddingSpec(packed.layout)
                if skeleton.tied:
                    self.modules[skeleton.arch.head] = TiedHeadSpec(path)
            prefix = self._embed_prefix(weight)
            if self.windows is None:
                return Streams([], [], [BlockCall({})] * skeleton.num_blocks, prefix), tensors
            batches = self.windows.split(max(1, _TOKENS_PER_BATCH // self.recipe.window))
            streams = Streams([], [], self._calls(), prefix)
            for batch in batches:
                ids = batch.to(skeleton.device)
                if packed is not None:
                    streams.hidden.append(ops.embedding(ids, packed, skeleton.dtype).cpu())
                else:
                    stored = tensors[f"{path}.weight"]
                    streams.hidden.append(torch.nn.functional.embedding(ids, stored).to(skeleton.dtype).cpu())
                if self.steps.needs_reference:
                    exact = torch.nn.functional.embedding(ids, weight)
                    streams.wanted.append(exact.to(skeleton.dtype).cpu())
        return streams, tensors

    def _find_prefix(self, table: Tensor, windows: Tensor) -> None:
        """The prefix of the model's own sink tokens. table: the embedding's."""
        source, few = self.skeleton.source, windows[:_WINDOWS_FOR_SINKS]
        self.prefix = sink_prefix(sink_tokens(self._full_precision(table, few), few), source.load_tokenizer())
        check_vocabulary(torch.tensor(self.prefix.ids), source.config.vocab_size, "the prefix of sink tokens")
        check_positions(self.recipe.window, source.config, self._past)

    def _embed_prefix(self, table: Tensor) -> PrefixStream | None:
        """The system prompt before the first block. table: the embedding's, exact and edited."""
        if self.prefix is None:
            return None
        ids = torch.tensor([self.prefix.ids], device=table.device)
        return PrefixStream(self.skeleton, torch.nn.functional.embedding(ids, table))

    def _full_precision(self, table: Tensor, windows: Tensor) -> Iterator[tuple[Block, BlockStream]]:
        """The model's blocks as they come, on all windows. table: the embedding's."""
        skeleton = self.skeleton
        hidden = [
            torch.nn.functional.embedding(batch.to(skeleton.device), table).to(skeleton.dtype).cpu()
            for batch in windows.split(max(1, _TOKENS_PER_BATCH // self.recipe.window))
        ]
        return full_precision_blocks(skeleton, hidden, self._calls(), self._embed_prefix(table))

    def _calls(self) -> list[BlockCall]:
        """What the model calls each block with, for a batch of windows."""
        return self.skeleton.block_calls(self.recipe.window, past=self._past)

    @property
    def _past(self) -> int:
        return 0 if self.prefix is None else len(self.prefix.ids)

    def _tuner(self, told: Callable[[int, float], None]) -> Tuner | None:
        """What tunes blocks, None if the method does not. told: see `Tuner`."""
        if self.steps.tuning is None:
            return None
        skeleton, tokens = self.skeleton, min(EFFORTS[self.steps.tuning.effort].tokens, self.recipe.window)
        calls = skeleton.block_calls(tokens, past=self._past)
        seed, clock = self.recipe.seed, self.clock
        return Tuner(self.steps, self.plan, calls, seed, skeleton.dtype, clock, told)

    def _after_blocks(self, wanted: list[Tensor], hidden: list[Tensor]) -> dict[str, Tensor]:
        """What is behind the blocks; give the tensors to write. wanted, hidden: see `AfterBlocks`."""
        rest = AfterBlocks(self.skeleton, self.edit, self.clock)
        norm, specs = rest.final_norm(wanted, hidden)
        head, packed = rest.head(self.recipe.embedding_scheme)
        self.modules |= {**specs, **packed}
        return norm | head | rest.others()

    def _as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """A block's tensor as it goes to the file: the model's own matrices at 16 bits, packed parts as they are.

        A matrix that was not edited is cast from the source's own numbers.
        """
        if tensor.dtype != torch.float32 or name not in self.skeleton.parameter_shapes():
            return tensor
        own = self.skeleton.source.load(name)
        return as_stored(own if torch.equal(own.float(), tensor.to(own.device)) else tensor)

    def _distill(self, writer: CheckpointWriter, progress: Progress) -> DistillReport | None:
        """Tune what was written as a whole, if the recipe asks."""
        settings, skeleton, config = self.recipe.distillation, self.skeleton, self._packed
        if settings is None or self.windows is None:
            return None
        with self.clock.step("distill"):
            written = SafetensorsSource(writer.folder)
            found = distill(
                skeleton.source, written, config, settings, self.windows, skeleton.dtype, skeleton.device,
                self.recipe.seed, progress,
            )  # fmt: skip
        with self.clock.step("write"):
            writer.rewrite(found.tensors)
            self.modules = dict(found.config.modules)
            self._write_model_config(writer)
        return found.report

    @property
    def _packed(self) -> PackedConfig:
        return PackedConfig(self.modules, self.plan.cache, self.prefix)

    def _write_config(self, writer: CheckpointWriter) -> None:
        self._write_model_config(writer)
        writer.write_text("recipe.toml", self.recipe.to_toml())
        writer.finish_weights()

    def _write_model_config(self, writer: CheckpointWriter) -> None:
        config = self.skeleton.config.to_diff_dict()
        config["tie_word_embeddings"] = self.skeleton.tied
        config["quantization_config"] = self._packed.to_dict() | {CHECKSUMS: writer.checksums}
        config["dtype"] = str(self.skeleton.source.config.dtype or self.skeleton.dtype).removeprefix("torch.")
        config.pop("_name_or_path", None)
        writer.write_json("config.json", marked(config))

    def _report(self, writer: CheckpointWriter, distilled: DistillReport | None) -> Report:
        report = Report(
            model=str(self.skeleton.source.path),
            method=self.recipe.method,
            version=__version__,
            linears=tuple(self.linears),
            size=measure(open_source(writer.folder)).to_dict(),
            calibration_tokens=0 if self.windows is None else self.windows.numel(),
            prefix_tokens=0 if self.prefix is None else len(self.prefix.ids),
            seconds=self.clock.seconds(),
            peak_memory=peak_memory(),
            weights_sha256=weights_checksum(writer.checksums),
            blocks=tuple(self.blocks),
            distilled=distilled,
        )
        writer.write_json("report.json", report.to_dict())
        return report


def _on_site(progress: Progress, done: int, total: int, number: int, doing: str) -> None:
    progress(done + number, total, doing)


def _losing(index: int, loss: float) -> str:
    return f"block {index} tuned to a held-out loss of {loss:.4f}"


def _check_apart(out: Path, model: Path, recipe: Recipe) -> None:
    """Raise `OutputError` if replacing `out` would take what is read with it."""
    if model.resolve() == out.resolve():
        raise OutputError(f"{out} is the model itself; choose another folder")
    texts = [expanded(name) for name in (recipe.calibration, recipe.system_prompt) if name and is_file(name)]
    for path in (model, *texts):
        if out.resolve() in path.resolve().parents:
            raise OutputError(f"{path} lies in {out}, which would be replaced; choose another folder")


def _check_disk(run: _Run, writer: CheckpointWriter) -> None:
    needed = packed_bytes(run.recipe, run.steps, run.plan, run.skeleton, run.prefix) + 64 * 2**20
    if run.recipe.distillation is not None:
        # It writes the last shard, which holds a norm that it tunes, once more before the first goes.
        needed += table_bytes(run.recipe, run.skeleton)
    free = shutil.disk_usage(writer.folder).free
    if free < needed:
        raise OutputError(
            f"{writer.final}: {free / 1e9:.2f} GB are free and about {needed / 1e9:.2f} GB are needed; "
            "free space or choose another disk"
        )
