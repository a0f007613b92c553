"""The output schema is fixed before the first row and collides with nothing."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moegen.errors import InputError, SpecError
from moegen.row import RowResult, Status
from moegen.spec import Input, Output
from moegen.table.reader import RowBatch
from moegen.table.schema import output_schema
from moegen.table.writer import TableWriter
from table_job import FINGERPRINT, run

INPUT = pa.schema({"id": pa.int64(), "text": pa.large_string()})


def test_the_columns_of_the_contract() -> None:
    schema = output_schema(INPUT, Output("out"))
    assert [f"{field.name}: {field.type}" for field in schema] == [
        "id: int64",
        "text: large_string",
        "row_index: int64",
        "output: string",
        "output_raw: string",
        "status: string",
        "error: struct<code: string, message: string, stage: string, retryable: bool>",
        "finish_reason: string",
        "prompt_tokens: int32",
        "completion_tokens: int32",
        "dedup_of: int64",
        "attempts: int32",
        "seed: int64",
        "input_truncated: bool",
        "input_file: string",
    ]


def test_include_and_prefix() -> None:
    schema = output_schema(INPUT, Output("out", prefix="llm_", include=("prompt_rendered", "token_ids")))
    assert schema.names[:4] == ["id", "text", "llm_row_index", "llm_output"]
    assert schema.names[-2:] == ["llm_token_ids", "llm_prompt_rendered"]
    assert schema.field("llm_token_ids").type == pa.list_(pa.int32())


def test_a_collision_names_the_column_and_the_ways_out(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "status": ["open"]}), tmp_path / "t.parquet")
    with pytest.raises(SpecError, match=r"the name 'status'.*output\.prefix.*input\.columns") as caught:
        run(Input(str(tmp_path / "t.parquet")), Output(str(tmp_path / "out")))
    assert caught.value.exit_code == 64
    run(Input(str(tmp_path / "t.parquet")), Output(str(tmp_path / "out"), prefix="llm_"))
    (row,) = pq.read_table(next((tmp_path / "out").glob("part-*"))).to_pylist()
    assert (row["status"], row["llm_status"]) == ("open", "ok")


def test_included_columns_are_written(tmp_path: Path) -> None:
    output = Output(str(tmp_path), include=("token_ids", "prompt_rendered"))
    writer = TableWriter(output, pa.schema([]), 2, FINGERPRINT, "key")
    writer.add_batch(RowBatch(0, pa.table({}), "f", [{}, {}]))
    writer.add(RowResult(0, Status.OK, "x", token_ids=(1, 2), prompt_rendered="<p>"))
    writer.add(RowResult(1, Status.SKIPPED_NULL))
    rows = pq.read_table(next(tmp_path.glob("part-*"))).to_pylist()
    assert [(row["token_ids"], row["prompt_rendered"], row["output"]) for row in rows] == [
        ([1, 2], "<p>", "x"),
        (None, None, None),
    ]


def test_a_type_that_the_format_lacks_is_refused_before_the_first_row(tmp_path: Path) -> None:
    union = pa.schema({"fine": pa.int64(), "odd": pa.dense_union([pa.field("a", pa.int64())])})
    with pytest.raises(SpecError, match=r"parquet cannot hold column 'odd'.*input\.columns"):
        TableWriter(Output(str(tmp_path / "out")), union, 1, FINGERPRINT, "key")
    assert not (tmp_path / "out").exists()
    TableWriter(Output(str(tmp_path / "out"), "arrow"), union, 1, FINGERPRINT, "key")


def test_a_value_that_the_format_lacks_names_its_column(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"], "when": pa.array([1 << 62], pa.timestamp("s"))})  # Parquet counts milliseconds
    with pa.ipc.new_stream(tmp_path / "t.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match=r"parquet cannot hold column 'when'.*output\.format"):
        run(Input(str(tmp_path / "t.arrow")), Output(str(tmp_path / "out")))
    run(Input(str(tmp_path / "t.arrow")), Output(str(tmp_path / "out"), "arrow", mode="new_run"))


ANYWHERE = {
    "prompt": pa.array(["a", "b", "c"] * 500),
    "view": pa.array(["v"] * 1500, pa.string_view()),
    "null": pa.nulls(1500),
    "vector": pa.array([[1.0, 2.0]] * 1500, pa.list_(pa.float32(), 2)),
    "money": pa.array([None] * 1500, pa.decimal128(20, 2)),
    "struct": pa.array([{"a": [1], "b": None}] * 1500),
    "bytes": pa.array([b"\xff"] * 1500),
    "map": pa.array([[("k", "v")]] * 1500, pa.map_(pa.string(), pa.string())),
    "kind": pa.chunked_array([pa.array([a, "y"] * 375).dictionary_encode() for a in ("x", "z")]),
}
ARROW_ONLY = {
    "run": pa.RunEndEncodedArray.from_arrays(pa.array([1500], pa.int32()), ["r"]),
    "span": pa.array([(1, 2, 3)] * 1500, pa.month_day_nano_interval()),
    "slice": pa.array([[1]] * 1500, pa.list_view(pa.int64())),
}


@pytest.mark.parametrize(("format_", "columns"), [("parquet", ANYWHERE), ("arrow", ANYWHERE | ARROW_ONLY)])
def test_types_of_all_kinds_pass_through(tmp_path: Path, format_: str, columns: dict[str, pa.Array]) -> None:
    table = pa.table(columns)
    with pa.ipc.new_stream(tmp_path / "t.arrow", table.schema) as writer:
        writer.write_table(table)
    run(Input(str(tmp_path / "t.arrow")), Output(str(tmp_path / "out"), format_, rows_per_part=1200))
    read = pq.read_table if format_ == "parquet" else lambda path: pa.ipc.open_file(path).read_all()
    found = pa.concat_tables(read(path) for path in sorted((tmp_path / "out").glob("part-*"))).select(
        table.column_names
    )
    assert found.schema.types == table.schema.types
    assert found.to_pylist() == table.to_pylist()
