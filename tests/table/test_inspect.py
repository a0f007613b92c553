"""What `moegen inspect` shows of a folder, finished or not."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from moegen.errors import InputError
from moegen.row import RowError, RowResult, Status
from moegen.spec import Input, Output
from moegen.table.inspect import ErrorExample, inspect_output
from moegen.table.reader import TableReader
from moegen.table.writer import TableWriter
from table_job import FINGERPRINT, prompts, run


def result(row: int) -> RowResult:
    if row % 10:
        return RowResult(row, Status.OK, f"answer {row}", prompt_tokens=1, completion_tokens=2)
    code = "bad_prompt_type" if row % 20 else "invalid_text"
    return RowResult(row, Status.ERROR, error=RowError(code, f"row {row}", "prompt"))


@pytest.mark.parametrize("format_", ["parquet", "arrow"])
def test_a_job_that_has_not_finished(tmp_path: Path, format_: str) -> None:
    reader = TableReader(Input(str(prompts(tmp_path, 100))), ["prompt"])
    output = Output(str(tmp_path / "out"), format_, rows_per_part=40, prefix="llm_")
    writer = TableWriter(output, reader.schema, reader.rows, FINGERPRINT, "key")
    for batch in reader.batches():
        for row in writer.add_batch(batch)[:80]:
            writer.add(result(row))
    found = inspect_output(str(tmp_path / "out"), max_rows=3, max_errors=2)
    assert (found.manifest, found.success, found.parts) == (None, False, 2)
    assert found.totals.statuses == {"error": 8, "ok": 72}
    assert (found.totals.rows, found.totals.prompt_tokens, found.totals.completion_tokens) == (80, 72, 144)
    assert [(row["id"], row["llm_output"]) for row in found.rows] == [(0, None), (1, "answer 1"), (2, "answer 2")]
    assert found.errors == {
        "invalid_text": [ErrorExample(row, "error", f"row {row}", "prompt") for row in (0, 20)],
        "bad_prompt_type": [ErrorExample(row, "error", f"row {row}", "prompt") for row in (10, 30)],
    }


def test_a_finished_job(tmp_path: Path) -> None:
    manifest = run(Input(str(prompts(tmp_path, 10))), Output(str(tmp_path / "out")))
    found = inspect_output(f"file://{tmp_path}/out/")
    assert (found.manifest, found.success, found.errors) == (manifest, True, {})
    assert len(found.rows) == 5


def test_a_cell_that_python_cannot_hold_does_not_hide_the_row(tmp_path: Path) -> None:
    prompt = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"caf\xe9"]).buffers())
    with pa.ipc.new_stream(tmp_path / "t.arrow", pa.schema({"prompt": pa.string()})) as stream:
        stream.write_table(pa.table({"prompt": prompt}))
    run(Input(str(tmp_path / "t.arrow")), Output(str(tmp_path / "out")))
    assert [row["prompt"] for row in inspect_output(str(tmp_path / "out")).rows] == ["ok", "<invalid_utf8>"]


def test_a_folder_without_output(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no moegen output"):
        inspect_output(str(tmp_path))
    (tmp_path / "_manifest.json").write_text("{}")
    (tmp_path / "part-of-something.parquet").write_text("")
    with pytest.raises(InputError, match="holds no moegen output"):
        inspect_output(str(tmp_path))
    with pytest.raises(InputError, match="is not a manifest"):
        TableWriter(Output(str(tmp_path)), pa.schema([]), 1, FINGERPRINT, "key")
