"""Hadamard matrices, and the fast product with them.

A Hadamard matrix of order n has entries +-1 and orthogonal rows. Here it is a Kronecker product of Paley's matrices of
order q + 1 (q prime, q = 3 mod 4) and Sylvester's of order 2. Of all ways to factor n the one with the least sum is
taken. Factors that follow each other are multiplied as one matrix while it is small: a pass over x costs more than the
operations that finer factors would save.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

# A larger one costs more than the product behind it.
_LARGEST_ONLINE_FACTOR = 512
# Factors are multiplied as one matrix up to this order: by measurement the fastest of 16 to 256 on CPUs.
_LARGEST_STAGE = 64


def hadamard(order: int) -> Tensor | None:
    """A matrix (order, order) of +-1 with orthogonal rows, float64, or None if the construction does not reach it."""
    factors = hadamard_factors(order)
    return None if factors is None else kronecker(factors)


def kronecker(factors: tuple[int, ...]) -> Tensor:
    """The Kronecker product of the matrices of these orders, the first running fastest."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for factor in factors:
        matrix = torch.kron(paley(factor), matrix)
    return matrix


@lru_cache(maxsize=4096)
def hadamard_factors(order: int) -> tuple[int, ...] | None:
    """Orders of the factors of `hadamard(order)`, falling, the first running fastest; None if there are none.

    Of several ways the one with the least sum, then with the most factors, then with the smallest first factor.
    """
    if order == 1:
        return ()
    found = []
    for factor in range(2, order + 1):
        if order % factor == 0 and has_paley(factor):
            rest = hadamard_factors(order // factor)
            if rest is not None:
                found.append(tuple(sorted((factor, *rest), reverse=True)))
    return min(found, key=lambda factors: (sum(factors), -len(factors), factors), default=None)


def hadamard_blocks(width: int) -> tuple[int, ...]:
    """Widths of the blocks of an online transform of `width` channels.

    One block where a matrix of that order is known whose factors are all cheap, else as many as it takes of the largest
    power of two that divides the width; () for an odd width, which has none.
    """
    factors = hadamard_factors(width)
    if factors is not None and max(factors, default=1) <= _LARGEST_ONLINE_FACTOR:
        return (width,)
    power = width & -width
    return (power,) * (width // power) if power > 1 else ()


def multiply(x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """`x H` with H block-diagonal, orthonormal; x itself if there are no blocks.

    x: (..., k), k the sum of `blocks`. Computed and given in x's type.
    """
    return _multiply(x, blocks, transposed=False)


def multiply_transposed(x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """`x Hᵀ`, which undoes `multiply`."""
    return _multiply(x, blocks, transposed=True)


def _multiply(x: Tensor, blocks: tuple[int, ...], transposed: bool) -> Tensor:
    if not blocks:
        return x
    # Neighbours of one order are multiplied together.
    runs = [(order, len(list(run))) for order, run in itertools.groupby(blocks)]
    parts = x.split([order * count for order, count in runs], dim=-1)
    done = [_block(p.unflatten(-1, (n, m)), m, transposed).flatten(-2) for p, (m, n) in zip(parts, runs, strict=True)]
    return torch.cat(done, dim=-1) if len(done) > 1 else done[0]


def _block(x: Tensor, order: int, transposed: bool) -> Tensor:
    factors = hadamard_factors(order)
    if factors is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
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
    """Runs of factors that are multiplied as one matrix."""
    stages: list[tuple[int, ...]] = []
    for factor in factors:
        if stages and math.prod(stages[-1]) * factor <= _LARGEST_STAGE:
            stages[-1] = (*stages[-1], factor)
        else:
            stages.append((factor,))
    return stages


@lru_cache(maxsize=64)
def _stage_matrix(stage: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # It may first be asked for in inference mode, and later where gradients pass through.
    with torch.inference_mode(False):
        return kronecker(stage).to(device, dtype)


def has_paley(order: int) -> bool:
    """Whether one of the two constructions gives a matrix of this order."""
    q = order - 1
    return order == 2 or (q % 4 == 3 and all(q % d for d in range(2, int(q**0.5) + 1)))


@lru_cache(maxsize=16)
def paley(order: int) -> Tensor:
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
