"""Windows that a model writes, on a backend whose logits are known: what comes after what, and who decides."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from subnibble.calibrate.openings import Opening, Openings
from subnibble.calibrate.sampling import WindowSampling
from subnibble.errors import NumericalFailure
from subnibble.generate.windows import Order, drawn, write_windows
from subnibble.tensor.cache_scheme import PrefixIds

SIZE, END = 12, 11
# Probabilities of the next token after each one, all above 0.
CHAIN = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) + 0.05
CHAIN[:, END] = 0.2


class Chain:
    """A backend whose logits depend on a sequence's last token alone. rows: (SIZE, SIZE) logits after each token."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.open_slots, self.calls = rows, set[int](), list[list[list[int]]]()

    def open(self) -> int:
        slot = max(self.open_slots, default=-1) + 1
        self.open_slots.add(slot)
        return slot

    def close(self, slot: int) -> None:
        self.open_slots.remove(slot)

    def forward(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        assert {*slots} == self.open_slots
        self.calls.append([list(new) for new in tokens])
        return self.rows[[new[-1] for new in tokens]]


def sure(successors: dict[int, int]) -> Chain:
    """A backend that is sure of each next token."""
    rows = torch.full((SIZE, SIZE), -1e4)
    for token in range(SIZE):
        rows[token, successors.get(token, 0)] = 0.0
    return Chain(rows)


def order(*kinds: Opening, length: int = 40, seed: int = 0, prefix: PrefixIds | None = None, **sampling: Any) -> Order:
    return Order(
        Openings(kinds, tuple(range(SIZE - 1)), frozenset({END}), prefix), WindowSampling(**sampling), length, seed
    )


def write(backend: Any, asked: Order, numbers: Sequence[int] = (0,)) -> list[list[int]]:
    windows = write_windows(backend, asked, numbers)
    assert windows.shape == (len(numbers), asked.length)
    assert windows.dtype == torch.int64
    assert backend.open_slots == set()
    return windows.tolist()


def test_after_an_end_the_next_document_begins_and_beginnings_take_turns() -> None:
    backend = sure({1: 2, 2: END, 3: 4, 4: 5, 5: END})
    asked = order(Opening((1,)), Opening((7, 3)), length=12)
    first, second = write(backend, asked, (0, 1))
    assert first == [1, 2, END, 7, 3, 4, 5, END, 1, 2, END, 7]
    assert second == [7, 3, 4, 5, END, 1, 2, END, 7, 3, 4, 5]


def test_a_users_message_is_followed_by_an_answer_and_no_end_is_written_twice() -> None:
    backend = sure({1: 2, 2: END, 8: 9, 9: END})
    asked = order(Opening((1,), answer=(END, 6, 8)), length=13)
    assert write(backend, asked) == [[1, 2, END, 6, 8, 9, END, 1, 2, END, 6, 8, 9]]
    # A model whose documents begin with the end of the one before, as those without BOS do.
    assert write(sure({END: 2, 2: 3, 3: END}), order(Opening((END,)), length=8)) == [[END, 2, 3] * 2 + [END, 2]]


def test_no_document_and_no_turn_is_empty() -> None:
    rows = torch.zeros(SIZE, SIZE)
    rows[:, END] = 50.0
    (window,) = write(Chain(rows), order(Opening((1,), answer=(END, 6))))
    parts = " ".join(map(str, window)).split(f" {END} ")
    assert all(len(part.split()) == 2 for part in parts[:-1])
    assert parts[0].split()[0] == "1"
    assert [part.split()[0] for part in parts[1:3]] == ["6", "1"]


def test_after_a_token_of_the_vocabulary_come_four_likely_ones() -> None:
    rows = CHAIN.log()
    likely = rows.clone()
    likely[:, END] = -torch.inf
    asked = order(Opening((3,), draws=True), length=30)
    windows = write(Chain(likely), asked, range(64))
    for window in windows:
        assert window[0] == 3
        for token, following in pairwise(window[1:6]):
            assert following == int(likely[token].argmax())
    assert {window[1] for window in windows} == set(range(SIZE - 1))
    drawn_later = [(a, b) for window in windows for a, b in pairwise(window[5:])]
    # A share of argmax that draws by these probabilities have, and a greedy choice does not.
    share = sum(b == int(likely[a].argmax()) for a, b in drawn_later) / len(drawn_later)
    assert 0.05 < share < 0.4


def test_tokens_are_drawn_by_their_probabilities() -> None:
    rows = CHAIN.log()
    rows[:, END] = -torch.inf
    asked, counts = order(Opening((0,)), length=400), torch.zeros(SIZE, SIZE)
    for window in write(Chain(rows), asked, range(50)):
        for a, b in pairwise(window):
            counts[a, b] += 1
    counts = counts[:END]
    p, n = rows.softmax(-1)[:END], counts.sum(-1, keepdim=True)
    # Five standard deviations.
    assert bool(((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-9).all())
    cold = write(Chain(rows), order(Opening((0,)), length=50, temperature=0.01))[0]
    assert all(b == int(rows[a].argmax()) for a, b in pairwise(cold))
    top = write(Chain(rows), order(Opening((0,)), length=200, top_k=2), range(4))
    assert all(b in rows[a].topk(2).indices for window in top for a, b in pairwise(window))


def test_windows_depend_on_seed_and_number_alone() -> None:
    asked = order(Opening((0,)), Opening((), draws=True))
    whole = write(Chain(CHAIN.log()), asked, range(7))
    assert [write(Chain(CHAIN.log()), asked, (number,))[0] for number in range(7)] == whole
    assert write(Chain(CHAIN.log()), asked, (5, 2)) == [whole[5], whole[2]]
    # Windows of neighbouring seeds have nothing in common.
    others = [write(Chain(CHAIN.log()), order(*asked.openings.kinds, seed=seed), range(7)) for seed in (1, 2)]
    every = [tuple(window) for windows in (whole, *others) for window in windows]
    assert len({*every}) == len(every)
    before = torch.random.get_rng_state()
    write(Chain(CHAIN.log()), asked)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_prefix_runs_first_and_is_in_no_window() -> None:
    backend = sure({5: 6, 6: 7, 7: END, 3: 4, 4: END})
    prefix = PrefixIds((5,), 5)
    window, other = write(backend, order(Opening((5,)), length=8, prefix=prefix), (0, 1))
    # Its BOS is the prefix; that of the next document is not.
    assert window == other == [6, 7, END, 5, 6, 7, END, 5]
    assert backend.calls[0] == [[5], [5]]
    assert write(sure({3: 4, 4: END}), order(Opening((3,)), length=4, prefix=prefix)) == [[3, 4, END, 3]]


def test_steps_are_reported_and_the_last_token_is_not_run() -> None:
    backend, steps = Chain(CHAIN.log()), list[int]()
    write_windows(backend, order(Opening((0,)), length=5), (0, 1), steps.append)
    assert steps == [1, 2, 3, 4, 5]
    assert len(backend.calls) == 4


def test_not_a_number_is_refused_and_slots_are_closed() -> None:
    backend = Chain(torch.full((SIZE, SIZE), torch.nan))
    with pytest.raises(NumericalFailure, match="logits are NaN"):
        write_windows(backend, order(Opening((0,))), (0, 1))
    assert backend.open_slots == set()


def test_a_number_draws_the_token_whose_share_it_lies_in() -> None:
    p = np.array([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    assert [drawn(p, u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53)] == [1, 1, 3, 3, 4, 4]
    # Also where the sum is not 1.
    assert [drawn(3 * p, u) for u in (0.0, 0.2499, 0.25, 1 - 2**-53)] == [1, 1, 3, 4]
    tiny = np.array([1.0, 1e-300, 0.0])
    assert drawn(tiny, 1 - 2**-53) == 0
