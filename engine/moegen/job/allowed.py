"""Which URIs the service lets a job touch."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from moegen.errors import SpecError
from moegen.spec import JobSpec


@dataclass(frozen=True)
class AllowedUris:
    """Prefixes per use; none given allows every URI. A prefix ends where a path segment ends."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    models: tuple[str, ...] = ()

    def beside(self, folder: str) -> AllowedUris:
        """With a folder of the service's own, for tables and answers, where only some prefixes are allowed."""
        inputs, outputs = ((*prefixes, folder) if prefixes else () for prefixes in (self.inputs, self.outputs))
        return replace(self, inputs=inputs, outputs=outputs)

    def check(self, spec: JobSpec) -> None:
        """Raises `SpecError`, naming the field, when the job names a URI that it may not use."""
        for uri in spec.input.uris:
            _check("input.uri", uri, self.inputs)
        _check("output.uri", spec.output.uri, self.outputs)
        _check("model.uri", spec.model.uri, self.models)


def _check(field: str, uri: str, prefixes: Sequence[str]) -> None:
    name = normalised(field, uri)
    if prefixes and not all(any(_below(place, prefix) for prefix in prefixes) for place in _places(name)):
        raise SpecError(f"{field}: {uri!r} is outside what this service allows: {', '.join(prefixes)}")


def _places(name: str) -> Iterator[str]:
    """The name itself and, for a local glob, its matches: one may be a link that leads elsewhere."""
    yield name
    if _local_path(name) is not None and glob.has_magic(name):
        yield from (os.path.realpath(match) for match in glob.iglob(name, recursive=True))  # noqa: PTH207, absolute


def _below(name: str, prefix: str) -> bool:
    folder = normalised("allowed prefix", prefix).rstrip("/")
    return name.rstrip("/") == folder or name.startswith(f"{folder}/")


def normalised(field: str, uri: str) -> str:
    """One spelling per place: local paths absolute, with links and .. resolved; remote URIs as they are.

    Raises:
        SpecError: a URI that holds a user's name or password, chains filesystems, or climbs with `..` remotely.
    """
    if "\0" in uri or "::" in uri:
        raise SpecError(f"{field}: {uri!r} cannot be used; give one plain URI, without :: chains")
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        place = parts.netloc.rpartition("@")[2]
        raise SpecError(f"{field}: the URI at {place!r} holds credentials; give them to the service's environment")
    if (path := _local_path(uri)) is not None:
        return os.path.realpath(path)
    if ".." in unquote(parts.path).replace("\\", "/").split("/"):
        raise SpecError(f"{field}: {uri!r} climbs with ..; write the path that is meant")
    return uri


def _local_path(uri: str) -> str | None:
    """The path as the engine will open it; None for remote URIs."""
    if fsspec.utils.get_protocol(uri) not in LocalFileSystem.protocol:
        return None
    return str(LocalFileSystem._strip_protocol(uri))
