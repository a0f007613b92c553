"""Weights outside the experts, in panels: torch's functions on them, and rows that do not know their batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moegen.model.dense import PanelWeight, panel_weights
from moegen.ops.expert_weights import PanelMatrix
from moegen.ops.vector_ir import DOTS
from moegen.run.engine import Engine
from moegen.schedule.sequence import Request
from moegen.spec import Sampling
from moegen.text import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from tests.engine.parts import plan, run
from tests.tiny import tiny_checkpoint

LOW, HIGH = 96, 1024  # features


class Router(nn.Module):
    """As routers are: a bare matrix, widened at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(LOW, HIGH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.type(torch.float32), self.weight.type(torch.float32))


@pytest.fixture
def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    parts = {
        "router": Router(),
        "linear": nn.Linear(HIGH, LOW),
        "lookup": nn.Embedding(LOW, HIGH),
        "tied": nn.Embedding(LOW, HIGH),
        "head": nn.Linear(HIGH, LOW, bias=False),
    }
    parts["head"].weight = parts["tied"].weight
    return nn.ModuleDict(parts).requires_grad_(False)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_modules_answer_as_before(model, stored):
    for module in model.values():  # in bfloat16 exact weights stay in few bytes
        module.weight.copy_(module.weight.to(stored))
    x, ids = torch.randn(3, 5, HIGH), torch.randint(LOW, (2, 7))
    inputs = {"router": x, "linear": x, "lookup": ids, "tied": ids, "head": x}
    wanted = {name: module(inputs[name]) for name, module in model.items()}
    panel_weights(model, stored)
    for name, module in model.items():
        assert torch.allclose(module(inputs[name]), wanted[name], rtol=1e-4, atol=1e-3), name
    assert torch.equal(model["tied"](ids), wanted["tied"])
    assert model["tied"].weight is model["head"].weight
    assert [name for name, _ in model.named_parameters()] == ["linear.bias", "lookup.weight"]


def test_what_is_not_exact_in_fewer_bytes_keeps_its_own(model):
    x = torch.randn(4, HIGH)
    wanted = model["linear"](x)
    panel_weights(model, torch.bfloat16)
    assert torch.allclose(model["linear"](x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["router", "linear", "head"])
def test_a_row_does_not_depend_on_the_rows_beside_it(model, part):
    panel_weights(model, torch.float32)
    x = torch.randn(515, HIGH)
    whole = model[part](x)
    for rows in (1, 2, 7, 16, 100):
        assert torch.equal(model[part](x[:rows]), whole[:rows])


def test_other_functions_meet_a_copy():
    matrix, x = torch.randn(LOW, HIGH), torch.randn(3, HIGH)
    weight = PanelWeight(matrix, torch.float32)
    assert torch.equal(x @ weight.T, x @ matrix.T)
    assert torch.equal(weight[4], matrix[4])
    assert torch.equal(F.linear(matrix, weight[:2] * 1), F.linear(matrix, matrix[:2]))
    assert torch.equal(weight.to(torch.bfloat16), matrix.to(torch.bfloat16))
    assert weight.float() is weight
    assert (weight.shape, weight.dtype, weight.device, len(weight)) == (matrix.shape, matrix.dtype, matrix.device, LOW)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "rounded"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_logprobs_are_the_same_bits_in_any_batch(tied: bool, rounded: bool, tmp_path: Path) -> None:
    """However prompts are cut: a router that saw other bits would now and then choose another expert."""
    checkpoint = tiny_checkpoint(
        tmp_path, seed=3, hidden_size=512, num_experts=64, num_experts_per_tok=8, tie_word_embeddings=tied,
        **({"dtype": "bfloat16"} if rounded else {}),
    )  # fmt: skip
    kept = {"expert_dtype": "bfloat16", "rounded": True} if rounded else {}
    requests = [
        Request(
            row, tuple((7 * row + 3 * i) % 256 for i in range(1 + 37 * row % 180)), Sampling(max_tokens=6), logprobs=2
        )
        for row in range(40)
    ]
    roomy = {"pass_tokens": 512, "attention_tokens": 512, "expert_tokens": 4096, "kv_pages": 1200}
    with engine_of(checkpoint, roomy | kept) as engine:
        together, _ = run(engine, requests)
        for row in (0, 13, 39):
            alone, _ = run(engine, [requests[row]])
            assert alone[row] == together[row]
    with engine_of(
        checkpoint, {**roomy, **kept, "pass_tokens": 37, "attention_tokens": 11, "expert_tokens": 50}
    ) as engine:
        in_pieces, _ = run(engine, requests)
    assert in_pieces == together


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not DOTS, reason="the processor does not multiply bfloat16")
def test_rounded_activations_are_nearer_to_float32_than_a_model_in_bfloat16(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, seed=4, dtype="bfloat16", hidden_size=256, num_hidden_layers=4)
    prompts = [tuple((11 * row + 5 * i) % 256 for i in range(20 + row)) for row in range(12)]
    wanted = _last_logprobs(checkpoint, prompts, torch.float32)
    in_bfloat16 = _last_logprobs(checkpoint, prompts, torch.bfloat16)
    requests = [Request(row, ids, Sampling(max_tokens=1), logprobs=1) for row, ids in enumerate(prompts)]
    with engine_of(checkpoint, {"pass_tokens": 512, "expert_dtype": "bfloat16", "rounded": True}) as engine:
        found, _ = run(engine, requests)
    chosen = [found[row].token_ids[0] for row in range(len(prompts))]
    own = torch.tensor([found[row].logprobs[0].logprob for row in range(len(prompts))])
    wanted, in_bfloat16 = (every[range(len(prompts)), chosen] for every in (wanted, in_bfloat16))
    error, theirs = (own - wanted).abs(), (in_bfloat16 - wanted).abs()
    assert 0 < error.mean() < theirs.mean()


def _last_logprobs(checkpoint: Path, prompts: list[tuple[int, ...]], dtype: torch.dtype) -> torch.Tensor:
    """Of every prompt's next token, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    with torch.inference_mode():
        rows = [model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1) for ids in prompts]
    return torch.stack(rows)


def engine_of(checkpoint: Path, sizes: dict[str, Any]) -> Engine:
    return Engine.load(checkpoint, plan(**sizes), staged=True, tokenizer=Tokenizer(checkpoint))


class Mlp(nn.Module):
    """Linear modules that families multiply the same rows with."""

    def __init__(self, *, up_inputs: int = HIGH) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(HIGH, LOW), nn.Linear(up_inputs, 2 * LOW, bias=False)


@pytest.fixture
def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp().requires_grad_(False)


@pytest.mark.parametrize("rounded", [False, *([True] if DOTS else [])])
def test_siblings_answer_as_each_alone(mlp: Mlp, rounded: bool) -> None:
    alone = nn.ModuleList([copy.deepcopy(mlp.up_proj), copy.deepcopy(mlp.gate_proj)])
    stored = torch.bfloat16 if rounded else torch.float32
    for module in (mlp, alone):
        for weights in module.parameters():
            weights.copy_(weights.to(torch.bfloat16))
        panel_weights(module, stored, rounded)
    for rows in (1, 7, 515):
        x = torch.randn(rows, 1, HIGH)
        assert torch.equal(mlp.gate_proj(x), alone[1](x))
        assert torch.equal(mlp.up_proj(x), alone[0](x))
    x = torch.randn(3, HIGH)  # in the other order
    assert torch.equal(mlp.up_proj(x), alone[0](x))
    assert torch.equal(mlp.gate_proj(x), alone[1](x))
    assert mlp.up_proj(x[:0]).shape == (0, 2 * LOW)
    assert mlp.gate_proj(x[:0]).shape == (0, LOW)
    assert torch.equal(mlp.up_proj.weight.unpacked(), alone[0].weight.unpacked())


def test_siblings_that_meet_other_rows_go_apart(mlp: Mlp) -> None:
    """Whatever is asked in whatever order, an answer is of the rows that it is asked of."""
    alone = copy.deepcopy(mlp)
    panel_weights(mlp, torch.float32)
    (joint, _), (a, b) = mlp.gate_proj.joint, torch.randn(2, 5, HIGH)
    for module, x in [("gate_proj", a), ("up_proj", b), ("gate_proj", b), ("gate_proj", a), ("up_proj", a)] * 3:
        assert torch.allclose(getattr(mlp, module)(x), getattr(alone, module)(x), rtol=1e-4, atol=1e-4)
    assert joint.answer(0, a) is joint.answer(1, a) is None


def test_siblings_multiply_once(mlp: Mlp, monkeypatch: pytest.MonkeyPatch) -> None:
    panel_weights(mlp, torch.float32)
    calls, product = list[torch.Tensor](), PanelMatrix.packed_linears

    def counted(own: PanelMatrix, x_TI: torch.Tensor, features: tuple[int, ...]) -> list[torch.Tensor]:
        calls.append(x_TI)
        return product(own, x_TI, features)

    monkeypatch.setattr(PanelMatrix, "packed_linears", counted)
    for _ in range(3):
        x = torch.randn(4, HIGH)
        mlp.gate_proj(x), mlp.up_proj(x)
    assert len(calls) == 3
    mlp.up_proj(torch.randn(4, HIGH))  # a pass breaks off
    mlp.gate_proj(x), mlp.up_proj(x)
    assert len(calls) == 5
    joint, _ = mlp.gate_proj.joint
    assert (joint._x, joint._answers) == (None, {})  # nothing of a pass is kept beyond it


def test_what_is_no_sibling_is_multiplied_alone() -> None:
    """Other inputs, another dtype, and weights that somebody else has too."""
    shared = Mlp().requires_grad_(False)
    other = nn.ModuleDict({"mlp": shared, "tied": nn.Linear(HIGH, LOW, bias=False)})
    other["tied"].weight = shared.gate_proj.weight
    narrow, mixed = Mlp(up_inputs=HIGH // 2).requires_grad_(False), Mlp().requires_grad_(False)
    mixed.up_proj.weight.copy_(mixed.up_proj.weight.to(torch.bfloat16))
    for model, mlp in [(other, shared), (narrow, narrow), (mixed, mixed)]:
        panel_weights(model, torch.bfloat16)
        assert (mlp.gate_proj.joint, mlp.up_proj.joint) == (None, None)
        assert isinstance(mlp.gate_proj.weight, PanelWeight)
    assert other["tied"].weight is shared.gate_proj.weight
