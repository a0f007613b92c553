"""The hook against the real `moegen serve`: what docs/http-api.md promises to one is what the other does."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import httpx
import pytest

from moegen_airflow.exceptions import MoegenInputError, MoegenJobNotFoundError
from moegen_airflow.hook import MoegenHook
from tests.provider.real_service import RealService, wait_until


@pytest.fixture
def hook(real_service, monkeypatch) -> MoegenHook:
    monkeypatch.setenv("AIRFLOW_CONN_MOEGEN_DEFAULT", real_service.connection_uri)
    return MoegenHook()


@pytest.fixture
def spec(checkpoint, tmp_path) -> dict:
    table = tmp_path / "table.csv"
    table.write_text("text\n" + "\n".join(f"row {i}" for i in range(5_000)))
    return {
        "input": {"uri": str(table)},
        "prompt": {"column": "text"},
        "model": {"uri": str(checkpoint)},
        "sampling": {"max_tokens": 300, "ignore_eos": True},
        "output": {"uri": str(tmp_path / "out")},
    }


def test_the_life_of_a_job(hook, spec):
    job = hook.submit_job("life", spec, owner=1)
    assert (job["key"], job["owner"], job["state"] in ("queued", "running")) == ("life", 1, True)
    assert hook.submit_job("life", spec, owner=2)["owner"] == 2
    assert asyncio.run(hook.asubmit_job("life", spec, owner=2))["owner"] == 2
    with pytest.raises(MoegenInputError, match="HTTP 409"):
        hook.submit_job("life", spec | {"sampling": {"max_tokens": 301}}, owner=3)
    assert "life" in [job["key"] for job in hook.list_jobs()]
    assert "life" not in [job["key"] for job in hook.list_jobs(state="succeeded")]

    assert hook.cancel_job("life", owner=1)["state"] in ("queued", "running")  # an older owner is ignored
    hook.cancel_job("life", owner=2)
    wait_until(lambda: hook.get_job("life")["state"] == "cancelled", "the job is cancelled", 60)
    assert isinstance(hook.get_logs("life", tail=5), str)
    page = httpx.get(hook.job_url("life")).raise_for_status()  # where the link on a task leads
    assert page.headers["content-type"].startswith("text/html")
    assert "cancelled: life" in page.text

    assert hook.submit_job("life", spec, owner=3)["state"] in ("queued", "running")  # it resumes
    hook.cancel_job("life", owner=3)
    wait_until(lambda: asyncio.run(hook.aget_job("life"))["state"] == "cancelled", "cancelled again", 60)


def test_a_preflight_names_the_content_of_the_input(hook, spec):
    first = hook.preflight(spec)
    assert (first["files"], first["output"], len(first["fingerprint"])) == (1, "free", 64)
    same = spec | {"job": {"name": "other"}, "errors": {"max_error_rate": 0.5}, "engine": {"host_memory": "1GiB"}}
    assert hook.preflight(same)["fingerprint"] == asyncio.run(hook.apreflight(spec))["fingerprint"]
    assert hook.preflight(same)["fingerprint"] == first["fingerprint"]
    assert hook.preflight(spec | {"sampling": {"max_tokens": 9}})["fingerprint"] != first["fingerprint"]
    with Path(spec["input"]["uri"]).open("a") as table:
        table.write("\none row more")
    assert hook.preflight(spec)["fingerprint"] != first["fingerprint"]


def test_a_preflight_finds_out_before_a_device_does(hook, spec, tmp_path):
    (tmp_path / "empty.csv").write_text("text\n")
    for wrong, says in (
        ({"input": {"uri": str(tmp_path / "gone.parquet")}}, "gone.parquet: not found"),
        ({"input": {"uri": str(tmp_path / "empty.csv")}}, "no row in"),
        ({"prompt": {"column": "txet"}}, "did you mean 'text'"),
        ({"model": {"uri": str(tmp_path)}}, "no config.json"),
        ({"input": {"url": "x"}}, "did you mean 'uri'"),
    ):
        with pytest.raises(MoegenInputError, match=f"HTTP 422: .*{re.escape(says)}"):
            hook.preflight(spec | wrong)


def test_a_table_sent_to_the_service_and_its_rows(hook, spec, real_service):
    with httpx.Client(base_url=real_service.url) as client:
        lines = b"".join(b'{"id": %d, "text": "row %d"}\n' % (i, i) for i in range(3))
        sent = client.put("/v1/tables/sent", content=lines)
        assert sent.status_code == 201
        assert client.put("/v1/tables/sent", content=lines).status_code == 200
        assert client.put("/v1/tables/sent", content=lines + b"{}").status_code == 409
        assert client.put("/v1/tables/-", content=lines).status_code == 422
        uris = sent.json()
        small = spec | {"input": {"uri": uris["input_uri"]}, "output": {"uri": uris["output_uri"]}}
        small["sampling"] = {"max_tokens": 2}
        assert hook.preflight(small)["output"] == "free"
        hook.submit_job("sent", small)
        assert client.get("/v1/jobs/sent/rows").status_code == 409
        wait_until(lambda: hook.get_job("sent")["state"] == "succeeded", "the job succeeds", 120)
        rows = [json.loads(line) for line in client.get("/v1/jobs/sent/rows").iter_lines()]
        assert [(row["id"], row["row_index"]) for row in rows] == [(0, 0), (1, 1), (2, 2)]
        assert hook.preflight(small)["output"] == "ours"
        other = hook.preflight(small | {"sampling": {"max_tokens": 3}})
        assert (other["output"], "belongs to other work" in other["output_detail"]) == ("other", True)
        cleared = small | {"sampling": {"max_tokens": 3}, "output": small["output"] | {"mode": "new_run"}}
        assert hook.preflight(cleared)["output"] == "free"

        log, end = hook.get_new_log("sent", 0)
        assert (log.startswith("--- attempt 1"), end) == (True, len(log.encode()))
        assert hook.get_new_log("sent", end) == hook.get_new_log("sent") == ("", end)
        assert asyncio.run(hook.aget_new_log("sent", end - 1))[0] in log


def test_a_job_that_nobody_asks_about_is_paused_until_somebody_does(hook, spec, real_service):
    def state() -> str:  # the list is no sign of life
        return next(job["state"] for job in real_service.jobs() if job["key"] == "leased")

    hook.submit_job("leased", spec | {"job": {"lease_hours": 2 / 3600}}, owner=1)
    wait_until(lambda: state() == "paused", "the job is paused", 60)
    assert hook.get_job("leased")["state"] in ("queued", "running")
    wait_until(lambda: state() == "paused", "the job is paused again", 60)
    hook.submit_job("leased", spec, owner=2)  # without a lease
    assert state() in ("queued", "running")
    assert hook.cancel_job("leased", owner=2)["state"] == "cancelled"


def test_refusals_say_why(hook, spec):
    with pytest.raises(MoegenInputError, match=r"HTTP 422: .*sampling\.max_tokens"):
        hook.submit_job("bad", spec | {"sampling": {}})
    with pytest.raises(MoegenInputError, match=r"HTTP 422: .*columm"):
        hook.submit_job("bad", spec | {"prompt": {"columm": "text"}})
    with pytest.raises(MoegenJobNotFoundError, match="bad"):
        hook.get_job("bad")


def test_the_token(tmp_path, monkeypatch):
    with RealService(tmp_path, token="right") as service:
        for token, works in (("right", True), ("wrong", False), ("", False)):
            uri = service.connection_uri.replace("://", f"://:{token}@")
            monkeypatch.setenv("AIRFLOW_CONN_MOEGEN_DEFAULT", uri)
            ok, message = MoegenHook().test_connection()
            assert ok is works, message
            assert httpx.get(f"{service.url}/health").is_success
            in_a_browser = httpx.get(MoegenHook().job_url("none"), auth=("anybody", token))
            assert in_a_browser.status_code == (404 if works else 401)
