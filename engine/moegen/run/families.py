"""Which model families the installed transformers has, and how each runs: found out by certifying its default config.

A family is every causal language model of the installed transformers whose modeling code has the experts seam. A
checkpoint's own config is certified again when it is loaded: it may be refused where its family's default is not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moegen.errors import SpecError, UnsupportedModel
from moegen.run.certify import certified

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


@dataclass(frozen=True)
class Verdict:
    """How one family runs: `way` is staged, seams or refused, and then `reason` says why."""

    family: str
    model_class: str
    way: str
    reason: str = ""
    keeps_latents: bool = False
    keeps_state: bool = False  # recurrent layers: each running sequence has a state slot


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
    """With what `LACKING` says."""
    return CONFIG_MAPPING[family](**LACKING.get(family, {}))


@cache
def judge(family: str) -> Verdict:
    """What the engine does with this family's default config."""
    model_class = families()[family]
    try:
        found = certified(default_config(family))
        return Verdict(family, model_class, found.way, "", found.keeps_latents, found.keeps_state)
    except UnsupportedModel as error:
        return Verdict(family, model_class, "refused", str(error))


def verdicts(family: str | None = None) -> Iterator[Verdict]:
    """Of every family, or of the one named, each as it is found out: a few seconds of one core for each.

    Raises:
        SpecError: the installed transformers has no such family.
    """
    known = families()
    if family is not None and family not in known:
        raise SpecError(
            f"moegen models: {family!r} is none of the {len(known)} families of transformers "
            f"{transformers.__version__} whose experts moegen can enter; choose from {', '.join(sorted(known))}"
        )
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)  # the models are tiny
    transformers.logging.set_verbosity_error()
    try:
        yield from map(judge, sorted(known) if family is None else [family])
    finally:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity(verbosity)


def table(found: Iterable[Verdict]) -> str:
    """For people: a line for each family, those that run first, and their number."""
    rows = sorted(found, key=lambda v: (v.way == "refused", v.family))
    width = max(len(row.family) for row in rows)
    lines = [f"{row.family:{width}}  {row.way:7}  {row.reason or _kept(row)}".rstrip() for row in rows]
    equal = sum(row.way != "refused" for row in rows)
    return "\n".join(
        [*lines, f"{equal} run, {len(rows) - equal} are refused (transformers {transformers.__version__})"]
    )


def _kept(row: Verdict) -> str:
    kept = {"latents in its pages": row.keeps_latents, "a state slot per sequence": row.keeps_state}
    return ", ".join(name for name, there in kept.items() if there)
