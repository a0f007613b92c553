"""The journal: what is written comes back, and nothing that is damaged or foreign does."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
from moegen.errors import MoegenError
from moegen.row import RowError, RowResult, Status
from moegen.table.journal import Journal
from table_job import FINGERPRINT

FULL = RowResult(
    row_index=3,
    status=Status.LENGTH,
    output="kept",
    output_raw="raw\n😀 \ud83d",
    error=RowError("code", "message", "stage", retryable=True),
    finish_reason="length",
    prompt_tokens=4,
    completion_tokens=5,
    dedup_of=1,
    attempts=2,
    seed=(1 << 63) - 1,
    input_truncated=True,
    token_ids=(1, 2, 3),
    prompt_rendered="<p>",
    output_json={"a": [1, {"b": None}]},
    logprobs=({"token_id": 1, "logprob": -0.5, "top": [{"token_id": 1, "logprob": -0.5}]},),
    label="a",
    label_prob=0.75,
    label_probs=(0.75, 0.25),
    score=-1.5,
    score_tokens=3,
)


def journal(folder: Path, epoch: int = 1, fingerprint: str = FINGERPRINT) -> Journal:
    return Journal(str(folder), epoch, fingerprint, rows_per_part=10)


def nothing(first_row: int, rows: int) -> bool:
    return False


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "journal").glob("*"))


def test_every_field_of_a_result_comes_back(tmp_path: Path) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(RowResult)}
    assert all(getattr(FULL, name) != default for name, default in defaults.items()), "a field that this test misses"
    empty = RowResult(4, Status.SKIPPED_NULL)
    journal(tmp_path).write([FULL, empty])
    assert journal(tmp_path, epoch=2).read(nothing) == {3: FULL, 4: empty}


def test_names_tell_epoch_and_number_and_files_are_never_replaced(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.write([FULL])
    first.write([RowResult(4, Status.OK, "x")])
    journal(tmp_path, epoch=12).write([RowResult(5, Status.OK, "y")])
    assert names(tmp_path) == ["000001-000000.arrow", "000001-000001.arrow", "000012-000000.arrow"]
    journal(tmp_path).write([FULL])  # the same bytes: a request that was sent twice
    with pytest.raises(MoegenError, match="is there already with other rows"):
        journal(tmp_path).write([RowResult(9, Status.OK, "z")])
    assert sorted(journal(tmp_path, epoch=13).read(nothing)) == [3, 4, 5]


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "other work"])
def test_what_is_damaged_or_foreign_is_told_once_and_passed_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    journal(tmp_path).write([RowResult(1, Status.OK, "SECRET")])
    path = tmp_path / "journal/000002-000000.arrow"
    journal(tmp_path, 2, FINGERPRINT if damage != "other work" else "f" * 64).write([FULL])
    whole = path.read_bytes()
    if damage != "other work":
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "garbage": b"SECRET" * 100}[damage])
    with caplog.at_level(logging.WARNING):
        assert list(journal(tmp_path, epoch=3).read(nothing)) == [1]
    assert len(caplog.records) == 1
    assert "000002-000000.arrow: is no journal of this work" in caplog.text
    assert "SECRET" not in caplog.text


def test_half_a_file_of_any_length_is_no_file(tmp_path: Path) -> None:
    journal(tmp_path).write([FULL])
    path = tmp_path / "journal/000001-000000.arrow"
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        assert journal(tmp_path, epoch=2).read(nothing) == {}


def test_files_go_once_all_their_rows_are_in_parts(tmp_path: Path) -> None:
    committed: set[int] = set()

    def is_committed(first_row: int, rows: int) -> bool:
        return first_row // 10 in committed

    one = journal(tmp_path)
    one.write([RowResult(row, Status.OK) for row in (1, 11)])
    one.write([RowResult(row, Status.OK) for row in (2, 3)])
    assert one.rows(is_committed) == 4
    committed.add(0)
    one.prune(is_committed)
    assert names(tmp_path) == ["000001-000000.arrow"]
    again = journal(tmp_path, epoch=2)
    assert list(again.read(is_committed)) == [11]
    assert again.rows(is_committed) == 1
    committed.add(1)
    again.prune(is_committed)
    assert names(tmp_path) == []
