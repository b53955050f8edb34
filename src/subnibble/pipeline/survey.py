"""Survey the full-precision model before the first block is quantized, and start the streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from subnibble.calibrate.prompt import AUTO, sink_prefix
from subnibble.calibrate.sinks import sink_tokens
from subnibble.calibrate.stream import BlockStream
from subnibble.calibrate.survey import full_precision_blocks
from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.blocks import BlockCall
from subnibble.pipeline.check import check_tokens
from subnibble.pipeline.plan import Resolved
from subnibble.pipeline.streams import Streams, batches, embedded, embedded_prefix, prefix_length
from subnibble.report.clock import Clock
from subnibble.runtime import ops
from subnibble.tensor.cache_scheme import PrefixIds
from subnibble.tensor.packed import PackedTensor
from subnibble.transforms.residual_order import residual_order
from subnibble.transforms.rotate import ResidualEdit

# The number of windows that PrefixQuant uses.
_WINDOWS_FOR_SINKS = 64


@dataclass(frozen=True)
class Survey:
    """Results of the survey.

    windows: (n, t) token ids of the calibration text, None without calibration.
    edit: rotation or channel order of the residual stream, or None.
    prefix: token ids of the system prompt, or None.
    """

    windows: Tensor | None
    edit: ResidualEdit | None
    prefix: PrefixIds | None


def takes_passes(resolved: Resolved, windows: Tensor | None) -> bool:
    """Whether the survey runs the full-precision model. windows: (n, t) token ids, None without calibration."""
    return windows is not None and (resolved.recipe.system_prompt == AUTO or resolved.steps.orders_residual)


def survey(resolved: Resolved, windows: Tensor | None, table: Tensor, clock: Clock) -> Survey:
    """Find the model's sink tokens and a channel order of its residual stream, if a step needs them.

    Each of these two searches runs the full-precision model on calibration windows.

    windows: (n, t) token ids, None without calibration.
    table: (vocabulary, channels), the original embedding.
    """
    edit: ResidualEdit | None = resolved.rotation
    prefix = resolved.prefix
    if windows is not None:
        with clock.step("survey"):
            if resolved.recipe.system_prompt == AUTO:
                prefix = _sinks(resolved, windows[:_WINDOWS_FOR_SINKS], table)
            if resolved.steps.orders_residual:
                edit = residual_order(_blocks(resolved, prefix, windows, table))
    return Survey(windows, edit, prefix)


def start(resolved: Resolved, surveyed: Survey, table: Tensor, stored: PackedTensor | Tensor) -> Streams:
    """Embed the windows and the prompt prefix: the streams before the first block.

    table: (vocabulary, channels), the embedding after rotation or reordering, not quantized.
    stored: the same embedding in the form that the packed model will use, packed or in 16 bits.
    """
    skeleton, windows = resolved.skeleton, surveyed.windows
    prefix = embedded_prefix(skeleton, surveyed.prefix, table)
    if windows is None:
        return Streams([], [], [BlockCall({})] * skeleton.num_blocks, prefix)
    streams = Streams(
        [], [], skeleton.block_calls(resolved.recipe.window, prefix_length=prefix_length(surveyed.prefix)), prefix
    )
    for ids in batches(windows):
        if isinstance(stored, PackedTensor):
            streams.hidden.append(ops.embedding(ids.to(table.device), stored, skeleton.dtype).cpu())
        else:
            streams.hidden.append(embedded(ids, stored, skeleton.dtype))
        if resolved.steps.needs_reference:
            streams.full_precision.append(embedded(ids, table, skeleton.dtype))
    return streams


def _sinks(resolved: Resolved, windows: Tensor, table: Tensor) -> PrefixIds:
    """The prompt prefix that consists of the tokens that act as attention sinks on these windows."""
    source = resolved.skeleton.source
    sinks = sink_tokens(_blocks(resolved, None, windows, table), windows)
    prefix = sink_prefix(sinks, source.load_tokenizer())
    check_tokens(resolved.recipe, source, prefix, "the prefix of sink tokens")
    return prefix


def _blocks(
    resolved: Resolved, prefix: PrefixIds | None, windows: Tensor, table: Tensor
) -> Iterator[tuple[Block, BlockStream]]:
    """Load the full-precision model's blocks one after the other; yield each with the windows' `BlockStream`."""
    skeleton, window = resolved.skeleton, resolved.recipe.window
    hidden = [embedded(ids, table, skeleton.dtype) for ids in batches(windows)]
    calls = skeleton.block_calls(window, prefix_length=prefix_length(prefix))
    return full_precision_blocks(skeleton, hidden, calls, embedded_prefix(skeleton, prefix, table))
