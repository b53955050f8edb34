"""Rounders, whole numbers that they round, and `golden_codes.json`: the codes that they must give on every machine.

Weights are whole numbers times a power of two, Gram matrices and drifts whole numbers; all are exact in float64. What
is computed of them is not, but every code, stored scale and zero-point is far from where it would change:
`disturbed` inputs give the same ones. A change that is meant to change codes writes the file anew:

    PYTHONPATH=src python tests/rounding/golden_codes.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subnibble.rounding.dual_scale import DualScale, RowScale
from subnibble.rounding.gptaq import Asymmetry
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.grid import Clip
from subnibble.rounding.rounder import Rounder
from subnibble.rounding.rtn import RTN
from subnibble.tensor.scheme import Scheme

FILE = Path(__file__).with_suffix(".json")
# Groups of 16 and 32 do not divide it.
COLUMNS, ROWS, TOKENS = 40, 4, 96
UNFED = 11
# Far above what float32 sums differ by when they are taken in another order.
DISTURBANCE = 1e-6

W2, W3, W4 = (Scheme(bits, 16, "integer") for bits in (2, 3, 4))
SYMMETRIC, REAL, WIDE = Scheme(3, 16, "none"), Scheme(2, 16, "real", "bfloat16"), Scheme(8, -1, "none")
SIGN2, SIGN3 = Scheme(2, 16, "none", grid="sign"), Scheme(3, -1, "none", grid="sign")
MX = Scheme(4, 32, "none", "e8m0", "mxfp4")
MINMAX, MSE, POWER = Clip("minmax"), Clip("mse"), Clip("mse", 2.4)


class Case(NamedTuple):
    """rounder: with its settings. scheme: of its codes. salt: of its inputs."""

    rounder: Rounder
    scheme: Scheme
    salt: int


def drifting(form: str, alpha: float = 0.25) -> GPTQ:
    # Three blocks: the released form is another one across them.
    return GPTQ(MINMAX, block=16, asymmetry=Asymmetry(form, alpha))


CASES = {
    "rtn": Case(RTN(MINMAX), W4, 1),
    "rtn searched": Case(RTN(MSE), SYMMETRIC, 2),
    "rtn searched, weighted": Case(RTN(POWER, "hessian"), W2, 3),
    "rtn real": Case(RTN(MSE), REAL, 4),
    "rtn whole rows": Case(RTN(MINMAX), WIDE, 5),
    "rtn sign": Case(RTN(MSE), SIGN2, 6),
    "rtn three signs": Case(RTN(MSE), SIGN3, 7),
    "rtn mxfp4": Case(RTN(MINMAX), MX, 8),
    "rtn mxfp4 searched": Case(RTN(MSE), MX, 9),
    "gptq natural": Case(GPTQ(MINMAX, order="natural"), W3, 10),
    "gptq natural real": Case(GPTQ(MSE, order="natural"), REAL, 11),
    "gptq": Case(GPTQ(MINMAX), W3, 22),
    "gptq searched": Case(GPTQ(POWER), SYMMETRIC, 13),
    "gptq weighted": Case(GPTQ(MSE, weighting="hessian"), W2, 14),
    "gptq swept": Case(GPTQ(MINMAX, sweeps=2), W2, 15),
    "gptq sign": Case(GPTQ(MSE), SIGN2, 17),
    "gptq mxfp4": Case(GPTQ(MSE), MX, 18),
    "gptaq released": Case(drifting("released"), W3, 18),
    "gptaq corrected": Case(drifting("corrected"), W3, 18),
    "gptaq shifted": Case(drifting("shifted", 0.5), W3, 18),
    "row scale": Case(GPTQ(RowScale(MSE, 4), weighting="hessian"), REAL, 19),
    "dual scale": Case(GPTQ(DualScale(MSE, 4), weighting="hessian"), REAL, 20),
    "dual scale sign": Case(RTN(DualScale(MSE, 4)), SIGN2, 21),
}


class Inputs(NamedTuple):
    """weight: (m, k). gram: (k, k), sum of x xᵀ. drift: (k, k), sum of (x~ - x) xᵀ. All float64."""

    weight: Tensor
    gram: Tensor
    drift: Tensor


def whole(rows: int, columns: int, largest: int, salt: int) -> Tensor:
    """(rows, columns) float64 whole numbers from -largest to largest, by a formula without a pattern to the eye."""
    i, j = torch.arange(rows).unsqueeze(1) + 1, torch.arange(columns).unsqueeze(0) + 1
    value = (7919 * i + 104729 * j + 1299709 * salt) % 65521
    value = (value * value + 31 * i + 57 * j) % 65521
    value = value * value % 65521
    return (value % (2 * largest + 1) - largest).double()


def inputs_of(salt: int) -> Inputs:
    """Weights with an outlier and a group of zeros, the others odd numbers over 512, which lie in the middle of no two
    levels of MXFP4; correlated inputs, one channel never fed.
    """
    weight = (2 * (whole(ROWS, COLUMNS, 70, 5 * salt) + whole(ROWS, COLUMNS, 70, 5 * salt + 1)) + 1) / 512
    weight[0, 5], weight[2, 16:32] = 895 / 512, 0
    x = whole(TOKENS, COLUMNS, 7, 5 * salt + 2) + whole(TOKENS, 1, 5, 5 * salt + 3)
    x[:, 7] *= 8
    x[:, UNFED] = 0
    full = x + whole(TOKENS, COLUMNS, 2, 5 * salt + 4) + x.roll(1, 1)
    return Inputs(weight, x.T @ x, (full - x).T @ x)


def disturbed(inputs: Inputs, salt: int) -> Inputs:
    """Every number moved by up to `DISTURBANCE` of itself; the Gram matrix stays symmetric."""

    def changed(matrix: Tensor, symmetric: bool = False) -> Tensor:
        share = whole(*matrix.shape, 1000, 7 * salt + matrix.shape[0]) / 1000
        share = (share + share.T) / 2 if symmetric else share
        return matrix * (1 + DISTURBANCE * share)

    return Inputs(changed(inputs.weight), changed(inputs.gram, symmetric=True), changed(inputs.drift))


def codes_of(case: Case, inputs: Inputs) -> dict[str, Any]:
    """What a rounder makes, as the file has it: a row of codes as hexadecimal digits, two a code at 8 bits."""
    weight = inputs.weight if isinstance(case.rounder, GPTQ) else inputs.weight.float()
    quantized = case.rounder(weight, inputs.gram, case.scheme, "a linear", inputs.drift).quantized
    digits = 2 if case.scheme.bits == 8 else 1
    result: dict[str, Any] = {
        "codes": ["".join(f"{code:0{digits}x}" for code in row) for row in quantized.codes.tolist()],
        "scales": quantized.scales.tolist(),
    }
    if quantized.zeros is not None:
        # -0 and 0 are one.
        result["zeros"] = (quantized.zeros + 0.0).tolist()
    if quantized.column_scales is not None:
        # Of what absorbs them, or as they are stored.
        result["columns"] = quantized.column_scales.half().tolist()
    return result


def to_text(golden: dict[str, dict[str, Any]]) -> str:
    """JSON, a row of a matrix a line."""
    cases = []
    for name, parts in golden.items():
        lines = [
            f'    "{part}": [\n' + ",\n".join(f"      {json.dumps(row)}" for row in rows) + "\n    ]"
            if part != "columns" else f'    "{part}": {json.dumps(rows)}'
            for part, rows in parts.items()
        ]  # fmt: skip
        cases.append(f'  "{name}": {{\n' + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(cases) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(to_text({name: codes_of(case, inputs_of(case.salt)) for name, case in CASES.items()}))
