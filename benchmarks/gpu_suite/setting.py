"""What every case of the suite is told, and how a case's process is started and ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moegen.plan.machine import Machine, Rates
from moegen.units import GIB


@dataclass(frozen=True)
class Setting:
    """One case."""

    device: str  # cuda, cuda:1 or cpu
    tiny: bool
    scratch: str  # a folder for checkpoints, in memory if that has room
    results: str  # the suite's document, with what its probe measured, once it has
    seconds: float  # within which the case must end
    choice: dict[str, Any]  # the case's own

    def machine(self) -> Machine:
        """Sizes as they are now, rates as the suite's own probe found them, or as an earlier one has."""
        found = Machine.detect(self.device)
        try:
            probed = json.loads(Path(self.results).read_text())["stages"]["probe"]["probe"]["machine"]
        except (OSError, KeyError):
            return found
        return replace(found, rates=Rates.from_mapping(probed["rates"]))


def run_case(module: str, setting: Setting) -> dict[str, Any]:
    """In a process of its own, so that all memory is free after it; what it found, or why it failed."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moegen-bench-gpu-") as name:
        folder = Path(name)
        (folder / "setting.json").write_text(json.dumps(asdict(setting)))
        command = [sys.executable, "-m", f"benchmarks.gpu_suite.{module}", str(folder)]
        with (folder / "log").open("w+") as log:
            try:
                status = subprocess.run(command, stdout=log, stderr=log, timeout=setting.seconds).returncode
                failure = f"ended with status {status}" if status else None
            except subprocess.TimeoutExpired:
                failure = f"not done after {setting.seconds:.0f} s"
            log.seek(0)
            lines = log.read().strip().splitlines()
        found: dict[str, Any] = {}
        if (folder / "result.json").exists():
            found = json.loads((folder / "result.json").read_text())
    if failure:
        found["failed"] = " / ".join([failure, *lines[-6:]])
    found["case_seconds"] = round(time.monotonic() - started, 1)
    return found


class Desk:
    """A case's side of it: reads its setting, writes down what it finds as soon as it has found it."""

    def __init__(self) -> None:
        self._folder = Path(sys.argv[1])
        self.setting = Setting(**json.loads((self._folder / "setting.json").read_text()))
        self._until = time.monotonic() + self.setting.seconds
        self._found: dict[str, Any] = {}

    def until(self, spare_s: float) -> float:
        """The moment of `time.monotonic` at which `spare_s` of the case's time are left."""
        return self._until - spare_s

    def note(self, **found: Any) -> None:
        """Keeps these findings, also if the case does not end well."""
        self._found |= found
        aside = self._folder / "result.part"
        aside.write_text(json.dumps(self._found))
        aside.replace(self._folder / "result.json")


def scratch_parent(needed_bytes: int) -> str | None:
    """Memory, where it has so much room; None: the system's folder for temporary files."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or not os.access(shared, os.W_OK):
        return None
    status = os.statvfs(shared)
    return str(shared) if status.f_bavail * status.f_frsize > needed_bytes + GIB else None
