"""Output in folders named after values: read back whole, resumed exactly, and nothing else touched."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moegen.errors import InputError, SpecError, StorageError
from moegen.spec import Input, Output
from moegen.table.inspect import inspect_output
from moegen.table.reader import TableReader
from moegen.table.writer import TableWriter
from table_job import FINGERPRINT, answers, run

LANGS = ["de", None, "a/b ü", "", "de"]


@pytest.fixture
def table(tmp_path: Path) -> Input:
    path = tmp_path / "in.parquet"
    columns = {"id": range(50), "lang": [LANGS[i % 5] for i in range(50)], "year": [2020 + i // 25 for i in range(50)]}
    pq.write_table(pa.table({**columns, "prompt": [f"p{i}" for i in range(50)]}), path)
    return Input(str(path))


def output(folder: Path, *columns: str, **fields: object) -> Output:
    return Output(str(folder / "out"), rows_per_part=10, partition_by=columns or ("lang", "year"), **fields)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("part-*")}


@pytest.mark.parametrize("format_", ["parquet", "arrow", "openai_jsonl"])
def test_every_row_is_in_its_folder_and_the_manifest_lists_all_files(
    tmp_path: Path, table: Input, format_: str
) -> None:
    manifest = run(table, output(tmp_path, format=format_))
    folder = tmp_path / "out"
    assert sorted(part.name for part in manifest.parts) == sorted(contents(folder))
    assert (manifest.rows, sum(part.rows for part in manifest.parts)) == (50, 50)
    folders = {name.rpartition("/")[0] for name in contents(folder)}
    langs = ("lang=de", "lang=__HIVE_DEFAULT_PARTITION__", "lang=a%2Fb%20%C3%BC", "lang=")
    assert folders == {f"{lang}/year={year}" for lang in langs for year in (2020, 2021)}
    assert inspect_output(str(folder)).totals.rows == 50
    if format_ == "parquet":
        back = TableReader(Input(str(folder)), ["id", "lang", "year", "output"])
        rows = sorted((row for batch in back.batches() for row in batch.values), key=lambda row: row["id"])
        assert [row["lang"] for row in rows] == LANGS * 10
        assert [row["year"] for row in rows] == [2020] * 25 + [2021] * 25
        assert [row["output"] for row in rows] == [f"answer to p{i}" for i in range(50)]
        file = next(iter(contents(folder)))
        assert not {"lang", "year"} & {*pq.read_schema(folder / file).names}
        others = pq.read_table(folder, filters=[("year", "==", 2021), ("lang", "==", "de")])
        assert others["id"].to_pylist() == [i for i in range(25, 50) if LANGS[i % 5] == "de"]


def test_a_part_that_lacks_a_file_is_done_again_and_the_rest_is_kept(tmp_path: Path, table: Input) -> None:
    run(table, output(tmp_path))
    folder = tmp_path / "out"
    before = contents(folder)
    names = sorted(before)
    for name in names[::7]:
        (folder / name).unlink()
    lost = {name.rpartition("/")[2] for name in names[::7]}
    manifest = run(table, output(tmp_path))
    assert contents(folder) == before
    assert manifest.resumed_rows == 50 - 10 * len(lost)
    assert json.loads((folder / "_manifest.json").read_text())["rows"] == 50
    assert {part.rows for part in manifest.parts} <= {1, 2, 3, 4}


def test_other_work_in_the_folders_is_refused_or_removed(tmp_path: Path, table: Input) -> None:
    run(table, output(tmp_path))
    beside = tmp_path / "out" / "other=1" / "part-000000-0123456789abcdef.parquet"
    beside.parent.mkdir()
    beside.write_bytes(b"not ours")
    with pytest.raises(SpecError, match="belongs to other work"):
        run(table, output(tmp_path), fingerprint="f" * 64)
    manifest = run(table, output(tmp_path, mode="new_run"), fingerprint="f" * 64)
    assert {name.rpartition("-")[2] for name in contents(tmp_path / "out")} == {
        "f" * 16 + ".parquet",
        "0123456789abcdef.parquet",
    }
    assert manifest.rows == 50
    assert beside.read_bytes() == b"not ours"


def test_a_new_run_with_other_folders_leaves_none_of_the_old(tmp_path: Path, table: Input) -> None:
    run(table, output(tmp_path))
    for columns in (("year",), ()):
        run(
            table,
            Output(str(tmp_path / "out"), rows_per_part=10, partition_by=columns, mode="new_run"),
            fingerprint="e" * 64,
        )
        assert {name.count("/") for name in contents(tmp_path / "out")} == {len(columns)}
        assert inspect_output(str(tmp_path / "out")).totals.rows == 50


def test_a_file_with_other_rows_is_not_taken_for_ours(tmp_path: Path, table: Input) -> None:
    run(table, output(tmp_path))
    folder = tmp_path / "out"
    small, large = (
        min(contents(folder), key=lambda n, sign=sign: sign * pq.read_metadata(folder / n).num_rows) for sign in (1, -1)
    )
    (folder / large).write_bytes((folder / small).read_bytes())
    with pytest.raises(StorageError, match="remove it and run again"):
        run(table, output(tmp_path))


@pytest.mark.parametrize(
    ("column", "said"),
    [("status", "no input column 'status'"), ("nested", "is list<"), ("score", "is double")],
)
def test_columns_that_name_no_folders(tmp_path: Path, column: str, said: str) -> None:
    schema = pa.schema([("prompt", pa.string()), ("nested", pa.list_(pa.int8())), ("score", pa.float64())])
    with pytest.raises(SpecError, match=said):
        TableWriter(output(tmp_path, column), schema, 1, FINGERPRINT, "key")


def test_values_that_name_no_folder_are_told_before_rows_run(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["x" * 500]}), tmp_path / "in.parquet")
    reader = TableReader(Input(str(tmp_path / "in.parquet")), ["prompt"])
    writer = TableWriter(output(tmp_path, "prompt"), reader.schema, 1, FINGERPRINT, "key")
    with pytest.raises(InputError, match="choose a column of few and short values"):
        answers(reader, writer)


def test_no_rows_still_have_a_schema(tmp_path: Path, table: Input) -> None:
    nothing = Input(table.uri, limit=0)
    for _ in range(2):
        manifest = run(nothing, output(tmp_path))
        assert [part.name for part in manifest.parts] == ["part-000000-0123456789abcdef.parquet"]
