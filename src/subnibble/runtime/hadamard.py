"""Hadamard matrices, and the fast product with them.

A Hadamard matrix of order n has entries +-1 and orthogonal rows. Here it is a Kronecker product of Paley's matrices of
order q + 1 (q prime, q = 3 mod 4; largest factors first) and Sylvester's of order 2, so that `x H` needs one small
dense product for each Paley factor and additions alone for the rest.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor | None:
    """A matrix (order, order) of +-1 with orthogonal rows, float64, or None if the construction does not reach it."""
    factors = hadamard_factors(order)
    if factors is None:
        return None
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for factor in factors:
        matrix = torch.kron(_paley(factor), matrix)
    return matrix


@lru_cache(maxsize=256)
def hadamard_factors(order: int) -> tuple[int, ...] | None:
    """Orders of the factors of `hadamard(order)`, the last of the Kronecker product first; None if there is none."""
    if order == 1:
        return ()
    for factor in sorted((f for f in range(2, order + 1) if order % f == 0 and _has_paley(f)), reverse=True):
        rest = hadamard_factors(order // factor)
        if rest is not None:
            return (factor, *rest)
    return None


def hadamard_blocks(width: int) -> tuple[int, ...]:
    """Widths of the blocks of an orthogonal transform of `width` channels: one block where a matrix of that order is
    known, else as many as it takes of the largest power of two that divides the width.
    """
    return (width,) if hadamard_factors(width) is not None else (width & -width,) * (width // (width & -width))


def multiply(x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """`x H` with H block-diagonal, orthonormal. x: (..., k), k the sum of `blocks`. Computed and given in x's type."""
    parts = x.split(list(blocks), dim=-1)
    return torch.cat([_multiply(part, block, False) for part, block in zip(parts, blocks, strict=True)], dim=-1)


def multiply_transposed(x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """`x Hᵀ`, which undoes `multiply`."""
    parts = x.split(list(blocks), dim=-1)
    return torch.cat([_multiply(part, block, True) for part, block in zip(parts, blocks, strict=True)], dim=-1)


def _multiply(x: Tensor, order: int, transposed: bool) -> Tensor:
    factors = hadamard_factors(order)
    if factors is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    shape, inner = x.shape, 1
    y = x
    for factor in factors:
        # The last factor of the Kronecker product runs fastest: view (..., outer, factor, inner).
        y = y.reshape(*shape[:-1], -1, factor, inner)
        if factor == 2:
            first, second = y.unbind(-2)
            y = torch.stack([first + second, first - second], dim=-2)
        else:
            matrix = _paley(factor).to(y)
            y = torch.einsum("...fi,fg->...gi", y, matrix.T if transposed else matrix)
        y = y.reshape(shape)
        inner *= factor
    result: Tensor = y / order**0.5
    return result


def _has_paley(order: int) -> bool:
    q = order - 1
    return order == 2 or (q % 4 == 3 and all(q % d for d in range(2, int(q**0.5) + 1)))


@lru_cache(maxsize=16)
def _paley(order: int) -> Tensor:
    """Sylvester's for 2, else Paley's first construction on the prime `order - 1`; on the CPU, as it is kept."""
    cpu = torch.device("cpu")
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device=cpu)
    q = order - 1
    residues = {i * i % q for i in range(1, q)}
    character = torch.tensor(
        [0.0] + [1.0 if i in residues else -1.0 for i in range(1, q)], dtype=torch.float64, device=cpu
    )
    index = (torch.arange(q, device=cpu).unsqueeze(1) - torch.arange(q, device=cpu).unsqueeze(0)) % q
    matrix = torch.ones(order, order, dtype=torch.float64, device=cpu)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = character[index] + torch.eye(q, dtype=torch.float64, device=cpu)
    return matrix
