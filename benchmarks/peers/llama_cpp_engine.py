"""llama.cpp through its Python binding, compiled for this machine's instructions.

Settings: `dtype` of the matrices ("bfloat16" or "float32"), `sequences` that run at once. Each call of `llama_decode`
holds one token of every running sequence and the prompts that fit beside them; llama.cpp cuts it as it likes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from environment import Environment
from turn import Generate, Outcome, Row, Turn, take

_UNUSED = " ".join(f"-DLLAMA_BUILD_{part}=OFF" for part in ("TOOLS", "TESTS", "EXAMPLES", "SERVER", "APP"))
ENVIRONMENT = Environment(
    "llama.cpp",
    ("llama-cpp-python==0.3.36", "gguf==0.19.0"),
    variables={"CMAKE_ARGS": f"-DLLAVA_BUILD=OFF {_UNUSED}"},
)
_CONTEXT_TOKENS = 1024  # of each sequence
_BATCH_TOKENS = 2048


class LlamaCpp:
    """A model and its context, with places for `sequences` rows."""

    def __init__(self, turn: Turn) -> None:
        import llama_cpp
        from gguf_file import write_gguf

        self.lib, self.sequences = llama_cpp, turn.settings["sequences"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(Path(turn.checkpoint), path, turn.settings["dtype"])
            params = llama_cpp.llama_model_default_params()
            params.use_mmap = False
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        self.context = llama_cpp.llama_init_from_model(self.model, self._context_params())
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(_BATCH_TOKENS + self.sequences, 0, 1)

    def _context_params(self) -> object:
        params = self.lib.llama_context_default_params()
        params.n_seq_max = self.sequences
        params.n_ctx = self.sequences * _CONTEXT_TOKENS
        params.n_batch = _BATCH_TOKENS + self.sequences
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.kv_unified = False  # each sequence attends to its own cells only
        return params

    def next_tokens(self, pieces: dict[int, tuple[int, list[int]]]) -> dict[int, int]:
        """Computes each sequence's (first position, tokens); the most likely token after each."""
        count, last = 0, {}
        for sequence, (position, tokens) in pieces.items():
            for i, token in enumerate(tokens):
                self._place(count, token, position + i, sequence, i == len(tokens) - 1)
                count += 1
            last[sequence] = count - 1
        self.batch.n_tokens = count
        status = self.lib.llama_decode(self.context, self.batch)
        if status:
            raise SystemExit(f"llama_decode ended with status {status} at {count} tokens of {len(pieces)} sequences")
        return {sequence: self._most_likely(place) for sequence, place in last.items()}

    def _place(self, at: int, token: int, position: int, sequence: int, sampled: bool) -> None:
        self.batch.token[at] = token
        self.batch.pos[at] = position
        self.batch.n_seq_id[at] = 1
        self.batch.seq_id[at][0] = sequence
        self.batch.logits[at] = sampled

    def _most_likely(self, place: int) -> int:
        logits = self.lib.llama_get_logits_ith(self.context, place)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())

    def forget(self, sequence: int) -> None:
        """Frees the sequence's place."""
        self.lib.llama_memory_seq_rm(self.memory, sequence, -1, -1)


def open_engine(turn: Turn) -> Generate:
    engine = LlamaCpp(turn)
    return lambda rows: generate(engine, rows)


def generate(engine: LlamaCpp, rows: Sequence[Row]) -> Outcome:
    answers: list[list[int]] = [[] for _ in rows]
    waiting, free, running = list(reversed(range(len(rows)))), list(range(engine.sequences)), {}
    while waiting or running:
        pieces = {s: (len(rows[i].token_ids) + len(answers[i]) - 1, answers[i][-1:]) for s, i in running.items()}
        room = _BATCH_TOKENS
        while waiting and free and len(rows[waiting[-1]].token_ids) <= room:
            sequence = free.pop()
            running[sequence] = waiting.pop()
            pieces[sequence] = (0, rows[running[sequence]].token_ids)
            room -= len(rows[running[sequence]].token_ids)
        for sequence, token in engine.next_tokens(pieces).items():
            i = running[sequence]
            answers[i].append(token)
            if len(answers[i]) == rows[i].answer_tokens:
                engine.forget(sequence)
                free.append(sequence)
                del running[sequence]
    return Outcome(answers)


if __name__ == "__main__":
    take(open_engine)
