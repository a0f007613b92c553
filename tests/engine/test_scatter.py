"""The scatter kernel beside torch's indexed assignment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from moegen.ops.scatter_kernel import scatter_tokens

PAGES, HEADS, SLOTS = 40, 3, 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@pytest.fixture(params=[0, 1, 5, 300])
def places(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Of so many tokens, each its own."""
    order = np.random.default_rng(0).permutation(PAGES * SLOTS)[: request.param]
    return order // SLOTS, order % SLOTS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [(48,), (7,), ()], ids=str)
def test_every_row_is_where_it_belongs_and_nothing_else_is_touched(places, dtype, kept):
    table = torch.randn(PAGES, HEADS, SLOTS, *kept).mul(50).to(dtype)
    new = torch.randn(len(places[0]), HEADS, *kept).mul(50).to(dtype)
    expected = table.clone()
    expected[torch.from_numpy(places[0]), :, torch.from_numpy(places[1])] = new
    scatter_tokens(table, *places, new)
    assert torch.equal(table, expected)


def test_tokens_and_tables_may_lie_in_any_way(places):
    """Heads before tokens, every other element, a part of a wider table."""
    tokens = len(places[0])
    base = torch.randn(HEADS, tokens, 2 * 16)
    for new in (base[..., :16].transpose(0, 1), base[..., ::2].transpose(0, 1)):
        wide = torch.zeros(PAGES, 2 * HEADS, SLOTS, 20)
        table = wide[:, 1 : 1 + HEADS, :, 2:18]
        expected = wide.clone()
        expected[:, 1 : 1 + HEADS, :, 2:18][torch.from_numpy(places[0]), :, torch.from_numpy(places[1])] = new
        scatter_tokens(table, *places, new)
        assert torch.equal(wide, expected)
