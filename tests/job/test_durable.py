"""What a job leaves while it runs, what a crash costs, and that nothing is lost, doubled or overwritten."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from moegen.errors import InputError, Interrupted, SpecError
from moegen.job.progress import Progress
from moegen.job.worker import run_job
from moegen.spec import JobSpec
from moegen.storage import list_below, read_bytes

from tests.job.test_worker import PLAN, part_bytes, read, spec, table_of
from tests.tiny import tiny_checkpoint

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def batch(output: Path) -> Path:
    (folder,) = (output / "_batch").iterdir()
    return folder


def kept(output: Path) -> list[str]:
    return sorted(str(path.relative_to(batch(output))) for path in batch(output).rglob("*") if path.is_file())


def test_a_finished_job_keeps_its_plan_and_its_released_lease(model: Path, tmp_path: Path) -> None:
    table = table_of(tmp_path, 20)
    run_job(spec(model, table, tmp_path / "out", job={"key": "nightly"}))
    assert batch(tmp_path / "out").name == "nightly"
    assert kept(tmp_path / "out") == ["lease-000001.json", "plan.json"]
    assert json.loads((batch(tmp_path / "out") / "lease-000001.json").read_text())["released"]
    run_job(spec(model, table, tmp_path / "out", job={"key": "nightly"}))
    assert kept(tmp_path / "out") == ["lease-000002.json", "plan.json"]
    assert {row["attempts"] for row in read(tmp_path / "out")} == {1}


def test_an_interrupted_job_resumes_at_the_row(model: Path, tmp_path: Path) -> None:
    table = table_of(tmp_path, 60)
    job = spec(model, table, tmp_path / "out", output={"rows_per_part": 60}, engine={"plan": PLAN})
    told: list[Progress] = []
    with pytest.raises(Interrupted, match=r"0 of 60 rows are committed"):
        run_job(job, report=told.append, stopping=lambda: told[-1].rows_done >= 20)
    done = told[-1].rows_done
    assert 20 <= done < 60
    assert [name.partition("/")[0] for name in kept(tmp_path / "out")] == ["journal", "lease-000001.json", "plan.json"]

    told.clear()
    manifest = run_job(job, report=told.append)
    assert (manifest.resumed_rows, manifest.journal_rows) == (0, done)
    assert next(one for one in told if one.stage == "running").rows_done == done
    assert kept(tmp_path / "out") == ["lease-000002.json", "plan.json"]
    run_job(spec(model, table, tmp_path / "straight", output={"rows_per_part": 60}))
    assert part_bytes(tmp_path / "out") == part_bytes(tmp_path / "straight")


def test_on_s3_an_interrupted_job_resumes_at_the_row(model: Path, tmp_path: Path, bucket: str) -> None:
    table = table_of(tmp_path, 60)
    job = spec(model, table, tmp_path, output={"uri": f"{bucket}/out", "rows_per_part": 40}, engine={"plan": PLAN})
    told: list[Progress] = []
    with pytest.raises(Interrupted):
        run_job(job, report=told.append, stopping=lambda: told[-1].rows_done >= 20)
    manifest = run_job(job)
    assert manifest.resumed_rows + manifest.journal_rows == told[-1].rows_done
    left = [uri.rpartition("/")[2] for uri in list_below(f"{bucket}/out/_batch")]
    assert left == ["lease-000002.json", "plan.json"]
    run_job(spec(model, table, tmp_path / "straight", output={"rows_per_part": 40}))
    for name, data in part_bytes(tmp_path / "straight").items():
        assert read_bytes(f"{bucket}/out/{name}") == data


def test_rows_that_are_all_in_the_journal_need_no_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moegen.run.engine import Engine
    from moegen.table.journal import Journal

    job = spec(model, table_of(tmp_path, 20), tmp_path / "out", output={"rows_per_part": 20})
    run_job(job)
    before = part_bytes(tmp_path / "out")
    plan = json.loads((batch(tmp_path / "out") / "plan.json").read_text())
    results = [row_result(row) for row in read(tmp_path / "out")]
    Journal(str(batch(tmp_path / "out")), 1, plan["fingerprint"], 20).write(results)
    for name in before:
        (tmp_path / "out" / name).unlink()
    monkeypatch.setattr(Engine, "open", None)  # loading the model would fail
    manifest = run_job(job)
    assert (manifest.resumed_rows, manifest.journal_rows) == (0, 20)
    assert part_bytes(tmp_path / "out") == before


def row_result(row: dict[str, Any]) -> Any:
    from moegen.row import RowResult, Status

    names = {name for name in RowResult.__dataclass_fields__ if name in row} - {"status"}
    return RowResult(status=Status(row["status"]), **{name: row[name] for name in names})


def test_the_same_key_for_other_work_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    table = table_of(tmp_path, 20)
    told: list[Progress] = []
    key = {"key": "nightly"}
    with pytest.raises(Interrupted):
        run_job(spec(model, table, tmp_path / "out", job=key), stopping=lambda: True)
    before = kept(tmp_path / "out")
    with pytest.raises(SpecError, match=r"belongs to other work \(sampling\.max_tokens differ\)"):
        run_job(spec(model, table, tmp_path / "out", job=key, sampling={"max_tokens": 7}), report=told.append)
    table_of(tmp_path, 21)
    with pytest.raises(InputError, match=r"in\.jsonl changed since the job began"):
        run_job(spec(model, table, tmp_path / "out", job=key))
    assert kept(tmp_path / "out") == before
    manifest = run_job(spec(model, table, tmp_path / "out", job=key, output={"mode": "new_run"}))
    assert manifest.rows == 21
    assert kept(tmp_path / "out") == ["lease-000002.json", "plan.json"]


def test_a_key_that_climbs_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"job\.key: '\.\./x' cannot name a folder"):
        run_job(spec(model, table_of(tmp_path, 3), tmp_path / "out", job={"key": "../x"}))
    assert not (tmp_path / "out").exists()


def start(job: JobSpec, folder: Path, prelude: str = "") -> subprocess.Popen[str]:
    """`moegen run` in a process of its own, with a line of code before it."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(json.loads(job.to_json())))
    code = f"import sys; from moegen.cli import main\n{prelude}\nsys.exit(main(['run', {str(path)!r}]))"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not list(path.rglob(pattern)):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_pass_that_does_not_end_is_left_behind_within_twenty_seconds(model: Path, tmp_path: Path) -> None:
    """SIGTERM while the engine is in a pass of minutes: what was finished is saved, the lease free, the code 75."""
    job = spec(
        model, table_of(tmp_path, 60), tmp_path / "out",
        output={"rows_per_part": 60}, engine={"plan": PLAN}, checkpoint={"journal_seconds": 0.1},
    )  # fmt: skip
    stuck = (
        "import time; import moegen.job.worker as worker; from moegen.schedule.sequence import Finished\n"
        "_drive = worker._Watched.generate\n"
        "def generate(self, requests):\n"
        "    for event in _drive(self, requests):\n"
        "        yield event\n"
        "        while isinstance(event, Finished): time.sleep(0.1)\n"
        "worker._Watched.generate = generate"
    )
    with start(job, tmp_path, stuck) as process:
        wait_for(tmp_path, "*.arrow", process)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
        assert time.monotonic() - begun < 20
        assert process.stderr is not None
        assert "the same command goes on" in process.stderr.read()
    (lease,) = batch(tmp_path / "out").glob("lease-*")
    assert json.loads(lease.read_text())["released"]
    assert not list(tmp_path.rglob("attempts/*"))  # no row is suspected
    manifest = run_job(job)
    assert manifest.journal_rows == 1
    assert {row["attempts"] for row in read(tmp_path / "out")} == {1}


@pytest.mark.timeout(900)
def test_killed_doubled_paused_and_poisoned_jobs_end_with_the_right_table(tmp_path: Path) -> None:
    """benchmarks/torture.py at a size that fits here; its numbers are asserted, not only its verdict."""
    counts = {"kills": 2, "pairs": 1, "pauses": 1, "poison": 1, "rows": 300, "answer-tokens": 16}
    arguments = [f"--{name}={count}" for name, count in counts.items()]
    command = [sys.executable, "-m", "benchmarks.torture", *arguments, f"--out={tmp_path}/torture.json"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=os.environ, timeout=800)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "torture.json").read_text())
    assert [found[name]["kills"] for name in ("greedy", "sampled")] == [1, 1]
    assert all(found[name]["tables_equal"] for name in ("greedy", "sampled", "pairs", "pauses"))
    assert found["pairs"]["one_ran_and_one_left"] == 1
    assert found["pairs"]["who_left_said_why"]
    assert (found["pauses"]["noticed"], found["pauses"]["parts_untouched"]) == (1, True)
    poison = found["poison"]
    assert poison["endings"] in ([-9] * 3 + [0], [-9] * 4 + [0])  # the first crash may come before the row is named
    assert (poison["status"], poison["error"], poison["attempts"]) == ("quarantined", "engine_crash", 3)
    assert poison["others_equal"]
