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
    ],
)
def test_what_is_wrong_is_named_with_its_value_and_a_remedy(fields, told):
    with pytest.raises(SpecError) as refused:
        JobSpec.from_mapping(changed(**fields))
    assert told in str(refused.value)


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
