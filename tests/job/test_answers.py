"""Whole jobs whose answers have a form, a label or a score: from the specification to typed columns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moegen.errors import SpecError
from moegen.job.worker import run_job
from moegen.spec import JobSpec

from tests.tiny import tiny_checkpoint

ROWS = 40
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["bug", "question"]},
        "who": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 3}, "vip": {"type": "boolean"}},
            "required": ["name", "vip"],
        },
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 2},
        "ref": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"enum": ["x", "y"]}]},
    },
    "required": ["kind", "who", "sizes", "ref"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "in.jsonl"
    rows = [{"id": i, "prompt": None if i == 7 else f"Ticket {i}", "next": f" about {i * i}"} for i in range(ROWS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def spec(model: Path, table: Path, output: Path, /, **sections: Any) -> JobSpec:
    base: dict[str, Any] = {
        "input": {"uri": str(table)},
        "prompt": {"column": "prompt"},
        "model": {"uri": str(model)},
        "sampling": {"max_tokens": 120, "temperature": 1.0},
        "output": {"uri": str(output), "rows_per_part": 16},
        "errors": {"max_error_rate": 1},
    }
    merged = {name: {**base.get(name, {}), **value} for name, value in sections.items() if isinstance(value, dict)
              and name != "output_schema"}  # fmt: skip
    return JobSpec.from_mapping({**base, **sections, **merged})


def run(model: Path, table: Path, output: Path, /, **sections: Any) -> pa.Table:
    run_job(spec(model, table, output, **sections))
    assert (output / "_SUCCESS").exists()
    return pa.concat_tables(pq.read_table(part) for part in sorted(output.glob("part-*.parquet")))


def by_status(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["status"], []).append(row)
    return found


def test_json_becomes_a_typed_column(model: Path, table: Path, tmp_path: Path) -> None:
    found = run(model, table, tmp_path, output_schema=SCHEMA)
    assert str(found.schema.field("output_json").type) == (
        "struct<kind: string, who: struct<name: string, vip: bool>, sizes: list<element: int64>, ref: string>"
    )
    assert found.schema.names[4:7] == ["output", "output_json", "output_raw"]
    rows = by_status(found.to_pylist())
    assert rows.keys() <= {"ok", "length", "skipped_null"}
    assert len(rows["ok"]) > ROWS // 2
    for row in rows["ok"]:
        parsed = json.loads(row["output"])
        jsonschema.validate(parsed, {**SCHEMA, "additionalProperties": False})
        assert row["output_json"] == {**parsed, "ref": json.dumps(parsed["ref"])}
        assert (row["output_raw"], row["finish_reason"], row["error"]) == (None, "stop", None)


def test_an_answer_that_was_cut_is_kept_but_never_repaired(model: Path, table: Path, tmp_path: Path) -> None:
    rows = run(model, table, tmp_path, output_schema=SCHEMA, sampling={"max_tokens": 12}).to_pylist()
    cut = by_status(rows)["length"]
    assert len(cut) == ROWS - 1
    for row in cut:
        assert (row["output"], row["output_json"]) == (None, None)
        assert row["output_raw"].startswith("{")
        with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
            json.loads(row["output_raw"])


def test_an_answer_that_something_else_ended_is_invalid(model: Path, table: Path, tmp_path: Path) -> None:
    rows = run(model, table, tmp_path, output_schema=SCHEMA, sampling={"stop": ["question"]}).to_pylist()
    found = by_status(rows)
    assert len(found["invalid_output"]) > 3
    for row in found["invalid_output"]:
        assert (row["output"], row["output_json"], row["finish_reason"]) == (None, None, "stop")
        assert row["output_raw"].endswith('"')
        assert (row["error"]["code"], row["error"]["stage"]) == ("invalid_output", "generate")
        assert row["output_raw"] not in row["error"]["message"]
    assert all("question" not in row["output"] for row in found.get("ok", []))


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({"choices": ["yes", "no", "nobody knows"]}, {"yes", "no", "nobody knows"}),
        ({"regex": "[ab]{2}"}, {"aa", "ab", "ba", "bb"}),
    ],
)
def test_choices_and_expressions(
    model: Path, table: Path, tmp_path: Path, fields: dict[str, Any], answers: set[str]
) -> None:
    found = run(model, table, tmp_path, **fields, sampling={"temperature": 3.0})
    assert "output_json" not in found.schema.names
    rows = by_status(found.to_pylist())
    assert rows.keys() == {"ok", "skipped_null"}
    assert {row["output"] for row in rows["ok"]} == answers


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"output_schema": {"type": "strin"}}, "output_schema: cannot be compiled: Invalid type"),
        ({"regex": "[a"}, "regex: cannot be compiled"),
    ],
)
def test_a_bad_form_is_told_before_the_model_is_loaded_or_anything_written(
    model: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], told: str
) -> None:
    from moegen.run.engine import Engine

    monkeypatch.setattr(Engine, "open", None)  # loading the model would fail
    with pytest.raises(SpecError, match=told) as refused:
        run_job(spec(model, table, tmp_path / "out", **fields))
    assert refused.value.exit_code == 64
    assert not (tmp_path / "out").exists()


def test_a_row_cannot_ask_a_bound_answer_to_go_on(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "ignore_eos": true}\n{"prompt": "b", "ignore_eos": null}')
    rows = run(model, tmp_path / "in.jsonl", tmp_path / "out", choices=["a", "b"],
               sampling={"param_columns": ["ignore_eos"]}).to_pylist()  # fmt: skip
    assert [row["status"] for row in rows] == ["invalid_params", "ok"]


LABELS = ["bug", "ask", "aha", "question for support"]  # a longer one is less likely, and seldom wins


def log_likelihoods(model: Path, prompts: list[str], continuations: list[list[str]]) -> list[list[float]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)

    @torch.no_grad()
    def one(prompt: str, continuation: str) -> float:
        head, tail = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, continuation))
        log_probs = reference(torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
        return sum(float(log_probs[len(head) - 1 + i, token]) for i, token in enumerate(tail))

    return [[one(prompt, each) for each in own] for prompt, own in zip(prompts, continuations, strict=True)]


def test_classify_gives_a_label_and_the_probability_of_every_choice(model: Path, table: Path, tmp_path: Path) -> None:
    found = run(model, table, tmp_path, task="classify", choices=LABELS, sampling={"max_tokens": 1})
    rows = found.to_pylist()
    good = [row for row in rows if row["status"] == "ok"]
    assert [row["status"] for row in rows if row["status"] != "ok"] == ["skipped_null"]
    expected = log_likelihoods(model, [row["prompt"] for row in good], [LABELS] * len(good))
    for row, values in zip(good, expected, strict=True):
        total = sum(math.exp(value - max(values)) for value in values)
        probs = [math.exp(value - max(values)) / total for value in values]
        assert row["label_probs"] == pytest.approx(probs, abs=1e-3)
        assert sum(row["label_probs"]) == pytest.approx(1)
        assert row["label"] == row["output"] == LABELS[row["label_probs"].index(max(row["label_probs"]))]
        assert row["label_prob"] == max(row["label_probs"])
        assert (row["completion_tokens"], row["finish_reason"]) == (0, None)
    assert len({row["label"] for row in good}) > 1


def test_classify_needs_no_sampling_section(model: Path, table: Path, tmp_path: Path) -> None:
    mapping = {"input": {"uri": str(table)}, "prompt": {"column": "prompt"}, "model": {"uri": str(model)},
               "output": {"uri": str(tmp_path / "out")}, "task": "classify", "choices": ["a", "b"]}  # fmt: skip
    assert run_job(JobSpec.from_mapping(mapping)).statuses == {"ok": ROWS - 1, "skipped_null": 1}


def test_score_is_the_log_likelihood_of_the_continuation(model: Path, tmp_path: Path) -> None:
    rows_in = [{"prompt": f"Ticket {i}", "next": f" {'about ' * (i % 4)}{i}"} for i in range(12)]
    rows_in += [{"prompt": "p", "next": None}, {"prompt": "p", "next": ""}, {"prompt": "p", "next": 3},
                {"prompt": None, "next": "x"}, {"prompt": "p", "next": "x" * 600}]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows_in)))
    prompt = {"continuation_column": "next"}
    rows = run(model, tmp_path / "in.jsonl", tmp_path / "out", task="score", prompt=prompt).to_pylist()
    assert [row["status"] for row in rows[12:]] == ["skipped_null", "skipped_null", "error", "skipped_null", "too_long"]
    assert [row["error"] and row["error"]["code"] for row in rows[12:]] == [
        None, "empty_prompt", "bad_prompt_type", None, "too_long",
    ]  # fmt: skip
    good = rows[:12]
    expected = log_likelihoods(model, [row["prompt"] for row in good], [[row["next"]] for row in good])
    assert [row["score"] for row in good] == pytest.approx([value for (value,) in expected], abs=1e-3)
    assert [row["score_tokens"] for row in good] == [len(row["next"].encode()) for row in good]
    assert {(row["status"], row["output"]) for row in good} == {("ok", None)}


def test_several_answers_per_row_are_lists(model: Path, table: Path, tmp_path: Path) -> None:
    sampling = {"max_tokens": 6, "temperature": 3.0, "logprobs": 2}
    include = {"include": ["token_ids"]}
    several = run(model, table, tmp_path / "3", sampling={**sampling, "n": 3}, output=include)
    assert str(several.schema.field("output").type) == "list<element: string>"
    assert str(several.schema.field("token_ids").type) == "list<element: list<element: int32>>"
    single = run(model, table, tmp_path / "1", sampling=sampling, output=include)
    for row, alone in zip(several.to_pylist(), single.to_pylist(), strict=True):
        if row["status"] == "skipped_null":
            assert (row["output"], row["token_ids"], row["finish_reason"]) == (None, None, None)
            continue
        assert [len(row[name]) for name in ("token_ids", "finish_reason", "logprobs")] == [3, 3, 3]
        assert row["token_ids"][0] == alone["token_ids"]
        for ours, theirs in zip(row["logprobs"][0], alone["logprobs"], strict=True):  # batches round differently
            assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)
        assert len(set(map(tuple, row["token_ids"]))) > 1
        assert row["completion_tokens"] == sum(map(len, row["token_ids"]))
        assert row["status"] == ("length" if "length" in row["finish_reason"] else "ok")
        raws = row["output_raw"] or [None] * 3
        texts = row["output"] or [None] * 3
        for reason, text, raw in zip(row["finish_reason"], texts, raws, strict=True):
            assert (text is not None, raw is not None) == ((reason == "stop"), (reason == "length"))
    assert {reason for row in several.to_pylist() for reason in row["finish_reason"] or ()} == {"stop", "length"}


def test_logprobs_are_a_column_of_their_own(model: Path, table: Path, tmp_path: Path) -> None:
    found = run(model, table, tmp_path, sampling={"max_tokens": 4, "temperature": 0, "logprobs": 2},
                output={"include": ["token_ids"]})  # fmt: skip
    for row in found.to_pylist():
        if row["status"] == "skipped_null":
            assert row["logprobs"] is None
            continue
        assert [each["token_id"] for each in row["logprobs"]] == row["token_ids"]
        for each in row["logprobs"]:  # greedy: the likeliest token is the one that was taken
            assert each["top"][0] == {"token_id": each["token_id"], "logprob": each["logprob"]}
            assert each["top"][0]["logprob"] >= each["top"][1]["logprob"]


def test_json_of_several_answers(model: Path, table: Path, tmp_path: Path) -> None:
    found = run(model, table, tmp_path, output_schema=SCHEMA, sampling={"n": 2, "max_tokens": 60})
    assert pa.types.is_list(found.schema.field("output_json").type)
    for row in found.to_pylist():
        for text, value in zip(row["output"] or (), row["output_json"] or (), strict=True):
            assert (text is None) == (value is None)
            assert text is None or json.loads(text)["kind"] == value["kind"]
