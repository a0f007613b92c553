"""Which families the engine runs, and how: found out by certifying each on its default config.

A family is every causal language model of the installed transformers whose modeling code has the experts seam. The
table that this prints is `docs/families.md`; a test holds the file to it.

    python -m benchmarks.families
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from moegen.errors import UnsupportedModel
from moegen.run.certify import certify
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "families.md"
COMMAND = "python -m benchmarks.families"
# What every real checkpoint's config.json says and the family's default config leaves out.
LACKING: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_routed_experts": 8},
    "dots1": {"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "hunyuan_v1_moe": {"head_dim": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048,
                       "indexer_compress_ratio": 4},
}  # fmt: skip
LACKING["gemma4"] = {"text_config": LACKING["gemma4_text"]}
LACKING["qwen4_exp"] = {"text_config": LACKING["qwen4_exp_text"]}

_HEAD = f"""# Model families

Every causal language model family of transformers {transformers.__version__} whose code has the experts seam, tried on
its default config: a tiny random float32 model of it goes through the engine's passes (ragged sequences, chunked
prefill mixed with decode, small pages, preemption) and through transformers' own forward. The same comparison is made
with a checkpoint's own config whenever one is loaded: a config may be refused where its family's default is not.

- **staged**: equal, in two stages: attention and experts have batch sizes of their own.
- **seams**: equal, with whole layers: attention and experts are still batched inside them.
- **refused**: not shown equal, so not run; the message is the one that a user reads.

Written by `{COMMAND}`; do not edit.
"""


@dataclass(frozen=True)
class Verdict:
    """How one family runs: `way` is staged, seams or refused, and then `reason` says why."""

    family: str
    model_class: str
    way: str
    reason: str = ""
    keeps_latents: bool = False


def families() -> dict[str, str]:
    """Model type -> class name, of every causal language model with the experts seam."""
    return {
        family: name
        for family, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if family in CONFIG_MAPPING and _has_experts_seam(family)
    }


def _has_experts_seam(family: str) -> bool:
    """Read, not imported: importing the code of every family takes most of a minute."""
    configuration = Path(str(sys.modules[CONFIG_MAPPING[family].__module__].__file__))
    modeling = configuration.with_name(configuration.name.replace("configuration_", "modeling_"))
    return modeling.exists() and "@use_experts_implementation" in modeling.read_text()


def default_config(family: str) -> PreTrainedConfig:
    return CONFIG_MAPPING[family](**LACKING.get(family, {}))


@cache
def judge(family: str) -> Verdict:
    """What the engine does with this family's default config."""
    model_class, config = families()[family], default_config(family)
    try:
        way = certify(config)
        latent = getattr(config.get_text_config(), "kv_lora_rank", None)  # kept, or certify would have refused
        return Verdict(family, model_class, way, keeps_latents=bool(latent))
    except UnsupportedModel as error:
        return Verdict(family, model_class, "refused", str(error))


def document(verdicts: Iterable[Verdict]) -> str:
    """`docs/families.md`."""
    rows = sorted(verdicts, key=lambda v: (v.way == "refused", v.family))
    equal = sum(v.way != "refused" for v in rows)
    lines = [f"| `{v.family}` | {v.model_class} | {v.way} | {v.reason.replace('|', '/')} |" for v in rows]
    title = ["| model type | class | way | why refused |", "| --- | --- | --- | --- |"]
    count = f"{equal} families run, {len(rows) - equal} are refused.\n"
    names = ", ".join(f"`{v.family}`" for v in rows if v.keeps_latents)
    latents = (
        f"Their attention is latent, and pages keep the latents instead of every head's keys and values: {names}.\n"
    )
    return "\n".join([_HEAD, count, latents, *title, *lines, ""])


def main() -> None:
    torch.set_num_threads(1)  # the models are tiny
    transformers.logging.set_verbosity_error()
    text = document(map(judge, families()))
    DOCUMENT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
