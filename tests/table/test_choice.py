"""Which rows of the input are the table: folders that are columns, filter, limit, shard; and what is read for it."""

from __future__ import annotations

import datetime
import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from moegen.condition import parse
from moegen.errors import InputError, SpecError
from moegen.row import RowResult
from moegen.spec import Input, Output
from moegen.table.filter import Bounds, Filter
from moegen.table.reader import TableReader
from moegen.table.selection import Selection
from table_job import carried, prompts, read_all, run, values

# --- conditions -----------------------------------------------------------------------------------------------------

ROWS = pa.table(
    {
        "lang": ["de", "en", None, "fr", "de", ""],
        "score": [0.5, 0.9, 0.7, None, float("nan"), -1.0],
        "n": pa.array([1, 2, 3, None, 5, 250], pa.uint8()),
        "flag": [True, False, None, True, True, False],
        "day": pa.array([datetime.date(2026, 11, i) for i in (20, 21, 22, 23, 24, 25)]),
        "at": pa.array([datetime.datetime(2026, 11, i, tzinfo=datetime.UTC) for i in range(1, 7)]),
        "kind": pa.array(["a", "b", "a", None, "c", "a"]).dictionary_encode(),
        "a b": [1, 2, 3, 4, 5, 6],
        "none": pa.nulls(6),
        "tags": [["x"], [], None, ["y"], [], []],
    }
)


@pytest.mark.parametrize(
    ("condition", "passing"),
    [
        ("lang == 'de'", [0, 4]),
        ("lang != 'de'", [1, 3, 5]),  # null is neither
        ("not lang == 'de'", [1, 3, 5]),
        ("lang in ['de', 'en'] and score > 0.5", [1]),
        ("lang not in ('de', 'en')", [3, 5]),
        ("lang in []", []),
        ("lang is None or score is None", [2, 3]),
        ("lang is not None and flag", [0, 3, 4]),
        ("not flag", [1, 5]),
        ("flag == True", [0, 3, 4]),
        ("0.5 <= score < 0.9", [0, 2]),
        ("0.6 < score", [1, 2]),
        ("score != 0.5", [1, 2, 4, 5]),  # NaN differs from everything
        ("not score < 0.6", [1, 2, 4]),
        ("n > 1.5", [1, 2, 4, 5]),
        ("n > -1", [0, 1, 2, 4, 5]),
        ("n < 1000", [0, 1, 2, 4, 5]),
        ("day >= '2026-11-23'", [3, 4, 5]),
        ("at < '2026-11-03T00:00:00Z'", [0, 1]),
        ("kind == 'a'", [0, 2, 5]),
        ("column('a b') == 6 or (n == 2)", [1, 5]),
        ("none == 1 or n == 1", [0]),
        ("tags is None", [2]),
    ],
)
def test_a_condition_passes_rows_and_its_bounds_agree(condition: str, passing: list[int]) -> None:
    filter_ = Filter(parse(condition), ROWS.schema)
    assert np.flatnonzero(filter_.mask(ROWS)).tolist() == passing
    for row in range(len(ROWS)):  # of one row everything is known, but bounds never speak of NaN
        known = {
            name: Bounds.of(cell[row].cast(cell.type.value_type) if name == "kind" else cell[row])
            for name, cell in zip(ROWS.column_names, ROWS.columns, strict=True)
        }
        assert filter_.may_pass(known) >= (row in passing)
        assert filter_.may_pass(known) <= (row in passing) or "score" in condition


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("lang = 'de'", "cannot be read"),
        ("", "cannot be read"),
        ("lang == 'de", "cannot be read"),
        ("1 == 2", "compare a column with a literal"),
        ("lang == other", "text in quotes"),
        ("__import__('os').system('true')", "comparisons"),
        ("lang.upper() == 'DE'", "compare a column with a literal"),
        ("column(lang) == 1", "write column"),
        ("[x for x in lang]", "comparisons"),
        ("lambda: 1", "comparisons"),
        ("lang == None", "score is None"),
        ("lang is 'de'", "after is comes None"),
        ("lang in 'de'", "after in comes a list"),
        ("score > f'{1}'", "text in quotes"),
        ("not " * 2400 + "flag", "nested too deeply"),
        ("flag or " * 2000 + "flag", "characters"),
        ("flag\0", "null bytes"),
        ("nothing == 1", "has no column 'nothing'"),
        ("lang > 0.5", "the columns of CSV files are all text"),
        ("n == 'two'", "cannot be compared"),
        ("day > 'soon'", "is date32"),
        ("tags == 'x'", "cannot be compared"),
        ("lang", "compare it with something"),
        ("flag == 1", "cannot be compared"),
    ],
)
def test_what_is_no_condition_is_refused_in_words(condition: str, said: str) -> None:
    with pytest.raises(SpecError, match=r"^input\.filter: ") as caught:
        Filter(parse(Input("x", filter=condition).filter or ""), ROWS.schema)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_selection_counts_as_numpy_does() -> None:
    mask = np.random.default_rng(0).random(5000) < 0.3
    selection = Selection(mask)
    assert selection.rows == mask.sum()
    for first_row, rows in [(0, 5000), (1, 7), (1023, 2), (1024, 1024), (4999, 1), (77, 0)]:
        assert selection.mask(first_row, rows).tolist() == mask[first_row : first_row + rows].tolist()
        assert selection.before(first_row) == mask[:first_row].sum()
    assert Selection(np.zeros(0, bool)).rows == 0


# --- filters over files ---------------------------------------------------------------------------------------------


def numbers(folder: Path, name: str, rows: int = 3000) -> tuple[Path, list[dict[str, Any]]]:
    dice = random.Random(0)
    table = [{"prompt": f"p{i}", "n": i, "lang": dice.choice(["de", "en", "fr"])} for i in range(rows)]
    path = folder / name
    if name.endswith(".csv"):
        pa.csv.write_csv(pa.Table.from_pylist(table), path)
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, table)).encode()))
    else:
        pq.write_table(pa.Table.from_pylist(table), path, row_group_size=700)
    return path, table


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl.gz"])
@pytest.mark.parametrize("limit", [None, 500, 0])
def test_filter_limit_and_shards_make_one_table(tmp_path: Path, name: str, limit: int | None) -> None:
    path, rows = numbers(tmp_path, name)
    expected = [row["prompt"] for row in rows if row["lang"] == "de"][:limit]
    fields = {"filter": "lang == 'de'", "limit": limit, "columns": ("n",)}
    reader = TableReader(Input(str(path), **fields), ["prompt"])
    batches = list(reader.batches())
    assert reader.schema.names == ["n"]
    assert reader.rows == len(expected) == reader.files[0].rows
    assert [row["prompt"] for row in values(batches)] == expected
    assert [str(cell) for batch in batches for cell in batch.carried["n"].to_pylist()] == [p[1:] for p in expected]
    together = []
    for shard in range(3):
        part = TableReader(Input(str(path), shard=f"{shard}/3", **fields), ["prompt"])
        assert part.first_row == len(together)
        for batch in part.batches():
            assert batch.first_row == len(together)
            together += [row["prompt"] for row in values([batch])]
        assert len(together) == part.first_row + part.rows
    assert together == expected


@pytest.mark.parametrize("filter_", [None, "n >= 100"])
def test_skipping_batches_leaves_the_others_as_they_are(tmp_path: Path, filter_: str | None) -> None:
    path, _ = numbers(tmp_path, "t.parquet")
    reader = TableReader(Input(str(path), filter=filter_, shard="1/2"), ["prompt"])
    whole = list(reader.batches())
    assert len(whole) > 2
    for batch in whole:
        (alone,) = reader.batches(
            lambda first, rows, batch=batch: first < batch.first_row + batch.rows and first + rows > batch.first_row
        )
        assert (alone.first_row, alone.values) == (batch.first_row, batch.values)
        assert alone.carried.equals(batch.carried)


def test_rows_that_cannot_be_read_pass_every_filter(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "n": 1}\n{broken\n{"prompt": "b", "n": 2}\n{"prompt": "c"}\n')
    assert values(read_all(tmp_path / "a.jsonl", ["prompt"], filter="n == 2")) == ["malformed_json", {"prompt": "b"}]
    (tmp_path / "b.csv").write_text("prompt,n\na,1\nb\nc,2\n")
    assert values(read_all(tmp_path / "b.csv", ["prompt"], filter="n == '2'")) == ["malformed_row", {"prompt": "c"}]
    (tmp_path / "c.jsonl").write_text("{broken\n")
    assert values(read_all(tmp_path / "c.jsonl", ["prompt"], filter="n == 2")) == ["malformed_json"]


def test_a_table_of_which_nothing_passes_has_its_columns(tmp_path: Path) -> None:
    reader = TableReader(Input(str(prompts(tmp_path, 10)), filter="id > 99"), ["prompt"])
    assert (reader.rows, reader.schema.names, list(reader.batches())) == (0, ["id", "prompt"], [])


def test_a_job_of_a_shard_writes_its_rows_and_is_resumed(tmp_path: Path) -> None:
    table = prompts(tmp_path, 50)
    whole = pq.read_table(_job(tmp_path / "whole", Input(str(table))))
    halves = [pq.read_table(_job(tmp_path / f"out{i}", Input(str(table), shard=f"{i}/2"))) for i in range(2)]
    assert pa.concat_tables(halves).equals(whole)
    (tmp_path / "out1" / "_SUCCESS").unlink()
    part = sorted((tmp_path / "out1").glob("part-*"))[1]
    content = part.read_bytes()
    part.unlink()
    manifest = run(Input(str(table), shard="1/2"), Output(str(tmp_path / "out1"), rows_per_part=10))
    assert (manifest.rows, manifest.resumed_rows) == (25, 15)
    assert part.read_bytes() == content


def _job(folder: Path, input_: Input) -> str:
    def reverse(results: list[RowResult]) -> list[RowResult]:
        return results[::-1]

    run(input_, Output(str(folder), rows_per_part=10), reverse)
    return str(folder)


# --- what is read ---------------------------------------------------------------------------------------------------


def bytes_read() -> int:
    """By this process so far, from files and sockets."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts reads as Linux does")
def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(2_000)
    table = pa.table(
        {
            "n": range(4000),
            "prompt": [f"prompt {i}" for i in range(4000)],
            "blob": [noise[i % 1000 :] for i in range(4000)],
        }
    )
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, row_group_size=1000, compression="none", use_dictionary=False)
    size = path.stat().st_size

    def cost(needed: list[str], **fields: Any) -> tuple[float, int]:
        """Bytes read as a share of the file, and rows."""
        before = bytes_read()
        rows = sum(batch.rows for batch in read_all(path, needed, **fields))
        return (bytes_read() - before) / size, rows

    assert cost(["prompt"])[0] > 0.99
    assert cost(["prompt"], columns=("n",)) < (0.1, 4001)
    share, rows = cost(["prompt", "blob"], columns=(), filter="n >= 3500")
    assert rows == 500
    assert 0.2 < share < 0.32  # the last row group, and the filter's column of it
    assert cost(["blob"], columns=(), shard="0/4", filter="n >= 0")[0] < 0.32


# --- folders --------------------------------------------------------------------------------------------------------


def hive(folder: Path, paths: list[str], format_: str = "parquet") -> None:
    for index, path in enumerate(paths):
        (folder / path).mkdir(parents=True, exist_ok=True)
        if format_ == "parquet":
            pq.write_table(pa.table({"prompt": [f"{index}a", f"{index}b"]}), folder / path / "f.parquet")
        else:
            (folder / path / "f.csv").write_text(f"prompt\n{index}a\n{index}b\n")


DAYS = ["ds=2026-11-20/lang=de", "ds=2026-11-21/lang=__HIVE_DEFAULT_PARTITION__", "ds=2026-11-22/lang=a%2Fb"]


@pytest.mark.parametrize("format_", ["parquet", "csv"])
@pytest.mark.parametrize("uri", ["", "/*", "/**/*.{}", "/ds=*/lang=*", "/ds=2026-11-2[0-2]/**"])
def test_folders_are_typed_columns(tmp_path: Path, format_: str, uri: str) -> None:
    hive(tmp_path, DAYS, format_)
    batches = read_all(f"{tmp_path}{uri.format(format_)}", ["prompt", "lang", "ds"])
    table = carried(batches)
    assert table.schema == pa.schema([("prompt", pa.string()), ("ds", pa.date32()), ("lang", pa.string())])
    days = [datetime.date(2026, 11, day) for day in (20, 21, 22)]
    assert table["ds"].to_pylist() == [day for day in days for _ in range(2)]
    assert table["lang"].to_pylist() == ["de", "de", None, None, "a/b", "a/b"]
    assert values(batches)[2] == {"prompt": "1a", "lang": None, "ds": days[1]}


def test_the_uris_own_folders_are_columns_on_request(tmp_path: Path) -> None:
    hive(tmp_path, DAYS)
    day = str(tmp_path / DAYS[0])
    assert TableReader(Input(day), []).schema.names == ["prompt"]
    assert TableReader(Input(day, partitions="uri"), []).schema.names == ["prompt", "ds", "lang"]
    assert TableReader(Input(str(tmp_path), partitions="off"), []).schema.names == ["prompt"]
    assert TableReader(Input((f"{day}/f.parquet", str(tmp_path))), []).rows == 6  # a list: each file once


@pytest.mark.parametrize(
    ("folders", "type_"),
    [
        (["k=1", "k=-2"], pa.int64()),
        (["k=1", "k=007"], pa.string()),
        (["k=1", "k=x"], pa.string()),
        (["k=2026-01-01", "k=2026-13-01"], pa.string()),
        (["k=__HIVE_DEFAULT_PARTITION__"], pa.string()),
        (["k=1", "other"], pa.int64()),
        (["k=" + "9" * 30], pa.string()),
    ],
)
def test_types_of_folders_fit_all_of_them(tmp_path: Path, folders: list[str], type_: pa.DataType) -> None:
    hive(tmp_path, folders)
    assert TableReader(Input(str(tmp_path)), []).schema.field("k").type == type_


def test_a_files_own_column_yields_to_its_folder(tmp_path: Path) -> None:
    hive(tmp_path, ["prompt=1", "prompt=2"])
    batches = read_all(tmp_path, ["prompt"])
    assert values(batches) == [{"prompt": 1}, {"prompt": 1}, {"prompt": 2}, {"prompt": 2}]
    assert carried(batches)["prompt"].to_pylist() == [1, 1, 2, 2]


def test_a_column_twice_in_a_path_is_told(tmp_path: Path) -> None:
    hive(tmp_path, ["k=1/k=2"])
    with pytest.raises(InputError, match="names the column 'k' twice"):
        TableReader(Input(str(tmp_path)), [])


def test_folders_that_cannot_pass_are_not_opened(tmp_path: Path) -> None:
    hive(tmp_path, [f"ds=2026-11-{day}" for day in range(10, 20)])
    for path in tmp_path.glob("ds=2026-11-1[0-7]/*"):
        path.write_bytes(b"not Parquet")
    reader = TableReader(Input(str(tmp_path), filter="ds >= '2026-11-18' and prompt != '9a'"), ["prompt"])
    assert [row["prompt"] for row in values(reader.batches())] == ["8a", "8b", "9b"]
    assert len(reader.files) == 2
    with pytest.raises(InputError, match="2026-11-10"):
        TableReader(Input(str(tmp_path), filter="ds < '2026-11-11'"), ["prompt"])
    (tmp_path / "ds=2026-11-10" / "f.parquet").write_bytes((tmp_path / "ds=2026-11-18" / "f.parquet").read_bytes())
    assert TableReader(Input(str(tmp_path), filter="ds > '2027-01-01'"), ["prompt"]).rows == 0


@pytest.mark.parametrize("shard", ["4/4", "a/b", "1", "-1/2", "0/0", "1/2/3"])
def test_what_is_no_shard(shard: str) -> None:
    with pytest.raises(SpecError, match=r"input\.shard"):
        Input("x", shard=shard)
