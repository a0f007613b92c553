"""One job from its specification to its manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from moegen.errors import Interrupted
from moegen.job.ahead import ahead
from moegen.job.answers import Answers
from moegen.job.attempt import Attempt
from moegen.job.digest import model_digest
from moegen.job.flight import Flight, NoEngine
from moegen.job.flight import Generator as RowGenerator
from moegen.job.forecast import forecast
from moegen.job.keeper import Keeper
from moegen.job.lengths import table_workload
from moegen.job.marks import Marks
from moegen.job.prepare import Prepared, Preparer, needed_columns
from moegen.job.progress import Meter, Progress
from moegen.job.repeats import Repeats
from moegen.job.rules import Rules
from moegen.job.stats_file import Stats, earlier_stats
from moegen.job.weight_cost import known_cost, measure_cost
from moegen.plan.machine import Machine
from moegen.plan.plan import Plan
from moegen.plan.search import choose_plan
from moegen.plan.workload import UNKNOWN, Workload
from moegen.row import RowResult
from moegen.run.figures import Yardstick
from moegen.run.stats import PassReport
from moegen.schedule.sequence import Begun, Finished, Request
from moegen.shape import ModelShape
from moegen.spec import JobSpec
from moegen.table.batch_plan import BatchPlan, batch_folder, clear_batch
from moegen.table.columns import result_columns
from moegen.table.fingerprint import fingerprint
from moegen.table.first_rows import StoredFirstRows
from moegen.table.journal import Journal
from moegen.table.lease import Lease
from moegen.table.manifest import Manifest
from moegen.table.part import Totals
from moegen.table.reader import RowBatch, TableReader
from moegen.table.schema import output_schema
from moegen.table.writer import TableWriter
from moegen.text import Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

    from moegen.run.engine import Engine
    from moegen.table.iceberg import IcebergTable

_BATCHES_AHEAD = 4  # of at most 1,024 rows each: encoded while the device computes


def run_job(
    spec: JobSpec,
    *,
    report: Callable[[Progress], None] = lambda progress: None,
    stopping: Callable[[], bool] = lambda: False,
    device: AbstractContextManager[object] | None = None,
) -> Manifest:
    """Run the job, or what earlier runs left of it: if nothing is left, the model is not loaded.

    Args:
        spec: the job.
        report: called with the progress, at every pass of the engine.
        stopping: asked at every pass; once true the job ends with `Interrupted`, and what is finished is saved.
        device: entered before the model is loaded and left after the last pass; a lock, say.

    Raises:
        MoegenError: see `moegen.errors`.
    """
    started_at = time.time()
    meter = Meter(report)
    meter.enter("starting")
    reader = TableReader(spec.input, needed_columns(spec))
    setup, columns = _Setup.of(spec, reader), result_columns(spec)
    iceberg = _iceberg(spec, output_schema(reader.schema, spec.output, columns))
    meter.planned(setup.plan.to_mapping())
    digest = model_digest(spec.model.uri)
    work = fingerprint(spec, digest, setup.tokenizer.digest, reader.files)
    key = spec.job.key or work[:16]
    folder = batch_folder(spec.output.uri, key)
    batch_plan = BatchPlan.of(spec, work, (digest, setup.tokenizer.digest), reader.files, reader.rows)
    if spec.output.mode == "create":
        batch_plan.check(folder)
    with Lease(folder, spec.checkpoint.lease_seconds, stopping) as lease:
        writer = TableWriter(spec.output, reader.schema, reader.rows, work, key, lease, columns, reader.first_row)
        batch_plan.write(folder)
        journal = Journal(folder, lease.epoch, work, spec.output.rows_per_part, reader.first_row)
        found = journal.read(writer.is_committed)
        journaled = Totals.of(found.values())
        meter.resume(reader.rows, writer.resumed, journaled)
        rules = Rules(spec.errors, spec.limits, meter)

        def check() -> None:
            if stopping():
                raise _stopped(meter)
            lease.check_known()
            rules.check_pass()

        if not writer.complete:
            rules.check_found()
            check()
            meter.enter("loading")
            marks = Marks(folder, lease.epoch, after_crash=lease.after_crash, void_epoch=lease.paused_epoch)
            keeper = Keeper(journal, marks, lease, writer, spec.checkpoint.journal_seconds, stopping)
            meter.follow_journal(lambda: keeper.rows_journaled)
            repeats = _repeats(spec, folder, writer, reader, setup.preparer)
            known = () if spec.repeats else found  # what they ask for may be asked for again
            batches = ahead(_prepared(reader, writer, setup.preparer, known), _BATCHES_AHEAD)
            flight = Flight(
                batches, writer, meter, setup.answers, keeper, rules, repeats,
                found=found, crashes=marks.crashes, quarantine_after=spec.errors.quarantine_after, check=check,
            )  # fmt: skip
            inherited = _Inherited(work, reader.rows, writer.resumed.rows, journaled.rows)
            weigh = partial(measure_cost, folder, spec.model.uri, setup.stored_plan, setup.plan, reader, setup.preparer)
            opened = _engine(spec, setup, inherited, meter, weigh)
            with device or nullcontext(), keeper, closing(batches), opened as engine:
                flight.run(engine)
        meter.enter("finishing")
        manifest = writer.finish(
            job_name=spec.job.name, model_digest=digest, input_files=reader.files, started_at=started_at,
            journaled=journaled, max_error_rate=spec.errors.max_error_rate,
            register=None if iceberg is None else partial(iceberg.register, spec.output.uri),
            weights=known_cost(folder),
        )  # fmt: skip
        clear_batch(folder)
        rules.check_end(writer.totals)
    return manifest


@dataclass(frozen=True)
class _Setup:
    """What is known of model and machine before the first row."""

    shape: ModelShape
    machine: Machine
    workload: Workload | None
    prefix: tuple[int, ...]  # token ids that nearly all prompts begin with
    plan: Plan
    stored_plan: Plan  # with experts as they are stored and pages of the model's dtype
    tokenizer: Tokenizer
    preparer: Preparer
    answers: Answers

    @classmethod
    def of(cls, spec: JobSpec, reader: TableReader) -> _Setup:
        shape = ModelShape.read(spec.model.uri).kept(spec.model.weights)
        machine = Machine.detect(spec.engine.device)
        tokenizer = Tokenizer.load(spec.model.uri)
        workload, prefix = table_workload(reader, Preparer(spec, tokenizer, shape.max_position_embeddings))
        plan = choose_plan(shape, machine, spec.engine, spec.model.dtype, workload or UNKNOWN)
        stored_plan = plan
        if shape.kept_as != "as_stored" or plan.kv_dtype == "int8":
            as_stored, exact = shape.kept("as_stored"), replace(spec.engine.plan, kv_dtype="auto")
            engine = replace(spec.engine, plan=exact)
            stored_plan = choose_plan(as_stored, machine, engine, spec.model.dtype, workload or UNKNOWN)
        preparer = Preparer(spec, tokenizer, min(shape.max_position_embeddings, plan.max_sequence_tokens))
        return cls(shape, machine, workload, prefix, plan, stored_plan, tokenizer, preparer, Answers(spec, tokenizer))


@dataclass(frozen=True)
class _Inherited:
    """How far earlier runs brought the work."""

    work: str  # its fingerprint
    rows: int  # of the table
    committed_rows: int
    journaled_rows: int

    @property
    def rows_left(self) -> int:
        return self.rows - self.committed_rows - self.journaled_rows


@contextmanager
def _engine(
    spec: JobSpec, setup: _Setup, inherited: _Inherited, meter: Meter, weigh: Callable[[], None]
) -> Iterator[RowGenerator]:
    """The model, loaded, and every pass counted; no model where no row is left to run.

    `weigh` measures what it costs to keep experts otherwise than they are stored, or pages in few bits.
    """
    if inherited.rows_left == 0:
        yield NoEngine()
        return
    loading = time.monotonic()
    os.environ.setdefault("NUMBA_NUM_THREADS", str(setup.plan.threads))  # Numba reads it once, when it is imported
    from moegen.run.engine import Engine

    if setup.plan is not setup.stored_plan:
        weigh()
    with Engine.open(spec.model.uri, setup.plan, tokenizer=setup.tokenizer) as engine:
        load_s = time.monotonic() - loading
        yardstick = Yardstick(setup.shape, setup.machine, setup.plan)
        promised = forecast(yardstick, setup.workload, inherited.rows_left * setup.answers.per_row)
        about = {
            "model_uri": spec.model.uri,
            "resumed_rows": inherited.committed_rows,
            "journal_rows": inherited.journaled_rows,
            "load_s": load_s,
        }
        attempt = Attempt(_earlier(spec, inherited.work), spec.output.uri, yardstick, promised, about)
        meter.follow(attempt.live)
        meter.enter("running")
        with attempt.written():
            yield _Watched(engine, setup.prefix, attempt.add)


def _repeats(spec: JobSpec, folder: str, writer: TableWriter, reader: TableReader, preparer: Preparer) -> Repeats:
    """Knows what the rows of committed parts ask for: it was kept when they were, else they are read again."""
    if not spec.repeats:
        return Repeats(None)
    size = spec.output.rows_per_part
    rows = StoredFirstRows(folder, writer.committed, size)
    writer.before_commit = rows.save
    repeats, unknown = Repeats(rows), set(rows.unknown)

    def wanted(first: int, count: int) -> bool:
        return not unknown.isdisjoint(range(first // size, -(-(first + count) // size)))

    for batch in reader.batches(wanted) if unknown else ():
        numbered = enumerate(batch.values, batch.first_row)
        for row in preparer.prepare([(index, values) for index, values in numbered if index // size in unknown]):
            if isinstance(row, Prepared):
                repeats.first(row.request)
    return repeats


def _iceberg(spec: JobSpec, schema: pa.Schema) -> IcebergTable | None:
    """The table that the job's parts go to, looked at before the first row."""
    if spec.output.iceberg is None:
        return None
    from moegen.table.iceberg import IcebergTable

    table = IcebergTable(spec.output.iceberg, schema)
    if spec.output.mode == "new_run":
        table.check_new(spec.output.uri)
    return table


def _stopped(meter: Meter) -> Interrupted:
    done = meter.progress()
    return Interrupted(
        f"stopped on request; {done.rows_committed} of {done.rows_total} rows are committed, "
        "and the same command goes on from there and from the journal"
    )


def _earlier(spec: JobSpec, work: str) -> Stats:
    return Stats(work) if spec.output.mode == "new_run" else earlier_stats(spec.output.uri, work)


def _prepared(
    reader: TableReader, writer: TableWriter, preparer: Preparer, found: Container[int]
) -> Iterator[tuple[RowBatch, list[Prepared | RowResult]]]:
    """Every batch that holds rows without a part, and those of them that are not `found` prepared."""
    for batch in reader.batches(lambda first_row, rows: not writer.is_committed(first_row, rows)):
        rows = [
            (row_index, values)
            for row_index, values in enumerate(batch.values, batch.first_row)
            if row_index not in found and not writer.is_committed(row_index, 1)
        ]
        yield batch, preparer.prepare(rows)


@dataclass(frozen=True)
class _Watched:
    """An engine that knows what prompts begin with, and whose passes `see` hears of before anybody else."""

    engine: Engine
    prefix: tuple[int, ...]
    see: Callable[[PassReport], None]

    def generate(self, requests: Iterable[Request]) -> Generator[Begun | Finished | PassReport, None, None]:
        with closing(self.engine.generate(requests, prefix=self.prefix)) as events:
            for event in events:
                if isinstance(event, PassReport):
                    self.see(event)
                yield event
