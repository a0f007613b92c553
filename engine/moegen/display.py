"""Progress for people: a bar on a terminal, plain lines elsewhere. Always on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from moegen.job.progress import Progress
from moegen.units import format_duration

_LINE_EVERY_S = 10.0


class Lines:
    """One line per stage, and one every ten seconds while rows run."""

    def __init__(self) -> None:
        self._stage, self._told_at = "", 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.stage != self._stage or now - self._told_at >= _LINE_EVERY_S:
            self._stage, self._told_at = progress.stage, now
            print(line(progress), file=sys.stderr, flush=True)


class Bar:
    """A bar over all rows of the table."""

    def __init__(self) -> None:
        self._bar = tqdm(
            unit="row",
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows{postfix}",
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def show(self, progress: Progress) -> None:
        self._bar.total = progress.rows_total
        self._bar.n = progress.rows_done
        self._bar.set_description_str(progress.stage, refresh=False)
        self._bar.set_postfix_str(rates(progress), refresh=False)
        self._bar.refresh()


def display() -> Bar | Lines:
    """What suits standard error. Use it in a `with`, and pass `show` as the job's report."""
    return Bar() if sys.stderr.isatty() else Lines()


def line(progress: Progress) -> str:
    """`running: 120/300 rows (40 %), 12.3 rows/s, 345 tokens/s, ETA 2m10s, 3 not ok`."""
    if progress.stage != "running" or not progress.rows_total:
        return progress.stage
    share = f"{progress.stage}: {progress.rows_done}/{progress.rows_total} rows"
    return f"{share} ({100 * progress.rows_done / progress.rows_total:.0f} %), {rates(progress)}"


def rates(progress: Progress) -> str:
    """Rows/s, tokens/s, what is left of the time, and how many rows have no whole answer."""
    parts = [f"{progress.rows_per_s:.1f} rows/s", f"{progress.tokens_per_s:.0f} tokens/s"]
    if progress.eta_s is not None:
        parts.append(f"ETA {format_duration(progress.eta_s)}")
    if not_ok := progress.rows_done - progress.statuses.get("ok", 0):
        parts.append(f"{not_ok} not ok")
    return ", ".join(parts)
