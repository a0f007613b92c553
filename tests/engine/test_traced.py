"""Tensors that are not read yet: what is recorded makes the same tensor, by replay and block by block."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from moegen.memory.traced import Traced, trace
from moegen.shape import StoredTensor


def stored(name: str, shape: tuple[int, ...]) -> StoredTensor:
    count = torch.Size(shape).numel()
    return StoredTensor(name, "F32", shape, 0, count * 4)


def read(tensor: StoredTensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(tensor.uri.encode()))
    return torch.randn(tensor.shape, generator=generator)


def leaf(name: str, shape: tuple[int, ...]) -> Traced:
    return trace(stored(name, shape))


def assembled(traced: Traced) -> torch.Tensor:
    """The tensor from its blocks alone."""
    out = torch.full(traced.shape, torch.nan)
    assert traced.blocks is not None
    for block in traced.blocks:
        box = tuple(slice(at, at + n) for at, n in zip(block.origin, block.shape, strict=True))
        assert out[box].isnan().all(), "two blocks at one place"
        out[box] = read(block.stored).flatten().as_strided(block.shape, block.strides, block.start)
    assert not out.isnan().any(), "a place without a block"
    return out


def check(traced: Traced, real: torch.Tensor) -> None:
    assert traced.is_meta
    assert traced.shape == real.shape
    assert torch.equal(traced.realise(read), real)
    assert torch.equal(assembled(traced), real)


@pytest.mark.parametrize("seed", range(40))
def test_any_chain_of_moves(seed: int) -> None:
    dice = random.Random(seed)
    shape = tuple(dice.randint(1, 6) for _ in range(dice.randint(2, 3)))
    names = iter("abcdefghijklmnopqrstuvwxyz")
    pairs = [(leaf(name, shape), read(stored(name, shape))) for name in [next(names) for _ in range(3)]]
    for _ in range(6):
        pairs = _step(dice, pairs)
    for traced, real in pairs:
        check(traced, real)


Pair = tuple[torch.Tensor, torch.Tensor]


def _step(dice: random.Random, pairs: list[Pair]) -> list[Pair]:
    def both(f: Callable[[torch.Tensor], torch.Tensor]) -> list[Pair]:
        return [(f(traced), f(real)) for traced, real in pairs]

    dims = pairs[0][0].dim()
    match dice.randrange(6):
        case 0 if dims < 5:
            dim = dice.randint(-dims - 1, dims)
            joined = tuple(torch.stack(side, dim=dim) for side in zip(*pairs, strict=True))
        case 1:
            dim = dice.randrange(-dims, dims)
            joined = tuple(torch.cat(side, dim=dim) for side in zip(*pairs, strict=True))
        case 2:
            a, b = dice.randrange(-dims, dims), dice.randrange(dims)
            return both(lambda x: torch.transpose(x, dim0=a, dim1=b).contiguous())
        case 3:
            dim = dice.randrange(-dims, dims)
            parts = min(dice.randint(2, 3), pairs[0][0].shape[dim])
            chunks = [list(zip(*(torch.chunk(x, parts, dim=dim) for x in pair), strict=True)) for pair in pairs]
            return list(chunks[0]) if parts > 1 and _even(chunks[0]) else pairs
        case 4:
            return both(lambda x: x[...].to(device="cpu", dtype=torch.float32))
        case _:
            return both(lambda x: x.transpose(0, -1))
    return [joined]  # type: ignore[list-item]


def _even(chunks: list[Pair]) -> bool:
    return len({chunk[0].shape for chunk in chunks}) == 1


def test_other_functions_are_replayed_and_have_no_blocks() -> None:
    a, b = leaf("a", (4, 6)), leaf("b", (4, 6))
    made = torch.cat([a.reshape(2, 12), b.reshape(2, 12) * 2]).to(torch.float64)
    assert made.blocks is None
    real = torch.cat([read(stored("a", (4, 6))).reshape(2, 12), read(stored("b", (4, 6))).reshape(2, 12) * 2])
    assert torch.equal(made.realise(read), real.double())


def test_a_parameter_of_a_traced_tensor_is_one() -> None:
    module = torch.nn.Linear(6, 4, bias=False, device="meta")
    module.weight = torch.nn.Parameter(leaf("w", (4, 6)), requires_grad=False)
    check(module.weight, read(stored("w", (4, 6))))


def test_shapes_are_checked_without_reading() -> None:
    with pytest.raises(RuntimeError, match=r"[Ss]izes of tensors"):
        torch.cat([leaf("a", (2, 3)), leaf("b", (2, 4))], dim=0)
