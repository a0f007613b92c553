"""The machine as moegen knows it: measured by the shipped command, as before anybody's first job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def probe_machine(checkpoint: Path) -> None:
    """`moegen probe`, with the disk that the checkpoint is on; later plans on this machine go by its rates."""
    subprocess.run([sys.executable, "-m", "moegen", "probe", "--device", "cpu", "--model", str(checkpoint)], check=True)
