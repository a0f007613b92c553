"""What a look at a job means: one decision for the synchronous and the deferred loop, and what its end means.

Invariants:
- A wait ends with exactly one event: a plain dict with `status` and `key`, and what that status needs.
- Looks that found no usable answer are forgiven until `MAX_FAILURES` in a row; the job is then left running,
  and a retry of the task attaches to it.
- The deadline is a point on the wall clock; an answer that says "ended" counts even after it.
"""

from __future__ import annotations

from typing import Any

from moegen_airflow.exceptions import (
    MoegenError,
    MoegenInputError,
    MoegenJobCancelledError,
    MoegenJobFailedError,
    MoegenJobNotFoundError,
    MoegenPartialFailureError,
    MoegenQueueTimeoutError,
    MoegenTimeoutError,
    MoegenTriggerEventError,
    MoegenUnavailableError,
)
from moegen_airflow.news import clock, progress_line

MAX_FAILURES = 5
TIMEOUTS = ("timeout", "queue_timeout")  # statuses of events after which the job may be cancelled

Event = dict[str, Any]
Job = dict[str, Any]

_ERRORS: dict[str, type[MoegenError]] = {
    "failed": MoegenJobFailedError,
    "cancelled": MoegenJobCancelledError,
    "timeout": MoegenTimeoutError,
    "queue_timeout": MoegenQueueTimeoutError,
    "unavailable": MoegenUnavailableError,
    "missing": MoegenJobNotFoundError,
    "refused": MoegenInputError,
}
_FINAL: dict[object, type[MoegenError]] = {2: MoegenPartialFailureError, 64: MoegenInputError}
"""What exit codes of a runner mean after which a retry would end in the same way."""


class JobPoll:
    """One wait for one job. Times are seconds since the epoch; the caller does the looking and the sleeping.

    `queue_timeout`: how many seconds the job may stand in the queue; None: until `end_time`.
    """

    def __init__(self, key: str, end_time: float, queue_timeout: float | None = None) -> None:
        self.key = key
        self.end_time = end_time
        self.queue_timeout = queue_timeout
        self.failures = 0
        self._queue_end = float("inf")
        self._last_seen: object = None

    def step(self, answer: Job | MoegenError, now: float) -> tuple[Event | None, str | None]:
        """The event that ends the wait, or None: look again later; and a line for the log when there is news."""
        if isinstance(answer, MoegenError):
            return self._unanswered(answer, now), str(answer)
        self.failures = 0
        return self._answered(answer, now), self._news(answer, now)

    def delay_s(self, poll_interval_s: float, now: float) -> float:
        """How long to sleep: never past a deadline."""
        return max(0.0, min(poll_interval_s, self.end_time - now, self._queue_end - now))

    def _answered(self, job: Job, now: float) -> Event | None:
        match job["state"]:
            case "succeeded":
                return self._event("succeeded", manifest=job.get("manifest"))
            case "failed":
                why = job.get("error") or "no reason given"
                return self._event("failed", f"failed: {why}", exit_code=job.get("exit_code"))
            case "cancelled":
                return self._event("cancelled", "was cancelled")
        self._queue_end = self._queue_deadline(job, now)
        if now >= self._queue_end:
            place = job.get("queue_position", "?")
            return self._event("queue_timeout", f"waited {self.queue_timeout:g} s in the queue and is number {place}")
        return self._deadline(now)

    def _queue_deadline(self, job: Job, now: float) -> float:
        """A job that has run is in the queue again for the service's own reasons, and keeps its place there."""
        queued_at = job.get("queued_at") or now
        if self.queue_timeout is None or job["state"] != "queued" or (job.get("started_at") or 0) > queued_at:
            return float("inf")
        return float(queued_at + self.queue_timeout)

    def _unanswered(self, error: MoegenError, now: float) -> Event | None:
        if isinstance(error, MoegenJobNotFoundError):
            return self._event("missing", f"is unknown to the service: {error}")
        if not isinstance(error, MoegenUnavailableError):
            return self._event("refused", f"cannot be watched: {error}")
        self.failures += 1
        if self.failures >= MAX_FAILURES:
            return self._event("unavailable", f"could not be watched, {self.failures} polls failed in a row: {error}")
        return self._deadline(now)

    def _news(self, job: Job, now: float) -> str | None:
        progress = job.get("progress") or {}
        seen = (job["state"], job.get("queue_position"), progress.get("stage"), progress.get("rows_done"))
        if seen == self._last_seen:
            return None
        self._last_seen = seen
        return progress_line(job, now)

    def _deadline(self, now: float) -> Event | None:
        if now < self.end_time:
            return None
        return self._event("timeout", f"did not end by {clock(self.end_time)}")

    def _event(self, status: str, what: str = "", **more: Any) -> Event:
        message = f"job {self.key} {what}" if what else ""
        return {"status": status, "key": self.key, "message": message, **more}


def manifest_of(event: object) -> dict[str, Any]:
    """The manifest of a job that succeeded.

    Raises:
        MoegenError: of the class that belongs to the event's status.
        MoegenTriggerEventError: not an event of `JobPoll`.
    """
    if not isinstance(event, dict) or not isinstance(event.get("status"), str) or not isinstance(event.get("key"), str):
        raise MoegenTriggerEventError(f"{event!r} is not an event of MoegenBatchTrigger; it needs status and key")
    status, key = event["status"], event["key"]
    if status == "succeeded":
        return _manifest(event)
    if status not in _ERRORS:
        raise MoegenTriggerEventError(f"event status {status!r} is unknown; known are succeeded, {', '.join(_ERRORS)}")
    message = event.get("message") or f"job {key}: {status}"
    raise _FINAL.get(event.get("exit_code"), _ERRORS[status])(message)


def _manifest(event: Event) -> dict[str, Any]:
    manifest = event.get("manifest")
    if not isinstance(manifest, dict):
        raise MoegenTriggerEventError(f"job {event['key']} succeeded, but the service gave no manifest")
    return manifest
