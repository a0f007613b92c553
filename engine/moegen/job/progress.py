"""How far a job is, and how fast it goes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from moegen.job.samples import Point, Samples
from moegen.row import RowResult
from moegen.table.part import Totals

_WINDOW_S = 120.0  # rates are over this much of the past: rows end in bursts, a pass at a time


@dataclass(frozen=True)
class Detail:
    """What the job's page shows beside the progress."""

    errors: Mapping[str, int] = field(default_factory=dict)  # error code -> rows of the whole table
    plan: Mapping[str, Any] | None = None  # once it is chosen
    samples: Sequence[Point] = ()  # of this attempt


@dataclass(frozen=True)
class Progress:
    """The `progress` of the HTTP API. Rows and statuses count the whole table, rows of earlier runs included."""

    stage: str = "starting"  # starting, loading, running, finishing
    rows_done: int = 0
    rows_total: int = 0
    rows_committed: int = 0  # in parts
    rows_saved: int = 0  # in parts or in the journal: what a crash cannot take
    rows_per_s: float = 0.0
    tokens_per_s: float = 0.0  # generated tokens
    eta_s: float | None = None  # seconds left, once there is a rate
    prompt_tokens: int = 0
    completion_tokens: int = 0
    statuses: Mapping[str, int] = field(default_factory=dict)
    engine: Mapping[str, Any] | None = None  # what the engine does, once it has made a pass: see `Attempt.live`
    detail: Detail = field(default_factory=Detail, compare=False)  # no part of the HTTP API

    def to_mapping(self) -> dict[str, Any]:
        """As the HTTP API has it."""
        mapping = asdict(replace(self, detail=Detail()))
        del mapping["detail"]
        return mapping


class Meter:
    """Counts rows and tokens, and reports.

    Args:
        report: called with every new `Progress`, at every pass of the engine.
        now: a clock in seconds.
    """

    def __init__(self, report: Callable[[Progress], None], now: Callable[[], float] = time.monotonic) -> None:
        self._report, self._now = report, now
        self._stage = "starting"
        self._total = self._done = self._seen = self._committed = 0
        self._prompt_tokens = self._completion_tokens = self._generated = 0
        self._dedup_rows = self._dedup_tokens = 0
        self._statuses: dict[str, int] = {}
        self._errors: dict[str, int] = {}
        self._plan: Mapping[str, Any] | None = None
        self._course = Samples()
        self._began = now()
        self._samples: deque[tuple[float, int, int]] = deque()  # time, rows done, tokens generated
        self._live: Callable[[], Mapping[str, Any] | None] = lambda: None
        self._journaled: Callable[[], int] = lambda: 0

    def planned(self, plan: Mapping[str, Any]) -> None:
        """Tell of this plan with every progress from now on."""
        self._plan = plan

    def resume(self, rows_total: int, committed: Totals, journaled: Totals | None = None) -> None:
        """The table has `rows_total` rows; the other counts are those of its committed parts and of the journal."""
        found = committed + (journaled or Totals())
        self._total, self._committed = rows_total, committed.rows
        self._done = self._seen = found.rows
        self._statuses, self._errors = dict(found.statuses), dict(found.errors)
        self._prompt_tokens, self._completion_tokens = found.prompt_tokens, found.completion_tokens
        self._dedup_rows, self._dedup_tokens = found.dedup_rows, found.dedup_tokens

    @property
    def rows_total(self) -> int:
        return self._total

    @property
    def rows_seen(self) -> int:
        """Rows that are done or have been read, those of earlier runs included."""
        return self._seen

    @property
    def totals(self) -> Totals:
        """Counts over all rows that are done, those of earlier runs included."""
        return Totals(
            self._done, self._statuses, self._prompt_tokens, self._completion_tokens, self._errors,
            self._dedup_rows, self._dedup_tokens,
        )  # fmt: skip

    def follow_journal(self, rows: Callable[[], int]) -> None:
        """Report what `rows` tells of rows that only the journal has with every progress from now on."""
        self._journaled = rows

    def follow(self, live: Callable[[], Mapping[str, Any] | None]) -> None:
        """Report what `live` tells of the engine with every progress from now on."""
        self._live = live

    def enter(self, stage: str) -> None:
        """The job is now `stage`; rates begin with `running`."""
        self._stage = stage
        if stage == "running":
            self._began = self._now()
            self._sample()
        self.report()

    def add_seen(self, rows: int) -> None:
        """So many more rows were read, to be run."""
        self._seen += rows

    def add_row(self, result: RowResult) -> None:
        """One more row has its result."""
        self._done += 1
        if result.dedup_of is None:
            self._prompt_tokens += result.prompt_tokens or 0
            self._completion_tokens += result.completion_tokens or 0
        else:
            self._dedup_rows += 1
            self._dedup_tokens += (result.prompt_tokens or 0) + (result.completion_tokens or 0)
        self._statuses[result.status.value] = self._statuses.get(result.status.value, 0) + 1
        if result.error is not None:
            self._errors[result.error.code] = self._errors.get(result.error.code, 0) + 1

    def add_committed(self, rows: int) -> None:
        """A part of `rows` rows is on storage."""
        self._committed += rows

    def add_pass(self, generated_tokens: int) -> None:
        """The engine made a pass; reports."""
        self._generated += generated_tokens
        self._sample()
        while len(self._samples) > 2 and self._samples[1][0] < self._samples[-1][0] - _WINDOW_S:
            self._samples.popleft()
        self.report()

    def report(self) -> None:
        """Tell how far the job is."""
        self._report(self.progress())

    def progress(self) -> Progress:
        """How far the job is now."""
        rows_per_s, tokens_per_s = self._rates()
        left = self._total - self._done
        return Progress(
            stage=self._stage,
            rows_done=self._done,
            rows_total=self._total,
            rows_committed=self._committed,
            rows_saved=self._committed + self._journaled(),
            rows_per_s=round(rows_per_s, 3),
            tokens_per_s=round(tokens_per_s, 3),
            eta_s=round(left / rows_per_s, 1) if rows_per_s else None,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            statuses=dict(sorted(self._statuses.items())),
            engine=self._live(),
            detail=Detail(dict(sorted(self._errors.items())), self._plan, self._course.points),
        )

    def _sample(self) -> None:
        now = self._now()
        self._samples.append((now, self._done, self._generated))
        self._course.add(now - self._began, self._done, self._generated)

    def _rates(self) -> tuple[float, float]:
        """Rows and generated tokens per second over the window."""
        if not self._samples:
            return 0.0, 0.0
        (then, rows, tokens), (now, rows_now, tokens_now) = self._samples[0], self._samples[-1]
        seconds = now - then
        return ((rows_now - rows) / seconds, (tokens_now - tokens) / seconds) if seconds else (0.0, 0.0)
