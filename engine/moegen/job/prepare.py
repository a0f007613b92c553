"""Rows to requests: the prompt found, rendered and encoded, the row's own parameters applied.

Whatever is wrong with a row becomes its status and error; only the specification can be at fault for an exception.
Neither errors nor logs ever hold a row's text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from moegen.errors import SpecError
from moegen.job.params import row_params
from moegen.job.prompts import (
    ROLES,
    Refused,
    Row,
    Template,
    continuation_text,
    empty_prompt,
    finder,
    prompt_error,
    refused_messages,
    uses_chat,
)
from moegen.row import RowError, RowResult, Status
from moegen.schedule.sequence import Request
from moegen.spec import JobSpec, Sampling
from moegen.text import Tokenizer

_MESSAGE_LIMIT = 500  # characters of an error message: a parameter column may hold anything


@dataclass(frozen=True, slots=True)
class Prepared:
    """A row that is ready to run, and what its result will say about its prompt."""

    request: Request
    input_truncated: bool = False
    prompt_rendered: str | None = None  # kept only when output.include asks for it

    @property
    def row_index(self) -> int:
        return self.request.row_index


def needed_columns(spec: JobSpec) -> tuple[str, ...]:
    """The input columns that prompts and per-row parameters are made of, each once.

    Raises:
        SpecError: the template has a stray brace.
    """
    prompt, sampling = spec.prompt, spec.sampling
    names = [prompt.column, prompt.messages_column, prompt.token_ids_column, prompt.continuation_column]
    names += [sampling.params_column]
    names += [*(Template(prompt.template).places if prompt.template is not None else ()), *sampling.param_columns]
    return tuple(dict.fromkeys(name for name in names if name is not None))


class Preparer:
    """Turns rows into requests, a batch at a time, with one call of the tokenizer per batch.

    Args:
        spec: the job.
        tokenizer: the checkpoint's.
        max_context_tokens: prompt and answer together may have this many tokens.

    Raises:
        SpecError: the job needs a chat template and the checkpoint has none, or a choice has no tokens.
    """

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer, max_context_tokens: int) -> None:
        self._tokenizer, self._max_context_tokens = tokenizer, max_context_tokens
        self._on_too_long = spec.prompt.on_too_long
        self._sampling = spec.sampling
        self._keep_rendered = "prompt_rendered" in spec.output.include
        self._chat = uses_chat(spec.prompt)
        if self._chat:
            tokenizer.require_chat_template()
        self._find = finder(spec.prompt)
        self._bound = spec.bound
        self._longest = "sampling.max_tokens" if spec.task == "generate" else "a longest continuation of"
        self._continuation_column = spec.prompt.continuation_column
        self._choices = _encoded_choices(spec, tokenizer) if spec.task == "classify" else ()

    def prepare(self, rows: Iterable[tuple[int, Row | RowError]]) -> list[Prepared | RowResult]:
        """One `Prepared` or, for a row that cannot run, its `RowResult` per `(row_index, values)`, in order."""
        drafts = [self._draft(row_index, values) for row_index, values in rows]
        good = [draft for draft in drafts if isinstance(draft, _Draft)]
        texts = [draft.text for draft in good if draft.text is not None]
        encoded = iter(self._tokenizer.encode_batch(texts, add_special_tokens=not self._chat))
        rated = [draft.continuation for draft in good if draft.continuation is not None]
        continuations = iter(self._tokenizer.encode_batch(rated, add_special_tokens=False))
        return [
            draft if isinstance(draft, RowResult) else self._finish(draft, encoded, continuations) for draft in drafts
        ]

    def _draft(self, row_index: int, values: Row | RowError) -> _Draft | RowResult:
        try:
            if isinstance(values, RowError):
                raise Refused(Status.ERROR, values)
            found = self._find(values)
            params = self._checked_params(row_params(self._sampling, values))
            rated = self._continuation(values)
            if not isinstance(found, str) and not self._chat:
                return _Draft(row_index, params, None, self._checked_ids(found), rated)
            return _Draft(row_index, params, self._render(found), (), rated)
        except Refused as refused:
            return _result(row_index, refused)

    def _checked_params(self, params: Sampling) -> Sampling:
        if self._bound and params.ignore_eos:
            message = "sampling.ignore_eos: an answer of a given form ends where it is complete; leave it out"
            raise Refused(Status.INVALID_PARAMS, RowError("invalid_params", message, "params"))
        return params

    def _continuation(self, values: Row) -> str | None:
        column = self._continuation_column
        return None if column is None else _encodable(continuation_text(values, column), "continuation")

    def _render(self, found: str | list[Any]) -> str:
        return _encodable(found if isinstance(found, str) else self._through_template(found), "prompt")

    def _through_template(self, messages: list[Any]) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.render_chat(messages)
        except (TemplateError, TypeError, KeyError):  # what it says may quote the messages
            order = ", ".join(message["role"] if message["role"] in ROLES else "another" for message in messages)
            raise refused_messages(f"the chat template refuses these messages (roles in order: {order})") from None

    def _checked_ids(self, ids: list[int]) -> tuple[int, ...]:
        if not ids:
            raise empty_prompt("the list of token ids is empty")
        for token_id in ids:
            if not 0 <= token_id < self._tokenizer.vocab_size:
                message = f"token id {token_id} is outside the model's vocabulary of {self._tokenizer.vocab_size}"
                raise Refused(Status.ERROR, prompt_error("bad_token_id", message))
        return tuple(ids)

    def _finish(
        self, draft: _Draft, encoded: Iterator[list[int]], continuations: Iterator[list[int]]
    ) -> Prepared | RowResult:
        ids = draft.token_ids if draft.text is None else tuple(next(encoded))
        rated = self._choices if draft.continuation is None else (tuple(next(continuations)),)
        params = replace(draft.params, max_tokens=max(map(len, rated))) if rated and all(rated) else draft.params
        try:
            if not all(rated):
                raise empty_prompt("the continuation has no tokens")
            fitting = self._fit(ids, params.max_tokens)
        except Refused as refused:
            return _result(draft.row_index, refused)
        request = Request(draft.row_index, fitting, params, continuations=rated)
        return Prepared(request, len(fitting) < len(ids), draft.text if self._keep_rendered else None)

    def _fit(self, ids: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        if not ids:
            raise empty_prompt("the prompt has no tokens")
        room = self._max_context_tokens - max_tokens
        if len(ids) <= room:
            return ids
        if self._on_too_long == "error" or room < 1:
            message = (
                f"{len(ids)} prompt tokens and {self._longest} {max_tokens} exceed "
                f"the {self._max_context_tokens} tokens that fit"
            )
            raise Refused(Status.TOO_LONG, prompt_error("too_long", message), len(ids))
        return ids[-room:] if self._on_too_long == "truncate_left" else ids[:room]


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row before encoding: its text, or (where the text is None) its token ids."""

    row_index: int
    params: Sampling
    text: str | None
    token_ids: tuple[int, ...]
    continuation: str | None


def _encoded_choices(spec: JobSpec, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each choice's tokens, as they follow the prompt's.

    Raises:
        SpecError: the tokenizer makes nothing of one, or the same of two.
    """
    encoded = tuple(map(tuple, tokenizer.encode_batch(spec.choices, add_special_tokens=False)))
    for index, token_ids in enumerate(encoded):
        if not token_ids or token_ids in encoded[:index]:
            what = "the tokens of another choice" if token_ids else "no tokens"
            raise SpecError(f"choices: {spec.choices[index]!r} has {what} in this checkpoint; word it otherwise")
    return encoded


def _encodable(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"the {what} has a lone surrogate at character {error.start}"
        raise Refused(Status.ERROR, prompt_error("invalid_text", message)) from None
    return text


def _result(row_index: int, refused: Refused) -> RowResult:
    error = refused.error
    if error is not None and len(error.message) > _MESSAGE_LIMIT:
        error = replace(error, message=error.message[:_MESSAGE_LIMIT] + "...")
    return RowResult(row_index, refused.status, error=error, prompt_tokens=refused.prompt_tokens)
