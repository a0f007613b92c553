"""Parts: deterministic names and bytes, committed once, resumed, never mixed with other work."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moegen.errors import MoegenError, SpecError, StorageError
from moegen.row import RowError, RowResult, Status
from moegen.spec import Input, Output
from moegen.table.manifest import Manifest, read_manifest
from moegen.table.reader import TableReader
from moegen.table.writer import TableWriter
from table_job import FINGERPRINT, answer, answers, part_bytes, prompts, read_all, run

OTHER = "fedcba9876543210" * 4


def shuffled(results: list[RowResult]) -> list[RowResult]:
    return random.Random(5).sample(results, len(results))


def writer_of(folder: Path, schema: pa.Schema, rows: int, **fields: Any) -> TableWriter:
    return TableWriter(Output(str(folder), **fields), schema, rows, FINGERPRINT, "key")


def read_output(folder: Path) -> pa.Table:
    read = pq.read_table if any(folder.glob("*.parquet")) else lambda path: pa.ipc.open_file(path).read_all()
    return pa.concat_tables(read(path) for path in sorted(folder.glob("part-*")))


@pytest.mark.parametrize("format_", ["parquet", "arrow"])
def test_every_row_comes_out_in_order_beside_its_own_columns(tmp_path: Path, format_: str) -> None:
    source = prompts(tmp_path, 1050)
    manifest = run(Input(str(source)), Output(str(tmp_path / "out"), format_, rows_per_part=400), shuffled)
    names = [f"part-{k:06d}-{FINGERPRINT[:16]}.{format_}" for k in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["_SUCCESS", "_manifest.json", *names]
    table = read_output(tmp_path / "out")
    assert table.select(["id", "prompt"]).to_pylist() == pq.read_table(source).to_pylist()
    assert table["row_index"].to_pylist() == list(range(1050))
    assert table["output"].to_pylist() == [f"answer to prompt {i}" for i in range(1050)]
    assert set(table["input_file"].to_pylist()) == {f"file://{source}"}
    assert [part.rows for part in manifest.parts] == [400, 400, 250]
    if format_ == "arrow":  # not in the batches of its input
        assert pa.ipc.open_file(tmp_path / "out" / names[0]).num_record_batches == 1
    for part in manifest.parts:
        data = (tmp_path / "out" / part.name).read_bytes()
        assert (part.size_bytes, part.sha256) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("format_", ["parquet", "arrow"])
def test_bytes_do_not_depend_on_the_order_of_answers(tmp_path: Path, format_: str) -> None:
    source = Input(str(prompts(tmp_path, 1000, row_group_rows=70)))
    for name, order in (("straight", list), ("shuffled", shuffled)):
        run(source, Output(str(tmp_path / name), format_, rows_per_part=300), order)
    assert len(part_bytes(tmp_path / "straight")) == 4
    assert part_bytes(tmp_path / "straight") == part_bytes(tmp_path / "shuffled")


def test_parquet_bytes_do_not_depend_on_the_batches(tmp_path: Path) -> None:
    for name, row_group_rows in (("fine", 7), ("coarse", 1000)):
        batches = read_all(prompts(tmp_path, 1000, row_group_rows), ["prompt"])
        writer = writer_of(tmp_path / name, batches[0].carried.schema, 1000, rows_per_part=300)
        for batch in batches:
            writer.add_batch(batch)
        for row in range(1000):
            writer.add(answer(row, {"prompt": f"prompt {row}"}))
    assert len(part_bytes(tmp_path / "fine")) == 4
    assert part_bytes(tmp_path / "fine") == part_bytes(tmp_path / "coarse")


def test_a_part_appears_with_its_last_result(tmp_path: Path) -> None:
    reader = TableReader(Input(str(prompts(tmp_path, 250))), ["prompt"])
    writer = writer_of(tmp_path / "out", reader.schema, reader.rows, rows_per_part=100)
    results = answers(reader, writer)
    assert [writer.add(result) for result in results[1:100]] == [None] * 99
    assert part_bytes(tmp_path / "out") == {}
    info = writer.add(results[0])
    assert info is not None
    assert (info.rows, list(part_bytes(tmp_path / "out"))) == (100, [info.files[0].name])
    assert writer.is_committed(0, 100)
    assert not writer.is_committed(99, 2)
    assert writer.totals.statuses == {"ok": 100}
    assert not writer.complete


def test_an_interrupted_run_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    input_ = Input(str(prompts(tmp_path, 1000, row_group_rows=130)))
    run(input_, Output(str(tmp_path / "whole"), rows_per_part=90))
    broken = Output(str(tmp_path / "broken"), rows_per_part=90)
    reader = TableReader(input_, ["prompt"])
    writer = TableWriter(broken, reader.schema, reader.rows, FINGERPRINT, "key")
    for result in answers(reader, writer)[:500]:  # rows 0 to 499: five parts and a piece of the sixth
        writer.add(result)
    del writer
    kept = part_bytes(tmp_path / "broken")
    assert len(kept) == 5

    resumed = TableWriter(broken, reader.schema, reader.rows, FINGERPRINT, "key")
    assert (resumed.resumed.rows, resumed.resumed.prompt_tokens, resumed.resumed.statuses) == (450, 1350, {"ok": 450})
    rest = answers(reader, resumed)
    assert [result.row_index for result in rest] == list(range(450, 1000))
    manifest = run(input_, broken, shuffled)
    assert part_bytes(tmp_path / "broken") == part_bytes(tmp_path / "whole")
    assert (manifest.rows, manifest.resumed_rows, manifest.completion_tokens) == (1000, 450, 2000)
    assert [part.sha256 is None for part in manifest.parts] == [True] * 5 + [False] * 7


def test_a_finished_job_is_found_finished(tmp_path: Path) -> None:
    input_, output = Input(str(prompts(tmp_path, 100))), Output(str(tmp_path / "out"), rows_per_part=30)
    first = run(input_, output)
    reader = TableReader(input_, ["prompt"])
    assert TableWriter(output, reader.schema, reader.rows, FINGERPRINT, "key").complete
    assert (tmp_path / "out" / "_SUCCESS").exists()
    second = run(input_, output)
    assert second.resumed_rows == 100
    assert second.rows_per_s == 0
    assert second.parts == first.parts  # with their digests


def test_success_is_withdrawn_when_a_part_is_gone(tmp_path: Path) -> None:
    input_, output = Input(str(prompts(tmp_path, 100))), Output(str(tmp_path / "out"), rows_per_part=30)
    whole = run(input_, output)
    (tmp_path / "out" / whole.parts[2].name).unlink()
    reader = TableReader(input_, ["prompt"])
    writer = TableWriter(output, reader.schema, reader.rows, FINGERPRINT, "key")
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert [result.row_index for result in answers(reader, writer)] == list(range(60, 90))
    assert run(input_, output).parts == whole.parts


@pytest.mark.parametrize("left", ["part", "manifest"])
def test_other_work_is_refused_and_left_alone(tmp_path: Path, left: str) -> None:
    input_, output = Input(str(prompts(tmp_path, 10))), Output(str(tmp_path / "out"))
    run(input_, output, fingerprint=OTHER)
    for path in (tmp_path / "out").glob("_*" if left == "part" else "part-*"):
        path.unlink()
    before = sorted((tmp_path / "out").iterdir())
    name = r"out/(part-000000-fedcba9876543210\.parquet|_manifest\.json)"
    with pytest.raises(
        SpecError, match=rf"{name} belongs to other work .* use another folder, or output\.mode=new_run"
    ):
        run(input_, output)
    assert sorted((tmp_path / "out").iterdir()) == before


def test_a_part_that_only_looks_like_ours_is_refused(tmp_path: Path) -> None:
    input_, output = Input(str(prompts(tmp_path, 10))), Output(str(tmp_path / "out"))
    run(input_, output, fingerprint=FINGERPRINT[:16] + OTHER[16:])
    (tmp_path / "out" / "_manifest.json").unlink()
    with pytest.raises(SpecError, match="belongs to other work"):
        run(input_, output)
    pq.write_table(pa.table({"x": [1]}), next((tmp_path / "out").glob("part-*")))
    with pytest.raises(SpecError, match="was not written by moegen"):
        run(input_, output)


def test_new_run_removes_the_earlier_output_but_not_foreign_files(tmp_path: Path) -> None:
    input_ = Input(str(prompts(tmp_path, 100)))
    run(input_, Output(str(tmp_path / "out"), rows_per_part=10), fingerprint=OTHER)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "part-of-something.parquet").write_text("mine")
    manifest = run(input_, Output(str(tmp_path / "out"), rows_per_part=50, mode="new_run"))
    assert manifest.resumed_rows == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "_SUCCESS", "_manifest.json", "notes.txt", *(part.name for part in manifest.parts), "part-of-something.parquet",
    ]  # fmt: skip


def test_two_attempts_at_once_store_each_part_once(tmp_path: Path) -> None:
    input_, output = Input(str(prompts(tmp_path, 100))), Output(str(tmp_path / "out"), rows_per_part=50)
    reader = TableReader(input_, ["prompt"])
    writers = [TableWriter(output, reader.schema, reader.rows, FINGERPRINT, f"attempt {i}") for i in range(2)]
    results = [answers(reader, writer) for writer in writers]
    for first, second in zip(*results, strict=True):
        stored = [writers[0].add(first), writers[1].add(second)]
        if stored[0] is not None and stored[1] is not None:
            assert (stored[0].files[0].name, stored[0].rows, stored[0].files[0].size_bytes) == (
                stored[1].files[0].name, stored[1].rows, stored[1].files[0].size_bytes,
            )  # fmt: skip
            assert stored[1].files[0].sha256 is None
    assert [writer.totals for writer in writers] == [writers[0].totals] * 2
    footers = [json.loads(pq.read_metadata(path).metadata[b"moegen"]) for path in (tmp_path / "out").glob("part-*")]
    assert {footer["job_key"] for footer in footers} == {"attempt 0"}


@pytest.mark.parametrize("format_", ["parquet", "arrow"])
def test_zero_rows_give_one_empty_part_with_the_schema(tmp_path: Path, format_: str) -> None:
    source = prompts(tmp_path, 0)
    for resumed in range(2):
        manifest = run(Input(str(source)), Output(str(tmp_path / "out"), format_))
        assert (manifest.rows, manifest.statuses, [part.rows for part in manifest.parts], resumed) == (
            0,
            {},
            [0],
            resumed,
        )
        table = read_output(tmp_path / "out")
        assert (table.num_rows, table.column_names[:3]) == (0, ["id", "prompt", "row_index"])
        assert (tmp_path / "out" / "_SUCCESS").read_bytes() == b""


def test_rows_that_do_not_come_out_are_an_error_without_success(tmp_path: Path) -> None:
    reader = TableReader(Input(str(prompts(tmp_path, 100))), ["prompt"])
    writer = writer_of(tmp_path / "out", reader.schema, reader.rows, rows_per_part=50)
    for result in answers(reader, writer)[:-1]:
        writer.add(result)
    with pytest.raises(MoegenError, match="100 rows went in, but 50 came out") as caught:
        writer.finish(job_name="", model_digest="", input_files=reader.files, started_at=0)
    assert caught.value.exit_code == 70
    assert not list((tmp_path / "out").glob("_*"))


def test_answers_that_nobody_awaits_are_errors(tmp_path: Path) -> None:
    reader = TableReader(Input(str(prompts(tmp_path, 100))), ["prompt"])
    writer = writer_of(tmp_path / "out", reader.schema, reader.rows, rows_per_part=50)
    with pytest.raises(MoegenError, match="row 3 was answered twice, or before"):
        writer.add(RowResult(3, Status.OK))
    batch = next(reader.batches())
    writer.add_batch(batch)
    writer.add(RowResult(3, Status.OK))
    with pytest.raises(MoegenError, match="row 3 was answered twice"):
        writer.add(RowResult(3, Status.OK))
    with pytest.raises(MoegenError, match="rows 0 to 49 were added to the writer twice"):
        writer.add_batch(batch)
    with pytest.raises(MoegenError, match="row 100 "):
        writer.add(RowResult(100, Status.OK))


def test_strings_that_utf8_cannot_hold_do_not_stop_a_part(tmp_path: Path) -> None:
    reader = TableReader(Input(str(prompts(tmp_path, 2))), ["prompt"])
    output = Output(str(tmp_path / "out"), include=("prompt_rendered",))
    writer = TableWriter(output, reader.schema, reader.rows, FINGERPRINT, "key")
    answers(reader, writer)
    bad = "a\ud800b"
    error = RowError("code", bad, "generate")
    writer.add(RowResult(0, Status.OK, bad, bad, finish_reason="stop", prompt_rendered=bad))
    writer.add(RowResult(1, Status.ERROR, error=error))
    rows = read_output(tmp_path / "out").to_pylist()
    assert (rows[0]["output"], rows[0]["output_raw"], rows[0]["prompt_rendered"]) == ("a\ufffdb",) * 3
    assert rows[1]["error"] == {"code": "code", "message": "a\ufffdb", "stage": "generate", "retryable": False}


def test_a_folder_that_cannot_be_written_is_found_out_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/_moegen_probe: cannot be written"):
        TableWriter(Output(str(tmp_path / "file")), pa.schema([]), 1, FINGERPRINT, "key")


def test_the_manifest_survives_its_file(tmp_path: Path) -> None:
    manifest = run(Input(str(prompts(tmp_path, 10))), Output(str(tmp_path / "out")))
    assert read_manifest(str(tmp_path / "out")) == manifest
    assert Manifest.from_mapping(json.loads(manifest.to_json())) == manifest
    assert read_manifest(str(tmp_path / "nothing")) is None
    assert manifest.input_files[0].rows == 10
    assert 0 < manifest.seconds < 60
    assert manifest.rows_per_s == pytest.approx(10 / manifest.seconds)
    assert manifest.tokens_per_s == pytest.approx(20 / manifest.seconds)
