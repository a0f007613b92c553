from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from moegen.errors import SpecError
from moegen.job.prepare import Prepared, Preparer, needed_columns
from moegen.row import RowError, RowResult, Status
from moegen.spec import JobSpec
from moegen.text import Tokenizer

from tests.tiny import tiny_tokenizer

CONTEXT = 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(str(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def spec(prompt: dict[str, Any], include: tuple[str, ...] = (), **sampling: Any) -> JobSpec:
    return JobSpec.from_mapping(
        {
            "input": {"uri": "in.jsonl"},
            "prompt": prompt,
            "model": {"uri": "model"},
            "sampling": {"max_tokens": 8, **sampling},
            "output": {"uri": "out", "include": include},
        }
    )


def prepare(tokenizer: Tokenizer, job: JobSpec, *values: dict[str, Any] | RowError) -> list[Prepared | RowResult]:
    return Preparer(job, tokenizer, CONTEXT).prepare(enumerate(values))


def prompt_of(tokenizer: Tokenizer, job: JobSpec, row: dict[str, Any]) -> str:
    (prepared,) = prepare(tokenizer, job, row)
    assert isinstance(prepared, Prepared), prepared
    rendered = "".join(tokenizer._rust.id_to_token(i) for i in prepared.request.token_ids)
    letters = tokenizer._rust.decoder.decode([rendered])
    return str(letters)


def refused(tokenizer: Tokenizer, job: JobSpec, row: dict[str, Any] | RowError) -> tuple[Status, str | None]:
    (result,) = prepare(tokenizer, job, row)
    assert isinstance(result, RowResult), result
    return result.status, result.error and result.error.code


COLUMN = {"column": "p"}
MESSAGES = {"messages_column": "m"}
IDS = {"token_ids_column": "ids"}
USER = {"role": "user", "content": "hi"}
CHAT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nS<|im_end|>\n"


@pytest.mark.parametrize(
    ("prompt", "row", "expected"),
    [
        (COLUMN, {"p": "naïve 😀"}, "naïve 😀"),
        (COLUMN, {"p": " "}, " "),
        (COLUMN | {"chat": True}, {"p": "hi"}, CHAT),
        (COLUMN | {"system": "S"}, {"p": "hi"}, SYSTEM + CHAT),
        ({"template": "{{{a}}} {b}, {c d}!"}, {"a": 1.5, "b": True, "c d": [1, "é"]}, '{1.5} true, [1, "é"]!'),
        ({"template": "{a}"}, {"a": datetime.date(2026, 1, 2)}, "2026-01-02"),
        ({"template": "{a}", "system": "S"}, {"a": "hi"}, SYSTEM + CHAT),
        (MESSAGES, {"m": [USER]}, CHAT),
        (MESSAGES, {"m": json.dumps([USER])}, CHAT),
        (MESSAGES, {"m": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, CHAT),
        (MESSAGES, {"m": [{**USER, "name": None}]}, CHAT),
        (MESSAGES | {"system": "S"}, {"m": [USER]}, SYSTEM + CHAT),
        (MESSAGES | {"system": "S"}, {"m": [{"role": "system", "content": "own"}, USER]},
         "<|im_start|>system\nown<|im_end|>\n" + CHAT),
        (IDS, {"ids": [64, 65]}, "ab"),
        (IDS, {"ids": "[64, 65]"}, "ab"),
    ],
)  # fmt: skip
def test_prompts(tokenizer: Tokenizer, prompt: dict[str, Any], row: dict[str, Any], expected: str) -> None:
    assert prompt_of(tokenizer, spec(prompt), row) == expected


@pytest.mark.parametrize(
    ("prompt", "row", "status", "code"),
    [
        (COLUMN, {"p": None}, Status.SKIPPED_NULL, None),
        (COLUMN, {}, Status.SKIPPED_NULL, None),
        (COLUMN, {"p": ""}, Status.SKIPPED_NULL, "empty_prompt"),
        (COLUMN | {"chat": True}, {"p": ""}, Status.SKIPPED_NULL, "empty_prompt"),
        (COLUMN, {"p": 7}, Status.ERROR, "bad_prompt_type"),
        (COLUMN, {"p": b"bytes"}, Status.ERROR, "bad_prompt_type"),
        (COLUMN, {"p": "a\ud800b"}, Status.ERROR, "invalid_text"),
        (COLUMN | {"chat": True}, {"p": "a\udfffb"}, Status.ERROR, "invalid_text"),
        (COLUMN, {"p": "x" * 57}, Status.TOO_LONG, "too_long"),
        (COLUMN, {"p": "x" * 100_000}, Status.TOO_LONG, "too_long"),
        (COLUMN, RowError("malformed_json", "line 3", "read"), Status.ERROR, "malformed_json"),
        ({"template": "{a}{b}"}, {"a": "x", "b": None}, Status.SKIPPED_NULL, None),
        ({"template": "{a}{b}"}, {"a": "", "b": ""}, Status.SKIPPED_NULL, "empty_prompt"),
        ({"template": "{a}"}, {"a": b"x"}, Status.ERROR, "bad_prompt_type"),
        (MESSAGES, {"m": None}, Status.SKIPPED_NULL, None),
        (MESSAGES, {"m": []}, Status.SKIPPED_NULL, "empty_prompt"),
        (MESSAGES, {"m": "no JSON"}, Status.ERROR, "bad_prompt_type"),
        (MESSAGES, {"m": {"role": "user"}}, Status.ERROR, "bad_prompt_type"),
        (MESSAGES, {"m": ["hi"]}, Status.ERROR, "bad_messages"),
        (MESSAGES, {"m": [{"role": "user", "content": None}]}, Status.ERROR, "bad_messages"),
        (MESSAGES, {"m": [{"role": "user", "content": [{"type": "image"}]}]}, Status.ERROR, "bad_messages"),
        (MESSAGES, {"m": [{"role": 1, "content": "x"}]}, Status.ERROR, "bad_messages"),
        (IDS, {"ids": None}, Status.SKIPPED_NULL, None),
        (IDS, {"ids": []}, Status.SKIPPED_NULL, "empty_prompt"),
        (IDS, {"ids": 5}, Status.ERROR, "bad_prompt_type"),
        (IDS, {"ids": [1, "x"]}, Status.ERROR, "bad_prompt_type"),
        (IDS, {"ids": [1, True]}, Status.ERROR, "bad_prompt_type"),
        (IDS, {"ids": [1, None]}, Status.ERROR, "bad_prompt_type"),
        (IDS, {"ids": [1, 100_000]}, Status.ERROR, "bad_token_id"),
        (IDS, {"ids": [-1]}, Status.ERROR, "bad_token_id"),
    ],
)
def test_rows_without_a_request(
    tokenizer: Tokenizer, prompt: dict[str, Any], row: Any, status: Status, code: str | None
) -> None:
    assert refused(tokenizer, spec(prompt), row) == (status, code)


def test_errors_never_hold_the_prompt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    secret = "SECRET"
    strict = tiny_tokenizer(tmp_path, "{{ raise_exception('bad ' + messages[0].content) }}")
    rows: list[tuple[Tokenizer, dict[str, Any], dict[str, Any]]] = [
        (tokenizer, COLUMN, {"p": [secret]}),
        (tokenizer, COLUMN, {"p": f"{secret}\ud800"}),
        (tokenizer, COLUMN, {"p": secret * 50}),
        (tokenizer, MESSAGES, {"m": [secret]}),
        (tokenizer, MESSAGES, {"m": secret}),
        (tokenizer, IDS, {"ids": secret}),
        (Tokenizer.load(str(strict)), MESSAGES, {"m": [{"role": secret, "content": secret}]}),
    ]
    for with_tokenizer, prompt, row in rows:
        (result,) = prepare(with_tokenizer, spec(prompt), row)
        assert isinstance(result, RowResult)
        assert result.error is not None
        assert secret not in result.error.message


@pytest.mark.parametrize(
    ("on_too_long", "kept"),
    [("truncate_left", "c" * 55 + "d"), ("truncate_right", "a" + "b" * 55)],
)
def test_truncation_leaves_room_for_the_answer(tokenizer: Tokenizer, on_too_long: str, kept: str) -> None:
    job = spec(COLUMN | {"on_too_long": on_too_long}, include=("prompt_rendered",))
    text = "a" + "b" * 80 + "c" * 80 + "d"
    (prepared, short) = prepare(tokenizer, job, {"p": text}, {"p": "short"})
    assert isinstance(prepared, Prepared)
    assert isinstance(short, Prepared)
    assert tokenizer.decode(prepared.request.token_ids) == kept
    assert (prepared.input_truncated, short.input_truncated) == (True, False)
    assert prepared.prompt_rendered == text


def test_an_answer_longer_than_the_context_is_too_long_also_when_truncating(tokenizer: Tokenizer) -> None:
    job = spec(COLUMN | {"on_too_long": "truncate_left"}, max_tokens=CONTEXT)
    assert refused(tokenizer, job, {"p": "a"}) == (Status.TOO_LONG, "too_long")


def test_a_prompt_that_just_fits_runs(tokenizer: Tokenizer) -> None:
    (prepared,) = prepare(tokenizer, spec(COLUMN), {"p": "x" * (CONTEXT - 8)})
    assert isinstance(prepared, Prepared)


def test_rows_keep_their_order_and_indexes(tokenizer: Tokenizer) -> None:
    rows = Preparer(spec(COLUMN), tokenizer, CONTEXT).prepare(
        [(17, {"p": "a"}), (18, {"p": None}), (40, {"p": "bc"}), (41, {"p": 3})]
    )
    assert [row.request.row_index if isinstance(row, Prepared) else row.row_index for row in rows] == [17, 18, 40, 41]
    assert [len(row.request.token_ids) for row in rows if isinstance(row, Prepared)] == [1, 2]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"params": {"temperature": 0.5, "top_k": None}}, {"temperature": 0.5, "top_k": 3}),
        ({"params": '{"stop": ["x", "y"]}'}, {"stop": ("x", "y")}),
        ({"params": None, "max_tokens": None}, {"max_tokens": 8}),
        ({"params": "", "max_tokens": ""}, {"max_tokens": 8}),
        ({"max_tokens": 4, "seed": 9}, {"max_tokens": 4, "seed": 9}),
        ({"max_tokens": "16", "temperature": "0.7"}, {"max_tokens": 16, "temperature": 0.7}),  # CSV
        ({"stop": "END"}, {"stop": ("END",)}),
        ({"stop": "7"}, {"stop": ("7",)}),
        ({"stop": '["a", "b"]'}, {"stop": ("a", "b")}),
        ({"params": {"max_tokens": 2}, "max_tokens": 3}, {"max_tokens": 3}),
    ],
)
def test_row_parameters(tokenizer: Tokenizer, row: dict[str, Any], expected: dict[str, Any]) -> None:
    columns = ["max_tokens", "seed", "temperature", "stop"]
    job = spec(COLUMN, top_k=3, params_column="params", param_columns=columns)
    (prepared,) = prepare(tokenizer, job, {"p": "a", **row})
    assert isinstance(prepared, Prepared), prepared
    params = prepared.request.params
    assert {name: getattr(params, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"params": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"params": {"temperature": -1}}, "sampling.temperature: -1.0"),
        ({"params": {"temperature": float("nan")}}, "sampling.temperature"),
        ({"params": '{"temperature": NaN}'}, "sampling.temperature"),
        ({"params": "not JSON"}, "column 'params'"),
        ({"params": [1]}, "column 'params'"),
        ({"max_tokens": 0}, "sampling.max_tokens: 0"),
        ({"max_tokens": "many"}, "sampling.max_tokens: 'many'"),
        ({"max_tokens": True}, "sampling.max_tokens: True"),
        ({"max_tokens": 1.5}, "sampling.max_tokens: 1.5"),
    ],
)
def test_bad_row_parameters(tokenizer: Tokenizer, row: dict[str, Any], says: str) -> None:
    job = spec(COLUMN, params_column="params", param_columns=["max_tokens"])
    (result,) = prepare(tokenizer, job, {"p": "a", **row})
    assert isinstance(result, RowResult)
    assert result.status is Status.INVALID_PARAMS
    assert result.error is not None
    assert says in result.error.message
    assert len(result.error.message) < 600


def test_needed_columns_are_named_once() -> None:
    job = spec({"template": "{a} {b} {a}"}, params_column="params", param_columns=["seed"])
    assert needed_columns(job) == ("params", "a", "b", "seed")


@pytest.mark.parametrize("template", ["{", "a } b", "{}", "{a}}", "{{a}"])
def test_a_stray_brace_is_refused_before_the_first_row(template: str) -> None:
    with pytest.raises(SpecError, match=r"prompt\.template: the '[{}]' at character \d"):
        needed_columns(spec({"template": template}))


def test_chat_without_a_template_is_refused_before_the_first_row(tmp_path: Path) -> None:
    bare = Tokenizer.load(str(tiny_tokenizer(tmp_path, chat_template=None)))
    with pytest.raises(SpecError, match="no chat template"):
        Preparer(spec(COLUMN | {"chat": True}), bare, CONTEXT)
    assert prompt_of(bare, spec(COLUMN), {"p": "a"}) == "a"
