"""Whatever a specification is made of, it is one or it is refused: the parser raises nothing but a `SpecError`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="comes with schemathesis, see the dev group of pyproject.toml")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moegen.errors import SpecError
from moegen.job.allowed import AllowedUris
from moegen.spec import JobSpec, set_field

VALID: dict[str, Any] = {
    "job": {"name": "nightly", "key": "nightly-1"},
    "input": {"uri": ["s3://lake/in/", "b.csv"], "columns": ["id"], "limit": 10, "format": "csv"},
    "prompt": {"template": "{text}", "system": "Be brief.", "on_too_long": "truncate_left"},
    "model": {"uri": "/models/a", "revision": "1", "dtype": "float32"},
    "sampling": {"max_tokens": 8, "temperature": 0.5, "stop": ["\n"], "n": 2, "logprobs": 1, "param_columns": ["seed"]},
    "output": {"uri": "s3://lake/out/", "include": ["token_ids"], "rows_per_part": 10},
    "engine": {"device": "cpu", "host_memory": "1GiB", "plan": {"kv_pages": 3}},
    "checkpoint": {"journal_seconds": 1.5},
    "errors": {"max_error_rate": 0.5},
    "limits": {"deadline": "2026-11-22T06:00:00+00:00", "max_total_tokens": 5},
    "task": "generate",
    "output_schema": {"type": "object", "properties": {"a": {"enum": ["b"]}}},
}
EXAMPLES = settings(max_examples=120, deadline=None, database=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))  # fmt: skip

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(min_value=1 << 60), st.floats(), st.text(max_size=8),
    st.sampled_from(["http://[", "s3://u:p@h/x", "a::b", "\0", "{", "}", "{a", "1e999", "9999-99-99", "²", "\ud800"]),
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(max_size=5), leaves), inner)
    ),
    max_leaves=8,
)


def paths(mapping: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in mapping.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from paths(value, (*above, name))


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The valid specification with another value at one place."""
    spec = json.loads(json.dumps(VALID))
    node = spec
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    return spec


def parse(mapping: Any) -> None:
    """As the service does: parsed, checked, written, and what is accepted survives the trip."""
    try:
        spec = JobSpec.from_mapping(mapping)
        AllowedUris(inputs=("s3://lake",)).check(spec)
    except SpecError:
        return
    assert JobSpec.from_mapping(json.loads(spec.to_json())) == spec


def test_the_starting_point_is_valid() -> None:
    assert JobSpec.from_mapping(VALID).output.rows_per_part == 10


@EXAMPLES
@given(values)
def test_anything_at_all(value: Any) -> None:
    parse(value)


@EXAMPLES
@given(st.sampled_from(sorted(paths(VALID))), values)
def test_a_valid_one_with_one_value_changed(path: tuple[str, ...], value: Any) -> None:
    parse(changed(path, value))


@EXAMPLES
@given(st.sampled_from([(), *sorted(path for path in paths(VALID) if len(path) < 2)]), st.text(max_size=12), values)
def test_a_valid_one_with_a_key_more(path: tuple[str, ...], name: str, value: Any) -> None:
    parse(changed((*path, name), value) if not path or isinstance(VALID[path[0]], dict) else VALID)


@EXAMPLES
@given(st.text(max_size=30))
def test_overrides(text: str) -> None:
    mapping = json.loads(json.dumps(VALID))
    try:
        set_field(mapping, text)
    except SpecError:
        return
    parse(mapping)


@pytest.mark.parametrize(
    "field",
    ["model.trust_remote_code", "model.code", "engine.plan.module", "prompt.function", "output.class", "hooks"],
)
def test_no_field_names_code(field: str) -> None:
    path = tuple(field.split("."))
    with pytest.raises(SpecError, match="unknown key"):
        JobSpec.from_mapping(changed(path, "package.module:function"))
