"""A cgroup (v1 or v2) of a benchmark's own: what runs in it has so much memory, and reads a disk so fast, and no more.

A shared machine's disk gives twice as much in one minute as in the next; one that is held to less than it always gives
is the same disk for whoever measures it and for whoever uses it then.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cgroup:
    """Use as a context manager.

    Attributes:
        memory_bytes: page cache counted.
        disk_bytes_per_s: of reads from the disk that `folder` is on.
    """

    memory_bytes: int | None = None
    disk_bytes_per_s: int | None = None
    folder: Path = Path("/")

    def __enter__(self) -> Cgroup:
        try:
            for place, limit in self._limits:
                place.parent.mkdir(exist_ok=True)
                place.write_text(limit)
        except OSError as error:
            self.__exit__()
            raise SystemExit(f"this benchmark needs a cgroup that it may create: {error}; run it as root") from None
        return self

    def __exit__(self, *exception: object) -> None:
        for folder in self._folders:
            if folder.is_dir():
                folder.rmdir()

    @property
    def peak_bytes(self) -> int:
        """The most memory that was in use at once, where there is a limit."""
        name = "memory.max_usage_in_bytes" if _V1 else "memory.peak"
        return int((_own_folder("memory") / name).read_text())

    def command(self, command: Sequence[Any]) -> list[Any]:
        """The command, begun inside the cgroup."""
        for folder in self._folders:
            command = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', folder / "cgroup.procs", *command]
        return list(command)

    @property
    def _limits(self) -> list[tuple[Path, str]]:
        """Files, and what to write there."""
        limits = []
        if self.memory_bytes is not None:
            name = "memory.limit_in_bytes" if _V1 else "memory.max"
            limits.append((_own_folder("memory") / name, str(self.memory_bytes)))
        if self.disk_bytes_per_s is not None:
            device = self.folder.stat().st_dev
            which, rate = f"{os.major(device)}:{os.minor(device)}", self.disk_bytes_per_s
            limits.append(
                (_own_folder("blkio") / "blkio.throttle.read_bps_device", f"{which} {rate}")
                if _V1
                else (_own_folder("io") / "io.max", f"{which} rbps={rate}")
            )
        return limits

    @property
    def _folders(self) -> set[Path]:
        """In v1, one for each kind of limit."""
        return {place.parent for place, _ in self._limits}


_V1 = (ROOT / "memory").is_dir()


def _own_folder(controller: str) -> Path:
    return (ROOT / controller if _V1 else ROOT) / f"moegen-bench-{os.getpid()}"
