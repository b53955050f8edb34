"""One block on its way through the pipeline: observed site by site, corrected, rounded, its column scales handed on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from subnibble.arch.site import Site
from subnibble.calibrate.key_center import coding_of
from subnibble.calibrate.prefix import PrefixStep, States, behind
from subnibble.calibrate.stats import value_over
from subnibble.calibrate.stream import BlockStream
from subnibble.corrections.correction import Rounded
from subnibble.corrections.mean_shift import MeanShift
from subnibble.methods.method import Steps
from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.blocks import BlockCall, run_block
from subnibble.model.transformers_api.names import never_called
from subnibble.pipeline.block_tuning import BlockTuning, Tuner
from subnibble.pipeline.input_hook import InputHook
from subnibble.pipeline.observe import Observed, View, Watch, observe, quantized_input
from subnibble.pipeline.plan import Plan
from subnibble.pipeline.prepared import Prepared
from subnibble.pipeline.round import Stack, round_readers, round_stack
from subnibble.pipeline.store import RoundedBlock
from subnibble.pipeline.streams import Streams
from subnibble.report import BlockReport, LinearReport
from subnibble.report.clock import Clock
from subnibble.rounding.rounder import Rounder, Rounding
from subnibble.runtime.kv_cache import Coding
from subnibble.runtime.modules import add_output_bias_, never_ran
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.cache_scheme import CacheScheme
from subnibble.tensor.linear import Linear
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.absorb import can_absorb
from subnibble.transforms.input_basis import InputBasis
from subnibble.tuning.samples import Samples
from subnibble.tuning.train import held_out_loss


@dataclass
class BlockRun:
    """A loaded block, transformed and in the compute type, until its tensors are written.

    exact: every parameter in float32, as transformed: rounded are these, not their copies in the compute type.
    plan: how every linear's weight and input are quantized. bases: in which readers meet their inputs, by name of the
    site. stream: the block as it is quantized, on the quantized model's hidden states; reference: a
    full-precision copy on the full-precision model's; teacher: that copy on `hidden`; None where no step asks. call:
    what the model calls the block with. prefix_step: what the full-precision block makes of the prefix, or None;
    prefix: its keys and values in this block, (heads, tokens, width). tuning: the block's, or None. coding: how its
    cache quantizes, once its keys are as they will run, or None. terms: of what was rounded so far, by name in the
    block, biases aside.
    to_absorb: column scales that another module of the block will take. hooks: on the block while it runs.
    unquantized_tail: outputs before the last norm's readers were rounded, where they are asked for. tuned: what the
    report says of its tuning.
    """

    block: Block
    steps: Steps
    plan: Plan
    clock: Clock
    exact: dict[str, Tensor]
    bases: Mapping[str, InputBasis]
    call: BlockCall
    stream: BlockStream
    reference: BlockStream | None
    teacher: BlockStream | None
    streams: Streams
    prefix_step: PrefixStep | None = None
    prefix: States | None = None
    tuning: BlockTuning | None = None
    coding: Coding | None = None
    terms: dict[str, Linear] = field(default_factory=dict)
    to_absorb: list[tuple[Site, Tensor]] = field(default_factory=list)
    hooks: list[InputHook] = field(default_factory=list)
    linears: dict[str, LinearReport] = field(default_factory=dict)
    unquantized_tail: list[Tensor] = field(default_factory=list)
    tuned: BlockReport | None = None

    @classmethod
    def begin(
        cls,
        prepared: Prepared,
        steps: Steps,
        plan: Plan,
        clock: Clock,
        streams: Streams,
        dtype: torch.dtype,
        tuner: Tuner | None = None,
    ) -> BlockRun:
        """Tune a prepared block, if there is a tuner, and set its streams up. The block is used up."""
        block, bases, call, step = prepared.block, prepared.bases, prepared.call, prepared.prefix
        states = None if step is None else step.states
        before = behind(call, states)
        reference = teacher = tuning = None
        rounds = any(scheme is not None for scheme in plan.of_block(block)[0].values())
        if streams.hidden and tuner is not None and rounds:
            with clock.step("key center"):
                coding = coding_of(block.twin(dtype), plan.cache, streams.hidden, call)
            tuning = tuner(block, bases, states, coding, streams, before)
            reference, states = tuning.reference, tuning.block.prefix
            plan = tuning.plan(plan, block.path)
        elif streams.hidden and (steps.needs_reference or steps.corrects_norms):
            twin = block.twin(dtype)
            reference = BlockStream(twin, streams.wanted, before) if steps.needs_reference else None
            teacher = BlockStream(twin, streams.hidden, before) if steps.corrects_norms else None
        exact = {name: parameter.data for name, parameter in block.module.named_parameters()}
        block.module.to(dtype)
        # Until keys are as they will run there is no cache to ask: `_use_cache` comes then.
        stream = BlockStream(block, streams.hidden, behind(call, states))
        return cls(
            block, steps, plan, clock, exact, bases, call, stream, reference, teacher, streams, step, states, tuning
        )  # fmt: skip

    def correct_norm(self, site: Site) -> None:
        """If the method asks, give the site's norm the bias that undoes the mean shift of what was rounded before."""
        if self.teacher is not None and site.norm is not None and self.terms:
            self._shift(site, site.norm, self.teacher)

    def round_site(self, site: Site) -> None:
        """Observe the site's tensor and round its readers; the block holds them dequantized then."""
        stacks = self._stacks(site)
        observed = self._observe(site, stacks) if stacks and self.hidden else {}
        for stack in stacks:
            self._round(site, stack, observed.get(self._view(stack), Observed()))
        if set(site.readers) & self._key_linears and self.plan.cache is not None:
            self._use_cache(self.plan.cache)

    @property
    def hidden(self) -> list[Tensor]:
        """The block's inputs in the quantized model, batches (windows, tokens, channels)."""
        return self.streams.hidden

    @property
    def _key_linears(self) -> set[str]:
        """Linears whose outputs are keys."""
        return {name for site in self.block.arch.sites for name in site.keys}

    def _use_cache(self, scheme: CacheScheme) -> None:
        """From here on the block runs behind its cache, if steps ask for it. Keys are as they will run by now."""
        with self.clock.step("key center"), self._inputs_of_keys():
            self.coding = coding_of(self.block, scheme, self.hidden, self.call)
        if self.tuning is not None:
            self.tuning.block.use_coding(self.coding)
        if self.steps.sees_cache:
            self.stream = BlockStream(self.block, self.hidden, behind(self.call, self.prefix, self.coding))

    @contextmanager
    def _inputs_of_keys(self) -> Iterator[None]:
        """Quantize the inputs of the linears that write keys, where calibration itself does not."""
        hooks = []
        for site in self.block.arch.sites:
            for name in self._key_linears & set(site.readers) & self.terms.keys():
                site_input, linear = self.terms[name].input, self.block.linear(name)
                if site_input.activation is not None and self.steps.inputs == "exact":
                    view = (site_input.activation, site_input.repeated)
                    hooks.append(
                        InputHook(name, linear, partial(quantized_input, view=view, basis=self.bases[site.name]))
                    )
        try:
            yield
        finally:
            for hook in hooks:
                hook.handle.remove()

    def output_error(self, samples: Samples) -> float:
        """The held-out loss of the block as it is now, on its own operations; see `tuning/train.py`."""

        def output(hidden: Tensor, call: BlockCall) -> Tensor:
            kind = next(self.block.module.parameters()).dtype
            return run_block(self.block.module, hidden.to(kind), behind(call, self.prefix, self.coding))

        return held_out_loss(output, samples)

    def outputs(self) -> list[Tensor]:
        """The block's outputs as it is now."""
        with self.clock.step("forward"):
            return list(self.stream.outputs())

    def advance(self) -> None:
        """Move the streams to behind the block."""
        with self.clock.step("forward"):
            self.stream.advance()
            if self.reference is not None:
                self.reference.advance(None if self.tuning is None else self.tuning.outputs)
        if self.streams.prefix is not None and self.prefix_step is not None:
            self.streams.prefix.move(self.prefix_step)
        # Before the next block is made of these outputs.
        idle = [hook.path for hook in self.hooks if not hook.runs]
        idle += [f"the bias of {self.block.path}.{path}" for path in never_ran(self.block.module)]
        if idle:
            raise never_called(idle[0])
        self.drop_hooks()

    def drop_hooks(self) -> None:
        """Take the hooks off the block. The skeleton keeps its module, which would keep all that the hooks know of."""
        for hook in self.hooks:
            hook.handle.remove()

    def rounded(self) -> RoundedBlock:
        """The block with all of its linears rounded."""
        return RoundedBlock(
            self.block, self.steps, self.terms, self.exact, self.bases, tuple(self.to_absorb), self.prefix,
            self.coding, self.linears,
        )  # fmt: skip

    def _shift(self, site: Site, norm_name: str, teacher: BlockStream) -> None:
        with self.clock.step("mean shift"):
            outputs = zip(teacher.at(site), self.stream.at(site), strict=True)
            gain = self.block.gain(norm_name)
            bias = value_over(MeanShift(gain.shape[0], gain.device), outputs).to(torch.float16).float()
            add_output_bias_(self.block.module.get_submodule(norm_name), bias.to(gain.dtype))
            self.exact[f"{norm_name}.bias"] = bias

    def _observe(self, site: Site, stacks: list[Stack]) -> dict[View, Observed]:
        """Statistics of the site's tensor as each of the stacks sees it, before any is rounded."""
        reference = self.reference if self.steps.rounder_of(site.name).needs_drift else None
        channels = self.block.linear(site.readers[0]).in_features
        device = next(iter(self.exact.values())).device
        sizes = self.steps.correction.needs_sizes
        wanted = itertools.repeat(None) if reference is None else reference.at(site)
        tensors = zip(self.stream.at(site), wanted, strict=reference is not None)
        watch = partial(Watch.of, channels, device, drift=reference is not None, sizes=sizes)
        return observe(tensors, {self._view(stack) for stack in stacks}, self.bases[site.name], watch, self.clock)

    def _view(self, stack: Stack) -> View:
        """How calibration sees the stack's input."""
        if self.steps.inputs == "exact" or stack.activation is None:
            return None
        return stack.activation, stack.repeated

    def _stacks(self, site: Site) -> list[Stack]:
        """The readers to round, together where they share schemes; skipped ones are left out."""
        path = self.block.path
        groups: dict[tuple[Scheme, ActivationScheme | None], list[str]] = {}
        for name in site.readers:
            scheme = self.plan.schemes[f"{path}.{name}"]
            if scheme is not None:
                groups.setdefault((scheme, self.plan.activations[f"{path}.{name}"]), []).append(name)
        stacks = []
        for (scheme, activation), names in groups.items():
            where = f"{path}.{{{', '.join(names)}}}" if len(names) > 1 else f"{path}.{names[0]}"
            heights = tuple(self.block.linear(name).out_features for name in names)
            repeated = 0 if activation is None else self.steps.correction.repeated
            stacks.append(Stack(path, tuple(names), heights, scheme, activation, repeated, where))
        return stacks

    def _round(self, site: Site, stack: Stack, observed: Observed) -> None:
        """Round a stack of the site's readers, and put them back dequantized."""
        natural = torch.cat([self.exact[f"{name}.weight"] for name in stack.names])
        found = round_readers(
            stack, natural, self.bases[site.name], observed, self.steps.correction,
            partial(self._rounded, site, stack), partial(self._absorbs, site, stack), self.clock,
        )  # fmt: skip
        self.terms |= found.terms
        self.linears |= found.linears
        if found.absorbed is not None:
            self.to_absorb.append((site, found.absorbed))
        for name, dense in found.dense.items():
            self._put_back(site, name, stack, dense)

    def _rounded(self, site: Site, stack: Stack, weight: Tensor, seen: Observed) -> Rounded:
        """See `round_stack`; on learned grids if there are any."""
        rounder, correction = self.steps.rounder_of(site.name), self.steps.correction
        how = round_stack if self.tuning is None else self.tuning.round
        found = how(stack, weight, seen, rounder, correction)
        _check_promise(found[0], rounder, stack.where)
        return found

    def _absorbs(self, site: Site, stack: Stack, columns: Tensor) -> bool:
        """Whether what writes the site's tensor can take column scales (k,) of the stack."""
        weights = {name: own.weight.main for name, own in self.terms.items()}
        return can_absorb(site, self.block.heads, stack.names, weights, columns)

    def _put_back(self, site: Site, name: str, stack: Stack, dense: Tensor) -> None:
        """Let the block run on the rounded weight (m, k), and on quantized inputs if the method asks."""
        linear = self.block.linear(name)
        linear.weight.data = dense.to(linear.weight.dtype)
        view = self._view(stack)
        if view is not None:
            basis = self.bases[site.name]
            path = f"the quantized input of {self.block.path}.{name}"
            self.hooks.append(InputHook(path, linear, partial(quantized_input, view=view, basis=basis)))


def better(tuned: BlockRun, base: BlockRun) -> BlockRun:
    """Of a block that was tuned and the same block without tuning, both rounded, the one to keep: of the smaller loss
    on held-out windows, as the block runs.
    """
    tuning = tuned.tuning
    assert tuning is not None
    losses = tuned.output_error(tuning.samples), base.output_error(tuning.samples)
    # Written so that a loss that is not finite is not kept.
    kept, other = (tuned, base) if losses[0] <= losses[1] or not math.isfinite(losses[1]) else (base, tuned)
    other.drop_hooks()
    kept.tuned = tuning.report(tuned.block.path, *losses)
    return kept


def _check_promise(rounding: Rounding, rounder: Rounder, where: str) -> None:
    """Raise `TypeError` if a rounder scaled columns that does not say so: it may be where they meet others."""
    if rounding.coded.columns is not None and not rounder.scales_columns:
        name = type(rounder).__name__
        raise TypeError(f"{where}: {name} scales columns, and its scales_columns says that it does not")
