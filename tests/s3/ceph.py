"""A real S3 server: Ceph from Debian's packages (radosgw, ceph-mon, ceph-osd), one of each, for one test run.

    python -m tests.s3.ceph    # starts one, prints how to reach it, and ends it with Ctrl-C

Everything lies in a temporary folder and listens on free ports of the loopback address. The daemons are children of
this process and are killed at the end: nothing of them is worth keeping.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Self

PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "ceph-authtool", "monmaptool", "setpriv")
INSTALL = "apt-get install --no-install-recommends radosgw ceph-mon ceph-osd"
_READY_S = 90.0
_SETTINGS = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}]
mon initial members = a
public network = 127.0.0.0/8
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
pid file = {folder}/$name.pid
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
osd crush chooseleaf type = 0
osd crush update on start = true
mon max pg per osd = 1000
mon data avail warn = 1
mon data avail crit = 1
[mon]
mon data = {folder}/mon
paxos propose interval = 0.05
paxos min wait = 0.01
[osd]
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block create = true
bluestore block size = 2147483648
bluestore fsck on mount = false
osd memory target = 939524096
[client.admin]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {folder}/rgw
rgw zone = default
"""


def missing() -> str | None:
    """Why there can be no server here; None where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"Ceph is not installed ({', '.join(absent)}); as root: {INSTALL}" if absent else None


@dataclass(frozen=True)
class Keys:
    """Of one user."""

    access_key: str
    secret_key: str


class Ceph:
    """The server while its `with` block lasts. Raises `RuntimeError` with the log's end if it does not come up."""

    endpoint: str

    def __init__(self) -> None:
        self.keys = Keys("accesskey", f"secret-{uuid.uuid4().hex}")
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="moegen-ceph-"))
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGKILL)
            daemon.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def new_keys(self) -> Keys:
        """Another pair for the same user; the others stay valid."""
        keys = Keys(uuid.uuid4().hex, uuid.uuid4().hex)
        self._admin("key", "create", "--key-type=s3", *_key_arguments(keys))
        return keys

    def revoke(self, keys: Keys) -> None:
        """From now on the server refuses these."""
        self._admin("key", "rm", "--key-type=s3", f"--access-key={keys.access_key}")

    def _start(self) -> None:
        fsid, self._mon_port, port = str(uuid.uuid4()), free_port(), free_port()
        for name in ("mon", "osd", "rgw"):
            (self._folder / name).mkdir()
        self._settings = self._folder / "ceph.conf"
        self._settings.write_text(_SETTINGS.format(fsid=fsid, folder=self._folder, mon_port=self._mon_port, port=port))
        keyring, monmap = self._folder / "keyring", self._folder / "monmap"
        for name in ("mon.", "client.admin", "osd.0"):
            new = ["--create-keyring"] * (not keyring.exists())
            capabilities = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
            self._run("ceph-authtool", keyring, *new, "--gen-key", "-n", name, *capabilities)
        self._run("monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{self._mon_port}]", "--fsid", fsid, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._daemon("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        self._run("ceph", "osd", "new", osd)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._daemon("ceph-osd", "-i", "0")
        self._daemon("radosgw", "-n", "client.admin")
        self._admin("user", "create", "--uid=tester", "--display-name=tester", *_key_arguments(self.keys))
        self.endpoint = f"http://127.0.0.1:{port}"
        self._await_answer()

    def _await_answer(self) -> None:
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                urllib.request.urlopen(self.endpoint, timeout=5).close()
                return
            except (urllib.error.URLError, OSError) as error:
                ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
                if ended or time.monotonic() > deadline:
                    raise RuntimeError(f"Ceph does not answer: {error}; ended: {ended}; {self._log_end()}") from error
            time.sleep(0.1)

    def _log_end(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-1000:] for log in self._folder.glob("*.log"))

    def _admin(self, *command: str) -> None:
        self._run("radosgw-admin", *command)

    def _run(self, program: str, *arguments: object) -> None:
        done = subprocess.run(
            self._command(program, arguments), capture_output=True, text=True, timeout=_READY_S, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} {arguments[0]}: {done.stdout}{done.stderr}")

    def _daemon(self, program: str, *arguments: object) -> None:
        bound = ["setpriv", "--pdeathsig", "KILL"]  # it ends with this process, however that ends
        command = [*bound, *self._command(program, arguments), "-f"]
        self._daemons.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def _command(self, program: str, arguments: tuple[object, ...]) -> list[str]:
        settings = [] if program in ("ceph-authtool", "monmaptool") else ["-c", str(self._settings)]
        return [program, *settings, *map(str, arguments)]


def _key_arguments(keys: Keys) -> list[str]:
    return ["--uid=tester", f"--access-key={keys.access_key}", f"--secret-key={keys.secret_key}"]


def free_port() -> int:
    """A port of the loopback address that nobody listens on right now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


if __name__ == "__main__":
    begun = time.monotonic()
    with Ceph() as ceph:
        print(f"# up after {time.monotonic() - begun:.0f} s")
        print(f"export AWS_ENDPOINT_URL={ceph.endpoint} AWS_DEFAULT_REGION=us-east-1")
        print(
            f"export AWS_ACCESS_KEY_ID={ceph.keys.access_key} AWS_SECRET_ACCESS_KEY={ceph.keys.secret_key}", flush=True
        )
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
