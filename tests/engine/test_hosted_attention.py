"""Keys and values on the host of a device that computes: the same answers, however attention is shared.

The device is the CPU here; all that goes between it and the host is copied all the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from moegen.memory.kv_pool import KVPool
from moegen.ops import gathered_decode as gathered
from moegen.ops import hosted_attention
from moegen.ops.attention import AttentionRule
from moegen.ops.gathered_decode import gathered_decode
from moegen.ops.hosted_attention import HostedAttention
from moegen.ops.kv_pages import LayerPages
from moegen.ops.link import Link
from moegen.row import Status
from moegen.run.engine import Engine
from moegen.schedule.sequence import Request
from moegen.schedule.step import QuerySpans
from moegen.spec import Sampling

from tests.engine.parts import plan, run
from tests.engine.test_attention import KV_HEADS, Case, LongCase, _rules
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SHAPES = [(1, (8, 8), 1), (2, (16, 16), 4), (3, (16, 8), 5), (4, (64, 64), 16), (7, (24, 40), 32)]
SHARES = [0.0, 0.4, 1.0]


def page_bytes(pages: LayerPages) -> int:
    return pages.keys_PGCD[0].nbytes + pages.values_PGCD[0].nbytes


@pytest.mark.parametrize("together", [1, 7, 1 << 20], ids="{} pages".format)
@pytest.mark.parametrize(("ratio", "dims", "page_tokens"), SHAPES, ids=str)
def test_gathered_is_paged(
    ratio: int, dims: tuple[int, int], page_tokens: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(ratio, *dims, page_tokens, torch.bfloat16, 1)
    size = page_bytes(case.pages)
    monkeypatch.setattr(gathered, "_GATHERED_BYTES", together * size)
    for name, rule in _rules(case).items():
        out = torch.full((case.batch.length, KV_HEADS * ratio, dims[1]), torch.nan)
        gathered_decode(case.query_THD, case.pages.rows, size, page_tokens, case.batch.decode, rule, out)
        assert torch.allclose(out, case.naive(rule), atol=3e-6), name


def test_long_sequences_are_gathered_whole() -> None:
    case = LongCase(32, torch.float32)
    for name, rule in case.rules.items():
        out = torch.empty_like(case.query_THD)
        size = page_bytes(case.pages)
        gathered_decode(case.query_THD, case.pages.rows, size, 32, case.batch.decode, rule, out)
        assert torch.allclose(out, case.kernel(rule), atol=1e-5), name


@pytest.mark.parametrize("on_host", SHARES)
def test_what_was_never_written_is_never_met(on_host: float) -> None:
    """A GPU's fresh memory holds anything, also what is no number."""
    case = Case(2, 8, 8, 16, torch.float32, 1)
    for pages in (case.pages.keys_PGCD, case.pages.values_PGCD):
        pages[pages == 1e4] = torch.nan
    for name, rule in _rules(case).items():
        assert torch.allclose(hosted(case, on_host, rule), case.naive(rule), atol=3e-6), name


def hosted(case: Case, on_host: float, rule: AttentionRule) -> torch.Tensor:
    """The case's micro-batch, its new keys and values not yet in their pages."""
    chunk = case.batch.spans[0].length
    new_keys, new_values = (torch.cat([x[-chunk:] for x in xs]).float() for xs in (case.keys, case.values))
    return HostedAttention(Link(CPU), on_host).attend(
        case.query_THD, new_keys, new_values, case.pages, case.batch, rule
    )


@pytest.mark.parametrize("on_host", SHARES)
@pytest.mark.parametrize("chunk", [1, 6], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=["fp32", "bf16", "fp16", "int8"]
)
@pytest.mark.parametrize(("ratio", "dims", "page_tokens"), SHAPES, ids=str)
def test_hosted_is_paged(
    ratio: int, dims: tuple[int, int], page_tokens: int, dtype: torch.dtype, chunk: int, on_host: float
) -> None:
    written, case = (Case(ratio, *dims, page_tokens, dtype, chunk) for _ in range(2))
    for position, slot in zip(case.batch.write_pages, case.batch.write_slots, strict=True):
        case.pages.keys_PGCD[position, :, slot] = case.pages.values_PGCD[position, :, slot] = -7
    for name, rule in _rules(case).items():
        assert torch.allclose(hosted(case, on_host, rule), case.naive(rule), atol=3e-6), name
    assert torch.equal(case.pages.keys_PGCD, written.pages.keys_PGCD)
    assert torch.equal(case.pages.values_PGCD, written.pages.values_PGCD)


def test_bfloat16_queries_get_bfloat16_answers() -> None:
    case = Case(4, 16, 16, 8, torch.bfloat16, 1)
    case.query_THD = case.query_THD.bfloat16()
    rule = AttentionRule(0.25)
    for on_host in SHARES:
        out = hosted(case, on_host, rule)
        assert out.dtype is torch.bfloat16
        assert torch.allclose(out.float(), case.naive(rule), atol=0.03)


def test_the_share_is_of_keys_not_of_sequences() -> None:
    lengths = np.array([1000, 10, 10, 10, 10, 960])
    ends = np.cumsum(np.append(0, -(-lengths // 16)))
    spans = QuerySpans(np.arange(6) + 3, np.ones(6, np.int64), lengths, ends, np.arange(ends[-1]) + 100)
    here, there = hosted_attention._split(spans, 0.5)
    assert (here.rows.tolist(), there.rows.tolist()) == ([3], [4, 5, 6, 7, 8])
    assert there.page_starts.tolist() == [0, 1, 2, 3, 4, 64]
    assert there.page_ids.tolist() == list(range(163, 227))
    for share, rows in ((0.0, 0), (0.2, 0), (0.52, 5), (1.0, 6)):
        here, there = hosted_attention._split(spans, share)
        assert (len(here.rows), len(there.rows)) == (rows, 6 - rows)


def test_a_link_hands_over_copies() -> None:
    link = Link(CPU)
    table, ids = torch.arange(12.0).view(6, 2), np.array([4, 0, 4])
    (rows,) = link.rows_to_device((table,), ids)
    home = link.to_host(rows, rows.bfloat16()[:, :1])
    back = link.to_device(home[0])
    table.zero_()
    rows.zero_()
    wanted = torch.tensor([[8.0, 9], [0, 1], [8, 9]])
    assert torch.equal(home[0], wanted)
    assert torch.equal(home[1], wanted[:, :1].bfloat16())
    first = back.clone()
    for _ in range(3):  # buffers come round again, what was sent does not change
        link.to_device(torch.full((3, 2), -1.0))
    link.to_host(torch.full((3, 2), -1.0))
    assert torch.equal(back, first)
    assert link.bytes_to_device == 3 * 2 * 4 * 5


def test_an_empty_list_goes_over() -> None:
    link = Link(CPU)
    nothing, something = link.to_host(torch.empty(0, 4, 8), torch.ones(2))
    assert (nothing.shape, something.tolist()) == ((0, 4, 8), [1, 1])


# The whole engine ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=6)


def requests() -> list[Request]:
    return [
        Request(row, tuple((row * 31 + i * 7) % 256 for i in range(1 + row * row % 47)), Sampling(max_tokens=24))
        for row in range(24)
    ]


@pytest.mark.parametrize("sizes", [
    {"pass_tokens": 300, "attention_tokens": 128, "page_tokens": 8, "kv_pages": 200},
    {"pass_tokens": 30, "attention_tokens": 7, "page_tokens": 4, "kv_pages": 40},  # chunked prompts, preemption
], ids=["roomy", "narrow"])  # fmt: skip
@pytest.mark.parametrize("staged", [True, False], ids=["staged", "whole layers"])
def test_answers_do_not_know_where_pages_live(checkpoint: Path, sizes: dict[str, int], staged: bool) -> None:
    answers = []
    for on_host in (None, *SHARES):
        how = plan(**sizes)
        with Engine.load(checkpoint, how, staged=staged, tokenizer=None) as engine:
            if on_host is not None:
                across = HostedAttention(Link(CPU), on_host)
                shapes = engine.host.kv_shapes
                engine.pool = KVPool(shapes, how.kv_pages, how.page_tokens, torch.float32, CPU, across)
            rows, _ = run(engine, requests())
            answers.append(rows)
            if on_host is not None:
                assert across.link.bytes_to_device > 0
    assert all(row.status is Status.LENGTH for row in answers[0].values())
    assert all(other == answers[0] for other in answers[1:])
