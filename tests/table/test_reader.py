"""Every format in, whole and in pieces: columns, types, row indexes, files that agree and files that do not."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from moegen.errors import InputError, SpecError
from moegen.spec import Input
from moegen.table.reader import TableReader
from table_job import carried, prompts, read_all, values

TABLE = pa.table(
    {
        "id": pa.array([7, 8, None], pa.int32()),
        "prompt": pa.array(["a", None, "Grüße 🌍"], pa.large_string()),
        "messages": pa.array(
            [[{"role": "user", "content": "hi"}], [], None],
            pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        ),
        "params": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
        "when": pa.array([datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)] * 3, pa.timestamp("us", "UTC")),
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        "a.b": pa.array([1.5, None, 2.5]),
    }
)


def write_ipc_file(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_ipc_stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


COLUMNAR = {
    "t.parquet": lambda table, path: pq.write_table(table, path, row_group_size=2),
    "t.pq": pq.write_table,
    "t.arrow": write_ipc_file,
    "t.ipc": write_ipc_stream,
    "t.feather": feather.write_feather,
}


@pytest.mark.parametrize("name", COLUMNAR)
def test_columnar_files_are_carried_with_their_own_types(tmp_path: Path, name: str) -> None:
    COLUMNAR[name](TABLE, tmp_path / name)
    reader = TableReader(Input(str(tmp_path / name)), ["messages", "params", "prompt"])
    batches = list(reader.batches())
    assert reader.rows == 3
    assert reader.schema == TABLE.schema
    assert carried(batches).to_pylist() == TABLE.to_pylist()
    assert values(batches) == [
        {"messages": [{"role": "user", "content": "hi"}], "params": {"k": 1}, "prompt": "a"},
        {"messages": [], "params": None, "prompt": None},
        {"messages": None, "params": {}, "prompt": "Grüße 🌍"},
    ]


@pytest.mark.parametrize("name", COLUMNAR)
def test_columns_limits_what_is_carried_but_not_what_is_needed(tmp_path: Path, name: str) -> None:
    COLUMNAR[name](TABLE, tmp_path / name)
    batches = read_all(tmp_path / name, ["prompt"], columns=("a.b", "id"))
    assert carried(batches).to_pydict() == {"a.b": [1.5, None, 2.5], "id": [7, 8, None]}
    assert [row["prompt"] for row in values(batches)] == ["a", None, "Grüße 🌍"]


@pytest.mark.parametrize("name", [*COLUMNAR, "t.csv", "t.jsonl"])
def test_no_columns_at_all_still_gives_every_row(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name in COLUMNAR:
        COLUMNAR[name](TABLE, path)
    else:
        path.write_text("id\n1\n2\n3\n" if name == "t.csv" else '{"id": 1}\n' * 3)
    assert values(read_all(path, columns=())) == [{}, {}, {}]


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson", "t.jsonl.gz", "t.NDJSON.GZ"])
def test_jsonl_types_come_from_all_rows(tmp_path: Path, name: str) -> None:
    rows = [
        {"flag": True, "n": 1, "x": 1, "s": "a", "mixed": "text", "nested": {"k": [1, "ü"]}, "none": None},
        {"flag": None, "n": 2, "x": 2.5, "s": "b", "mixed": 3, "nested": [], "none": None, "big": 1 << 70},
    ]
    text = "\n".join(["", *(json.dumps(row) for row in rows), "  ", ""]).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.lower().endswith("gz") else b"\xef\xbb\xbf" + text)
    batches = read_all(tmp_path / name, ["mixed", "nested", "big"])
    table = carried(batches)
    assert table.schema == pa.schema(
        {"flag": pa.bool_(), "n": pa.int64(), "x": pa.float64(), "s": pa.string(), "mixed": pa.string(),
         "nested": pa.string(), "none": pa.string(), "big": pa.string()}
    )  # fmt: skip
    assert table.to_pylist() == [
        {"flag": True, "n": 1, "x": 1.0, "s": "a", "mixed": "text", "nested": '{"k": [1, "ü"]}', "none": None,
         "big": None},
        {"flag": None, "n": 2, "x": 2.5, "s": "b", "mixed": "3", "nested": "[]", "none": None, "big": str(1 << 70)},
    ]  # fmt: skip
    assert values(batches) == [
        {"mixed": "text", "nested": {"k": [1, "ü"]}, "big": None},
        {"mixed": 3, "nested": [], "big": 1 << 70},
    ]


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_csv_is_text_and_an_empty_field_is_null(tmp_path: Path, name: str) -> None:
    text = 'id,prompt,note\r\n007,"two\nlines, ""quoted""",\r\n\r\n008,ü,""\r\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else b"\xef\xbb\xbf" + text)
    batches = read_all(tmp_path / name, ["prompt"])
    assert carried(batches).to_pylist() == [
        {"id": "007", "prompt": 'two\nlines, "quoted"', "note": None},
        {"id": "008", "prompt": "ü", "note": None},
    ]
    assert values(batches) == [{"prompt": 'two\nlines, "quoted"'}, {"prompt": "ü"}]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet", "t.arrow"])
def test_a_prompt_of_10_million_characters_is_one_row(tmp_path: Path, name: str) -> None:
    prompt = "ten chars " * 1_000_000
    if name in COLUMNAR:
        COLUMNAR[name](pa.table({"prompt": [prompt, "b"]}), tmp_path / name)
    else:
        rows = (
            [f"prompt\n{prompt}\nb\n"] if name == "t.csv" else [json.dumps({"prompt": p}) + "\n" for p in (prompt, "b")]
        )
        (tmp_path / name).write_text("".join(rows))
    assert [row["prompt"] for row in values(read_all(tmp_path / name, ["prompt"]))] == [prompt, "b"]


def test_row_indexes_count_over_all_files_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"prompt": "b"}\n' * 2)
    (tmp_path / "c.csv").write_text("prompt\nc\n")
    pq.write_table(pa.table({"prompt": ["a"] * 3}), tmp_path / "a.parquet")
    reader = TableReader(
        Input((str(tmp_path / "c.csv"), str(tmp_path / "b.jsonl"), str(tmp_path / "a.parquet"))), ["prompt"]
    )
    assert [(batch.first_row, batch.rows, batch.file) for batch in reader.batches()] == [
        (0, 3, f"file://{tmp_path}/a.parquet"),
        (3, 2, f"file://{tmp_path}/b.jsonl"),
        (5, 1, f"file://{tmp_path}/c.csv"),
    ]
    assert [(file.rows, file.size_bytes) for file in reader.files] == [
        (3, (tmp_path / "a.parquet").stat().st_size), (2, 32), (1, 9),
    ]  # fmt: skip


def test_folder_and_glob_ignore_hidden_names_and_other_endings(tmp_path: Path) -> None:
    for name in ("day=1/a.csv", "b.csv", "_c.csv", ".d.csv", "_old/e.csv", "day=1/.tmp/f.csv", "notes.txt", "_SUCCESS"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f"prompt\n{name}\n")
    found = ["b.csv", "day=1/a.csv"]
    assert [row["prompt"] for row in values(read_all(tmp_path, ["prompt"]))] == found
    assert [row["prompt"] for row in values(read_all(tmp_path / "*.csv", ["prompt"]))] == found[:1]
    assert [row["prompt"] for row in values(read_all(tmp_path / "day=*", ["prompt"]))] == found[1:]
    assert [row["prompt"] for row in values(read_all(f"file://{tmp_path}/**/*.csv", ["prompt"]))] == found
    assert [row["prompt"] for row in values(read_all(tmp_path / "_c.csv", ["prompt"]))] == ["_c.csv"]
    assert len(values(read_all((f"{tmp_path}/b.csv", f"{tmp_path}/*.csv"), ["prompt"]))) == 1


def test_a_path_may_hold_glob_characters(tmp_path: Path) -> None:
    (tmp_path / "a[1].csv").write_text("prompt\nx\n")
    assert values(read_all(tmp_path / "a[1].csv", ["prompt"])) == [{"prompt": "x"}]


def test_format_overrides_the_ending(tmp_path: Path) -> None:
    (tmp_path / "part-0").write_text('{"prompt": "x"}\n')
    assert values(read_all(tmp_path / "part-0", ["prompt"], format="jsonl")) == [{"prompt": "x"}]
    assert values(read_all(tmp_path, ["prompt"], format="jsonl")) == [{"prompt": "x"}]
    with pytest.raises(SpecError, match=r"part-0 has none of the endings .*set input\.format"):
        read_all(tmp_path / "part-0", ["prompt"])


@pytest.mark.parametrize("limit", [0, 1, 99, 100, 101, 250, 1000])
def test_limit_takes_the_first_rows_and_opens_no_further_files(tmp_path: Path, limit: int) -> None:
    pq.write_table(pa.table({"prompt": ["x"] * 120}), tmp_path / "a.parquet", row_group_size=50)
    (tmp_path / "b.csv").write_text("prompt\n" + "x\n" * 120)
    reader = TableReader(Input(str(tmp_path), limit=limit), ["prompt"])
    rows = values(reader.batches())
    assert reader.rows == len(rows) == min(limit, 240)
    assert len(reader.files) == (1 if limit <= 120 else 2)


def test_wanted_skips_batches_and_leaves_indexes_and_boundaries_alone(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(5000)]}), tmp_path / "a.parquet", row_group_size=1500)
    (tmp_path / "b.jsonl").write_text("".join(f'{{"prompt": "j{i}"}}\n' for i in range(3000)))
    (tmp_path / "c.csv").write_text("prompt\n" + "".join(f"c{i}\n" for i in range(3000)))
    write_ipc_file(pa.table({"prompt": [f"d{i}" for i in range(1100)]}), tmp_path / "d.arrow")
    reader = TableReader(Input(str(tmp_path)), ["prompt"])
    every = {batch.first_row: batch for batch in reader.batches()}
    chosen = {first: batch for first, batch in every.items() if first % 3 == 0}
    asked: list[tuple[int, int]] = []

    def wanted(first_row: int, rows: int) -> bool:
        asked.append((first_row, rows))
        return any(first_row <= first < first_row + rows for first in chosen)

    got = {batch.first_row: batch for batch in reader.batches(wanted)}
    assert got.keys() == chosen.keys()
    assert all(got[first].values == every[first].values and got[first].carried == every[first].carried for first in got)
    assert all(first + rows <= reader.rows for first, rows in asked)


def test_unwanted_row_groups_are_not_fetched(tmp_path: Path) -> None:
    path = prompts(tmp_path, 1000, row_group_rows=100)
    damage_first_row_group(path)
    reader = TableReader(Input(str(path)), ["prompt"])
    assert [batch.first_row for batch in reader.batches(lambda first, rows: first >= 900)] == [900]


def test_missing_columns_are_null_and_null_columns_take_the_other_type(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "x": pa.nulls(1)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["b"], "x": [1], "y": ["new"]}), tmp_path / "b.parquet")
    batches = read_all(tmp_path, ["prompt"])
    assert carried(batches).to_pylist() == [{"prompt": "a", "x": None, "y": None}, {"prompt": "b", "x": 1, "y": "new"}]


def test_jsonl_files_share_their_types(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "x": 1, "z": null}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "b", "x": 1.5, "z": true}\n')
    (tmp_path / "c.jsonl").write_text("")
    assert carried(read_all(tmp_path, ["prompt"])).to_pydict() == {
        "prompt": ["a", "b"], "x": [1.0, 1.5], "z": [None, True],
    }  # fmt: skip


def test_files_that_disagree_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "x": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["b"], "x": ["1"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: column 'x' is string, but int64 in an earlier file"):
        read_all(tmp_path, ["prompt"])
    pq.write_table(pa.table({"x": [2]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: has no column 'prompt'"):
        read_all(tmp_path, ["prompt"])


@pytest.mark.parametrize(
    ("fields", "needed", "message"),
    [
        ({"columns": ("promt",)}, [], r"input\.columns: the input has no column 'promt'; did you mean 'prompt'\?"),
        ({"columns": ("id", "id")}, [], r"input\.columns: .* names a column twice"),
        ({"id_column": "uid"}, [], r"input\.id_column: .* 'uid'; did you mean 'id'\?"),
        ({}, ["question"], r"no column 'question'; its columns are 'id', 'prompt'"),
    ],
)
def test_unknown_columns_are_named_with_what_exists(
    tmp_path: Path, fields: dict[str, str], needed: list[str], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        read_all(prompts(tmp_path, 3), needed, **fields)


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.ipc", "t.csv", "t.jsonl"])
def test_zero_rows_are_fine(tmp_path: Path, name: str) -> None:
    if name in COLUMNAR:
        COLUMNAR[name](pa.table({"prompt": pa.array([], pa.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_text("prompt\n" if name == "t.csv" else "")
    reader = TableReader(Input(str(tmp_path / name)), ["prompt"])
    assert reader.rows == 0
    assert list(reader.batches()) == []


def test_no_files_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.csv: not found"):
        read_all(tmp_path / "missing.csv")
    with pytest.raises(InputError, match=r"no files with an ending of \.parquet.* at .*"):
        read_all(tmp_path)
    with pytest.raises(InputError, match=r"no files .* at .*\*\.csv"):
        read_all(tmp_path / "*.csv")
    with pytest.raises(SpecError, match=r"nosuch://x/y\.csv: .*nosuch"):
        read_all("nosuch://x/y.csv")


def damaged(path: Path, name: str) -> None:
    """Files that are cut short or something else."""
    if name == "cut.parquet":
        prompts(path.parent, 1000)
        path.write_bytes((path.parent / "prompts-1000.parquet").read_bytes()[:-100])
    elif name == "cut.arrow":
        write_ipc_file(pa.table({"prompt": ["x" * 100] * 100}), path)
        path.write_bytes(path.read_bytes()[:-10])
    elif name == "cut.jsonl.gz":
        path.write_bytes(gzip.compress(b'{"prompt": "x"}\n' * 1000)[:-20])
    else:
        path.write_bytes({"text.parquet": b"prompt\nx\n", "text.jsonl.gz": b"{}\n", "empty.csv": b"",
                          "utf16.csv": "prompt\nx\n".encode("utf-16"), "twice.csv": b"a,b,a\n",
                          "empty.parquet": b"", "empty.arrow": b"", "v1.feather": b"FEA1...."}[name])  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut.parquet", "damaged or of another format"),
        ("cut.arrow", "damaged or of another format"),
        ("cut.jsonl.gz", "damaged or of another format"),
        ("text.parquet", "damaged or of another format"),
        ("text.jsonl.gz", "damaged or of another format"),
        ("empty.parquet", "damaged or of another format"),
        ("empty.arrow", "damaged or of another format"),
        ("v1.feather", "write it again as version 2"),
        ("empty.csv", "has no header line"),
        ("utf16.csv", "is UTF-16; write it as UTF-8"),
        ("twice.csv", "names the column 'a' twice"),
    ],
)
def test_damaged_files_are_input_errors(tmp_path: Path, name: str, message: str) -> None:
    damaged(tmp_path / name, name)
    with pytest.raises(InputError, match=f"{name}: .*{message}"):
        read_all(tmp_path / name)


def damage_first_row_group(path: Path) -> None:
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0).column(1).dictionary_page_offset
    data[start : start + 500] = b"\xff" * 500
    path.write_bytes(data)


def test_damage_inside_a_parquet_file_is_an_input_error(tmp_path: Path) -> None:
    path = prompts(tmp_path, 1000, row_group_rows=100)
    damage_first_row_group(path)
    with pytest.raises(InputError, match="damaged"):
        read_all(path, ["prompt"])


def test_a_file_that_changes_under_the_reader_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "x"}\n')
    reader = TableReader(Input(str(path)), ["prompt"])
    path.write_text('{"prompt": "other"}\n')
    with pytest.raises(InputError, match="changed since the job began"):
        list(reader.batches())
