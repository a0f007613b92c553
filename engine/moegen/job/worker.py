"""One job from its specification to its manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moegen.job.ahead import ahead
from moegen.job.attempt import Attempt
from moegen.job.digest import model_digest
from moegen.job.flight import Flight
from moegen.job.forecast import forecast
from moegen.job.lengths import table_workload
from moegen.job.prepare import Prepared, Preparer, needed_columns
from moegen.job.progress import Meter, Progress
from moegen.job.stats_file import Stats, earlier_stats
from moegen.plan.machine import Machine
from moegen.plan.search import choose_plan
from moegen.plan.workload import UNKNOWN
from moegen.row import RowResult
from moegen.run.figures import Yardstick
from moegen.run.stats import PassReport
from moegen.schedule.sequence import Finished, Request
from moegen.shape import ModelShape
from moegen.spec import JobSpec
from moegen.table.fingerprint import fingerprint
from moegen.table.manifest import Manifest
from moegen.table.reader import RowBatch, TableReader
from moegen.table.writer import TableWriter
from moegen.text import Tokenizer

if TYPE_CHECKING:
    from moegen.run.engine import Engine

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
        stopping: asked at every pass; once true the job ends with `Interrupted`, and committed parts stay.
        device: entered before the model is loaded and left after the last pass; a lock, say.

    Raises:
        MoegenError: see `moegen.errors`.
    """
    started_at = time.time()
    meter = Meter(report)
    meter.enter("starting")
    reader = TableReader(spec.input, needed_columns(spec))
    shape = ModelShape.read(spec.model.uri)
    machine = Machine.detect(spec.engine.device)
    tokenizer = Tokenizer.load(spec.model.uri)
    workload = table_workload(reader, Preparer(spec, tokenizer, shape.max_position_embeddings))
    plan = choose_plan(shape, machine, spec.engine, spec.model.dtype, workload or UNKNOWN)
    meter.planned(plan.to_mapping())
    preparer = Preparer(spec, tokenizer, min(shape.max_position_embeddings, plan.max_sequence_tokens))
    digest = model_digest(spec.model.uri)
    work = fingerprint(spec, digest, tokenizer.digest, reader.files)
    writer = TableWriter(spec.output, reader.schema, reader.rows, work, spec.job.key or work[:16])
    totals = writer.resumed
    meter.resume(reader.rows, totals)
    if not writer.complete:
        meter.enter("loading")
        with device or nullcontext(), closing(ahead(_prepared(reader, writer, preparer), _BATCHES_AHEAD)) as batches:
            loading = time.monotonic()
            os.environ.setdefault("NUMBA_NUM_THREADS", str(plan.threads))  # Numba reads it once, when it is imported
            from moegen.run.engine import Engine

            with Engine.open(spec.model.uri, plan, tokenizer=tokenizer) as engine:
                load_s = time.monotonic() - loading
                yardstick = Yardstick(shape, machine, plan)
                promised = forecast(yardstick, workload, reader.rows - totals.rows)
                about = {"model_uri": spec.model.uri, "resumed_rows": totals.rows, "load_s": load_s}
                attempt = Attempt(_earlier(spec, work), spec.output.uri, yardstick, promised, about)
                meter.follow(attempt.live)
                meter.enter("running")
                with attempt.written():
                    Flight(batches, writer, meter, spec.output, stopping).run(_Watched(engine, attempt.add))
    meter.enter("finishing")
    return writer.finish(job_name=spec.job.name, model_digest=digest, input_files=reader.files, started_at=started_at)


def _earlier(spec: JobSpec, work: str) -> Stats:
    return Stats(work) if spec.output.mode == "new_run" else earlier_stats(spec.output.uri, work)


def _prepared(
    reader: TableReader, writer: TableWriter, preparer: Preparer
) -> Iterator[tuple[RowBatch, list[Prepared | RowResult]]]:
    """Every batch that holds rows to run, and those rows prepared."""
    for batch in reader.batches(lambda first_row, rows: not writer.is_committed(first_row, rows)):
        rows = [
            (row_index, values)
            for row_index, values in enumerate(batch.values, batch.first_row)
            if not writer.is_committed(row_index, 1)
        ]
        yield batch, preparer.prepare(rows)


@dataclass(frozen=True)
class _Watched:
    """An engine whose passes `see` hears of before anybody else."""

    engine: Engine
    see: Callable[[PassReport], None]

    def generate(self, requests: Iterable[Request]) -> Generator[Finished | PassReport, None, None]:
        with closing(self.engine.generate(requests)) as events:
            for event in events:
                if isinstance(event, PassReport):
                    self.see(event)
                yield event
