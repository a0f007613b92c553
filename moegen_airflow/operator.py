"""A table of prompts in, a table of answers out, as one Airflow task."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator, conf

from moegen_airflow.exceptions import (
    MoegenError,
    MoegenInputError,
    MoegenJobCancelledError,
    MoegenJobNotFoundError,
    MoegenTimeoutError,
)
from moegen_airflow.hook import Job, MoegenHook
from moegen_airflow.link import JOB_URL, MoegenJobLink
from moegen_airflow.poll import Event, JobPoll, manifest_of
from moegen_airflow.specification import given, job_key, merge
from moegen_airflow.trigger import MoegenBatchTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context

# Airflow kills an overdue deferral without on_kill; the trigger's own deadline must come first.
DEFERRAL_PAD_S = 600
_PLAIN_FIELDS = {"task", "output_schema", "choices", "regex"}  # of the specification, beside its sections
_PROMPT_WAYS = {"column", "messages_column", "template", "token_ids_column"}


class MoegenBatchOperator(BaseOperator):
    """Runs a job at a moegen service and returns its manifest (row counts, statuses, parts, rates) as a dict.

    The job's key is made of Dag, task, run and specification, so a retry, a cleared task or a second worker
    attaches to the job that is there: running is waited for, succeeded is returned, failed or cancelled resumes.

    Prompt texts are never templated: tables and templates may hold `{{`.

    :param input_uri: (templated) the table: a file, folder, glob or a list of them.
    :param output_uri: (templated) the folder for the answers, the manifest and `_SUCCESS`.
    :param model_id: (templated) checkpoint folder; falls back to the connection's `default_model`.
    :param prompt_column: column of raw prompts; `"prompt"` when no other way to a prompt is given.
    :param messages_column: column of chat messages, instead.
    :param prompt_template: text with `{column}` places, instead.
    :param system_prompt: a system message for every row.
    :param id_column: column that identifies rows; it must exist.
    :param sampling_params: (templated) `max_tokens` is required; temperature, top_p, stop, seed, ... as in vLLM.
    :param job_params: (templated) any part of the job specification, merged over what the parameters above make,
        as in `{"prompt": {"chat": True}, "output": {"rows_per_part": 100_000}}` or `{"choices": ["yes", "no"]}`.
    :param moegen_conn_id: (templated) the service's connection.
    :param wait_for_completion: False returns the job's key at once, for `MoegenBatchSensor`.
    :param deferrable: wait in the triggerer instead of on a worker.
    :param poll_interval: seconds between two looks at the job, in both modes.
    :param timeout: seconds of wall clock from submission until the task fails and the job is cancelled.
    :param cancel_on_kill: cancel the job when the task is killed, cleared or marked by a user while it waits.
    """

    template_fields: Sequence[str] = (
        "input_uri",
        "output_uri",
        "model_id",
        "sampling_params",
        "job_params",
        "moegen_conn_id",
    )
    template_fields_renderers = {"sampling_params": "json", "job_params": "json"}  # noqa: RUF012
    operator_extra_links = (MoegenJobLink(),)

    def __init__(
        self,
        *,
        input_uri: str | Sequence[str],
        output_uri: str,
        sampling_params: Mapping[str, Any],
        model_id: str | None = None,
        prompt_column: str | None = None,
        messages_column: str | None = None,
        prompt_template: str | None = None,
        system_prompt: str | None = None,
        id_column: str | None = None,
        job_params: Mapping[str, Any] | None = None,
        moegen_conn_id: str = MoegenHook.default_conn_name,
        wait_for_completion: bool = True,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poll_interval: float = 30,
        timeout: float = 86_400,
        cancel_on_kill: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.input_uri = input_uri
        self.output_uri = output_uri
        self.sampling_params = sampling_params
        self.model_id = model_id
        self.prompt_column = prompt_column
        self.messages_column = messages_column
        self.prompt_template = prompt_template
        self.system_prompt = system_prompt
        self.id_column = id_column
        self.job_params = job_params
        self.moegen_conn_id = moegen_conn_id
        self.wait_for_completion = wait_for_completion
        self.deferrable = deferrable
        self.poll_interval = poll_interval
        self.timeout = timeout
        self.cancel_on_kill = cancel_on_kill
        self._key: str | None = None
        self._owner = 0
        self._killed = False

    @cached_property
    def hook(self) -> MoegenHook:
        return MoegenHook(self.moegen_conn_id)

    def execute(self, context: Context) -> Any:
        """The manifest; or the job's key when not waiting.

        Raises:
            MoegenInputError: the parameters make no valid job; nothing was queued, a retry cannot help.
            MoegenError: as `moegen_airflow.exceptions` says.
        """
        ti = context["ti"]
        spec = self.build_specification(name=f"{ti.dag_id}.{ti.task_id}")
        key = job_key(ti.dag_id, ti.task_id, ti.run_id, spec)
        job = self._submit(key, spec)
        ti.xcom_push(key=JOB_URL, value=self.hook.job_url(key))
        end_time = time.time() + self.timeout
        if not self.wait_for_completion:
            return key
        if self.deferrable and job["state"] != "succeeded":
            self._defer(key, end_time)
        return self.execute_complete(context, self._wait(key, end_time))

    def execute_complete(self, context: Context, event: Any) -> dict[str, Any]:
        """The end of the wait, in both modes: the manifest of a job that succeeded, an error for anything else."""
        try:
            manifest = manifest_of(event)
        except MoegenTimeoutError:
            self._cancel(event["key"], event.get("owner", 0))
            raise
        self.log.info("job %s succeeded: %s rows, %s", event["key"], manifest.get("rows"), manifest.get("statuses"))
        return manifest

    def on_kill(self) -> None:
        """Runs in a signal handler while `execute` goes on: cancels the job and lets the loop end."""
        self._killed = True
        if self.cancel_on_kill and self._key:
            self._cancel(self._key, self._owner)

    def build_specification(self, name: str) -> dict[str, Any]:
        """The job specification of docs, as the service takes it; raises `MoegenInputError`."""
        _require_mapping("sampling_params", self.sampling_params)
        _require_mapping("job_params", self.job_params or {})
        prompt = given(
            column=self.prompt_column,
            messages_column=self.messages_column,
            template=self.prompt_template,
            system=self.system_prompt,
        )
        parameters = {
            "job": {"name": name},
            "input": given(uri=_plain(self.input_uri), id_column=self.id_column),
            "prompt": prompt,
            "model": given(uri=self.model_id),
            "sampling": dict(self.sampling_params),
            "output": {"uri": self.output_uri},
        }
        return self._completed(merge(parameters, self.job_params or {}))

    def _completed(self, spec: dict[str, Any]) -> dict[str, Any]:
        """With the defaults that are the provider's own."""
        for section, value in spec.items():
            if section not in _PLAIN_FIELDS:
                _require_mapping(f"job_params: {section}", value)
        if "max_tokens" not in spec["sampling"]:
            raise MoegenInputError(
                f"sampling_params: {spec['sampling']!r} has no max_tokens; give the longest answer's number of tokens"
            )
        if not spec["prompt"].keys() & _PROMPT_WAYS:
            spec["prompt"]["column"] = "prompt"
        if not spec["model"].get("uri"):
            spec["model"]["uri"] = self._default_model()
        return spec

    def _default_model(self) -> str:
        if model := self.hook.endpoint.default_model:
            return model
        raise MoegenInputError(f"model_id: not given, and connection {self.moegen_conn_id} has no default_model")

    def _submit(self, key: str, spec: dict[str, Any]) -> Job:
        """PUTs the job as its newest owner, so that a cancel by an earlier attempt is ignored from here on."""
        found = self._find(key)
        self._key, self._owner = key, (found["owner"] + 1 if found else 1)
        job = self.hook.submit_job(key, spec, self._owner)
        if found is None:
            self.log.info("job %s: submitted", key)
        elif found["state"] == "succeeded":
            self.log.info("job %s: succeeded before; nothing to do", key)
        else:
            self.log.info("job %s: was %s, is %s; attached as owner %s", key, found["state"], job["state"], self._owner)
        return job

    def _find(self, key: str) -> Job | None:
        try:
            return self.hook.get_job(key)
        except MoegenJobNotFoundError:
            return None

    def _defer(self, key: str, end_time: float) -> None:
        trigger = MoegenBatchTrigger(
            moegen_conn_id=self.moegen_conn_id,
            key=key,
            end_time=end_time,
            poll_interval=self.poll_interval,
            owner=self._owner,
            cancel_on_kill=self.cancel_on_kill,
        )
        timeout = end_time - time.time() + DEFERRAL_PAD_S
        self.defer(trigger=trigger, method_name="execute_complete", timeout=timeout)

    def _wait(self, key: str, end_time: float) -> Event:
        poll = JobPoll(key, end_time)
        while (event := self._look(poll)) is None:
            self._sleep(poll.delay_s(self.poll_interval, time.time()))
        return {**event, "owner": self._owner}

    def _look(self, poll: JobPoll) -> Event | None:
        event, line = poll.step(self.hook.look(poll.key), time.time())
        if line:
            self.log.info("job %s: %s", poll.key, line)
        return event

    def _sleep(self, seconds: float) -> None:
        """In slices: a signal handler cannot end a long sleep."""
        end = time.monotonic() + seconds
        while not self._killed and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
        if self._killed:
            raise MoegenJobCancelledError(f"the task was killed while it waited for job {self._key}")

    def _cancel(self, key: str, owner: int) -> None:
        try:
            job = self.hook.cancel_job(key, owner)
        except MoegenError as error:
            self.log.warning("job %s: could not be cancelled: %s", key, error)
        else:
            self.log.info("job %s: cancel requested as owner %s; it is %s", key, owner, job["state"])


def _plain(uris: object) -> object:
    """XCom hands over lists of its own."""
    return list(uris) if isinstance(uris, Sequence) and not isinstance(uris, str) else uris


def _require_mapping(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise MoegenInputError(f"{name}: {value!r} is not a mapping; give a dict")
