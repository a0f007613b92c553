"""Text to token ids and back: a checkpoint's tokenizer, its chat template, incremental decoding, stop strings.

Nothing here needs torch: transformers' tokenizers work without it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moegen.errors import CheckpointError, SpecError
from moegen.storage import local_folder

_FILES = (  # whatever of these a checkpoint folder has decides how text becomes ids, and where answers end
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken",
    "tekken.json", "sentencepiece*", "spiece.model", "chat_template*", "generation_config.json",
)  # fmt: skip


class Tokenizer:
    """The tokenizer of one checkpoint folder; safe to use from several threads.

    Attributes:
        digest: SHA-256 (hex) over the names and contents of every file that takes part.
        eos_token_ids: every id that ends an answer, by generation_config.json, config.json and the tokenizer.
        vocab_size: ids are below this: the rows of the model's embedding, by config.json.
    """

    def __init__(self, folder: Path) -> None:
        names = _tokenizer_files(folder)
        self.digest = _digest(folder, names)
        self._hf = _load(folder)
        # The Rust tokenizer itself: transformers' wrapper sets padding and truncation on every call, which
        # another thread's call refuses with "Already borrowed".
        self._rust = getattr(self._hf, "backend_tokenizer", None)
        config = _read_json(folder / "config.json")
        self.eos_token_ids = _eos_ids(config, _read_json(folder / "generation_config.json"), self._hf.eos_token_id)
        self.vocab_size = int(_from_config(config, "vocab_size") or len(self._hf))

    @classmethod
    def load(cls, model_uri: str) -> Tokenizer:
        """Load from a local checkpoint folder or any fsspec URI of one.

        Raises:
            CheckpointError: there is no such folder, or it has no tokenizer that can be loaded.
            StorageError: storage refused.
        """
        with local_folder(model_uri, lambda name: name == "config.json" or _takes_part(name)) as folder:
            return cls(folder)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    def require_chat_template(self) -> None:
        """Refuse a job that needs a chat template early, rather than once per row.

        Raises:
            SpecError: the checkpoint has none.
        """
        if not self.has_chat_template:
            raise SpecError(
                "prompt: this checkpoint has no chat template; leave out prompt.chat, prompt.system and "
                "prompt.messages_column, or add chat_template.jinja to the checkpoint folder"
            )

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """One list of token ids per text."""
        if not texts:
            return []
        if self._rust is None:
            return self._hf(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
        encodings = self._rust.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these ids, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        if self._rust is None:
            return self._hf.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self._rust.decode(token_ids, skip_special_tokens=True)

    def to_json(self) -> str:
        """The fast tokenizer as its own JSON, for libraries that must know every token's bytes.

        Raises:
            SpecError: the checkpoint has only a slow one.
        """
        if self._rust is None:
            raise SpecError(
                "output_schema, choices, regex: answers of a given form need a fast tokenizer; add tokenizer.json "
                "to the checkpoint folder"
            )
        tokenizer = copy(self._rust)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer.to_str()

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """These messages through the chat template, up to where the assistant's answer begins.

        The special tokens are in the text already: encode it with `add_special_tokens=False`.

        Raises:
            SpecError: the checkpoint has no chat template.
            jinja2.TemplateError: the template refuses these messages (the order of roles, say).
        """
        self.require_chat_template()
        return self._hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    def stream(self, stop: Iterable[str] = ()) -> TextStream:
        """A new answer's text, to be pushed token by token."""
        return TextStream(self, StopStrings(stop))


class TextStream:
    """The text of one answer while it grows, watched for stop strings.

    Push every generated id but the one that ends the answer (an end token or stop token is no text).
    Without stop strings a push only appends; with them it decodes a few tokens, never the answer again.
    """

    _CHARACTER_TOKENS = 4  # UTF-8 takes at most 4 bytes, and a token is at least one
    _HELD_TOKENS = 8  # an undecodable run longer than this is let go up to its last `_CHARACTER_TOKENS`

    def __init__(self, tokenizer: Tokenizer, stop: StopStrings) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._token_ids: list[int] = []
        self._text = ""  # complete characters so far
        # Decoding depends on the tokens before (spaces, split characters), so each piece is the difference
        # between ids[prefix:] and ids[prefix:read]: text of ids[:read] is out, ids[prefix:read] is its context.
        self._prefix = self._read = 0
        self.stopped = False  # the answer hit a stop string; `finish` gives the text before it

    @property
    def text(self) -> str:
        """The complete characters so far, cut before the first stop string."""
        if not self.stopped:
            self._advance()
        return self._text

    def push(self, token_id: int) -> bool:
        """Add one token; true once the answer has hit a stop string."""
        self._token_ids.append(token_id)
        if self._stop and not self.stopped:
            self._advance()
        return self.stopped

    def finish(self) -> str:
        """The answer's final text, incomplete characters included as U+FFFD, cut before the first stop string."""
        if not self.stopped:
            self._text = self._tokenizer.decode(self._token_ids)
            self._cut(0)
        return self._text

    def _advance(self) -> None:
        done = self._decode(self._prefix, self._read)
        end, grown = self._complete()
        if end > self._read:
            self._prefix, self._read = self._read, end
            seen = len(self._text)
            self._text += grown[len(done) :]
            self._cut(seen)

    def _complete(self) -> tuple[int, str]:
        """How many ids end in whole characters, and the text of those from `prefix` on."""
        end = len(self._token_ids)
        grown = self._decode(self._prefix, end)
        if not grown.endswith("\ufffd"):
            return end, grown
        if end - self._read > self._HELD_TOKENS:  # not one incomplete character: part of this is settled
            for settled in range(end - self._CHARACTER_TOKENS, self._read, -1):
                text = self._decode(self._prefix, settled)
                if grown.startswith(text):
                    return settled, text
        return self._read, ""

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._token_ids[start:end])

    def _cut(self, seen: int) -> None:
        position = self._stop.find(self._text, seen)
        if position is not None:
            self._text, self.stopped = self._text[:position], True


class StopStrings:
    """The texts before which an answer ends."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = tuple(strings)

    def __bool__(self) -> bool:
        return bool(self._strings)

    def find(self, text: str, seen: int) -> int | None:
        """Where in `text` the first stop string begins, if one ends beyond the first `seen` characters."""
        found = (text.find(string, max(0, seen - len(string) + 1)) for string in self._strings)
        return min((position for position in found if position >= 0), default=None)


def _tokenizer_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise CheckpointError(f"model.uri: there is no folder {str(folder)!r}; give a downloaded checkpoint's folder")
    return sorted(path.name for path in folder.iterdir() if path.is_file() and _takes_part(path.name))


def _takes_part(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _FILES)


def _digest(folder: Path, names: Sequence[str]) -> str:
    sha = hashlib.sha256()
    for name in names:
        content = (folder / name).read_bytes()
        sha.update(f"{name}\0{len(content)}\0".encode() + content)
    return sha.hexdigest()


def _load(folder: Path) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else a fork anywhere turns batch threads off, loudly
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"model.uri: no tokenizer can be loaded from {str(folder)!r} ({reason}); "
            "the folder needs tokenizer.json and tokenizer_config.json"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _from_config(config: Mapping[str, Any], name: str) -> Any:
    """A field of config.json, or of the language model's part of a multimodal one."""
    if name in config:
        return config[name]
    return (config.get("text_config") or {}).get(name)


def _eos_ids(config: Mapping[str, Any], generation: Mapping[str, Any], own: int | None) -> frozenset[int]:
    ids: set[int] = set()
    for value in (generation.get("eos_token_id"), _from_config(config, "eos_token_id"), own):
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)
