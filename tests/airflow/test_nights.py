"""The nights of nights.py on a running Airflow: one job in each, and in the morning what the documentation says.

They mostly wait, so they happen at the same time, on three services; those that stop Airflow's triggerer or a service
come last. `MOEGEN_NIGHTS=full` takes the lengths of the real thing: 20 clears, two minutes without a service.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.airflow.guest import Guest
from tests.airflow.lane import Lane
from tests.airflow.nights import CLEARS, DOWN_S, NIGHTS, ROWS, Morning, Night

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        not os.environ.get("MOEGEN_NIGHTS"), reason="minutes long: MOEGEN_NIGHTS=short or =full runs it"
    ),
]

BY_NAME = {night.name: night for night in NIGHTS}
Invite = Callable[..., Guest]


@pytest.fixture(scope="module")
def lanes(tmp_path_factory) -> Iterator[dict[str, Lane]]:
    """Services: on `queue` all jobs wait for another, on `middle` they are caught half way, `frail` goes down."""
    folder = tmp_path_factory.mktemp("lanes")
    with ExitStack() as stack:
        yield {name: stack.enter_context(Lane(folder / name)) for name in ("queue", "middle", "frail")}


@pytest.fixture(scope="module")
def invite(airflow, lanes, stage) -> Invite:
    for lane in lanes.values():
        airflow.connect(lane.name, lane.witness.port)

    def invite(name: str, lane: str, **more: str) -> Guest:
        return Guest(BY_NAME[name], airflow, lanes[lane], stage, **more)

    return invite


@pytest.fixture(scope="module")
def guests(invite) -> dict[str, Guest]:
    """Every night that has a task of its own, at its end."""
    with ThreadPoolExecutor(16) as threads:
        first = [threads.submit(nights, invite) for nights in (queued, half_way)]
        guests = [guest for nights in first for guest in nights.result()]
        last = [threads.submit(nights, invite) for nights in (frail, triggerer)]
        guests += [guest for nights in last for guest in nights.result()]
    return {guest.night.name: guest for guest in guests}


# --- what happens ----------------------------------------------------------------------------------------------------


def queued(invite: Invite) -> list[Guest]:
    """Nights before the job has begun."""
    events = {
        "cleared_deferred": clear_often,
        "cleared_running": clear_once,
        "marked_waiting": Guest.mark_failed,
        "cancelled_waiting": cancel_at_the_service,
        "cancelled_deferred": cancel_at_the_service,
        "timeout_waiting": wait_for_the_cancel,
        "timeout_deferred": wait_for_the_cancel,
        "queue_timeout_waiting": wait_for_the_cancel,
        "queue_timeout_deferred": wait_for_the_cancel,
        "execution_timeout": wait_for_the_cancel,
    }
    guests = [invite(name, "queue") for name in events]
    with guests[0].lane.busy(), ThreadPoolExecutor(16) as threads:
        return list(threads.map(Guest.play, guests, events.values()))


def clear_often(guest: Guest) -> None:
    delays = random.Random(5)
    for number in range(1, CLEARS + 1):
        guest.wait_try(number)
        time.sleep(delays.uniform(0, 3))
        guest.clear()
    guest.wait_try(CLEARS + 1)


def clear_once(guest: Guest) -> None:
    guest.clear()
    guest.wait_try(2)


def cancel_at_the_service(guest: Guest) -> None:
    guest.lane.cancel(guest.key)
    guest.wait_owner(2)


def wait_for_the_cancel(guest: Guest) -> None:
    guest.wait_job("cancelled")


def half_way(invite: Invite) -> list[Guest]:
    """Nights with some rows saved and some left, one after the other; and jobs that fail."""
    guests = [
        invite("lost_worker", "middle").play(lose_the_worker),
        invite("redeploy", "middle").play(redeploy),
        invite("marked_deferred", "middle").play(mark_failed),
    ]
    half = guests[0].stage.model_without_tokenizer()
    failures = [invite(f"failure_{way}", "middle", model=half.name) for way in ("waiting", "deferred")]
    with ThreadPoolExecutor(16) as threads:
        guests += threads.map(lambda guest: guest.play(lambda guest: guest.wait_job("failed")), failures)
    shutil.copy(guests[0].stage.folder / "model" / "tokenizer.json", half)
    return guests


def lose_the_worker(guest: Guest) -> None:
    with guest.lane.held(guest.key):
        for process in guest.processes():
            process.kill()
        guest.wait_owner(2)


def redeploy(guest: Guest) -> None:
    with guest.lane.held(guest.key):
        guest.processes()[0].terminate()
        guest.wait_owner(2)


def mark_failed(guest: Guest) -> None:
    with guest.lane.held(guest.key):
        guest.wait_watched()
        guest.mark_failed()
        guest.wait_job("cancelled")


def frail(invite: Invite) -> list[Guest]:
    """Nights without a service: killed while a job runs and others queue, and back after a while."""
    names = [f"{event}_{way}" for event in ("down", "restarted") for way in ("waiting", "deferred")]
    with ThreadPoolExecutor(16) as threads:
        guests = list(threads.map(lambda name: invite(name, "frail").play(lambda _: None), names))
    lane = guests[0].lane
    lane.wait_saved()
    lane.kill()
    time.sleep(DOWN_S)
    lane.start()
    return guests


def triggerer(invite: Invite) -> list[Guest]:
    return [invite("triggerer", "middle").play(restart_the_triggerer)]


def restart_the_triggerer(guest: Guest) -> None:
    with guest.lane.held(guest.key):
        guest.wait_watched()
        guest.note_progress()
        guest.airflow.restart_triggerer()
    while guest.job["state"] == "running":
        guest.note_progress()
        time.sleep(0.2)


# --- what has come of it ---------------------------------------------------------------------------------------------


def expected(night: Night) -> Morning:
    """The night as it was played: with more clears than one."""
    if night.name == "cleared_deferred":
        return dataclasses.replace(night.morning, tries=CLEARS + 1, cancels=tuple(range(CLEARS + 1)))
    return night.morning


def found(guest: Guest, morning: Morning) -> None:
    outcome = guest.outcome
    assert outcome.cancels[0] in morning.cancels
    assert dataclasses.replace(outcome, cancels=morning.cancels) == morning
    assert guest.rows() == (list(range(ROWS)) if morning.job == "succeeded" else None)


@pytest.mark.parametrize("night", [night for night in NIGHTS if not night.after], ids=lambda night: night.name)
def test_a_night(guests, night):
    guest = guests[night.name]
    if guest.error:
        raise guest.error
    guest.end()
    witness = guest.lane.witness
    assert witness.submitted(guest.key) == 1
    assert all(cancel.owner == cancel.job_owner for cancel in witness.cancels(guest.key))  # by no predecessor
    found(guest, expected(night))


@pytest.mark.parametrize("night", [night for night in NIGHTS if night.after], ids=lambda night: night.name)
def test_a_night_after_the_end(guests, night):
    guest = guests[night.after]
    guest.end()
    attempts = guest.job["attempts"]
    guest.clear()
    guest.wait_owner(guest.job["owner"] + 1)
    guest.end()
    assert guest.lane.witness.submitted(guest.key) == 1
    assert guest.job["attempts"] == attempts
    found(guest, night.morning)


def test_what_was_saved_is_not_computed_again(guests):
    assert 0 < guests["redeploy"].job["manifest"]["resumed_rows"] < ROWS
    assert guests["lost_worker"].job["attempts"] == guests["triggerer"].job["attempts"] == 1


def test_a_deferred_task_tells_how_far_it_is(guests):
    guest = guests["triggerer"]
    rows = [progress["rows_done"] for progress in guest.seen]
    assert rows == sorted(rows)
    assert 0 < rows[0] < rows[-1] <= ROWS
    assert {progress["rows_total"] for progress in guest.seen} == {ROWS}
    line = r"\d+/24 rows \(\d+\.\d %\) · \d+\.\d rows/s · ETA \d\d:\d\d UTC"
    assert len(set(re.findall(line, guest.log()))) > 1


def test_nothing_is_left_behind(guests, lanes):
    keys = {guest.key for guest in guests.values()}
    for lane in lanes.values():
        jobs = {job["key"]: job["state"] for job in lane.jobs() if job["key"] != lane.BUSY}
        assert jobs.keys() <= keys
        assert not {"queued", "running"} & set(jobs.values())
        assert lane.runners() == []
