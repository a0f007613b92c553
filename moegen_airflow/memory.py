"""What a task remembers of its job between attempts, in Airflow's task state store.

People can read it there, `timeout` is kept over retries by it, and a job over an older input is found by it. Which job
a task attaches to never depends on it: that is the key's doing.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.sdk import Context

STATE_KEY = "moegen_job"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remembered:
    """The job that an attempt has submitted or attached to."""

    key: str
    job_url: str
    output_uri: str
    owner: int  # as which that attempt could cancel it
    end_time: float  # Unix time in seconds
    round: int  # the same over retries, another after a clear


def round_of(ti: Any, retries: int | None) -> int:
    """Airflow raises `max_tries` with every clear of a task that is not running, and leaves it alone in retries."""
    most = getattr(ti, "max_tries", None)
    return 0 if most is None or retries is None else int(most) - retries


def recall(context: Context) -> Remembered | None:
    """What the latest attempt has remembered; None when there is nothing, or no store."""
    store: Any = context.get("task_state_store")
    if store is None:
        return None
    try:
        return Remembered(**(store.get(STATE_KEY) or {}))
    except TypeError:  # nothing, or another version's
        return None
    except Exception as error:
        log.warning("the task state store could not be read, and the task goes on without: %s", error)
        return None


def remember(context: Context, what: Remembered) -> None:
    """Kept until the task instance is deleted."""
    store: Any = context.get("task_state_store")
    if store is None:
        return
    from airflow.sdk.execution_time.context import NEVER_EXPIRE

    try:
        store.set(STATE_KEY, asdict(what), retention=NEVER_EXPIRE)
    except Exception as error:
        log.warning("the task state store could not be written, and the task goes on without: %s", error)
