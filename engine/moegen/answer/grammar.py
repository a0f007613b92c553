"""What an answer may be: a grammar over text, compiled once for a checkpoint's tokens and shared by all rows.

llguidance does the work: it compiles JSON Schemas, choices and regular expressions alike, and says for each answer
which tokens may come next. Which that are depends on the answer's own tokens alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moegen.answer.json_type import closed
from moegen.errors import SpecError
from moegen.spec import JobSpec

if TYPE_CHECKING:
    from moegen.text import Tokenizer

Bits = npt.NDArray[np.uint8]  # one bit per token, the lowest first: `[S, B]` with B = ceil(V / 8)

_JSON_OPTIONS: Any = {
    "whitespace_flexible": True,
    "whitespace_pattern": "[ ]?",
}  # unbounded, a model may write nothing else
_REASON_LIMIT = 500  # characters of the library's reason: it may quote the whole schema


def grammar_text(spec: JobSpec) -> str | None:
    """The grammar of the job's answers in llguidance's own form; None where they are free.

    Raises:
        SpecError: the schema, expression or choices cannot be compiled; says the library's reason.
    """
    if not spec.bound:
        return None
    from llguidance import LLMatcher

    field = "output_schema" if spec.output_schema else "choices" if spec.choices else "regex"
    try:
        grammar = _compiled(spec)
    except (ValueError, RecursionError) as error:
        raise _refused(field, str(error)) from error
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        raise _refused(field, "; ".join(messages))
    return grammar


def _compiled(spec: JobSpec) -> str:
    from llguidance import LLMatcher

    if spec.output_schema:
        schema = closed(json.loads(spec.output_schema))
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema, ensure_ascii=False), overrides=_JSON_OPTIONS)
    elif spec.choices:
        grammar = LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in spec.choices))
    else:
        grammar = LLMatcher.grammar_from_regex(spec.regex or "")
    return str(grammar)


def _refused(field: str, reason: str) -> SpecError:
    words = " ".join(reason.split())
    words = words if len(words) <= _REASON_LIMIT else words[:_REASON_LIMIT] + "..."
    return SpecError(f"{field}: cannot be compiled: {words}")


class TokenGrammar:
    """A grammar over one checkpoint's tokens. Safe to share between rows and threads; each row has its own `Matcher`.

    Raises:
        SpecError: the checkpoint's tokenizer or the grammar cannot be used for this.
    """

    def __init__(self, grammar: str, tokenizer: Tokenizer, *, json_text: bool = False) -> None:
        """`json_text` makes masks inside JSON's strings cheaper."""
        from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

        self.width_bytes = -(-tokenizer.vocab_size // 8)
        self._words = -(-tokenizer.vocab_size // 32)
        if not tokenizer.eos_token_ids:
            raise SpecError(
                "model.uri: the checkpoint names no end token, which an answer of a given form must end with; "
                "add eos_token_id to its generation_config.json"
            )
        try:
            self._tokens = LLTokenizer(
                tokenizer.to_json(),
                n_vocab=tokenizer.vocab_size,
                eos_token=sorted(tokenizer.eos_token_ids),
                slices=LLTokenizer.json_slices() if json_text else None,
            )
        except (ValueError, RuntimeError) as error:
            raise SpecError(f"model.uri: the tokenizer cannot be bound to a grammar: {error}") from error
        limits = LLParserLimits(verbose_errors=False)  # else errors quote the answer
        self._start = LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        if self._start.is_error():
            raise _refused("output_schema, choices or regex", self._start.get_error())
        self._executor = LLExecutor()

    def matcher(self, answer: Sequence[int] = ()) -> Matcher:
        """A place in the grammar: after these tokens."""
        matcher = Matcher(self._start.deep_copy())
        matcher.follow(answer)
        return matcher

    def masks(self, matchers: Sequence[Matcher]) -> Bits:
        """Which tokens may come next: a row of bits for each matcher. Runs beside Python, on several cores."""
        masks = np.zeros((len(matchers), self._words), np.int32)
        if len(matchers):
            from llguidance.numpy import fill_next_token_bitmask_par

            places = [(matcher.place, row) for row, matcher in enumerate(matchers)]
            fill_next_token_bitmask_par(self._executor, places, masks)
        return masks.view(np.uint8)[:, : self.width_bytes]

    def accepts(self, text: str) -> bool:
        """Whether a whole answer is one that the grammar admits."""
        matcher = self.matcher(self._tokens.tokenize_str(text))
        return not matcher.failed and matcher.complete


class Matcher:
    """One answer's place in the grammar: a function of its tokens, whatever happened between them."""

    __slots__ = ("_followed", "place")

    def __init__(self, place: Any) -> None:
        self.place = place
        self._followed = 0

    def follow(self, answer: Sequence[int]) -> None:
        """`answer` is the whole answer so far; what is new in it is followed."""
        new = list(answer[self._followed :])
        if new:
            self.place.consume_tokens(new)
            self._followed = len(answer)

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return bool(self.place.is_accepting())

    @property
    def failed(self) -> bool:
        """Whether the answer has left the grammar, or became too complex for the library."""
        return bool(self.place.is_error())
