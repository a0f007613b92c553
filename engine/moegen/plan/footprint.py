"""What a model takes of memory, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moegen.schedule.pages import LayerGroup, layer_groups
from moegen.shape import DTYPE_BYTES, ModelShape

# A group is what one read of a few MiB at a time fills while another is multiplied: large enough that a take costs
# nothing beside it, small enough that a layer has many, for budgets are spent in groups of every layer.
_GROUP_BYTES = (16 << 20, 100 << 20)
_GROUPS_OF_A_LAYER = 16
_LOGIT_BYTES = 128 << 20
_LATENT_BYTES = 128 << 20  # of queries absorbed or heads expanded at once, with their answers
_STATE_BYTES = 3 * (64 << 20)  # of states that recurrent layers work on at once, with the copies that they make
_WITH_SCALES = 1.06  # bytes of plain weights brought to 8 bits, each: outputs have scales
_TOKENIZER_BYTES = 512  # per entry of the vocabulary: strings, ids and merges


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's pieces, in the dtypes in which they lie in memory."""

    shape: ModelShape
    compute_dtype: str
    expert_dtype: str
    kv_dtype: str
    fixed_group_experts: int | None = None  # named by the job
    latent_kv: bool = True  # as in the plan
    free_windows: bool = True  # pages outside the windows of their layers are given back

    @property
    def latent(self) -> bool:
        """Whether pages have latents: the model has them, and they are kept."""
        return self.latent_kv and self.shape.latent_kv_per_token is not None

    @property
    def kv_per_token(self) -> int:
        """Elements that one token keeps over all layers."""
        return (self.shape.latent_kv_per_token if self.latent else None) or self.shape.kv_per_token

    @property
    def kv_token(self) -> int:
        """Bytes that one token keeps over all layers; beside codes, a scale for each key and value of a KV head."""
        scales = (
            2 * self.kv_per_token * self.shape.heads // self.shape.attention_width if self.kv_dtype == "int8" else 0
        )
        return self.kv_per_token * DTYPE_BYTES[self.kv_dtype] + 4 * scales

    @property
    def dense(self) -> int:
        """Weights outside the experts: what multiplies as experts are kept, embeddings in the dtype of arithmetic."""
        embedding = 0 if self.shape.tied_head else self.shape.vocab_size * self.shape.hidden_size
        expanded = embedding + self.shape.coded_dense_weights  # their values need not be exact in the stored dtype
        linear = self.shape.weights - self.shape.expert_weights - expanded
        if self.latent and self.compute_dtype == "float32":
            linear += self.shape.key_up_weights  # in a second layout, to be absorbed
        return linear * DTYPE_BYTES[self.expert_dtype] + expanded * DTYPE_BYTES[self.compute_dtype]

    @property
    def dense_loading(self) -> int:
        """The same weights while the model is loaded, all of them in the dtype of arithmetic."""
        return (self.shape.weights - self.shape.expert_weights) * DTYPE_BYTES[self.compute_dtype]

    @property
    def experts(self) -> int:
        if self.shape.in_few_bits:
            return self.expert * self.shape.moe_layers * self.shape.experts
        return self.shape.expert_weights * DTYPE_BYTES[self.expert_dtype]

    @property
    def expert_elements(self) -> int:
        """Parameters of one expert of one layer."""
        return self.shape.expert_weights // max(self.shape.moe_layers * self.shape.experts, 1)

    @property
    def expert(self) -> int:
        """Bytes of one expert of one layer in memory."""
        if not self.shape.in_few_bits:
            return self.expert_elements * DTYPE_BYTES[self.expert_dtype]
        if self.shape.stored_format is None:
            return int(_WITH_SCALES * self.expert_elements)
        return self.shape.expert_coded_bytes // max(self.shape.moe_layers * self.shape.experts, 1)

    @property
    def expert_stored(self) -> int:
        """Bytes of one expert of one layer on disk: what is read when it moves."""
        shape = self.shape
        if shape.expert_stored_bytes is not None:
            return shape.expert_stored_bytes // max(shape.moe_layers * shape.experts, 1)
        return self.expert_elements * DTYPE_BYTES[shape.dtype]

    @property
    def group_experts(self) -> int:
        """Experts per group where groups move: a layer's are of one size, or nearly."""
        if self.fixed_group_experts or not self.shape.experts:
            return min(self.fixed_group_experts or 0, self.shape.experts)
        layer = self.expert * self.shape.experts
        smallest, largest = _GROUP_BYTES
        groups = -(-layer // min(max(layer // _GROUPS_OF_A_LAYER, smallest), largest))
        return -(-self.shape.experts // min(groups, self.shape.experts))

    @property
    def groups(self) -> int:
        return -(-self.shape.experts // self.group_experts) if self.shape.experts else 0

    @property
    def group(self) -> int:
        """One whole group of one layer."""
        return self.expert * self.group_experts

    def groups_of_every_layer(self, count: int) -> int:
        """The first `count` groups of every layer."""
        return self.shape.moe_layers * min(count * self.group_experts, self.shape.experts) * self.expert

    def page(self, page_tokens: int) -> int:
        """Of one page: some tokens in the layers of one group."""
        groups = self.layer_groups
        layers = sum(len(group.layers) for group in groups)
        return self.kv_token * page_tokens * max(len(group.layers) for group in groups) // layers

    @cached_property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """That pages are of."""
        if self.free_windows and self.shape.windows:
            return layer_groups(self.shape.windows)
        return (LayerGroup(None, tuple(range(self.shape.layers))),)

    @property
    def state(self) -> int:
        """What recurrent layers carry of one sequence: four bytes an element, more than which no family keeps."""
        return 4 * self.shape.state_per_sequence

    @property
    def logit_tokens(self) -> int:
        """Tokens whose logits, with the copies that sampling makes, take a bounded piece of memory."""
        return max(_LOGIT_BYTES // (3 * 4 * self.shape.vocab_size), 16)

    def activations(self, pass_tokens: int, attention_tokens: int, expert_tokens: int) -> int:
        """At their peak, in float32 throughout: of a pass, with an attention batch, an expert chunk or logits."""
        shape = self.shape
        whole = pass_tokens * (6 * shape.hidden_size + 2 * shape.experts)
        attention = attention_tokens * (3 * shape.attention_width + 2 * shape.hidden_size)
        if self.latent:  # absorbed or expanded, some at a time
            attention += min(3 * attention_tokens * shape.absorbed_width, _LATENT_BYTES // 4)
        if self.shape.state_per_sequence:  # states at work, before and after
            attention += max(_STATE_BYTES, 3 * self.state // max(shape.layers, 1)) // 4
        experts = expert_tokens * (2 * shape.hidden_size + 3 * self.expert_width)
        logits = 3 * min(pass_tokens, self.logit_tokens) * shape.vocab_size
        return 4 * (whole + max(attention, experts, logits))

    @property
    def expert_width(self) -> int:
        """The inner width of one expert (of three matrices: gate, up and down)."""
        return self.expert_elements // (3 * self.shape.hidden_size)

    @property
    def tokenizer(self) -> int:
        return self.shape.vocab_size * _TOKENIZER_BYTES
