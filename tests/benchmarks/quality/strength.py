"""The best strength on one geometric grid that has no ends.

The grid is the same for every rival: its default strength times 2^(i/4), all integers i. Recovery along a line from the base rises, then
falls, so a climb from the default in steps of eight, four, two and one grid points finds the best point of the whole grid, and the
optimum is inside by construction; where the curve has noise, a neighbour of it. Where reading is dear the steps end at two: the best
point is inside then too, and the last one tried is where a parabola through it and its neighbours has its top.
"""

from __future__ import annotations

from collections.abc import Callable

STEPS_PER_DOUBLING = 4
FINE, COARSE = (8, 4, 2, 1), (4, 2)  # steps of the climb
FURTHEST = 40  # grid points from the default: a factor of 1024


def grid(default: float, i: int) -> float:
    """The strength of grid point i."""
    return float(default * 2.0 ** (i / STEPS_PER_DOUBLING))


def climb(value: Callable[[int], float], start: int = 0, strides: tuple[int, ...] = FINE) -> dict[int, float]:
    """Grid points that were tried → their values; the best of them has worse ones on both sides of it, the last stride away at most."""
    tried: dict[int, float] = {}

    def at(i: int) -> float:
        if i not in tried:
            tried[i] = value(i)
        return tried[i]

    best = start
    at(best)
    for stride in strides:
        while True:
            around = [i for i in (best - stride, best + stride) if abs(i) <= FURTHEST]
            top = max([best, *around], key=at)
            if top == best:
                break
            best = top
    last = strides[-1]
    if last > 1 and {best - last, best + last} <= tried.keys():
        at(best + vertex(tried[best - last], tried[best], tried[best + last], last))
    return tried


def vertex(left: float, middle: float, right: float, stride: int) -> int:
    """Where the parabola through three values a stride apart has its top, from the middle one, which is the largest; a whole number."""
    bend = 2 * middle - left - right
    return round(stride * (right - left) / (2 * bend)) if bend > 0 else 0


def best_of(tried: dict[int, float]) -> int:
    """The best grid point, of equal ones the one nearest to the default."""
    return max(tried, key=lambda i: (tried[i], -abs(i)))
