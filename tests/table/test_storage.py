"""The storage verbs on local paths and on an fsspec filesystem that is none."""

from __future__ import annotations

import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import fsspec
import pytest
from moegen.errors import InputError, SpecError, StorageError
from moegen.storage import (
    check_writable,
    describe,
    join,
    list_files,
    list_names,
    local_folder,
    open_fs,
    public,
    put_create,
    put_replace,
    read_bytes,
    remove,
)


@pytest.fixture(params=["path", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"path": str(tmp_path), "file": f"file://{tmp_path}/", "memory": f"memory://{uuid.uuid4().hex}"}[
        request.param
    ]


def test_create_only_keeps_the_first(folder: str) -> None:
    uri = join(folder, "new/part")
    assert put_create(uri, b"first")
    assert not put_create(uri, b"second")
    assert not put_create(uri, b"other")  # as long as what is there
    assert put_create(uri, b"first")  # as if the request had been sent again
    assert read_bytes(uri) == b"first"
    assert list_names(join(folder, "new")) == ["part"]


def test_replace_and_remove(folder: str) -> None:
    uri = join(folder, "new/manifest")
    put_replace(uri, b"one")
    put_replace(uri, b"two")
    assert read_bytes(uri) == b"two"
    remove(uri)
    remove(uri)
    assert list_names(folder) == list_names(join(folder, "new")) == []


def test_list_names_knows_files_only_and_no_folder_is_no_files(folder: str) -> None:
    put_replace(join(folder, "out/b"), b"")
    put_replace(join(folder, "out/a"), b"")
    put_replace(join(folder, "out/sub/c"), b"")
    assert list_names(join(folder, "out")) == ["a", "b"]
    assert list_names(join(folder, "nothing")) == []
    assert [uri.rpartition("/")[2] for uri in list_files(join(folder, "out"), lambda path: True)] == ["a", "b", "c"]


def test_a_new_version_has_another_description(folder: str) -> None:
    uri = join(folder, "object")
    put_replace(uri, b"one")
    first = describe(uri)
    put_replace(uri, b"two")
    assert first.size_bytes == describe(uri).size_bytes == 3
    assert first.version != describe(uri).version


def test_what_is_missing_is_an_input_error(folder: str) -> None:
    uri = join(folder, "nothing")
    for verb in (describe, read_bytes, lambda uri: list_files(uri, lambda path: True)):
        with pytest.raises(InputError, match="nothing: not found"):
            verb(uri)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://me:secret@bucket/a?b", "s3://bucket/a?b"),
        ("https://secret@host/a.csv?X-Signature=secret", "https://host/a.csv"),
        ("abfss://container@account/a", "abfss://container@account/a"),
        ("/local/a@b?c", "/local/a@b?c"),
        ("http://[", "http://["),
    ],
)
def test_what_may_be_told_of_a_uri(uri: str, shown: str) -> None:
    assert public(uri) == shown


def test_unknown_schemes_are_specification_errors() -> None:
    with pytest.raises(SpecError, match=r"nosuch://x: .*nosuch"):
        open_fs("nosuch://x")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        check_writable(str(tmp_path / "file" / "sub"))


def test_of_many_writers_at_once_one_wins(tmp_path: Path) -> None:
    uri, start = str(tmp_path / "part"), Barrier(8)

    def write(writer: int) -> bool:
        start.wait()
        return put_create(uri, bytes([writer]) * 1_000_000)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    assert read_bytes(uri) == bytes([won.index(True)]) * 1_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_a_killed_writer_leaves_no_half_file_at_the_name(tmp_path: Path) -> None:
    """The process dies after writing its data and before the data has a name."""
    code = """if True:
        import os, sys
        from moegen.storage import put_create
        os.link = lambda *paths: os._exit(9)
        put_create(sys.argv[1], b"x" * 10_000)
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out" / "part"], check=False)
    assert done.returncode == 9
    assert len(list((tmp_path / "out").iterdir())) == 1  # what was written aside, hidden
    assert list_files(str(tmp_path / "out"), lambda path: True) == []
    assert put_create(str(tmp_path / "out" / "part"), b"whole")


def test_a_local_folder_is_itself_and_a_remote_one_a_copy_of_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"a")
    for uri in (str(tmp_path), tmp_path.as_uri()):
        with local_folder(uri, lambda name: False) as folder:
            assert folder == tmp_path
    fs = fsspec.filesystem("memory")
    for name in ("a.json", "b.bin", "below/c.json"):
        fs.pipe_file(f"/aside/{name}", name.encode())
    with local_folder("memory://aside", lambda name: name.endswith(".json")) as folder:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.json": b"a.json"}
    assert not folder.exists()
