"""common-ai's own operator over the real job service, where common-ai is installed."""

from __future__ import annotations

import asyncio
import json

import pytest
from airflow.sdk.exceptions import TaskDeferred
from pydantic import BaseModel

from tests.provider.fake_task import context

pytest.importorskip("airflow.providers.common.ai", reason="apache-airflow-providers-common-ai is not installed")

from airflow.providers.common.ai.batch.base import BatchRequest
from airflow.providers.common.ai.exceptions import LLMBatchInputError
from airflow.providers.common.ai.operators.llm_batch import LLMBatchOperator

from moegen_airflow.batch_adapter import MoegenBatchAdapter


class Topic(BaseModel):
    topic: bool


@pytest.fixture
def operator(real_service, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_LLM", json.dumps({"conn_type": "moegen", "host": real_service.url}))

    def maker(requests, **parameters) -> LLMBatchOperator:
        common = {"result_path": f"file://{tmp_path}/results", "llm_conn_id": "llm", "max_tokens": 6}
        model = {"model_id": f"moegen:{checkpoint}", "deferrable": True}
        return LLMBatchOperator(task_id="llm", requests=requests, **common | model | parameters)

    return maker


def finish(operator, ctx) -> dict:
    """As the scheduler and the triggerer would, but for the 30 s between two polls."""
    ctx["task_instance"] = ctx["ti"]
    try:
        return operator.execute(ctx)
    except TaskDeferred as deferred:
        trigger = deferred.trigger
        trigger.poll_interval = 0.3

    async def first_event():
        return await asyncio.wait_for(anext(trigger.run()), timeout=120)

    return operator.execute_complete(ctx, asyncio.run(first_event()).payload)


def rows_of(manifest) -> list[dict]:
    with open(manifest["result_uri"].removeprefix("file://")) as lines:  # noqa: PTH123
        return sorted(map(json.loads, lines), key=lambda row: row["index"])


def test_a_batch_its_retry_and_its_orphan_are_one_job(operator, real_service):
    requests: list = ["First", BatchRequest(prompt="Second", max_tokens=3, params={"ignore_eos": True}), "Third"]
    requests.append({"prompt": "Fourth", "params": {"no_such_parameter": 1}})
    known = len(real_service.jobs())
    manifest = finish(operator(requests, request_params={"temperature": 0.0}), context(run_id="one"))
    assert (manifest["adapter"], manifest["request_count"]) == ("moegen", 4)
    assert manifest["counts"]["errored"] == 1
    rows = rows_of(manifest)
    assert [row["status"] for row in rows] == ["success", "success", "success", "error"]
    assert rows[1]["usage"]["output_tokens"] == 3
    assert "no_such_parameter" in rows[3]["error"]["message"]

    again = finish(operator(requests, request_params={"temperature": 0.0}), context(run_id="one"))  # a cleared task
    assert again["batch_id"] == manifest["batch_id"]
    jobs = real_service.jobs()[known:]
    assert [(job["key"], job["attempts"]) for job in jobs] == [(manifest["batch_id"], 1)]

    _, idempotency_key, fingerprint = manifest["batch_id"].rsplit("-", 2)  # of which a crash may leave nothing else
    adapter = MoegenBatchAdapter(base_url=real_service.url)
    assert adapter.find_orphaned_batch(idempotency_key, fingerprint, "") == manifest["batch_id"]
    assert adapter.find_orphaned_batch(idempotency_key, fingerprint, "2100-01-01T00:00:00+00:00") is None
    assert adapter.find_orphaned_batch(idempotency_key, "0" * 16, "") is None
    adapter.close()


def test_structured_output(operator):
    manifest = finish(operator(["Is it?"], output_type=Topic, max_tokens=40), context(run_id="form"))
    (row,) = rows_of(manifest)
    assert row["output"] in ({"topic": True}, {"topic": False}) or row["finish_reason"] == "length"


def test_another_model_in_one_batch_is_refused(operator):
    with pytest.raises(LLMBatchInputError, match="one model"):
        finish(operator([{"prompt": "a", "model": "moegen:/another"}]), context(run_id="models"))
