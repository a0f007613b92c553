"""The probe over sizes that take no time: what it measures here is true of nothing, but all of it is measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from moegen.cli import main
from moegen.errors import MoegenError, StorageError
from moegen.plan.machine import Machine, Rates
from moegen.run import machine_rates, timing
from moegen.run.probe import probe

from benchmarks.gpu_suite.probe_case import SMALL
from tests.tiny import tiny_checkpoint


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module, name, value in SMALL:
        monkeypatch.setattr(module, name, value)
    detect = Machine.detect  # one thread: beside other work, two would only wait for each other
    monkeypatch.setattr(Machine, "detect", lambda device="auto": replace(detect(device), cores=1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_everything_that_a_cpu_needs_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--device", "cpu", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    rates = Rates.from_mapping(printed["rates"])
    assert rates.measured
    (kept,) = (tmp_path / "cache" / "moegen").glob("machine-*.json")
    assert json.loads(kept.read_text()) == printed["rates"]
    kinds = {"bfloat16", "float32"} if printed["dots_bf16"] else {"bfloat16" if printed["native_bf16"] else "float32"}
    assert rates.linear_flops_per_s.keys() == kinds
    assert all(linear.keys() == {64 * 64, 128 * 128} for linear in rates.linear_flops_per_s.values())
    assert rates.expert_flops_per_s["bfloat16"].keys() == {3 * 64 * 32, 3 * 64 * 64}
    assert rates.expert_flops_per_s["bfloat16"][3 * 64 * 32].keys() == {1, 4, 16}
    assert rates.disk_bytes_per_s.keys() == {1, 2, 4}
    assert rates.runtime_bytes is not None
    assert 200 << 20 < rates.runtime_bytes < 4 << 30
    not_measured = {name for name, value in printed["rates"].items() if value is None}
    assert not_measured == {
        "h2d_bytes_per_s", "d2h_bytes_per_s", "dram_beside_h2d_bytes_per_s", "h2d_beside_dram_bytes_per_s",
        "gather_bytes_per_s", "device_decode_bytes_per_s",
    }  # fmt: skip


def test_the_disk_is_measured_by_the_models_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    monkeypatch.setattr(machine_rates, "_DISK_BYTES", 1 << 16)
    monkeypatch.setattr(machine_rates, "READ_BYTES", 1 << 14)
    monkeypatch.setattr(machine_rates, "tempfile", None)  # nothing else is written
    assert set(machine_rates.disk_bytes_per_s(str(folder), (1, 2))) == {1, 2}
    monkeypatch.setattr(machine_rates, "READ_BYTES", 1 << 40)
    assert not machine_rates._checkpoint_files(str(folder)), "files shorter than one request say nothing"


def test_a_measurement_that_fails_says_what_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine_rates, "disk_bytes_per_s", broken)
    with pytest.raises(MoegenError, match=r"could not measure direct reads of a temporary file: .*No space left"):
        probe("cpu")

    def refused(*arguments: object) -> None:
        raise StorageError("/models/a: cannot be read at byte 5")

    monkeypatch.setattr(machine_rates, "disk_bytes_per_s", refused)
    with pytest.raises(StorageError, match=r"direct reads of /models: /models/a: cannot be read at byte 5"):
        probe("cpu", "/models")


def test_rounds_go_over_everything_before_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what disturbs the machine for a while disturbs one measurement of each."""
    monkeypatch.setattr(timing, "_ROUNDS", 3)
    found = {"a": iter([1.0, 90.0, 3.0]), "b": iter([[4.0, 1.0], [5.0, 70.0], [6.0, 2.0]])}
    order: list[str] = []

    def timed(name: str) -> Any:
        order.append(name)
        return next(found[name])

    timings = {"one": {1: lambda: timed("a")}, "passes": lambda: timed("b")}
    assert timing.usual(timings) == {"one": {1: 3.0}, "passes": [5.0, 2.0]}
    assert order == ["a", "b"] * 3
