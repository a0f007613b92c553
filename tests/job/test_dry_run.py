"""What a dry run says beside what the job then does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from moegen.errors import SpecError
from moegen.job.dry_run import DryRun, dry_run
from moegen.job.worker import run_job
from moegen.plan.machine import Machine
from moegen.spec import JobSpec

from tests.engine.test_predict import MACHINE
from tests.tiny import GEOMETRY, tiny_checkpoint

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def mapping(model: Path, folder: Path, rows: list[dict[str, Any]], **sections: Any) -> dict[str, Any]:
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = {
        "input": {"uri": str(folder / "in.jsonl")},
        "prompt": {"column": "prompt"},
        "model": {"uri": str(model)},
        "sampling": {"max_tokens": 6},
        "output": {"uri": str(folder / "out")},
        "errors": {"max_error_rate": 1},
    }
    return {**base, **sections}


MIXED = [
    *({"id": i, "prompt": f"Ticket {i % 7}", "max_tokens": 3 if i == 2 else None} for i in range(20)),
    {"id": 20, "prompt": None},
    {"id": 21, "prompt": ""},
    {"id": 22, "prompt": "x" * 600},
    {"id": 23, "prompt": 5},
    {"id": 24, "prompt": "x", "max_tokens": -1},
]
COLUMNS = {"sampling": {"max_tokens": 6, "param_columns": ["max_tokens"]}}


def test_it_says_what_the_job_then_does(model: Path, tmp_path: Path) -> None:
    spec = JobSpec.from_mapping(mapping(model, tmp_path, MIXED, **COLUMNS, output_schema=SCHEMA))
    told = dry_run(spec)
    assert not (tmp_path / "out").exists()
    manifest = run_job(spec)
    table = pq.read_table(next((tmp_path / "out").glob("part-*.parquet")))
    rows = table.to_pylist()
    answered = [row for row in rows if row["completion_tokens"] is not None]
    ran = [row for row in answered if row["dedup_of"] is None]
    assert (told.rows, told.files, told.ready, told.runs) == (len(rows), 1, len(answered), len(ran)) == (25, 1, 20, 8)
    assert told.statuses == {s: n for s, n in manifest.statuses.items() if s in told.statuses}
    assert sum(told.statuses.values()) == 5
    assert told.errors == {"bad_prompt_type": 1, "empty_prompt": 1, "invalid_params": 1, "null": 1, "too_long": 1}
    assert told.prompt_tokens == sum(row["prompt_tokens"] for row in ran)
    assert told.longest_prompt_tokens == max(row["prompt_tokens"] for row in ran)
    assert told.most_completion_tokens == 7 * 6 + 3 >= manifest.completion_tokens
    assert told.repeated == manifest.dedup_rows == 20 - 7 - 1  # seven texts; one of them once with other parameters
    assert list(told.columns) == table.schema.names
    assert told.columns["output_json"] == "struct<n: int64>"
    assert told.estimate is None or told.estimate.rows == 8


def test_truncated_rows_and_several_answers(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 600}, {"prompt": "short"}]
    sections = {
        "prompt": {"column": "prompt", "on_too_long": "truncate_left"},
        "sampling": {"max_tokens": 6, "n": 3, "temperature": 1},
    }
    told = dry_run(JobSpec.from_mapping(mapping(model, tmp_path, rows, **sections)))
    assert (told.ready, told.truncated, told.longest_prompt_tokens) == (2, 1, GEOMETRY["max_position_embeddings"] - 6)
    assert (told.answers, told.most_completion_tokens) == (6, 36)
    assert told.columns["output"] == "list<item: string>"


def test_classify_generates_nothing(model: Path, tmp_path: Path) -> None:
    sections = {"task": "classify", "choices": ["bug", "question"]}
    told = dry_run(JobSpec.from_mapping(mapping(model, tmp_path, MIXED[:20], **sections)))
    assert (told.ready, told.answers, told.most_completion_tokens) == (20, 0, 0)
    assert told.columns["label_probs"] == "list<item: double>"


def test_the_estimate_is_the_planners(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "detect", lambda device: MACHINE)
    few = dry_run(JobSpec.from_mapping(mapping(model, tmp_path, MIXED[:20], dedup="off")))
    many = dry_run(JobSpec.from_mapping(mapping(model, tmp_path, MIXED[:20] * 40, dedup="off")))
    assert few.estimate is not None
    assert many.estimate is not None
    assert many.repeated == 800 - 7
    assert 0 < few.estimate.seconds < many.estimate.seconds
    assert "tokens/s, if every answer is as long as it may be" in many.describe()
    none = dry_run(JobSpec.from_mapping(mapping(model, tmp_path, [{"prompt": None}])))
    assert none.estimate is None
    assert "no row would run" in none.describe()


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"output_schema": {"type": "strin"}}, "output_schema: cannot be compiled"),
        ({"prompt": {"column": "promt"}}, "did you mean 'prompt'"),
        ({}, "a result column the name 'status'"),
    ],
)
def test_it_ends_as_the_job_would(model: Path, tmp_path: Path, sections: dict[str, Any], told: str) -> None:
    rows = [{"prompt": "a", "status": "open"}]
    with pytest.raises(SpecError, match=told):
        dry_run(JobSpec.from_mapping(mapping(model, tmp_path, rows, **sections)))


def test_the_command_needs_no_torch_and_shows_no_row(model: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(mapping(model, tmp_path, [{"prompt": "SECRET"}, {"prompt": None}])))
    code = "import sys; sys.modules['torch'] = None; from moegen.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "run", "--dry-run", str(job)]
    text = subprocess.run(command, capture_output=True, text=True)
    assert text.returncode == 0, text.stderr
    assert "2 rows in 1 file: 1 would be answered, 1 skipped_null (1 null)" in text.stdout
    assert "prompts   6 tokens, 6 the longest; 0 cut" in text.stdout
    assert "output: string" in text.stdout
    assert "SECRET" not in text.stdout + text.stderr
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True).stdout)
    assert found.keys() == DryRun.__dataclass_fields__.keys()
    assert (found["rows"], found["prompt_tokens"]) == (2, 6)
    assert not (tmp_path / "out").exists()
