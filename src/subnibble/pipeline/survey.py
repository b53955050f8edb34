"""What must be known of the full-precision model before its first block is quantized; and the streams there."""

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
from subnibble.pipeline.streams import Streams, batches, embedded, embedded_prefix, past
from subnibble.report.clock import Clock
from subnibble.runtime import ops
from subnibble.tensor.cache_scheme import PrefixIds
from subnibble.tensor.packed import PackedTensor
from subnibble.transforms.residual_order import residual_order
from subnibble.transforms.rotate import ResidualEdit

# As many as PrefixQuant looks at.
_WINDOWS_FOR_SINKS = 64


@dataclass(frozen=True)
class Survey:
    """windows: (n, t) ids of calibration text, None without. edit: of the residual stream, None for none. prefix: the
    system prompt's, None for none.
    """

    windows: Tensor | None
    edit: ResidualEdit | None
    prefix: PrefixIds | None


def survey(resolved: Resolved, windows: Tensor | None, table: Tensor, clock: Clock) -> Survey:
    """Run the full-precision model on the windows where a step asks for its sink tokens or its channels' order.

    windows: (n, t) ids, None without calibration. table: the embedding's, (tokens, channels), as it is.
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


def start(resolved: Resolved, found: Survey, table: Tensor, stored: PackedTensor | Tensor) -> Streams:
    """The streams before the first block. table: the embedding's, exact and edited. stored: the same as it will run."""
    skeleton, windows = resolved.skeleton, found.windows
    prefix = embedded_prefix(skeleton, found.prefix, table)
    if windows is None:
        return Streams([], [], [BlockCall({})] * skeleton.num_blocks, prefix)
    streams = Streams([], [], skeleton.block_calls(resolved.recipe.window, past=past(found.prefix)), prefix)
    for ids in batches(windows):
        if isinstance(stored, PackedTensor):
            streams.hidden.append(ops.embedding(ids.to(table.device), stored, skeleton.dtype).cpu())
        else:
            streams.hidden.append(embedded(ids, stored, skeleton.dtype))
        if resolved.steps.needs_reference:
            streams.full_precision.append(embedded(ids, table, skeleton.dtype))
    return streams


def _sinks(resolved: Resolved, windows: Tensor, table: Tensor) -> PrefixIds:
    """The prefix of the model's own sink tokens."""
    source = resolved.skeleton.source
    sinks = sink_tokens(_blocks(resolved, None, windows, table), windows)
    prefix = sink_prefix(sinks, source.load_tokenizer())
    check_tokens(resolved.recipe, source, prefix, "the prefix of sink tokens")
    return prefix


def _blocks(
    resolved: Resolved, prefix: PrefixIds | None, windows: Tensor, table: Tensor
) -> Iterator[tuple[Block, BlockStream]]:
    """The model's blocks as they come, on all windows."""
    skeleton, window = resolved.skeleton, resolved.recipe.window
    hidden = [embedded(ids, table, skeleton.dtype) for ids in batches(windows)]
    calls = skeleton.block_calls(window, past=past(prefix))
    return full_precision_blocks(skeleton, hidden, calls, embedded_prefix(skeleton, prefix, table))
