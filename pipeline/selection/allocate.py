"""Dividing a tile budget among strata and slides: Sainte-Laguë with capacities.

A divisor method, because largest remainders are not monotone: one tile more in the budget can
take a tile from a site, and a smaller selection would no longer be contained in a larger one.
"""

from fractions import Fraction

import numpy as np
import numpy.typing as npt

from common.errors import UserError

Counts = npt.NDArray[np.int64]


def sainte_lague(weights: Counts, capacities: Counts, seats: int) -> Counts:
    """Seats per party: `seats` in all, none above its capacity, in proportion to the weights.

    Equal to handing out seats one by one, each to the party with the largest
    weight / (2 * taken + 1) among those below capacity, ties to the lower index (Sainte-Laguë,
    1910; Balinski and Young, 1982). Monotone: more seats never take one from a party.

    Args:
        weights: int64 [parties], at least 0; a party of weight 0 gets no seat.
        capacities: int64 [parties], the most seats of each.
        seats: from 0 to the sum of the capacities.

    Returns:
        int64 [parties].

    Raises:
        UserError: there are more seats than capacities.

    >>> sainte_lague(np.array([6, 3, 1]), np.array([9, 9, 9]), 5).tolist()
    [3, 2, 0]
    >>> sainte_lague(np.array([6, 3, 1]), np.array([2, 9, 9]), 5).tolist()
    [2, 2, 1]
    """
    weights, capacities = np.asarray(weights, np.int64), np.asarray(capacities, np.int64)
    usable = np.where(weights > 0, capacities, 0)
    if seats > int(usable.sum()):
        raise UserError(f"{seats:,} tiles were requested, the largest possible is {usable.sum():,}")
    taken = _allocate_uncontested(weights, usable, seats)
    while (remaining := seats - int(taken.sum())) > 0:
        # Compared as fractions: two priorities that differ in the 17th digit are no tie.
        by_priority = sorted(
            np.flatnonzero(taken < usable).tolist(),
            key=lambda i: (-Fraction(int(weights[i]), 2 * int(taken[i]) + 1), i),
        )
        taken[by_priority[:remaining]] += 1
    return taken


def _allocate_uncontested(weights: Counts, capacities: Counts, seats: int) -> Counts:
    """A safe start: seats that the one-by-one rule gives before any seat is contested.

    With divisor D every party takes floor(w / D + 1/2) seats. A D slightly too large gives at
    most `seats`, all of which the rule gives too; bisection brings D so near that no party has
    more than one of the remaining seats.
    """
    low, high = 0.0, 2.0 * float(weights.max(initial=0)) + 1.0
    if seats == 0 or high <= 1.0:
        return np.zeros_like(weights)

    def seats_at(divisor: float) -> Counts:
        return np.minimum(np.floor(weights / divisor + 0.5), capacities).astype(np.int64)

    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if int(seats_at(middle).sum()) > seats:
            low = middle
        else:
            high = middle
    # A hair coarser: seats that tie in floating point are left to the exact comparison.
    return seats_at(high * (1 + 1e-9))
