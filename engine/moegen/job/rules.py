"""When a job ends before its last row, or without `_SUCCESS`: its rules for failed rows and its limits."""

from __future__ import annotations

import time
from collections.abc import Callable

from moegen.errors import Interrupted, TooManyErrors
from moegen.job.progress import Meter
from moegen.row import RowResult
from moegen.spec import Errors, Limits
from moegen.table.part import Totals

_CHECK_ROWS = 1000  # as early as a share of failed rows says something


class Rules:
    """The rules of one job, asked as its rows end.

    Args:
        errors, limits: as the specification has them.
        meter: counts the rows, those of earlier runs included.
        now: Unix time in seconds.
    """

    def __init__(self, errors: Errors, limits: Limits, meter: Meter, now: Callable[[], float] = time.time) -> None:
        self._errors, self._limits, self._meter, self._now = errors, limits, meter, now
        self._deadline = limits.deadline_at
        self._rate_checked = False

    def check_found(self) -> None:
        """Before the first row: what earlier runs left. Raises as `check_row`."""
        self._check_count(self._meter.totals)
        self._check_rate()
        if (failed := self._meter.totals.failed) and self._errors.on_row_error == "fail_fast":
            statuses = ", ".join(f"{count} {status}" for status, count in failed.items())
            raise TooManyErrors(
                f"earlier runs of this job have failed rows ({statuses}), and errors.on_row_error is fail_fast; set "
                "record to go on from here"
            )

    def check_row(self, result: RowResult) -> None:
        """After a row was counted.

        Raises:
            TooManyErrors: it failed and no row may, it is one too many, or too many of the first 1,000 have.
        """
        if result.status.failed and self._errors.on_row_error == "fail_fast":
            code = f" ({result.error.code})" if result.error is not None else ""
            raise TooManyErrors(
                f"row {result.row_index} has the status {result.status.value}{code}, and errors.on_row_error is "
                "fail_fast; mend the row, or set record to go on from here"
            )
        if result.status.failed:
            self._check_count(self._meter.totals)
        self._check_rate()

    def _check_count(self, totals: Totals) -> None:
        allowed = self._errors.max_failed_rows
        if allowed is not None and (count := sum(totals.failed.values())) > allowed:
            statuses = ", ".join(f"{count} {status}" for status, count in totals.failed.items())
            raise TooManyErrors(
                f"{count} rows failed ({statuses}), more than errors.max_failed_rows {allowed} allows, so there is no "
                "_SUCCESS; moegen inspect shows examples; with a larger errors.max_failed_rows the same job goes on "
                "from here"
            )

    def _check_rate(self) -> None:
        if not self._rate_checked and self._meter.totals.rows >= _CHECK_ROWS:
            self._rate_checked = True
            # Rows that cannot run have failed when they are read, long before those beside them are answered.
            self._check_share(self._meter.totals, self._meter.rows_seen)

    def check_end(self, totals: Totals) -> None:
        """Raises `TooManyErrors` when more rows failed than the job allows."""
        self._check_count(totals)
        self._check_share(totals, totals.rows)

    def _check_share(self, totals: Totals, rows: int) -> None:
        count = sum(totals.failed.values())
        if rows and count / rows > self._errors.max_error_rate:
            failed = ", ".join(f"{count} {status}" for status, count in totals.failed.items())
            raise TooManyErrors(
                f"{count} of {rows} rows failed ({failed}), more than "
                f"errors.max_error_rate {self._errors.max_error_rate:g} allows, so there is no _SUCCESS; moegen "
                "inspect shows examples; with a larger errors.max_error_rate the same job goes on from here"
            )

    def check_pass(self) -> None:
        """Before a pass, and before rows are read.

        Raises:
            Interrupted: the deadline has passed, or the tokens are used up.
        """
        if self._deadline is not None and self._now() >= self._deadline:
            raise Interrupted(f"stopped at limits.deadline {self._limits.deadline}; {self._left()}")
        limit = self._limits.max_total_tokens
        if limit is not None and (used := self._meter.totals.tokens) >= limit:
            raise Interrupted(f"stopped after {used} tokens, at limits.max_total_tokens {limit}; {self._left()}")

    def _left(self) -> str:
        done, total = self._meter.totals.rows, self._meter.rows_total
        return f"{done} of {total} rows are done; with another limit the same command goes on from there"
