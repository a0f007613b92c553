"""A table of prompts in, a table of answers out, as one Airflow task."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from airflow.sdk import BaseOperator, conf

from moegen_airflow.exceptions import (
    MoegenError,
    MoegenInputError,
    MoegenJobCancelledError,
    MoegenJobNotFoundError,
    MoegenStaleInputError,
)
from moegen_airflow.hook import Job, MoegenHook
from moegen_airflow.lineage import facets_on_complete
from moegen_airflow.link import JOB_URL, MoegenJobLink
from moegen_airflow.memory import Remembered, recall, remember, round_of
from moegen_airflow.news import PROGRESS, STREAM_LOGS, progress_value
from moegen_airflow.outlets import describe, event_extra
from moegen_airflow.poll import TIMEOUTS, Event, JobPoll, manifest_of
from moegen_airflow.specification import (
    completed,
    given,
    job_key,
    merge,
    plain_schema,
    plain_uris,
    require_mapping,
    row_rules,
    truth,
)
from moegen_airflow.trigger import MoegenBatchTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context

# Airflow kills an overdue deferral without on_kill; the trigger's own deadline must come first.
DEFERRAL_PAD_S = 600
_STALE = ("cancel_and_resubmit", "fail")
_ENDED = ("succeeded", "failed", "cancelled")


class MoegenBatchOperator(BaseOperator):
    """Runs a job at a moegen service and returns its manifest (row counts, statuses, parts, rates) as a dict.

    The job's key is made of Dag, task, run, specification and the content of the input, so a retry, a cleared task or
    a second worker attaches to the job that is there: running is waited for, succeeded is returned, failed or cancelled
    resumes.

    Prompt texts are never templated: tables and templates may hold `{{`.

    :param input_uri: (templated) the table: a file, folder, glob or a list of them.
    :param output_uri: (templated) the folder for the answers, the manifest and `_SUCCESS`.
    :param sampling_params: (templated) `max_tokens` is required; temperature, top_p, stop, seed, ... as in vLLM.
    :param model_id: (templated) checkpoint folder; falls back to the connection's `default_model`.
    :param prompt_column: column of raw prompts; `"prompt"` when no other way to a prompt is given.
    :param messages_column: column of chat messages, instead.
    :param prompt_template: text with `{column}` places, instead.
    :param system_prompt: a system message for every row.
    :param id_column: column that identifies rows; it must exist.
    :param output_schema: a JSON Schema, or a Pydantic model, that every answer must be of.
    :param choices: texts of which every answer must be one.
    :param max_failed_rows: how many rows may fail: a whole number of rows, or a fraction of them below or equal to 1.0.
    :param job_params: (templated) any part of the job specification, merged over what the parameters above make,
        as in `{"prompt": {"chat": True}, "output": {"rows_per_part": 100_000}}`.
    :param moegen_conn_id: (templated) the service's connection.
    :param wait_for_completion: False returns the job's key at once, for `MoegenBatchSensor`.
    :param deferrable: wait in the triggerer instead of on a worker.
    :param poll_interval: seconds between two looks at the job, in both modes.
    :param stream_logs: what the task's log shows of the job: `progress` a line per change, `none`, or `full`: the
        runner's own log as well.
    :param timeout: seconds of wall clock from submission, kept over retries, until the task fails.
    :param queue_timeout: seconds that the job may wait for the device until the task fails; a retry queues it again.
    :param cancel_on_timeout: cancel the job when one of the two has passed.
    :param cancel_on_kill: cancel the job when the task is killed, cleared or marked by a user while it waits.
    :param lease_hours: the service pauses the job when no task has looked at it for so long; None: never.
    :param durable: remember the job in Airflow's task state store, for `timeout` and `on_stale_input`.
    :param force_rerun: (templated) run again what has succeeded before; retries still attach.
    :param on_stale_input: what becomes of this task's earlier job when the input or a parameter has changed since:
        `cancel_and_resubmit` replaces it and its output, `fail` fails the task.
    """

    template_fields: Sequence[str] = (
        "input_uri",
        "output_uri",
        "model_id",
        "sampling_params",
        "job_params",
        "moegen_conn_id",
        "force_rerun",
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
        output_schema: Any = None,
        choices: Sequence[str] | None = None,
        max_failed_rows: float | None = None,
        job_params: Mapping[str, Any] | None = None,
        moegen_conn_id: str = MoegenHook.default_conn_name,
        wait_for_completion: bool = True,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poll_interval: float = 30,
        stream_logs: Literal["progress", "none", "full"] = "progress",
        timeout: float = 86_400,
        queue_timeout: float | None = None,
        cancel_on_timeout: bool = True,
        cancel_on_kill: bool = True,
        lease_hours: float | None = 6,
        durable: bool = True,
        force_rerun: bool | str = False,
        on_stale_input: Literal["cancel_and_resubmit", "fail"] = "cancel_and_resubmit",
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
        self.output_schema = output_schema
        self.choices = choices
        self.max_failed_rows = max_failed_rows
        self.job_params = job_params
        self.moegen_conn_id = moegen_conn_id
        self.wait_for_completion = wait_for_completion
        self.deferrable = deferrable
        self.poll_interval = poll_interval
        self.stream_logs = stream_logs
        self.timeout = timeout
        self.queue_timeout = queue_timeout
        self.cancel_on_timeout = cancel_on_timeout
        self.cancel_on_kill = cancel_on_kill
        self.lease_hours = lease_hours
        self.durable = durable
        self.force_rerun = force_rerun
        self.on_stale_input = on_stale_input
        self._key: str | None = None
        self._owner = 0
        self._killed = False
        self._ti: Any = None
        self._log_offset = -1
        self._manifest: dict[str, Any] | None = None

    @cached_property
    def hook(self) -> MoegenHook:
        return MoegenHook(self.moegen_conn_id)

    def execute(self, context: Context) -> Any:
        """The manifest; or the job's key when not waiting.

        Raises:
            MoegenInputError: the parameters make no valid job, or input, model or output are not as they must be;
                nothing was queued, a retry cannot help.
            MoegenError: as `moegen_airflow.exceptions` says.
        """
        ti = self._ti = context["ti"]
        spec = self.build_specification(name=f"{ti.dag_id}.{ti.task_id}")
        known = recall(context) if self.durable else None
        round_ = round_of(ti, self.retries)
        key, found = self._settle(spec, known, round_, held=known is not None and self._hold(known, spec))
        job = self._submit(key, spec, found)
        job_url = self.hook.job_url(key)
        ti.xcom_push(key=JOB_URL, value=job_url)
        end_time = self._end_time(key, known, round_, found)
        if self.durable:
            remember(context, Remembered(key, job_url, self._output_uri(), self._owner, end_time, round_))
        if not self.wait_for_completion:
            return key
        if self.deferrable and job["state"] != "succeeded":
            self._defer(key, end_time)
        return self.execute_complete(context, self._wait(key, end_time))

    def execute_complete(self, context: Context, event: Any) -> dict[str, Any]:
        """The end of the wait, in both modes: the manifest of a job that succeeded, an error for anything else."""
        manifest = self._manifest = manifest_of(event)
        self._key = event["key"]
        describe(context, self.outlets, event_extra(manifest, self._model_uri(), self._output_uri()))
        self.log.info("job %s succeeded: %s rows, %s", event["key"], manifest.get("rows"), manifest.get("statuses"))
        return manifest

    def on_kill(self) -> None:
        """Runs in a signal handler while `execute` goes on: cancels the job and lets the loop end."""
        self._killed = True
        if self.cancel_on_kill and self._key:
            self._cancel(self._key, self._owner)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """Called by OpenLineage's listener, where there is one, after the task has succeeded."""
        return facets_on_complete(self._manifest, self._output_uri())

    # --- the request ------------------------------------------------------------------------------------------------

    def build_specification(self, name: str) -> dict[str, Any]:
        """The job specification of docs, as the service takes it; raises `MoegenInputError`."""
        require_mapping("sampling_params", self.sampling_params)
        require_mapping("job_params", self.job_params or {})
        prompt = given(
            column=self.prompt_column,
            messages_column=self.messages_column,
            template=self.prompt_template,
            system=self.system_prompt,
        )
        lease_hours = self.lease_hours if self.wait_for_completion else None  # nobody is to look at it then
        parameters = {
            "job": given(name=name, lease_hours=lease_hours),
            "input": given(uri=plain_uris(self.input_uri), id_column=self.id_column),
            "prompt": prompt,
            "model": {"uri": self._model_uri()},
            "sampling": dict(self.sampling_params),
            "output": {"uri": self.output_uri},
            "errors": row_rules(self.max_failed_rows),
            **given(output_schema=plain_schema(self.output_schema), choices=plain_uris(self.choices)),
        }
        return completed(merge(parameters, self.job_params or {}))

    def _model_uri(self) -> str:
        named = _section(self.job_params, "model").get("uri") or self.model_id or self.hook.endpoint.default_model
        if not named:
            raise MoegenInputError(f"model_id: not given, and connection {self.moegen_conn_id} has no default_model")
        return str(named)

    def _output_uri(self) -> str:
        return str(_section(self.job_params, "output").get("uri") or self.output_uri)

    # --- which job --------------------------------------------------------------------------------------------------

    def _hold(self, known: Remembered, spec: dict[str, Any]) -> bool:
        """Takes over this task's active job before anything that takes time: an earlier attempt's cancel may be on its
        way, and must find a newer owner. False when there is none, when another task has taken it over (shards in
        another order), or when other parameters have made it other work."""
        found = self._find(known.key)
        if found is None or found["state"] in _ENDED or found["owner"] != known.owner:
            return False
        try:
            self.hook.submit_job(known.key, spec, found["owner"] + 1)
        except MoegenInputError:
            return False
        self._key, self._owner = known.key, found["owner"] + 1
        return True

    def _settle(
        self, spec: dict[str, Any], known: Remembered | None, round_: int, held: bool
    ) -> tuple[str, Job | None]:
        """The key of the work, and its job if there is one; what stands in the way of a new one is dealt with."""
        if self.on_stale_input not in _STALE:
            raise MoegenInputError(f"on_stale_input: {self.on_stale_input!r} is unknown; choose from {_STALE}")
        if self.stream_logs not in STREAM_LOGS:
            raise MoegenInputError(f"stream_logs: {self.stream_logs!r} is unknown; choose from {STREAM_LOGS}")
        force = truth("force_rerun", self.force_rerun)
        try:
            checked = self.hook.preflight(spec)
        except MoegenInputError as error:
            if known is not None and held:  # this task will not come back to watch it
                self._cancel(known.key, self._owner, str(error))
            raise
        ti = self._ti
        key = job_key(ti.dag_id, ti.task_id, ti.run_id, checked["fingerprint"], round_ if force else None)
        found = self._find(key)
        if found is not None:
            return key, found
        stale = known if known is not None and known.key != key else None
        if stale is not None:
            self._supersede(stale, force)
        own_folder = stale is not None and stale.output_uri == self._output_uri()  # another's is never cleared
        if force or (own_folder and checked["output"] == "other"):
            spec["output"]["mode"] = "new_run"
        elif checked["output"] == "other":
            raise MoegenInputError(f"{checked['output_detail']}; nothing was queued")
        return key, None

    def _supersede(self, known: Remembered, force: bool) -> None:
        if self.on_stale_input == "fail" and not force:
            raise MoegenStaleInputError(
                f"job {known.key} of this task is over another input or other parameters; set force_rerun, or "
                "on_stale_input='cancel_and_resubmit', to replace it and its output"
            )
        # As the owner that this task was, or is: whoever else has attached since keeps the job.
        owner = self._owner if self._key == known.key else known.owner
        self._cancel(known.key, owner, "its input or its parameters have changed")

    def _submit(self, key: str, spec: dict[str, Any], found: Job | None) -> Job:
        """PUTs the job as its newest owner, so that a cancel by an earlier attempt is ignored from here on."""
        if found is not None and key == self._key and found["owner"] == self._owner:
            self.log.info("job %s: is %s; attached as owner %s", key, found["state"], self._owner)
            return found  # held already
        self._key, self._owner = key, (found["owner"] + 1 if found else 1)
        job = self.hook.submit_job(key, spec, self._owner)
        if found is None:
            self.log.info("job %s: submitted", key)
        elif found["state"] == "succeeded":
            self.log.info("job %s: succeeded before; nothing to do (force_rerun=True runs it again)", key)
        else:
            self.log.info("job %s: was %s, is %s; attached as owner %s", key, found["state"], job["state"], self._owner)
        return job

    def _find(self, key: str) -> Job | None:
        try:
            return self.hook.get_job(key)
        except MoegenJobNotFoundError:
            return None

    def _end_time(self, key: str, known: Remembered | None, round_: int, found: Job | None) -> float:
        """Kept over retries: as remembered, or else from when the job that is attached to was queued."""
        now = time.time()
        if known is not None and known.key == key:
            return known.end_time if known.round == round_ else now + self.timeout
        attached = found is not None and found["state"] not in _ENDED
        since = min(now, found.get("queued_at") or now) if found is not None and attached else now
        return float(since + self.timeout)

    # --- the wait ---------------------------------------------------------------------------------------------------

    def _defer(self, key: str, end_time: float) -> None:
        trigger = MoegenBatchTrigger(
            moegen_conn_id=self.moegen_conn_id,
            key=key,
            end_time=end_time,
            poll_interval=self.poll_interval,
            queue_timeout=self.queue_timeout,
            owner=self._owner,
            cancel_on_kill=self.cancel_on_kill,
            cancel_on_timeout=self.cancel_on_timeout,
            stream_logs=self.stream_logs,
        )
        timeout = max(0.0, end_time - time.time()) + DEFERRAL_PAD_S
        self.defer(trigger=trigger, method_name="execute_complete", timeout=timeout)

    def _wait(self, key: str, end_time: float) -> Event:
        poll = JobPoll(key, end_time, self.queue_timeout)
        while (event := self._look(poll)) is None:
            self._sleep(poll.delay_s(self.poll_interval, time.time()))
        if event["status"] in TIMEOUTS and self.cancel_on_timeout:
            self._cancel(key, self._owner, event["message"])
        return {**event, "owner": self._owner}

    def _look(self, poll: JobPoll) -> Event | None:
        answer, now = self.hook.look(poll.key), time.time()
        event, line = poll.step(answer, now)
        if self.stream_logs == "full":
            self._copy_log(poll.key)
        if line and self.stream_logs != "none":
            self.log.info("job %s: %s", poll.key, line)
        if line and self._ti is not None and not isinstance(answer, MoegenError):
            self._ti.xcom_push(key=PROGRESS, value=progress_value(answer, now))
        return event

    def _copy_log(self, key: str) -> None:
        try:
            text, self._log_offset = self.hook.get_new_log(key, self._log_offset)
        except MoegenError:
            return  # the look at the job tells of it
        for line in text.splitlines():
            self.log.info("runner: %s", line)

    def _sleep(self, seconds: float) -> None:
        """In slices: a signal handler cannot end a long sleep."""
        end = time.monotonic() + seconds
        while not self._killed and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
        if self._killed:
            raise MoegenJobCancelledError(f"the task was killed while it waited for job {self._key}")

    def _cancel(self, key: str, owner: int, why: str = "the task was killed") -> None:
        try:
            job = self.hook.cancel_job(key, owner)
        except MoegenJobNotFoundError:
            return
        except MoegenError as error:
            self.log.warning("job %s: could not be cancelled: %s", key, error)
        else:
            self.log.info("job %s: cancel requested as owner %s (%s); it is %s", key, owner, why, job["state"])


def _section(params: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    section = (params or {}).get(name)
    return section if isinstance(section, Mapping) else {}
