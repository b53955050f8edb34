"""One block on its way through the pipeline: observed site by site, corrected, rounded, its column scales handed on."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from subnibble.calibrate.stats import Drift, Gram
from subnibble.calibrate.stream import BlockStream
from subnibble.checkpoint.packed import Entry, NormBiasEntry, PackedLinearEntry
from subnibble.corrections.mean_shift import ordinary_tokens
from subnibble.errors import NumericalFailure
from subnibble.methods.method import Steps
from subnibble.model.site import Site
from subnibble.model.skeleton import Block
from subnibble.report import LinearReport
from subnibble.report.clock import Clock
from subnibble.rounding import grid
from subnibble.rounding.error import relative_errors
from subnibble.rounding.rounder import Rounder, Rounding
from subnibble.runtime.modules import add_output_bias_
from subnibble.scheme import Scheme
from subnibble.tensor import PackedRange, PackedTensor
from subnibble.transforms.absorb import absorb_, can_absorb


@dataclass
class Streams:
    """Hidden states of all windows between two blocks, batches of (windows, tokens, channels), and what goes with them.

    hidden: in the model as quantized so far. wanted: in the full-precision model, empty if no method asks. arguments:
    what the model passes to each block beside them.
    """

    hidden: list[Tensor]
    wanted: list[Tensor]
    arguments: list[dict[str, Any]]


@dataclass(frozen=True)
class Observed:
    """Statistics of a site's tensor, each None if it is not needed; see `Rounder`."""

    gram: Tensor | None = None
    drift: Tensor | None = None


@dataclass
class BlockRun:
    """A loaded block, transformed and in the compute type, until its tensors are written.

    exact: every parameter in float32, as transformed: rounded are these, not their copies in the compute type.
    schemes: of every linear of the model, by path. stream: the block as it is quantized, on the quantized model's
    hidden states `hidden`; reference: a full-precision copy on the full-precision model's; teacher: that copy on
    `hidden`; None where no step asks. packed: what was rounded so far, by name in the block. columns: column scales
    that no other module of the block can take; to_absorb: those that one will.
    """

    block: Block
    steps: Steps
    schemes: Mapping[str, Scheme | None]
    clock: Clock
    exact: dict[str, Tensor]
    stream: BlockStream
    reference: BlockStream | None
    teacher: BlockStream | None
    hidden: list[Tensor]
    packed: dict[str, PackedTensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    to_absorb: list[tuple[Site, Tensor]] = field(default_factory=list)
    linears: dict[str, LinearReport] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
        block: Block,
        steps: Steps,
        schemes: Mapping[str, Scheme | None],
        clock: Clock,
        streams: Streams,
        dtype: torch.dtype,
    ) -> BlockRun:
        """Carry out the transforms on `block`, loaded in float32, and set its streams up."""
        arguments = streams.arguments[block.index]
        if steps.transforms:
            with clock.step("forward"):
                own = {name: schemes[f"{block.path}.{name}"] for name in block.arch.linears}
                found = BlockStream(_twin(block, dtype), streams.hidden, arguments).statistics(own)
            with clock.step("transform"):
                for transform in steps.transforms:
                    transform(block, found)
        exact = {name: parameter.data for name, parameter in block.module.named_parameters()}
        block.module.to(dtype)
        needs_twin = steps.needs_drift or steps.mean_shift is not None
        twin = _twin(block, dtype) if needs_twin and streams.hidden else None
        return cls(
            block,
            steps,
            schemes,
            clock,
            exact,
            BlockStream(block, streams.hidden, arguments),
            BlockStream(twin, streams.wanted, arguments) if twin is not None and steps.needs_drift else None,
            BlockStream(twin, streams.hidden, arguments) if twin is not None and steps.mean_shift is not None else None,
            streams.hidden,
        )

    def correct_norm(self, site: Site) -> None:
        """If the method asks, give the site's norm the bias that undoes the mean shift of what was rounded before."""
        if self.teacher is not None and site.norm is not None and self.packed:
            self._shift(site, site.norm, self.teacher)

    def round_site(self, site: Site) -> None:
        """Observe the site's tensor and round its readers; the block holds them dequantized then."""
        groups = self._by_scheme(site)
        observed = self._observe(site) if groups and self.hidden else Observed()
        for scheme, names in groups.items():
            self._round(site, scheme, names, observed)

    def outputs(self) -> list[Tensor]:
        """The block's outputs as it is now."""
        with self.clock.step("forward"):
            return list(self.stream.outputs())

    def advance(self) -> None:
        """Move the streams to behind the block."""
        with self.clock.step("forward"):
            self.stream.advance()
            if self.reference is not None:
                self.reference.advance()

    def reports(self) -> list[LinearReport]:
        """What the report says of each linear."""
        moved = set(self.block.arch.linears) if self.steps.transforms or self.steps.rotation != "none" else set()
        for site, _ in self.to_absorb:
            moved |= {*site.readers, *site.writers}
        return [replace(linear, moved=name in moved) for name, linear in self.linears.items()]

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Entry]]:
        """What to store of the block, column scales absorbed, and the entries of its modules. To be called last.

        Of parameters that are not quantized: their float32 values, edited or not.
        """
        for site, c in self.to_absorb:
            absorb_(site, c, self.packed, self.exact)
        path = self.block.path
        tensors: dict[str, Tensor] = {}
        entries: dict[str, Entry] = {}
        for name, tensor in self.packed.items():
            columns = self.columns.get(name)
            entries[f"{path}.{name}"] = PackedLinearEntry(
                tensor.layout, self.block.linear(name).bias is not None, columns is not None
            )
            tensors |= {f"{path}.{name}.{key}": part for key, part in tensor.state().items()}
            if columns is not None:
                tensors[f"{path}.{name}.column_scale"] = columns.to(torch.float16)
        for name, parameter in self.exact.items():
            if name.removesuffix(".weight") not in self.packed:
                tensors[f"{path}.{name}"] = parameter
        for site in self.block.arch.sites:
            if site.norm is not None and f"{site.norm}.bias" in self.exact:
                bias = self.exact[f"{site.norm}.bias"].to(torch.float16)
                tensors[f"{path}.{site.norm}.bias"] = bias
                entries[f"{path}.{site.norm}"] = NormBiasEntry(bias.shape[0])
        return tensors, entries

    def _shift(self, site: Site, norm_name: str, teacher: BlockStream) -> None:
        assert self.steps.mean_shift is not None
        with self.clock.step("mean shift"):
            ordinary = map(ordinary_tokens, self.hidden)
            outputs = zip(teacher.at(site), self.stream.at(site), ordinary, strict=True)
            bias = self.steps.mean_shift(outputs, self.hidden[0].shape[1]).to(torch.float16).float()
            norm = self.block.module.get_submodule(norm_name)
            add_output_bias_(norm, bias.to(self.block.gain(norm_name).dtype))
            self.exact[f"{norm_name}.bias"] = bias

    def _observe(self, site: Site) -> Observed:
        rounder = self.steps.rounder_of(site.name)
        channels = self.block.linear(site.readers[0]).in_features
        device = next(iter(self.exact.values())).device
        gram = Gram(channels, device)
        if not rounder.needs_drift or self.reference is None:
            with self.clock.step("forward"):
                for x in self.stream.at(site):
                    with self.clock.step("gram"):
                        gram.update(x)
            return Observed(gram.value)
        drift = Drift(channels, device)
        with self.clock.step("forward"):
            for x, wanted in zip(self.stream.at(site), self.reference.at(site), strict=True):
                with self.clock.step("gram"):
                    gram.update(x)
                    drift.update(x, wanted)
        return Observed(gram.value, drift.value)

    def _by_scheme(self, site: Site) -> dict[Scheme, list[str]]:
        """The readers to round, together where they share a scheme; skipped ones are left out."""
        groups: dict[Scheme, list[str]] = {}
        for name in site.readers:
            scheme = self.schemes[f"{self.block.path}.{name}"]
            if scheme is not None:
                groups.setdefault(scheme, []).append(name)
        return groups

    def _round(self, site: Site, scheme: Scheme, names: list[str], observed: Observed) -> None:
        """Round the linears `names`, which read one site by one scheme, on top of each other."""
        path = self.block.path
        where = f"{path}.{{{', '.join(names)}}}" if len(names) > 1 else f"{path}.{names[0]}"
        start = time.perf_counter()
        with self.clock.step("round"):
            weight = torch.cat([self.exact[f"{name}.weight"] for name in names])
            rounding = _rounded(self.steps.rounder_of(site.name), weight, observed, scheme, where)
            whole = PackedRange.pack(rounding.coded, scheme)
            columns = self._place(site, names, rounding.coded.columns)
        seconds = time.perf_counter() - start
        heights = [self.block.linear(name).out_features for name in names]
        with self.clock.step("measure error"):
            dense = whole.dequantize() if columns is None else whole.dequantize() * columns
            errors = relative_errors(weight, dense, observed.gram, heights)
            nearest = PackedRange.pack(grid.coded(weight, scheme, grid.Clip("minmax")), scheme).dequantize()
            floors = relative_errors(weight, nearest, observed.gram, heights)
        rows = torch.arange(weight.shape[0], device=weight.device).split(heights)
        for name, index, error, floor in zip(names, rows, errors, floors, strict=True):
            linear = self.block.linear(name)
            self.packed[name] = PackedTensor((whole.rows(index),))
            linear.weight.data = dense[index].to(linear.weight.dtype)
            bits = self.packed[name].stored_bits + (16 * weight.shape[1] if name in self.columns else 0)
            self.linears[name] = LinearReport(
                path=f"{path}.{name}",
                shape=self.packed[name].shape,
                scheme=scheme.name,
                effective_bits=bits / linear.weight.numel(),
                weight_error=error.weight,
                output_error=error.output,
                nearest_error=floor.output,
                seconds=round(seconds, 3),
                notes=dict(rounding.notes),
            )

    def _place(self, site: Site, names: list[str], columns: Tensor | None) -> Tensor | None:
        """Decide where column scales (k,) go; give them as they will act. None stays None."""
        if columns is None:
            return None
        if can_absorb(site, self.block.heads, names, self.packed, columns):
            self.to_absorb.append((site, columns))
            return columns
        stored = columns.to(torch.float16).float()
        self.columns |= dict.fromkeys(names, stored)
        return stored


def _twin(block: Block, dtype: torch.dtype) -> Block:
    """A copy of a block, in the compute type, that stays as it is."""
    return replace(block, module=copy.deepcopy(block.module).to(dtype))


def _rounded(rounder: Rounder, weight: Tensor, observed: Observed, scheme: Scheme, where: str) -> Rounding:
    """Round; a failure that does not name its linears gets their names."""
    try:
        return rounder(weight, observed.gram, scheme, where, observed.drift)
    except NumericalFailure as error:
        if str(error).startswith(where):
            raise
        raise NumericalFailure(f"{where}: {error}") from error
