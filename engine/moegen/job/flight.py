"""The rows that are in the engine: from the reader's batches to the writer's parts."""

from __future__ import annotations

import collections.abc
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from moegen.errors import MoegenError
from moegen.job.answers import Answers
from moegen.job.keeper import Keeper
from moegen.job.prepare import Prepared
from moegen.job.progress import Meter
from moegen.job.rules import Rules
from moegen.row import RowError, RowResult, Status
from moegen.schedule.sequence import Begun, Finished, Request
from moegen.table.reader import RowBatch
from moegen.table.writer import TableWriter

if TYPE_CHECKING:
    from moegen.run.stats import PassReport


class Generator(Protocol):
    """What answers requests: the engine."""

    def generate(
        self, requests: Iterable[Request]
    ) -> collections.abc.Generator[Begun | Finished | PassReport, None, None]:
        """Which rows begin, each row as it ends, and a report after every pass."""
        ...


class NoEngine:
    """For a job whose rows are all answered, but not all in parts."""

    def generate(
        self, requests: Iterable[Request]
    ) -> collections.abc.Generator[Begun | Finished | PassReport, None, None]:
        """Raises `MoegenError` when a row asks for an answer."""
        for request in requests:
            raise MoegenError(
                f"row {request.row_index} asks for an answer, but no engine was needed when the job began"
            )
        yield from ()


class Flight:
    """Feeds the engine as it asks for rows, and hands what comes out to the writer and the keeper.

    Memory holds the rows that the engine has taken and the parts that they belong to. Rows that the engine has crashed
    with too often wait until all others are done, and then run alone.

    Args:
        batches: every batch with rows that no part has, and those rows.
        found: results that earlier runs left in the journal, by row; those rows are in no batch's list.
        crashes: how often the engine crashed with a row in it.
        quarantine_after: so many crashes, and the row is not run any more.
        check: asked at every pass and every batch; what it raises ends the flight.
    """

    def __init__(
        self,
        batches: Iterable[tuple[RowBatch, list[Prepared | RowResult]]],
        writer: TableWriter,
        meter: Meter,
        answers: Answers,
        keeper: Keeper,
        rules: Rules,
        *,
        found: collections.abc.Mapping[int, RowResult],
        crashes: Counter[int],
        quarantine_after: int,
        check: Callable[[], None],
    ) -> None:
        self._batches, self._writer, self._meter = batches, writer, meter
        self._answers, self._keeper, self._rules, self._check = answers, keeper, rules, check
        self._found, self._crashes, self._quarantine_after = found, crashes, quarantine_after
        self._flying: dict[int, tuple[Prepared, list[Finished]]] = {}  # the row, and those of its answers that ended
        self._alone: deque[Prepared] = deque()

    def run(self, engine: Generator) -> None:
        """Until every row has its result.

        Raises:
            Interrupted: `check` said so; rows in the engine are given up.
            TooManyErrors: a rule of the job says so.
            MoegenError: reading, generating or writing failed.
        """
        self._drive(engine, self._requests())
        while self._alone:
            self._keeper.save()  # the next row may end this process
            self._meter.report()
            self._drive(engine, self._takes_off(self._alone.popleft()))

    def _drive(self, engine: Generator, requests: Iterable[Request]) -> None:
        with closing(engine.generate(requests)) as events:
            for event in events:
                if isinstance(event, Begun):
                    self._keeper.begin(event.row_indexes)
                elif isinstance(event, Finished):
                    self._land(event)
                else:
                    self._meter.add_pass(event.generated_tokens)
                    self._check()

    def _requests(self) -> Iterator[Request]:
        for batch, rows in self._batches:
            self._check()
            wanted = self._writer.add_batch(batch)
            known = [index for index in wanted if index in self._found]
            self._meter.add_seen(len(wanted) - len(known))
            for index in known:
                self._settle(self._found[index], known=True)
            for row in rows:
                if isinstance(row, RowResult):
                    self._settle(row)
                elif (crashes := self._crashes[row.request.row_index]) >= self._quarantine_after:
                    self._settle(self._quarantined(row))
                elif crashes == self._quarantine_after - 1:
                    self._alone.append(row)
                else:
                    yield from self._takes_off(row)

    def _takes_off(self, row: Prepared) -> Iterator[Request]:
        self._flying[row.request.row_index] = row, []
        yield from self._answers.requests(row)

    def _land(self, finished: Finished) -> None:
        row, answers = self._flying[finished.row_index]
        answers.append(finished)
        if len(answers) < self._answers.per_row:
            return
        del self._flying[finished.row_index]
        result = self._answers.result(row, answers)
        entered = result.error is None or result.error.stage != "admit"
        result = replace(result, attempts=self._crashes[result.row_index] + entered)
        self._keeper.end(result)
        self._settle(result)

    def _settle(self, result: RowResult, *, known: bool = False) -> None:
        """`known`: the journal has it, and the meter counted it."""
        part = self._writer.add(result)
        if not known:
            self._meter.add_row(result)
        if part is not None:
            self._meter.add_committed(part.rows)
        self._rules.check_row(result)

    def _quarantined(self, row: Prepared) -> RowResult:
        index = row.request.row_index
        message = f"the engine crashed {self._crashes[index]} times with this row in it, the last time with it alone"
        result = RowResult(
            row_index=index,
            status=Status.QUARANTINED,
            error=RowError("engine_crash", message, "generate", retryable=True),
            prompt_tokens=len(row.request.token_ids),
            attempts=self._crashes[index],
            seed=row.request.params.seed,
            input_truncated=row.input_truncated,
            prompt_rendered=row.prompt_rendered,
        )
        self._keeper.end(result)
        return result
