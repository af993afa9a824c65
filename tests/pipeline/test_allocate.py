from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from pipeline.selection.allocate import sainte_lague


def one_by_one(weights, capacities, seats):
    """The rule itself: seat after seat to the largest w / (2 taken + 1), ties to the first."""
    taken = [0] * len(weights)
    for _ in range(seats):
        best = max(
            (i for i in range(len(weights)) if taken[i] < capacities[i] and weights[i] > 0),
            key=lambda i: (Fraction(int(weights[i]), 2 * taken[i] + 1), -i),
        )
        taken[best] += 1
    return taken


parties = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 25)), min_size=1, max_size=12)


@given(parties, st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_equals_handing_out_seats_one_by_one(rows, share):
    weights = np.array([row[0] for row in rows])
    capacities = np.array([row[1] for row in rows])
    seats = int(share * capacities[weights > 0].sum())
    taken = sainte_lague(weights, capacities, seats)
    assert taken.tolist() == one_by_one(weights, capacities, seats)


@given(parties, st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_one_seat_more_never_takes_one_away(rows, share):
    weights = np.array([row[0] for row in rows])
    capacities = np.array([row[1] for row in rows])
    most = int(capacities[weights > 0].sum())
    seats = int(share * most)
    if seats < most:
        fewer = sainte_lague(weights, capacities, seats)
        more = sainte_lague(weights, capacities, seats + 1)
        assert np.all(more >= fewer)
        assert more.sum() == fewer.sum() + 1


def test_large_budgets_are_exact_and_near_proportional():
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 2_000_000, 681)
    capacities = weights.copy()
    seats = int(weights.sum() // 3)
    taken = sainte_lague(weights, capacities, seats)
    assert taken.sum() == seats
    assert np.abs(taken - seats * weights / weights.sum()).max() <= 1


def test_equal_weights_are_dealt_evenly_lower_index_first():
    taken = sainte_lague(np.ones(11_000, int), np.full(11_000, 10), 25_000)
    assert taken.tolist() == [3] * 3000 + [2] * 8000


def test_what_does_not_fit_is_refused_with_the_largest_that_does():
    with pytest.raises(UserError, match="largest possible is 7"):
        sainte_lague(np.array([5, 2]), np.array([5, 2]), 8)


def test_all_of_the_capacity_can_be_taken():
    assert sainte_lague(np.array([5, 0, 2]), np.array([5, 9, 2]), 7).tolist() == [5, 0, 2]
