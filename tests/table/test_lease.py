"""The lease: one holder, also when two begin at once; a silent one is succeeded and notices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from moegen.errors import Interrupted
from moegen.table.lease import Holder, Lease

LEASE_S = 1.0
HOLD = (
    "import sys, time; from moegen.table.lease import Lease\n"
    "with Lease(sys.argv[1], float(sys.argv[2])) as lease:\n"
    "    lease.take(); print('taken', flush=True); time.sleep(60)"
)


def files(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_bytes()) for path in folder.glob("lease-*")}


def elsewhere(folder: Path, epoch: int = 1, **changes: Any) -> Path:
    """The lease of a runner on another machine."""
    holder = replace(Holder.me(LEASE_S), name="process 7 on other", machine="another", **changes)
    path = folder / f"lease-{epoch:06d}.json"
    path.write_text(json.dumps(holder.__dict__))
    return path


def test_taken_and_released_again_and_again(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        with Lease(str(tmp_path), 60.0) as lease:
            lease.take()
            lease.check()
            assert (lease.epoch, lease.after_crash, lease.paused_epoch) == (epoch, False, None)
            assert [*files(tmp_path)] == [f"lease-{epoch:06d}.json"]
        (content,) = files(tmp_path).values()
        assert content["released"]
        assert str(os.getpid()) in content["name"]


def test_what_was_not_taken_is_not_released(tmp_path: Path) -> None:
    with Lease(str(tmp_path), 60.0):
        pass
    assert files(tmp_path) == {}


def test_signs_of_life_turn_another_away(tmp_path: Path) -> None:
    with Lease(str(tmp_path), LEASE_S) as lease:
        lease.take()
        begun = time.monotonic()
        with pytest.raises(Interrupted, match=rf"another runner \(process {os.getpid()} .*this one leaves") as refusal:
            Lease(str(tmp_path), LEASE_S).take()
        assert time.monotonic() - begun < LEASE_S
        assert refusal.value.exit_code == 75
        lease.check()


def test_of_many_at_the_same_moment_one_takes_it(tmp_path: Path) -> None:
    start = Barrier(6)

    def contend(number: int) -> bool:
        lease = Lease(str(tmp_path), LEASE_S)
        start.wait()
        try:
            lease.take()
        except Interrupted:
            return False
        time.sleep(2 * LEASE_S)
        lease.check()
        lease.release()
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(contend, range(6))) == [False] * 5 + [True]


def test_a_killed_holder_of_this_machine_is_succeeded_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path), "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        holder.kill()
    begun = time.monotonic()
    with Lease(str(tmp_path), 60.0) as lease:
        lease.take()
        assert time.monotonic() - begun < 5
        assert (lease.epoch, lease.after_crash) == (2, True)


def test_a_paused_holder_is_succeeded_after_its_lease_and_is_not_taken_for_a_crash(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path), str(LEASE_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        holder.send_signal(signal.SIGSTOP)
        with Lease(str(tmp_path), LEASE_S) as lease:
            lease.take()
            assert (lease.epoch, lease.after_crash, lease.paused_epoch) == (2, False, 1)
            holder.send_signal(signal.SIGCONT)
            time.sleep(LEASE_S)
            lease.check()  # whatever the first writes now
        holder.kill()


def test_who_was_succeeded_notices_and_leaves_the_successor_alone(tmp_path: Path) -> None:
    with Lease(str(tmp_path), 60.0) as lease:
        lease.take()
        elsewhere(tmp_path, epoch=2)
        lease.check_known()  # it has not looked yet
        with pytest.raises(Interrupted, match="took this job over"):
            lease.check()
        with pytest.raises(Interrupted, match="took this job over"):
            lease.check_known()
    assert not files(tmp_path)["lease-000002.json"]["released"]


def test_the_silence_of_another_machine_is_awaited(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    begun = time.monotonic()
    with Lease(str(tmp_path), 60.0) as lease:
        lease.take()
        assert LEASE_S <= time.monotonic() - begun < 5 * LEASE_S  # that of the holder
        assert (lease.epoch, lease.after_crash) == (2, True)


@pytest.mark.parametrize("content", ["", '{"token": "x', '{"token": "x"}'])
def test_a_lease_that_cannot_be_read_is_one_whose_holder_is_silent(tmp_path: Path, content: str) -> None:
    (tmp_path / "lease-000004.json").write_text(content)
    with Lease(str(tmp_path), 0.5) as lease:
        lease.take()
        assert (lease.epoch, lease.after_crash) == (5, True)


def test_a_lease_of_another_day_is_not_awaited(tmp_path: Path) -> None:
    elsewhere(tmp_path, beat_at=time.time() - 86_400)
    begun = time.monotonic()
    with Lease(str(tmp_path), 60.0) as lease:
        lease.take()
    assert time.monotonic() - begun < LEASE_S


def test_whoever_waits_can_be_stopped(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    with pytest.raises(Interrupted, match="stopped on request"):
        Lease(str(tmp_path), 60.0, stopping=lambda: True).take()
