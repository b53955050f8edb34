"""What a model has around its blocks: the embedding; the final norm, the head, and whatever else there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.calibrate.stats import value_over
from subnibble.checkpoint.module_specs import (
    NormBiasSpec,
    PackedEmbeddingSpec,
    PackedLinearSpec,
    Spec,
    TiedHeadSpec,
    input_mix_state,
)
from subnibble.corrections.mean_shift import MeanShift
from subnibble.model.skeleton import Skeleton
from subnibble.pipeline.streams import Streams
from subnibble.report.clock import Clock
from subnibble.rounding.table import as_stored, pack_table
from subnibble.tensor.packed import PackedTensor
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.rotate import ResidualEdit

# The tensors to write, and the specs of what is packed.
Part = tuple[dict[str, Tensor], dict[str, Spec]]


def embedding(skeleton: Skeleton, table: Tensor, scheme: Scheme | None) -> tuple[Part, PackedTensor | Tensor]:
    """The embedding of an edited table (tokens, channels); and as it will run. scheme: None leaves it at 16 bits."""
    path = skeleton.arch.embedding
    tensors, packed = pack_table(path, table, scheme)
    if packed is None:
        return (tensors, {}), tensors[f"{path}.weight"]
    tied: dict[str, Spec] = {skeleton.arch.head: TiedHeadSpec(path)} if skeleton.tied else {}
    return (tensors, {path: PackedEmbeddingSpec(packed.layout), **tied}), packed


@dataclass(frozen=True)
class AfterBlocks:
    """What is behind the blocks. edit: of the residual stream, or None."""

    skeleton: Skeleton
    edit: ResidualEdit | None
    clock: Clock

    def stored(self, streams: Streams, scheme: Scheme | None) -> Part:
        """All of it. streams: behind the last block. scheme: of the head, None leaves it at 16 bits."""
        norm, specs = self.final_norm(streams.unrounded, streams.hidden)
        head, packed = self.head(scheme)
        return norm | head | self.others(), specs | packed

    def final_norm(self, target: list[Tensor], hidden: list[Tensor]) -> Part:
        """The final norm, its mean shift corrected if the method asks.

        target: the last block's outputs before its last two sites were quantized, none for no correction; hidden:
        after.
        """
        skeleton, path = self.skeleton, self.skeleton.arch.final_norm
        gain = self._final_gain()
        if self.edit is not None:
            gain = self.edit.final_gain(gain)
        tensors, specs = {f"{path}.weight": gain}, dict[str, Spec]()
        if target:
            norm = skeleton.load(path, skeleton.dtype)
            norm.weight.data = gain.to(skeleton.dtype)

            def outputs() -> Iterator[tuple[Tensor, Tensor]]:
                for pair in zip(target, hidden, strict=True):
                    before, after = (norm(part.to(skeleton.device)).flatten(0, -2) for part in pair)
                    yield before, after

            with self.clock.step("mean shift"), torch.no_grad():
                shift = MeanShift(gain.shape[0], skeleton.device)
                bias = value_over(shift, outputs()).to(torch.float16)
            tensors[f"{path}.bias"] = bias
            specs[path] = NormBiasSpec(bias.shape[0])
            skeleton.release(path)
        return tensors, specs

    def head(self, scheme: Scheme | None) -> Part:
        """The head; if it is tied, what its input meets first, if anything. scheme: None leaves it at 16 bits."""
        skeleton, head = self.skeleton, self.skeleton.arch.head
        if skeleton.tied:
            mix = () if self.edit is None else self.edit.head_mix(self._final_gain())
            return input_mix_state(head, mix) if mix else ({}, {})
        with self.clock.step("read"):
            weight = skeleton.source.load(f"{head}.weight").to(skeleton.device)
            if self.edit is not None:
                weight = self.edit.head(weight, self._final_gain())
        with self.clock.step("embedding"):
            tensors, packed = pack_table(head, weight, scheme)
        return tensors, {} if packed is None else {head: PackedLinearSpec(packed.layout, bias=False)}

    def _final_gain(self) -> Tensor:
        """The final norm's gain, before any edit."""
        return self.skeleton.source.load(f"{self.skeleton.arch.final_norm}.weight").to(self.skeleton.device)

    def others(self) -> dict[str, Tensor]:
        """What is in neither embedding, blocks, final norm nor head."""
        arch = self.skeleton.arch
        done = tuple(f"{path}." for path in (arch.embedding, arch.blocks, arch.final_norm, arch.head))
        names = (name for name in self.skeleton.parameter_shapes() if not name.startswith(done))
        return {name: as_stored(self.skeleton.source.load(name)) for name in names}
