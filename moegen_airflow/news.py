"""How far a job is, in words for a log and as values for the XCom `progress`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

Job = dict[str, Any]

PROGRESS = "progress"  # XCom key
STREAM_LOGS = ("progress", "none", "full")  # a line per change, nothing, the runner's own log as well


def progress_line(job: Job, now: float) -> str:
    """`1 240 000/5 000 000 rows (24.8 %) · 812.0 rows/s · ETA 04:37 UTC · 31 not ok`, or what comes before rows."""
    if job["state"] == "queued":
        return f"queued, position {job.get('queue_position', '?')}"
    progress = job.get("progress") or {}
    if not progress.get("rows_total"):
        return f"running, {progress.get('stage', 'starting')}" if job["state"] == "running" else job["state"]
    done, total = progress["rows_done"], progress["rows_total"]
    state = "" if job["state"] == "running" else f"{job['state']}, "
    parts = [f"{state}{_grouped(done)}/{_grouped(total)} rows ({100 * done / total:.1f} %)"]
    if rate := progress.get("rows_per_s"):
        parts.append(f"{rate:.1f} rows/s")
    if job["state"] == "running" and (eta_s := progress.get("eta_s")):
        parts.append(f"ETA {clock(now + eta_s)}")
    if not_ok := _not_ok(progress):
        parts.append(f"{_grouped(not_ok)} not ok")
    return " · ".join(parts)


def progress_value(job: Job, now: float) -> dict[str, Any]:
    """The same as a small JSON object; `eta` is a moment in ISO 8601, null where nobody can say."""
    progress = job.get("progress") or {}
    eta_s = progress.get("eta_s") if job["state"] == "running" else None
    return {
        "job_key": job.get("key"),
        "state": job["state"],
        "queue_position": job.get("queue_position", 0),
        "stage": progress.get("stage"),
        "rows_done": progress.get("rows_done", 0),
        "rows_total": progress.get("rows_total", 0),
        "rows_not_ok": _not_ok(progress),
        "rows_per_s": progress.get("rows_per_s", 0.0),
        "tokens_per_s": progress.get("tokens_per_s", 0.0),
        "eta": None if eta_s is None else datetime.fromtimestamp(now + eta_s, UTC).isoformat(timespec="seconds"),
    }


def clock(time_s: float) -> str:
    """The time of day, `04:37 UTC`."""
    return f"{datetime.fromtimestamp(time_s, UTC):%H:%M} UTC"


def _not_ok(progress: dict[str, Any]) -> int:
    return sum(count for status, count in (progress.get("statuses") or {}).items() if status != "ok")


def _grouped(count: int) -> str:
    return f"{count:,}".replace(",", " ")
