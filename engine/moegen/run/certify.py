"""Whether the engine is exact for a model: found out by running it, not by a list of names.

The model's own config is shrunk to a tiny geometry that keeps every feature (layer kinds, windows, rotary scaling,
routing rules), given random float32 weights, and run both ways: transformers' own forward, one sequence at a time, and
the engine's passes, which mix chunked prefill and decode of ragged sequences over small pages, with preemption and with
a prefix that some of them share, or with few state slots where layers carry a state. Equal in two stages: the model
runs staged. Equal through the seams only: its layers run whole. Neither: it is refused.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moegen.errors import UnsupportedModel
from moegen.memory.kv_pool import KVPool, groups_of
from moegen.memory.state_pool import StatePool
from moegen.model.host import ModelHost
from moegen.model.seams import SEAMS
from moegen.model.tiny import decoder_layers, layers_of_every_kind, tiny_config
from moegen.ops.hosted_attention import HostedAttention
from moegen.ops.link import Link
from moegen.run.forward import forward
from moegen.schedule.pages import PageLedger
from moegen.schedule.scheduler import Scheduler
from moegen.schedule.sequence import Request
from moegen.spec import Sampling

Way = Literal["staged", "seams"]
_WAYS: tuple[Way, ...] = ("staged", "seams")

TOLERANCE = 1e-4  # of the largest logit; float32 rounding is about 1e-6
_PROMPTS, _ANSWERS = (1, 9, 3, 17, 6, 12), (14, 3, 9, 5, 12, 1)  # tokens of the probe sequences
_PAGE_TOKENS, _PAGES, _PASS_TOKENS, _ATTENTION_TOKENS, _EXPERT_TOKENS, _LOGIT_TOKENS = 4, 15, 11, 5, 7, 6
_SLOTS = 4  # fewer than there are sequences, so that some are used again


@dataclass(frozen=True)
class Certified:
    """What was shown equal, and what it keeps."""

    way: Way
    keeps_latents: bool
    keeps_state: bool


def certify(config: PreTrainedConfig, *, latent_kv: bool = True) -> Way:
    """How the engine may run models of this config; `latent_kv` as in the plan.

    Raises:
        UnsupportedModel: naming the layer or the reason.
    """
    return certified(config, latent_kv=latent_kv).way


def certified(config: PreTrainedConfig, *, latent_kv: bool = True) -> Certified:
    """As `certify`, with what the layers keep."""
    family = config.model_type
    full = _full_model(config)
    _require_fixed_rotary(full, family)
    mixers = ", ".join(_mixer_names(full))
    try:
        reference = tiny_reference(config, full)
    except Exception as error:
        raise UnsupportedModel(
            f"{family}: layers of type {mixers} cannot be proven exact: no tiny model of them can be built "
            f"({_brief(error)})"
        ) from error
    reasons: dict[Way, str] = {}
    for way in _WAYS:
        try:
            host = engine_model(reference, staged=way == "staged", latent_kv=latent_kv)
            difference = logit_difference(host, reference)
        except UnsupportedModel as error:
            reasons[way] = _brief(error)
            continue
        except Exception as error:
            reasons[way] = f"they do not run over the engine's pages: {_brief(error)}"
            continue
        if difference <= TOLERANCE:
            if latent_kv:
                _require_latents(host, family)
            return Certified(way, _keeps_latents(host), bool(host.state_shapes))
        reasons[way] = _unkept(host) or f"logits differ by {difference:.0e} of the largest"
    raise UnsupportedModel(f"{family}: layers of type {mixers} cannot be kept exact ({reasons['seams']})")


def _require_latents(host: ModelHost, family: str) -> None:
    """The planner, which sees no code, has counted on latents wherever a config has their rank."""
    rank = getattr(host.model.config.get_text_config(), "kv_lora_rank", None)
    if rank and not _keeps_latents(host):
        raise UnsupportedModel(
            f"{family}: layers of type {', '.join(_mixer_names(host.model))} are not made of the known parts of latent "
            "attention; give engine.plan.latent_kv: false to keep the keys and values of all heads"
        )


def _keeps_latents(host: ModelHost) -> bool:
    """An indexer's keys have no values."""
    return any(shape.latent and shape.value_dim for shape in host.kv_shapes.values())


def tiny_reference(config: PreTrainedConfig, full: PreTrainedModel | None = None) -> PreTrainedModel:
    """A tiny model with every feature of `config`, of random float32 weights, in transformers' own code.

    `full` is the model of `config` on the meta device, for whoever has it.
    """
    layers = decoder_layers(_full_model(config) if full is None else full)
    return random_model(tiny_config(config, layers_of_every_kind(layers)))


def _full_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model as it is, on the meta device: its modules, none of its weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except Exception as error:
        raise UnsupportedModel(
            f"{config.model_type}: transformers builds no causal language model from its config.json ({_brief(error)})"
        ) from error


def _brief(error: Exception) -> str:
    first_line = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, UnsupportedModel):
        return first_line
    return f"{type(error).__name__}: {first_line.partition('. ')[0][:160]}"


def _require_fixed_rotary(model: PreTrainedModel, family: str) -> None:
    """A token's rotary embedding must depend on its own position alone, and not on what else is in the pass."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", ())
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if "dynamic" in kind or kind == "longrope":
                raise UnsupportedModel(
                    f"{family}: layer type {type(module).__name__} with rope_type {kind!r} turns by the length of the "
                    "longest sequence of a batch; only rotary embeddings that depend on the position alone are exact"
                )


def _unkept(host: ModelHost) -> str | None:
    """The first decoder layer that mixes tokens by something the engine does not know, of a model that is not equal."""
    known = host.kv_shapes.keys() | host.state_shapes.keys()
    for layer in decoder_layers(host.model):
        if known.isdisjoint(layer.modules()) and (mixers := _mixer_names(layer)):
            return f"{', '.join(mixers)} keeps state in a way of its own"
    return None


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Weights large enough that every path matters: fan-in scaled matrices, perturbed vectors and buffers.

    But no larger: they amplify rounding, also that of transformers' own forward, layer after layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)  # some families draw vectors of their own, which are kept
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * (1.0 if "embed" in name else 1.5 / math.sqrt(parameter.shape[-1])))
            else:
                parameter.add_(noise * 0.2)
    return model


def _probe_sequences(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = [p + a for p, a in zip(_PROMPTS, _ANSWERS, strict=True)]
    sequences = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    for sequence, prompt in zip(sequences, _PROMPTS, strict=True):
        if prompt > _PAGE_TOKENS:
            sequence[:_PAGE_TOKENS] = sequences[-1][:_PAGE_TOKENS]
    return sequences


@torch.inference_mode()
def _expected_logits(model: PreTrainedModel) -> list[torch.Tensor]:
    """`[L, V]` of each probe sequence, alone, with no cache."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return [
        model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0] for tokens in _probe_sequences(vocabulary)
    ]


def engine_model(
    reference: PreTrainedModel,
    *,
    staged: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    latent_kv: bool = True,
) -> ModelHost:
    """The reference's weights in the engine's hands."""
    own = copy.deepcopy(reference.config)  # from_config writes the seams' names into it: not into the reference's
    model = AutoModelForCausalLM.from_config(own, dtype=dtype, **SEAMS)
    model.load_state_dict(reference.state_dict())
    return ModelHost(model.to(device), staged=staged, expert_tokens=_EXPERT_TOKENS, latent_kv=latent_kv)


def logit_difference(
    host: ModelHost, reference: PreTrainedModel, on_host: float | None = None, kv_dtype: torch.dtype | None = None
) -> float:
    """The largest difference between the reference's logits and those of the engine's passes, relative to the largest.

    `on_host`: keys and values live on the host, whose cores attend this share of them; None: where the model is.
    `kv_dtype` is theirs; None: the model's.
    """
    expected = _expected_logits(reference)
    hosted = None if on_host is None else HostedAttention(Link(host.device), on_host)
    home = host.device if hosted is None else torch.device("cpu")
    groups = groups_of(host.kv_shapes.values())
    pages, windows = _PAGES * len(groups), tuple(group.window for group in groups)
    pool = KVPool(host.kv_shapes, pages, _PAGE_TOKENS, kv_dtype or host.model.dtype, home, hosted, groups)
    ledger = PageLedger(pages, _PAGE_TOKENS, windows, _PASS_TOKENS)
    sequences = _probe_sequences(expected[0].shape[-1])
    requests = (
        Request(row, tuple(tokens[:prompt]), Sampling(max_tokens=len(tokens) - prompt + 1))
        for row, (tokens, prompt) in enumerate(zip(sequences, _PROMPTS, strict=True))
    )
    states = StatePool(host.state_shapes, _SLOTS, home)
    prefix, slots = (tuple(sequences[-1][:_PAGE_TOKENS]), None) if not host.state_shapes else ((), _SLOTS)
    scheduler = Scheduler(requests, ledger, _PASS_TOKENS, prefix=prefix, slots=slots)
    kept = itertools.cycle([(0, 1), (0, 2), (1, 2)])  # from which token on, every how many of them
    worst, scale = 0.0, max(float(logits.abs().max()) for logits in expected)
    while (step := scheduler.next_step()) is not None:
        every = torch.cat(
            [expected[c.sequence.request.row_index][c.start : c.start + c.length] for c in step.chunks]
        )  # fmt: skip
        first, stride = next(kept)  # the last layer answers for no others
        keep = torch.arange(min(first, step.tokens - 1), step.tokens, stride)
        pieces = forward(
            host, pool, step, _ATTENTION_TOKENS, states=states, logit_tokens=_LOGIT_TOKENS, keep=keep
        )  # fmt: skip
        difference = float((torch.cat(list(pieces)).float().cpu() - every[keep]).abs().max())
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
        for chunk in step.chunks:
            chunk.sequence.computed += chunk.length
        for sequence in step.sampled:
            truth = sequences[sequence.request.row_index]
            if len(sequence.tokens) == len(truth):
                scheduler.end(sequence)
            else:
                sequence.tokens.append(truth[len(sequence.tokens)])
    return worst / scale


def _mixer_names(model: nn.Module) -> list[str]:
    """Class names of what mixes tokens in this module, for the message of a refusal."""
    words = ("attention", "mixer", "mamba", "conv", "indexer", "deltanet", "delta")
    classes = {type(module) for module in model.modules()}
    names = {c.__name__ for c in classes if not c.__module__.startswith("torch.")}
    return sorted(n for n in names if any(word in n.lower() for word in words) and "norm" not in n.lower())
