"""Rows that ask for the same: run once, counted once, and the table does not depend on what was at hand."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from moegen.errors import Interrupted
from moegen.job import flight, worker
from moegen.job.dry_run import dry_run
from moegen.job.progress import Progress
from moegen.job.repeats import Repeats, work_key
from moegen.job.worker import run_job
from moegen.row import RowResult, Status
from moegen.run.engine import Engine
from moegen.run.masks import Masks
from moegen.schedule.sequence import Request
from moegen.spec import JobSpec, Sampling
from moegen.table import first_rows
from moegen.table.first_rows import FirstRows, StoredFirstRows

from tests.job.test_worker import PLAN, read, spec
from tests.tiny import tiny_checkpoint

ROWS = 90


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that come again soon, and others that come again much later; every fifth row is drawn at random."""
    path = tmp_path_factory.mktemp("table") / "in.jsonl"
    with path.open("w") as file:
        for row in range(ROWS):
            text = f"Ticket {row % 30}" if row % 3 else f"Preface to all. Question {row // 9}"
            params = {"temperature": 1.2, "seed": 3} if row % 5 == 0 else {"seed": row, "top_p": 0.5}
            file.write(json.dumps({"prompt": "x" * 600 if row in (7, 37) else text, "params": params}) + "\n")
    return path


def job(model: Path, table: Path, output: Path, **sections: Any) -> JobSpec:
    base = {
        "sampling": {"max_tokens": 6, "params_column": "params"},
        "output": {"rows_per_part": 8, "include": ["token_ids", "prompt_rendered"]},
        "engine": {"plan": PLAN},
        "errors": {"max_error_rate": 1},
    }
    mapping = spec(model, table, output, **base).to_mapping()
    return JobSpec.from_mapping(
        {**mapping, **{k: {**mapping[k], **v} if isinstance(v, dict) else v for k, v in sections.items()}}
    )


def bare(rows: list[dict[str, Any]], *more: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in ("attempts", *more)} for row in rows]


@pytest.fixture(scope="module")
def straight(model: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The table of a job that nothing disturbs."""
    output = tmp_path_factory.mktemp("straight")
    run_job(job(model, table, output))
    return read(output)


def test_what_is_the_same_runs_once_and_every_row_has_its_answer(
    model: Path, table: Path, straight: list[dict[str, Any]], tmp_path: Path
) -> None:
    told: list[Progress] = []
    off = run_job(job(model, table, tmp_path / "off", dedup="off"))
    on = run_job(job(model, table, tmp_path / "on"), report=told.append)
    separate = read(tmp_path / "off")
    assert read(tmp_path / "on") == straight
    assert bare(straight, "dedup_of") == bare(separate, "dedup_of")
    assert {row["dedup_of"] for row in separate} == {None}
    assert (off.dedup_rows, off.dedup_tokens) == (0, 0)

    texts = [json.loads(line)["prompt"] for line in table.read_text().splitlines()]
    greedy = [index for index in range(ROWS) if index % 5 and len(texts[index]) < 600]
    first = {texts[index]: index for index in reversed(greedy)}
    assert {i: straight[i]["dedup_of"] for i in greedy} == {
        i: None if first[texts[i]] == i else first[texts[i]] for i in greedy
    }
    assert {row["dedup_of"] for row in straight if row["row_index"] not in greedy} == {None}
    copies = [row for row in straight if row["dedup_of"] is not None]
    assert len(copies) > 25
    assert {row["attempts"] for row in copies} == {0}
    assert {row["seed"] for row in copies} == {row["row_index"] for row in copies}, "a seed is the row's own"

    own = [row for row in straight if row["dedup_of"] is None]
    sums = [
        sum(row[name] or 0 for row in rows) for rows in (own, copies) for name in ("prompt_tokens", "completion_tokens")
    ]
    assert (on.prompt_tokens - sums[0], on.completion_tokens) == (0, sums[1])
    assert (on.dedup_rows, on.dedup_tokens) == (len(copies), sums[2] + sums[3])
    assert off.completion_tokens == sums[1] + sums[3]
    (attempt,) = json.loads((tmp_path / "on/_stats.json").read_text())["attempts"]
    assert attempt["total"]["generated_tokens"] == on.completion_tokens, "the device's own count"
    assert (told[-1].prompt_tokens, told[-1].completion_tokens) == (on.prompt_tokens, on.completion_tokens)

    dry = dry_run(job(model, table, tmp_path / "dry"))
    assert (dry.ready, dry.repeated, dry.runs) == (ROWS - 2, len(copies), len(own) - 2)
    long = sum(row["prompt_tokens"] for row in own if row["status"] == "too_long")
    assert dry.prompt_tokens == on.prompt_tokens - long
    dry_off = dry_run(job(model, table, tmp_path / "dry", dedup="off"))
    assert (dry_off.repeated, dry_off.runs) == (len(copies), ROWS - 2)
    assert dry_off.prompt_tokens == off.prompt_tokens - long


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
def test_an_interrupted_job_ends_with_the_same_table(
    model: Path, table: Path, straight: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    kept_bytes: int,
) -> None:  # fmt: skip
    """Firsts are in committed parts, in the journal, or not done; their answers at hand, or not any more."""
    monkeypatch.setattr(worker, "Repeats", lambda rows: Repeats(rows, kept_bytes))
    monkeypatch.setitem(Engine.generate.__kwdefaults__, "window", 4)  # else every row is read before the first ends
    told: list[Progress] = []
    ran: list[int] = []
    takes_off = flight.Flight._takes_off
    monkeypatch.setattr(
        flight.Flight, "_takes_off", lambda self, asked: (ran.append(asked.row.row_index), takes_off(self, asked))[1]
    )
    done = 0
    for at_least in (20, 60):
        with pytest.raises(Interrupted):
            run_job(
                job(model, table, tmp_path), report=told.append, stopping=lambda n=at_least: told[-1].rows_done >= n
            )
        assert told[-1].rows_done >= max(done, at_least)
        done = told[-1].rows_done
    told.clear()
    manifest = run_job(job(model, table, tmp_path), report=told.append)
    assert manifest.resumed_rows + manifest.journal_rows == done
    assert read(tmp_path) == straight
    copies = [row for row in straight if row["dedup_of"] is not None]
    assert manifest.dedup_rows == len(copies)
    assert manifest.prompt_tokens == sum(row["prompt_tokens"] for row in straight if row["dedup_of"] is None)
    assert manifest.prompt_tokens == told[-1].prompt_tokens
    assert {row["row_index"] for row in copies}.intersection(ran) or kept_bytes
    assert not list(tmp_path.rglob("work/*"))


def test_a_part_that_was_lost_comes_again(
    model: Path, table: Path, straight: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Of a finished job nothing is kept that says what rows asked for."""
    run_job(job(model, table, tmp_path))
    for part in (tmp_path.glob(f"part-00000{number}-*") for number in (0, 2, 9)):
        next(part).unlink()
    run_job(job(model, table, tmp_path))
    assert read(tmp_path) == straight


def test_a_crash_suspects_only_rows_that_ran_and_copies_share_a_quarantine(
    model: Path, table: Path, straight: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (victim, count), *_ = Counter(r["dedup_of"] for r in straight if r["dedup_of"] is not None).most_common(1)
    begin = Masks.begin

    def dies(self, sequences):  # type: ignore[no-untyped-def]
        if any(sequence.request.row_index == victim for sequence in sequences):
            raise RuntimeError("the engine is gone")
        begin(self, sequences)

    monkeypatch.setattr(Masks, "begin", dies)
    crashes = 0
    while not (tmp_path / "_SUCCESS").exists():
        try:
            run_job(job(model, table, tmp_path))
        except RuntimeError:
            crashes += 1
    assert 3 <= crashes <= 4  # the first may come before the row is named
    rows = read(tmp_path)
    lost = {row["row_index"]: row for row in rows if row["status"] == "quarantined"}
    assert lost.keys() == {victim, *(row["row_index"] for row in straight if row["dedup_of"] == victim)}
    assert len(lost) == count + 1
    assert (lost[victim]["attempts"], lost[victim]["dedup_of"]) == (3, None)
    for index in lost.keys() - {victim}:
        assert (lost[index]["attempts"], lost[index]["dedup_of"]) == (0, victim)
        assert f"with row {victim} in it, which asks for the same" in lost[index]["error"]["message"]
    others = [index for index in range(ROWS) if index not in lost]
    assert bare([rows[index] for index in others]) == bare([straight[index] for index in others])


def test_memory_is_bounded_by_not_reading_on(
    model: Path, table: Path, straight: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While too many rows wait for an answer under way, no more are read."""
    monkeypatch.setattr(flight, "_MOST_COPIES", 2)
    drives: list[int] = []
    drive = flight.Flight._drive
    monkeypatch.setattr(flight.Flight, "_drive", lambda self, *args: (drives.append(1), drive(self, *args)))
    same = tmp_path / "same"
    same.mkdir()
    lines = table.read_text().splitlines()
    for name in ("a", "b", "c"):  # a batch is of one file
        (same / f"{name}.jsonl").write_text("\n".join(lines[1:5] * 3))
    run_job(job(model, same, tmp_path / "out"))
    rows = read(tmp_path / "out")
    assert len(drives) > 1
    assert [row["dedup_of"] for row in rows] == [None if i < 4 else i % 4 for i in range(36)]
    assert all(bare([row], "row_index", "dedup_of", "input_file", "seed") == bare(
        [rows[row["row_index"] % 4]], "row_index", "dedup_of", "input_file", "seed") for row in rows)  # fmt: skip


def test_the_limit_of_tokens_counts_work_once(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "the same again"}) for _ in range(200)))
    limits = {"max_total_tokens": 2 * (14 + 6)}
    changes = {"engine": {"plan": PLAN}, "sampling": {"params_column": None}}
    manifest = run_job(job(model, path, tmp_path / "on", limits=limits, **changes))
    assert (manifest.rows, manifest.dedup_rows) == (200, 199)
    with pytest.raises(Interrupted, match=r"limits\.max_total_tokens"):
        run_job(job(model, path, tmp_path / "off", limits=limits, dedup="off", **changes))


def test_sampled_answers_do_not_know_of_batches_restarts_or_dedup(model: Path, table: Path, tmp_path: Path) -> None:
    """`row_seeded`: everything is drawn, with the same seeds."""
    sampling = {"params_column": None, "temperature": 1.0, "top_p": 0.95, "seed": 11}
    wide = {"plan": {"kv_pages": 400, "page_tokens": 8, "pass_tokens": 512, "share_prefix": False}}
    tables = {}
    for name, sections in {"narrow": {}, "wide": {"engine": wide}, "off": {"dedup": "off"}}.items():
        run_job(job(model, table, tmp_path / name, sampling=sampling, **sections))
        tables[name] = bare(read(tmp_path / name), "error")  # which says how large the pool is
    told: list[Progress] = []
    again = job(model, table, tmp_path / "restarted", sampling=sampling)
    with pytest.raises(Interrupted):
        run_job(again, report=told.append, stopping=lambda: told[-1].rows_done >= ROWS // 2)
    run_job(replace(again, engine=replace(again.engine, plan=replace(again.engine.plan, **wide["plan"]))))
    tables["restarted"] = bare(read(tmp_path / "restarted"), "error")
    first, *others = tables.values()
    assert all(other == first for other in others)
    assert {row["dedup_of"] for row in first} == {None}, "no row's noise is another's"
    by_text: dict[str, set[tuple[int, ...]]] = {}
    for row in first:
        by_text.setdefault(row["prompt_rendered"], set()).add(tuple(row["token_ids"] or ()))
    assert max(map(len, by_text.values())) > 1


def test_yaml_says_off(model: Path, table: Path, tmp_path: Path) -> None:
    assert job(model, table, tmp_path, dedup=False).dedup == "off"


@pytest.mark.parametrize(
    ("sections", "repeats"),
    [
        ({}, True),
        ({"sampling": {"params_column": None}}, True),
        ({"sampling": {"params_column": None, "temperature": 1.0}}, False),
        ({"sampling": {"params_column": None, "temperature": 1.0, "param_columns": ["temperature"]}}, True),
        ({"dedup": "off"}, False),
    ],
)
def test_nothing_is_remembered_where_no_row_can_repeat_another(
    model: Path, table: Path, tmp_path: Path, sections: dict[str, Any], repeats: bool
) -> None:
    assert job(model, table, tmp_path, **sections).repeats == repeats


# --- the parts ------------------------------------------------------------------------------------------------------


def request(
    row: int = 0, ids: tuple[int, ...] = (1, 2), rated: tuple[tuple[int, ...], ...] = (), **params: Any
) -> Request:
    return Request(row, ids, Sampling(**{"max_tokens": 5, **params}), continuations=rated)


def test_the_same_work_has_the_same_key() -> None:
    same = [request(), request(7), request(seed=3), request(top_p=0.1, top_k=4, min_p=0.3)]
    assert len({work_key(one) for one in same}) == 1
    others = [
        *(request(), request(ids=(1, 2, 3)), request(ids=(2, 1)), request(ids=(258,)), request(max_tokens=6)),
        *(request(stop=("a",)), request(stop=("a", "b")), request(repetition_penalty=1.1), request(ignore_eos=True)),
        *(request(stop_token_ids=(2,)), request(rated=((3,),)), request(rated=((3,), (4,))), request(rated=((3, 4),))),
    ]
    assert len({work_key(one) for one in others}) == len(others)
    assert work_key(request(temperature=0.5)) is None
    assert work_key(request(temperature=0.5, rated=((3,),))) == work_key(request(rated=((3,),)))


def test_first_rows_are_found_whatever_run_they_are_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_rows, "_RECENT", 10)
    monkeypatch.setattr(first_rows, "_RUN_ROWS", 64)
    monkeypatch.setattr(first_rows, "_MOST_ROWS", 900)
    dice = random.Random(2)
    keys = [dice.randbytes(16) for _ in range(400)]
    keys += [key[:8] + dice.randbytes(8) for key in keys[:50]]  # half a key is none
    known: dict[bytes, int] = {}
    rows = FirstRows()
    for row in range(1000):
        key = dice.choice(keys)
        assert rows.find(key) == known.get(key)
        if key not in known and rows.add(key, row):
            known[key] = row
    assert len(known) > 380
    assert max(known.values()) < 900
    lengths = [len(run) for run in rows._runs]
    assert max(lengths) < 3 * 64
    assert all(longer >= min(2 * shorter, 32) for longer, shorter in pairwise(lengths))


def test_first_rows_of_committed_parts_are_known_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = [bytes([row]) * 16 for row in range(40)]
    rows = StoredFirstRows(str(tmp_path), [], 10)
    for row, key in enumerate(keys):
        rows.add(key, row)
    for part in (0, 2, 3):
        rows.save(part)
    again = StoredFirstRows(str(tmp_path), [0, 1, 3], 10)
    assert [again.find(key) for key in keys] == [*range(10), *[None] * 20, *range(30, 40)]
    assert again.unknown == [1]
    path = tmp_path / "work/000003.bin"
    path.write_bytes(path.read_bytes()[:-1])
    damaged = StoredFirstRows(str(tmp_path), [0, 3], 10)
    assert (damaged.find(keys[30]), damaged.unknown) == (None, [3])
    assert "is damaged" in caplog.text


def test_answers_used_last_are_at_hand() -> None:
    few = Repeats(FirstRows(), kept_bytes=2000)
    result = RowResult(0, Status.OK, output="x" * 300, token_ids=(1, 2), prompt_rendered="secret")
    for row in range(8):
        few.keep(row, request(row), replace(result, row_index=row))
        few.answer(0)
    kept = [row for row in range(8) if few.answer(row) is not None]
    assert 0 in kept
    assert 7 in kept
    assert 1 < len(kept) < 8
    assert few.answer(7) == replace(result, row_index=7, prompt_rendered=None)
    off = Repeats(None)
    off.keep(3, request(3), result)
    assert off.answer(3) is None
    assert [off.first(request(3)), off.first(request(4))] == [3, 4]
