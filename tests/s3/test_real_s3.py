"""moegen on a real S3 server: as it is, behind faults, without conditional writes, with credentials that expire."""

from __future__ import annotations

import datetime
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import s3fs
import yaml
from moegen.cli import main
from moegen.errors import Interrupted
from moegen.job.worker import run_job
from moegen.storage import describe, list_names, open_fs, open_input, put_create, put_replace, read_bytes, remove
from moegen.table.lease import Lease
from moegen.units import MIB

from tests.s3.conftest import ROWS, Store, Work, table
from tests.s3.fault_proxy import FAULTS, LOST_ANSWER, FaultProxy

REPOSITORY = Path(__file__).parents[2]
Behind = Callable[..., FaultProxy]


def test_create_only_keeps_what_is_there_and_one_of_many_writers_wins(store: Store) -> None:
    uri, start = f"{store.bucket}/part", Barrier(8)

    def write(writer: int) -> bool:
        start.wait()
        return put_create(uri, bytes([writer]) * 100_000)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    assert read_bytes(uri) == bytes([won.index(True)]) * 100_000
    assert put_create(uri, read_bytes(uri))  # a request that is sent again
    assert not put_create(uri, b"another")


def test_a_commit_is_one_put_however_large(store: Store) -> None:
    uri, data = f"{store.bucket}/large", bytes(110 * MIB)  # s3fs alone would upload this in several pieces
    assert put_create(uri, data)
    assert "-" not in describe(uri).version  # as the version of a multipart upload has
    assert not put_create(uri, data[1:])
    assert describe(uri).size_bytes == len(data)


def test_wrong_credentials_end_with_69_and_say_what_to_do(
    store: Store, work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(json.loads(work.spec(store.bucket).to_json())))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    s3fs.S3FileSystem.clear_instance_cache()
    assert main(["run", str(tmp_path / "job.yaml")]) == 69
    told = capfd.readouterr().err
    assert "check credentials and permissions" in told
    assert "wrong-secret" not in told


def test_a_job_is_as_on_local_files(store: Store, work: Work) -> None:
    manifest = run_job(work.spec(store.bucket))
    assert (manifest.rows, manifest.create_only) == (ROWS, True)
    assert table(f"{store.bucket}/out").equals(work.expected)
    assert run_job(work.spec(store.bucket)).resumed_rows == ROWS


def test_of_eight_runners_at_the_same_moment_one_has_the_lease(store: Store) -> None:
    start = Barrier(8)

    def contend(number: int) -> bool:
        with Lease(f"{store.bucket}/out/_batch/key", 4.0) as lease:
            start.wait()
            try:
                lease.take()
            except Interrupted:
                return False
            time.sleep(5.0)  # until the others have seen a sign of life
            lease.check()
            return True

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(contend, range(8))) == [False] * 7 + [True]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_verb_gets_through_every_fault(
    store: Store, behind: Behind, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")  # botocore waits long; so s3fs's turn comes too
    proxy = behind(share=0.3, seed=3, faults=(fault,))
    data = os.urandom(200_000)
    for number in range(2):
        uri = f"{store.bucket}/folder/{number}"
        assert put_create(uri, data)
        assert not put_create(uri, b"another")
        put_replace(uri, data[:-1])
        assert read_bytes(uri) == data[:-1]
        assert describe(uri).size_bytes == len(data) - 1
        with open_input(uri, "random") as file:
            file.seek(1000)
            assert file.read(50_000) == data[1000:51_000]
        assert list_names(f"{store.bucket}/folder") == [str(number)]
        remove(uri)
    assert proxy.counts[fault] > 2


def test_behind_faults_the_table_is_the_same(store: Store, behind: Behind, work: Work) -> None:
    spec = work.spec(store.bucket)
    proxy = behind(share=0.05, seed=11)
    manifest = run_job(spec)
    spoilt = sum(count for fault, count in proxy.counts.items() if fault)
    assert spoilt > 3, proxy.counts
    assert (manifest.rows, manifest.create_only) == (ROWS, True)
    assert all(part.sha256 for part in manifest.parts)  # of its own parts a run knows the digest, whatever was lost
    assert table(f"{store.bucket}/out").equals(work.expected)


def test_a_write_whose_answer_is_lost_is_known_as_its_own(store: Store, behind: Behind) -> None:
    proxy = behind(share=0.4, seed=5, faults=(LOST_ANSWER,))
    for number in range(6):
        assert put_create(f"{store.bucket}/{number}", b"mine %d" % number)
        assert read_bytes(f"{store.bucket}/{number}") == b"mine %d" % number
    assert proxy.counts[LOST_ANSWER] > 3
    with Lease(f"{store.bucket}/out/_batch/key", 60.0) as lease:
        lease.take()
        assert (lease.epoch, lease.exclusive) == (1, True)


def test_without_conditional_writes_the_fallback_is_told(
    store: Store, behind: Behind, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    spec = work.spec(store.bucket)
    behind(share=0.0, unconditional=True)
    with caplog.at_level(logging.WARNING):
        manifest = run_job(spec)
    assert "ignores create-only writes" in caplog.text
    assert not manifest.create_only
    assert json.loads(read_bytes(f"{store.bucket}/out/_manifest.json"))["create_only"] is False
    assert table(f"{store.bucket}/out").equals(work.expected)


def test_a_job_outlives_its_credentials(
    store: Store, work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A credential process gives keys that expire; those of the job's beginning are revoked in its middle."""
    first, second = store.ceph.new_keys(), store.ceph.new_keys()
    spec = work.spec(store.bucket)
    asked = tmp_path / "asked"
    script = tmp_path / "credentials.py"
    expires = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)).isoformat()
    answers = [
        {"Version": 1, "AccessKeyId": keys.access_key, "SecretAccessKey": keys.secret_key, "Expiration": expires}
        for keys in (first, second)
    ]
    script.write_text(
        f"import json, pathlib\nprint(json.dumps({answers!r}[pathlib.Path({str(tmp_path / 'second')!r}).exists()]))\n"
        f"pathlib.Path({str(asked)!r}).open('a').write('x')"
    )
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {sys.executable} {script}\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    uri = f"{store.bucket}/object"
    put_replace(uri, b"with the first keys")
    fs, _ = open_fs(uri)

    (tmp_path / "second").touch()
    store.ceph.revoke(first)
    assert read_bytes(uri) == b"with the first keys"
    assert open_fs(uri)[0] is fs  # the same session, which asked again
    assert run_job(spec).rows == ROWS


@pytest.mark.skipif(
    os.environ.get("MOEGEN_TORTURE") != "full", reason="a minute and a half of CI's twenty: MOEGEN_TORTURE=full runs it"
)
def test_killed_jobs_behind_faults_end_with_the_right_table(store: Store, behind: Behind, tmp_path: Path) -> None:
    """benchmarks/torture.py on this server, at a size that fits here."""
    proxy = behind(share=0.05, seed=2)
    counts = {"kills": 2, "rows": 150, "answer-tokens": 8}
    arguments = [f"--{name}={count}" for name, count in counts.items()]
    command = [sys.executable, "-m", "benchmarks.torture", *arguments, f"--storage={store.bucket}/torture"]
    run = subprocess.run(
        [*command, f"--out={tmp_path}/torture.json"], capture_output=True, text=True, cwd=REPOSITORY, timeout=500
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "torture.json").read_text())
    assert [found[name]["kills"] for name in ("greedy", "sampled")] == [1, 1]
    assert all(found[name]["tables_equal"] for name in ("greedy", "sampled"))
    assert all(found[name]["within_the_window"] for name in ("greedy", "sampled"))
    assert sum(proxy.counts.values()) - proxy.counts[""] > 10
