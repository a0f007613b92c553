"""The fingerprint changes with what can change a part, and with nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from moegen.spec import JobSpec
from moegen.table.fingerprint import fingerprint
from moegen.table.reader import InputFile

SPEC: dict[str, Any] = {
    "job": {"name": "nightly", "key": "k"},
    "input": {"uri": "in.parquet"},
    "prompt": {"column": "text"},
    "model": {"uri": "model"},
    "sampling": {"max_tokens": 8},
    "output": {"uri": "out"},
}
FILES = [InputFile("file:///in.parquet", 100, "1", 5)]


def digest(changes: dict[str, Any] | None = None, model: str = "m", tokenizer: str = "t", files: Any = FILES) -> str:
    mapping = json.loads(json.dumps(SPEC))
    for path, value in (changes or {}).items():
        section, name = path.split(".")
        mapping.setdefault(section, {})[name] = value
    return fingerprint(JobSpec.from_mapping(mapping), model, tokenizer, files)


def test_it_is_64_hexadecimal_digits() -> None:
    assert len(digest()) == 64
    assert int(digest(), 16)


@pytest.mark.parametrize(
    "changes",
    [
        {"job.name": "other"},
        {"job.key": "other"},
        {"engine.device": "cuda"},
        {"engine.plan": {"attention_tokens": 64}},
        {"output.uri": "elsewhere"},
        {"output.mode": "new_run"},
        {"input.uri": "*.parquet"},
        {"checkpoint.journal_seconds": 5},
        {"errors.max_error_rate": 0.5},
        {"errors.on_row_error": "fail_fast"},
        {"limits.max_total_tokens": 100},
    ],
)
def test_what_cannot_change_a_part(changes: dict[str, Any]) -> None:
    assert digest(changes) == digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"input.columns": ["text"]},
        {"input.limit": 3},
        {"input.format": "csv"},
        {"prompt.column": "other"},
        {"prompt.system": "be brief"},
        {"model.uri": "other"},
        {"model.dtype": "float32"},
        {"sampling.seed": 1},
        {"sampling.max_tokens": 9},
        {"output.rows_per_part": 10},
        {"output.format": "arrow"},
        {"output.prefix": "x_"},
        {"output.include": ["token_ids"]},
        {"output.on_length": "keep"},
        {"engine.plan": {"kv_dtype": "int8"}},
    ],
)
def test_what_can_change_a_part(changes: dict[str, Any]) -> None:
    assert digest(changes) != digest()


def test_the_form_of_answers_and_its_order() -> None:
    def form(**fields: Any) -> str:
        return fingerprint(JobSpec.from_mapping({**SPEC, **fields}), "m", "t", FILES)

    a, b = {"a": {"type": "string"}}, {"b": {"type": "string"}}
    schemas = [{"type": "object", "properties": properties} for properties in ({**a, **b}, {**b, **a}, a)]
    forms = [{"output_schema": schema} for schema in schemas] + [{"choices": ["x", "y"]}, {"choices": ["y", "x"]},
             {"regex": "x"}, {"task": "classify", "choices": ["x", "y"]}]  # fmt: skip
    assert len({digest(), *(form(**fields) for fields in forms)}) == len(forms) + 1


def test_digests_and_files() -> None:
    assert digest(model="other") != digest()
    assert digest(tokenizer="other") != digest()
    for file in (
        InputFile("file:///other.parquet", 100, "1", 5),
        InputFile("file:///in.parquet", 101, "1", 5),
        InputFile("file:///in.parquet", 100, "2", 5),
    ):
        assert digest(files=[file]) != digest()
    assert digest(files=FILES * 2) != digest()
