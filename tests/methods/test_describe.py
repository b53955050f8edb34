"""Every option of every method is explained in one line, by the docstring that defines it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest

from subnibble.methods import METHODS
from subnibble.methods.describe import meanings
from subnibble.rounding.gptq import GPTQ
from subnibble.tuning.tuning import Tuning


@dataclass(frozen=True)
class Base:
    """Options of a method.

    size: how much of it; more
        costs more, see `here.py`. A second sentence.
    kept: what the base says.
    """

    size: int = 1
    kept: int = 2


@dataclass(frozen=True)
class Options(Base):
    """Options of another method: those of `Base`, and more.

    a, b: two of a kind, see `there.py`.
    damping: see `rounding/gptq.py`.
    low_rank_rate: see `tuning/tuning.py`.
    """

    a: int = 3
    b: int = 4
    damping: float = 0.5
    low_rank_rate: float = 0.5
    silent: int = 5


def test_meanings_are_the_first_sentences_of_their_entries() -> None:
    method = replace(METHODS["rtn"], options=Options)
    assert meanings(method) == {
        "size": "how much of it; more costs more",
        "kept": "what the base says",
        "a": "two of a kind",
        "b": "two of a kind",
        "damping": "added to the diagonal of the Gram matrix, as a fraction of its mean",
        "low_rank_rate": "AdamW learning rate of the low-rank matrix's factors",
        "silent": "",
    }
    for step, name in ((GPTQ, "damping"), (Tuning, "low_rank_rate")):
        assert f"{name}: {meanings(method)[name]}." in " ".join((step.__doc__ or "").split())


@pytest.mark.parametrize("name", METHODS)
def test_every_option_has_a_meaning_of_one_line(name: str) -> None:
    texts = meanings(METHODS[name])
    assert list(texts) == [item.name for item in fields(METHODS[name].options)]
    for key, text in texts.items():
        assert len(text) > 10, key
        assert "see `" not in text, key
        assert not text.endswith("."), key
        assert "\n" not in text, key


def test_a_name_that_two_methods_use_differently_has_the_meaning_of_each() -> None:
    alphas = {meanings(METHODS[name])["alpha"] for name in ("gptaq", "smoothquant", "serq")}
    assert len(alphas) == 3
    assert meanings(METHODS["gptaq"])["alpha"] == meanings(METHODS["d2quant"])["alpha"]
