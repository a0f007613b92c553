"""The contract of docs/http-api.md, against the real service."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from moegen.job.worker import run_job
from moegen.spec import JobSpec

from tests.service.conftest import Job, Service, wait_for

ROWS = 120  # of a slow job: some seconds, a part every few tenths

Start = Callable[..., Service]
JobOf = Callable[..., Job]


def rows_of(output: Path) -> list[Job]:
    assert (output / "_SUCCESS").exists()
    return [row for part in sorted(output.glob("part-*")) for row in pq.read_table(part).to_pylist()]


def running(job: Job) -> bool:
    return bool((job["progress"] or {}).get("rows_committed"))


def test_a_job_from_put_to_manifest(start: Start, job_of: JobOf, tmp_path: Path) -> None:
    service = start()
    first = service.put("nightly-1", job_of("out"))
    assert first.status_code == 201
    assert first.json()["state"] in ("queued", "running")
    assert service.put("nightly-1", job_of("out")).status_code == 200
    renamed = {**job_of("out"), "job": {"name": "another name", "key": "another key"}}
    assert service.put("nightly-1", renamed).status_code == 200
    assert service.put("nightly-1", job_of("elsewhere")).status_code == 409

    job = service.wait_end("nightly-1")
    assert (job["state"], job["exit_code"], job["error"], job["attempts"]) == ("succeeded", 0, None, 1)
    assert (job["key"], job["name"], job["queue_position"]) == ("nightly-1", "out", 0)
    assert job["created_at"] <= job["started_at"] <= job["ended_at"]
    assert job["output_uri"] == str(tmp_path / "out")
    assert (job["progress"]["rows_done"], job["progress"]["rows_total"]) == (20, 20)
    assert job["manifest"]["job_key"] == "nightly-1"
    assert job["manifest"]["rows"] == sum(job["progress"]["statuses"].values()) == len(rows_of(tmp_path / "out"))

    again = service.put("nightly-1", job_of("out"))
    assert (again.status_code, again.json()) == (200, job)
    assert service.client.delete("/v1/jobs/nightly-1").json() == job
    assert service.client.get("/v1/jobs").json() == {"jobs": [job]}
    assert service.client.get("/v1/jobs?state=failed").json() == {"jobs": []}

    log = service.client.get("/v1/jobs/nightly-1/logs")
    assert log.headers["content-type"].startswith("text/plain")
    assert log.text.startswith("--- attempt 1")
    assert "Question" not in log.text
    assert len(service.client.get("/v1/jobs/nightly-1/logs?tail=1").text.splitlines()) == 1
    metrics = service.client.get("/metrics").text
    assert 'moegen_jobs{state="succeeded"} 1.0' in metrics
    assert f'moegen_tokens_done{{kind="completion"}} {job["manifest"]["completion_tokens"]:.1f}' in metrics


def test_requests_that_are_refused(start: Start, job_of: JobOf) -> None:
    service = start()
    assert service.client.get("/v1/jobs/none").status_code == 404
    assert service.client.get("/v1/jobs/none/logs").status_code == 404
    assert service.client.delete("/v1/jobs/none").status_code == 404
    wrong = job_of("out", temprature=1)
    half = json.dumps({**job_of("out"), "job": {"name": "half a character: \ud83d"}})
    for response, says in (
        (service.put("job", wrong), "did you mean 'temperature'"),
        (service.put("-job", job_of("out")), "cannot name a job"),
        (service.put("job", {**job_of("out"), "input": {"uri": "s3://me:secret@bucket/in"}}), "holds credentials"),
        (service.put("job", {**job_of("out"), "regex": "[a"}), "regex: cannot be compiled"),
        (service.client.put("/v1/jobs/job", content=b"input: yaml"), "not JSON"),
        (service.client.put("/v1/jobs/job", content=b"[" * 100_000), "not JSON"),
        (service.client.put("/v1/jobs/job", content=half), "not JSON that UTF-8 can hold"),
        (service.client.put("/v1/jobs/job?owner=me", json=job_of("out")), "owner: 'me'"),
        (service.client.get("/v1/jobs?state=lost"), "state: 'lost'"),
    ):
        assert response.status_code == 422, response.text
        assert says in response.json()["detail"]
    large = service.client.put("/v1/jobs/job", content=b"x" * (5 << 20))
    assert large.status_code == 413
    assert service.client.get("/v1/jobs").json() == {"jobs": []}


def test_the_token(start: Start, job_of: JobOf, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    service = start("--host", "0.0.0.0", "--token-file", str(tmp_path / "token"))
    service.client.base_url = service.client.base_url.copy_with(host="127.0.0.1")
    assert service.client.get("/health").status_code == 200
    for method, path in (("GET", "/v1/jobs"), ("PUT", "/v1/jobs/a"), ("DELETE", "/v1/jobs/a"), ("GET", "/metrics")):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            response = service.client.request(method, path, headers=headers)
            assert response.status_code == 401, (method, path, headers)
            assert "Bearer" in response.json()["detail"]
    service.client.headers["Authorization"] = "Bearer s3cret"
    assert service.client.get("/v1/jobs").status_code == 200
    assert service.put("a", job_of("out")).status_code == 201


def test_no_token_no_other_machines(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moegen", "serve", "--host", "0.0.0.0", "--state-dir", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "MOEGEN_TOKEN"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert run.returncode == 64
    assert "--token-file" in run.stderr


def test_allowed_prefixes(start: Start, job_of: JobOf, tmp_path: Path, model: Path) -> None:
    (tmp_path / "allowed").mkdir()
    service = start(
        *("--allow-input", str(tmp_path), "--allow-output", f"{tmp_path}/allowed", "--allow-model", str(model))
    )
    refused = service.put("job", job_of("out"))
    assert refused.status_code == 422
    assert refused.json()["detail"].startswith("output.uri: ")
    climbing = job_of("allowed/../out")
    assert service.put("job", climbing).status_code == 422
    for name, uri in (("input", "/etc/passwd"), ("model", str(model.parent))):
        job = {**job_of("allowed/out"), name: {"uri": uri}}
        assert service.put("job", job).json()["detail"].startswith(f"{name}.uri: ")
    assert service.put("job", job_of("allowed/out")).status_code == 201


def test_order_cancelling_owners_and_a_lost_runner(start: Start, job_of: JobOf, tmp_path: Path) -> None:
    service = start()
    service.put("a", job_of("a", rows=ROWS, slow=True), owner=5)
    service.put("b", job_of("b"))
    service.put("c", job_of("c"))
    service.wait("a", running)
    assert service.client.get("/health").json() == {"status": "ok", "version": "0.1.0", "running": "a", "queued": 2}
    assert len(service.runners()) == 1
    assert [service.job(key)["queue_position"] for key in "abc"] == [0, 1, 2]
    assert 'moegen_jobs{state="queued"} 2.0' in service.client.get("/metrics").text

    assert service.client.delete("/v1/jobs/b").json()["state"] == "cancelled"
    assert service.job("c")["queue_position"] == 1
    assert service.client.delete("/v1/jobs/a?owner=4").json()["state"] == "running"
    assert service.client.delete("/v1/jobs/a?owner=5").json()["state"] == "cancelled"

    assert service.wait_end("c")["state"] == "succeeded"
    assert service.job("a")["state"] == service.job("b")["state"] == "cancelled"
    assert service.job("b")["attempts"] == 0
    committed = len(list((tmp_path / "a").glob("part-*"))) * 8
    assert 0 < committed < ROWS
    assert not (tmp_path / "a/_SUCCESS").exists()

    again = job_of("a", rows=ROWS, slow=True)
    assert service.put("a", again, owner=4).json()["state"] == "cancelled"
    assert service.put("a", again, owner=6).json()["state"] == "queued"
    assert service.put("b", job_of("b")).json()["queue_position"] in (1, 2)
    service.client.delete("/v1/jobs/b").raise_for_status()
    service.wait("a", lambda job: job["attempts"] == 2 and job["progress"]["rows_committed"] > committed)
    (runner,) = service.runners()
    os.kill(runner, signal.SIGKILL)
    assert service.client.get("/health").json()["status"] == "ok"
    job = service.wait_end("a")
    assert (job["state"], job["attempts"], job["owner"]) == ("succeeded", 3, 6)
    assert job["manifest"]["resumed_rows"] > committed
    assert len(rows_of(tmp_path / "a")) == ROWS


def test_a_job_that_fails_says_why_and_can_be_asked_for_again(start: Start, job_of: JobOf, tmp_path: Path) -> None:
    service = start()
    job = {**job_of("out"), "prompt": {"column": "promt"}}
    service.put("job", job)
    failed = service.wait_end("job")
    assert (failed["state"], failed["exit_code"], failed["attempts"]) == ("failed", 64, 1)
    assert "did you mean 'prompt'" in failed["error"]
    assert "did you mean 'prompt'" in service.client.get("/v1/jobs/job/logs").text
    assert service.put("job", job).status_code == 200
    again = service.wait("job", lambda job: job["attempts"] == 2 and job["state"] == "failed")
    assert again["exit_code"] == 64


def test_a_service_killed_during_a_job(start: Start, job_of: JobOf, tmp_path: Path) -> None:
    service = start()
    service.put("first", job_of("first", rows=ROWS, slow=True))
    service.put("second", job_of("second"))
    service.wait("first", running)
    service.end(signal.SIGKILL)
    assert not (tmp_path / "first/_SUCCESS").exists()

    service.start()
    first = service.wait_end("first")
    assert (first["state"], first["attempts"], first["manifest"]["rows"]) == ("succeeded", 2, ROWS)
    assert first["manifest"]["resumed_rows"] > 0
    second = service.wait_end("second")
    assert (second["state"], second["attempts"]) == ("succeeded", 1)
    assert second["started_at"] >= first["ended_at"]
    assert wait_for(lambda: not service.runners(), "the runners' end")
    assert service.client.get("/v1/jobs/first/logs?tail=10000").text.count("--- attempt") == 2

    undisturbed = {**job_of("undisturbed", rows=ROWS, slow=True), "engine": {}}  # and not slow
    run_job(JobSpec.from_mapping(undisturbed))
    assert rows_of(tmp_path / "first") == rows_of(tmp_path / "undisturbed")


def test_a_service_stopped_during_a_job_ends_its_runner_first(start: Start, job_of: JobOf) -> None:
    service = start()
    service.put("job", job_of("out", rows=ROWS, slow=True))
    committed = service.wait("job", running)["progress"]["rows_committed"]
    assert service.end(signal.SIGTERM) == 0
    assert service.runners() == []

    service.start()
    job = service.wait("job", lambda job: job["attempts"] == 2)
    assert (job["state"], job["exit_code"], job["error"]) == ("running", None, None)
    found = service.wait("job", lambda job: (job["progress"] or {}).get("rows_committed"))  # once it has looked
    assert found["progress"]["rows_committed"] >= committed


def test_a_second_service_on_the_same_folder_is_refused(start: Start, tmp_path: Path) -> None:
    start()
    command = [sys.executable, "-m", "moegen", "serve", "--port", "0", "--state-dir", str(tmp_path / "state")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 64
    assert "another service uses" in run.stderr


def test_an_address_in_use(start: Start, tmp_path: Path) -> None:
    port = str(start().client.base_url.port)
    command = [sys.executable, "-m", "moegen", "serve", "--port", port, "--state-dir", str(tmp_path / "other")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 70
    assert f"cannot listen on 127.0.0.1:{port}" in run.stderr


def test_the_service_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from moegen.job.runner import Supervisor\n"
        "from moegen.job.allowed import AllowedUris\n"
        "from moegen.job.store import JobStore\n"
        "from moegen.service import create_app\n"
        "with JobStore(Path(sys.argv[1])) as store, Supervisor(store) as supervisor:\n"
        "    print(create_app(store, supervisor, None, AllowedUris()).title)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout == "moegen\n"
