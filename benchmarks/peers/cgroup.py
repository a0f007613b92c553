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

_ROOT = Path("/sys/fs/cgroup")
_V1 = (_ROOT / "memory").is_dir()


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
        made: list[Path] = []
        try:
            for folder in self._folders:
                folder.mkdir()
                made.append(folder)
            for place, limit in self._limits:
                place.write_text(limit)
        except OSError as error:
            for folder in made:
                folder.rmdir()
            raise SystemExit(
                f"this benchmark needs a cgroup that it may create, with the memory and io controllers: {error}; run "
                "it as root"
            ) from None
        return self

    def __exit__(self, *exception: object) -> None:
        for folder in self._folders:
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
            disk, rate = _disk_of(self.folder), self.disk_bytes_per_s
            limits.append(
                (_own_folder("blkio") / "blkio.throttle.read_bps_device", f"{disk} {rate}")
                if _V1
                else (_own_folder("io") / "io.max", f"{disk} rbps={rate}")
            )
        return limits

    @property
    def _folders(self) -> list[Path]:
        """In v1, one for each kind of limit."""
        return list(dict.fromkeys(place.parent for place, _ in self._limits))


def _own_folder(controller: str) -> Path:
    return (_ROOT / controller if _V1 else _ROOT) / f"moegen-bench-{os.getpid()}"


def _disk_of(folder: Path) -> str:
    """Its numbers, as in "254:0": limits are those of whole disks, not of their partitions."""
    device = folder.stat().st_dev
    found = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not found.exists():
        raise SystemExit(f"{folder}: is on no disk of its own (tmpfs, an overlay, Btrfs): give a folder that is on one")
    whole = found.resolve().parent if (found / "partition").exists() else found
    return (whole / "dev").read_text().strip()
