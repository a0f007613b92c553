"""One job from its specification to its manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext

from moegen.job.ahead import ahead
from moegen.job.digest import model_digest
from moegen.job.flight import Flight
from moegen.job.prepare import Prepared, Preparer, needed_columns
from moegen.job.progress import Meter, Progress
from moegen.plan.machine import Machine
from moegen.plan.search import choose_plan
from moegen.row import RowResult
from moegen.shape import ModelShape
from moegen.spec import JobSpec
from moegen.table.fingerprint import fingerprint
from moegen.table.manifest import Manifest
from moegen.table.reader import RowBatch, TableReader
from moegen.table.writer import TableWriter
from moegen.text import Tokenizer

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
    plan = choose_plan(shape, Machine.detect(spec.engine.device), spec.engine, spec.model.dtype)
    tokenizer = Tokenizer.load(spec.model.uri)
    preparer = Preparer(spec, tokenizer, min(shape.max_position_embeddings, plan.max_sequence_tokens))
    digest = model_digest(spec.model.uri)
    work = fingerprint(spec, digest, tokenizer.digest, reader.files)
    writer = TableWriter(spec.output, reader.schema, reader.rows, work, spec.job.key or work[:16])
    totals = writer.resumed
    meter.resume(reader.rows, totals.statuses, totals.prompt_tokens, totals.completion_tokens)
    if not writer.complete:
        meter.enter("loading")
        with device or nullcontext(), closing(ahead(_prepared(reader, writer, preparer), _BATCHES_AHEAD)) as batches:
            os.environ.setdefault("NUMBA_NUM_THREADS", str(plan.threads))  # Numba reads it once, when it is imported
            from moegen.run.engine import Engine

            with Engine.open(spec.model.uri, plan, tokenizer=tokenizer) as engine:
                meter.enter("running")
                Flight(batches, writer, meter, spec.output, stopping).run(engine)
    meter.enter("finishing")
    return writer.finish(job_name=spec.job.name, model_digest=digest, input_files=reader.files, started_at=started_at)


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
