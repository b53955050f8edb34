"""Check that a site table describes this checkpoint: every edit it accepts must leave the block's output unchanged.

Runs at load on the first two blocks. A wrong table (it misses a second norm after the linear, or lists a gate as a
writer) would otherwise damage the model silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from subnibble.arch.site import Heads, Site
from subnibble.calibrate.stream import check_finite
from subnibble.errors import UnsupportedModel
from subnibble.model.skeleton import Block, Skeleton
from subnibble.model.transformers_api.blocks import BlockCall, run_block
from subnibble.transforms.permute import permute_residual_, permute_site_
from subnibble.transforms.scale import scale_site_

_TOKENS = 12
# float32 rounding changes the update that a block adds by about 1e-6 of its size, a wrong table by 1e-2 or more.
_TOLERANCE = 1e-3
# A smaller update (of an idle block, for example) drowns in float32 rounding: divide by this fraction of the hidden
# states' size instead.
_SMALLEST_UPDATE = 1e-3


def check_sites(skeleton: Skeleton) -> None:
    """Check the site table on the first two blocks in float32.

    Raises `UnsupportedModel`, naming the edit, if an edit changes a block's output.
    """
    calls = skeleton.block_calls(_TOKENS)
    for index in range(min(2, skeleton.num_blocks)):
        block = skeleton.load_block(index)
        errors = list(edit_errors(block, calls[index].to(torch.float32)))
        skeleton.release(block.path)
        for error, edit in errors:
            # Not `error > _TOLERANCE`: this form also catches NaN.
            if not error <= _TOLERANCE:
                raise UnsupportedModel(
                    f"{skeleton.source.path}: the {skeleton.arch.model_type} site table does not describe "
                    f"{block.path}: the edit '{edit}' should leave the block's output unchanged but changes it by "
                    f"{error:.1e} of its update; check model_type in config.json"
                )


def edit_errors(block: Block, call: BlockCall, seed: int = 0) -> Iterator[tuple[float, str]]:
    """Try every edit that the site table accepts, on random hidden states.

    block: in float32.
    call: what the model calls the block with.
    seed: draws the hidden states and the edits.
    Yields (change of the output relative to the block's update, name of the edit).
    """
    generator = torch.Generator().manual_seed(seed)
    weight = next(block.module.parameters())
    width = block.gain(block.arch.residual.norms[0]).shape[0]
    hidden = torch.randn(1, _TOKENS, width, generator=generator).to(weight)
    before = _run(block.module, hidden, call)
    # To copy a block takes as long as to run it: one copy serves all edits.
    scratch = block.copy()
    for site in block.arch.sites:
        if "scale" in site.edits:
            factors = (torch.rand(_writer_channels(block, site), generator=generator) * 2 - 1).exp().to(weight)
            yield _change(block, scratch, hidden, before, call, _scaling(site, factors)), f"scale {site.name}"
        if "permute" in site.edits:
            order = _random_order(block, site, generator).to(weight.device)
            yield _change(block, scratch, hidden, before, call, _permuting(site, order)), f"permute {site.name}"
    order = torch.randperm(width, generator=generator).to(weight.device)
    yield _residual_change(block, scratch, hidden, before, call, order), "permute the residual stream"


def _scaling(site: Site, factors: Tensor) -> Callable[[Block], None]:
    return lambda block: scale_site_(block, site, factors)


def _permuting(site: Site, order: Tensor) -> Callable[[Block], None]:
    return lambda block: permute_site_(block, site, order)


def _change(
    block: Block, scratch: Block, hidden: Tensor, before: Tensor, call: BlockCall, edit: Callable[[Block], None]
) -> float:
    """Relative change of the block's output `before` by an edit of its copy `scratch`."""
    _restore_(scratch, block)
    edit(scratch)
    after = _run(scratch.module, hidden, call)
    return _relative(after - before, before, hidden, block)


def _residual_change(
    block: Block, scratch: Block, hidden: Tensor, before: Tensor, call: BlockCall, order: Tensor
) -> float:
    """As `_change`, if the residual channels of block, input and output are reordered."""
    _restore_(scratch, block)
    permute_residual_(scratch, block.arch.residual, order)
    after = _run(scratch.module, hidden[..., order], call)
    return _relative(after - before[..., order], before, hidden, block)


def _restore_(scratch: Block, block: Block) -> None:
    """Give a copy of the block, whose parameters were edited in place, the block's values again."""
    with torch.no_grad():
        for edited, original in zip(scratch.module.parameters(), block.module.parameters(), strict=True):
            edited.copy_(original)


def _relative(change: Tensor, before: Tensor, hidden: Tensor, block: Block) -> float:
    """Norm of `change` divided by the norm of the block's update `before - hidden`."""
    check_finite(before, f"{block.path}: its output")
    floor = _SMALLEST_UPDATE * hidden.norm()
    return float(change.norm() / torch.maximum((before - hidden).norm(), floor))


def _run(module: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    with torch.no_grad():
        return run_block(module, hidden, call)


def _writer_channels(block: Block, site: Site) -> int:
    """Number of channels that the norm, or each linear, before the site writes."""
    if site.norm is not None:
        return block.gain(site.norm).shape[0]
    return block.linear(site.writers[0]).out_features


def _random_order(block: Block, site: Site, generator: torch.Generator) -> Tensor:
    """A random order as `permute_site_` takes it: (channels,), or (key_value, width) if the site is per head."""
    if not site.per_head:
        return torch.randperm(_writer_channels(block, site), generator=generator)
    heads: Heads = block.heads
    orders = [torch.randperm(heads.width, generator=generator) for _ in range(heads.key_value)]
    return torch.stack(orders)
