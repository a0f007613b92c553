"""What a job would do: every row read, rendered and encoded, nothing written, no model loaded, no torch."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from moegen.job.answers import Answers
from moegen.job.forecast import Forecast, forecast
from moegen.job.lengths import table_workload, work
from moegen.job.prepare import Prepared, Preparer, needed_columns
from moegen.job.repeats import Repeats
from moegen.plan.machine import Machine
from moegen.plan.search import choose_plan
from moegen.plan.workload import UNKNOWN, Workload
from moegen.row import RowResult
from moegen.run.figures import Yardstick
from moegen.shape import ModelShape
from moegen.spec import JobSpec
from moegen.table.columns import result_columns
from moegen.table.first_rows import FirstRows
from moegen.table.reader import TableReader
from moegen.table.schema import output_schema
from moegen.text import Tokenizer
from moegen.units import format_duration

_LENGTHS = 4096  # rows whose lengths the estimate is made from; of more, as many at random


@dataclass(frozen=True)
class DryRun:
    """What `dry_run` found. Tokens are exact; of the answers only how long they may be is known."""

    rows: int
    files: int
    ready: int  # rows that would be answered
    statuses: dict[str, int]  # status -> rows that would not
    errors: dict[str, int]  # error code -> rows; `null` where a row has no prompt at all
    truncated: int  # rows whose prompt would be cut to fit
    repeated: int  # rows that ask for what an earlier row asks for
    runs: int  # rows that would run: with dedup, those that repeat none
    prompt_tokens: int  # of those
    longest_prompt_tokens: int
    answers: int  # that would be generated; 0 for the tasks classify and score
    most_completion_tokens: int  # if every answer is as long as it may be
    columns: dict[str, str]  # of the output table, in order, with their Arrow types
    estimate: Forecast | None  # None where this machine was not measured, or no row would run

    def describe(self) -> str:
        """Lines for people."""
        reasons = ", ".join(f"{count} {code}" for code, count in self.errors.items())
        would_not = ", ".join(f"{count} {status}" for status, count in self.statuses.items())
        lines = [
            f"{self.rows} rows in {self.files} file{'s' * (self.files != 1)}: {self.ready} would be answered"
            + (f", {would_not} ({reasons})" if would_not else ""),
            f"prompts   {self.prompt_tokens} tokens, {self.longest_prompt_tokens} the longest; {self.truncated} cut",
            f"answers   {self.answers}, of {self.most_completion_tokens} tokens in all at most",
            f"repeated  {self.repeated} rows ask for what an earlier row asks for; {self.runs} rows would run",
            "columns   " + ", ".join(f"{name}: {type_}" for name, type_ in self.columns.items()),
            f"time      {self._time()}",
        ]
        return "\n".join(lines)

    def _time(self) -> str:
        if self.estimate is None:
            why = "this machine was not measured (run: moegen probe)" if self.ready else "no row would run"
            return f"not estimated: {why}"
        rate, seconds = self.estimate.tokens_per_s, format_duration(self.estimate.seconds)
        return f"about {seconds}, {rate:,.1f} tokens/s, if every answer is as long as it may be"


@dataclass
class _Count:
    """What the rows add up to, in bounded memory but for what `FirstRows` remembers of each."""

    dedup: bool  # rows that repeat another would not run
    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    prompt_tokens: int = 0
    longest: int = 0
    most_completion_tokens: int = 0
    ready: int = 0
    runs: int = 0
    repeated: int = 0
    repeats: Repeats = field(default_factory=lambda: Repeats(FirstRows()))
    lengths: list[tuple[int, int]] = field(default_factory=list)
    _dice: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, row: Prepared | RowResult) -> None:
        if isinstance(row, RowResult):
            self.statuses[row.status.value] += 1
            self.errors["null" if row.error is None else row.error.code] += 1
            return
        request = row.request
        self.ready += 1
        self.truncated += row.input_truncated
        self.longest = max(self.longest, len(request.token_ids))
        repeats = self.repeats.first(request) != request.row_index
        self.repeated += repeats
        if repeats and self.dedup:
            return
        self.runs += 1
        self.prompt_tokens += len(request.token_ids)
        if not request.continuations:
            self.most_completion_tokens += request.params.max_tokens
        self._keep_length(work(request))

    def _keep_length(self, length: tuple[int, int]) -> None:
        """Every row is as likely as any other to be among those that are kept."""
        if len(self.lengths) < _LENGTHS:
            self.lengths.append(length)
        elif (place := self._dice.randrange(self.runs)) < _LENGTHS:
            self.lengths[place] = length


def dry_run(spec: JobSpec) -> DryRun:
    """Reads the whole table as the job would.

    Raises:
        MoegenError: whatever the job would end with before its model is loaded.
    """
    reader = TableReader(spec.input, needed_columns(spec))
    shape = ModelShape.read(spec.model.uri).kept(spec.model.weights)
    machine = Machine.detect(spec.engine.device)
    tokenizer = Tokenizer.load(spec.model.uri)
    workload, prefix = table_workload(reader, Preparer(spec, tokenizer, shape.max_position_embeddings))
    plan = choose_plan(shape, machine, spec.engine, spec.model.dtype, workload or UNKNOWN)
    answers = Answers(spec, tokenizer)
    schema = output_schema(reader.schema, spec.output, result_columns(spec))
    preparer = Preparer(spec, tokenizer, min(shape.max_position_embeddings, plan.max_sequence_tokens))
    count = _Count(spec.dedup == "exact")
    for batch in reader.batches():
        for row in preparer.prepare(enumerate(batch.values, batch.first_row)):
            count.add(row)
    asked = count.runs * answers.per_row
    known = Workload(asked, tuple(count.lengths), len(prefix)) if count.ready else None
    return DryRun(
        rows=reader.rows,
        files=len(reader.files),
        ready=count.ready,
        statuses=dict(sorted(count.statuses.items())),
        errors=dict(sorted(count.errors.items())),
        truncated=count.truncated,
        repeated=count.repeated,
        runs=count.runs,
        prompt_tokens=count.prompt_tokens,
        longest_prompt_tokens=count.longest,
        answers=asked if spec.task == "generate" else 0,
        most_completion_tokens=count.most_completion_tokens * answers.per_row,
        columns={column.name: str(column.type) for column in schema},
        estimate=forecast(Yardstick(shape, machine, plan), known, asked),
    )
