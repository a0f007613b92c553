"""A peer's own Python environment: made once, with pinned versions, in the user's cache folder."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path


class PeerUnavailable(Exception):
    """The peer could not be installed here; the message says which and why."""


@dataclass(frozen=True)
class Environment:
    """What to install. pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) say where from."""

    name: str
    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()  # comes along as a dependency, and breaks
    variables: dict[str, str] = field(default_factory=dict)  # for the installation
    limit_s: float = 900

    @property
    def folder(self) -> Path:
        """Where it lives."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "moegen-bench" / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def make(self) -> None:
        """Installs what is not installed yet. Raises `PeerUnavailable` when that fails or takes too long."""
        wanted, made = "\n".join(self.requirements), self.folder / "requirements.txt"
        if made.exists() and made.read_text() == wanted:
            return
        print(f"installing {', '.join(self.requirements)} in {self.folder}", flush=True)
        self._run(sys.executable, "-m", "venv", "--clear", str(self.folder))
        self._run(str(self.python), "-m", "pip", "install", "--quiet", *self.requirements)
        if self.unwanted:
            self._run(str(self.python), "-m", "pip", "uninstall", "--quiet", "--yes", *self.unwanted)
        made.write_text(wanted)

    def _run(self, *command: str) -> None:
        try:
            subprocess.run(
                command, env={**os.environ, **self.variables}, timeout=self.limit_s, check=True, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise PeerUnavailable(f"{self.name}: not installed after {self.limit_s:.0f} s") from error
        except subprocess.CalledProcessError as error:
            last = " / ".join(error.stdout.strip().splitlines()[-3:])
            raise PeerUnavailable(f"{self.name}: cannot be installed: {last}") from error
