"""Where a row's prompt is: text, a template over columns, chat messages or token ids."""

from __future__ import annotations

import datetime
import decimal
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from moegen.errors import SpecError
from moegen.row import RowError, Status
from moegen.spec import Prompt

Row = Mapping[str, Any]
Finder = Callable[[Row], Any]
ROLES = ("system", "developer", "user", "assistant", "tool")


class Refused(Exception):
    """This row has no request; it ends here with a status."""

    def __init__(self, status: Status, error: RowError | None, prompt_tokens: int | None = None) -> None:
        self.status, self.error, self.prompt_tokens = status, error, prompt_tokens


def prompt_error(code: str, message: str) -> RowError:
    """What is wrong with a row's prompt; `message` must not quote it."""
    return RowError(code, message, "prompt")


def uses_chat(prompt: Prompt) -> bool:
    """Whether prompts go through the chat template."""
    return prompt.chat or prompt.system is not None or prompt.messages_column is not None


def finder(prompt: Prompt) -> Finder:
    """What a row's prompt is: a text or token ids, or, where the job uses chat, a list of messages."""
    if prompt.token_ids_column is not None:
        return _token_ids_finder(prompt.token_ids_column)
    if prompt.messages_column is not None:
        return _messages_finder(prompt.messages_column, prompt.system)
    find = _text_finder(prompt)
    if not uses_chat(prompt):
        return find
    system = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
    return lambda row: [*system, {"role": "user", "content": find(row)}]


def _text_finder(prompt: Prompt) -> Callable[[Row], str]:
    text_of = _column_text(prompt.column) if prompt.column is not None else Template(prompt.template or "").render

    def find(row: Row) -> str:
        text = text_of(row)
        if not text:
            raise empty_prompt("the prompt is empty")
        return text

    return find


def _column_text(column: str) -> Callable[[Row], str]:
    return lambda row: _of_type(_present(row, column), str, column, "a prompt is text")


def continuation_text(row: Row, column: str) -> str:
    """The text whose likelihood after the prompt is asked for."""
    text: str = _of_type(_present(row, column), str, column, "a continuation is text")
    if not text:
        raise empty_prompt("the continuation is empty")
    return text


def empty_prompt(message: str) -> Refused:
    """This row has a prompt, but nothing in it to start from."""
    return Refused(Status.SKIPPED_NULL, prompt_error("empty_prompt", message))


class Template:
    """Text with {column} places; {{ and }} are literal braces.

    Raises:
        SpecError: a brace that is neither.
    """

    def __init__(self, template: str) -> None:
        self._pieces: list[tuple[str, str | None]] = []  # literal text, then the column that follows it
        literal, end = "", 0
        for match in re.finditer(r"\{\{|\}\}|\{([^{}]+)\}|[{}]", template):
            literal, end = literal + template[end : match.start()], match.end()
            if match[1] is not None:
                self._pieces.append((literal, match[1]))
                literal = ""
            elif match[0] in ("{{", "}}"):
                literal += match[0][0]
            else:
                raise SpecError(
                    f"prompt.template: the {match[0]!r} at character {match.start()} belongs to no place; "
                    "write {column}, or {{ and }} for literal braces"
                )
        self._pieces.append((literal + template[end:], None))

    @property
    def places(self) -> list[str]:
        return [column for _, column in self._pieces if column is not None]

    def render(self, row: Row) -> str:
        return "".join(
            literal if column is None else literal + _as_text(_present(row, column), column)
            for literal, column in self._pieces
        )


def _as_text(value: Any, column: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, (int, float, decimal.Decimal, datetime.timedelta)):
        return str(value)
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return value.isoformat()
    raise _bad_type(value, column, "a template takes text, numbers, dates and lists or structs of them")


def _messages_finder(column: str, system: str | None) -> Finder:
    def find(row: Row) -> list[dict[str, Any]]:
        messages = _of_type(parsed(_present(row, column)), list, column, "chat messages are a list, or it as JSON")
        if not messages:
            raise empty_prompt("the list of messages is empty")
        checked = [_message(message, i) for i, message in enumerate(messages)]
        if system is not None and checked[0]["role"] != "system":  # a row's own system message stays
            checked.insert(0, {"role": "system", "content": system})
        return checked

    return find


def _message(message: Any, position: int) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise refused_messages(f"message {position} is not a mapping with a role and a content")
    content = message.get("content")
    if isinstance(content, list):  # parts, as OpenAI writes them
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        all_text = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        content = "".join(map(str, texts)) if all_text else None
    if not isinstance(content, str):
        raise refused_messages(f"the content of message {position} is not text")
    return {**{name: value for name, value in message.items() if value is not None}, "content": content}


def refused_messages(message: str) -> Refused:
    """This row's chat messages cannot be used."""
    return Refused(Status.ERROR, prompt_error("bad_messages", message))


def _token_ids_finder(column: str) -> Finder:
    def find(row: Row) -> list[int]:
        ids = _of_type(parsed(_present(row, column)), list, column, "token ids are a list of whole numbers")
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise _bad_type(token_id, f"{column}[]", "a token id is a whole number")
        return ids

    return find


def _present(row: Row, column: str) -> Any:
    value = row.get(column)
    if value is None:
        raise Refused(Status.SKIPPED_NULL, None)
    return value


def parsed(value: Any) -> Any:
    """A list or mapping that may have been written as JSON text; anything else as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _of_type(value: Any, kind: type, column: str, remedy: str) -> Any:
    if not isinstance(value, kind):
        raise _bad_type(value, column, remedy)
    return value


def _bad_type(value: Any, column: str, remedy: str) -> Refused:
    message = f"column {column!r} holds a value of type {type(value).__name__}; {remedy}"
    return Refused(Status.ERROR, prompt_error("bad_prompt_type", message))
