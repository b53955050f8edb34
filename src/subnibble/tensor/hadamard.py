"""Hadamard matrices, and the fast product with them.

A Hadamard matrix of order n has entries +-1 and orthogonal rows. Here it is a Kronecker product of Paley's matrices of
order q + 1 (q prime, q = 3 mod 4) and Sylvester's of order 2. Of all factorizations of n, the one with the least sum is
used. Adjacent factors are multiplied as one matrix while it is small: another pass over x costs more than the
operations that finer factors would save.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

# Multiplying by a larger factor costs more than multiplying by the linear's weight afterwards.
_LARGEST_ONLINE_FACTOR = 512
# Adjacent factors are multiplied as one matrix up to this order: measured as the fastest of 16 to 256 on CPUs.
_LARGEST_STAGE = 64


def hadamard(order: int) -> Tensor | None:
    """Hadamard matrix (order, order) of +-1, float64, or None if the construction does not cover this order."""
    factors = hadamard_factors(order)
    return None if factors is None else kronecker(factors)


def kronecker(factors: tuple[int, ...]) -> Tensor:
    """The Kronecker product of `paley` matrices of these orders, float64; the index of the first runs fastest."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for factor in factors:
        matrix = torch.kron(paley(factor), matrix)
    return matrix


@lru_cache(maxsize=4096)
def hadamard_factors(order: int) -> tuple[int, ...] | None:
    """Orders of the factors of `hadamard(order)`, in descending order; None if there is no factorization.

    Of several factorizations it is the one with the least sum, then the most factors, then the smallest first factor.
    """
    if order == 1:
        return ()
    factorizations = []
    for factor in range(2, order + 1):
        if order % factor == 0 and has_paley(factor):
            others = hadamard_factors(order // factor)
            if others is not None:
                factorizations.append(tuple(sorted((factor, *others), reverse=True)))
    return min(factorizations, key=lambda factors: (sum(factors), -len(factors), factors), default=None)


def hadamard_blocks(width: int) -> tuple[int, ...]:
    """Block widths of an online Hadamard transform of `width` channels.

    One block if a matrix of that order can be constructed from factors that are all cheap. Otherwise equal blocks of
    the largest power of two that divides the width; () for an odd width, which has no such block.
    """
    factors = hadamard_factors(width)
    if factors is not None and max(factors, default=1) <= _LARGEST_ONLINE_FACTOR:
        return (width,)
    power = width & -width
    return (power,) * (width // power) if power > 1 else ()


def multiply(x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Compute `x H` with H block-diagonal and orthonormal; return x itself if there are no blocks.

    x: (..., k), k the sum of `blocks`.
    blocks: widths of the blocks.
    Returns (..., k), computed in x's dtype.
    """
    return _multiply(x, blocks, transposed=False)


def multiply_transposed(x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Compute `x Hᵀ`, the inverse of `multiply`; same arguments."""
    return _multiply(x, blocks, transposed=True)


def runs(blocks: tuple[int, ...]) -> list[tuple[int, int]]:
    """(order, number of blocks) for each run of adjacent blocks of one order."""
    return [(order, len(list(run))) for order, run in itertools.groupby(blocks)]


def stage_matrices(order: int) -> list[Tensor]:
    """Matrices that `multiply` applies to a block one after the other, float32; they lack the factor order ** -0.5.

    Their Kronecker product is the Hadamard matrix; the index of the first one runs fastest.
    """
    factors = hadamard_factors(order)
    assert factors is not None
    return [_stage_matrix(stage, torch.float32, torch.device("cpu")) for stage in _stages(factors)]


def _multiply(x: Tensor, blocks: tuple[int, ...], transposed: bool) -> Tensor:
    if not blocks:
        return x
    # Adjacent blocks of one order are multiplied together.
    runs_of_blocks = runs(blocks)
    chunks = x.split([order * count for order, count in runs_of_blocks], dim=-1)
    products = [
        _block(chunk.unflatten(-1, (count, order)), order, transposed).flatten(-2)
        for chunk, (order, count) in zip(chunks, runs_of_blocks, strict=True)
    ]
    return torch.cat(products, dim=-1) if len(products) > 1 else products[0]


def _block(x: Tensor, order: int, transposed: bool) -> Tensor:
    factors = hadamard_factors(order)
    if factors is None:
        raise ValueError(
            f"no Hadamard matrix of order {order} can be constructed here; take block widths from `hadamard_blocks`"
        )
    y, inner = x, 1
    for stage in _stages(factors):
        matrix = _stage_matrix(stage, x.dtype, x.device)
        matrix, size = matrix.T if transposed else matrix, matrix.shape[0]
        # The first factor of the Kronecker product runs fastest: view (outer, stage, inner).
        y = y.reshape(-1, size) @ matrix if inner == 1 else matrix.T @ y.reshape(-1, size, inner)
        inner *= size
    result: Tensor = y.reshape(x.shape) / order**0.5
    return result


def _stages(factors: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Group adjacent factors that are multiplied as one matrix."""
    stages: list[tuple[int, ...]] = []
    for factor in factors:
        if stages and math.prod(stages[-1]) * factor <= _LARGEST_STAGE:
            stages[-1] = (*stages[-1], factor)
        else:
            stages.append((factor,))
    return stages


@lru_cache(maxsize=64)
def _stage_matrix(stage: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # The cache may be filled in inference mode and read later by a pass that needs gradients.
    with torch.inference_mode(False):
        return kronecker(stage).to(device, dtype)


def has_paley(order: int) -> bool:
    """Whether Sylvester's or Paley's construction gives a matrix of this order."""
    q = order - 1
    return order == 2 or (q % 4 == 3 and all(q % d for d in range(2, int(q**0.5) + 1)))


@lru_cache(maxsize=16)
def paley(order: int) -> Tensor:
    """Sylvester's matrix for order 2, else Paley's first construction on the prime `order - 1`.

    Float64, always on the CPU because it is cached.
    """
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
