"""The few things that moegen asks of storage, on a local path or any fsspec URI.

What a backend raises becomes an `InputError` (the object is not there) or a `StorageError` (storage refused or
could not be reached), with the URI and what to do about it.
"""

from __future__ import annotations

import errno
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from moegen.errors import InputError, MoegenError, SpecError, StorageError
from moegen.remote import options
from moegen.units import GIB, MIB

BLOCK_BYTES = 8 * MIB  # one request to an object store
_VERSION_KEYS = ("ETag", "etag", "generation", "md5Hash", "blob_id", "LastModified", "mtime", "created")
_IGNORE_CONDITIONS: set[str] = set()  # buckets, see `_bucket`
_BUGS = (AttributeError, LookupError, NameError, TypeError)  # not storage's doing


@dataclass(frozen=True)
class StoredObject:
    """One file as storage describes it. `version` changes when the content does, as far as the backend can tell."""

    uri: str
    size_bytes: int
    version: str


@contextmanager
def storage_errors(uri: str, done: str) -> Iterator[None]:
    """Turns what a backend raises into moegen's errors; `done` is what was attempted ("read", "written")."""
    uri = public(uri)
    try:
        yield
    except (MoegenError, MemoryError, *_BUGS):
        raise
    except FileNotFoundError as error:
        if isinstance(error.__cause__, MoegenError):  # our own, in a backend's wrapping
            raise error.__cause__ from error
        if done == "written":
            raise StorageError(f"{uri}: cannot be written: no such bucket or folder; create it") from error
        raise InputError(f"{uri}: not found; check the name, and that the object still exists") from error
    except PermissionError as error:
        said = error.__cause__ or error  # s3fs's own says less
        raise StorageError(f"{uri}: may not be {done}: {said}; check credentials and permissions") from error
    except OSError as error:
        if done != "written" and error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR):
            raise InputError(f"{uri}: not found: {error.strerror}; check the name") from error
        raise _refused(uri, done, error) from error
    except Exception as error:  # backends raise their own libraries' errors, which share no base class
        raise _refused(uri, done, error) from error


def _refused(uri: str, done: str, error: Exception) -> StorageError:
    reason = f"{type(error).__name__}: {error}"
    return StorageError(f"{uri}: cannot be {done}: {reason}; check credentials, endpoint and free space")


def open_fs(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URI or local path, and the path within it.

    Raises:
        SpecError: the scheme is unknown, or its package is not installed.
        StorageError: the filesystem cannot be set up.
    """
    try:
        with storage_errors(uri, "opened"):
            fs, path = fsspec.core.url_to_fs(uri, **options(fsspec.utils.get_protocol(uri)))
            fs.invalidate_cache()  # listings grow stale in a long-lived process
    except StorageError as error:
        if isinstance(error.__cause__, ImportError):
            raise SpecError(f"{public(uri)}: {error.__cause__} (for s3:// install moegen[s3])") from error
        if isinstance(error.__cause__, ValueError):
            raise SpecError(f"{public(uri)}: {error.__cause__}; use a local path or a URI that fsspec knows") from error
        raise
    return fs, path


def public(uri: str) -> str:
    """The URI without a user's name and password and, of a web address, its query, which may sign a request."""
    try:
        parts = urlsplit(uri)
    except ValueError:  # a text that only looks like one
        return uri
    container = parts.scheme in ("abfs", "abfss")  # what stands there before the @
    bare = parts if container else parts._replace(netloc=parts.netloc.rpartition("@")[2])
    if parts.scheme in ("http", "https"):  # elsewhere ? is a glob's
        bare = bare._replace(query="")
    return bare.geturl() if bare != parts else uri


def join(folder: str, name: str) -> str:
    """The URI of `name` in `folder`."""
    return f"{folder.rstrip('/')}/{name}"


def absolute(uri: str) -> str:
    """The URI with its scheme, and a local path from its root on."""
    fs, path = open_fs(uri)
    return str(fs.unstrip_protocol(path))


def describe(uri: str) -> StoredObject:
    """Size and version of one object.

    Raises:
        InputError: there is no such object.
        StorageError: storage refused.
    """
    fs, path = open_fs(uri)
    with storage_errors(uri, "read"):
        info = fs.info(path)
        if isinstance(fs, LocalFileSystem):
            return StoredObject(uri, info["size"], str(Path(path).stat().st_mtime_ns))
    version = next((info[key] for key in _VERSION_KEYS if info.get(key) is not None), "")
    return StoredObject(uri, info["size"] or 0, str(version).strip('"'))


def list_files(uri: str, is_data: Callable[[str], bool]) -> list[str]:
    """The URIs of the files that `uri` names, sorted: itself, the matches of a glob, or a folder's data files.

    Folders are searched to any depth for names that `is_data` accepts; in folders and globs, names that begin
    with `_` or `.` are ignored, and everything below a folder with such a name.

    Raises:
        InputError: a file or folder that does not exist.
        StorageError: storage refused.
    """
    fs, path = open_fs(uri)
    with storage_errors(uri, "listed"):
        if fsspec.core.has_magic(path) and not fs.exists(path):
            root = _fixed(path)
            entries = [entry for name, entry in fs.glob(path, detail=True).items() if _visible(name, root)]
        else:
            entries = [fs.info(path)]
        paths = [found for entry in entries for found in _expand(fs, entry, is_data)]
    return sorted(fs.unstrip_protocol(found) for found in paths)


def search_root(uri: str) -> str:
    """The URI of the folder below which `list_files` finds the files of `uri`; of a single file, the file."""
    fs, path = open_fs(uri)
    return str(fs.unstrip_protocol(_fixed(path) if fsspec.core.has_magic(path) else path.rstrip("/")))


def _fixed(path: str) -> str:
    """The folders of a glob before its first mark."""
    return path[: min(path.find(mark) for mark in "*?[" if mark in path)].rpartition("/")[0]


def _expand(fs: Any, entry: dict[str, Any], is_data: Callable[[str], bool]) -> list[str]:
    folder = entry["name"].rstrip("/")
    if entry["type"] != "directory":
        return [entry["name"]]
    return [path for path in fs.find(folder) if is_data(path) and _visible(path, folder)]


def _visible(path: str, root: str) -> bool:
    """Whether no name below `root` begins with `_` or `.`."""
    return not any(name.startswith(("_", ".")) for name in path[len(root) :].split("/"))


def list_names(folder: str) -> list[str]:
    """The names of the files directly in a folder, sorted; none when there is no such folder."""
    fs, path = open_fs(folder)
    with storage_errors(folder, "listed"):
        try:
            entries = fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(PurePosixPath(entry["name"]).name for entry in entries if entry["type"] == "file")


def list_below(folder: str) -> list[str]:
    """The URIs of the files in a folder, to any depth, sorted; none when there is no such folder."""
    fs, path = open_fs(folder)
    with storage_errors(folder, "listed"):
        found = fs.find(path)
    return sorted(fs.unstrip_protocol(name) for name in found)


def names_below(folder: str) -> list[str]:
    """The names of the files in a folder, to any depth and with the folders that they are in, sorted."""
    root = absolute(folder).rstrip("/") + "/"
    return [uri.removeprefix(root) for uri in list_below(folder)]


def open_input(uri: str, access: Literal["random", "sequential"]) -> BinaryIO:
    """Opens for reading; `random` caches nothing (the caller buffers), `sequential` reads ahead in large blocks.

    Raises:
        InputError: there is no such object.
        StorageError: storage refused.
    """
    fs, path = open_fs(uri)
    cache = "none" if access == "random" else "readahead"
    with storage_errors(uri, "read"):
        return cast(BinaryIO, fs.open(path, "rb", cache_type=cache, block_size=BLOCK_BYTES))


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises as `open_input`."""
    fs, path = open_fs(uri)
    with storage_errors(uri, "read"):
        return _content(fs, path)


def _content(fs: Any, path: str) -> bytes:
    # In one piece: s3fs does not try again where one of several pieces at once breaks off.
    return cast(bytes, fs.cat_file(path, **({"max_concurrency": 1} if "s3" in fs.protocol else {})))


@contextmanager
def local_folder(uri: str, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """A folder on the local file system as it is; of another, a copy of the files whose names are `wanted`.

    The copy is removed at the end. Folders below are not looked into.

    Raises:
        InputError: a file went away while it was copied.
        StorageError: storage refused.
    """
    fs, path = open_fs(uri)
    if isinstance(fs, LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="moegen-") as copy:
        for name in filter(wanted, list_names(uri)):
            with storage_errors(join(uri, name), "read"):
                _fetch(fs, join(path, name), str(Path(copy) / name))
        yield Path(copy)


def _fetch(fs: Any, path: str, copy: str) -> None:
    try:
        fs.get_file(path, copy)
    except Exception:
        if "s3" not in fs.protocol:
            raise
        fs.get_file(path, copy, max_concurrency=1)  # goes on where a piece breaks off, as several at once do not


def put_create(uri: str, data: bytes) -> bool:
    """Creates the object with all of `data` at once; False, and nothing changed, when the name has other content.

    Of several writers one wins, and a crash never leaves part of the data at the name. A name that has exactly this
    data already counts as created: where the answer to a request was lost, the request is sent again and meets itself.
    An object store that refuses create-only writes, or is known to ignore them, is asked first whether the name is
    taken: there two writers at the same moment both win.

    Raises:
        StorageError: storage refused.
    """
    fs, path = open_fs(uri)
    with storage_errors(uri, "written"):
        created = _link(Path(path), data) if isinstance(fs, LocalFileSystem) else _pipe_new(fs, uri, path, data)
        return created or (fs.info(path)["size"] == len(data) and _content(fs, path) == data)


def _pipe_new(fs: Any, uri: str, path: str, data: bytes) -> bool:
    # One PUT: object stores honour create-only there, but not all of them when a multipart upload completes.
    one_put = {"chunksize": 5 * GIB} if "s3" in fs.protocol else {}
    if _bucket(uri) in _IGNORE_CONDITIONS and fs.exists(path):
        return False
    try:
        fs.pipe_file(path, data, mode="create", **one_put)
    except PermissionError:
        raise
    except OSError as error:  # FileExistsError, or what a backend makes of 412 Precondition Failed
        if fs.exists(path):
            return False
        if error.errno != errno.ENOSYS:  # 501 Not Implemented: the condition, not the write
            raise
        fs.pipe_file(path, data, **one_put)
    return True


def ask_before_create(uri: str) -> None:
    """The storage at `uri` was found to ignore create-only writes: from now on `put_create` asks it first."""
    _IGNORE_CONDITIONS.add(_bucket(uri))


def asks_before_create(uri: str) -> bool:
    """Whether `put_create` asks this storage first."""
    return _bucket(uri) in _IGNORE_CONDITIONS


def _bucket(uri: str) -> str:
    """Scheme and bucket; filesystem objects will not do, as every thread has its own."""
    return "/".join(uri.split("/")[:3]) if "://" in uri else ""


def put_replace(uri: str, data: bytes) -> None:
    """Creates or replaces the object; readers see the old or the new content, never a mixture.

    Raises:
        StorageError: storage refused.
    """
    fs, path = open_fs(uri)
    with storage_errors(uri, "written"):
        if not isinstance(fs, LocalFileSystem):
            fs.pipe_file(path, data)
            return
        with _written_aside(Path(path), data) as aside:
            aside.replace(path)


def check_writable(folder: str) -> None:
    """Writes a small object and removes it again, to find out before the work and not after.

    Raises:
        StorageError: storage refused.
    """
    probe = join(folder, "_moegen_probe")
    put_replace(probe, b"")
    remove(probe)


def remove(uri: str) -> None:
    """Removes the object, if it is there. Raises `StorageError` when storage refuses."""
    fs, path = open_fs(uri)
    with storage_errors(uri, "removed"):
        try:
            fs.rm_file(path)
        except (FileNotFoundError, NotADirectoryError):
            return


def _link(path: Path, data: bytes) -> bool:
    with _written_aside(path, data) as aside:
        try:
            os.link(aside, path)
        except FileExistsError:
            return False
    return True


@contextmanager
def _written_aside(path: Path, data: bytes) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield aside
    finally:
        aside.unlink(missing_ok=True)
