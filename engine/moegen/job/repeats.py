"""Rows that ask for what an earlier row asks for: they have its answer, and it is computed once.

Two rows ask for the same when their token ids are equal, and whatever else decides an answer is: the continuations that
are rated or, of greedy answers, the parameters that greedy answers heed. An answer that is drawn at random depends on
its row (`moegen.ops.sampling`), so such a row asks for something that no other row asks for.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b

from moegen.row import RowResult
from moegen.schedule.sequence import Request
from moegen.spec import Sampling
from moegen.table.first_rows import KEY_BYTES, FirstRows
from moegen.table.journal import decode_result, encode_result

_KEPT_BYTES = 64 << 20  # of answers, the ones used last; what repeats an older one is run again


def work_key(request: Request) -> bytes | None:
    """Equal for requests that ask for the same (of two others, once in 2**128); None where no other row can."""
    if request.params.temperature > 0 and not request.continuations:
        return None
    asked = repr(request.continuations) if request.continuations else _heeded(request.params)
    own = blake2b(array("q", request.token_ids).tobytes(), digest_size=KEY_BYTES)
    own.update(f"{len(request.token_ids)} {asked}".encode())
    return own.digest()


@lru_cache(maxsize=1024)
def _heeded(params: Sampling) -> str:
    """What a greedy answer depends on."""
    return repr((params.max_tokens, params.repetition_penalty, params.stop, params.stop_token_ids, params.ignore_eos))


class Repeats:
    """Which rows repeat which, and the answers that they have in common.

    Args:
        rows: knows the first row of every work; None: no row repeats another (`dedup: off`).
        kept_bytes: of answers that are at hand, for rows to come.
    """

    def __init__(self, rows: FirstRows | None, kept_bytes: int = _KEPT_BYTES) -> None:
        self._rows, self._kept_bytes = rows, kept_bytes
        self._answers: OrderedDict[int, str] = OrderedDict()  # first row -> its answer as JSON
        self._bytes = 0

    def first(self, request: Request) -> int:
        """The first row of the table that asks for the same; rows that run are asked about in the table's order."""
        key = work_key(request) if self._rows is not None else None
        if self._rows is None or key is None:
            return request.row_index
        row = self._rows.find(key)
        if row is not None and row <= request.row_index:
            return row
        self._rows.add(key, request.row_index)
        return request.row_index

    def keep(self, first: int, request: Request, result: RowResult) -> None:
        """What came of the work of row `first`, which `request` asks for too."""
        if self._rows is None or work_key(request) is None:
            return
        text = encode_result(replace(result, prompt_rendered=None))
        self._bytes += len(text) - len(self._answers.pop(first, ""))
        self._answers[first] = text
        while self._bytes > self._kept_bytes:
            _, dropped = self._answers.popitem(last=False)
            self._bytes -= len(dropped)

    def answer(self, first: int) -> RowResult | None:
        """What came of it, if that is at hand."""
        if first not in self._answers:
            return None
        self._answers.move_to_end(first)
        return decode_result(self._answers[first])
