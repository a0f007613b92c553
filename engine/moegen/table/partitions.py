"""Columns that folders are named after: `lang=de/ds=2026-11-22/`, as Hive, Spark and many others lay tables out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import date
from urllib.parse import quote, unquote

import pyarrow as pa

from moegen.errors import InputError

NULL = "__HIVE_DEFAULT_PARTITION__"
_INT = re.compile(r"0|-?[1-9]\d{0,17}")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")

Names = Mapping[str, str | None]  # column -> its value as a folder's name says it


def names_in(folders: str) -> Names:
    """The columns that a path's folders are named after.

    Raises:
        InputError: one column twice.
    """
    found: dict[str, str | None] = {}
    for folder in folders.split("/"):
        name, sign, value = folder.partition("=")
        if not sign or not name:
            continue
        name = unquote(name)
        if name in found:
            raise InputError(f"{folders}: names the column {name!r} twice; set input.partitions=off, or move the files")
        found[name] = None if value == NULL else unquote(value)
    return found


def types_of(paths: Iterable[Names]) -> pa.Schema:
    """Whole numbers, dates or text, whichever fits all values of a column: 007 stays text."""
    values: dict[str, list[str]] = {}
    for names in paths:
        for name, value in names.items():
            values.setdefault(name, []).extend([] if value is None else [value])
    return pa.schema([(name, _type(set(found))) for name, found in values.items()])


def scalars(names: Names, schema: pa.Schema) -> dict[str, pa.Scalar]:
    """A file's own values: null where its path does not name a column."""
    return {field.name: pa.scalar(names.get(field.name), pa.string()).cast(field.type) for field in schema}


def folder_of(names: Names) -> str:
    """What `names_in` reads: the folders of rows with these values."""
    return "/".join(
        f"{quote(name, safe='')}={NULL if value is None else quote(value, safe='')}" for name, value in names.items()
    )


def _type(values: set[str]) -> pa.DataType:
    if values and all(map(_INT.fullmatch, values)):
        return pa.int64()
    return pa.date32() if values and all(map(_is_date, values)) else pa.string()


def _is_date(text: str) -> bool:
    try:
        return bool(_DATE.fullmatch(text)) and bool(date.fromisoformat(text))
    except ValueError:
        return False
