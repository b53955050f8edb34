from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subnibble.errors import BadRecipe
from subnibble.rounding.order import ORDERS, plan_columns
from subnibble.tensor.scheme import Scheme

sizes = st.tuples(st.integers(1, 70), st.sampled_from((-1, 1, 2, 5, 16, 64)), st.integers(0, 999))


def diagonal(columns: int, seed: int) -> Tensor:
    """Few distinct values, so that there are ties, and some zeros."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 12, (columns,), generator=g).float() ** 3


@settings(deadline=None, max_examples=60)
@given(sizes)
def test_natural_order_visits_columns_from_left_to_right(size: tuple[int, int, int]) -> None:
    columns, group_size, seed = size
    plan = plan_columns("natural", diagonal(columns, seed), Scheme(4, group_size))
    assert torch.equal(plan.order, torch.arange(columns))
    assert [index for index, _ in plan.groups] == list(range(len(plan.groups)))


@pytest.mark.parametrize("order", ORDERS)
@settings(deadline=None, max_examples=60)
@given(size=sizes)
def test_every_group_is_whole_and_visited_once(order: str, size: tuple[int, int, int]) -> None:
    columns, group_size, seed = size
    scheme = Scheme(4, group_size)
    plan = plan_columns(order, diagonal(columns, seed), scheme)
    assert sorted(index for index, _ in plan.groups) == list(range(scheme.groups(columns)))
    bounds = scheme.group_bounds(columns)
    for index, visited in plan.groups:
        assert sorted(visited.tolist()) == list(range(*bounds[index]))
    assert plan.order.dtype == torch.int64
    assert sorted(plan.order.tolist()) == list(range(columns))


@settings(deadline=None, max_examples=60)
@given(sizes)
def test_gar_sorts_inside_groups_and_groups_by_peak(size: tuple[int, int, int]) -> None:
    columns, group_size, seed = size
    d = diagonal(columns, seed)
    plan = plan_columns("gar", d, Scheme(4, group_size))
    peaks = []
    for index, visited in plan.groups:
        values = d[visited].tolist()
        assert values == sorted(values, reverse=True)
        # Ties keep their natural order, so that the same statistics always give the same bytes.
        for a, b in zip(visited.tolist(), visited.tolist()[1:], strict=False):
            assert d[a] > d[b] or a < b
        peaks.append((-values[0], index))
    assert peaks == sorted(peaks)


def test_gar_of_a_known_diagonal() -> None:
    d = torch.tensor([1.0, 5.0, 0.0, 7.0, 2.0, 2.0, 3.0])
    plan = plan_columns("gar", d, Scheme(4, 3))
    assert [index for index, _ in plan.groups] == [1, 0, 2]
    assert plan.order.tolist() == [3, 4, 5, 1, 0, 2, 6]


def test_ragged_last_group_may_come_first() -> None:
    d = torch.ones(11)
    d[9] = 4
    plan = plan_columns("gar", d, Scheme(4, 4))
    assert plan.order.tolist() == [9, 8, 10, 0, 1, 2, 3, 4, 5, 6, 7]
    assert [index for index, _ in plan.groups] == [2, 0, 1]


def test_whole_row_group_is_sorted_as_one() -> None:
    d = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert plan_columns("gar", d, Scheme(4, -1)).order.tolist() == [1, 3, 2, 0]


def test_unknown_order_is_a_bad_recipe_that_lists_the_known() -> None:
    with pytest.raises(BadRecipe, match="natural, gar"):
        plan_columns("act", torch.ones(3), Scheme(4, -1))
