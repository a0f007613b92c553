"""How far an attempt was, and when: a few points, however long it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MOST_POINTS = 200
_EVERY_S = 0.5  # between two points, until that makes too many

Point = Sequence[float]  # seconds since rows began to run, rows done, tokens generated in this attempt


class Samples:
    """The course of one attempt in at most `most` points (even, 4 or more), spread evenly over its time.

    Counts are running totals, so what is between two points that were kept is all there: points that were dropped
    take nothing with them.
    """

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most, self._every_s = most, _EVERY_S
        self._kept: list[Point] = []
        self._latest: Point | None = None

    def add(self, seconds: float, rows: int, tokens: int) -> None:
        """How far the attempt is now; `seconds` never falls."""
        self._latest = (round(seconds, 3), rows, tokens)
        if not self._kept or seconds - self._kept[-1][0] >= self._every_s:
            self._kept.append(self._latest)
        if len(self._kept) == self._most:
            del self._kept[1::2]
            self._every_s *= 2

    @property
    def points(self) -> tuple[Point, ...]:
        """From the first to the latest."""
        if self._latest is None or self._latest == self._kept[-1]:
            return tuple(self._kept)
        # A last stretch of milliseconds would show the rate of a single pass: it takes the place of its neighbour.
        short = len(self._kept) > 1 and self._latest[0] - self._kept[-1][0] < self._every_s / 2
        return (*(self._kept[:-1] if short else self._kept), self._latest)


def joined(attempts: Iterable[Sequence[Point]], most: int = MOST_POINTS) -> list[Point]:
    """Attempts as one course: the time in which rows ran, one attempt after the other, and what was done in it.

    Work that a lost attempt took with it counts, and counts again when it is done again.
    """
    points: list[Point] = [(0.0, 0, 0)]
    for attempt in attempts:
        if attempt:
            done, begun = points[-1], attempt[0]
            points += [tuple(d + a - b for d, a, b in zip(done, at, begun, strict=True)) for at in attempt[1:]]
    every = -(-(len(points) - 1) // (most - 1)) or 1
    kept = points[::every]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
