"""The course of a job in few points."""

from __future__ import annotations

from itertools import pairwise

import pytest
from moegen.job.samples import MOST_POINTS, Samples, joined


@pytest.mark.parametrize("passes", [1, 2, 3, 199, 200, 201, 1000, 100_000])
def test_however_long_it_takes_the_points_are_few_and_the_totals_whole(passes: int) -> None:
    samples = Samples()
    for number in range(passes):
        samples.add(number * 0.3, 2 * number, 7 * number)
        assert len(samples.points) <= MOST_POINTS
    points = samples.points
    assert points[0] == (0.0, 0, 0)
    last = passes - 1
    assert points[-1] == (round(last * 0.3, 3), 2 * last, 7 * last)
    gaps = [later[0] - first[0] for first, later in pairwise(points)]
    assert not gaps or max(gaps[:-1], default=0) <= 2.5 * min(gaps)  # the last one may be up to half as long again
    assert passes < 400 or len(points) > MOST_POINTS / 2 - 2


def test_a_burst_of_passes_at_the_end_is_no_point_of_its_own() -> None:
    samples = Samples()
    for seconds, tokens in ((0.0, 0), (0.5, 10), (1.0, 20), (1.001, 500)):
        samples.add(seconds, 0, tokens)
    assert samples.points == ((0.0, 0, 0), (0.5, 0, 10), (1.001, 0, 500))


def test_nothing_yet() -> None:
    assert Samples().points == ()
    assert joined([]) == joined([(), ()]) == [(0.0, 0, 0)]


def test_attempts_become_one_course() -> None:
    first = [(0.0, 0, 0), (1.0, 10, 100), (2.0, 30, 150)]
    second = [(0.0, 20, 0), (4.0, 60, 50)]  # ten rows were lost, and done again
    assert joined([first, (), second]) == [(0.0, 0, 0), (1.0, 10, 100), (2.0, 30, 150), (6.0, 70, 200)]


@pytest.mark.parametrize("attempts", [1, 2, 3, 20])
def test_many_attempts_have_no_more_points_than_one(attempts: int) -> None:
    course = [(float(second), second, 3 * second) for second in range(MOST_POINTS)]
    points = joined([course] * attempts)
    assert MOST_POINTS / 2 < len(points) <= MOST_POINTS
    last = attempts * (MOST_POINTS - 1)
    assert tuple(points[-1]) == (last, last, 3 * last)
