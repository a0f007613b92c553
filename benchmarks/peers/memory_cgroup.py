"""A memory cgroup: what runs in it has so much memory, page cache counted, and no more."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class MemoryCgroup:
    """A cgroup (v1 or v2) of its own with a limit. Use as a context manager."""

    def __init__(self, limit_bytes: int) -> None:
        v1 = (ROOT / "memory").is_dir()
        self._folder = (ROOT / "memory" if v1 else ROOT) / f"moegen-bench-{os.getpid()}"
        self._limit, self._peak = (
            ("memory.limit_in_bytes", "memory.max_usage_in_bytes") if v1 else ("memory.max", "memory.peak")
        )
        self._limit_bytes = limit_bytes

    def __enter__(self) -> MemoryCgroup:
        try:
            self._folder.mkdir()
            (self._folder / self._limit).write_text(str(self._limit_bytes))
        except OSError as error:
            raise SystemExit(
                f"this benchmark needs a memory cgroup that it may create: {error}; run it as root"
            ) from None
        return self

    def __exit__(self, *exception: object) -> None:
        self._folder.rmdir()

    @property
    def peak_bytes(self) -> int:
        """The most that was in use at once."""
        return int((self._folder / self._peak).read_text())

    def command(self, command: Sequence[str | Path]) -> list[str | Path]:
        """The command, begun inside the cgroup."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', self._folder / "cgroup.procs", *command]
