"""What a runner tells the service: one JSON file, always whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moegen.errors import StorageError
from moegen.storage import put_replace


@dataclass(frozen=True)
class RunnerStatus:
    """`progress` and `manifest` as in docs/http-api.md; `error` is one line for people; `detail` as `Detail` has it."""

    progress: dict[str, Any] | None = None
    error: str | None = None
    manifest: dict[str, Any] | None = None
    detail: dict[str, Any] = field(default_factory=dict)  # what an older moegen did not tell is not in it

    def write(self, path: Path) -> None:
        """Raises `StorageError` when the file cannot be written."""
        put_replace(str(path), json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, path: Path) -> RunnerStatus:
        """What the file says; nothing while there is none.

        Raises:
            StorageError: the file is not one of these.
        """
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(f"{path}: is not a runner's status: {error}; remove it") from error

    @property
    def rows_saved(self) -> int:
        return int((self.progress or {}).get("rows_saved", 0))
