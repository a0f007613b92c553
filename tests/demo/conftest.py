"""The demo's scripts are no package: they are imported from their folder, as `python demo/run.py` does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
