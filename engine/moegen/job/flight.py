"""The rows that are in the engine: from the reader's batches to the writer's parts."""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

from moegen.errors import Interrupted
from moegen.job.answers import Answers
from moegen.job.prepare import Prepared
from moegen.job.progress import Meter
from moegen.row import RowResult
from moegen.schedule.sequence import Finished, Request
from moegen.table.reader import RowBatch
from moegen.table.writer import TableWriter

if TYPE_CHECKING:
    from moegen.run.stats import PassReport


class Generator(Protocol):
    """What answers requests: the engine."""

    def generate(self, requests: Iterable[Request]) -> collections.abc.Generator[Finished | PassReport, None, None]:
        """Each row as it ends, and a report after every pass."""
        ...


class Flight:
    """Feeds the engine as it asks for rows, and hands what comes out to the writer.

    Memory holds the rows that the engine has taken and the parts that they belong to.
    """

    def __init__(
        self,
        batches: Iterable[tuple[RowBatch, list[Prepared | RowResult]]],
        writer: TableWriter,
        meter: Meter,
        answers: Answers,
        stopping: Callable[[], bool],
    ) -> None:
        self._batches, self._writer, self._meter = batches, writer, meter
        self._answers, self._stopping = answers, stopping
        self._flying: dict[int, tuple[Prepared, list[Finished]]] = {}  # the row, and those of its answers that ended

    def run(self, engine: Generator) -> None:
        """Until every row has its result.

        Raises:
            Interrupted: `stopping` said so; rows in the engine are given up.
            MoegenError: reading, generating or writing failed.
        """
        with closing(engine.generate(self._requests())) as events:
            for event in events:
                if isinstance(event, Finished):
                    self._land(event)
                else:
                    self._meter.add_pass(event.generated_tokens)
                    self._check_stop()

    def _requests(self) -> Iterator[Request]:
        for batch, rows in self._batches:
            self._check_stop()
            self._writer.add_batch(batch)
            for row in rows:
                if isinstance(row, RowResult):
                    self._settle(row)
                else:
                    self._flying[row.request.row_index] = row, []
                    yield from self._answers.requests(row)

    def _check_stop(self) -> None:
        if self._stopping():
            done = self._meter.progress()
            raise Interrupted(
                f"stopped on request; {done.rows_committed} of {done.rows_total} rows are committed, "
                "and the same command goes on from there"
            )

    def _settle(self, result: RowResult) -> None:
        part = self._writer.add(result)
        self._meter.add_row(result)
        if part is not None:
            self._meter.add_committed(part.rows)

    def _land(self, finished: Finished) -> None:
        row, answers = self._flying[finished.row_index]
        answers.append(finished)
        if len(answers) == self._answers.per_row:
            del self._flying[finished.row_index]
            self._settle(self._answers.result(row, answers))
