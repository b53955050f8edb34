"""The driver: stream a checkpoint through a method, one block at a time, into a packed checkpoint.

    for block in checkpoint:            one block resident
        method's transforms             function unchanged
        for site in block.sites:        in data-flow order
            observe the site's tensor   upstream is quantized by now
            round the site's readers
        write the block's shard; advance the activations

The order lives here alone; methods say what happens at each step.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subnibble.calibrate.stats import Gram
from subnibble.calibrate.stream import BlockStream
from subnibble.calibrate.windows import calibration_windows, check_positions
from subnibble.checkpoint.packed import (
    Entry,
    PackedConfig,
    PackedEmbeddingEntry,
    PackedLinearEntry,
    TiedHeadEntry,
    packed_config_of,
)
from subnibble.checkpoint.size import measure, weights_hash
from subnibble.checkpoint.source import Source, open_source
from subnibble.checkpoint.writer import CheckpointWriter, check_output
from subnibble.device import resolve_device, resolve_dtype
from subnibble.errors import BadRecipe, CheckpointError, NumericalFailure, OutputError
from subnibble.methods import find_method
from subnibble.methods.method import Method, Steps
from subnibble.model.site import Site
from subnibble.model.skeleton import Block, Skeleton
from subnibble.progress import Progress, silent
from subnibble.recipe import Recipe
from subnibble.report import LinearReport, Report
from subnibble.report.clock import Clock, peak_memory
from subnibble.rounding import grid
from subnibble.rounding.error import relative_errors
from subnibble.rounding.rounder import Rounder, Rounding
from subnibble.runtime import ops
from subnibble.scheme import Scheme
from subnibble.tensor import PackedRange, PackedTensor
from subnibble.transforms.invariance import check_sites
from subnibble.version import __version__

# Tokens forwarded together: enough to keep the matrix products large.
_TOKENS_PER_BATCH = 4096
# Rows of an embedding table rounded together, to bound the memory of the clip search.
_EMBEDDING_ROWS = 8192


def quantize(
    model: str | Path | Source,
    out: str | Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Report:
    """Quantize `model` (folder, hub id or .gguf file) into the folder `out` as `recipe` says.

    Raises a `SubnibbleError` that says what to do, before any weight is read where that can be known; `out` appears
    only when it is complete.
    """
    final = Path(out)
    check_output(final, overwrite)
    method = find_method(recipe.method)
    options = method.configure(recipe.options)
    steps = method.build(options)
    if recipe.calibration is None and steps.rounder.needs_gram:
        recipe = replace(recipe, calibration="c4")
    source = open_source(model)
    if source.path.resolve() == final.resolve():
        raise OutputError(f"{final} is the model itself; choose another folder")
    run = _Run.prepare(source, recipe, method, options, steps)
    with CheckpointWriter(final, run.skeleton.num_blocks + 1, overwrite) as writer:
        _check_disk(run, writer.folder)
        report = run.execute(writer, progress)
        writer.commit()
    return report


@dataclass
class _Run:
    """One quantization: what was resolved, and what has been made so far."""

    skeleton: Skeleton
    recipe: Recipe
    steps: Steps
    windows: Tensor | None
    clock: Clock
    modules: dict[str, Entry] = field(default_factory=dict)
    linears: list[LinearReport] = field(default_factory=list)

    @classmethod
    def prepare(cls, source: Source, recipe: Recipe, method: Method, options: Any, steps: Steps) -> _Run:
        """Check everything that can be checked before weights are read, and read the calibration windows."""
        clock = Clock()
        check_plain(source)
        device = resolve_device(recipe.device)
        dtype = resolve_dtype(recipe.dtype, source.config.dtype, device)
        skeleton = Skeleton(source, dtype, device)
        check_schemes(recipe, skeleton)
        resolved = replace(
            recipe,
            calibration=_absolute(recipe.calibration),
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            options=asdict(options),
        )
        windows = None
        if recipe.calibration is not None:
            check_positions(recipe.window, source.config)
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
            skeleton.check_tied_head()
            check_sites(skeleton)
        return cls(skeleton, resolved, steps, windows, clock)

    def execute(self, writer: CheckpointWriter, progress: Progress) -> Report:
        """Quantize and write everything but the commit."""
        skeleton, clock = self.skeleton, self.clock
        sites = len(skeleton.arch.sites)
        total = skeleton.num_blocks * (sites + 1) + 2
        with clock.step("write"):
            skeleton.source.copy_side_files(writer.folder)
        hidden, outer = self._embed()
        progress(1, total, "embedding")
        arguments = skeleton.block_arguments(self.recipe.window) if hidden else [{}] * skeleton.num_blocks
        for index in range(skeleton.num_blocks):
            done = 1 + index * (sites + 1)
            with clock.step("read"):
                block = skeleton.load_block(index)
            for transform in self.steps.transforms:
                transform(block)
            # Rounded are these, not their copies in the type that activations are computed in.
            exact = {name: parameter.data for name, parameter in block.module.named_parameters()}
            block.module.to(skeleton.dtype)
            stream = BlockStream(block, hidden, arguments[index])
            packed: dict[str, PackedTensor] = {}
            for number, site in enumerate(skeleton.arch.sites, start=1):
                packed |= self._round_site(block, site, stream, exact)
                progress(done + number, total, f"block {index} {site.name}")
            with clock.step("write"):
                writer.write_shard(self._block_tensors(block, packed, exact))
            with clock.step("forward"):
                stream.advance()
            skeleton.release(block.path)
            progress(done + sites + 1, total, f"block {index}")
        outer |= self._head()
        with clock.step("write"):
            writer.write_shard(outer)
            self._write_config(writer)
        progress(total, total, "written")
        return self._report(writer)

    def _embed(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Read and pack the embedding; give the hidden states of all windows, and the tensors to write."""
        skeleton, path = self.skeleton, self.skeleton.arch.embedding
        with self.clock.step("read"):
            weight = skeleton.source.load(f"{path}.weight").to(skeleton.device)
        with self.clock.step("embedding"):
            tensors, packed = self._table(path, weight)
            if packed is not None:
                self.modules[path] = PackedEmbeddingEntry(packed.layout)
                if skeleton.tied:
                    self.modules[skeleton.arch.head] = TiedHeadEntry(path)
            if self.windows is None:
                return [], tensors
            batches = self.windows.split(max(1, _TOKENS_PER_BATCH // self.recipe.window))
            if packed is not None:
                hidden = [ops.embedding(batch.to(skeleton.device), packed, skeleton.dtype) for batch in batches]
            else:
                stored = tensors[f"{path}.weight"].to(skeleton.dtype)
                hidden = [torch.nn.functional.embedding(batch.to(skeleton.device), stored) for batch in batches]
        return [batch.cpu() for batch in hidden], tensors

    def _head(self) -> dict[str, Tensor]:
        """Read the final norm and, if it is not tied, read and pack the head; give the tensors to write."""
        skeleton, head = self.skeleton, self.skeleton.arch.head
        prefixes = (skeleton.arch.embedding, skeleton.arch.block_path(0).rpartition(".")[0], head)
        tensors = {}
        for name in skeleton.parameter_shapes():
            if not name.startswith(tuple(f"{prefix}." for prefix in prefixes)):
                tensors[name] = _stored(skeleton.source.load(name))
        if not skeleton.tied:
            with self.clock.step("read"):
                weight = skeleton.source.load(f"{head}.weight").to(skeleton.device)
            with self.clock.step("embedding"):
                stored, packed = self._table(head, weight)
                tensors |= stored
                if packed is not None:
                    self.modules[head] = PackedLinearEntry(packed.layout, bias=False)
        return tensors

    def _table(self, path: str, weight: Tensor) -> tuple[dict[str, Tensor], PackedTensor | None]:
        """An embedding or head at `embedding_bits`: the tensors to store, and the packed form if there is one."""
        scheme = self.recipe.embedding_scheme
        if scheme is None:
            return {f"{path}.weight": _stored(weight)}, None
        scheme.check_width(weight.shape[1], path)
        clip = grid.Clip("minmax" if scheme.bits == 8 else "mse")
        chunks = [grid.coded(rows.float(), scheme, clip) for rows in weight.split(_EMBEDDING_ROWS)]
        parts = [PackedRange.pack(chunk, scheme) for chunk in chunks]
        zeros = [part.zeros for part in parts if part.zeros is not None]
        whole = PackedRange(
            scheme,
            weight.shape[1],
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(zeros) if zeros else None,
        )
        packed = PackedTensor((whole,))
        return {f"{path}.{name}": tensor for name, tensor in packed.state().items()}, packed

    def _round_site(
        self, block: Block, site: Site, stream: BlockStream, exact: dict[str, Tensor]
    ) -> dict[str, PackedTensor]:
        """Observe a site and round its readers' weights in `exact`; the block holds them dequantized afterwards."""
        gram = None
        if self.windows is not None:
            gram = self._gram(block, site, stream)
        packed: dict[str, PackedTensor] = {}
        for scheme, names in self._by_scheme(block, site).items():
            where = f"{block.path}.{{{', '.join(names)}}}" if len(names) > 1 else f"{block.path}.{names[0]}"
            start = time.perf_counter()
            with self.clock.step("round"):
                weight = torch.cat([exact[f"{name}.weight"] for name in names])
                rounding = _rounded(self.steps.rounder, weight, gram, scheme, where)
                whole = PackedRange.pack(rounding.coded, scheme)
            seconds = time.perf_counter() - start
            heights = [block.linear(name).out_features for name in names]
            with self.clock.step("measure error"):
                errors = relative_errors(weight, whole.dequantize(), gram, heights)
                nearest = grid.coded(weight, scheme, grid.Clip("minmax"))
                floors = relative_errors(weight, PackedRange.pack(nearest, scheme).dequantize(), gram, heights)
            rows = torch.arange(weight.shape[0], device=weight.device).split(heights)
            for name, index, error, floor in zip(names, rows, errors, floors, strict=True):
                linear = block.linear(name)
                packed[name] = PackedTensor((whole.rows(index),))
                linear.weight.data = packed[name].dequantize(linear.weight.dtype)
                self.linears.append(
                    LinearReport(
                        path=f"{block.path}.{name}",
                        shape=packed[name].shape,
                        scheme=scheme.name,
                        effective_bits=packed[name].stored_bits / linear.weight.numel(),
                        weight_error=error.weight,
                        output_error=error.output,
                        nearest_error=floor.output,
                        seconds=round(seconds, 3),
                        notes=dict(rounding.notes),
                    )
                )
        return packed

    def _gram(self, block: Block, site: Site, stream: BlockStream) -> Tensor:
        gram = Gram(block.linear(site.readers[0]).in_features, self.skeleton.device)

        def receive(x: Tensor) -> None:
            with self.clock.step("gram"):
                gram.update(x)

        with self.clock.step("forward"):
            stream.observe(site, receive)
        return gram.value

    def _by_scheme(self, block: Block, site: Site) -> dict[Scheme, list[str]]:
        """The readers to round, together where they share a scheme; skipped ones are left out."""
        groups: dict[Scheme, list[str]] = {}
        for name in site.readers:
            scheme = self.recipe.scheme_of(f"{block.path}.{name}")
            if scheme is not None:
                groups.setdefault(scheme, []).append(name)
        return groups

    def _block_tensors(
        self, block: Block, packed: dict[str, PackedTensor], exact: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What to store for a block: packed linears, and everything else as it is."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in packed.items():
            has_bias = block.linear(name).bias is not None
            self.modules[f"{block.path}.{name}"] = PackedLinearEntry(tensor.layout, has_bias)
            tensors |= {f"{block.path}.{name}.{key}": part for key, part in tensor.state().items()}
        for name, parameter in exact.items():
            if name.removesuffix(".weight") not in packed:
                tensors[f"{block.path}.{name}"] = self._unquantized(f"{block.path}.{name}", parameter)
        return tensors

    def _unquantized(self, name: str, parameter: Tensor) -> Tensor:
        """What to store of a parameter that is not quantized: the source's own numbers unless a transform edited it."""
        if self.steps.transforms:
            return _stored(parameter)
        return _stored(self.skeleton.source.load(name))

    def _write_config(self, writer: CheckpointWriter) -> None:
        config = self.skeleton.config.to_diff_dict()
        config["quantization_config"] = PackedConfig(self.modules).to_dict()
        config["dtype"] = str(self.skeleton.source.config.dtype or self.skeleton.dtype).removeprefix("torch.")
        config.pop("_name_or_path", None)
        writer.write_json("config.json", config)
        writer.write_text("recipe.toml", self.recipe.to_toml())
        writer.finish_weights()

    def _report(self, writer: CheckpointWriter) -> Report:
        report = Report(
            model=str(self.skeleton.source.path),
            method=self.recipe.method,
            version=__version__,
            linears=tuple(self.linears),
            size=measure(open_source(writer.folder)).to_dict(),
            calibration_tokens=0 if self.windows is None else self.windows.numel(),
            seconds=self.clock.seconds(),
            peak_memory=peak_memory(),
            weights_sha256=weights_hash(writer.folder),
        )
        writer.write_json("report.json", report.to_dict())
        return report


def _rounded(rounder: Rounder, weight: Tensor, gram: Tensor | None, scheme: Scheme, where: str) -> Rounding:
    """Round; a failure that does not name its linears gets their names."""
    try:
        return rounder(weight, gram, scheme, where)
    except NumericalFailure as error:
        if str(error).startswith(where):
            raise
        raise NumericalFailure(f"{where}: {error}") from error


def check_plain(source: Source) -> None:
    """Raise `CheckpointError` if the source is quantized already. GGUF files count as plain: they are dequantized."""
    if packed_config_of(source.config) is not None or getattr(source.config, "quantization_config", None):
        raise CheckpointError(f"{source.path} is quantized already; give the original model")


def check_schemes(recipe: Recipe, skeleton: Skeleton) -> None:
    """Raise `BadRecipe` if a group does not fit a linear, an override matches none, or nothing would be quantized."""
    shapes = skeleton.linear_shapes()
    recipe.check_overrides(list(shapes))
    schemes = {path: recipe.scheme_of(path) for path in shapes}
    for path, scheme in schemes.items():
        if scheme is not None:
            scheme.check_width(shapes[path][1], path)
    if all(scheme is None for scheme in schemes.values()):
        raise BadRecipe("the overrides skip every linear; nothing would be quantized")


def packed_bytes(recipe: Recipe, skeleton: Skeleton) -> int:
    """Bytes of the weight files that a recipe will give, headers aside; from shapes alone."""
    bits = 0
    linears = skeleton.linear_shapes()
    tables = {f"{skeleton.arch.embedding}.weight", f"{skeleton.arch.head}.weight"}
    for name, shape in skeleton.parameter_shapes().items():
        scheme = recipe.scheme_of(name.removesuffix(".weight")) if name.removesuffix(".weight") in linears else None
        if name in tables:
            scheme = recipe.embedding_scheme
        if scheme is not None:
            bits += shape[0] * scheme.row_bits(shape[1])
        else:
            bits += torch.Size(shape).numel() * (16 if len(shape) > 1 else 32)
    return bits // 8


def _stored(tensor: Tensor) -> Tensor:
    """A tensor that is not quantized, as it is stored: matrices at 16 bits, vectors as they are."""
    if tensor.dim() < 2 or tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor
    half = tensor.to(torch.float16)
    return half if bool(torch.isfinite(half).all()) else tensor.to(torch.bfloat16)


def _absolute(calibration: str | None) -> str | None:
    """A file's full path, so that the recipe means the same from any folder; names of sets as they are."""
    return str(Path(calibration).resolve()) if calibration and Path(calibration).is_file() else calibration


def _check_disk(run: _Run, folder: Path) -> None:
    needed = packed_bytes(run.recipe, run.skeleton) + 64 * 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder.parent}: {free / 1e9:.2f} GB are free and about {needed / 1e9:.2f} GB are needed; "
            "free space or choose another disk"
        )
