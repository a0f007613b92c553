"""Waits for a job in the triggerer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from moegen_airflow.hook import MoegenHook
from moegen_airflow.poll import Event, JobPoll


class MoegenBatchTrigger(BaseTrigger):
    """Polls a job until it ends or `end_time` (seconds since the epoch) has passed; fires one `JobPoll` event.

    Killed by a user, it cancels the job if `cancel_on_kill`, as `owner`: when a newer attempt of the task has
    taken the job over meanwhile, the service ignores that. It never fetches answers.
    """

    def __init__(
        self,
        *,
        moegen_conn_id: str,
        key: str,
        end_time: float,
        poll_interval: float,
        owner: int = 0,
        cancel_on_kill: bool = False,
    ) -> None:
        super().__init__()
        self.moegen_conn_id = moegen_conn_id
        self.key = key
        self.end_time = end_time
        self.poll_interval = poll_interval
        self.owner = owner
        self.cancel_on_kill = cancel_on_kill
        self.hook = MoegenHook(moegen_conn_id)

    def serialize(self) -> tuple[str, dict[str, Any]]:
        names = ("moegen_conn_id", "key", "end_time", "poll_interval", "owner", "cancel_on_kill")
        return f"{type(self).__module__}.{type(self).__qualname__}", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        poll = JobPoll(self.key, self.end_time)
        while (event := await self._look(poll)) is None:
            await asyncio.sleep(poll.delay_s(self.poll_interval, time.time()))
        yield TriggerEvent({**event, "owner": self.owner})

    async def _look(self, poll: JobPoll) -> Event | None:
        event, line = poll.step(await self.hook.alook(poll.key), time.time())
        if line:
            self.log.info("job %s: %s", poll.key, line)
        return event

    async def on_kill(self) -> None:
        """Runs only when a user clears or marks the task, not when the triggerer restarts."""
        if self.cancel_on_kill:
            job = await self.hook.acancel_job(self.key, self.owner)
            self.log.info("job %s: cancel requested as owner %s; it is %s", self.key, self.owner, job["state"])
