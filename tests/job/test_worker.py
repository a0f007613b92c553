"""Whole jobs over a tiny checkpoint: tables in, tables out."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moegen.errors import BudgetError, CheckpointError, Interrupted, SpecError
from moegen.job.progress import Progress
from moegen.job.worker import run_job
from moegen.spec import JobSpec
from moegen.table.manifest import Manifest

from tests.tiny import GEOMETRY, tiny_checkpoint

ROWS = 300
ANY_ERRORS = {"max_error_rate": 1}
ANSWERED = "ok|length"  # which of the two is the model's affair


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def spec(model: Path, table: Path, output: Path, /, **sections: Any) -> JobSpec:
    base: dict[str, Any] = {
        "input": {"uri": str(table)},
        "prompt": {"column": "prompt"},
        "model": {"uri": str(model)},
        "sampling": {"max_tokens": 6},
        "output": {"uri": str(output), "rows_per_part": 64},
    }
    return JobSpec.from_mapping({name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}})


def read(output: Path) -> list[dict[str, Any]]:
    assert (output / "_SUCCESS").exists()
    return pa.concat_tables(pq.read_table(part) for part in sorted(output.glob("part-*.parquet"))).to_pylist()


def seen(row: dict[str, Any]) -> str:
    """Status and error code, with the two ways in which a row can be answered as one."""
    status = ANSWERED if row["status"] in ANSWERED.split("|") else row["status"]
    return f"{status} {row['error']['code']}" if row["error"] else status


def check_answers(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        answered = seen(row) == ANSWERED
        assert (row["output"] is not None) == (row["status"] == "ok"), row
        assert (row["output_raw"] is not None) == (row["status"] == "length"), row
        assert row["finish_reason"] == {"ok": "stop", "length": "length"}.get(row["status"])
        assert (row["completion_tokens"] is not None) == answered
        assert not answered or 1 <= row["completion_tokens"] <= 6
        assert not answered or row["prompt_tokens"] >= 1


def jsonl_line(index: int) -> tuple[str, str]:
    """One line of the 300-row table, and what must become of it."""
    row: dict[str, Any] = {"id": index // 2, "prompt": f"Ticket {index}: my invoice is wrong", "params": None}
    match index % 12:
        case 1:
            return json.dumps({**row, "prompt": None}), "skipped_null"
        case 2:
            return json.dumps({**row, "prompt": ""}), "skipped_null empty_prompt"
        case 3:
            return json.dumps({**row, "prompt": 42}), "error bad_prompt_type"
        case 4:
            return json.dumps({**row, "prompt": ["a", {"b": 1}]}), "error bad_prompt_type"
        case 5:
            return json.dumps({**row, "prompt": "😀👩‍👩‍👧 naïve €"}, ensure_ascii=False), ANSWERED
        case 6:
            return json.dumps({**row, "prompt": "half \ud83d of it"}), "error invalid_text"
        case 7:
            return json.dumps({**row, "params": {"temperature": -1}}), "invalid_params invalid_params"
        case 8:
            return json.dumps({**row, "params": {"max_token": 3}}), "invalid_params invalid_params"
        case 9:
            return json.dumps({**row, "params": {"max_tokens": 2, "temperature": 0.7, "seed": index}}), ANSWERED
        case 10 if index > 150:
            return json.dumps({**row, "prompt": "x" * 100_000}), "too_long too_long"
        case 11 if index > 150:
            return json.dumps(row)[:-1], "error malformed_json"
    return json.dumps(row), ANSWERED


def test_jsonl_table_with_everything_that_can_be_wrong(model: Path, tmp_path: Path) -> None:
    lines = [jsonl_line(index) for index in range(ROWS)]
    (tmp_path / "in.jsonl").write_text("\n".join(line for line, _ in lines), encoding="utf-8")
    told: list[Progress] = []
    sampling = {"max_tokens": 6, "params_column": "params"}
    job = spec(model, tmp_path / "in.jsonl", tmp_path / "out", sampling=sampling, errors=ANY_ERRORS)
    manifest = run_job(job, report=told.append)

    rows = read(tmp_path / "out")
    assert [row["row_index"] for row in rows] == list(range(ROWS))
    assert [seen(row) for row in rows] == [expected for _, expected in lines]
    assert [row["id"] for row in rows if "malformed_json" not in seen(row)] == [
        index // 2 for index, (_, expected) in enumerate(lines) if "malformed_json" not in expected
    ]
    check_answers(rows)
    assert (manifest.rows, manifest.statuses) == (ROWS, Counter(row["status"] for row in rows))
    own = [row for row in rows if row["dedup_of"] is None]
    assert manifest.completion_tokens == sum(row["completion_tokens"] or 0 for row in own)
    assert manifest.dedup_rows == ROWS - len(own) == 24  # one text that is there 25 times
    assert [part.rows for part in manifest.parts] == [64, 64, 64, 64, 44]
    assert [*dict.fromkeys(progress.stage for progress in told)] == ["starting", "loading", "running", "finishing"]
    assert (told[-1].rows_done, told[-1].rows_committed, told[-1].rows_total) == (ROWS, ROWS, ROWS)
    assert told[-1].statuses == manifest.statuses
    codes = Counter(row["error"]["code"] for row in rows if row["error"])
    assert told[-1].detail.errors == codes
    assert told[-1].detail.plan is not None
    last_s, last_rows, last_tokens = told[-1].detail.samples[-1]
    assert (last_s > 0, last_rows, last_tokens) == (True, ROWS, manifest.completion_tokens)

    run_job(job, report=told.append)  # nothing is left: what is known stands in the parts
    assert (told[-1].statuses, told[-1].detail.errors) == (manifest.statuses, codes)


def test_parquet_table_with_everything_that_parquet_can_hold(model: Path, tmp_path: Path) -> None:
    prompts = [None, "", "😀 hi", "plain", "x" * 100_000, "plain"]
    params = [None, None, {"max_tokens": 2}, {"max_tokens": 0}, None, None]
    expected = ["skipped_null", "skipped_null empty_prompt", ANSWERED, "invalid_params invalid_params",
                "too_long too_long", ANSWERED]  # fmt: skip
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 1, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff\xfe")]
    )
    table = pa.table(
        {
            "id": pa.array([7] * 14),
            "prompt": pa.chunked_array([pa.array(prompts * 2), broken]),
            "params": pa.array(params * 2 + [None, None], pa.struct([("max_tokens", pa.int64())])),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    sampling = {"max_tokens": 6, "params_column": "params"}
    run_job(spec(model, tmp_path / "in.parquet", tmp_path / "out", sampling=sampling, errors=ANY_ERRORS))
    parts = sorted((tmp_path / "out").glob("part-*.parquet"))
    rows = pa.concat_tables(pq.read_table(part) for part in parts).drop(["prompt"]).to_pylist()
    assert [seen(row) for row in rows] == [*expected, *expected, ANSWERED, "error invalid_utf8"]
    assert [row["completion_tokens"] for row in rows if row["params"] == {"max_tokens": 2}] == [2, 2]
    check_answers(rows)


def test_csv_table_with_everything_that_csv_can_hold(model: Path, tmp_path: Path) -> None:
    rows_in = [
        ("007", "plain", "3", ANSWERED),
        ("007", "😀 hi", "", ANSWERED),
        ("008", "plain", "lots", "invalid_params invalid_params"),
        ("009", "plain", "-1", "invalid_params invalid_params"),
        ("010", "x" * 100_000, "", "too_long too_long"),
        ("011", "12", "", ANSWERED),
    ]
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "prompt", "max_tokens"), *(row[:3] for row in rows_in)])
        file.write("012,ragged\n")
    with (tmp_path / "in.csv").open("ab") as binary:
        binary.write(b"013,\xff\xfe,2\n")
    sampling = {"max_tokens": 6, "param_columns": ["max_tokens"]}
    run_job(spec(model, tmp_path / "in.csv", tmp_path / "out", sampling=sampling, errors=ANY_ERRORS))
    rows = read(tmp_path / "out")
    assert [seen(row) for row in rows] == [row[3] for row in rows_in] + ["error malformed_row", "error invalid_utf8"]
    assert [row["id"] for row in rows[:6]] == ["007", "007", "008", "009", "010", "011"]
    check_answers(rows)


def test_answers_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = [f"{'Long preface. ' * (index % 3)}Question {index}?" for index in range(12)]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    output = {"include": ["token_ids", "prompt_rendered"], "on_length": "keep"}
    run_job(spec(model, tmp_path / "in.jsonl", tmp_path / "out", prompt={"system": "Be brief."}, output=output))

    reference = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row, prompt in zip(read(tmp_path / "out"), prompts, strict=True):
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            answer = reference.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert row["prompt_rendered"] == text
        assert row["token_ids"] == answer.tolist()
        assert row["output"] == tokenizer.decode(answer, skip_special_tokens=True)


def table_of(folder: Path, rows: int) -> Path:
    path = folder / "in.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"Question {row}"}) for row in range(rows)))
    return path


def part_bytes(output: Path) -> dict[str, bytes]:
    return {part.name: part.read_bytes() for part in output.glob("part-*")}


def test_an_interrupted_job_resumes_and_ends_as_if_nothing_had_happened(model: Path, tmp_path: Path) -> None:
    table = table_of(tmp_path, 60)
    parts = {"rows_per_part": 10}
    job = spec(model, table, tmp_path / "out", output=parts, engine={"plan": PLAN})
    told: list[Progress] = []
    with pytest.raises(Interrupted, match=r"of 60 rows are committed"):
        run_job(job, report=told.append, stopping=lambda: told[-1].rows_committed >= 20)
    assert not (tmp_path / "out/_SUCCESS").exists()
    committed = len(part_bytes(tmp_path / "out")) * 10
    assert 20 <= committed < 60

    manifest = run_job(job, report=told.append)
    assert (manifest.rows, manifest.resumed_rows) == (60, committed)
    run_job(spec(model, table, tmp_path / "straight", output=parts))
    assert part_bytes(tmp_path / "out") == part_bytes(tmp_path / "straight")


PLAN = {"kv_pages": 16, "page_tokens": 16}  # room for few rows at once, so that a job has a middle


def test_a_finished_job_is_not_run_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = spec(model, table_of(tmp_path, 20), tmp_path / "out")
    first = run_job(job)
    before = part_bytes(tmp_path / "out")
    from moegen.run.engine import Engine

    monkeypatch.setattr(Engine, "open", None)  # loading the model would fail
    again = run_job(job)
    assert part_bytes(tmp_path / "out") == before
    assert (again.rows, again.resumed_rows, again.statuses) == (20, 20, first.statuses)


def test_another_model_is_refused_and_a_new_run_replaces(model: Path, tmp_path: Path) -> None:
    table = table_of(tmp_path, 20)
    run_job(spec(model, table, tmp_path / "out"))
    before = part_bytes(tmp_path / "out")
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(SpecError, match="new_run"):
        run_job(spec(other, table, tmp_path / "out"))
    assert part_bytes(tmp_path / "out") == before
    run_job(spec(other, table, tmp_path / "out", output={"mode": "new_run"}))
    assert part_bytes(tmp_path / "out").keys().isdisjoint(before)


def test_no_rows(model: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "in.parquet")
    manifest: Manifest = run_job(spec(model, tmp_path / "in.parquet", tmp_path / "out"))
    assert (manifest.rows, manifest.statuses) == (0, {})
    assert read(tmp_path / "out") == []


def test_no_row_that_can_run(model: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": pa.array([1, None, 3])}), tmp_path / "in.parquet")
    manifest = run_job(spec(model, tmp_path / "in.parquet", tmp_path / "out", errors=ANY_ERRORS))
    assert manifest.statuses == {"error": 2, "skipped_null": 1}


@pytest.mark.parametrize(
    ("sections", "error", "says"),
    [
        ({"prompt": {"column": "promt"}}, SpecError, "did you mean 'prompt'"),
        ({"prompt": {"column": None, "template": "{prompt} {nothing}"}}, SpecError, "'nothing'"),
        ({"sampling": {"max_tokens": 6, "params_column": "nothing"}}, SpecError, "'nothing'"),
        ({"model": {"uri": "nowhere"}}, CheckpointError, "nowhere"),
        ({"engine": {"host_memory": "1MB"}}, BudgetError, "memory"),
    ],
)
def test_what_is_wrong_with_the_job_is_told_before_anything_is_written(
    model: Path, tmp_path: Path, sections: dict[str, Any], error: type[Exception], says: str
) -> None:
    job = spec(model, table_of(tmp_path, 3), tmp_path / "out", **sections)
    with pytest.raises(error, match=says):
        run_job(job)
    assert not (tmp_path / "out").exists()


def test_the_context_of_the_model_bounds_prompts(model: Path, tmp_path: Path) -> None:
    fits = GEOMETRY["max_position_embeddings"] - 6
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"prompt": "x" * length}) for length in (fits, fits + 1)))
    run_job(spec(model, tmp_path / "in.jsonl", tmp_path / "out", errors=ANY_ERRORS))
    assert [seen(row) for row in read(tmp_path / "out")] == [ANSWERED, "too_long too_long"]
