"""The rows that are in the engine: from the reader's batches to the writer's parts."""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

from moegen.errors import Interrupted
from moegen.job.prepare import Prepared
from moegen.job.progress import Meter
from moegen.row import RowResult, Status
from moegen.schedule.sequence import Finished, Request
from moegen.spec import Output
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
        output: Output,
        stopping: Callable[[], bool],
    ) -> None:
        self._batches, self._writer, self._meter = batches, writer, meter
        self._output, self._stopping = output, stopping
        self._flying: dict[int, Prepared] = {}

    def run(self, engine: Generator) -> None:
        """Until every row has its result.

        Raises:
            Interrupted: `stopping` said so; rows in the engine are given up.
            MoegenError: reading, generating or writing failed.
        """
        with closing(engine.generate(self._requests())) as events:
            for event in events:
                if isinstance(event, Finished):
                    self._settle(self._result(event))
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
                    self._flying[row.request.row_index] = row
                    yield row.request

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

    def _result(self, finished: Finished) -> RowResult:
        prepared = self._flying.pop(finished.row_index)
        answered = finished.status in (Status.OK, Status.LENGTH)
        cut = finished.status is Status.LENGTH
        return RowResult(
            row_index=finished.row_index,
            status=finished.status,
            output=finished.text if answered and (not cut or self._output.on_length == "keep") else None,
            output_raw=finished.text if cut else None,
            error=finished.error,
            finish_reason=finished.finish_reason,
            prompt_tokens=finished.prompt_tokens,
            completion_tokens=len(finished.token_ids) if answered else None,
            seed=prepared.request.params.seed,
            input_truncated=prepared.input_truncated,
            token_ids=finished.token_ids if answered and "token_ids" in self._output.include else None,
            prompt_rendered=prepared.prompt_rendered,
        )
