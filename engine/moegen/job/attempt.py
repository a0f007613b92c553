"""What one attempt at a job does, pass by pass, until it ends. Figures never fail a job: what goes wrong is logged."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import moegen
from moegen.errors import Interrupted
from moegen.job.forecast import Forecast
from moegen.job.stats_file import Stats
from moegen.run.figures import Yardstick
from moegen.run.history import History, Span
from moegen.run.stats import PassReport

_EVERY_S = 300.0  # between two writes while the job runs: what a lost attempt's figures may lack

log = logging.getLogger(__name__)


class Attempt:
    """One attempt's figures, from the first pass on; written every few minutes and when it ends, however it ends.

    Args:
        stats: what earlier attempts left; this one becomes its last entry.
        folder: where to write.
        yardstick: what the counts are measured against.
        promised: the planner's forecast, if there is one.
        about: what else the entry says: `model_uri`, `resumed_rows` (that earlier attempts committed), `journal_rows`
            (that they journaled), `load_s`.
    """

    def __init__(
        self, stats: Stats, folder: str, yardstick: Yardstick, promised: Forecast | None, about: Mapping[str, Any]
    ) -> None:
        self.history = History()
        self._stats, self._folder = stats, folder
        self._yardstick, self._promised = yardstick, promised
        self._about = {"engine_version": moegen.__version__, "started_at": time.time(), **about}
        self._started_s = self._written_s = time.monotonic()

    def add(self, report: PassReport) -> None:
        """One more pass."""
        if self.history.total is None:
            self._enter()
        self.history.add(report)
        if time.monotonic() - self._written_s >= _EVERY_S:
            self._write("running")
            self._written_s = time.monotonic()

    def live(self) -> dict[str, Any] | None:
        """The `engine` of a job's progress: totals of this attempt, rates and utilisations of its last minutes."""
        total, recent = self.history.total, self.history.recent
        if total is None or recent is None:
            return None
        figures = self._yardstick.measure(recent)
        return {
            "running": round(recent.running, 1),
            "passes": total.passes,
            "disk_bytes": total.disk_bytes,
            "link_bytes": total.link_bytes,
            "starved_s": total.waited_s,
            **{name: value for name, value in asdict(figures).items() if name != "tokens_per_s"},
        }

    @contextmanager
    def written(self) -> Iterator[Attempt]:
        """Writes the figures at the end of the block, with how it ended."""
        try:
            yield self
        except BaseException as error:
            self._write("interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed")
            raise
        self._write("finished")

    def _enter(self) -> None:
        self._stats.attempts.append({})
        self._stats.expert_counts.append(self.history.expert_counts)

    def _write(self, outcome: str) -> None:
        if self.history.total is None:
            return
        try:
            self._stats.attempts[-1] = self._entry(self.history.total, outcome)
            self._stats.write(self._folder)
        except Exception as error:  # whatever it is, the answers matter more than the figures about them
            log.warning("statistics were not written: %s: %s", type(error).__name__, error)

    def _entry(self, total: Span, outcome: str) -> dict[str, Any]:
        yardstick = self._yardstick
        return {
            **self._about,
            "outcome": outcome,
            "seconds": time.monotonic() - self._started_s,
            "peak_rss_bytes": peak_rss_bytes(),
            "total": yardstick.describe(total),
            "throughput": _throughput(total, self._promised),
            "passes": _columns(self.history.spans, yardstick.describe),
            "model": asdict(yardstick.shape),
            "plan": yardstick.plan.to_mapping(),
            "machine": asdict(yardstick.machine),
        }


def _columns(spans: tuple[Span, ...], describe: Callable[[Span], Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Column -> one value per span: shorter than a mapping per span, and what plots want."""
    rows = [describe(span) for span in spans]
    return {name: [_short(row[name]) for row in rows] for name in rows[0]}


def _short(value: Any) -> Any:
    """Six digits are more than a clock gives."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _throughput(total: Span, promised: Forecast | None) -> dict[str, Any]:
    """Predicted and measured generated tokens/s; the difference as a share of what was measured."""
    measured = total.generated_tokens / total.seconds if total.seconds else None
    return {
        "measured_tokens_per_s": measured,
        "predicted_tokens_per_s": promised.tokens_per_s if promised else None,
        "difference": promised.tokens_per_s / measured - 1 if promised and measured else None,
        "prediction": asdict(promised) if promised else None,
    }


def peak_rss_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """The most memory that this process has had resident; None where the system does not tell.

    `getrusage` tells a child the peak of its parent, where that was larger.
    """
    try:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        return None
