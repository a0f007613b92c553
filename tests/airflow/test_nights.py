"""The nights of nights.py on a running Airflow: one job in each, and in the morning what the documentation says.

They mostly wait, so they happen at the same time, on three services; the triggerer is restarted when all the others
have had their event. `MOEGEN_NIGHTS=full` takes all of them, in real lengths: 20 clears, two minutes without a service.
"""

from __future__ import annotations

import dataclasses
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial

import pytest

from tests.airflow.guest import Guest
from tests.airflow.lane import Lane
from tests.airflow.nights import CLEARS, DOWN_S, PLAYED, ROWS, Morning, Night

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(1500)]

BY_NAME = {night.name: night for night in PLAYED}
Invite = Callable[..., Guest]
Events = dict[str, Callable[[Guest], object]]


@pytest.fixture(scope="module")
def lanes(tmp_path_factory) -> Iterator[dict[str, Lane]]:
    """Services: on `queue` all jobs wait for another, on `middle` they are caught half way, `frail` goes down,
    `calm` is for the others."""
    folder = tmp_path_factory.mktemp("lanes")
    with ExitStack() as stack:
        yield {name: stack.enter_context(Lane(folder / name)) for name in ("queue", "middle", "frail", "calm")}


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
    with ThreadPoolExecutor() as threads:
        groups = [threads.submit(nights, invite) for nights in (queued, half_way, frail)]
        guests = failing(invite)
        guests.append(invite("triggerer", "calm").play(partial(restart_the_triggerer, others=groups)))
        return {guest.night.name: guest for guest in guests + [guest for group in groups for guest in group.result()]}


# --- what happens ----------------------------------------------------------------------------------------------------


def queued(invite: Invite) -> list[Guest]:
    """Nights before the job has begun."""
    events: Events = {
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
    guests = [invite(name, "queue") for name in events if name in BY_NAME]
    with guests[0].lane.busy(), ThreadPoolExecutor(16) as threads:
        return list(threads.map(lambda guest: guest.play(events[guest.night.name]), guests))


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
    """Nights with some rows saved and some left, one after the other."""
    events: Events = {"lost_worker": lose_the_worker, "redeploy": redeploy, "marked_deferred": mark_failed}
    return [invite(name, "middle").play(event) for name, event in events.items() if name in BY_NAME]


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


def failing(invite: Invite) -> list[Guest]:
    """Nights with a job that fails for a reason that passes."""
    names = [name for name in ("failure_waiting", "failure_deferred") if name in BY_NAME]
    guests = [invite(name, "calm", model=name) for name in names]
    with ThreadPoolExecutor() as threads:
        return list(threads.map(lambda guest: guest.play(fail_once), guests))


def fail_once(guest: Guest) -> None:
    """Its checkpoint is complete only after the job has failed."""
    guest.wait_job("failed")
    shutil.copy(guest.stage.folder / "model" / "tokenizer.json", guest.stage.folder / guest.model)


def frail(invite: Invite) -> list[Guest]:
    """Nights without a service: killed while a job runs and others queue, and back after a while."""
    names = ("restarted_deferred", "restarted_waiting", "down_deferred", "down_waiting")
    first, *others = guests = [invite(name, "frail") for name in names if name in BY_NAME]
    lane = first.begin().lane
    with ThreadPoolExecutor() as threads:
        begun = [threads.submit(guest.play, lambda _: None) for guest in others]
        with lane.held(first.key):
            wait(begun)
            lane.kill()
    time.sleep(DOWN_S)
    for guest in guests:
        if guest.night.morning.tries == 2:
            guest.wait_state("up_for_retry")
    lane.start()
    return guests


def restart_the_triggerer(guest: Guest, others: list[Future[list[Guest]]]) -> None:
    """When all others have had their event; many of them are deferred still."""
    with guest.lane.held(guest.key):
        guest.wait_watched()
        guest.note_progress()
        wait(others)
        looks = guest.looks()
        guest.airflow.restart_triggerer()
        guest.wait_watched(looks)
    while guest.job["state"] == "running":
        guest.note_progress()
        time.sleep(0.5)
    guest.end()
    guest.note_progress()


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


@pytest.mark.parametrize("night", [night for night in PLAYED if not night.after], ids=lambda night: night.name)
def test_a_night(guests, night):
    guest = guests[night.name]
    if guest.error:
        raise guest.error
    guest.end()
    witness = guest.lane.witness
    assert witness.submitted(guest.key) == 1
    assert all(cancel.owner == cancel.job_owner for cancel in witness.cancels(guest.key))  # by no predecessor
    found(guest, expected(night))


@pytest.mark.parametrize("night", [night for night in PLAYED if night.after], ids=lambda night: night.name)
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
    manifest = guests["restarted_deferred"].job["manifest"]
    assert 0 < manifest["resumed_rows"] + manifest["journal_rows"] < ROWS
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
