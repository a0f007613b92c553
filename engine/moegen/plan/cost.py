"""How long a pass takes, from what the probe measured: the cost model.

On a CPU device the same cores do everything, so arithmetic adds up; what streams from disk goes on beside it, but for
the core time that packing takes, and but for what the ring of slots is too short to hide. On a GPU the link, the host's
attention, the host's memory and the device work side by side, and the slowest of them is the pass.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np

from moegen.plan.curve import Curve, Floats, Surface, at, on
from moegen.plan.footprint import Footprint
from moegen.plan.machine import Rates
from moegen.plan.plan import Plan
from moegen.shape import DTYPE_BYTES


@dataclass(frozen=True)
class Load:
    """What is in each of some passes: every field has one number per pass."""

    tokens: Floats
    sequences: Floats  # in the pass, decoding or being prefilled
    sampled: Floats
    decode_sequences: Floats
    decode_kv_tokens: Floats  # that decode tokens attend to, over all sequences
    prefill_chunks: Floats
    prefill_tokens: Floats
    prefill_pairs: Floats  # (query, key) pairs of the prefill tokens
    kept: Floats  # tokens that go through the last layer's experts: as many as are sampled, or all, as in MoE-Gen

    def scaled(self, factor: float | Floats) -> Load:
        return Load(*(getattr(self, item.name) * factor for item in fields(self)))


@dataclass(frozen=True)
class PassTime:
    """Seconds of each pass, and of the terms that it is made of. Some terms go on side by side: see `CostModel`."""

    seconds: Floats
    terms: dict[str, Floats]

    @property
    def binding(self) -> str:
        """The largest term over all passes."""
        return max(self.terms, key=lambda name: float(np.sum(self.terms[name])))


class CostModel:
    """The time of passes of one model under one plan."""

    def __init__(self, footprint: Footprint, plan: Plan, rates: Rates) -> None:
        self.footprint, self.shape, self.plan, self.rates = footprint, footprint.shape, plan, rates

    def time(self, load: Load) -> PassTime:
        """Seconds of every pass in `load`."""
        return self._on_cpu(load) if self.plan.device == "cpu" else self._on_gpu(load)

    def _on_cpu(self, load: Load) -> PassTime:
        terms = {**self._arithmetic(load), "decode attention": self._host_decode_seconds(load)}
        streamed = self._experts_of_groups(load, self.plan.streamed_groups) * self.footprint.expert
        disk = streamed * self._stored_share / self._disk_rate
        place_rate = self.rates.place_bytes_per_s if self.shape.stored_format is None else None  # codes lie as stored
        terms["placing"] = streamed / (place_rate * self.plan.threads) if place_rate else streamed * 0
        busy = sum(terms.values(), np.zeros_like(load.tokens))
        beside_moving = busy - terms["experts"] * self.plan.streamed_groups / max(self.plan.groups, 1)
        exposed = 1 - min(self.plan.stream_depth / max(self.plan.streamed_groups, 1), 1)
        seconds = np.maximum.reduce([busy, disk, beside_moving + exposed * disk])
        if self.plan.stream_depth == 0:
            seconds = busy + disk
        return PassTime(seconds, {**terms, "disk": disk})

    def _on_gpu(self, load: Load) -> PassTime:
        rates, plan = self.rates, self.plan
        on_host = plan.attention_on_host if plan.kv_home == "host" else 0.0
        host_kv = on_host * self._decode_bytes(load)
        device_kv = self._decode_bytes(load) - host_kv
        gathered = device_kv if plan.kv_home == "host" else 0 * device_kv
        streamed = self._experts_of_groups(load, plan.streamed_groups) * self.footprint.expert
        device = self._arithmetic(load)
        sides = {
            "link": (streamed + self._attention_traffic(load)) / (rates.h2d_bytes_per_s or np.inf)
            + gathered / (rates.gather_bytes_per_s or rates.h2d_bytes_per_s or np.inf),
            "host attention": on_host * self._host_decode_seconds(load),
            "DRAM": (streamed + host_kv + gathered) / (rates.dram_read_bytes_per_s or np.inf),
            "disk": streamed * self._stored_share * plan.disk_groups / max(plan.streamed_groups, 1) / self._disk_rate,
            "device": sum(
                device.values(),
                (1 - on_host) * self._expanded_bytes(load) / (rates.device_decode_bytes_per_s or np.inf),
            )
            + (1 - on_host) * self._latent_flops(load) / max(self._linear(1 << 24).values()),
        }
        return PassTime(np.maximum.reduce(list(sides.values())), sides)

    def _arithmetic(self, load: Load) -> dict[str, Floats]:
        """Whatever computes besides decode attention."""
        shape, rates = self.shape, self.rates
        rows = np.minimum(load.tokens, self.plan.attention_tokens)
        chunk = load.prefill_tokens / np.maximum(load.prefill_chunks, 1)
        head = shape.vocab_size * shape.hidden_size
        return {
            "dense": 2 * load.tokens * shape.layers * self._dense_layer / at(self._linear(self._dense_layer / 4), rows),
            "experts": self._expert_seconds(load),
            "prefill attention": 2 * shape.layers * shape.attention_width * load.prefill_pairs
            / at(rates.prefill_flops_per_s, chunk),
            "head": 2 * load.sampled * head / at(self._linear(head), np.minimum(load.sampled, self.plan.logit_tokens)),
            "sampling": load.sampled * shape.vocab_size * (rates.logit_s or 0),
            "overhead": (rates.pass_s or 0)
            + shape.layers * (rates.layer_s or 0)
            + shape.moe_layers * max(self.plan.groups - 1, 0) * (rates.group_s or 0)
            + load.sequences * (rates.sequence_s or 0)
            + load.tokens * shape.layers * shape.hidden_size * (rates.element_s or 0),
        }  # fmt: skip

    def _expert_seconds(self, load: Load) -> Floats:
        shape = self.shape
        if not shape.experts:
            return np.zeros_like(load.tokens)

        def layer(tokens: Floats) -> Floats:
            pairs = tokens * shape.experts_per_token
            return 2 * pairs * self.footprint.expert_elements / at(self._expert_curve, pairs / shape.experts)

        # As of a model in stages that ends with experts; of others the last layer's share of prompts comes too cheap.
        return (shape.moe_layers - 1) * layer(load.tokens) + layer(np.maximum(load.kept, 1))

    def _host_decode_seconds(self, load: Load) -> Floats:
        """Of all decode attention, by the host's cores: arithmetic binds over latents, which all heads share."""
        if self.footprint.latent:
            return self._latent_flops(load) / latent_flops_per_s(self.rates)
        return self._expanded_bytes(load) / self._decode_rate(load)

    def _latent_flops(self, load: Load) -> Floats:
        """Of decode attention with absorbed queries: a multiply and an add per pair and element, of keys and values."""
        width = self.shape.absorbed_width if self.footprint.latent else 0
        return 2 * self.shape.layers * width * load.decode_kv_tokens

    def _decode_bytes(self, load: Load) -> Floats:
        """Of keys and values that decode tokens see."""
        return self._seen_tokens(load) * self.footprint.kv_token

    def _expanded_bytes(self, load: Load) -> Floats:
        """The same in the dtype that attention's rate was measured in: codes take hardly less time than that."""
        return self._seen_tokens(load) * self._expanded_token

    def _seen_tokens(self, load: Load) -> Floats:
        """A layer with a window reads no more than that of each sequence."""
        context = load.decode_kv_tokens / np.maximum(load.decode_sequences, 1)
        windows = Counter(self.shape.windows)
        seen = sum(
            count * (np.minimum(1, window / np.maximum(context, 1)) if window else 1)
            for window, count in windows.items()
        )
        return load.decode_kv_tokens * seen / max(windows.total(), 1) if windows else load.decode_kv_tokens

    def _decode_rate(self, load: Load) -> Floats:
        """At the KV bytes that a sequence of the pass has in one layer under one KV head."""
        context = load.decode_kv_tokens / np.maximum(load.decode_sequences, 1)
        return at(self._decode_curve, np.maximum(context, 1) * self._expanded_token / self._layer_kv_heads)

    @property
    def _expanded_token(self) -> int:
        """Bytes of a token over all layers, codes taken as bfloat16."""
        return 2 * self.footprint.kv_per_token if self.footprint.kv_dtype == "int8" else self.footprint.kv_token

    def _attention_traffic(self, load: Load) -> Floats:
        """Keys and values that go home to the host, queries and answers of what the host's cores attend."""
        written = load.tokens * self.footprint.kv_token if self.plan.kv_home == "host" else 0 * load.tokens
        width = self.shape.absorbed_width if self.footprint.latent else self.shape.attention_width
        attended = load.decode_sequences * self.shape.layers * width
        return written + attended * DTYPE_BYTES[self.plan.compute_dtype] * self.plan.attention_on_host

    def _experts_of_groups(self, load: Load, groups: int) -> Floats:
        """Experts of `groups` groups of every layer: those that are read ahead before the router has spoken, and of the
        others those that some token is routed to (routing taken as uniform)."""
        if not groups:
            return np.zeros_like(load.tokens)
        share = self.shape.experts_per_token / self.shape.experts
        blind = min(self.plan.stream_depth / groups, 1)
        hit = blind + (1 - blind) * (1 - (1 - share) ** (load.tokens * self.plan.group_experts))
        kept = min((self.plan.groups - groups) * self.plan.group_experts, self.shape.experts)
        return hit * self.shape.moe_layers * (self.shape.experts - kept)

    @property
    def _dense_layer(self) -> float:
        """Elements of one layer's weights outside the routed experts."""
        shape = self.shape
        embeddings = (1 if shape.tied_head else 2) * shape.vocab_size * shape.hidden_size
        return max(shape.weights - shape.expert_weights - embeddings, 1) / shape.layers

    @property
    def _layer_kv_heads(self) -> float:
        return self.shape.layers * self.shape.heads / self.heads_per_kv_head

    @property
    def heads_per_kv_head(self) -> float:
        return self.shape.attention_width * self.shape.layers / self.shape.kv_per_token

    def _linear(self, elements: float) -> Curve:
        return on(_of_dtype(self.rates.linear_flops_per_s, self.plan.product_dtype), elements)

    @cached_property
    def _expert_curve(self) -> Curve:
        return on(_of_dtype(self.rates.expert_flops_per_s, self.plan.expert_dtype), self.footprint.expert_elements)

    @cached_property
    def _decode_curve(self) -> Curve:
        return on(self.rates.decode_bytes_per_s, self.heads_per_kv_head)

    @cached_property
    def _stored_share(self) -> float:
        """Bytes on disk for each byte in memory, of experts in few bits; others are taken to be as in memory."""
        return self.footprint.expert_stored / self.footprint.expert if self.shape.in_few_bits else 1.0

    @cached_property
    def _disk_rate(self) -> float:
        """Infinite where nothing was measured: then nothing else says that the disk binds."""
        rates = self.rates.disk_bytes_per_s
        return float(at(rates, max(self.plan.reader_threads, 1))) if rates else np.inf


def latent_flops_per_s(rates: Rates) -> float:
    """Of the host's decode attention over latents; where it was not measured, what it does where heads share keys most.

    That was measured over bfloat16 keys and values: with r query heads per KV head, r multiply-adds for every 2 bytes.
    """
    if rates.latent_flops_per_s is not None:
        return rates.latent_flops_per_s
    shared = max(rates.decode_bytes_per_s)
    return shared * max(rates.decode_bytes_per_s[shared].values())


def balanced_attention(footprint: Footprint, plan: Plan, rates: Rates, load: Load) -> float:
    """The share of decode attention on the host at which the link and the host's cores take equally long."""

    def sides(share: float) -> tuple[float, float]:
        terms = CostModel(footprint, replace(plan, attention_on_host=share), rates).time(load).terms
        return float(terms["link"].sum()), float(terms["host attention"].sum())

    (link_if_none, _), (link_if_all, host_if_all) = sides(0.0), sides(1.0)
    slope = link_if_none - link_if_all + host_if_all
    return min(max(link_if_none / slope, 0.0), 1.0) if slope > 0 else 0.0


def _of_dtype(tables: dict[str, Surface], dtype: str) -> Surface:
    """A 16-bit type that was not measured is as fast as the other one."""
    return tables.get(dtype) or next(table for name, table in reversed(tables.items()) if name != dtype)
