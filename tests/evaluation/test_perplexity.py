from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subnibble.calibrate.tokens import bos_token
from subnibble.errors import CalibrationError, NumericalFailure
from subnibble.evaluation.perplexity import check_vocabularies, score
from tiny_llama import VOCABULARY, tiny_llama

BOS = 1
FLOAT32 = torch.finfo(torch.float32).eps


class Bigram(nn.Module):
    """Predicts from the last token alone: logits are rows of a table (v, v)."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)
        self.calls = 0

    def forward(self, ids: Tensor, use_cache: bool = True) -> Any:
        self.calls += 1
        return SimpleNamespace(logits=self.table[ids])


def bigram(seed: int) -> Bigram:
    return Bigram(4 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)))


def windows(count: int = 5, length: int = 23, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def oracle(model: nn.Module, ids: Tensor, bos: int | None, reference: nn.Module, fault: str = "none") -> Tensor:
    """(log perplexity, KL(reference || model), top-1 agreement) in float64, token by token."""
    loss, divergence, agreed = [], [], []
    for window in ids[-1:] if fault == "last window alone" else ids:
        context = window.tolist() if bos is None or fault == "BOS left out" else [bos, *window.tolist()]
        with torch.no_grad():
            logits, target = (m(torch.tensor([context]), use_cache=False).logits[0] for m in (model, reference))
        skipped = len(context) - len(window)
        first = 0 if fault == "first token scored" else 1
        for t in range(first, len(window)):
            token, place = int(window[t]), max(skipped + t - 1, 0)
            place = min(place + {"off by one": 1, "off by one back": -1}.get(fault, 0), len(context) - 1)
            q, p = (torch.log_softmax(x[place].double(), 0) for x in (logits, target))
            if fault == "reversed":
                p, q = q, p
            loss.append(-torch.log_softmax(logits[place].double(), 0)[token])
            divergence.append((p.exp() * (p - q)).sum())
            agreed.append((p.argmax() == q.argmax()).double())
    return torch.stack([torch.stack(values).mean() for values in (loss, divergence, agreed)])


def measured(model: nn.Module, ids: Tensor, bos: int | None, reference: nn.Module) -> Tensor:
    scores = score({"m": model}, ids, bos, reference)["m"]
    values = (math.log(scores.perplexity), scores.kl_divergence, scores.top1_agreement)
    return torch.tensor(values, dtype=torch.float64)


def agree(a: Tensor, b: Tensor) -> bool:
    """Log probabilities up to about 30 in float32, averaged; agreement is a count, so exact."""
    return bool(((a - b).abs()[:2] <= 30 * 4 * FLOAT32).all()) and abs(float(a[2] - b[2])) < 1e-12


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("make", [tiny_llama, bigram])
def test_score_equals_an_independent_float64_computation(bos: int | None, make: Any) -> None:
    model, reference, ids = make(1), make(2), windows()
    assert agree(measured(model, ids, bos, reference), oracle(model, ids, bos, reference))


@pytest.mark.parametrize(
    "fault",
    ["first token scored", "off by one", "off by one back", "reversed", "BOS left out", "last window alone"],
)
def test_comparison_rejects_planted_fault(fault: str) -> None:
    model, reference, ids = tiny_llama(1), tiny_llama(2), windows()
    right = measured(model, ids, BOS, reference)
    wrong = oracle(model, ids, BOS, reference, fault)
    assert not agree(right, wrong)
    # Each figure is told apart where the fault reaches it, not just one of the three.
    if fault != "reversed":
        assert abs(float(right[0] - wrong[0])) > 1e-3
    assert abs(float(right[1] - wrong[1])) > 1e-3


def test_windows_longer_than_a_part_are_scored_whole() -> None:
    model, reference, ids = bigram(1), bigram(2), windows(2, 1100)
    for bos in (None, BOS):
        assert agree(measured(model, ids, bos, reference), oracle(model, ids, bos, reference))


def test_bos_changes_the_context_and_not_the_tokens_scored() -> None:
    ids = windows()
    # What a bigram model says of a token does not depend on BOS, as long as the first token is not scored.
    plain, with_bos = (score({"m": bigram(1)}, ids, bos, bigram(2))["m"] for bos in (None, BOS))
    assert plain.perplexity == with_bos.perplexity
    assert plain.kl_divergence == with_bos.kl_divergence
    assert (plain.bos, with_bos.bos) == (False, True)
    contextual = [score({"m": tiny_llama(1)}, ids, bos)["m"].perplexity for bos in (None, BOS, BOS + 1)]
    assert len(set(contextual)) == 3


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_at_no_distance_from_itself(bos: int | None, dtype: torch.dtype) -> None:
    model = tiny_llama(1, dtype)
    scores = score({"m": model}, windows(), bos, reference=model)["m"]
    assert scores.kl_divergence == 0
    assert scores.top1_agreement == 1


def test_divergence_is_positive_between_two_models_and_not_symmetric() -> None:
    a, b = tiny_llama(1), tiny_llama(2)
    forward, backward = (score({"m": m}, windows(), None, r)["m"].kl_divergence for m, r in ((a, b), (b, a)))
    assert forward is not None
    assert backward is not None
    assert min(forward, backward) > 0.01
    assert abs(forward - backward) > 1e-3


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("height", [0.0, -40.0, 1000.0])
def test_uniform_logits_have_the_vocabulary_as_perplexity(bos: int | None, height: float) -> None:
    model = Bigram(torch.full((VOCABULARY, VOCABULARY), height))
    bound = 4 * FLOAT32 * (abs(height) + math.log(VOCABULARY))
    perplexity = score({"m": model}, windows(), bos)["m"].perplexity
    assert abs(math.log(perplexity) - math.log(VOCABULARY)) <= bound


def test_certain_model_has_perplexity_one_and_hopeless_one_is_infinite() -> None:
    successor = torch.full((VOCABULARY, VOCABULARY), -3000.0)
    tokens = torch.arange(VOCABULARY - 1)
    successor[tokens, tokens + 1] = 0
    right, wrong = torch.arange(10, 30).view(2, 10), torch.arange(30, 10, -1).view(2, 10)
    assert score({"m": Bigram(successor)}, right, None)["m"].perplexity == 1
    assert score({"m": Bigram(successor)}, wrong, None)["m"].perplexity == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_predictions_that_are_no_numbers_are_refused(value: float) -> None:
    sound, ids = bigram(1), windows()
    spoiled = Bigram(sound.table.data.clone())
    # One token that is in the text, and is fed.
    spoiled.table[ids[2, 4], 7] = value
    with pytest.raises(
        NumericalFailure, match=r"the reference's predictions on window [0-2] are NaN; use an intact copy"
    ):
        score({"m": sound}, ids, None, spoiled)
    with pytest.raises(NumericalFailure, match=r"m: the loss on window [0-2] is not finite; use an intact copy"):
        score({"m": spoiled}, ids, None, sound)


def test_a_token_that_is_ruled_out_is_no_failure() -> None:
    ids = torch.arange(10, 30).view(2, 10)
    sure = bigram(1)
    sure.table[:, 50] = -math.inf
    scores = score({"m": bigram(1)}, ids, None, sure)["m"]
    assert math.isfinite(scores.kl_divergence)
    assert scores.kl_divergence > 0


def test_every_token_weighs_the_same_across_windows() -> None:
    table = bigram(1).table.data
    ids = windows(6, 9)
    whole = score({"m": Bigram(table)}, ids, None)["m"].perplexity
    parts = [score({"m": Bigram(table)}, ids[i : i + 1], None)["m"].perplexity for i in range(6)]
    assert math.log(whole) == pytest.approx(sum(map(math.log, parts)) / 6, rel=1e-12)
    assert abs(whole - sum(parts) / 6) > 1e-3 * whole


def test_models_scored_together_score_as_alone_and_share_one_reference_run() -> None:
    ids, reference = windows(), bigram(9)
    models = {"a": bigram(1), "b": bigram(2), "c": bigram(3)}
    together = score(models, ids, BOS, reference)
    assert reference.calls == len(ids)
    assert list(together) == ["a", "b", "c"]
    for name, model in models.items():
        assert model.calls == len(ids)
        assert together[name] == score({name: model}, ids, BOS, reference)[name]


def test_scores_without_a_reference_claim_no_comparison() -> None:
    scores = score({"m": tiny_llama(1)}, windows(), None)["m"]
    assert scores.kl_divergence is None
    assert scores.top1_agreement is None
    assert set(scores.to_dict()) == {"perplexity", "windows", "window", "bos"}
    assert (scores.windows, scores.window) == (5, 23)
    compared = score({"m": tiny_llama(1)}, windows(), None, tiny_llama(1))["m"].to_dict()
    assert compared["kl_divergence"] == 0


def test_scoring_leaves_model_and_windows_alone() -> None:
    model, ids = bigram(1), windows()
    table, before = model.table.clone(), ids.clone()
    score({"m": model}, ids, BOS, model)
    assert torch.equal(model.table, table)
    assert torch.equal(ids, before)


def test_progress_is_told_after_each_window() -> None:
    reported: list[tuple[int, int]] = []
    score({"m": bigram(1)}, windows(), None, progress=lambda done, total, doing: reported.append((done, total)))
    assert reported == [(n, 5) for n in range(1, 6)]


@pytest.mark.parametrize("bos", [None, BOS])
def test_window_of_one_token_is_refused_and_of_two_is_scored(bos: int | None) -> None:
    with pytest.raises(CalibrationError, match="--window 2 or more"):
        score({"m": bigram(1)}, windows(3, 1), bos)
    assert agree(measured(bigram(1), windows(3, 2), bos, bigram(2)), oracle(bigram(1), windows(3, 2), bos, bigram(2)))


class Tokenizer:
    def __init__(self, bos: int | None, begins: list[int], ends: tuple[int, ...] = ()) -> None:
        self.bos_token_id, self._begins, self._ends = bos, begins, ends

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": [*self._begins, *ids, *self._ends] if add_special_tokens else ids}


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (Tokenizer(BOS, [BOS]), BOS),
        (Tokenizer(0, [0]), 0),
        (Tokenizer(BOS, []), None),
        (Tokenizer(None, []), None),
        (Tokenizer(None, [7]), None),
        (Tokenizer(BOS, [7]), None),
        (Tokenizer(BOS, [], ends=(BOS,)), None),
    ],
    ids=["adds it", "adds id 0", "has but adds none", "has none", "other prefix", "other first", "as EOS"],
)
def test_bos_is_found_where_the_tokenizer_begins_texts_with_it(tokenizer: Tokenizer, expected: int | None) -> None:
    assert bos_token(tokenizer) == expected


def test_bos_of_a_tokenizer_that_makes_nothing_of_a_letter_is_none() -> None:
    class Silent(Tokenizer):
        def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
            return {"input_ids": []}

    assert bos_token(Silent(BOS, [])) is None


def test_models_of_different_vocabularies_are_not_compared() -> None:
    ours, theirs = (SimpleNamespace(config=SimpleNamespace(vocab_size=n)) for n in (61, 64))
    check_vocabularies(ours, ours)
    with pytest.raises(CalibrationError, match=r"61 tokens and the reference's 64"):
        check_vocabularies(ours, theirs)
