"""The corpus of `hostile.py`: every case ends as it says, in words and not in a traceback, and no row is lost."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from moegen.cli import main

from tests.job.hostile import CORPUS, Hostile
from tests.tiny import tiny_checkpoint

_LONGEST = 1500  # characters of a message


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job_file(case: Hostile, folder: Path, model: Path) -> Path:
    (folder / "in").mkdir()
    for name, build in case.files.items():
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(build())
    path = folder / "job.yaml"
    path.write_bytes(case.job() if case.job is not None else yaml.safe_dump(specification(case, model)).encode())
    return path


def specification(case: Hostile, model: Path) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "input": {"uri": "in"},
        "prompt": {"column": "prompt"},
        "model": {"uri": str(model)},
        "sampling": {"max_tokens": 2},
        "output": {"uri": "out"},
        "errors": {"max_error_rate": 1},
    }
    for name, value in case.spec.items():
        *sections, last = name.split(".")
        inner = spec
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return spec


def ends(case: Hostile, said: Any) -> None:
    """Whether a refusal is one: a line of readable length with what was expected in it."""
    line = said.err.splitlines()[-1]  # before it, a run shows its progress
    assert case.said in line
    assert "Traceback" not in said.err
    assert "internal error" not in line
    assert len(line) < _LONGEST


def test_the_corpus_is_large_and_its_names_differ() -> None:
    assert len(CORPUS) >= 120
    assert max(Counter(case.name for case in CORPUS).values()) == 1


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name.replace(" ", "-"))
def test_a_dry_run(case: Hostile, place: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = job_file(case, place, model)
    code = main(["run", "--dry-run", "--json", str(path)])
    said = capsys.readouterr()
    if case.exit_code and not case.run:
        assert code == case.exit_code, said.err
        ends(case, said)
        return
    if case.exit_code == 0:
        assert code == 0, said.err
        told = json.loads(said.out)
        found = {"ready": told["ready"]} if told["ready"] else {}
        assert {**found, **told["statuses"]} == case.rows
        assert told["rows"] == sum(case.rows.values())
    assert not (place / "out").exists()


@pytest.mark.parametrize("case", [case for case in CORPUS if case.run], ids=lambda case: case.name.replace(" ", "-"))
def test_a_run(case: Hostile, place: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = job_file(case, place, model)
    code = main(["run", "--json", str(path)])
    said = capsys.readouterr()
    assert code == case.exit_code, said.err
    if case.exit_code:
        ends(case, said)
        return
    table = pa.concat_tables(pq.read_table(part) for part in sorted(Path("out").glob("part-*.parquet")))
    prefix = case.spec.get("output.prefix", "")
    assert table[f"{prefix}row_index"].to_pylist() == list(range(sum(case.rows.values())))
    statuses = Counter(table[f"{prefix}status"].to_pylist())
    answered = sum(statuses.pop(status, 0) for status in ("ok", "length"))
    assert (answered, statuses) == (case.rows.get("ready", 0), {k: v for k, v in case.rows.items() if k != "ready"})
    assert json.loads(said.out)["rows"] == sum(case.rows.values())
    assert Path("out/_SUCCESS").exists()
