from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from moegen.errors import CheckpointError, SpecError
from moegen.text import StopStrings, Tokenizer

from tests.tiny import tiny_tokenizer

TEXT = "naïve €5 😀👩‍👩‍👧 end"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(str(folder))


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Words that begin with a space mark, and bytes as <0xNN> tokens: Llama's way."""
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models

    folder = tmp_path_factory.mktemp("sentencepiece")
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁Hello": 257, "▁world": 258, "s": 259}
    rust = Rust(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    rust.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return Tokenizer.load(str(folder))


def test_encode_and_decode_round_trip(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_batch([TEXT, "", "a"])
    assert [len(row) for row in ids] == [len(TEXT.encode()), 0, 1]
    assert tokenizer.decode(ids[0]) == TEXT


def test_special_tokens_are_encoded_as_one_id_and_decoded_as_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(["a<|im_end|>"])[0][1:] == [258]
    assert tokenizer.decode([64, 258]) == "a"


def test_encoding_from_many_threads(tokenizer: Tokenizer) -> None:
    texts = [TEXT * 20] * 8
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: tokenizer.encode_batch(texts), range(32)))
    assert all(result == results[0] for result in results)


def test_end_tokens_are_those_of_every_file(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)  # its own end token is 258
    (folder / "config.json").write_text('{"text_config": {"eos_token_id": 7, "vocab_size": 1000}}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 9]}')
    tokenizer = Tokenizer.load(str(folder))
    assert tokenizer.eos_token_ids == {7, 9, 256, 258}
    assert tokenizer.vocab_size == 1000


def test_digest_follows_content_not_place(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert Tokenizer.load(str(copy)).digest == tokenizer.digest
    (copy / "model.safetensors").write_bytes(b"weights are not the tokenizer's business")
    assert Tokenizer.load(str(copy)).digest == tokenizer.digest
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert Tokenizer.load(str(copy)).digest != tokenizer.digest


def test_loading_by_uri_equals_loading_by_path(folder: Path, tokenizer: Tokenizer) -> None:
    remote = Tokenizer.load(folder.as_uri())
    assert remote.digest == tokenizer.digest
    assert remote.encode_batch([TEXT]) == tokenizer.encode_batch([TEXT])


def test_chat_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    bare = Tokenizer.load(str(tiny_tokenizer(tmp_path, chat_template=None)))
    with pytest.raises(SpecError, match=r"no chat template.*chat_template\.jinja"):
        bare.require_chat_template()


@pytest.mark.parametrize("make", [lambda path: path / "nowhere", lambda path: path], ids=["no folder", "empty folder"])
def test_a_folder_without_tokenizer_is_refused(make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.uri.*(no folder|no tokenizer)"):
        Tokenizer.load(str(make(tmp_path)))


def test_works_without_torch(folder: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from moegen.text import Tokenizer\n"
        f"t = Tokenizer.load({str(folder)!r})\n"
        "print(t.decode(t.encode_batch(['plain'])[0]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "plain\n"


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The visible text after every push, and the final one."""
    stream, seen = tokenizer.stream(), []
    for token_id in ids:
        stream.push(token_id)
        seen.append(stream.text)
    return [*seen, stream.finish()]


def test_stream_never_shows_half_a_character(tokenizer: Tokenizer) -> None:
    seen = streamed(tokenizer, tokenizer.encode_batch([TEXT])[0])
    assert all(TEXT.startswith(text) for text in seen)
    assert seen[-1] == seen[-2] == TEXT


def test_stream_shows_an_incomplete_end_only_when_finished(tokenizer: Tokenizer) -> None:
    seen = streamed(tokenizer, tokenizer.encode_batch(["a€"])[0][:-1])
    assert seen == ["a", "a", "a", "a\ufffd"]


def test_stream_of_any_bytes_agrees_with_decoding_at_once(tokenizer: Tokenizer) -> None:
    draw = random.Random(7)
    character = tokenizer.encode_batch(["€😀é"])[0]
    for _ in range(100):
        pieces = [draw.choice([[draw.randrange(256)], [draw.choice(character)], character]) for _ in range(40)]
        ids = [token_id for piece in pieces for token_id in piece]
        *seen, final = streamed(tokenizer, ids)
        assert final == tokenizer.decode(ids)
        assert all(final.startswith(text) for text in seen)
        assert len(final) - len(seen[-1]) <= 9  # held back: at most an undecodable run's end


def test_stream_keeps_spaces_between_words(sentencepiece_like: Tokenizer) -> None:
    ids = [257, 258, 259, 0xE2 + 1, 0x82 + 1, 0xAC + 1, 257]
    assert streamed(sentencepiece_like, ids) == [
        "Hello", "Hello world", "Hello worlds", "Hello worlds", "Hello worlds", "Hello worlds€", "Hello worlds€ Hello",
        "Hello worlds€ Hello",
    ]  # fmt: skip


def test_a_long_stream_decodes_a_bounded_number_of_ids_per_push(tokenizer: Tokenizer, monkeypatch) -> None:
    decoded = []
    real = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or real(ids))
    stream = tokenizer.stream(["never"])
    for token_id in [64, 127] * 500 + [127] * 1000:  # letters, half characters, then a run of broken bytes
        stream.push(token_id)
    assert max(decoded) < 40


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\ntwo", ["\n"], "one"),
        ("one END two", ["END"], "one "),
        ("aXbYc", ["Y", "X"], "a"),
        ("no stop", ["END"], None),
        ("😀 stop 😀€", ["€"], "😀 stop 😀"),
        ("ENENEND", ["END"], "ENEN"),
        ("STOP", ["STOP"], ""),
    ],
)
def test_stop_strings_across_tokens(tokenizer: Tokenizer, text: str, stop: list[str], expected: str | None) -> None:
    stream = tokenizer.stream(stop)
    hits = [stream.push(token_id) for token_id in tokenizer.encode_batch([text])[0]]
    assert hits[-1] == stream.stopped == (expected is not None)
    assert stream.finish() == (text if expected is None else expected)
    if expected is not None:  # told by the very push that completes the stop string
        end = min(text.find(s) + len(s) for s in stop if text.startswith(expected + s))
        assert hits.index(True) == len(text[:end].encode()) - 1


def test_stop_strings_find_only_what_is_new() -> None:
    stop = StopStrings(["ab", "xyz"])
    assert stop.find("ab..", 0) == 0
    assert stop.find("ab..", 2) is None
    assert stop.find("..a" + "b", 3) == 2
    assert stop.find("xyz ab", 0) == 0
    assert not StopStrings([])
