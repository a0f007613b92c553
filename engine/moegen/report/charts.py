"""Charts as inline SVG: colours and fonts are the page's (classes `s0` .. `s4` are the series), nothing is fetched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from markupsafe import Markup

_WIDTH, _HEIGHT = 920, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 24, 40
HEAT_STEPS = (0.25, 0.5, 0.75, 0.9, 1.1, 1.33, 2.0, 4.0)  # times the mean, between one shade and the next


@dataclass(frozen=True)
class Series:
    """One value per column of the chart; None where nothing is known."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class _Frame:
    """A plane of x in [first, last] and y in [0, top], with its axes."""

    first: float
    last: float
    top: float
    x_label: str
    y_label: str

    def x(self, value: float) -> float:
        span = self.last - self.first or 1.0
        return round(_LEFT + (value - self.first) / span * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        return round(_HEIGHT - _BOTTOM - value / (self.top or 1.0) * (_HEIGHT - _TOP - _BOTTOM), 1)

    def draw(self, title: str, marks: Iterable[Markup]) -> Markup:
        below = _HEIGHT - _BOTTOM + 16
        return _svg(
            title,
            _HEIGHT,
            [
                *(_path("grid", f"M{_LEFT} {self.y(tick)}H{_WIDTH - _RIGHT}") for tick in _ticks(0, self.top)),
                *(_text("y", _LEFT - 6, self.y(tick) + 4, _number(tick)) for tick in _ticks(0, self.top)),
                *(_text("x", self.x(tick), below, _number(tick)) for tick in _ticks(self.first, self.last)),
                *marks,
                _text("x", (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, self.x_label),
                _text("name", _LEFT, _TOP - 9, self.y_label),
            ],
        )


def stacked(title: str, edges: Sequence[float], series: Sequence[Series], x_label: str, y_label: str) -> Markup:
    """Column k reaches from `edges[k]` to `edges[k + 1]`; what is unknown has no height."""
    heights = [[value or 0.0 for value in one.values] for one in series]
    frame = _Frame(edges[0], edges[-1], max(map(sum, zip(*heights, strict=True))), x_label, y_label)
    floor = [0.0] * (len(edges) - 1)
    marks = []
    for index, own in enumerate(heights):
        roof = [below + height for below, height in zip(floor, own, strict=True)]
        up = _steps(frame, edges, roof)
        down = _steps(frame, edges[::-1], floor[::-1])
        marks.append(_path(f"area s{index}", f"M{up}L{down}Z", series[index].name))
        floor = roof
    return frame.draw(title, marks) + _names(series)


def lines(title: str, edges: Sequence[float], series: Sequence[Series], x_label: str, y_label: str) -> Markup:
    """Step lines over the columns, with a gap where a value is unknown."""
    known = [value for one in series for value in one.values if value is not None]
    frame = _Frame(edges[0], edges[-1], max(known, default=0.0), x_label, y_label)
    columns = list(pairwise(edges))
    marks = []
    for index, one in enumerate(series):
        runs = groupby(zip(columns, one.values, strict=True), lambda item: item[1] is not None)
        parts = [_run(frame, list(run)) for present, run in runs if present]
        marks.append(_path(f"line s{index}", "".join(parts), one.name))
    return frame.draw(title, marks) + _names(series)


def _run(frame: _Frame, run: Sequence[tuple[tuple[float, float], float | None]]) -> str:
    edges = [run[0][0][0], *(end for (_, end), _ in run)]
    return "M" + _steps(frame, edges, [value or 0.0 for _, value in run])


def _steps(frame: _Frame, edges: Sequence[float], values: Sequence[float]) -> str:
    points = [
        f"{frame.x(x)} {frame.y(value)}" for pair, value in zip(pairwise(edges), values, strict=True) for x in pair
    ]
    return "L".join(points)


def histogram(title: str, edges: Sequence[float], counts: Sequence[int], x_label: str, y_label: str) -> Markup:
    """Bars from `edges[k]` to `edges[k + 1]`."""
    frame = _Frame(edges[0], edges[-1], max(counts), x_label, y_label)
    return frame.draw(title, [_bar(frame, *bar) for bar in zip(edges, edges[1:], counts, strict=False)])


def _bar(frame: _Frame, first: float, last: float, count: int) -> Markup:
    left, right, top = frame.x(first) + 0.5, frame.x(last) - 0.5, frame.y(count)
    data = f"M{left:.1f} {frame.y(0)}V{top}H{max(right, left + 0.5):.1f}V{frame.y(0)}Z"
    return _path("area s0", data, f"{_number(first)} to {_number(last)}: {count}")


def heat_map(title: str, rows: Sequence[tuple[str, Sequence[float]]], x_label: str) -> Markup:
    """One row per label, one cell per value; a shade says how many times the row's mean a value is."""
    columns = max(len(values) for _, values in rows)
    wide, high = (_WIDTH - _LEFT - _RIGHT) / columns, max(6.0, min(18.0, 480 / len(rows)))
    bottom = _TOP + len(rows) * high
    ticks = [int(tick) for tick in _ticks(0, columns - 1) if tick == int(tick)]
    every = -(-len(rows) // 24)
    marks = [
        *_cells(rows, wide, high),
        *(_text("y", _LEFT - 6, _TOP + (k + 0.5) * high + 4, rows[k][0]) for k in range(0, len(rows), every)),
        *(_text("x", _LEFT + (tick + 0.5) * wide, bottom + 16, str(tick)) for tick in ticks),
        _text("x", (_LEFT + _WIDTH - _RIGHT) / 2, bottom + 34, x_label),
    ]
    shades = range(len(HEAT_STEPS) + 1)
    return _svg(title, round(bottom + 42), marks) + _legend((f"heat h{k}", _shade_name(k)) for k in shades)


def _cells(rows: Sequence[tuple[str, Sequence[float]]], wide: float, high: float) -> list[Markup]:
    """One path per shade: a large model has more cells than a browser likes elements."""
    paths: dict[int, list[str]] = {}
    for row, (_, values) in enumerate(rows):
        for shade, first, count in _shades(values):
            place = f"M{_LEFT + first * wide:.1f} {_TOP + row * high:.1f}"
            paths.setdefault(shade, []).append(f"{place}h{count * wide:.1f}v{high:.1f}h-{count * wide:.1f}z")
    return [_path(f"heat h{shade}", "".join(parts), _shade_name(shade)) for shade, parts in sorted(paths.items())]


def _shades(values: Sequence[float]) -> Iterable[tuple[int, int, int]]:
    """(shade, first cell, cells) of every run of equal shades."""
    mean = sum(values) / len(values) or 1.0
    shades = (sum(value / mean >= step for step in HEAT_STEPS) for value in values)
    first = 0
    for shade, run in groupby(shades):
        count = len(list(run))
        yield shade, first, count
        first += count


def _shade_name(shade: int) -> str:
    if shade == 0:
        return f"below {HEAT_STEPS[0]}"
    return f"{HEAT_STEPS[shade - 1]} to {HEAT_STEPS[shade]}" if shade < len(HEAT_STEPS) else f"{HEAT_STEPS[-1]} or more"


def _names(series: Sequence[Series]) -> Markup:
    return _legend((f"s{index}", one.name) for index, one in enumerate(series))


def _legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """What colour means what."""
    keys = Markup("").join(Markup('<span><i class="{}"></i>{}</span>').format(*entry) for entry in entries)
    return Markup('<p class="legend">{}</p>').format(keys)


def _text(kind: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, text)


def _path(kind: str, data: str, title: str = "") -> Markup:
    name = Markup("<title>{}</title>").format(title) if title else ""
    return Markup('<path class="{}" d="{}">{}</path>').format(kind, data, name)


def _svg(title: str, height: int, marks: Iterable[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, height, title, Markup("").join(marks)
    )


def _ticks(first: float, last: float) -> list[float]:
    """Four to ten round numbers."""
    if last <= first:
        return [first]
    step = 10.0 ** math.floor(math.log10((last - first) / 4))
    step *= next(factor for factor in (5, 2, 1) if (last - first) / (step * factor) >= 4 or factor == 1)
    return [index * step for index in range(math.ceil(first / step), math.floor(last / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
