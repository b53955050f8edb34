"""Rotate the residual stream by an orthogonal matrix: outliers spread over channels, the function stays.

RMSNorm with its gain moved into the linears behind it commutes with any rotation Q (QuaRot, arXiv 2404.00456), so

    embedding E Q;   readers W diag(gain) Q;   writers Qᵀ W and Qᵀ bias;   gains 1;   head W diag(final gain) Q

Weights alone change: nothing is rotated online, heads and the MLP's hidden channels keep their basis. A head that is
tied to the embedding stays so: E diag(final gain) Q = E Q M with M = Qᵀ diag(final gain) Q, which has Q's blocks and
meets the head's input instead; for engines that have no place for it, the product is a table of the head's own. Q is
diag(random signs) times a Hadamard matrix: `full` over the whole width, `groups` a block-diagonal one with a block for
each quantization group, the last one smaller if need be (as D2Quant's released program does with 128).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from subnibble.arch.site import Arch
from subnibble.errors import BadRecipe
from subnibble.model.skeleton import Block
from subnibble.tensor.hadamard import has_paley, kronecker
from subnibble.tensor.scheme import Scheme

_USUAL_GROUPS = (16, 32, 64, 128, 256)
ROTATIONS = ("none", "full", "groups")
# Turned together, so that an embedding's float64 copy is never whole.
_ROWS = 8192


class ResidualEdit(Protocol):
    """An edit of the whole residual stream that keeps the model's function."""

    def embedding(self, weight: Tensor) -> Tensor:
        """The embedding's table (n, d), edited."""

    def edit_block_(self, block: Block) -> None:
        """Edit a block loaded in float32, in place."""

    def final_gain(self, gain: Tensor) -> Tensor:
        """The final norm's gain (d,), edited."""

    def head(self, weight: Tensor, gain: Tensor) -> Tensor:
        """The head's table (n, d), edited, where it is not tied. gain: the final norm's, before the edit."""

    def head_mix(self, gain: Tensor) -> tuple[Tensor, ...]:
        """Square blocks, float32, of what a tied head's input is to be multiplied with; () for nothing."""


@dataclass(frozen=True)
class Rotation:
    """An orthogonal block-diagonal matrix Q. blocks: square, float64, their widths add up to the residual's.

    As `ResidualEdit`, it moves gains into the linears behind them.
    """

    blocks: tuple[Tensor, ...]

    def embedding(self, weight: Tensor) -> Tensor:
        """See `ResidualEdit`."""
        return self.columns(weight.float())

    def edit_block_(self, block: Block) -> None:
        """See `ResidualEdit`."""
        rotate_block_(block, self)

    def final_gain(self, gain: Tensor) -> Tensor:
        """See `ResidualEdit`."""
        return torch.ones_like(gain)

    def head(self, weight: Tensor, gain: Tensor) -> Tensor:
        """See `ResidualEdit`."""
        return self.columns(weight.float() * gain.float())

    def head_mix(self, gain: Tensor) -> tuple[Tensor, ...]:
        """See `ResidualEdit`."""
        widths = [block.shape[0] for block in self.blocks]
        pairs = zip(self.blocks, gain.double().split(widths), strict=True)
        return tuple((block.T @ (part.unsqueeze(1) * block)).float() for block, part in pairs)

    def columns(self, matrix: Tensor) -> Tensor:
        """M Q for M (m, d): computed in float64, given in M's type."""
        widths = [block.shape[0] for block in self.blocks]
        rotated = torch.empty_like(matrix, memory_format=torch.contiguous_format)
        for rows, out in zip(matrix.split(_ROWS), rotated.split(_ROWS), strict=True):
            for part, block, place in zip(rows.split(widths, -1), self.blocks, out.split(widths, -1), strict=True):
                place.copy_(part.double() @ block)
        return rotated

    def rows(self, matrix: Tensor) -> Tensor:
        """Qᵀ M for M (d, k), or Qᵀ v for v (d,)."""
        return self.columns(matrix.T).T.contiguous() if matrix.dim() == 2 else self.columns(matrix.unsqueeze(0))[0]


def make_rotation(name: str, width: int, scheme: Scheme, seed: int, device: torch.device) -> Rotation | None:
    """The rotation called `name` of a residual stream of `width` channels; None for "none".

    scheme: whose groups are the blocks of "groups". seed: draws the signs.
    """
    check_rotation(name)
    if name == "none":
        return None
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for size in block_widths(name, width, scheme):
        matrix = offline_hadamard(size)
        if matrix is None:
            raise BadRecipe(
                f"rotation {name!r}: no Hadamard matrix of order {size} is known here for a residual stream of {width} "
                f"channels; use {_choices(width)}"
            )
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        # Signs first, then mixing: without them a common mean would all go to one channel.
        blocks.append((matrix * signs.unsqueeze(1) / size**0.5).to(device))
    return Rotation(tuple(blocks))


def block_widths(name: str, width: int, scheme: Scheme) -> list[int]:
    """Widths of the blocks of the rotation called `name`, "full" or "groups"; see `make_rotation`."""
    return [width] if name == "full" else [stop - start for start, stop in scheme.group_bounds(width)]


def _choices(width: int) -> str:
    """The rotations that a width allows, for messages."""
    groups = [
        g
        for g in _USUAL_GROUPS
        if g <= width and offline_hadamard(g) is not None and offline_hadamard(width % g or 1) is not None
    ]
    choices = ['rotation = "none"']
    if offline_hadamard(width) is not None:
        choices.append('"full"')
    if groups:
        choices.append(f'"groups" with a group size of {", ".join(map(str, groups))}')
    return ", or ".join(choices)


def check_rotation(name: str) -> None:
    """Raise `BadRecipe` for an unknown name."""
    if name not in ROTATIONS:
        raise BadRecipe(f"rotation is {name!r}; choose one of {', '.join(ROTATIONS)}")


def rotate_block_(block: Block, rotation: Rotation) -> None:
    """Move the block's gains into its linears, and the block into the rotated basis, in place."""
    with torch.no_grad():
        for site in block.arch.sites:
            if site.norm is not None:
                gain = block.gain(site.norm)
                for name in site.readers:
                    block.linear(name).weight.mul_(gain)
                gain.fill_(1)
        for name in block.arch.residual.readers:
            weight = block.linear(name).weight
            weight.copy_(rotation.columns(weight))
        for name in block.arch.residual.writers:
            linear = block.linear(name)
            linear.weight.copy_(rotation.rows(linear.weight))
            if linear.bias is not None:
                linear.bias.copy_(rotation.rows(linear.bias))


def can_rotate(arch: Arch) -> bool:
    """Whether every reader of the residual stream has a norm of its own site, whose gain can move into it."""
    behind = {reader for site in arch.sites if site.norm is not None for reader in site.readers}
    return behind == set(arch.residual.readers)


def offline_hadamard(order: int) -> Tensor | None:
    """A matrix (order, order) of +-1 with orthogonal rows, float64, or None if the construction does not reach it.

    Other than online, where work counts, of the ways to factor the order the one with the largest first factor.
    """
    factors = _largest_factors(order)
    return None if factors is None else kronecker(factors)


def _largest_factors(order: int) -> tuple[int, ...] | None:
    if order == 1:
        return ()
    for factor in sorted((f for f in range(2, order + 1) if order % f == 0 and has_paley(f)), reverse=True):
        rest = _largest_factors(order // factor)
        if rest is not None:
            return (factor, *rest)
    return None
