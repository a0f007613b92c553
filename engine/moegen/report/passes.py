"""The columns of `_stats.json`'s `passes`, folded into as many as a chart can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

_MAX_COLUMNS = 300

Values = list[float | None]


class Passes:
    """An attempt's passes. What was not measured in a whole column is None there."""

    def __init__(self, columns: Mapping[str, Sequence[Any]], max_columns: int = _MAX_COLUMNS) -> None:
        self._columns = columns
        rows = len(columns["passes"])
        size = -(-rows // max_columns)
        self._groups = [slice(first, first + size) for first in range(0, rows, size)]

    @property
    def count_edges(self) -> list[float]:
        """Passes before each column, and after the last."""
        return self._edges("passes")

    @property
    def second_edges(self) -> list[float]:
        """Seconds from the first pass to each column, and to the end."""
        return self._edges("seconds")

    def measured(self, name: str) -> bool:
        """Whether any pass has it."""
        return any(value is not None for value in self._columns[name])

    def sum_per_pass(self, name: str) -> Values:
        return self._each(lambda values, group: sum(values) / sum(self._columns["passes"][group]), name)

    def mean_by_pass(self, name: str) -> Values:
        return self._each(lambda values, group: _mean(values, self._columns["passes"][group]), name)

    def mean_by_second(self, name: str) -> Values:
        return self._each(lambda values, group: _mean(values, self._columns["seconds"][group]), name)

    def least(self, name: str) -> Values:
        return self._each(lambda values, group: min(values), name)

    def most(self, name: str) -> Values:
        return self._each(lambda values, group: max(values), name)

    def _each(self, fold: Any, name: str) -> Values:
        columns = ((self._columns[name][group], group) for group in self._groups)
        return [None if None in values else fold(values, group) for values, group in columns]

    def _edges(self, name: str) -> list[float]:
        return list(accumulate((sum(self._columns[name][group]) for group in self._groups), initial=0.0))


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else 0.0
