"""The nights that go wrong: what happens in each, and what has come of it in the morning.

`NIGHTS` is the one place. night_dags.py makes a Dag of every night, test_nights.py lets it happen on a running Airflow,
and docs/durable-execution.md shows `figures()`: `python tests/airflow/nights.py` prints the table.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

FULL = os.environ.get("MOEGEN_NIGHTS") == "full"  # every night in its real length; CI takes some, and shorter ones
CLEARS = 20 if FULL else 3  # of one deferred task, one after the other
DOWN_S = 120 if FULL else 10  # without a service

ROWS = 24
TASK = "answer"
QUICK = {"prompt_column": "text", "sampling_params": {"max_tokens": 8, "ignore_eos": True}, "poll_interval": 0.5}
# Two rows in the engine at once, a part for every six: slow enough to be caught in the middle.
SLOW = {
    "sampling_params": {"max_tokens": 32, "ignore_eos": True},
    "job_params": {
        "output": {"rows_per_part": 6},
        "checkpoint": {"journal_seconds": 0.5},
        "engine": {"plan": {"kv_pages": 10, "page_tokens": 16}},
    },
}


@dataclass(frozen=True)
class Morning:
    """What must be found when all has ended; never more than one job, never a cancel by an earlier attempt."""

    job: Literal["succeeded", "cancelled"] = "succeeded"
    task: Literal["success", "failed"] = "success"
    tries: int = 1  # of the task
    cancels: tuple[int, ...] = (0,)  # how often the job may have been cancelled on the way


@dataclass(frozen=True)
class Night:
    """One event that befalls a task; `event` begins the cell of the documentation's table that says what happens."""

    name: str
    event: str
    waits: Literal["on a worker", "deferred"]
    morning: Morning
    task: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # arguments of the operator
    after: str = ""  # the night to whose task it happens, when that has ended; "": to a task of its own
    short: bool = False  # CI plays it too

    @property
    def dag_id(self) -> str:
        return f"night_{self.name}"

    @property
    def deferrable(self) -> bool:
        return self.waits == "deferred"


def both(name: str, event: str, morning: Morning, short: str = "", **task: Any) -> tuple[Night, Night]:
    """The same night for a task that waits on a worker and for one that defers; `short` says which of them CI plays."""
    return (
        Night(f"{name}_waiting", event, "on a worker", morning, task, short=short in ("waiting", "both")),
        Night(f"{name}_deferred", event, "deferred", morning, task, short=short in ("deferred", "both")),
    )


CANCELLED = Morning(job="cancelled", task="failed", cancels=(1,))
SECOND_TRY = Morning(tries=2)

NIGHTS = (
    *both("failure", "Retry", SECOND_TRY, retries=1, retry_delay_s=5),
    *both("cancelled", "Cancelled at the service", Morning(tries=2, cancels=(1,)), retries=1),
    # A cancel that comes before the next attempt is the attempt's own, and that attempt brings the job back.
    Night("cleared_deferred", "Clear, deferred", "deferred", Morning(tries=2, cancels=(0, 1)), short=True),
    Night("cleared_running", "Clear, running", "on a worker", Morning(tries=2, cancels=(0, 1))),
    Night("cleared_succeeded_waiting", "Clear, succeeded", "on a worker", SECOND_TRY, after="restarted_waiting"),
    Night(
        "cleared_succeeded_deferred", "Clear, succeeded", "deferred", SECOND_TRY, after="restarted_deferred", short=True
    ),
    *both("marked", "Marked failed", CANCELLED, **SLOW),
    Night("lost_worker", "Worker lost", "on a worker", SECOND_TRY, SLOW | {"retries": 1}, short=True),
    Night("redeploy", "Worker stopped in order", "on a worker", Morning(tries=2, cancels=(1,)), SLOW | {"retries": 1}),
    Night("triggerer", "Triggerer restarted or lost", "deferred", Morning(), SLOW, short=True),
    *both("timeout", "`timeout` passed", CANCELLED, timeout=20),
    *both("queue_timeout", "`queue_timeout` passed", CANCELLED, queue_timeout=10),
    Night(
        "execution_timeout",
        "`execution_timeout` passed",
        "on a worker",
        CANCELLED,
        {"execution_timeout_s": 20},
    ),
    *both("down", "Service unreachable", SECOND_TRY, short="waiting", retries=1, retry_delay_s=DOWN_S + 20),
    *both("restarted", "Service restarted", Morning(), short="deferred", **SLOW, poll_interval=max(10, DOWN_S / 2)),
)


PLAYED = tuple(night for night in NIGHTS if FULL or night.short)


def figures(nights: tuple[Night, ...] = NIGHTS) -> str:
    """The nights as a table in Markdown."""
    lines = [
        "| event | the task waits | jobs | cancelled | the job ends | the task ends | its tries | rows out |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for night in nights:
        end = night.morning
        cancels = " or ".join(map(str, end.cancels))
        rows = "all, each once" if end.job == "succeeded" else "no `_SUCCESS`"
        cells = (night.event, night.waits, 1, cancels, end.job, end.task, end.tries, rows)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(figures())
