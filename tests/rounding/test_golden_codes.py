"""Rounders give the codes that they always gave; see `golden_codes.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden_codes import CASES, FILE, UNFED, Case, codes_of, disturbed, inputs_of, to_text

from subnibble.rounding import gptq
from subnibble.rounding.gptaq import Asymmetry
from subnibble.rounding.grid import Clip

GOLDEN = json.loads(FILE.read_text())
every_case = pytest.mark.parametrize("name", CASES)
IN_LOOP = [name for name in CASES if name.startswith(("gptq", "gptaq"))]


def test_every_case_has_codes() -> None:
    assert list(GOLDEN) == list(CASES)
    assert to_text(GOLDEN) == FILE.read_text()


@every_case
def test_codes_are_what_they_were(name: str) -> None:
    assert codes_of(CASES[name], inputs_of(CASES[name].salt)) == GOLDEN[name]


@every_case
def test_no_code_is_near_to_where_it_would_change(name: str) -> None:
    inputs = inputs_of(CASES[name].salt)
    for salt in range(6):
        changed = disturbed(inputs, salt)
        assert not torch.equal(changed.weight, inputs.weight)
        assert codes_of(CASES[name], changed) == GOLDEN[name]


@pytest.mark.parametrize("salt", sorted({case.salt for case in CASES.values()}))
def test_inputs_are_whole_numbers_that_float64_holds(salt: int) -> None:
    weight, gram, drift = inputs_of(salt)
    for matrix in (weight * 512, gram, drift):
        assert torch.equal(matrix, matrix.round())
        assert float(matrix.abs().max()) < 2**24
    assert float(gram.diagonal()[UNFED]) == 0
    assert int((gram.diagonal() == 0).sum()) == 1


def changed(name: str, rounder: Any) -> bool:
    case = CASES[name]
    return codes_of(Case(rounder, case.scheme, case.salt), inputs_of(case.salt)) != GOLDEN[name]


@pytest.mark.parametrize("name", IN_LOOP)
def test_a_column_whose_error_is_dropped_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    factorize = gptq.factorize

    def without_one(*args: Any) -> gptq.Factor:
        factor = factorize(*args)
        u = factor.u.clone()
        u[3, 4:] = 0
        return replace(factor, u=u)

    monkeypatch.setattr(gptq, "factorize", without_one)
    assert changed(name, CASES[name].rounder)


FAULTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "damping": ("gptq", lambda rounder: replace(rounder, damping=0.02)),
    "damping, natural order": ("gptq natural", lambda rounder: replace(rounder, damping=0.02)),
    "order": ("gptq", lambda rounder: replace(rounder, order="natural")),
    "sweeps": ("gptq swept", lambda rounder: replace(rounder, sweeps=0)),
    "no weights in the fit": ("gptq weighted", lambda rounder: replace(rounder, weighting="none")),
    "power of the search": ("gptq searched", lambda rounder: replace(rounder, fitter=Clip("mse", 2.0))),
    "no search": ("rtn searched", lambda rounder: replace(rounder, fitter=Clip("minmax"))),
    "no search on mxfp4": ("rtn mxfp4 searched", lambda rounder: replace(rounder, fitter=Clip("minmax"))),
    "the block of the released form": ("gptaq released", lambda rounder: replace(rounder, block=32)),
    "another form": ("gptaq corrected", lambda rounder: replace(rounder, asymmetry=Asymmetry("shifted", 0.25))),
    "more of the drift": ("gptaq shifted", lambda rounder: replace(rounder, asymmetry=Asymmetry("shifted", 0.6))),
    "a step of the fit": ("dual scale", lambda rounder: replace(rounder, fitter=replace(rounder.fitter, iterations=5))),
    "a step of the fit of signs": (
        "dual scale sign", lambda rounder: replace(rounder, fitter=replace(rounder.fitter, iterations=5))
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    name, spoiled = FAULTS[fault]
    assert changed(name, spoiled(CASES[name].rounder))


def test_forms_of_drift_give_codes_of_their_own() -> None:
    forms = [json.dumps(GOLDEN[f"gptaq {form}"]["codes"]) for form in ("released", "corrected", "shifted")]
    assert len(set(forms)) == len(forms)
