"""A JSON Schema as an Arrow type, and JSON values as values of it.

| JSON Schema | Arrow |
| --- | --- |
| an object with `properties`, closed | struct, its fields in the schema's order; a property that is left out is null |
| an array with one schema for its `items` | list |
| integer | int64 |
| number | float64 |
| boolean | bool |
| string; an enumeration of strings | string |
| any of these or null (`type: [.., null]`, `anyOf` with null, null in an enumeration) | the same type, null |
| `$ref` to a schema in this document | what it refers to |
| anything else: real unions, open objects, tuples, `allOf`, recursion | string that holds JSON |

An object is closed unless its schema says otherwise (`additionalProperties`, `patternProperties`): `closed` writes that
into the schema, so that answers have no keys for which there is no column, and bounds integers to what int64 holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

Schema = Mapping[str, Any]
_INT64 = range(-(1 << 63), 1 << 63)
_SAFE_INTEGER = (1 << 53) - 1  # the grammar library counts bounds as float64: the largest that is exact in it
_OPEN = ("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames")
_UNIONS = ("anyOf", "oneOf")
_MEANINGLESS = frozenset({"title", "description", "default", "examples", "$comment", "deprecated", "$schema", "$id",
                          "$defs", "definitions"})  # fmt: skip
_DEPTH = 64  # of nested schemas; what is deeper is JSON text


class Unfit(ValueError):
    """The value has no place in the type. The message says where, and holds nothing of the value."""


@dataclass(frozen=True)
class JsonType:
    """An Arrow type, and how a parsed JSON value becomes a value of it (raising `Unfit` where it cannot)."""

    type: pa.DataType
    convert: Callable[[Any, str], Any]  # (value, where in the answer)

    @classmethod
    def of(cls, schema: Schema) -> JsonType:
        """The type of a whole document's values."""
        return _Derivation(schema).derive(schema, ())

    def value(self, parsed: Any) -> Any:
        """The parsed answer as a value of the type. Raises `Unfit`."""
        return self.convert(parsed, "$")


class _Derivation:
    """The types of one document's schemas."""

    def __init__(self, root: Schema) -> None:
        self._root = root

    def derive(self, schema: Any, seen: tuple[str, ...], depth: int = 0) -> JsonType:
        """`seen` are the references that led here."""
        if not isinstance(schema, Mapping) or depth > _DEPTH:
            return _JSON
        said = {name: value for name, value in schema.items() if name not in _MEANINGLESS}
        if "$ref" in said:
            reference = said["$ref"]
            target = resolved(self._root, reference)
            if len(said) > 1 or target is None or reference in seen:
                return _JSON
            return self.derive(target, (*seen, reference), depth + 1)
        if "allOf" in said:
            return self.derive(said["allOf"][0], seen, depth + 1) if _is_alone(said, "allOf") else _JSON
        if (union := next((name for name in _UNIONS if name in said), None)) is not None:
            return self._union(said[union], seen, depth) if len(said) == 1 else _JSON
        return self._plain(said, seen, depth)

    def _union(self, branches: Any, seen: tuple[str, ...], depth: int) -> JsonType:
        """The branches' type where they have one, null apart."""
        if not isinstance(branches, list):
            return _JSON
        types = [self.derive(branch, seen, depth + 1) for branch in branches if not _is_null(branch)]
        return types[0] if types and (len(types) == 1 or all(t is types[0] for t in types)) else _JSON

    def _plain(self, said: Schema, seen: tuple[str, ...], depth: int) -> JsonType:
        kinds = _kinds(said)
        if len(kinds) != 1:
            return _JSON
        (kind,) = kinds
        if kind in _SCALARS:
            return _SCALARS[kind]
        if kind == "array" and isinstance(said.get("items"), Mapping) and "prefixItems" not in said:
            return _list_of(self.derive(said["items"], seen, depth + 1))
        if kind == "object" and said.get("properties") and is_closed(said):
            return _struct_of({n: self.derive(s, seen, depth + 1) for n, s in said["properties"].items()})
        return _JSON


def resolved(root: Schema, reference: Any) -> Any:
    """What a `$ref` within the document refers to; None where it is none of those."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found: Any = root
    for name in reference[1:].lstrip("/").split("/") if reference != "#" else ():
        name = name.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or name not in found:
            return None
        found = found[name]
    return found


def is_closed(schema: Schema) -> bool:
    """Whether objects have no keys but the properties."""
    return schema.get("additionalProperties") is False and not any(name in schema for name in _OPEN[1:])


def closed(schema: Schema) -> Schema:
    """The schema with objects closed that do not say otherwise, and integers that int64 holds.

    Where a schema combines others with `allOf`, objects stay as they are: closed, its parts would exclude each other.
    """
    return _Closing(close_objects=not _combines(schema)).schema(schema)


def _combines(schema: Any) -> bool:
    if isinstance(schema, Mapping):
        parts = schema.get("allOf")
        return (isinstance(parts, list) and len(parts) > 1) or any(map(_combines, schema.values()))
    return isinstance(schema, list) and any(map(_combines, schema))


@dataclass(frozen=True)
class _Closing:
    close_objects: bool

    def schema(self, schema: Any) -> Any:
        if isinstance(schema, list):
            return [self.schema(item) for item in schema]
        if not isinstance(schema, Mapping):
            return schema
        result = {name: self._keyword(name, value) for name, value in schema.items()}
        is_object = _kinds(result) == {"object"} and "properties" in result
        if self.close_objects and is_object and not any(name in result for name in (*_OPEN, *_UNIONS, "allOf", "$ref")):
            result["additionalProperties"] = False
        return _bounded(result) if _kinds(result) == {"integer"} else result

    def _keyword(self, name: str, value: Any) -> Any:
        if name in ("properties", "$defs", "definitions") and isinstance(value, Mapping):
            return {key: self.schema(schema) for key, schema in value.items()}
        return self.schema(value) if name in ("items", "prefixItems", "allOf", *_UNIONS) else value


def _bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """An integer's schema with bounds where it has none; listed values need none."""
    if {"enum", "const"} & schema.keys():
        return schema
    bounds: dict[str, Any] = {}
    if not {"minimum", "exclusiveMinimum"} & schema.keys():
        bounds["minimum"] = -_SAFE_INTEGER
    if not {"maximum", "exclusiveMaximum"} & schema.keys():
        bounds["maximum"] = _SAFE_INTEGER
    return {**schema, **bounds}


def _kinds(said: Schema) -> set[str]:
    """The types, null apart, by `type` or by the values that are listed."""
    if "type" in said:
        listed = said["type"] if isinstance(said["type"], list) else [said["type"]]
        return {kind for kind in listed if kind != "null" and isinstance(kind, str)}
    values = said["enum"] if isinstance(said.get("enum"), list) else [said["const"]] if "const" in said else None
    if values is not None:
        return {"string" if isinstance(value, str) else "other" for value in values if value is not None}
    return set()


def _is_null(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") == "null"


def _is_alone(said: Schema, name: str) -> bool:
    return len(said) == 1 and isinstance(said[name], list) and len(said[name]) == 1


# --- values ---------------------------------------------------------------------------------------------------------


def _text(value: Any, where: str) -> Any:
    if value is not None and not isinstance(value, str):
        raise Unfit(f"{where} is not a string")
    return value


def _integer(value: Any, where: str) -> Any:
    if isinstance(value, float) and value.is_integer():  # JSON Schema: 1.0 is an integer
        value = int(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value not in _INT64):
        raise Unfit(f"{where} is not an integer of 64 bits")
    return value


def _number(value: Any, where: str) -> Any:
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.inf
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Unfit(f"{where} is not a number that float64 holds")
    return number


def _truth(value: Any, where: str) -> Any:
    if value is not None and not isinstance(value, bool):
        raise Unfit(f"{where} is not true or false")
    return value


def _json(value: Any, where: str) -> Any:
    return None if value is None else json.dumps(value, ensure_ascii=False)


_SCALARS = {
    "string": JsonType(pa.string(), _text),
    "integer": JsonType(pa.int64(), _integer),
    "number": JsonType(pa.float64(), _number),
    "boolean": JsonType(pa.bool_(), _truth),
}
_JSON = JsonType(pa.string(), _json)


def _list_of(item: JsonType) -> JsonType:
    def convert(value: Any, where: str) -> Any:
        if value is not None and not isinstance(value, list):
            raise Unfit(f"{where} is not an array")
        return None if value is None else [item.convert(v, f"{where}[{i}]") for i, v in enumerate(value)]

    return JsonType(pa.list_(item.type), convert)


def _struct_of(fields: Mapping[str, JsonType]) -> JsonType:
    def convert(value: Any, where: str) -> Any:
        if value is not None and not isinstance(value, dict):
            raise Unfit(f"{where} is not an object")
        if value is not None and (unknown := value.keys() - fields.keys()):
            raise Unfit(f"{where} has {len(unknown)} keys that the schema does not name")
        return None if value is None else {n: f.convert(value.get(n), f"{where}.{n}") for n, f in fields.items()}

    return JsonType(pa.struct([(name, f.type) for name, f in fields.items()]), convert)
