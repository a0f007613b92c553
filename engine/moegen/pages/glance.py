"""A job at a glance: what the list shows of it, and the head of its own page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moegen.job.records import Record
from moegen.job.store import JobStore
from moegen.pages.frame import short
from moegen.spec import JobState
from moegen.units import format_duration, format_moment

_NAME_CHARACTERS = 200


@dataclass(frozen=True)
class Glance:
    """Texts are as others wrote them: they are escaped where they are shown."""

    key: str
    name: str  # the key, where the job has no name
    state: JobState
    stage: str  # of a running job's runner, or ""
    queue_position: int  # 1: next; 0: not queued
    model: str  # the last part of its URI
    rows_done: int
    rows_total: int  # 0 while it is not known
    when: str

    @classmethod
    def of(cls, store: JobStore, record: Record, queue: Sequence[str], now: float) -> Glance:
        """`queue` are the keys of the jobs that wait, the next one first; `now` is Unix time in seconds."""
        progress = store.status(record).progress or {}
        queued = record.state is JobState.QUEUED and record.key in queue
        return cls(
            key=record.key,
            name=short(record.spec["job"]["name"].strip() or record.key, _NAME_CHARACTERS),
            state=record.state,
            stage=progress.get("stage", "starting") if record.state is JobState.RUNNING else "",
            queue_position=queue.index(record.key) + 1 if queued else 0,
            model=short(record.spec["model"]["uri"].rstrip("/").rpartition("/")[2], _NAME_CHARACTERS),
            rows_done=progress.get("rows_done", 0),
            rows_total=progress.get("rows_total", 0),
            when=_when(record, now),
        )

    @property
    def share(self) -> float:
        """Of its rows that are done, between 0 and 1."""
        return self.rows_done / self.rows_total if self.rows_total else float(self.state is JobState.SUCCEEDED)

    @property
    def rows(self) -> str:
        if not self.rows_total and self.state is not JobState.SUCCEEDED:
            return "not counted" if self.state.ended else "not counted yet"
        return f"{self.rows_done:,} of {self.rows_total:,} rows ({100 * self.share:.1f} %)"

    @property
    def standing(self) -> str:
        """Its state, and what that means just now."""
        if self.queue_position:
            return "next to run" if self.queue_position == 1 else f"number {self.queue_position} in the queue"
        if self.state is JobState.PAUSED:
            return "nobody asks about it"
        return "" if self.stage == self.state.value else self.stage


def _when(record: Record, now: float) -> str:
    if record.state is JobState.QUEUED:
        return f"queued {format_moment(record.queued_at)}"
    started = record.started_at
    if record.ended_at is not None:
        took = f", {format_duration(record.ended_at - started)} after its start" if started is not None else ""
        return f"ended {format_moment(record.ended_at)}{took}"
    if started is None:
        return ""
    return f"started {format_moment(started)}, {format_duration(max(now - started, 0.0))} ago"
