"""A table of millions of rows in bounded memory, and how soon a job of thousands of finished parts goes on.

    python benchmarks/scale.py [--rows 5000000] [--parts 5000] [--out benchmarks/results/scale.json]

Every case is a process of its own and reports its own peak of resident memory. `read` streams the table as a job would;
`filter` reads it with a filter and a shard; `dry_run` is the shipped command, which renders and encodes every row.
`resume` starts a job of which all parts but the last are there, written by the job's own writer, and says when the
model began to load and when the first pass was done; the model is a tiny one of random weights. Exit code 1 when a case
misses what is promised: 600 MB, 30 s.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from moegen.cli import main as moegen
from moegen.job.attempt import peak_rss_bytes
from moegen.row import RowResult, Status
from moegen.spec import Input, JobSpec

_MOST_BYTES = 600_000_000
_MOST_SECONDS = 30.0
_CHUNK_ROWS = 100_000
_ROW_GROUP_ROWS = 1_000_000
_ROWS_PER_PART = 20
Figures = dict[str, Any]


def _spec(folder: Path, table: str) -> dict[str, Any]:
    return {
        "input": {"uri": str(folder / table)},
        "prompt": {"column": "prompt"},
        "model": {"uri": str(folder / "model")},
        "sampling": {"max_tokens": 4},
        "output": {"uri": str(folder / "out"), "rows_per_part": _ROWS_PER_PART},
    }


def _write_table(path: Path, rows: int) -> None:
    """`id`, `lang` and a short `prompt`; row groups of a million rows."""

    def chunk(first: int, count: int) -> pa.Table:
        ids = range(first, first + count)
        texts = [f"Ticket {i}" for i in ids]
        return pa.table({"id": ids, "lang": [("de", "en", "fr")[i % 3] for i in ids], "prompt": texts})

    group: list[pa.Table] = []
    with pq.ParquetWriter(path, chunk(0, 1).schema, compression="zstd") as writer:
        for first in range(0, rows, _CHUNK_ROWS):
            group.append(chunk(first, min(_CHUNK_ROWS, rows - first)))
            if sum(map(len, group)) >= _ROW_GROUP_ROWS or first + _CHUNK_ROWS >= rows:
                writer.write_table(pa.concat_tables(group), row_group_size=_ROW_GROUP_ROWS)
                group.clear()


# --- cases: each runs in a process of its own -----------------------------------------------------------------------


def prepare(folder: Path, rows: int, parts: int) -> Figures:
    """The checkpoint, the large table, and the parts of a job that was stopped before its last one."""
    from tests.tiny import tiny_checkpoint

    tiny_checkpoint(folder / "model")
    _write_table(folder / "large.parquet", rows)
    _write_table(folder / "small.parquet", (parts + 1) * _ROWS_PER_PART)
    (folder / "large.yaml").write_text(yaml.safe_dump(_spec(folder, "large.parquet")))
    begun = time.monotonic()
    _write_parts(JobSpec.from_mapping(_spec(folder, "small.parquet")), parts)
    return {"table_bytes": (folder / "large.parquet").stat().st_size, "parts_seconds": time.monotonic() - begun}


def _write_parts(spec: JobSpec, parts: int) -> None:
    from moegen.job.digest import model_digest
    from moegen.job.prepare import Prepared, Preparer
    from moegen.job.repeats import Repeats
    from moegen.table.batch_plan import batch_folder
    from moegen.table.columns import result_columns
    from moegen.table.fingerprint import fingerprint
    from moegen.table.first_rows import StoredFirstRows
    from moegen.table.reader import TableReader
    from moegen.table.writer import TableWriter
    from moegen.text import Tokenizer

    reader, tokenizer = TableReader(spec.input, ["prompt"]), Tokenizer.load(spec.model.uri)
    digest, preparer = model_digest(spec.model.uri), Preparer(spec, tokenizer, 512)
    work = fingerprint(spec, digest, tokenizer.digest, reader.files)
    writer = TableWriter(spec.output, reader.schema, reader.rows, work, work[:16], None, result_columns(spec))
    first_rows = StoredFirstRows(batch_folder(spec.output.uri, work[:16]), (), _ROWS_PER_PART)
    writer.before_commit, repeats = first_rows.save, Repeats(first_rows)
    for batch in reader.batches(lambda first_row, rows: first_row < parts * _ROWS_PER_PART):
        for prepared in preparer.prepare(enumerate(batch.values, batch.first_row)):
            if isinstance(prepared, Prepared) and prepared.request.row_index < parts * _ROWS_PER_PART:
                repeats.first(prepared.request)
        for row in writer.add_batch(batch):
            if row < parts * _ROWS_PER_PART:
                writer.add(RowResult(row, Status.OK, "an answer", finish_reason="stop", prompt_tokens=9))


def read(folder: Path, rows: int, parts: int) -> Figures:
    """Every row, with all columns carried."""
    return _read(Input(str(folder / "large.parquet")), rows)


def filter_(folder: Path, rows: int, parts: int) -> Figures:
    """One half of a third of the rows."""
    third = len(range(0, rows, 3))
    return _read(Input(str(folder / "large.parquet"), filter="lang == 'de'", shard="1/2"), third - third // 2)


def _read(spec: Input, rows: int) -> Figures:
    from moegen.table.reader import TableReader

    found = sum(batch.rows for batch in TableReader(spec, ["prompt"]).batches())
    if found != rows:
        raise SystemExit(f"{found} rows were read where {rows} are")
    return {"rows": found}


def dry_run(folder: Path, rows: int, parts: int) -> Figures:
    """`moegen run --dry-run` of the large table."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = moegen(["run", "--dry-run", "--json", str(folder / "large.yaml")])
    told = json.loads(said.getvalue())
    if code or told["ready"] != rows:
        raise SystemExit(f"exit code {code}: {told}")
    return {"rows": told["rows"], "prompt_tokens": told["prompt_tokens"], "repeated": told["repeated"]}


def resume(folder: Path, rows: int, parts: int) -> Figures:
    """Seconds from the process's start to the model's load, and to the first pass."""
    from moegen.job.worker import run_job

    stages: dict[str, float] = {}
    manifest = run_job(
        JobSpec.from_mapping(_spec(folder, "small.parquet")),
        report=lambda progress: stages.setdefault(progress.stage, _age_s()) and None,
    )
    if manifest.resumed_rows != parts * _ROWS_PER_PART:
        raise SystemExit(f"only {manifest.resumed_rows} rows were found")
    return {"parts": len(manifest.parts), **{f"{stage}_after_s": after for stage, after in stages.items()}}


def _age_s() -> float:
    """How long ago this process began."""
    began_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    up_s = float(Path("/proc/uptime").read_text().split()[0])
    return up_s - began_ticks / os.sysconf("SC_CLK_TCK")


CASES: dict[str, Callable[[Path, int, int], Figures]] = {
    "prepare": prepare, "read": read, "filter": filter_, "resume": resume, "dry_run": dry_run,
}  # fmt: skip


def run_case(name: str, folder: Path, args: argparse.Namespace) -> Figures:
    """The case in a process of its own, with how long it took and its peak of resident memory."""
    command = [sys.executable, __file__, "--case", name, "--folder", str(folder)]
    command += ["--rows", str(args.rows), "--parts", str(args.parts)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {json.dumps(figures)}", flush=True)
    return figures


def missed(figures: dict[str, Figures]) -> Iterator[str]:
    """What is promised and was not kept."""
    for name in ("read", "filter", "dry_run"):
        if (peak := figures[name]["peak_rss_bytes"]) > _MOST_BYTES:
            yield f"{name}: {peak / 1e6:.0f} MB"
    if (after := figures["resume"]["loading_after_s"]) > _MOST_SECONDS:
        yield f"resume: {after:.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--parts", type=int, default=5_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        begun = time.monotonic()
        figures = CASES[args.case](args.folder, args.rows, args.parts)
        figures |= {"seconds": time.monotonic() - begun, "peak_rss_bytes": peak_rss_bytes()}
        print(json.dumps(figures))
        return 0
    with tempfile.TemporaryDirectory(prefix="moegen-scale-") as folder:
        found = {name: run_case(name, Path(folder), args) for name in CASES}
    failures = list(missed(found))
    if args.out:
        args.out.write_text(json.dumps({"cases": found, "missed": failures}, indent=2) + "\n")
    print("; ".join(failures) or "all within 600 MB and 30 s")
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
