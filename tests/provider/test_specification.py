from __future__ import annotations

import json

import pytest
from moegen.spec import JobSpec
from pydantic import BaseModel

from moegen_airflow.exceptions import MoegenInputError
from moegen_airflow.operator import MoegenBatchOperator
from moegen_airflow.specification import job_key, merge
from tests.provider.fake_task import context

REQUIRED = {"task_id": "t", "input_uri": "in.parquet", "output_uri": "out", "model_id": "m"}
SAMPLING = {"max_tokens": 8}


def spec_of(**parameters):
    operator = MoegenBatchOperator(**REQUIRED | {"sampling_params": SAMPLING} | parameters)
    return operator.build_specification(name="d.t")


def key_of(ids=None, **parameters):
    ids = {"dag_id": "d", "task_id": "t", "run_id": "r"} | (ids or {})
    return job_key(**ids, fingerprint=json.dumps(spec_of(**parameters), sort_keys=True))  # as the service does


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"input_uri": ["a.csv", "b.csv"], "id_column": "id"},
        {"prompt_template": "Say {{ {text} }}", "system_prompt": "Be brief."},
        {"messages_column": "chat"},
        {"job_params": {"prompt": {"token_ids_column": "ids"}, "engine": {"plan": {"pass_tokens": 64}}}},
        {"sampling_params": {"max_tokens": 8, "temperature": 0.7, "stop": ["\n"], "seed": 3}},
        {"job_params": {"output_schema": {"type": "object", "properties": {"a": {"type": "string"}}}}},
        {"output_schema": {"type": "object", "properties": {"a": {"type": "string"}}}},
        {"choices": ["bug", "question"], "max_failed_rows": 0.01},
        {"max_failed_rows": 10, "lease_hours": None},
        {"job_params": {"task": "classify", "choices": ["bug", "question"]}},
    ],
)
def test_what_it_builds_is_a_valid_specification_of_the_engine(parameters):
    assert JobSpec.from_mapping(spec_of(**parameters)).output.uri == "out"


def test_prompt_column_is_the_default_only_when_nothing_else_is_given():
    assert spec_of()["prompt"] == {"column": "prompt"}
    assert spec_of(prompt_column="text")["prompt"] == {"column": "text"}
    assert spec_of(prompt_template="{a}")["prompt"] == {"template": "{a}"}
    assert spec_of(job_params={"prompt": {"chat": True}})["prompt"] == {"chat": True, "column": "prompt"}


def test_job_params_lie_over_everything():
    spec = spec_of(job_params={"sampling": {"top_p": 0.5}, "output": {"rows_per_part": 10}, "job": {"name": "mine"}})
    assert spec["sampling"] == {"max_tokens": 8, "top_p": 0.5}
    assert spec["output"] == {"uri": "out", "rows_per_part": 10}
    assert spec["job"] == {"name": "mine", "lease_hours": 6}


def test_merge_replaces_lists_and_leaves_its_arguments_alone():
    base, over = {"a": {"b": [1, 2], "c": 1}}, {"a": {"b": [3]}}
    assert merge(base, over) == {"a": {"b": [3], "c": 1}}
    assert base == {"a": {"b": [1, 2], "c": 1}}


def test_failed_rows_by_number_or_by_share():
    assert spec_of()["errors"] == {}
    assert spec_of(max_failed_rows=0)["errors"] == {"max_failed_rows": 0, "max_error_rate": 1.0}
    assert spec_of(max_failed_rows=0.0)["errors"] == {"max_error_rate": 0.0}
    for wrong in (-1, 1.5, True, "3"):
        with pytest.raises(MoegenInputError, match="max_failed_rows"):
            spec_of(max_failed_rows=wrong)


def test_a_pydantic_model_is_its_schema():
    class Ticket(BaseModel):
        topic: str

    assert spec_of(output_schema=Ticket)["output_schema"] == Ticket.model_json_schema()


def test_same_work_same_key():
    assert key_of() == key_of()
    assert key_of(sampling_params={"seed": 1, "max_tokens": 8}) == key_of(sampling_params={"max_tokens": 8, "seed": 1})
    assert key_of(moegen_conn_id="other", poll_interval=1, timeout=5, deferrable=True) == key_of()
    assert len(key_of()) <= 128
    assert not key_of().isdigit()


@pytest.mark.parametrize(
    "parameters",
    [
        {"ids": {"dag_id": "other"}},
        {"ids": {"task_id": "other"}},
        {"ids": {"run_id": "other"}},
        {"input_uri": "other.parquet"},
        {"input_uri": ["in.parquet", "b.parquet"]},
        {"output_uri": "other"},
        {"model_id": "other"},
        {"prompt_column": "other"},
        {"messages_column": "prompt"},
        {"prompt_template": "{prompt}"},
        {"system_prompt": "Be brief."},
        {"id_column": "id"},
        {"sampling_params": {"max_tokens": 9}},
        {"sampling_params": {"max_tokens": 8, "seed": 1}},
        {"job_params": {"input": {"limit": 5}}},
    ],
    ids=str,
)
def test_other_work_another_key(parameters):
    assert key_of(**parameters) != key_of()


def test_tries_and_map_indexes_share_the_key(fake_service):
    fake_service.on_get = lambda job: job.update(state="succeeded", manifest={"rows": 0})
    for ids in ({}, {"try_number": 2}, {"map_index": 0}, {"map_index": 7, "try_number": 3}):
        MoegenBatchOperator(**REQUIRED, sampling_params=SAMPLING).execute(context(**ids))
    assert len(fake_service.jobs) == 1


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"sampling_params": {"temperature": 0}}, "max_tokens"),
        ({"sampling_params": "max_tokens=8"}, "sampling_params"),
        ({"job_params": ["a"]}, "job_params"),
        ({"job_params": {"sampling": None}}, "sampling"),
        ({"job_params": {"prompt": "text"}}, "job_params: prompt: 'text' is not a mapping"),
        ({"job_params": {"job": {"name": {1, 2}}}}, "not JSON: Object of type set"),
    ],
)
def test_bad_parameters_are_named_before_anything_is_sent(fake_service, parameters, named):
    operator = MoegenBatchOperator(**REQUIRED | {"sampling_params": SAMPLING} | parameters)
    with pytest.raises(MoegenInputError, match=named):
        operator.execute(context())
    assert fake_service.requests == []


def test_the_model_falls_back_to_the_connection(fake_service, monkeypatch):
    parameters = REQUIRED | {"sampling_params": SAMPLING, "model_id": None}
    with pytest.raises(MoegenInputError, match="moegen_default has no default_model"):
        MoegenBatchOperator(**parameters).build_specification("n")
    uri = f"{fake_service.connection_uri}?default_model=s3%3A%2F%2Fmodels%2Fm"
    monkeypatch.setenv("AIRFLOW_CONN_MOEGEN_DEFAULT", uri)
    assert MoegenBatchOperator(**parameters).build_specification("n")["model"] == {"uri": "s3://models/m"}
