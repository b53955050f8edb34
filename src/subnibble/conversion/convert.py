"""Convert a model that another tool quantized into a packed checkpoint, without quantizing it again.

Codes, scales and zero-points are kept, and each packed matrix is compared with the other tool's dequantized one before
it is written. Matrices that are not quantized keep all their bits. One block is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from subnibble.arguments import as_path
from subnibble.checkpoint.checksums import weights_checksum
from subnibble.checkpoint.manifest import PackedConfig
from subnibble.checkpoint.module_specs import (
    PackedEmbeddingSpec,
    Spec,
    TiedHeadSpec,
    gather_type,
    linear_spec,
    linear_state,
)
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.size import measure
from subnibble.checkpoint.source import Source
from subnibble.checkpoint.writer import CheckpointWriter, check_output
from subnibble.conversion.foreign import Foreign, row_chunks
from subnibble.conversion.offsets import smallest_type
from subnibble.conversion.opening import open_foreign
from subnibble.errors import NotSame, UnsupportedModel
from subnibble.model.skeleton import Skeleton
from subnibble.model.verify import check_written
from subnibble.pipeline.check import check_apart
from subnibble.pipeline.finish import write_model_config
from subnibble.pipeline.store import shared_inputs
from subnibble.progress import Progress, as_progress
from subnibble.report import LinearReport, Report
from subnibble.report.clock import Clock, peak_memory
from subnibble.runtime import ops
from subnibble.tensor.linear import Linear, PackedWeight, SiteInput
from subnibble.version import __version__

# Key of a linear's notes: the largest difference of a weight from the original's.
DIFFERENCE = "largest difference"


@dataclass(frozen=True)
class _Converted:
    """A packed linear; the largest difference of a weight from the original's, and ||W - Q||² / ||W||²."""

    linear: Linear
    difference: float
    error: float


@dataclass
class _Shard:
    """Contents of one weight file, and what config and report say of them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    specs: dict[str, Spec] = field(default_factory=dict)
    linears: list[LinearReport] = field(default_factory=list)

    def add_linear(self, path: str, converted: _Converted, first: str | None) -> None:
        """Add a linear. first: path of another one that stores the order of the inputs of both, or None."""
        spec = linear_spec(converted.linear, first)
        state = {name: tensor for name, tensor in linear_state(converted.linear).items() if name not in spec.elsewhere}
        self.tensors |= {f"{path}.{name}": tensor for name, tensor in state.items()}
        self.specs[path] = spec
        shape, scheme = (spec.layout.rows, spec.layout.num_columns), spec.layout.ranges[0][1].name
        bits, notes = spec.stored_bits / (shape[0] * shape[1]), {DIFFERENCE: converted.difference}
        self.linears.append(LinearReport(path, shape, scheme, bits, converted.error, None, None, 0.0, notes))

    def add_unquantized(self, source: Source, names: Iterable[str]) -> None:
        """Add the tensors of all modules that are not packed, float32 matrices in 16 bits if that changes no value."""
        for name in names:
            if name.rpartition(".")[0] in self.specs:
                continue
            tensor = source.load(name)
            if tensor.dim() > 1 and tensor.dtype == torch.float32:
                tensor = tensor.to(getattr(torch, smallest_type(tensor)))
            self.tensors[name] = tensor


def convert(
    model: str | Path | Source,
    out: str | Path,
    *,
    dense: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert a GPTQ or compressed-tensors folder or a GGUF file into a packed checkpoint, and return the report.

    model: folder, hub id, .gguf file, or an open source.
    out: folder to write; it appears only when it is complete.
    dense: whether to store quantized matrices of a GGUF file that cannot be packed unquantized, instead of refusing.
    overwrite: whether an existing checkpoint at `out` may be replaced.
    progress: called after each block with (done, total, description), or None.

    Raises a `SubnibbleError` that says what to do, before any weight is read if possible.
    """
    on_progress, final, clock = as_progress(progress), as_path(out, "out", "the folder to write"), Clock()
    check_output(final, overwrite)
    foreign = open_foreign(model, dense)
    check_apart(final, foreign.source.path)
    skeleton = Skeleton(foreign.source, torch.float32, torch.device("cpu"))
    skeleton.check_tied_head()
    with CheckpointWriter(final, skeleton.num_blocks + 1, overwrite) as writer:
        report = _write(foreign, skeleton, writer, clock, on_progress)
        writer.commit()
    return report


def _write(foreign: Foreign, skeleton: Skeleton, writer: CheckpointWriter, clock: Clock, progress: Progress) -> Report:
    """Write all files into the writer's temporary folder; the caller commits."""
    specs: dict[str, Spec] = {}
    linears: list[LinearReport] = []
    foreign.source.copy_side_files(writer.folder)
    for index in range(skeleton.num_blocks + 1):
        with clock.step("convert"):
            shard = _block(foreign, skeleton, index) if index < skeleton.num_blocks else _outer(foreign, skeleton)
        with clock.step("write"):
            writer.write_shard(shard.tensors)
        specs |= shard.specs
        linears += shard.linears
        progress(index + 1, skeleton.num_blocks + 1, f"block {index}" if index < skeleton.num_blocks else "written")
    write_model_config(writer, skeleton, PackedConfig(specs))
    writer.finish_weights()
    with clock.step("verify"):
        check_written(writer.folder)
    report = Report(
        model=str(foreign.source.path),
        method=f"convert from {foreign.format}",
        version=__version__,
        linears=tuple(linears),
        size=measure(open_source(writer.folder)).to_dict(),
        calibration_tokens=0,
        prefix_tokens=0,
        seconds=clock.seconds(),
        peak_memory=peak_memory(),
        weights_sha256=weights_checksum(writer.checksums),
    )
    writer.write_json("report.json", report.to_dict())
    return report


def _block(foreign: Foreign, skeleton: Skeleton, index: int) -> _Shard:
    """Convert a decoder block."""
    path = skeleton.arch.block_path(index)
    names = [name for name in skeleton.parameter_shapes() if name.startswith(f"{path}.")]
    linears = {
        name: _linear(foreign, f"{path}.{name}", names)
        for name in skeleton.arch.linears
        if f"{path}.{name}.weight" in foreign.quantized
    }
    inputs = {name: converted.linear for name, converted in linears.items()}
    firsts = {name: first for site in skeleton.arch.sites for name, first in shared_inputs(site, inputs).items()}
    shard = _Shard()
    for name, converted in linears.items():
        shard.add_linear(f"{path}.{name}", converted, f"{path}.{firsts[name]}" if name in firsts else None)
    shard.add_unquantized(foreign.source, names)
    return shard


def _outer(foreign: Foreign, skeleton: Skeleton) -> _Shard:
    """Convert everything outside the blocks."""
    arch, shard = skeleton.arch, _Shard()
    names = [name for name in skeleton.parameter_shapes() if not name.startswith(f"{arch.blocks}.")]
    if f"{arch.embedding}.weight" in foreign.quantized:
        table = _linear(foreign, arch.embedding, names)
        if not table.linear.input.is_plain:
            raise UnsupportedModel(f"{foreign.source.path}: the columns of {arch.embedding} have an order of their own")
        shard.add_linear(arch.embedding, table, None)
        shard.specs[arch.embedding] = PackedEmbeddingSpec(table.linear.weight.main.layout)
        if skeleton.tied:
            shard.specs[arch.head] = TiedHeadSpec(arch.embedding)
    if f"{arch.head}.weight" in foreign.quantized and not skeleton.tied:
        shard.add_linear(arch.head, _linear(foreign, arch.head, names), None)
    shard.add_unquantized(foreign.source, names)
    return shard


def _linear(foreign: Foreign, path: str, names: Collection[str]) -> _Converted:
    """Convert the quantized matrix at `path`, with its bias.

    names: names of the model's parameters near `path`.
    Raises `NotSame` if it should equal the foreign matrix and does not.
    """
    matrix = foreign.read(f"{path}.weight")
    packed = matrix.packed()
    gather = None if packed.gather is None else packed.gather.to(gather_type(packed.gather.shape[0]))
    bias = foreign.source.load(f"{path}.bias") if f"{path}.bias" in names else None
    linear = Linear(PackedWeight(packed.matrix, bias), SiteInput(gather=gather))
    largest = energy = lost = 0.0
    for rows in row_chunks(*packed.matrix.shape):
        part = packed.matrix.rows(torch.arange(rows.start, rows.stop))
        dense = matrix.dense(rows)
        difference = ops.dense_from_input(Linear(PackedWeight(part), linear.input)).sub_(dense).abs_()
        largest = max(largest, float(difference.max()))
        energy += float(dense.square_().sum(dtype=torch.float64))
        lost += float(difference.square_().sum(dtype=torch.float64))
    if packed.is_exact and largest:
        raise NotSame(f"{path}: a packed weight differs by {largest} from that of the other tool")
    return _Converted(linear, largest, lost / energy if largest else 0.0)
