"""The hook against the real `moegen serve`: what docs/http-api.md promises to one is what the other does."""

from __future__ import annotations

import asyncio

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
