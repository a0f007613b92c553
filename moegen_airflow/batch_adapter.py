"""`LLMBatchOperator(model_id="moegen:/models/…")`: a moegen service behind common-ai's batch operator.

The interface is common-ai 1.0.0's, which calls it experimental. Requests travel to the service as a table, so that no
storage has to be shared with it. A batch id is the job's key: it is made of the task's identity and the input, so that
submitting twice is submitting once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar

import httpx
from airflow.providers.common.ai.batch.base import (
    BatchAdapter,
    BatchRequest,
    BatchState,
    BatchStatus,
    ExtractedOutput,
    RawResultItem,
    SubmitResult,
)
from airflow.providers.common.ai.exceptions import LLMBatchLimitExceededError, LLMBatchModelMismatchError

from moegen_airflow.endpoint import Endpoint, service_url
from moegen_airflow.exceptions import MoegenJobNotFoundError, MoegenUnavailableError
from moegen_airflow.hook import Job, checked

if TYPE_CHECKING:
    from airflow.providers.common.ai.batch.output_schema import OutputSpec

_STATES: dict[str, BatchStatus] = {"succeeded": "completed", "failed": "failed", "cancelled": "cancelled"}
_CLOCK_SLACK_S = 60.0  # between the worker's clock and the service's


class MoegenBatchAdapter(BatchAdapter):
    """Batches at a moegen job service.

    The connection is of type `moegen` (or `pydanticai`): host = the whole URL, `http://moegen:8765`, since common-ai
    hands an adapter host and password alone; password = token. Rows that cannot run are results with an error; a
    request's `params` are the engine's sampling parameters.
    """

    name = "moegen"
    conn_types: ClassVar[frozenset[str]] = frozenset({"moegen", "pydanticai"})
    max_requests = 1_000_000
    max_payload_bytes = 512 * 1024 * 1024  # what the service takes as a table
    allows_per_request_model = False

    def __init__(self, *, api_key: str | None = None, base_url: str | None = None, client: Any | None = None) -> None:
        if client is None:
            client = httpx.Client(**Endpoint(service_url(base_url or "", "host"), api_key or None).client_options)
        super().__init__(client=client)

    def validate_requests(
        self,
        requests: list[BatchRequest],
        *,
        model: str,
        output_spec: OutputSpec,
        idempotency_key: str,
        **kwargs: Any,
    ) -> None:
        self.check_custom_id_length(idempotency_key, len(requests))
        if len(requests) > self.max_requests:
            raise LLMBatchLimitExceededError(
                f"moegen takes {self.max_requests} requests per batch; got {len(requests)}. Split the input with "
                ".expand(), or put it on storage as a table and use MoegenBatchOperator."
            )
        for index, request in enumerate(requests):
            if self.resolve_request_model(request.get("model"), default_bare_model=model, request_index=index) != model:
                raise LLMBatchModelMismatchError(f"Request {index} names another model; a moegen job has one model.")
        size = 0
        for line in _lines(requests, idempotency_key, **kwargs):
            size += len(line)
            if size > self.max_payload_bytes:
                raise LLMBatchLimitExceededError(
                    f"moegen takes requests of {self.max_payload_bytes} bytes per batch. Split the input with "
                    ".expand(), or put it on storage as a table and use MoegenBatchOperator."
                )

    def submit(
        self,
        requests: list[BatchRequest],
        *,
        model: str,
        idempotency_key: str,
        input_fingerprint: str,
        output_spec: OutputSpec,
        **kwargs: Any,
    ) -> SubmitResult:
        key = _key(idempotency_key, input_fingerprint)
        uris = self._call("PUT", f"/v1/tables/{key}", content=_lines(requests, idempotency_key, **kwargs)).json()
        spec = {
            "job": {"name": f"llm_batch {idempotency_key}"},
            "input": {"uri": uris["input_uri"], "columns": ["custom_id"]},
            "prompt": {"messages_column": "messages"},
            "model": {"uri": model},
            "sampling": {"max_tokens": kwargs.get("max_tokens", 1024), "params_column": "params"},
            "output": {"uri": uris["output_uri"]},
            "errors": {"max_error_rate": 1.0},  # which failed rows fail the task is the operator's to say
            **self.build_output_directive(output_spec),
        }
        found = self._find(key)
        owner = found["owner"] + 1 if found else 1
        self._call("PUT", f"/v1/jobs/{key}", params={"owner": owner}, json=spec)
        return SubmitResult(batch_id=key, provider_input_ref=uris["input_uri"])

    def get_batch(self, batch_id: str) -> BatchState:
        job = self._call("GET", f"/v1/jobs/{batch_id}").json()
        status = _STATES.get(job["state"], "in_progress")
        return BatchState(
            status=status, counts=_counts(job) if status == "completed" else None, error_message=job["error"]
        )

    def cancel_batch(self, batch_id: str) -> None:
        job = self._call("GET", f"/v1/jobs/{batch_id}").json()
        self._call("DELETE", f"/v1/jobs/{batch_id}", params={"owner": job["owner"]})

    def find_orphaned_batch(self, idempotency_key: str, input_fingerprint: str, not_before: str) -> str | None:
        """The job under the key that this input has; exact, as the key is made of both."""
        job = self._find(_key(idempotency_key, input_fingerprint))
        if job is None:
            return None
        since = datetime.fromisoformat(not_before).timestamp() if not_before else 0.0
        return str(job["key"]) if job["created_at"] >= since - _CLOCK_SLACK_S else None

    def iter_results(self, batch_id: str) -> Iterator[RawResultItem]:
        if self._call("GET", f"/v1/jobs/{batch_id}").json()["state"] != "succeeded":
            return iter(())  # a cancelled job's rows are kept for its next attempt
        return self._rows(batch_id)

    def _rows(self, batch_id: str) -> Iterator[RawResultItem]:
        try:
            with self._client.stream("GET", f"/v1/jobs/{batch_id}/rows") as response:
                if not response.is_success:
                    response.read()
                for line in checked(response).iter_lines():
                    yield _result(json.loads(line))
        except httpx.HTTPError as error:
            raise MoegenUnavailableError(f"the rows of job {batch_id} could not be read: {error}") from error

    def build_output_directive(self, spec: OutputSpec) -> dict[str, Any]:
        return {"output_schema": spec.json_schema} if spec.is_structured else {}

    def extract_output(self, raw: RawResultItem, spec: OutputSpec) -> ExtractedOutput:
        text = raw.raw["output"] if raw.raw["output"] is not None else raw.raw["output_raw"]
        if not spec.is_structured:
            return ExtractedOutput(kind="text", text=text)
        return ExtractedOutput(kind="absent") if text is None else ExtractedOutput(kind="json_text", text=text)

    def _find(self, key: str) -> Job | None:
        try:
            return dict(self._call("GET", f"/v1/jobs/{key}").json())
        except MoegenJobNotFoundError:
            return None

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return checked(self._client.request(method, path, **options))
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise MoegenUnavailableError(f"no answer from {self._client.base_url}: {why}") from error


def _key(idempotency_key: str, input_fingerprint: str) -> str:
    return f"llm-batch-{idempotency_key}-{input_fingerprint[:16]}"


def _lines(
    requests: list[BatchRequest],
    idempotency_key: str,
    *,
    system_prompt: str = "",
    max_tokens: int = 1024,
    request_params: dict[str, Any] | None = None,
    **_: Any,
) -> Iterator[bytes]:
    """The requests as a table: custom_id, chat messages, and the row's own sampling parameters as JSON text."""
    for index, request in enumerate(requests):
        messages = [{"role": "user", "content": request["prompt"]}]
        if system := request.get("system_prompt") or system_prompt:
            messages.insert(0, {"role": "system", "content": system})
        params = {**(request_params or {}), **(request.get("params") or {})}
        params["max_tokens"] = request.get("max_tokens") or max_tokens
        line = {
            "custom_id": f"{idempotency_key}-{index}",
            "messages": json.dumps(messages, ensure_ascii=False),
            "params": json.dumps(params),
        }
        yield json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _counts(job: Job) -> dict[str, int]:
    statuses = (job["progress"] or {}).get("statuses", {})
    succeeded = sum(count for status, count in statuses.items() if status in ("ok", "length", "invalid_output"))
    return {"succeeded": succeeded, "errored": sum(statuses.values()) - succeeded, "expired": 0, "cancelled": 0}


def _result(row: dict[str, Any]) -> RawResultItem:
    answered = row["output"] is not None or row["output_raw"] is not None
    error = row["error"] or {"code": row["status"], "message": f"the row has the status {row['status']}"}
    return RawResultItem(
        custom_id=row["custom_id"],
        index=int(row["custom_id"].rpartition("-")[2]),
        provider_status="success" if answered else "errored",
        model=None,
        usage={"input_tokens": row["prompt_tokens"] or 0, "output_tokens": row["completion_tokens"] or 0},
        finish_reason=row["finish_reason"],
        error=None
        if answered
        else {
            "type": "provider_error",
            "message": error["message"],
            "provider_code": error["code"],
            "stage": "provider",
        },
        raw=row,
    )
