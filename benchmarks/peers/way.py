"""A way to generate: one engine with one choice of its settings, each turn in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cgroup import Cgroup
from environment import Environment, PeerUnavailable
from turn import Outcome, Row, Turn


@dataclass(frozen=True)
class Way:
    """One engine with one choice of its settings."""

    engine: str
    choice: str
    module: str  # in this folder
    settings: dict[str, Any] = field(default_factory=dict)
    environment: Environment | None = None  # None: the one that runs the benchmark
    cgroup: Cgroup | None = None  # what its turns run in
    warm_tokens: int = 4
    sample: int | None = None  # a side question, asked once and of the first rows only; None: all rows

    @property
    def name(self) -> str:
        """As in "vLLM, float32"."""
        sample = f"first {self.sample} rows" if self.sample else ""
        return ", ".join(part for part in (self.engine, self.choice, sample) if part)

    def take_turn(self, checkpoint: Path, rows: Sequence[Row], limit_s: float) -> Outcome:
        """Raises `PeerUnavailable` when the engine cannot be installed, fails, or is not done after `limit_s`."""
        rows = rows[: self.sample]
        if self.environment:
            self.environment.make()
        with tempfile.TemporaryDirectory(prefix="moegen-bench-turn-") as name:
            folder = Path(name)
            Turn(str(checkpoint), list(rows), self.settings, self.warm_tokens).write(folder / "turn.json")
            self._run(folder, limit_s)
            outcome = Outcome.read(folder / "outcome.json")
        wrong = [i for i, row in enumerate(rows) if len(outcome.answers[i]) != row.answer_tokens]
        if wrong:
            raise PeerUnavailable(f"{len(wrong)} rows have the wrong number of tokens, the first is row {wrong[0]}")
        return outcome

    def _run(self, folder: Path, limit_s: float) -> None:
        python = self.environment.python if self.environment else sys.executable
        module = Path(__file__).with_name(f"{self.module}.py")
        command = [python, module, folder / "turn.json", folder / "outcome.json"]
        variables = {**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
        with (folder / "log").open("w+") as log:
            try:
                subprocess.run(
                    self.cgroup.command(command) if self.cgroup else command,
                    env=variables, stdout=log, stderr=log, check=True, timeout=limit_s,
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise PeerUnavailable(f"not done after {limit_s:.0f} s, opening included") from error
            except subprocess.CalledProcessError as error:
                log.seek(0)
                last = " / ".join(log.read().strip().splitlines()[-4:])
                raise PeerUnavailable(f"ended with status {error.returncode}: {last}") from error
