"""Dividing a tile budget among strata and slides: Sainte-Laguë with capacities.

A divisor method, because largest remainders are not monotone: one tile more in the budget can
take a tile from a site, and a smaller selection would no longer be contained in a larger one.
"""

from fractions import Fraction

import numpy as np
import numpy.typing as npt

from common.errors import UserError


def sainte_lague(
    weights: npt.NDArray[np.int64], capacities: npt.NDArray[np.int64], seats: int
) -> npt.NDArray[np.int64]:
    """Seats a party: `seats` in all, none above its capacity, as proportional to weight as can be.

    Equal to handing out seats one by one, each to the party with the largest
    weight / (2 * taken + 1) among those below capacity, ties to the lower index (Sainte-Laguë,
    1910; Balinski and Young, 1982). Monotone: more seats never take one from a party.
    Raises `UserError` when the capacities do not hold the seats.
    """
    weights, capacities = np.asarray(weights, np.int64), np.asarray(capacities, np.int64)
    usable = np.where(weights > 0, capacities, 0)
    if seats > int(usable.sum()):
        raise UserError(f"{seats:,} tiles were asked for, the largest possible is {usable.sum():,}")
    taken = _uncontested(weights, usable, seats)
    while (left := seats - int(taken.sum())) > 0:
        for party in _by_priority(weights, usable, taken)[:left]:
            taken[party] += 1
    return taken


def _uncontested(
    weights: npt.NDArray[np.int64], capacities: npt.NDArray[np.int64], seats: int
) -> npt.NDArray[np.int64]:
    """A safe start: seats that the one-by-one rule gives before any seat is contested.

    With divisor D every party takes floor(w / D + 1/2) seats. A D slightly too large gives at
    most `seats`, all of which the rule gives too; bisection brings D so near that no party has
    more than one of the seats that are left.
    """
    low, high = 0.0, 2.0 * float(weights.max(initial=0)) + 1.0
    if seats == 0 or high <= 1.0:
        return np.zeros_like(weights)

    def at(divisor: float) -> npt.NDArray[np.int64]:
        return np.minimum(np.floor(weights / divisor + 0.5), capacities).astype(np.int64)

    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if int(at(middle).sum()) > seats:
            low = middle
        else:
            high = middle
    # A hair coarser: seats that tie in floating point are left to the exact comparison.
    return at(high * (1 + 1e-9))


def _by_priority(
    weights: npt.NDArray[np.int64],
    capacities: npt.NDArray[np.int64],
    taken: npt.NDArray[np.int64],
) -> list[int]:
    """Parties below capacity, largest w / (2 taken + 1) first, compared exactly."""
    return sorted(
        np.flatnonzero(taken < capacities).tolist(),
        key=lambda i: (-Fraction(int(weights[i]), 2 * int(taken[i]) + 1), i),
    )
