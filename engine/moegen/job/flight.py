"""The rows that are in the engine: from the reader's batches to the writer's parts."""

from __future__ import annotations

import collections.abc
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from moegen.errors import MoegenError
from moegen.job.answers import Answers
from moegen.job.keeper import Keeper
from moegen.job.prepare import Prepared
from moegen.job.progress import Meter
from moegen.job.repeats import Repeats
from moegen.job.rules import Rules
from moegen.row import RowError, RowResult, Status
from moegen.schedule.sequence import Begun, Finished, Request
from moegen.table.reader import RowBatch
from moegen.table.writer import TableWriter

if TYPE_CHECKING:
    from moegen.run.stats import PassReport


_MOST_COPIES = 16_384  # rows that wait for an answer that they share; then no more are read until some have it


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


@dataclass(frozen=True, slots=True)
class _Asked:
    """A row that asks the engine, and the first row of the table that asks for the same: itself, most often."""

    row: Prepared
    first: int


class Flight:
    """Feeds the engine as it asks for rows, and hands what comes out to the writer and the keeper.

    Memory holds the rows that the engine has taken and the parts that they belong to. Rows that the engine has crashed
    with too often wait until all others are done, and then run alone. Rows that ask for what an earlier row asks for
    never enter the engine if its answer is at hand or under way: they get that answer, whatever it is.

    Args:
        batches: every batch with rows that no part has, and those rows.
        repeats: which rows ask for the same.
        found: results that earlier runs left in the journal, by row; those rows need not be in a batch's list.
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
        repeats: Repeats,
        *,
        found: collections.abc.Mapping[int, RowResult],
        crashes: Counter[int],
        quarantine_after: int,
        check: Callable[[], None],
    ) -> None:
        self._batches, self._writer, self._meter = iter(batches), writer, meter
        self._answers, self._keeper, self._rules, self._check = answers, keeper, rules, check
        self._repeats = repeats
        self._found, self._crashes, self._quarantine_after = found, crashes, quarantine_after
        self._flying: dict[int, tuple[_Asked, list[Finished]]] = {}  # the row, and those of its answers that ended
        self._alone: deque[_Asked] = deque()
        self._copies: dict[int, list[Prepared]] = {}  # first row of work that is under way -> rows that wait for it
        self._waiting = 0  # such rows
        self._read = False  # no batch is left

    def run(self, engine: Generator) -> None:
        """Until every row has its result.

        Raises:
            Interrupted: `check` said so; rows in the engine are given up.
            TooManyErrors: a rule of the job says so.
            MoegenError: reading, generating or writing failed.
        """
        while not self._read:
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
        """Of all batches that are left, or until too many rows wait for those that were given."""
        while self._waiting < _MOST_COPIES:
            batch, rows = next(self._batches, (None, []))
            if batch is None:
                self._read = True
                return
            self._check()
            self._meter.report()  # rows may be answered for long without a pass
            wanted = self._writer.add_batch(batch)
            self._meter.add_seen(sum(index not in self._found for index in wanted))
            prepared = {row.row_index: row for row in rows}
            for index in wanted:
                row = prepared.get(index)
                if index in self._found:
                    self._remember(row, self._found[index])
                elif isinstance(row, Prepared):
                    yield from self._ask(row)
                elif row is not None:
                    self._settle(row)

    def _remember(self, row: Prepared | RowResult | None, found: RowResult) -> None:
        """The journal has the row's result."""
        if isinstance(row, Prepared):
            self._repeats.keep(self._repeats.first(row.request), row.request, found)
        self._settle(found, known=True)

    def _ask(self, row: Prepared) -> Iterator[Request]:
        """Requests for the row, unless its answer is there, will be, or is not to be had."""
        asked = _Asked(row, self._repeats.first(row.request))
        crashes = self._crashes[row.row_index]
        if (answer := self._repeats.answer(asked.first)) is not None:
            self._copy(row, asked.first, answer)
        elif asked.first in self._copies:
            self._copies[asked.first].append(row)
            self._waiting += 1
        else:
            self._copies[asked.first] = []
            if crashes >= self._quarantine_after:
                self._answer(asked, self._quarantined(row))
            elif crashes == self._quarantine_after - 1:
                self._alone.append(asked)
            else:
                yield from self._takes_off(asked)

    def _takes_off(self, asked: _Asked) -> Iterator[Request]:
        self._flying[asked.row.row_index] = asked, []
        yield from self._answers.requests(asked.row)

    def _land(self, finished: Finished) -> None:
        asked, answers = self._flying[finished.row_index]
        answers.append(finished)
        if len(answers) < self._answers.per_row:
            return
        del self._flying[finished.row_index]
        result = self._answers.result(asked.row, answers)
        entered = result.error is None or result.error.stage != "admit"
        first = asked.first == result.row_index  # what depends on what was at hand is no part of a table
        self._answer(asked, replace(result, attempts=self._crashes[result.row_index] + (entered and first)))

    def _answer(self, asked: _Asked, result: RowResult) -> None:
        """What came of a row, and so of all that wait for it."""
        self._repeats.keep(asked.first, asked.row.request, result)
        self._end(replace(result, dedup_of=asked.first if asked.first != result.row_index else None))
        copies = self._copies.pop(asked.first)
        self._waiting -= len(copies)
        for row in copies:
            self._copy(row, asked.first, result)

    def _copy(self, row: Prepared, first: int, answer: RowResult) -> None:
        """The row has the answer of the first that asked for the same."""
        error = answer.error
        if answer.status is Status.QUARANTINED and error is not None:
            message = f"the engine crashed again and again with row {answer.row_index} in it, which asks for the same"
            error = replace(error, message=message)
        copy = replace(
            answer,
            row_index=row.row_index,
            dedup_of=first,
            error=error,
            attempts=self._crashes[row.row_index],
            seed=row.request.params.seed,
            input_truncated=row.input_truncated,
            prompt_rendered=row.prompt_rendered,
        )
        self._end(copy)

    def _end(self, result: RowResult) -> None:
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
        return RowResult(
            row_index=index,
            status=Status.QUARANTINED,
            error=RowError("engine_crash", message, "generate", retryable=True),
            prompt_tokens=len(row.request.token_ids),
            attempts=self._crashes[index],
            seed=row.request.params.seed,
            input_truncated=row.input_truncated,
            prompt_rendered=row.prompt_rendered,
        )
