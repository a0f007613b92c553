"""What the job asks of the engine for each row, and what the row's result is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moegen.answer.form import Form
from moegen.answer.json_type import Unfit
from moegen.job.prepare import Prepared
from moegen.row import RowError, RowResult, Status
from moegen.schedule.sequence import Finished, Request, TokenLogprob
from moegen.spec import JobSpec
from moegen.table.columns import PER_ANSWER
from moegen.text import Tokenizer

_BEST_FIRST = (Status.OK, Status.LENGTH, Status.INVALID_OUTPUT)  # anything else is worse


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer of a row; fields as in `RowResult`."""

    status: Status
    output: str | None = None
    output_json: Any = None
    output_raw: str | None = None
    error: RowError | None = None
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[dict[str, Any], ...] | None = None


class Answers:
    """Turns prepared rows into requests and what the engine made of them into results.

    Attributes:
        per_row: how many answers a row gets.

    Raises:
        SpecError: the form that the job asks for cannot be compiled for this checkpoint.
    """

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer) -> None:
        self.per_row = spec.sampling.n
        self._spec = spec
        self._form = Form.of(spec, tokenizer)

    def requests(self, row: Prepared) -> Iterator[Request]:
        """One for each answer; they differ in their noise."""
        grammar = self._form.grammar if self._form is not None else None
        for sample in range(self.per_row):
            yield replace(row.request, grammar=grammar, sample=sample, logprobs=self._spec.sampling.logprobs)

    def result(self, row: Prepared, finished: Sequence[Finished]) -> RowResult:
        """The row's result, from all its answers in any order."""
        first = finished[0]
        result = RowResult(
            row_index=first.row_index,
            status=first.status,
            prompt_tokens=first.prompt_tokens,
            seed=row.request.params.seed,
            input_truncated=row.input_truncated,
            prompt_rendered=row.prompt_rendered,
        )
        if first.log_likelihoods:
            return self._rated(result, row.request, first.log_likelihoods)
        answers = [self._answer(each) for each in sorted(finished, key=lambda each: each.sample)]
        generated = [len(each.token_ids) for each in finished if each.finish_reason is not None]
        return replace(result, completion_tokens=sum(generated) if generated else None, **_together(answers))

    def _rated(self, result: RowResult, request: Request, log_likelihoods: tuple[float, ...]) -> RowResult:
        result = replace(result, completion_tokens=0)
        if self._spec.task == "score":
            return replace(result, score=log_likelihoods[0], score_tokens=len(request.continuations[0]))
        probs = softmax(log_likelihoods)
        best = max(range(len(probs)), key=probs.__getitem__)  # the first, where several are equal
        label = self._spec.choices[best]
        return replace(result, output=label, label=label, label_prob=probs[best], label_probs=probs)

    def _answer(self, finished: Finished) -> _Answer:
        if finished.finish_reason is None:  # nothing was generated
            return _Answer(finished.status, error=finished.error)
        answer = _Answer(
            finished.status,
            finish_reason=finished.finish_reason,
            token_ids=finished.token_ids if "token_ids" in self._spec.output.include else None,
            logprobs=_cells(finished.logprobs) if self._spec.sampling.logprobs is not None else None,
        )
        if finished.status is Status.LENGTH:
            kept = finished.text if self._spec.output.on_length == "keep" else None
            return replace(answer, output=kept, output_raw=finished.text)
        if self._form is None:
            return replace(answer, output=finished.text)
        try:
            return replace(answer, output=finished.text, output_json=self._form.value(finished.text))
        except Unfit as unfit:
            error = RowError("invalid_output", str(unfit), "generate")
            return replace(answer, status=Status.INVALID_OUTPUT, output_raw=finished.text, error=error)


def _together(answers: Sequence[_Answer]) -> dict[str, Any]:
    """The fields of a row with these answers: its status and error are the worst answer's."""
    worst = max(answers, key=lambda answer: _badness(answer.status))
    fields: dict[str, Any] = {"status": worst.status, "error": worst.error}
    for name in PER_ANSWER:
        values = tuple(getattr(answer, name) for answer in answers)
        fields[name] = values[0] if len(values) == 1 else None if set(map(type, values)) == {type(None)} else values
    return fields


def _badness(status: Status) -> int:
    return _BEST_FIRST.index(status) if status in _BEST_FIRST else len(_BEST_FIRST)


def _cells(logprobs: Sequence[TokenLogprob]) -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            "token_id": each.token_id,
            "logprob": each.logprob,
            "top": [{"token_id": token_id, "logprob": logprob} for token_id, logprob in each.top],
        }
        for each in logprobs
    )


def softmax(values: Sequence[float]) -> tuple[float, ...]:
    """Shares in proportion to exp(value); they sum to 1."""
    largest = max(values)
    weights = [math.exp(value - largest) for value in values]
    return tuple(weight / sum(weights) for weight in weights)
