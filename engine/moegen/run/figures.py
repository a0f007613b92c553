"""What the counts of some passes mean for a model on a machine: utilisations between 0 and 1, None where unknown.

S-MBU: bytes that had to move (dense weights, weights of the experts that met a token, keys and values) / time / peak
bandwidth of the memory that they came from. Where they came from several at once, the share of the busiest.
S-MFU: FLOPs of the activated parameters and of attention / time / peak FLOP/s of the dtype that was computed in.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from moegen.plan.footprint import Footprint
from moegen.plan.machine import Machine
from moegen.plan.plan import Plan
from moegen.run.history import Span
from moegen.shape import DTYPE_BYTES, ModelShape


@dataclass(frozen=True)
class Figures:
    """Of one span."""

    tokens_per_s: float  # generated
    s_mfu: float | None
    s_mbu: float | None
    link_utilisation: float | None  # bytes copied to the device / time / rate of the link
    disk_utilisation: float | None
    overlap: float | None  # share of the transfers' time that was hidden behind compute; None when nothing moved


_COUNTS, _FIGURES = (tuple(item.name for item in fields(kind)) for kind in (Span, Figures))


@dataclass(frozen=True)
class Yardstick:
    """A model, a machine and a plan, against which spans are measured."""

    shape: ModelShape
    machine: Machine
    plan: Plan

    def measure(self, span: Span) -> Figures:
        rates = self.machine.rates
        return Figures(
            tokens_per_s=span.generated_tokens / span.seconds if span.seconds else 0.0,
            s_mfu=_utilisation(self.flops(span), span.seconds, self.peak_flops_per_s),
            s_mbu=self._s_mbu(span),
            link_utilisation=_utilisation(span.link_bytes, span.seconds, rates.h2d_bytes_per_s),
            disk_utilisation=_utilisation(span.disk_bytes, span.seconds, self.peak_disk_bytes_per_s),
            overlap=_overlap(span),
        )

    def describe(self, span: Span) -> dict[str, float | None]:
        """The span's counts and its figures, as one mapping."""
        figures = self.measure(span)
        return {
            **{name: getattr(span, name) for name in _COUNTS},
            **{name: getattr(figures, name) for name in _FIGURES},
        }

    @property
    def footprint(self) -> Footprint:
        """The model's pieces as the plan keeps them."""
        plan = self.plan
        groups = plan.group_experts or None
        return Footprint(self.shape, plan.compute_dtype, plan.expert_dtype, plan.kv_dtype, groups, plan.latent_kv)

    @property
    def peak_flops_per_s(self) -> float | None:
        """The best rate that was measured for the arithmetic that the plan uses."""
        rates = self.machine.rates
        dense = rates.linear_flops_per_s.get(self.plan.product_dtype, {})
        experts = rates.expert_flops_per_s.get(self.plan.expert_dtype, {})
        return max((rate for curves in (dense, experts) for curve in curves.values() for rate in curve.values()),
                   default=None)  # fmt: skip

    @property
    def peak_disk_bytes_per_s(self) -> float | None:
        """The best rate that was measured, with however many readers."""
        return max(self.machine.rates.disk_bytes_per_s.values(), default=None)

    def flops(self, span: Span) -> float | None:
        """A multiply and an add per activated parameter and per element that attention pairs; the head runs for
        sampled tokens only. Layers with a sliding window count as if they had none, latents as expanded heads, and
        the last layer's MLP, which meets sampled tokens only, as if it met all: as S-MFU is defined.
        """
        if span.attended_pairs is None:
            return None
        head = self.shape.vocab_size * self.shape.hidden_size
        body = self.shape.active_weights - head
        attention = self.shape.attention_width * self.shape.layers * span.attended_pairs
        return 2 * (body * span.tokens + head * span.generated_tokens + attention)

    def needed_bytes(self, span: Span) -> dict[str, float] | None:
        """Memory -> bytes that had to come from it: `dram`, `device`, `link`, `disk`.

        Experts that met a token count as spread evenly over the places where the plan keeps experts.
        """
        if span.active_experts is None or span.kv_tokens is None:
            return None
        near = "dram" if self.plan.device == "cpu" else "device"
        experts = span.active_experts * self.footprint.expert
        kv = span.kv_tokens * self.footprint.kv_token
        needed = {near: span.passes * self._dense_bytes + experts * self._share(self.plan.resident_groups)}
        needed["link"] = experts * self._share(self.plan.host_groups)
        needed["disk"] = experts * self._share(self.plan.disk_groups)
        for place, share in self._kv_places(near).items():
            needed[place] = needed.get(place, 0.0) + kv * share
        return needed

    def _s_mbu(self, span: Span) -> float | None:
        needed = self.needed_bytes(span)
        if needed is None:
            return None
        rates = self.machine.rates
        peaks = {
            "dram": rates.dram_read_bytes_per_s,
            "link": rates.h2d_bytes_per_s,
            "disk": self.peak_disk_bytes_per_s,
        }
        shares = [_utilisation(count, span.seconds, peaks.get(place)) for place, count in needed.items() if count]
        return None if None in shares else max((share for share in shares if share is not None), default=None)

    def _kv_places(self, near: str) -> dict[str, float]:
        if self.plan.kv_home == "device" or near == "dram":
            return {near: 1.0}
        return {"dram": self.plan.attention_on_host, "link": 1 - self.plan.attention_on_host}

    def _share(self, groups: int) -> float:
        """Of all experts that so many groups of every layer hold; a model without groups has all of them near."""
        return groups / self.plan.groups if self.plan.groups else float(groups == self.plan.resident_groups)

    @property
    def _dense_bytes(self) -> float:
        """Read once in every pass; of the embedding only the rows that are looked up, which are not counted."""
        looked_up = 0 if self.shape.tied_head else self.shape.vocab_size * self.shape.hidden_size
        return self.footprint.dense - looked_up * DTYPE_BYTES[self.plan.compute_dtype]


def _utilisation(count: float | None, seconds: float, peak_per_s: float | None) -> float | None:
    return None if count is None or not peak_per_s or not seconds else count / seconds / peak_per_s


def _overlap(span: Span) -> float | None:
    if span.waited_s is None or not span.transfer_s:
        return None
    return max(0.0, 1 - span.waited_s / span.transfer_s)
