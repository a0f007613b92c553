"""Rows that cannot be read are rows with an error; their neighbours and their other columns are unharmed."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moegen.row import RowError
from moegen.spec import Input
from moegen.table.reader import TableReader
from table_job import carried, read_all, values

BAD_UTF8 = b"caf\xe9 prompt"


def test_malformed_json_lines_are_rows_with_an_error_that_names_the_line(tmp_path: Path) -> None:
    many_digits = '{"id": ' + "9" * 5000 + "}"
    broken = ["{broken secret", "[1, 2]", '"text"', "[" * 100_000, many_digits]
    lines = ['{"prompt": "a", "id": 1}', "", *broken, '{"prompt": "b"}', '{"prompt": "cut']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    (batch,) = read_all(tmp_path / "t.jsonl", ["prompt"])
    assert values([batch]) == [{"prompt": "a"}, *["malformed_json"] * 5, {"prompt": "b"}, "malformed_json"]
    errors = [row for row in batch.values if isinstance(row, RowError)]
    assert [error.message.split(":")[0] for error in errors] == [f"line {number}" for number in (3, 4, 5, 6, 7, 9)]
    assert {error.stage for error in errors} == {"read"}
    assert not any("secret" in error.message for error in errors)
    assert batch.carried["id"].to_pylist() == [1, None, None, None, None, None, None, None]


def test_jsonl_without_a_single_object_is_rows_of_errors(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("no\njson\n")
    batches = read_all(tmp_path / "t.jsonl", ["prompt"])
    assert values(batches) == ["malformed_json"] * 2
    assert carried(batches).num_columns == 0


def test_lone_surrogates_stay_in_values_and_are_replaced_where_carried(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"prompt": "a \\ud800 b", "nested": ["\\udfff"], "k\\ud800": 1}\n{"prompt": "\\ud83d\\ude00"}\n'
    )
    batches = read_all(tmp_path / "t.jsonl", ["prompt"])
    assert values(batches) == [{"prompt": "a \ud800 b"}, {"prompt": "\U0001f600"}]
    assert carried(batches)["prompt"].to_pylist() == ["a \ufffd b", "\U0001f600"]
    assert carried(batches)["nested"].to_pylist() == ['["\ufffd"]', None]


def test_bytes_that_are_not_utf8_in_text_files(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"prompt": "ok"}\n{"prompt": "' + BAD_UTF8 + b'"}\n{"prompt": "ok"}\n')
    batches = read_all(tmp_path / "t.jsonl", ["prompt"])
    assert values(batches) == [{"prompt": "ok"}, "invalid_utf8", {"prompt": "ok"}]
    (tmp_path / "t.csv").write_bytes(b"id,prompt\n1,ok\n2," + BAD_UTF8 + b"\n3,ok\n")
    batches = read_all(tmp_path / "t.csv", ["prompt"])
    assert values(batches) == [{"prompt": "ok"}, "invalid_utf8", {"prompt": "ok"}]
    assert carried(batches).to_pydict() == {"id": ["1", "2", "3"], "prompt": ["ok", "caf\ufffd prompt", "ok"]}
    assert values(read_all(tmp_path / "t.csv", ["id"], columns=())) == [{"id": "1"}, {"id": "2"}, {"id": "3"}]


def test_ragged_and_broken_csv_rows(tmp_path: Path) -> None:
    rows = ["id,prompt,note", "1,a,x", "2", "3,b,y,surplus", '4,"c"d,z', "5,e,f", '6,"never closed', "7,g,h", ""]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    (batch,) = read_all(tmp_path / "t.csv", ["prompt"])
    assert values([batch]) == [
        {"prompt": "a"}, "malformed_row", "malformed_row", "malformed_row", {"prompt": "e"}, "malformed_row",
    ]  # fmt: skip
    assert batch.carried.to_pydict() == {
        "id": ["1", "2", "3", None, "5", None],
        "prompt": ["a", None, "b", None, "e", None],
        "note": ["x", None, "y", None, "f", None],
    }
    messages = [row.message for row in batch.values if isinstance(row, RowError)]
    assert messages[:2] == ["line 3: 1 fields where the header has 3", "line 4: 4 fields where the header has 3"]
    assert messages[2].startswith("line 5: ")
    assert messages[3].startswith("line 8: ")


def bad_strings(type_: pa.DataType) -> pa.Array:
    """["ok", bytes that are not UTF-8, null, "fine"] as a string array, which pyarrow does not check."""
    raw = pa.array([b"ok", BAD_UTF8, None, b"fine"], pa.binary() if type_ == pa.string() else pa.large_binary())
    return pa.Array.from_buffers(type_, 4, raw.buffers())


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()])
def test_invalid_utf8_in_parquet_hits_one_row_and_passes_through(tmp_path: Path, type_: pa.DataType) -> None:
    column = bad_strings(type_)
    pq.write_table(pa.table({"prompt": column, "id": range(4)}), tmp_path / "t.parquet")
    reader = TableReader(Input(str(tmp_path / "t.parquet")), ["id", "prompt"])
    (batch,) = reader.batches()
    assert values([batch]) == [
        {"id": 0, "prompt": "ok"}, "invalid_utf8", {"id": 2, "prompt": None}, {"id": 3, "prompt": "fine"},
    ]  # fmt: skip
    raw = batch.carried["prompt"].chunk(0).view(pa.binary() if type_ == pa.string() else pa.large_binary())
    assert raw.to_pylist() == [b"ok", BAD_UTF8, None, b"fine"]
    assert values(read_all(tmp_path / "t.parquet", ["id"])) == [{"id": i} for i in range(4)]


def test_invalid_utf8_inside_messages_hits_one_row(tmp_path: Path) -> None:
    message = pa.StructArray.from_arrays([bad_strings(pa.string())], ["content"])
    column = pa.ListArray.from_arrays([0, 1, 2, 4], message)
    pq.write_table(pa.table({"messages": column}), tmp_path / "t.parquet")
    assert values(read_all(tmp_path / "t.parquet", ["messages"])) == [
        {"messages": [{"content": "ok"}]},
        "invalid_utf8",
        {"messages": [{"content": None}, {"content": "fine"}]},
    ]


def test_a_map_with_a_key_twice_hits_one_row(tmp_path: Path) -> None:
    column = pa.array([[("k", 1)], [("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"params": column}), tmp_path / "t.parquet")
    assert values(read_all(tmp_path / "t.parquet", ["params"])) == [{"params": {"k": 1}}, "duplicate_key"]


def test_wrong_types_arrive_as_they_are(tmp_path: Path) -> None:
    rows = [{"prompt": value} for value in ("text", 1, 2.5, True, None, [1], {"a": 1}, "", 10**30)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batches = read_all(tmp_path / "t.jsonl", ["prompt"])
    assert values(batches) == rows
    assert carried(batches)["prompt"].to_pylist() == [
        "text", "1", "2.5", "true", None, "[1]", '{"a": 1}', "", "1" + "0" * 30,
    ]  # fmt: skip
