"""Waits for a job that another task, or another system, submitted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseSensorOperator, PokeReturnValue, conf
from airflow.sdk.exceptions import AirflowSensorTimeout

from moegen_airflow.exceptions import MoegenError, MoegenTimeoutError
from moegen_airflow.hook import MoegenHook
from moegen_airflow.link import JOB_URL, MoegenJobLink
from moegen_airflow.news import PROGRESS, progress_value
from moegen_airflow.operator import DEFERRAL_PAD_S
from moegen_airflow.poll import Event, JobPoll, manifest_of
from moegen_airflow.trigger import MoegenBatchTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context


class MoegenBatchSensor(BaseSensorOperator):
    """Succeeds, with the manifest as its value, when the job has succeeded; fails when the job failed or is unknown.

    `poke_interval`, `timeout` and `soft_fail` mean the same in poke, reschedule and deferrable mode. It only
    watches: killing it, or its timeout, leaves the job running. While it watches a job that the service has paused
    goes on, and one with a lease is not paused.

    :param job_key: (templated) what `MoegenBatchOperator(wait_for_completion=False)` returned.
    :param moegen_conn_id: (templated) the service's connection.
    :param deferrable: wait in the triggerer instead of on a worker.
    """

    template_fields: Sequence[str] = ("job_key", "moegen_conn_id")
    operator_extra_links = (MoegenJobLink(),)

    def __init__(
        self,
        *,
        job_key: str,
        moegen_conn_id: str = MoegenHook.default_conn_name,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.job_key = job_key
        self.moegen_conn_id = moegen_conn_id
        self.deferrable = deferrable

    @cached_property
    def hook(self) -> MoegenHook:
        return MoegenHook(self.moegen_conn_id)

    @cached_property
    def _poll(self) -> JobPoll:
        return JobPoll(self.job_key, end_time=float("inf"))  # the base class keeps the time

    def execute(self, context: Context) -> Any:
        context["ti"].xcom_push(key=JOB_URL, value=self.hook.job_url(self.job_key))
        if self.deferrable:
            self._defer()
        return super().execute(context)

    def poke(self, context: Context) -> PokeReturnValue:
        event = self._look(context)
        if event is None:
            return PokeReturnValue(is_done=False)
        return PokeReturnValue(is_done=True, xcom_value=manifest_of(event))

    def execute_complete(self, context: Context, event: Any) -> dict[str, Any]:
        """The manifest; an error for every event but success. `soft_fail` is the base class's to apply."""
        try:
            return manifest_of(event)
        except MoegenTimeoutError as error:
            raise AirflowSensorTimeout(str(error)) from error

    def _defer(self) -> None:
        trigger = MoegenBatchTrigger(
            moegen_conn_id=self.moegen_conn_id,
            key=self.job_key,
            end_time=time.time() + self.timeout,
            poll_interval=self.poke_interval,
        )
        self.defer(trigger=trigger, method_name="execute_complete", timeout=self.timeout + DEFERRAL_PAD_S)

    def _look(self, context: Context) -> Event | None:
        answer, now = self.hook.look(self.job_key), time.time()
        event, line = self._poll.step(answer, now)
        if line:
            self.log.info("job %s: %s", self.job_key, line)
        if line and not isinstance(answer, MoegenError):
            context["ti"].xcom_push(key=PROGRESS, value=progress_value(answer, now))
        return event
