"""The finished parts in an Iceberg table: `output.iceberg`, with pyiceberg (extra `iceberg`)."""

from __future__ import annotations

import warnings
from typing import Any

import pyarrow as pa

from moegen.errors import InputError, SpecError, StorageError
from moegen.spec import Iceberg
from moegen.storage import absolute, join
from moegen.table.manifest import Manifest

_TRIES = 5  # where others commit to the table at the same moment


class IcebergTable:
    """The table that a job's parts are registered in; it is made when it is not there.

    Registering adds the parts' files as they are, by one commit whose summary names the job and its work. A file that
    the table has already is never added again, so that a job may be run again at any point.

    Args:
        spec: catalog and table. Where the catalog is, and its secrets, pyiceberg reads from its own configuration.
        schema: of the parts.

    Raises:
        SpecError: pyiceberg is not installed, the catalog is not configured, or the table lacks a column.
        StorageError: the catalog refused.
    """

    def __init__(self, spec: Iceberg, schema: pa.Schema) -> None:
        self._spec = spec
        try:
            from pyiceberg import catalog, exceptions
        except ImportError as error:
            raise SpecError(f"output.iceberg: {error}; install moegen[iceberg]") from error
        self._exceptions = exceptions
        try:
            self._catalog = catalog.load_catalog(spec.catalog)
        except Exception as error:  # it raises ValueError for most things, and whatever its backends raise
            raise SpecError(
                f"output.iceberg.catalog: {spec.catalog!r} cannot be used: {error}; configure it for pyiceberg"
            ) from error
        self._table = self._made(schema)
        missing = set(schema.names).difference(self._table.schema().column_names)
        if missing:
            raise SpecError(
                f"output.iceberg.table: {spec.table!r} has no column {min(missing)!r}; add it, or name another table"
            )

    def _made(self, schema: pa.Schema) -> Any:
        namespace = self._spec.table.rpartition(".")[0]
        try:
            with _quiet():
                if not self._catalog.table_exists(self._spec.table):
                    self._catalog.create_namespace_if_not_exists(namespace)
                return self._catalog.create_table_if_not_exists(self._spec.table, schema)
        except (ValueError, TypeError) as error:
            raise SpecError(
                f"output.iceberg.table: {self._spec.table!r} cannot be made with these columns: {error}"
            ) from error
        except Exception as error:
            raise self._refused(error) from error

    def files(self) -> set[str]:
        """The data files that the table has now. Raises `StorageError`."""
        try:
            with _quiet():
                self._table = self._catalog.load_table(self._spec.table)
                return {task.file.file_path for task in self._table.scan().plan_files()}
        except Exception as error:
            raise self._refused(error) from error

    def check_new(self, folder: str) -> None:
        """Before a folder is cleared. Raises `SpecError` when the table has files of it."""
        root = absolute(folder).rstrip("/") + "/"
        if any(path.startswith(root) for path in self.files()):
            raise SpecError(
                f"output.mode: new_run would remove files that the Iceberg table {self._spec.table!r} holds; delete "
                "them from the table first, or name another output.uri"
            )

    def register(self, folder: str, manifest: Manifest) -> int:
        """Adds the manifest's parts; how many were new.

        Raises:
            InputError: a part is not as the table needs it.
            StorageError: the catalog refused.
        """
        parts = [absolute(join(folder, part.name)) for part in manifest.parts if part.rows]
        about = {"moegen.fingerprint": manifest.fingerprint, "moegen.job-key": manifest.job_key}
        for attempt in range(_TRIES):
            known = self.files()
            new = [part for part in parts if part not in known]
            if not new:
                return 0
            try:
                with _quiet():
                    self._table.add_files(new, snapshot_properties=about)
            except self._exceptions.CommitFailedException as error:
                if attempt + 1 == _TRIES:
                    raise self._refused(error) from error
            except (ValueError, NotImplementedError) as error:
                raise InputError(f"output.iceberg: the parts cannot be registered: {error}") from error
            except Exception as error:
                raise self._refused(error) from error
            else:
                return len(new)
        return 0

    def _refused(self, error: Exception) -> StorageError:
        return StorageError(
            f"output.iceberg: {self._spec.catalog}.{self._spec.table}: {type(error).__name__}: {error}; the parts are "
            "there, and the same command registers them"
        )


def _quiet() -> Any:
    return warnings.catch_warnings(action="ignore")  # pyiceberg's own deprecations
