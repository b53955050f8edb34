"""Rotate the residual stream by an orthogonal matrix: outliers spread over channels; the function is unchanged.

RMSNorm commutes with any rotation Q once its gain is moved into the linears after it (QuaRot, arXiv 2404.00456). So

    embedding E Q;   readers W diag(gain) Q;   writers Qᵀ W and Qᵀ bias;   gains 1;   head W diag(final gain) Q

Only weights change: nothing is rotated online, and attention heads and the MLP's hidden channels keep their basis.

An output head that is tied to the embedding stays tied: E diag(final gain) Q = E Q M with M = Qᵀ diag(final gain) Q, a
block-diagonal matrix like Q that multiplies the head's input. For engines that cannot apply M, the product becomes a
separate table for the head.

Q is diag(random signs) times a Hadamard matrix. `full`: one matrix over the whole width. `groups`: block-diagonal, one
block per quantization group, the last one smaller if need be (as in D2Quant's released program with 128).
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

_COMMON_GROUP_SIZES = (16, 32, 64, 128, 256)
ROTATIONS = ("none", "full", "groups")
# Rows rotated at a time, so that no float64 copy of a whole embedding is needed.
_ROWS = 8192


class ResidualEdit(Protocol):
    """An edit of the whole residual stream that leaves the model's function unchanged."""

    def embedding(self, weight: Tensor) -> Tensor:
        """The embedding's table (n, d), edited."""

    def edit_block_(self, block: Block) -> None:
        """Edit a block loaded in float32, in place."""

    def final_gain(self, gain: Tensor) -> Tensor:
        """The final norm's gain (d,), edited."""

    def head(self, weight: Tensor, gain: Tensor) -> Tensor:
        """The table (n, d) of a head that is not tied, edited. gain: (d,), the final norm's, before the edit."""

    def head_input(self, gain: Tensor) -> tuple[Tensor, ...]:
        """Blocks of the matrix M that multiplies a tied head's input: square, float32; () for none.

        gain: (d,), the final norm's, before the edit.
        """


@dataclass(frozen=True)
class Rotation:
    """A `ResidualEdit` that rotates by an orthogonal block-diagonal matrix Q, after moving gains into linears.

    blocks: Q's blocks, square, float64; their widths add up to the residual stream's.
    """

    blocks: tuple[Tensor, ...]

    def embedding(self, weight: Tensor) -> Tensor:
        """E Q (n, d) for the embedding's table E, float32."""
        return self.rotate_columns(weight.float())

    def edit_block_(self, block: Block) -> None:
        """Move the gains of a block into its linears and rotate it, in place."""
        rotate_block_(block, self)

    def final_gain(self, gain: Tensor) -> Tensor:
        """Ones (d,): the gain moves into the head."""
        return torch.ones_like(gain)

    def head(self, weight: Tensor, gain: Tensor) -> Tensor:
        """W diag(gain) Q (n, d) for the head's table W, float32."""
        return self.rotate_columns(weight.float() * gain.float())

    def head_input(self, gain: Tensor) -> tuple[Tensor, ...]:
        """The blocks of M = Qᵀ diag(gain) Q, float32."""
        widths = [block.shape[0] for block in self.blocks]
        pairs = zip(self.blocks, gain.double().split(widths), strict=True)
        return tuple((block.T @ (gains.unsqueeze(1) * block)).float() for block, gains in pairs)

    def rotate_columns(self, matrix: Tensor) -> Tensor:
        """M Q for M (m, d): computed in float64, returned in M's dtype."""
        widths = [block.shape[0] for block in self.blocks]
        rotated = torch.empty_like(matrix, memory_format=torch.contiguous_format)
        for rows, out in zip(matrix.split(_ROWS), rotated.split(_ROWS), strict=True):
            for source, block, target in zip(rows.split(widths, -1), self.blocks, out.split(widths, -1), strict=True):
                target.copy_(source.double() @ block)
        return rotated

    def rotate_rows(self, matrix: Tensor) -> Tensor:
        """Qᵀ M for M (d, k), or Qᵀ v for v (d,)."""
        return (
            self.rotate_columns(matrix.T).T.contiguous()
            if matrix.dim() == 2
            else self.rotate_columns(matrix.unsqueeze(0))[0]
        )


def make_rotation(name: str, width: int, scheme: Scheme, seed: int, device: torch.device) -> Rotation | None:
    """The rotation called `name`, or None for "none".

    name: one of `ROTATIONS`.
    width: channels of the residual stream.
    scheme: its groups are the blocks of "groups".
    seed: draws the signs.
    Raises `BadRecipe` if the name is unknown or subnibble knows no Hadamard matrix of the right order.
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
                f"rotation {name!r}: subnibble knows no Hadamard matrix of order {size} for a residual stream of "
                f"{width} channels; use {_choices(width)}"
            )
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        # Signs first, then mixing: without signs, a mean common to all channels would end up in one channel.
        blocks.append((matrix * signs.unsqueeze(1) / size**0.5).to(device))
    return Rotation(tuple(blocks))


def block_widths(name: str, width: int, scheme: Scheme) -> list[int]:
    """Block widths of the rotation called `name`, "full" or "groups"; see `make_rotation`."""
    return [width] if name == "full" else [stop - start for start, stop in scheme.group_bounds(width)]


def _choices(width: int) -> str:
    """The rotations that a residual stream of `width` channels allows, for messages."""
    groups = [
        g
        for g in _COMMON_GROUP_SIZES
        if g <= width and offline_hadamard(g) is not None and offline_hadamard(width % g or 1) is not None
    ]
    choices = ['rotation = "none"']
    if offline_hadamard(width) is not None:
        choices.append('"full"')
    if groups:
        choices.append(f'"groups" with a group size of {", ".join(map(str, groups))}')
    return ", or ".join(choices)


def check_rotation(name: str) -> None:
    """Raise `BadRecipe` if `name` is not one of `ROTATIONS`."""
    if name not in ROTATIONS:
        raise BadRecipe(f"rotation is {name!r}; choose one of {', '.join(ROTATIONS)}")


def rotate_block_(block: Block, rotation: Rotation) -> None:
    """Move a block's gains into its linears and rotate its readers and writers, in place."""
    with torch.no_grad():
        for site in block.arch.sites:
            if site.norm is not None:
                gain = block.gain(site.norm)
                for name in site.readers:
                    block.linear(name).weight.mul_(gain)
                gain.fill_(1)
        for name in block.arch.residual.readers:
            weight = block.linear(name).weight
            weight.copy_(rotation.rotate_columns(weight))
        for name in block.arch.residual.writers:
            linear = block.linear(name)
            linear.weight.copy_(rotation.rotate_rows(linear.weight))
            if linear.bias is not None:
                linear.bias.copy_(rotation.rotate_rows(linear.bias))


def can_rotate(arch: Arch) -> bool:
    """Whether a norm feeds every reader of the residual stream, so that its gain can move into the reader."""
    fed_by_norm = {reader for site in arch.sites if site.norm is not None for reader in site.readers}
    return fed_by_norm == set(arch.residual.readers)


def offline_hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix (order, order) of +-1, float64, or None if it cannot be constructed from known factors.

    Unlike the online transform, which minimises work, this uses the factorization with the largest first factor.
    """
    factors = _largest_factors(order)
    return None if factors is None else kronecker(factors)


def _largest_factors(order: int) -> tuple[int, ...] | None:
    """Factors of `order`, each with a Paley matrix, the largest possible first; None if there is no such product."""
    if order == 1:
        return ()
    for factor in sorted((f for f in range(2, order + 1) if order % f == 0 and has_paley(f)), reverse=True):
        other_factors = _largest_factors(order // factor)
        if other_factors is not None:
            return (factor, *other_factors)
    return None
