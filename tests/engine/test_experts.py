"""The grouped experts against transformers' own eager loop over experts."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moegen.memory.weight_slot import _First
from moegen.ops import expert_weights
from moegen.ops.expert_kernel import PANEL, add_weighted_rows, panel_places
from moegen.ops.expert_weights import (
    ExpertGroup,
    ExpertMatrix,
    PanelMatrix,
    PlainMatrix,
    ResidentExperts,
    empty_rows,
    resident_experts,
    with_gaps,
)
from moegen.ops.experts import grouped_experts
from moegen.ops.gate_kernel import silu_gated
from moegen.ops.panel_packing import pack_rows
from moegen.ops.routing import Routing
from moegen.ops.vector_ir import DOTS
from torch import nn
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

EXPERTS, HIDDEN, WIDTH, TOP_K = 8, 24, 16, 3


def _filled(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return module.to(dtype).requires_grad_(False)


def _gated() -> nn.Module:
    config = Qwen3MoeConfig(
        num_local_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "eager"
    return _filled(Qwen3MoeExperts(config))


def _transposed_with_bias() -> nn.Module:
    config = GptOssConfig(num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=WIDTH)
    config._experts_implementation = "eager"
    return _filled(GptOssExperts(config))


def _without_gate() -> nn.Module:
    config = NemotronHConfig(n_routed_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=WIDTH)
    config._experts_implementation = "eager"
    return _filled(NemotronHExperts(config))


KINDS = {"gated": _gated, "transposed with bias": _transposed_with_bias, "without gate": _without_gate}


def _routed(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, expert ids (distinct per token, skewed to the low ones) and weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    scores = torch.randn(tokens, EXPERTS, generator=generator) - torch.arange(EXPERTS) / 2
    weights, ids = scores.softmax(-1).topk(TOP_K)
    return hidden, ids, weights


def test_kinds_are_what_they_say() -> None:
    gated, biased, plain = (make() for make in KINDS.values())
    assert (gated.has_gate, gated.has_bias, gated.is_transposed) == (True, False, False)
    assert (biased.has_gate, biased.has_bias, biased.is_transposed) == (True, True, True)
    assert not plain.has_gate


FORMS = {"panels": PanelMatrix, "plain": lambda e, o, i, dtype: PlainMatrix(torch.empty(e, o, i, dtype=dtype))}


def _matrix(weight: torch.Tensor, transposed: bool, form: str) -> ExpertMatrix:
    experts, rows, columns = weight.shape
    matrix: ExpertMatrix = FORMS[form](experts, *((columns, rows) if transposed else (rows, columns)), weight.dtype)
    for expert in range(experts):
        if transposed:
            matrix.place_transposed(expert, weight[expert])
        else:  # in two parts, as gate and up come from a checkpoint
            half = rows // 2
            matrix.place(expert, half, weight[expert, half:])
            matrix.place(expert, 0, weight[expert, :half])
    return matrix


def _supply(module: Any, form: str, group_experts: int = EXPERTS) -> ResidentExperts:
    up = module.gate_up_proj if module.has_gate else module.up_proj
    firsts = range(0, EXPERTS, group_experts)
    return ResidentExperts(
        tuple(
            ExpertGroup(
                first,
                _matrix(up[first : first + group_experts], module.is_transposed, form),
                _matrix(module.down_proj[first : first + group_experts], module.is_transposed, form),
            )
            for first in firsts
        )
    )


@pytest.mark.parametrize("group_experts", [1, 3, EXPERTS])
@pytest.mark.parametrize("expert_tokens", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("tokens", [1, 5, 90])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_transformers(kind: str, form: str, tokens: int, expert_tokens: int, group_experts: int) -> None:
    module = KINDS[kind]()
    hidden, ids, weights = _routed(tokens)
    expected = module(hidden, ids, weights)
    supply = _supply(module, form, group_experts)
    out = grouped_experts(module, supply, hidden, ids, weights, expert_tokens=expert_tokens)
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_taking_a_modules_own_weights(kind: str) -> None:
    module = KINDS[kind]()
    hidden, ids, weights = _routed(30)
    expected = module(hidden, ids, weights)
    bare = copy.deepcopy(module)
    supply = resident_experts(bare, torch.float32)
    assert "down_proj" not in dict(bare.named_parameters())
    assert torch.allclose(grouped_experts(bare, supply, hidden, ids, weights, expert_tokens=16), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_does_not_see_the_batch(kind: str) -> None:
    module = KINDS[kind]()
    supply = _supply(module, "panels")
    hidden, ids, weights = _routed(60)
    together = grouped_experts(module, supply, hidden, ids, weights, expert_tokens=1 << 20)
    for i in range(0, 60, 7):
        own = slice(i, i + 1)
        alone = grouped_experts(module, supply, hidden[own], ids[own], weights[own], expert_tokens=5)
        assert torch.allclose(alone[0], together[i], atol=1e-6)


@pytest.mark.parametrize("inputs", [24, 256, 1024])  # 256 and 1024: rows lie further apart than they are long
def test_rows_are_laid_out_once_and_mean_the_same_wherever_they_lie(inputs: int) -> None:
    matrix = PanelMatrix(1, 40, inputs, torch.float32)
    weight, x = torch.randn(40, inputs), torch.randn(7, inputs)
    matrix.place(0, 0, weight)
    laid = matrix.lay_out(x)
    assert torch.equal(laid, x)
    assert matrix.lay_out(laid).data_ptr() == laid.data_ptr()
    wide = torch.zeros(9, inputs + 16)
    wide[1:8, 16:] = x
    for same in (x, laid, laid.clone(), wide[1:8, 16:], x.T.contiguous().T, x.double()):
        assert torch.equal(matrix.linear(same, [7]), matrix.linear(x, [7]))
    assert torch.allclose(matrix.linear(laid[2:5], [3]), x[2:5] @ weight.T, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_past_the_last_expert_add_nothing(kind: str) -> None:
    """transformers marks experts of another device so."""
    module = KINDS[kind]()
    supply = _supply(module, "panels")
    hidden, ids, weights = _routed(40)
    elsewhere = ids >= EXPERTS // 2
    expected = grouped_experts(module, supply, hidden, ids, weights.masked_fill(elsewhere, 0), expert_tokens=64)
    sentinel = ids.masked_fill(elsewhere, EXPERTS)
    for expert_tokens in (3, 64):
        out = grouped_experts(module, supply, hidden, sentinel, weights, expert_tokens=expert_tokens)
        assert torch.allclose(out, expected, atol=1e-6)
    nowhere = torch.full_like(ids, EXPERTS)
    assert not grouped_experts(module, supply, hidden, nowhere, weights, expert_tokens=9).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    module = _gated()
    hidden, ids, weights = _routed(50)
    expected = module(hidden, ids, weights)
    supply = resident_experts(copy.deepcopy(module).to(dtype), dtype)
    out = grouped_experts(module, supply, hidden.to(dtype), ids, weights.to(dtype), expert_tokens=16)
    assert out.dtype is dtype
    assert torch.allclose(out.float(), expected, atol=0.05 * expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (PANEL, 3), (PANEL + 1, 8), (3 * PANEL - 1, 200)])
def test_stored_weights_multiply_exactly(dtype: torch.dtype, out_features: int, in_features: int) -> None:
    """Panels hold the stored bits: the product is that of the widened weights, for any number of rows per expert."""
    generator = torch.Generator().manual_seed(1)
    counts = (0, 1, 2, 13, 14, 15, 28, 29, 0, 200)
    weight = torch.randn(len(counts), out_features, in_features, generator=generator).to(dtype)
    x = torch.randn(sum(counts), in_features, generator=generator)
    matrix = _matrix(weight, False, "panels")
    assert isinstance(matrix, PanelMatrix)
    expected = torch.cat([rows @ w.float().T for rows, w in zip(x.split(list(counts)), weight, strict=True)])
    assert torch.allclose(matrix.linear(x, counts), expected, atol=1e-4)
    assert all(torch.equal(matrix.unpacked(expert), weight[expert]) for expert in range(len(counts)))


@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1, 1), (PANEL, 3), (PANEL + 1, 8), (3 * PANEL - 1, 200), (PANEL, 512)]
)
def test_rounded_rows_multiply_exactly(out_features: int, in_features: int) -> None:
    """In bfloat16, as pairs of inputs; where the processor has no such products, in float32."""
    generator = torch.Generator().manual_seed(1)
    counts = (0, 1, 2, 13, 14, 15, 28, 29, 0, 200)
    weight = torch.randn(len(counts), out_features, in_features, generator=generator).bfloat16()
    exact = torch.randn(sum(counts), in_features, generator=generator).bfloat16().float()
    matrix = _rounded_matrix(weight)
    x = exact * (1 + 2**-10) if DOTS else exact  # too little to reach another bfloat16
    expected = torch.cat([rows @ w.float().T for rows, w in zip(exact.split(list(counts)), weight, strict=True)])
    assert torch.allclose(matrix.linear(x, counts), expected, atol=1e-4)
    tokens = torch.arange(len(x)).flip(0)
    assert torch.equal(matrix.linear(x.flip(0), counts, tokens), matrix.linear(x, counts))
    laid = matrix.lay_out(x)
    assert matrix.lay_out(laid) is laid
    assert torch.equal(matrix.linear(laid, counts), matrix.linear(x, counts))
    for expert, own in enumerate(weight):
        assert torch.equal(matrix.unpacked(expert), own)
        assert torch.equal(matrix.looked_up(expert, torch.tensor([0, out_features - 1])), own[[0, -1]])


def _rounded_matrix(weight: torch.Tensor) -> PanelMatrix:
    """Placed in each of the ways in which weights come: whole, in parts, transposed, at odd places in memory."""
    experts, rows, inputs = weight.shape
    matrix = PanelMatrix(experts, rows, inputs, weight.dtype, rounded=True)
    for expert, own in enumerate(weight):
        if expert % 3 == 0:
            matrix.place_transposed(expert, own.T)
        elif expert % 3 == 1:
            matrix.place(expert, rows // 2, own[rows // 2 :])
            matrix.place(expert, 0, own[: rows // 2])
        else:
            shifted = torch.empty(own.numel() + 1, dtype=own.dtype)[1:].view(own.shape).copy_(own)
            matrix.place(expert, 0, shifted)
    return matrix


@pytest.mark.parametrize("rounded", [False, True])
def test_threads_and_neighbours_change_no_bit(rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output is one sum in one order, whatever is beside it."""
    generator = torch.Generator().manual_seed(2)
    counts = (3, 70, 0, 1)
    weight = torch.randn(4, 5 * PANEL, 40, generator=generator)
    matrix = _rounded_matrix(weight.bfloat16()) if rounded else _matrix(weight, False, "panels")
    x = torch.randn(sum(counts), 40, generator=generator)
    outs = [matrix.linear(x, counts)]
    monkeypatch.setattr(expert_weights, "numba_threads", lambda: 3)  # one thread walks the shares of three
    outs.append(matrix.linear(x, counts))
    assert torch.equal(*outs)
    for row in (0, 2, 3, 40, 72):
        expert = 0 if row < 3 else 1
        alone = matrix.linear(x[row : row + 1], [int(e == expert) for e in range(4)])
        assert torch.equal(alone[0], outs[0][row])


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gates_at_once_are_gates_after(stored: torch.dtype, rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, however many rows an expert has and whoever computes them; where gates are whole panels."""
    generator = torch.Generator().manual_seed(3)
    counts, tokens = (3, 100, 0, 1, 15), 50
    weight = torch.randn(5, 6 * PANEL, 40, generator=generator).to(stored)
    matrix = PanelMatrix(5, 6 * PANEL, 40, stored, rounded)
    for expert, own in enumerate(weight):
        matrix.place(expert, 0, own)
    x = torch.randn(tokens, 40, generator=generator)
    tokens_S = torch.randint(tokens, (sum(counts),), generator=generator)
    for threads in (1, 3):  # one thread walks the shares of three
        monkeypatch.setattr(expert_weights, "numba_threads", lambda threads=threads: threads)
        for dtype in {torch.float32, matrix.row_dtype}:
            apart = silu_gated(matrix.linear(x, counts, tokens_S), dtype)
            at_once = matrix.gated(x, counts, tokens_S, dtype)
            assert at_once is not None
            assert (at_once.dtype, at_once.stride()) == (dtype, apart.stride())
            assert torch.equal(at_once, apart)
    assert PanelMatrix(1, 5 * PANEL, 40, stored, rounded).gated(x, [50], tokens_S[:50], torch.float32) is None


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inputs", [40, 512])
def test_answers_added_at_once_are_answers_added_after(
    inputs: int, stored: torch.dtype, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, whoever computes them and however the pairs are cut; a token may name an expert twice."""
    generator = torch.Generator().manual_seed(3)
    experts, tokens, top_k, outputs = 6, 90, 3, 8 * PANEL
    weight = (torch.randn(experts, outputs, inputs, generator=generator) / inputs**0.5).to(stored)
    matrix = PanelMatrix(experts, outputs, inputs, stored, rounded)
    for expert, own in enumerate(weight):
        matrix.place(expert, 0, own)
    ids_TK = torch.randint(1, experts - 2, (tokens, top_k), generator=generator)  # nobody names the first and the last
    ids_TK[torch.rand(tokens, generator=generator) < 0.9] = 2  # more rows than meet a panel at once
    routing = Routing.of(ids_TK, torch.rand(tokens, top_k, generator=generator), experts)
    x_SI = torch.randn(tokens * top_k, inputs, generator=generator)
    after = torch.full((tokens, outputs), torch.nan)
    answers = with_gaps(matrix.linear(x_SI, routing.counts_E)).numpy()
    weights = routing.weights_S.numpy()
    add_weighted_rows(after.numpy(), outputs, routing.places_TK.numpy(), weights, answers, 0, 1)
    monkeypatch.setattr(expert_weights, "_PANELS_TO_SHARE", 1)
    for threads in (1, 3):  # one thread walks the shares of three
        monkeypatch.setattr(expert_weights, "numba_threads", lambda threads=threads: threads)
        for cuts in ([0, 270], [0, 5, 260, 270]):
            at_once = empty_rows(torch.empty(tokens, outputs)).fill_(torch.nan)
            for first, end in itertools.pairwise(cuts):
                counts, own = np.diff(routing.starts_E1.clip(first, end)), slice(first, end)
                some = (x_SI[own], counts, routing.tokens_S[own], routing.weights_S[own])
                assert matrix.add_to(at_once, *some, anew=first == 0)
            assert torch.equal(at_once, after)


def test_a_slot_adds_the_answers_of_the_experts_that_are_in_it() -> None:
    """Though it has room for more."""
    matrix, x_SI = PanelMatrix(4, 16 * PANEL, 8, torch.float32), torch.randn(5, 8)
    for expert in range(4):
        matrix.place(expert, 0, torch.randn(16 * PANEL, 8))
    tokens_S, weights_S = torch.tensor([0, 2, 1, 0, 2]), torch.rand(5)
    wanted, out = (torch.full((3, 16 * PANEL), torch.nan) for _ in range(2))
    given = (tokens_S, weights_S)
    assert matrix.add_to(wanted, x_SI, [3, 2, 0, 0], *given, anew=True)
    assert _First(matrix, 2).add_to(out, x_SI, np.array([3, 2]), *given, anew=True)
    assert torch.equal(out, wanted)


def test_answers_are_added_after_where_threads_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few panels for each, or where the last panel is not whole."""
    nothing = torch.zeros(1, dtype=torch.int64)
    for features, threads, adds in [(16 * PANEL, 2, True), (16 * PANEL, 3, False), (16 * PANEL - 1, 1, False)]:
        matrix, out = PanelMatrix(1, features, 8, torch.float32), torch.full((1, features), torch.nan)
        monkeypatch.setattr(expert_weights, "numba_threads", lambda threads=threads: threads)
        assert matrix.add_to(out, torch.ones(1, 8), [1], nothing, torch.ones(1), anew=True) is adds
        assert out.isnan().all() == out.isnan().any() == (not adds)


@pytest.mark.parametrize("expert_tokens", [7, 1 << 20])
@pytest.mark.parametrize("group_experts", [3, EXPERTS])
def test_experts_whose_answers_are_added_at_once(group_experts: int, expert_tokens: int) -> None:
    """As wide as models are, so that they are."""
    config = Qwen3MoeConfig(
        num_local_experts=EXPERTS, hidden_size=16 * PANEL, moe_intermediate_size=PANEL, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "eager"
    module = _filled(Qwen3MoeExperts(config))
    _, ids, weights = _routed(90)
    hidden = torch.randn(90, 16 * PANEL) / 16
    expected = module(hidden, ids, weights)
    supply = _supply(module, "panels", group_experts)
    out = grouped_experts(module, supply, hidden, ids, weights, expert_tokens=expert_tokens)
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-3 * expected.abs().max().item())
    alone = grouped_experts(module, supply, hidden[8:9], ids[8:9], weights[8:9], expert_tokens=1)
    assert torch.equal(alone[0], out[8])


_NARROW = """
import sys
import llvmlite.binding
features = llvmlite.binding.get_host_cpu_features()
kept = {name: on and not name.startswith("avx512") for name, on in features.items()} | {"neon": sys.argv[1] == "4"}
llvmlite.binding.get_host_cpu_features = lambda: type(features)(kept)
from moegen.ops import expert_kernel
assert expert_kernel.LANES == int(sys.argv[1]), expert_kernel.LANES
import torch
from pytest import MonkeyPatch
from tests.engine.test_experts import test_stored_weights_multiply_exactly as check
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    check(dtype, 3 * expert_kernel.PANEL - 1, 70)
from tests.engine.test_experts import test_gates_at_once_are_gates_after as check
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    with MonkeyPatch.context() as patch:
        check(dtype, True, patch)
from tests.engine.test_experts import test_answers_added_at_once_are_answers_added_after as check
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    with MonkeyPatch.context() as patch:
        check(40, dtype, True, patch)
from tests.engine.test_stored_formats import CODINGS, test_the_kernel_multiplies_with_what_the_codes_mean as check
torch.set_num_threads(1)
for coding in CODINGS:
    check(coding, MonkeyPatch())
"""


@pytest.mark.parametrize("lanes", [4, 8])
def test_machines_with_narrower_registers(lanes: int, tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", _NARROW, str(lanes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


_TOGETHER = """
import torch
from pytest import MonkeyPatch
from moegen.ops.threads import numba_threads
torch.set_num_threads(2)
assert numba_threads() == 2
from tests.engine import test_experts, test_routers
from tests.engine.test_dense import Mlp, test_siblings_answer_as_each_alone
test_siblings_answer_as_each_alone(Mlp().requires_grad_(False), False)
test_routers.test_a_row_does_not_depend_on_the_rows_beside_it_nor_on_how_they_lie(True)
test_experts.test_experts_whose_answers_are_added_at_once(3, 1 << 20)
for _ in range(20):
    with MonkeyPatch.context() as patch:
        test_experts.test_gates_at_once_are_gates_after(torch.bfloat16, True, patch)
        test_experts.test_answers_added_at_once_are_answers_added_after(512, torch.bfloat16, True, patch)
"""


def test_threads_that_work_together_change_no_bit() -> None:
    """The other tests have one, which walks all shares."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "2",
        "NUMBA_NUM_THREADS": "2",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", _TOGETHER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bits", [np.uint16, np.int16, np.float32], ids=["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("features", "inputs"), [(3 * PANEL, 48), (2 * PANEL + 5, 37), (PANEL - 1, 16)])
def test_rows_are_packed_into_panels_feature_by_feature(bits, features, inputs):
    rows_OI = np.random.default_rng(0).integers(0, 1 << 15, (features, inputs)).astype(bits)
    places_P = panel_places(bits is np.uint16)
    expected_NIP = np.zeros((-(-features // PANEL), inputs, PANEL), bits)
    for feature in range(features):
        expected_NIP[feature // PANEL, :, places_P[feature % PANEL]] = rows_OI[feature]
    for cut in (0, 3, PANEL):  # rows may come in pieces
        packed_NIP = np.zeros_like(expected_NIP)
        pack_rows(packed_NIP, 0, rows_OI[:cut], places_P)
        pack_rows(packed_NIP, cut, rows_OI[cut:], places_P)
        np.testing.assert_array_equal(packed_NIP, expected_NIP)
