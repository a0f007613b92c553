from __future__ import annotations

import pytest
from airflow.sdk import DAG, task
from airflow.sdk.exceptions import TaskDeferred
from airflow.serialization.serialized_objects import DagSerialization

from moegen_airflow.exceptions import MoegenInputError
from tests.provider.fake_task import context

PARAMETERS = {"output_uri": "out", "model_id": "m", "sampling_params": {"max_tokens": 8}, "poll_interval": 0.01}
MANIFEST = {"rows": 3}


def operator(function, *arguments, **parameters):
    """The operator that Airflow makes of the function, found by the decorator's name alone."""
    with DAG("d", schedule=None):
        return task.moegen(task_id="t", **PARAMETERS | parameters)(function)(*arguments).operator


def only_spec(service) -> dict:
    (spec,) = service.specs.values()
    return spec


@pytest.mark.parametrize(
    ("returned", "uri"), [("{{ not a template", "{{ not a template"), (["a", "b"], ["a", "b"]), (("a",), ["a"])]
)
def test_the_function_returns_the_input(fake_service, returned, uri):
    fake_service.on_get = lambda job: job.update(state="succeeded", manifest=MANIFEST)
    assert operator(lambda: returned).execute(context()) == MANIFEST
    assert only_spec(fake_service)["input"]["uri"] == uri


def test_it_gets_its_arguments_and_the_context(fake_service):
    def table(day, run_id=None):
        return f"s3://lake/{day}/{run_id}"

    one = operator(table, "monday", wait_for_completion=False)
    one.execute(context() | {"run_id": "r"})
    assert only_spec(fake_service)["input"]["uri"] == "s3://lake/monday/r"


def test_deferred_it_resumes_without_the_function(fake_service):
    with pytest.raises(TaskDeferred) as caught:
        operator(lambda: "in.parquet", deferrable=True).execute(context())
    event = {"status": "succeeded", "key": caught.value.trigger.key, "manifest": MANIFEST}

    def gone():
        raise AssertionError("called again")

    assert operator(gone, deferrable=True).execute_complete(context(), event) == MANIFEST


@pytest.mark.parametrize("returned", [None, "", [], [""], ["a", None], {"uri": "a"}, 5])
def test_anything_else_is_refused(fake_service, returned):
    with pytest.raises(MoegenInputError, match=r"under @task\.moegen returned"):
        operator(lambda: returned).execute(context())
    assert fake_service.requests == []


def test_mapped_and_serialised():
    with DAG("d", schedule=None) as dag:

        @task.moegen(**PARAMETERS)
        def answer(table):
            return table

        answer.expand(table=["a", "b"])
    (mapped,) = DagSerialization.from_dict(DagSerialization.to_dict(dag)).tasks
    assert (mapped.task_id, mapped.is_mapped, mapped.operator_name) == ("answer", True, "@task.moegen")


def test_many_outputs_are_refused():
    with pytest.raises(MoegenInputError, match="multiple_outputs"):
        operator(lambda: "a", multiple_outputs=True)
