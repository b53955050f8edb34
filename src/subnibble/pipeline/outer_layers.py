"""Pack the layers outside the blocks: embedding, final norm, head, and any other tensors."""

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
    head_input_state,
)
from subnibble.corrections.mean_shift import MeanShift
from subnibble.model.skeleton import Skeleton
from subnibble.pipeline.streams import Streams
from subnibble.report.clock import Clock
from subnibble.rounding.table import as_stored, pack_table
from subnibble.tensor.packed import PackedTensor
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.rotate import ResidualEdit

# (tensors to write by name, specs of the packed modules by path).
TensorsAndSpecs = tuple[dict[str, Tensor], dict[str, Spec]]


def embedding(
    skeleton: Skeleton, table: Tensor, scheme: Scheme | None
) -> tuple[TensorsAndSpecs, PackedTensor | Tensor]:
    """Pack the embedding; return its tensors and specs, and the table that the packed model will run on.

    table: (tokens, channels), rotated or reordered already.
    scheme: how to quantize it, None for 16 bits.
    """
    path = skeleton.arch.embedding
    tensors, packed = pack_table(path, table, scheme)
    if packed is None:
        return (tensors, {}), tensors[f"{path}.weight"]
    tied: dict[str, Spec] = {skeleton.arch.head: TiedHeadSpec(path)} if skeleton.tied else {}
    return (tensors, {path: PackedEmbeddingSpec(packed.layout), **tied}), packed


@dataclass(frozen=True)
class AfterBlocks:
    """Packs the layers after the last block.

    skeleton: the model without weights, and its source.
    edit: rotation or channel order of the residual stream, or None.
    clock: counts the seconds of each step.
    """

    skeleton: Skeleton
    edit: ResidualEdit | None
    clock: Clock

    def stored(self, streams: Streams, scheme: Scheme | None) -> TensorsAndSpecs:
        """Pack final norm, head and all other tensors.

        streams: hidden states after the last block.
        scheme: how to quantize the head, None for 16 bits.
        """
        norm, specs = self.final_norm(streams.unrounded, streams.hidden)
        head, packed = self.head(scheme)
        return norm | head | self.others(), specs | packed

    def final_norm(self, target: list[Tensor], hidden: list[Tensor]) -> TensorsAndSpecs:
        """Store the final norm, with a bias against the mean shift if the method asks.

        target: outputs of the last block before its last two sites were quantized, batches (windows, tokens,
            channels); empty for no correction.
        hidden: the same outputs after these sites were quantized.
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
                    before, after = (norm(states.to(skeleton.device)).flatten(0, -2) for states in pair)
                    yield before, after

            with self.clock.step("mean shift"), torch.no_grad():
                shift = MeanShift(gain.shape[0], skeleton.device)
                bias = value_over(shift, outputs()).to(torch.float16)
            tensors[f"{path}.bias"] = bias
            specs[path] = NormBiasSpec(bias.shape[0])
            skeleton.release(path)
        return tensors, specs

    def head(self, scheme: Scheme | None) -> TensorsAndSpecs:
        """Pack the head. scheme: how to quantize it, None for 16 bits.

        A tied head stores only the matrix that multiplies its input, if the residual stream is rotated.
        """
        skeleton, head = self.skeleton, self.skeleton.arch.head
        if skeleton.tied:
            blocks = () if self.edit is None else self.edit.head_input(self._final_gain())
            return head_input_state(head, blocks) if blocks else ({}, {})
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
        """Tensors outside embedding, blocks, final norm and head, by name: matrices in 16 bits."""
        arch = self.skeleton.arch
        stored = tuple(f"{path}." for path in (arch.embedding, arch.blocks, arch.final_norm, arch.head))
        names = (name for name in self.skeleton.parameter_shapes() if not name.startswith(stored))
        return {name: as_stored(self.skeleton.source.load(name)) for name in names}
