"""When a job ends before its last row: failed rows, a deadline, a token budget; and with which exit code."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from moegen.errors import Interrupted, SpecError, TooManyErrors
from moegen.job.progress import Progress
from moegen.job.worker import run_job
from moegen.spec import JobSpec, Limits

from tests.job.test_worker import PLAN, part_bytes, read, spec, table_of
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def table_with_failures(folder: Path, rows: int, every: int) -> Path:
    """Every so manieth row is one that cannot run."""
    path = folder / "in.jsonl"
    lines = ({"prompt": 42 if row % every == 0 else f"Question {row}"} for row in range(rows))
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def manifest_of(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "_manifest.json").read_text()))


def test_above_the_error_limit_there_is_everything_but_success(model: Path, tmp_path: Path) -> None:
    table = table_with_failures(tmp_path, 40, every=10)
    with pytest.raises(TooManyErrors, match=r"4 of 40 rows failed \(4 error\), more than .* 0\.05 allows") as ended:
        run_job(spec(model, table, tmp_path / "out"))
    assert ended.value.exit_code == 2
    assert not (tmp_path / "out/_SUCCESS").exists()
    assert manifest_of(tmp_path / "out")["rows"] == 40
    before = part_bytes(tmp_path / "out")
    run_job(spec(model, table, tmp_path / "out", errors={"max_error_rate": 0.1}))
    assert len(read(tmp_path / "out")) == 40
    assert part_bytes(tmp_path / "out") == before
    with pytest.raises(TooManyErrors):
        run_job(spec(model, table, tmp_path / "out", errors={"max_error_rate": 0.09}))
    assert not (tmp_path / "out/_SUCCESS").exists()  # that of the more lenient run
    by_number = {"max_error_rate": 1.0, "max_failed_rows": 4}
    assert run_job(spec(model, table, tmp_path / "out", errors=by_number)).rows == 40
    with pytest.raises(TooManyErrors, match=r"4 rows failed \(4 error\), more than errors\.max_failed_rows 3 allows"):
        run_job(spec(model, table, tmp_path / "out", errors=by_number | {"max_failed_rows": 3}))


def test_one_failed_row_too_many_ends_the_job_at_once(model: Path, tmp_path: Path) -> None:
    table = table_with_failures(tmp_path, 40, every=10)
    with pytest.raises(TooManyErrors, match="2 rows failed"):
        run_job(spec(model, table, tmp_path / "out", errors={"max_error_rate": 1.0, "max_failed_rows": 1}))
    assert not (tmp_path / "out/_manifest.json").exists()


def test_skipped_and_cut_rows_have_not_failed(model: Path, tmp_path: Path) -> None:
    lines = [{"prompt": None}] * 5 + [{"prompt": f"Question {row}"} for row in range(5)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sampling = {"max_tokens": 2, "ignore_eos": True}
    job = spec(model, tmp_path / "in.jsonl", tmp_path / "out", sampling=sampling, errors={"max_error_rate": 0})
    assert run_job(job).statuses == {"length": 5, "skipped_null": 5}


def test_too_many_failures_among_the_first_thousand_rows_end_the_job(model: Path, tmp_path: Path) -> None:
    table = table_with_failures(tmp_path, 3000, every=4)
    job = spec(model, table, tmp_path / "out", sampling={"max_tokens": 2})
    with pytest.raises(TooManyErrors, match=r"\d{3} of \d{4} rows failed"):
        run_job(job)
    assert not (tmp_path / "out/_manifest.json").exists()
    begun = time.monotonic()
    with pytest.raises(TooManyErrors, match=r"rows failed"):
        run_job(job)
    assert time.monotonic() - begun < 60
    lenient = spec(model, table, tmp_path / "out", sampling={"max_tokens": 2}, errors={"max_error_rate": 0.25})
    manifest = run_job(lenient)
    assert (manifest.rows, manifest.statuses["error"]) == (3000, 750)
    assert manifest.resumed_rows > 0


def test_fail_fast_ends_at_the_first_failure_and_does_not_forget_it(model: Path, tmp_path: Path) -> None:
    table = table_of(tmp_path, 30)
    table.write_text(table.read_text() + '\n{"prompt": 42}')
    fast = {"errors": {"on_row_error": "fail_fast"}, "output": {"rows_per_part": 1}}
    for _ in range(2):
        with pytest.raises(TooManyErrors, match=r"fail_fast") as ended:
            run_job(spec(model, table, tmp_path / "out", **fast))
        assert ended.value.exit_code == 2
    assert not (tmp_path / "out/_SUCCESS").exists()
    manifest = run_job(spec(model, table, tmp_path / "out", output={"rows_per_part": 1}))
    assert manifest.statuses["error"] == 1


def test_the_token_limit_stops_and_a_larger_one_goes_on(model: Path, tmp_path: Path) -> None:
    table = table_of(tmp_path, 60)

    def job(limit: int | None) -> JobSpec:
        limits = {"max_total_tokens": limit}
        output = {"rows_per_part": 10}
        return spec(model, table, tmp_path / "out", output=output, engine={"plan": PLAN}, limits=limits)

    told: list[Progress] = []
    with pytest.raises(Interrupted, match=r"stopped after \d+ tokens, at limits\.max_total_tokens 200") as ended:
        run_job(job(200), report=told.append)
    assert ended.value.exit_code == 75
    assert 200 <= told[-1].prompt_tokens + told[-1].completion_tokens < 600
    with pytest.raises(Interrupted, match=r"max_total_tokens 200"):
        run_job(job(200))
    manifest = run_job(job(None))
    assert manifest.resumed_rows + manifest.journal_rows == told[-1].rows_done
    run_job(spec(model, table, tmp_path / "straight", output={"rows_per_part": 10}))
    assert part_bytes(tmp_path / "out") == part_bytes(tmp_path / "straight")


def test_a_deadline_that_has_passed_stops_before_the_model_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moegen.run.engine import Engine

    monkeypatch.setattr(Engine, "open", None)  # loading the model would fail
    now = datetime.fromtimestamp(time.time() - 1, UTC).isoformat()
    with pytest.raises(Interrupted, match=r"stopped at limits\.deadline .* 0 of 5 rows are done"):
        run_job(spec(model, table_of(tmp_path, 5), tmp_path / "out", limits={"deadline": now}))


def test_a_deadline_is_a_time_with_an_offset(tmp_path: Path) -> None:
    assert Limits("2026-11-22T06:00:00+02:00").deadline_at == Limits("2026-11-22T04:00:00Z").deadline_at
    for wrong in ("2026-11-22T06:00:00", "tomorrow", ""):
        with pytest.raises(SpecError, match=r"limits\.deadline"):
            Limits(wrong)
    base = spec(tmp_path, tmp_path / "in.jsonl", tmp_path / "out").to_mapping()
    for section in ("checkpoint", "errors", "limits"):
        del base[section]
    (tmp_path / "job.yaml").write_text(json.dumps(base)[:-1] + ', "limits": {deadline: 2026-11-22T06:00:00Z}}')
    assert JobSpec.read(tmp_path / "job.yaml").limits == Limits("2026-11-22T06:00:00+00:00")
