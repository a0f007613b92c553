"""The form that a job asks of its answers: their grammar while they are written, their value once they are."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from moegen.answer.grammar import TokenGrammar, grammar_text
from moegen.answer.json_type import JsonType, Unfit, closed
from moegen.spec import JobSpec

if TYPE_CHECKING:
    from moegen.text import Tokenizer


def json_type(spec: JobSpec) -> JsonType | None:
    """The type of column `output_json`; None where the job asks for no JSON."""
    return JsonType.of(closed(json.loads(spec.output_schema))) if spec.output_schema else None


class Form:
    """What every answer of a job must be.

    Attributes:
        grammar: shared by all rows.
    """

    def __init__(self, grammar: str, spec: JobSpec, tokenizer: Tokenizer) -> None:
        """Raises `SpecError` when the checkpoint's tokenizer or the grammar cannot be used."""
        self.grammar = TokenGrammar(grammar, tokenizer, json_text=bool(spec.output_schema))
        self._json = json_type(spec)

    @classmethod
    def of(cls, spec: JobSpec, tokenizer: Tokenizer) -> Form | None:
        """None where answers are free. Raises `SpecError` as `grammar_text` does."""
        grammar = grammar_text(spec)
        return cls(grammar, spec, tokenizer) if grammar is not None else None

    def value(self, text: str) -> Any:
        """The cell of column `output_json`; None for choices and expressions.

        Raises:
            Unfit: the text is not what was asked for. The message holds nothing of it.
        """
        if not self.grammar.accepts(text):
            raise Unfit("the answer is not of the form that the job asks for")
        if self._json is None:
            return None
        try:
            return self._json.value(json.loads(text))
        except Unfit:
            raise
        except (ValueError, RecursionError) as error:
            raise Unfit("the answer is JSON that cannot be read: a number or its nesting is too long") from error
