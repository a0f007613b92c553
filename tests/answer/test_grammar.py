"""Grammars over a checkpoint's tokens: what they admit, which tokens may come next, what cannot be compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moegen.answer.form import Form
from moegen.answer.grammar import Matcher, TokenGrammar, grammar_text
from moegen.answer.json_type import Unfit
from moegen.errors import SpecError
from moegen.spec import JobSpec
from moegen.text import Tokenizer

from tests.tiny import VOCAB_SIZE, tiny_tokenizer

ENDS = [256, 258]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "who": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]}},
    "required": ["n", "who"],
}


def checkpoint(folder: Path, ends: list[int] | None) -> Tokenizer:
    tiny_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if ends is None:
        del settings["eos_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE, "eos_token_id": ends}))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return checkpoint(tmp_path_factory.mktemp("tokenizer"), ENDS)


def spec(**fields: Any) -> JobSpec:
    base = {"input": {"uri": "in"}, "prompt": {"column": "p"}, "model": {"uri": "m"}, "sampling": {"max_tokens": 4}}
    return JobSpec.from_mapping({**base, "output": {"uri": "out"}, **fields})


def grammar(tokenizer: Tokenizer, **fields: Any) -> TokenGrammar:
    form = Form.of(spec(**fields), tokenizer)
    assert form is not None
    return form.grammar


def allowed(found: TokenGrammar, *matchers: Matcher) -> list[list[int]]:
    bits = np.unpackbits(found.masks(matchers), axis=1, bitorder="little")[:, :VOCAB_SIZE]
    return [np.flatnonzero(row).tolist() for row in bits]


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch([text])[0]


@pytest.mark.parametrize(
    ("fields", "admitted", "refused"),
    [
        ({"choices": ["yes", "né 😀", "a\nb", '"q"\\']}, ["yes", "né 😀", "a\nb", '"q"\\'], ["", "ye", "yess", "no"]),
        ({"choices": ["a", "ab"]}, ["a", "ab"], ["b", "abb"]),
        ({"regex": "[a-z]{2,3}-\\d"}, ["ab-1", "abc-9"], ["a-1", "ab-1x", " ab-1"]),
        (
            {"output_schema": SCHEMA},
            ['{"n":1,"who":null}', '{ "n": -2, "who": "café" }'],
            ['{"n":1}', '{"n":  1,"who":null}', '{"n":1,"who":null,"x":1}', '{"n":9007199254740992,"who":null}',
             '{"who":null,"n":1}', '{"n":1.5,"who":null}', '{"n":1,"who":"abcde"}'],
        ),
    ],
)  # fmt: skip
def test_what_is_admitted(
    tokenizer: Tokenizer, fields: dict[str, Any], admitted: list[str], refused: list[str]
) -> None:
    found = grammar(tokenizer, **fields)
    assert [found.accepts(text) for text in admitted] == [True] * len(admitted)
    assert [found.accepts(text) for text in refused] == [False] * len(refused)


def test_the_order_of_properties_survives_every_trip(tokenizer: Tokenizer) -> None:
    backwards = spec(output_schema={**SCHEMA, "properties": dict(reversed(SCHEMA["properties"].items()))})  # type: ignore[attr-defined]
    again = JobSpec.from_mapping(json.loads(backwards.to_json()))
    assert again == backwards != spec(output_schema=SCHEMA)
    found = TokenGrammar(grammar_text(again) or "", tokenizer)
    assert found.accepts('{"who":null,"n":1}')
    assert not found.accepts('{"n":1,"who":null}')


def test_end_tokens_are_allowed_exactly_where_the_grammar_accepts(tokenizer: Tokenizer) -> None:
    found = grammar(tokenizer, choices=["a", "ab"])
    letters = {text: ids(tokenizer, text)[0] for text in "ab"}
    places = [found.matcher(ids(tokenizer, text)) for text in ("", "a", "ab")]
    assert allowed(found, *places) == [[letters["a"]], sorted([letters["b"], *ENDS]), ENDS]
    assert [place.complete for place in places] == [False, True, True]


def test_a_place_depends_on_the_tokens_alone(tokenizer: Tokenizer) -> None:
    found = grammar(tokenizer, output_schema=SCHEMA)
    answer = ids(tokenizer, '{"n": -12, "who": "é"}')
    step_by_step = found.matcher()
    for length in range(len(answer) + 1):
        step_by_step.follow(answer[:length])
        anew, other = found.matcher(answer[:length]), found.matcher(answer[: length // 2])
        masks = allowed(found, step_by_step, anew, other)
        assert masks[0] == masks[1]
        assert step_by_step.complete == anew.complete == (length == len(answer))
        if length < len(answer):
            assert answer[length] in masks[0]


def test_an_answer_outside_fails_and_stays_failed(tokenizer: Tokenizer) -> None:
    found = grammar(tokenizer, choices=["yes", "no"])
    place = found.matcher()
    assert not place.failed
    place.follow(ids(tokenizer, "x"))
    assert place.failed
    place.follow(ids(tokenizer, "xyes"))
    assert place.failed


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"output_schema": {"type": "strin"}}, "output_schema: cannot be compiled: Invalid type: strin"),
        ({"output_schema": {"$ref": "#/$defs/x"}}, "'/\\$defs/x' does not exist"),
        ({"output_schema": {"type": "array", "uniqueItems": True}}, 'Unimplemented keys: \\["uniqueItems"\\]'),
        ({"output_schema": {"type": "object", "properties": 5}}, "properties must be an object"),
        ({"output_schema": {"allOf": 5}}, "allOf must be an array"),
        ({"output_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable"),
        ({"regex": "[a"}, "regex: cannot be compiled: .*unclosed character class"),
        ({"regex": "(?=a)b"}, "look-around"),
    ],
)
def test_what_cannot_be_compiled_is_told_with_the_librarys_reason(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told) as refused:
        grammar_text(spec(**fields))
    assert refused.value.exit_code == 64
    assert len(str(refused.value)) < 700


def test_a_schema_without_end_is_refused_in_words() -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(3000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(SpecError, match="output_schema"):
        grammar_text(spec(output_schema=deep))


def test_a_checkpoint_without_end_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="names no end token"):
        grammar(checkpoint(tmp_path, None), choices=["a", "b"])


def test_free_answers_have_no_form(tokenizer: Tokenizer) -> None:
    assert Form.of(spec(), tokenizer) is None
    assert Form.of(spec(task="classify", choices=["a", "b"]), tokenizer) is None


def test_values(tokenizer: Tokenizer) -> None:
    form = Form.of(spec(output_schema=SCHEMA), tokenizer)
    assert form is not None
    assert form.value('{"n": 7, "who": "x"}') == {"n": 7, "who": "x"}
    for text in ('{"n": 7, "who"', '{"n": 7, "who": "x"} ', "", "SECRET"):
        with pytest.raises(Unfit, match="not of the form") as unfit:
            form.value(text)
        assert "SECRET" not in str(unfit.value)
    number = Form.of(spec(output_schema={"type": "number"}), tokenizer)
    assert number is not None
    for text in ("1e999", "1" * 5000):
        with pytest.raises(Unfit):
            number.value(text)
