"""The reference tables name exactly what the code has, with the defaults that it has."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator

import pyarrow as pa
import pytest
import yaml
from moegen.row import RowError, Status
from moegen.spec import JobSpec, Output
from moegen.table.manifest import Manifest
from moegen.table.schema import output_schema

from moegen_airflow import exceptions
from moegen_airflow.get_provider_info import get_provider_info
from moegen_airflow.operator import MoegenBatchOperator
from moegen_airflow.sensor import MoegenBatchSensor
from tests.docs.blocks import ROOT, tables

REQUIRED = object()


def documented(page: str, heading: str | None = None) -> dict[str, list[str]]:
    """First cell -> the others, of the tables below one heading, or of all whose first cells are code."""
    return {
        row[0].split("`")[1]: row
        for above, rows in tables(page)
        if heading in (None, above)
        for row in rows
        if row[0].startswith("`")
    }


def default(cell: str) -> object:
    if cell in ("required", "none"):
        return {"required": REQUIRED, "none": None}[cell]
    return yaml.safe_load(cell.strip("`"))


def fields(cls: type, path: str = "") -> Iterator[tuple[str, object]]:
    """Every field of the specification by its full name, with its default."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        name, hint = f"{path}{item.name}", hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{name}.")
        elif item.default is dataclasses.MISSING:
            yield name, REQUIRED
        else:
            yield name, list(item.default) if isinstance(item.default, tuple) else item.default


def test_every_field_of_a_job():
    said = {name: default(row[1]) for name, row in documented("jobs.md").items()}
    assert said == dict(fields(JobSpec))


@pytest.mark.parametrize(
    ("page", "operator"), [("operators.md", MoegenBatchOperator), ("sensors.md", MoegenBatchSensor)]
)
def test_every_parameter(page, operator):
    wanted = {
        name: REQUIRED if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(operator.__init__).parameters.items()
        if name not in ("self", "kwargs")
    }
    rows = {name: row for name, row in documented(page).items() if name in wanted}
    assert rows.keys() == wanted.keys()
    for name, row in rows.items():
        assert ("*t*" in row[0]) == (name in operator.template_fields), name
        if name != "deferrable":  # its default is Airflow's configuration
            assert default(row[1]) == wanted[name], name


def test_every_field_of_a_connection():
    (connection,) = get_provider_info()["connection-types"]
    shown = {row[0]: row for _, rows in tables("connections.md") for row in rows}
    for name, field in connection["conn-fields"].items():
        assert f"`{name}`" in shown[field["label"]][1]
        assert default(shown[field["label"]][2]) == field["schema"].get("default")
    labels = connection["ui-field-behaviour"]["relabeling"]
    for name, label in labels.items():
        assert f"`{name}`" in shown[label][1]


def test_every_error_of_the_provider():
    errors = {name for name, value in vars(exceptions).items() if name.startswith("Moegen") and inspect.isclass(value)}
    assert set(documented("operators.md", "Errors")) == errors - {"MoegenError"}


def test_every_column_with_its_type():
    shown = documented("data-contract.md", "The columns")
    schema = output_schema(pa.schema([]), Output("out", include=("token_ids", "prompt_rendered")))
    assert list(shown) == schema.names
    for field in schema:
        words = {"struct": "struct", "list": "list of int32"}.get(str(field.type).partition("<")[0], str(field.type))
        assert shown[field.name][1] == words, field.name
    assert all(f"`{field.name}`" in shown["error"][2] for field in dataclasses.fields(RowError))


def test_every_status():
    assert set(documented("data-contract.md", "The statuses")) == {status.value for status in Status}


def test_every_field_of_the_manifest():
    assert set(documented("data-contract.md", "The manifest")) == {field.name for field in dataclasses.fields(Manifest)}


def test_every_page_is_in_the_navigation():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert set(_leaves(navigation)) == pages


def _leaves(node: object) -> Iterator[str]:
    for item in node if isinstance(node, list) else node.values():
        if isinstance(item, str):
            yield item
        else:
            yield from _leaves(item)
