"""Tables that were sent to the service, for clients that share no storage with it.

<state>/tables/<name>/requests.jsonl   the table, as it came
                      requests.sha256
                      answers/          where its job may put the output
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

from moegen.errors import MoegenError
from moegen.job.records import check_key
from moegen.storage import put_replace, storage_errors
from moegen.units import MIB

TABLE_LIMIT_BYTES = 512 * MIB


class TableConflict(MoegenError):
    """The name belongs to another table."""


class TableTooLarge(MoegenError):
    """More than the service takes over HTTP."""


class Inbox:
    """The tables of one state folder. A table is whole or not there, and never changes."""

    def __init__(self, state_dir: Path) -> None:
        self.folder = state_dir / "tables"

    def uris(self, name: str) -> dict[str, str]:
        """What a job names as its input and its output."""
        folder = (self.folder / name).absolute()
        return {"input_uri": str(folder / "requests.jsonl"), "output_uri": str(folder / "answers")}

    async def put(self, name: str, chunks: AsyncIterator[bytes]) -> bool:
        """Keeps the table; False when it was there already.

        Raises:
            SpecError: the name cannot name a table.
            TableConflict: the name belongs to a table with another content.
            TableTooLarge: it has more than `TABLE_LIMIT_BYTES`.
            StorageError: the state folder cannot be written.
        """
        check_key(name)
        folder = self.folder / name
        aside = folder / f".{uuid4().hex}"
        with storage_errors(str(folder), "written"):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                return _kept(folder, aside, await _written(aside, chunks))
            finally:
                aside.unlink(missing_ok=True)


def _kept(folder: Path, aside: Path, digest: str) -> bool:
    known = folder / "requests.sha256"
    if known.exists():
        if known.read_text() != digest:
            raise TableConflict(f"table: {folder.name!r} has another content; use another name")
        return False
    aside.replace(folder / "requests.jsonl")
    put_replace(str(known), digest.encode())
    return True


async def _written(path: Path, chunks: AsyncIterator[bytes]) -> str:
    sha, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        async for chunk in chunks:
            size += len(chunk)
            if size > TABLE_LIMIT_BYTES:
                raise TableTooLarge(
                    f"the table is longer than {TABLE_LIMIT_BYTES // MIB} MiB; put it on storage that the service "
                    "reads, or split it"
                )
            sha.update(chunk)
            file.write(chunk)
    return sha.hexdigest()
