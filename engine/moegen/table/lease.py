"""Who runs a job: one holder at a time, and one that was silent for too long cannot come back unnoticed.

`lease-<epoch>.json` is created and never taken over: whoever creates the next epoch's file is the holder from then on,
and rewrites only that file, as a sign of life. A holder whose epoch is no longer the highest has lost the job; it looks
before everything that it commits. Where storage does not honour create-only writes, the one whose file is still there
after a moment is the holder.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moegen.errors import InputError, Interrupted, MoegenError
from moegen.storage import (
    ask_before_create,
    asks_before_create,
    join,
    list_names,
    put_create,
    put_replace,
    read_bytes,
    remove,
)

_NAME = re.compile(r"lease-(\d{6,})\.json")
_BEATS = 6  # signs of life per lease
_SETTLE_S = 2.0  # where create-only is not honoured: until another's write at the same moment has arrived
_PATIENCE_S = 5.0  # with a sign of life that is being written while the lease is released
_LONG_AGO = 10  # leases: so old a sign of life is old by any clock

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The content of a lease file."""

    token: str  # of this holder alone
    name: str  # host and process, for people
    machine: str  # the same for processes that can see each other; empty: unknown
    pid: int
    process_started: str  # in the kernel's ticks: process numbers are used again
    lease_s: float
    beats: int = 0
    beat_at: float = 0.0  # Unix time in seconds
    released: bool = False

    @classmethod
    def me(cls, lease_s: float) -> Holder:
        """This process."""
        pid = os.getpid()
        name = f"process {pid} on {socket.gethostname()}"
        return cls(uuid.uuid4().hex, name, _machine(), pid, _process_started(pid) or "", lease_s, beat_at=time.time())

    @property
    def gone(self) -> bool:
        """Whether it certainly cannot go on: it said so, it ended on this machine, or it is of another day."""
        if self.released or time.time() - self.beat_at > _LONG_AGO * self.lease_s:
            return True
        return self._seen and _process_started(self.pid) != self.process_started

    @property
    def paused(self) -> bool:
        """Whether its process, on this machine, has not ended."""
        return self._seen and _process_started(self.pid) == self.process_started

    @property
    def _seen(self) -> bool:
        return bool(self.machine) and self.machine == _machine()


class Lease:
    """The right to run one job. Use it in a `with`: what was taken is released at its end.

    Args:
        folder: the job's own, see `batch_folder`.
        lease_s: a holder that was silent for so long has lost the job.
        stopping: asked while another's sign of life is awaited.

    Attributes:
        epoch: the holder's number, from 1; 0 while nothing is held.
        after_crash: whether the holder before may have crashed: it neither released its lease nor is it only paused.
        paused_epoch: of a holder that has not ended, but was silent for its lease.
        lost: whether a successor was seen.
        exclusive: whether storage honours create-only writes, as far as `take` has found out.
    """

    def __init__(self, folder: str, lease_s: float, stopping: Callable[[], bool] = lambda: False) -> None:
        self._folder, self._lease_s, self._stopping = folder, lease_s, stopping
        self._me = Holder.me(lease_s)
        self._write = threading.Lock()
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)
        self.exclusive = True
        self.epoch = 0
        self.after_crash = self.lost = False
        self.paused_epoch: int | None = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def take(self) -> None:
        """Become the holder, if need be once the one before has been silent for its lease.

        Raises:
            Interrupted: another holder is alive, or was faster; or `stopping` said so.
            StorageError: storage refused.
        """
        epoch = max(self._epochs(), default=0)
        if epoch:
            before = self._read(epoch)
            if before is None or not before.gone:
                before = self._await_silence(epoch, before)
            paused = before is not None and not before.released and before.paused
            self.paused_epoch = epoch if paused else None
            self.after_crash = not paused and (before is None or not before.released)
        self._create(epoch + 1)
        self.epoch = epoch + 1
        for older in self._epochs():
            if older < self.epoch:
                remove(self._uri(older))
        self._heart.start()

    def check(self) -> None:
        """Look whether the job is still this holder's; before every commit.

        Raises:
            Interrupted: it is not.
            StorageError: storage refused.
        """
        self.lost = self.lost or self._succeeded()
        self.check_known()

    def check_known(self) -> None:
        """As `check`, by what is known already."""
        if self.lost:
            raise Interrupted(
                f"{self._folder}: another runner took this job over while this one gave no sign of life; "
                "this one leaves, and what it had not saved the other does again"
            )

    def release(self) -> None:
        """Let the next runner begin at once; once more does nothing. Failures are logged: silence releases it too."""
        self._ended.set()
        if self._heart.is_alive() and threading.current_thread() is not self._heart:
            self._heart.join(_PATIENCE_S)
        with self._write:
            if self.epoch == 0 or self.lost or self._me.released:
                return
            self._me = replace(self._me, released=True, beat_at=time.time())
            try:
                put_replace(self._uri(self.epoch), _encoded(self._me))
            except MoegenError as error:
                log.warning("the lease was not released: %s", error)

    def _beat(self) -> None:
        while not self._ended.wait(self._lease_s / _BEATS):
            try:
                self.lost = self.lost or self._succeeded()
                with self._write:
                    if self.lost or self._me.released:
                        return
                    self._me = replace(self._me, beats=self._me.beats + 1, beat_at=time.time())
                    put_replace(self._uri(self.epoch), _encoded(self._me))
            except MoegenError as error:  # the next may arrive; if none does, `check` will tell
                log.warning("no sign of life was written: %s", error)

    def _create(self, epoch: int) -> None:
        uri = self._uri(epoch)
        if not put_create(uri, _encoded(self._me)):
            raise self._taken(self._read(epoch))
        if not asks_before_create(uri) and not put_create(uri, _encoded(replace(self._me, beats=1))):
            log.info("%s: create-only writes are honoured", self._folder)
            return
        self.exclusive = False
        ask_before_create(uri)
        log.warning(
            "%s: this storage ignores create-only writes; of two runners that begin at the same moment, the one whose "
            "lease is overwritten leaves, and parts are looked for before they are written",
            self._folder,
        )
        time.sleep(_SETTLE_S)
        if not self._is_mine(epoch):
            raise self._taken(self._read(epoch))

    def _succeeded(self) -> bool:
        if max(self._epochs(), default=0) > self.epoch:
            return True
        return not self.exclusive and not self._is_mine(self.epoch)

    def _await_silence(self, epoch: int, seen: Holder | None) -> Holder | None:
        """Until the holder is gone or was silent for its lease, by this machine's clock alone."""
        lease_s = self._lease_s if seen is None else seen.lease_s
        since = time.monotonic()
        while time.monotonic() - since < lease_s:
            if self._stopping():
                raise Interrupted("stopped on request while it waited for the job's lease; the same command goes on")
            time.sleep(min(lease_s / 20, 1.0))
            now = self._read(epoch)
            if now is not None and now.gone:
                return now
            if max(self._epochs(), default=0) > epoch or (now is not None and now != seen):
                raise self._taken(now)
        return seen

    def _taken(self, by: Holder | None) -> Interrupted:
        name = "another runner" if by is None else f"another runner ({by.name})"
        return Interrupted(f"{self._folder}: {name} is at work on this job; this one leaves")

    def _is_mine(self, epoch: int) -> bool:
        holder = self._read(epoch)
        return holder is not None and holder.token == self._me.token

    def _read(self, epoch: int) -> Holder | None:
        """None when the file is gone or is no lease: then only silence can tell."""
        try:
            return Holder(**json.loads(read_bytes(self._uri(epoch))))
        except (InputError, ValueError, TypeError):
            return None

    def _epochs(self) -> list[int]:
        return [int(match[1]) for name in list_names(self._folder) if (match := _NAME.fullmatch(name))]

    def _uri(self, epoch: int) -> str:
        return join(self._folder, f"lease-{epoch:06d}.json")


def _encoded(holder: Holder) -> bytes:
    return (json.dumps(asdict(holder)) + "\n").encode()


def _machine() -> str:
    """This boot of this kernel, and this process's view of its processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115, a name that is no path
    except OSError:
        return ""


def _process_started(pid: int) -> str | None:
    """None when there is no such process, or it has ended and is not yet collected."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
