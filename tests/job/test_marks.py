"""Marks: rows in the engine are named while they are there, and only a crash leaves their names behind."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from moegen.job.marks import Marks


def named(folder: Path) -> dict[str, list[list[int]]]:
    return {path.name: json.loads(path.read_bytes())["rows"] for path in sorted((folder / "attempts").glob("*"))}


def crashed(folder: Path, epoch: int, rows: range) -> None:
    marks = Marks(str(folder), epoch)
    marks.begin(rows)
    marks.sync()


def test_rows_are_named_soon_the_first_at_once_and_no_longer_than_they_run(tmp_path: Path) -> None:
    marks = Marks(str(tmp_path), 1)
    marks.begin([1, 2, 3, 7])
    first = {"000001-000000.json": [[1, 4], [7, 8]]}
    assert named(tmp_path) == first
    marks.begin([2, 5, 9])  # 2 was preempted
    assert named(tmp_path) == first
    marks.end(9)
    marks.sync()
    assert named(tmp_path) == {**first, "000001-000001.json": [[5, 6]]}
    for row in (1, 2, 3, 7):
        marks.end(row)
    marks.sync()
    assert [*named(tmp_path)] == ["000001-000001.json"]
    marks.close()
    assert named(tmp_path) == {}
    marks.begin([9])
    marks.sync()
    assert named(tmp_path) == {}


def test_every_crashed_epoch_is_one_mark(tmp_path: Path) -> None:
    for epoch, rows in ((1, range(10)), (2, range(5, 15)), (3, range(6))):
        crashed(tmp_path, epoch, rows)
        crashed(tmp_path, epoch, rows)  # its files are two, or one that it could not replace
    crashes = Marks(str(tmp_path), 4).crashes
    assert [crashes[row] for row in (0, 4, 5, 6, 9, 10, 15)] == [2, 2, 3, 2, 2, 1, 0]
    for void_epoch in (3, None):  # once void, always void
        assert Marks(str(tmp_path), 4, void_epoch=void_epoch).crashes[0] == 1


def test_after_a_crash_rows_are_named_before_they_run(tmp_path: Path) -> None:
    marks = Marks(str(tmp_path), 2, after_crash=True)
    marks.begin([4])
    assert named(tmp_path) == {"000002-000000.json": [[4, 5]]}
    marks.begin(range(5, 5000))
    before = named(tmp_path)
    marks.begin([6000])  # by now whoever crashed it has entered
    assert named(tmp_path) == before
    assert Marks(str(tmp_path), 3).careful
    marks.close()
    assert not Marks(str(tmp_path), 3).careful


@pytest.mark.parametrize("content", ["", '{"rows": [[1', "{}", '{"rows": 3}', "[]"])
def test_half_a_mark_is_told_and_passed_over(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    crashed(tmp_path, 1, range(3))
    (tmp_path / "attempts/000002-000000.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert sorted(Marks(str(tmp_path), 3).crashes) == [0, 1, 2]
    assert "000002-000000.json: names no rows" in caplog.text
