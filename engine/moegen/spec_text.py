"""A specification's text: YAML or JSON that says each thing once, and no more than a specification has to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moegen.errors import SpecError

_LARGEST = 1 << 20  # bytes
_MOST_VALUES = 100_000  # anchors written out
_DEEPEST = 50  # levels


def read_mapping(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file says, as plain values.

    Raises:
        SpecError: it cannot be read, is no mapping, names a key twice, is nested too deeply or means too much.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise SpecError(f"{path}: is larger than 1 MiB; a job file names tables, it does not hold them")
        text = data.decode()
        # YAML reads JSON's 1e-05 as text and its escaped emoji as lone surrogates.
        value = json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else _yaml(text)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}; name a YAML or JSON job file") from error
    except RecursionError as error:
        raise SpecError(f"{path}: is nested too deeply; a specification has {_DEEPEST} levels at most") from error
    except ValueError as error:
        raise SpecError(f"{path}: not valid YAML or JSON: {error}") from error
    if not isinstance(value, dict):
        raise SpecError(f"{path}: is no mapping but {type(value).__name__}; a job file is a mapping of sections")
    _values(value, path, 0, {})
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """As PyYAML's, which lets the last of two equal keys win."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]  # before << is merged
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                line = node.start_mark.line + 1
                raise ValueError(f"the key {twice!r} is there twice, in the mapping that begins in line {line}")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def _values(value: Any, path: Path, depth: int, counted: dict[int, int | None]) -> int:
    """How many values there are, what anchors repeat counted as often as it is repeated; `counted`: None while open."""
    if not isinstance(value, (dict, list)):
        return 1
    if depth > _DEEPEST:
        raise SpecError(f"{path}: is nested too deeply; a specification has {_DEEPEST} levels at most")
    if id(value) in counted:
        known = counted[id(value)]
        if known is None:
            raise SpecError(f"{path}: has an anchor that holds itself; write its values out")
        return known
    counted[id(value)] = None
    parts = value.values() if isinstance(value, dict) else value
    total = 1 + sum(_values(part, path, depth + 1, counted) for part in parts)
    if total > _MOST_VALUES:
        raise SpecError(f"{path}: means more than {_MOST_VALUES:,} values with its anchors written out; write less")
    counted[id(value)] = total
    return total
