"""The worker's small parts: ahead, digest, allowed URIs, progress, device lock."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from moegen.errors import CheckpointError, Interrupted, SpecError
from moegen.job.ahead import ahead
from moegen.job.allowed import AllowedUris
from moegen.job.device_lock import device_lock
from moegen.job.digest import model_digest
from moegen.job.progress import Meter, Progress
from moegen.row import RowError, RowResult, Status
from moegen.spec import JobSpec
from moegen.table.part import Totals
from safetensors.numpy import save_file

# --- ahead ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_ahead_keeps_items_and_order(depth: int) -> None:
    assert list(ahead(iter(range(20)), depth)) == list(range(20))
    assert list(ahead([], depth)) == []


def test_ahead_works_in_the_background_but_no_further_than_depth() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for item in range(10):
            made.append(item)
            yield item

    with closing(ahead(items(), 3)) as stream:
        assert next(stream) == 0
        deadline = time.monotonic() + 5
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]  # the one taken, and three more


@pytest.mark.parametrize("depth", [0, 2])
def test_ahead_raises_in_place(depth: int) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("row 2")

    stream = ahead(items(), depth)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="row 2"):
        next(stream)


def test_closing_ahead_ends_its_thread_and_its_source() -> None:
    closed = []

    def items() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    with closing(ahead(items(), 2)) as stream:
        next(stream)
    assert closed == [True]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


# --- digest ---------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, weights: np.ndarray) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "x", "hidden_size": 8}')
    save_file({"a": weights, "b": weights}, folder / "model.safetensors")
    return model_digest(str(folder))


def test_digest_follows_what_the_model_is(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((1000, 1000), dtype=np.float32)
    first = checkpoint(tmp_path / "a", weights)
    assert checkpoint(tmp_path / "b", weights) == first  # another place
    assert checkpoint(tmp_path / "b", weights * np.float32(1.001)) != first  # trained on
    assert checkpoint(tmp_path / "b", weights[:999]) != first
    assert checkpoint(tmp_path / "b", np.ascontiguousarray(weights.T)) != first
    assert model_digest((tmp_path / "a").as_uri()) == first
    (tmp_path / "a/config.json").write_text('{"hidden_size": 8,\n "model_type": "x"}')
    assert model_digest(str(tmp_path / "a")) == first  # only written differently
    (tmp_path / "a/config.json").write_text('{"hidden_size": 9, "model_type": "x"}')
    assert model_digest(str(tmp_path / "a")) != first


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors files"):
        model_digest(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        model_digest(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        model_digest(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        model_digest(str(tmp_path))


# --- allowed URIs ---------------------------------------------------------------------------------------------------


def job(input_uri: str, output: str = "s3://bucket/out", model: str = "s3://bucket/model") -> JobSpec:
    return JobSpec.from_mapping(
        {
            "input": {"uri": input_uri},
            "prompt": {"column": "p"},
            "model": {"uri": model},
            "sampling": {"max_tokens": 8},
            "output": {"uri": output},
        }
    )


REMOTE = AllowedUris(inputs=("s3://bucket/in/",), outputs=("s3://bucket/out",), models=("s3://bucket/model",))


@pytest.mark.parametrize("uri", ["s3://bucket/in", "s3://bucket/in/a.parquet", "s3://bucket/in/*.parquet"])
def test_allowed(uri: str) -> None:
    REMOTE.check(job(uri))


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/inside/a.parquet",
        "s3://bucket/in*/a.parquet",
        "s3://bucket/i",
        "s3://other/in/a.parquet",
        "gs://bucket/in/a.parquet",
        "s3://bucket/in/../secret/a.parquet",
        "s3://bucket/in/%2e%2e/secret/a.parquet",
        "s3://me:secret@bucket/in/a.parquet",
        "simplecache::s3://bucket/in/a.parquet",
        "/etc/passwd",
        "file:///etc/passwd",
        "file:/etc/passwd",
        "local:///etc/passwd",
        "S3://bucket/in/a.parquet",
        "FILE:///etc/passwd",
        "s3://bucket/in/{{ ds }}/../../secret",
        "s3://bucket/in/\t../secret/a.parquet",
        "s3://bucket/in\\..\\secret",
        "https://bucket/in/a.parquet",
        "s3:/bucket/in/a.parquet",
        "data:text/csv,prompt",
        "simplecache://bucket/in/a.parquet",
        "reference://bucket/in",
    ],
)
def test_not_allowed(uri: str) -> None:
    with pytest.raises(SpecError, match=r"^input\.uri: ") as refusal:
        REMOTE.check(job(uri))
    assert "secret@" not in str(refusal.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:secret@bucket/a",
        "https://secret@host/a.csv",
        "zip://*::s3://key:secret@bucket/a.zip",
        "simplecache::s3://bucket/a",
        "http://h/in/../a.csv",
        "http://h/in/%2E%2e/a.csv",
        "http://[",
        "s3://bucket/a\0.csv",
        "s3://bucket/\u202ea.csv",
    ],
)
def test_never_allowed(uri: str) -> None:
    with pytest.raises(SpecError, match=r"^input\.uri: ") as refusal:
        AllowedUris().check(job(uri))
    assert "secret" not in str(refusal.value)


def test_outputs_and_models_have_their_own_prefixes() -> None:
    with pytest.raises(SpecError, match=r"^output\.uri"):
        REMOTE.check(job("s3://bucket/in/a", output="s3://bucket/in"))
    with pytest.raises(SpecError, match=r"^model\.uri"):
        REMOTE.check(job("s3://bucket/in/a", model="s3://bucket/in"))
    AllowedUris(inputs=("s3://bucket/in",)).check(job("s3://bucket/in/a", output="/anywhere", model="/anywhere"))


def test_local_links_and_climbs_are_resolved(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "secret"
    inside.mkdir()
    outside.mkdir()
    (outside / "a.csv").touch()
    (inside / "b.csv").touch()
    (inside / "link").symlink_to(outside)
    (inside / "c.csv").symlink_to(outside / "a.csv")
    allowed = AllowedUris(inputs=(str(inside),))
    for good in (f"{inside}/b.csv", f"{inside}/b*.csv", f"{inside.as_uri()}/b.csv", f"{inside}/../in/b.csv"):
        allowed.check(job(str(good)))
    for bad in ("../secret/a.csv", "link/a.csv", "c.csv", "*.csv", "*/a.csv", "**", ""):  # the last is the folder
        with pytest.raises(SpecError, match="outside what this service allows"):
            allowed.check(job(f"{inside}/{bad}"))
    AllowedUris(inputs=(inside.as_uri(),)).check(job(f"{inside}/b.csv"))
    (inside / "c.csv").unlink()
    (inside / "link").unlink()
    (inside / "d.csv").symlink_to(inside / "b.csv")
    for good in (inside, inside.as_uri(), f"{inside}/*"):
        allowed.check(job(str(good)))


# --- progress -------------------------------------------------------------------------------------------------------


def test_meter_counts_resumed_rows_but_rates_only_new_ones() -> None:
    clock, told = [100.0], list[Progress]()
    meter = Meter(told.append, now=lambda: clock[0])
    meter.enter("starting")
    meter.resume(40, Totals(7, {"ok": 7}, 30, 10), Totals(3, {"length": 1, "ok": 2}, 20, 10))
    meter.follow_journal(lambda: 5)
    meter.enter("running")
    for _ in range(10):
        meter.add_row(RowResult(0, Status.OK, prompt_tokens=3, completion_tokens=2))
    meter.add_row(RowResult(0, Status.SKIPPED_NULL))
    meter.add_committed(8)
    clock[0] += 2.0
    meter.add_pass(generated_tokens=20)
    assert told[0] == Progress()
    assert told[-1] == Progress(
        stage="running",
        rows_done=21,
        rows_total=40,
        rows_committed=15,
        rows_saved=20,
        rows_per_s=5.5,
        tokens_per_s=10.0,
        eta_s=3.5,
        prompt_tokens=80,
        completion_tokens=40,
        statuses={"length": 1, "ok": 19, "skipped_null": 1},
    )


def test_meter_tells_why_rows_have_no_answer_and_how_it_went() -> None:
    clock, told = [5.0], list[Progress]()
    meter = Meter(told.append, now=lambda: clock[0])
    meter.planned({"threads": 2})
    meter.resume(40, Totals(10, {"error": 10}, errors={"malformed_json": 9, "bad_prompt_type": 1}))
    meter.enter("running")
    for code in ("malformed_json", "too_long"):
        meter.add_row(RowResult(0, Status.ERROR, error=RowError(code, "why", "read")))
    clock[0] += 2.0
    meter.add_pass(generated_tokens=20)
    detail = told[-1].detail
    assert detail.errors == {"bad_prompt_type": 1, "malformed_json": 10, "too_long": 1}
    assert (detail.plan, detail.samples) == ({"threads": 2}, ((0.0, 10, 0), (2.0, 12, 20)))
    assert "detail" not in told[-1].to_mapping()


def test_rates_forget_the_distant_past() -> None:
    clock, told = [0.0], list[Progress]()
    meter = Meter(told.append, now=lambda: clock[0])
    meter.enter("running")
    for second in range(600):
        clock[0] += 1.0
        meter.add_pass(generated_tokens=100 if second < 300 else 10)
    assert told[-1].tokens_per_s == pytest.approx(10)
    assert told[250].tokens_per_s == pytest.approx(100)
    assert told[-1].eta_s is None


# --- device lock ----------------------------------------------------------------------------------------------------


def test_the_device_lock_waits_for_another_process_and_outlives_none(tmp_path: Path) -> None:
    path = tmp_path / "device.lock"
    code = (
        "import sys, time; from pathlib import Path; from moegen.job.device_lock import device_lock\n"
        "with device_lock(Path(sys.argv[1]), lambda: False): print('taken', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        asked = iter([False, False, True])
        with pytest.raises(Interrupted), device_lock(path, lambda: next(asked)):
            pass
        other.kill()
    with device_lock(path, lambda: False):
        pass
