from __future__ import annotations

import json

import pytest
from moegen.errors import SpecError
from moegen.spec import JobSpec, Sampling

SPEC = {
    "input": {"uri": "lake/in/a.parquet"},
    "prompt": {"column": "text"},
    "model": {"uri": "model"},
    "sampling": {"max_tokens": 4, "stop": "END"},
    "output": {"uri": "lake/out"},
}


def changed(**fields: object) -> dict:
    """SPEC with `section__field=value` on top."""
    spec = json.loads(json.dumps(SPEC))
    for name, value in fields.items():
        section, _, field = name.partition("__")
        spec.setdefault(section, {})[field] = value
    return spec


def test_a_trip_through_json_changes_nothing():
    spec = JobSpec.from_mapping(SPEC)
    assert spec.sampling.stop == ("END",)
    assert JobSpec.from_mapping(json.loads(spec.to_json())) == spec


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"sampling__max_token": 4}, "sampling.max_token: unknown key; did you mean 'max_tokens'"),
        ({"sampling__max_tokens": "4"}, "sampling.max_tokens: '4' cannot be used; give a whole number"),
        ({"sampling__max_tokens": True}, "sampling.max_tokens: True"),
        ({"sampling__top_p": 0}, "sampling.top_p: 0.0 cannot be used; give a value in (0, 1]"),
        ({"sampling__temperature": float("nan")}, "sampling.temperature: nan"),
        ({"sampling__param_columns": ["colour"]}, "sampling.param_columns: 'colour'"),
        ({"output__format": "csv"}, "output.format: 'csv' cannot be used; choose from 'parquet', 'arrow'"),
        ({"output__uri": "lake/in/a.parquet/out"}, "would be read as input"),
        ({"input__uri": "lake"}, "would be read as input"),
        ({"input__uri": []}, "input.uri"),
        ({"prompt__template": "{text}"}, "give exactly one of"),
        ({"engine__plan": {"kv_pages": 0}}, "engine.plan.kv_pages: 0"),
        ({"sampling__n": 2}, "sampling.n: 2 cannot be used; greedy answers are all the same"),
        ({"sampling__n": 0}, "sampling.n: 0"),
        ({"sampling__logprobs": 21}, "sampling.logprobs: 21 cannot be used; give 0 to 20"),
        ({"prompt__continuation_column": "next"}, "only task score has a use for it"),
    ],
)
def test_what_is_wrong_is_named_with_its_value_and_a_remedy(fields, told):
    with pytest.raises(SpecError) as refused:
        JobSpec.from_mapping(changed(**fields))
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"choices": ["a"], "regex": "a"}, "give at most one of them"),
        ({"output_schema": [1]}, "output_schema: [1] cannot be used; give a mapping"),
        ({"output_schema": "{"}, "output_schema: is not JSON"),
        ({"output_schema": {"a": float("nan")}}, "output_schema: is not JSON"),
        ({"choices": ["a", ""]}, "a choice cannot be empty"),
        ({"choices": ["a", "a"]}, "name each choice once"),
        ({"regex": ""}, "regex: ''"),
        ({"regex": "a", "sampling": {"max_tokens": 1, "ignore_eos": True}}, "sampling.ignore_eos: True"),
        ({"task": "classify"}, "choices: () cannot be used; task classify chooses between two or more"),
        ({"task": "classify", "regex": "a"}, "choices: ()"),
        ({"task": "score"}, "prompt.continuation_column: None"),
        ({"task": "score", "prompt": {"column": "p", "continuation_column": "c"}, "choices": ["a", "b"]}, "leave out"),
        ({"task": "classify", "choices": ["a", "b"], "sampling": {"n": 2, "temperature": 1}}, "samples nothing"),
        ({"task": "classify", "choices": ["a", "b"], "output": {"uri": "o", "include": ["token_ids"]}}, "generates"),
        ({"task": "rank"}, "task: 'rank' cannot be used; choose from 'generate', 'classify', 'score'"),
    ],
    ids=str,
)
def test_what_a_task_and_a_form_need(fields, told):
    with pytest.raises(SpecError) as refused:
        JobSpec.from_mapping({**SPEC, **fields})
    assert told in str(refused.value)


def test_a_schema_is_kept_as_text_with_its_order():
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"enum": ["é"]}}}
    spec = JobSpec.from_mapping({**SPEC, "output_schema": schema})
    assert json.loads(spec.output_schema) == schema
    assert list(json.loads(spec.output_schema)["properties"]) == ["b", "a"]
    assert JobSpec.from_mapping({**SPEC, "output_schema": spec.output_schema}) == spec
    assert JobSpec.from_mapping(json.loads(spec.to_json())) == spec
    assert spec.bound
    assert not JobSpec.from_mapping(SPEC).bound


def test_max_tokens_may_be_left_out_where_nothing_is_generated():
    spec = {**{k: v for k, v in SPEC.items() if k != "sampling"}, "task": "classify", "choices": ["a", "b"]}
    assert JobSpec.from_mapping(spec).sampling.max_tokens == 1
    with pytest.raises(SpecError, match="sampling: missing"):
        JobSpec.from_mapping({**spec, "task": "generate"})


def test_a_missing_section_is_named():
    with pytest.raises(SpecError, match="model: missing"):
        JobSpec.from_mapping({k: v for k, v in SPEC.items() if k != "model"})


def test_files_and_overrides(tmp_path):
    as_json, as_yaml = tmp_path / "job.json", tmp_path / "job.yaml"
    as_json.write_text(json.dumps(changed(sampling__min_p=1e-5, prompt__system="\U0001f600")))
    flow = "{input: {uri: a}, prompt: {column: p}, model: {uri: m}, sampling: {max_tokens: 1}, output: {uri: o}}"
    as_yaml.write_text(flow)
    read = JobSpec.read(as_json, ["sampling.temperature=0.5", "engine.plan.page_tokens=8"])
    assert (read.sampling.min_p, read.prompt.system) == (1e-5, "\U0001f600")
    assert (read.sampling.temperature, read.engine.plan.page_tokens) == (0.5, 8)
    assert JobSpec.read(as_yaml).input.uri == "a"
    with pytest.raises(SpecError, match="--set"):
        JobSpec.read(as_yaml, ["nonsense"])


def test_a_rows_own_parameters_are_checked_like_the_jobs():
    base = Sampling(max_tokens=4, top_k=3)
    assert base.override({"max_tokens": 9, "top_k": None}) == Sampling(max_tokens=9, top_k=3)
    with pytest.raises(SpecError, match=r"sampling\.top_k: -1"):
        base.override({"top_k": -1})
