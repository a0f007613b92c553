"""Waits for a job in the triggerer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from airflow.sdk.execution_time.xcom import XCom
from airflow.triggers.base import BaseTrigger, TriggerEvent
from asgiref.sync import sync_to_async

from moegen_airflow.exceptions import MoegenError
from moegen_airflow.hook import MoegenHook
from moegen_airflow.news import PROGRESS, progress_value
from moegen_airflow.poll import TIMEOUTS, Event, JobPoll


class MoegenBatchTrigger(BaseTrigger):
    """Polls a job until it ends or a deadline has passed; fires one `JobPoll` event. It never fetches answers.

    Meanwhile it writes a line to the task's log, and the XCom `progress`, for every change.

    Killed by a user, it cancels the job if `cancel_on_kill`, at a deadline if `cancel_on_timeout`; as `owner`: when a
    newer attempt of the task has taken the job over meanwhile, the service ignores that.

    :param end_time: seconds since the epoch.
    :param queue_timeout: seconds that the job may stand in the queue.
    """

    def __init__(
        self,
        *,
        moegen_conn_id: str,
        key: str,
        end_time: float,
        poll_interval: float,
        queue_timeout: float | None = None,
        owner: int = 0,
        cancel_on_kill: bool = False,
        cancel_on_timeout: bool = False,
        stream_logs: str = "progress",
    ) -> None:
        super().__init__()
        self.moegen_conn_id = moegen_conn_id
        self.key = key
        self.end_time = end_time
        self.poll_interval = poll_interval
        self.queue_timeout = queue_timeout
        self.owner = owner
        self.cancel_on_kill = cancel_on_kill
        self.cancel_on_timeout = cancel_on_timeout
        self.stream_logs = stream_logs
        self.hook = MoegenHook(moegen_conn_id)
        self._log_offset = -1

    def serialize(self) -> tuple[str, dict[str, Any]]:
        names = (
            *("moegen_conn_id", "key", "end_time", "poll_interval", "queue_timeout", "owner"),
            *("cancel_on_kill", "cancel_on_timeout", "stream_logs"),
        )
        return f"{type(self).__module__}.{type(self).__qualname__}", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        poll = JobPoll(self.key, self.end_time, self.queue_timeout)
        while (event := await self._look(poll)) is None:
            await asyncio.sleep(poll.delay_s(self.poll_interval, time.time()))
        if event["status"] in TIMEOUTS and self.cancel_on_timeout:
            await self._cancel(event["message"])
        yield TriggerEvent({**event, "owner": self.owner})

    async def _look(self, poll: JobPoll) -> Event | None:
        answer, now = await self.hook.alook(poll.key), time.time()
        event, line = poll.step(answer, now)
        if self.stream_logs == "full":
            await self._copy_log()
        if line and self.stream_logs != "none":
            self.log.info("job %s: %s", poll.key, line)
        if line and not isinstance(answer, MoegenError):
            await self._push(progress_value(answer, now))
        return event

    async def _copy_log(self) -> None:
        try:
            text, self._log_offset = await self.hook.aget_new_log(self.key, self._log_offset)
        except MoegenError:
            return  # the look at the job tells of it
        for line in text.splitlines():
            self.log.info("runner: %s", line)

    async def _push(self, value: dict[str, Any]) -> None:
        """The XCom is for people: that it cannot be written is no reason to stop watching."""
        if (ti := self.task_instance) is None:
            return
        ids = {"dag_id": ti.dag_id, "task_id": ti.task_id, "run_id": ti.run_id, "map_index": ti.map_index}
        try:
            await sync_to_async(XCom.set)(key=PROGRESS, value=value, **ids)
        except Exception as error:
            self.log.warning("job %s: the XCom %s could not be written: %s", self.key, PROGRESS, error)

    async def _cancel(self, why: str) -> None:
        try:
            job = await self.hook.acancel_job(self.key, self.owner)
        except MoegenError as error:
            self.log.warning("job %s: could not be cancelled: %s", self.key, error)
        else:
            state = job["state"]
            self.log.info("job %s: cancel requested as owner %s (%s); it is %s", self.key, self.owner, why, state)

    async def on_kill(self) -> None:
        """Runs only when a user clears or marks the task, not when the triggerer restarts."""
        if self.cancel_on_kill:
            await self._cancel("the task was cleared or marked")
