"""Processes that compile variants of one kernel at the same moment leave a cache that is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from moegen.ops.kernel_cache import lock_kernel_cache
from numba.core.caching import IndexDataCacheFile

PROCESSES, VARIANTS = 4, 60
_WRITER = f"""
import sys
from numba.core.caching import IndexDataCacheFile
from moegen.ops.kernel_cache import lock_kernel_cache
lock_kernel_cache()
cache = IndexDataCacheFile(sys.argv[1], "kernel", "source")
sys.stdin.readline()  # all begin at once
for variant in range({VARIANTS}):
    key = (int(sys.argv[2]), variant)
    cache.save(key, f"code of {{key}}")
"""


def test_every_variant_has_its_own_code(tmp_path: Path) -> None:
    """Without the lock, 34 and 56 of these 240 had none, or another's."""
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), str(number)], stdin=subprocess.PIPE)
        for number in range(PROCESSES)
    ]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"\n")
        writer.stdin.close()
    assert [writer.wait(timeout=120) for writer in writers] == [0] * PROCESSES
    lock_kernel_cache()
    cache = IndexDataCacheFile(str(tmp_path), "kernel", "source")
    keys = [(number, variant) for number in range(PROCESSES) for variant in range(VARIANTS)]
    assert [key for key in keys if cache.load(key) != f"code of {key}"] == []


def test_a_cache_that_cannot_be_written_is_read(tmp_path: Path) -> None:
    lock_kernel_cache()
    gone = IndexDataCacheFile(str(tmp_path / "nowhere"), "kernel", "source")
    assert gone.load("variant") is None
