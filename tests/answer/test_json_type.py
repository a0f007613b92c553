"""JSON Schemas as Arrow types: the table in the module's docstring, line by line, and values on their way."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moegen.answer.json_type import JsonType, Unfit, closed

TEXT, INT, FLOAT, TRUTH = {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}
NULL = {"type": "null"}


def obj(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def type_of(schema: dict[str, Any]) -> JsonType:
    return JsonType.of(closed(schema))


@pytest.mark.parametrize(
    ("schema", "arrow"),
    [
        (TEXT, "string"),
        (INT, "int64"),
        (FLOAT, "double"),
        (TRUTH, "bool"),
        ({"type": "string", "enum": ["a", "b"]}, "string"),
        ({"enum": ["a", "b"]}, "string"),
        ({"enum": ["a", None]}, "string"),
        ({"const": "a"}, "string"),
        ({"type": "integer", "enum": [1, 2]}, "int64"),
        ({"type": ["integer", "null"]}, "int64"),
        ({"anyOf": [FLOAT, NULL], "title": "x", "default": None}, "double"),
        ({"oneOf": [NULL, TRUTH]}, "bool"),
        ({"anyOf": [TEXT, {"type": "string", "format": "date"}]}, "string"),
        ({"allOf": [INT]}, "int64"),
        ({"type": "array", "items": FLOAT}, "list<item: double>"),
        (obj(a=INT, b={"type": "array", "items": obj(c=TEXT)}), "struct<a: int64, b: list<item: struct<c: string>>>"),
        ({"$defs": {"k": {"enum": ["x"]}}, **obj(a={"$ref": "#/$defs/k"})}, "struct<a: string>"),
        ({"anyOf": [obj(a=INT), NULL]}, "struct<a: int64>"),
    ],
)
def test_what_has_a_type(schema: dict[str, Any], arrow: str) -> None:
    assert str(type_of(schema).type) == arrow


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"anyOf": [INT, TEXT]},
        {"type": ["integer", "string"]},
        {"type": "object"},
        obj(),
        {**obj(a=INT), "additionalProperties": True},
        {**obj(a=INT), "additionalProperties": TEXT},
        {**obj(a=INT), "patternProperties": {"^x": TEXT}},
        {"type": "array"},
        {"type": "array", "prefixItems": [INT, TEXT], "items": False},
        {"allOf": [obj(a=INT), obj(b=INT)]},
        {"properties": {"a": INT}},
        {"enum": [1, "a"]},
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.org/schema"},
        NULL,
    ],
    ids=json.dumps,
)
def test_anything_else_is_json_text(schema: dict[str, Any]) -> None:
    found = type_of(schema)
    assert found.type == pa.string()
    assert found.value({"x": [1, "ü"]}) == '{"x": [1, "ü"]}'
    assert found.value("a") == '"a"'
    assert found.value(None) is None


def test_recursion_is_json_text_where_it_begins_anew() -> None:
    tree = {"$defs": {"node": obj(name=TEXT, below={"type": "array", "items": {"$ref": "#/$defs/node"}})},
            "$ref": "#/$defs/node"}  # fmt: skip
    found = type_of(tree)
    assert str(found.type) == "struct<name: string, below: list<item: string>>"
    assert found.value({"name": "a", "below": [{"name": "b", "below": []}]}) == {
        "name": "a", "below": ['{"name": "b", "below": []}'],
    }  # fmt: skip


def test_values_reach_parquet_with_their_types(tmp_path: Any) -> None:
    schema = obj(n=INT, x=FLOAT, ok=TRUTH, who={"anyOf": [obj(name=TEXT), NULL]}, tags={"type": "array", "items": TEXT},
                 mixed={"anyOf": [INT, TEXT]})  # fmt: skip
    found = type_of(schema)
    parsed = [
        {"n": 1, "x": 2, "ok": True, "who": {"name": "é"}, "tags": ["a", "b"], "mixed": "t"},
        {"n": 2.0, "x": 0.5, "ok": False, "who": None, "tags": [], "mixed": 3},
        {},
    ]
    pq.write_table(pa.table({"j": pa.array([found.value(v) for v in parsed], found.type)}), tmp_path / "t.parquet")
    assert pq.read_table(tmp_path / "t.parquet")["j"].to_pylist() == [
        {**parsed[0], "x": 2.0, "mixed": '"t"'},
        {**parsed[1], "n": 2, "mixed": "3"},
        dict.fromkeys(parsed[0]),
    ]


@pytest.mark.parametrize(
    ("schema", "value", "where"),
    [
        (obj(a=INT), {"a": 1 << 63}, "$.a is not an integer of 64 bits"),
        (obj(a=INT), {"a": True}, "$.a is not an integer"),
        (obj(a=FLOAT), {"a": float("inf")}, "$.a is not a number that float64 holds"),
        (obj(a=FLOAT), {"a": 10**400}, "$.a is not a number that float64 holds"),
        (obj(a=TEXT), {"a": 1}, "$.a is not a string"),
        (obj(a=TRUTH), {"a": 1}, "$.a is not true or false"),
        (obj(a={"type": "array", "items": TEXT}), {"a": ["x", 2]}, "$.a[1] is not a string"),
        (obj(a=TEXT), {"a": "x", "SECRET": 1}, "$ has 1 keys that the schema does not name"),
        (obj(a=TEXT), ["x"], "$ is not an object"),
        ({"type": "array", "items": TEXT}, {}, "$ is not an array"),
    ],
)
def test_what_does_not_fit_is_named_by_its_place_alone(schema: dict[str, Any], value: Any, where: str) -> None:
    with pytest.raises(Unfit) as unfit:
        type_of(schema).value(value)
    assert where in str(unfit.value)
    assert "SECRET" not in str(unfit.value)


def test_objects_are_closed_and_integers_bounded_unless_the_schema_says_otherwise() -> None:
    made = closed(obj(a=INT, b={"type": "integer", "minimum": 3}, c={**obj(d=TEXT), "additionalProperties": True}))
    assert made["additionalProperties"] is False
    assert made["properties"]["a"] == {"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1}
    assert made["properties"]["b"] == {"type": "integer", "minimum": 3, "maximum": 2**53 - 1}
    assert made["properties"]["c"]["additionalProperties"] is True
    combined = {"allOf": [obj(a=TEXT), obj(b=TEXT)]}
    assert closed(combined) == combined
