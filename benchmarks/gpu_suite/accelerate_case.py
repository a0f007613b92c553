"""accelerate's CPU offload, through transformers' `generate`: layers that do not fit the device come at every forward.

choice: `geometry`, `device_memory`, `prompt`, `answer`, `batch`. One batch of equal rows, timed over its prompts and a
few decode steps; from these follows the whole batch's time, as if later steps, over longer contexts, took no longer.
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import torch
from moegen.memory.device_limit import limit_allocations
from moegen.units import GIB, parse_bytes
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from benchmarks.gpu_suite.random_checkpoint import geometry
from benchmarks.gpu_suite.setting import Desk

_DECODE_STEPS = 3
_RANDOM = 1 << 24  # elements that are drawn, and repeated


def host_model(config: Any) -> PreTrainedModel:
    """In host memory, of random weights."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    block = (torch.randn(_RANDOM) * 0.02).bfloat16()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1)
            continue
        for part in parameter.view(-1).split(_RANDOM):
            part.copy_(block[: len(part)])
    return model


def offloaded(model: PreTrainedModel, device: torch.device, weight_bytes: int) -> PreTrainedModel:
    """With as many layers on the device as `weight_bytes` allow; on a CPU all of them come at every forward."""
    from accelerate import cpu_offload, dispatch_model, infer_auto_device_map

    if device.type == "cpu":
        return cpu_offload(model, execution_device=device)
    index = device.index or 0
    places = infer_auto_device_map(
        model, max_memory={index: weight_bytes, "cpu": 1 << 50}, no_split_module_classes=list(model._no_split_modules)
    )
    return dispatch_model(model, device_map=places, main_device=index)


def seconds(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, device: torch.device) -> float:
    config = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    started = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    desk = Desk()
    setting, choice = desk.setting, desk.setting.choice
    if importlib.util.find_spec("accelerate") is None:
        desk.note(not_run="accelerate is not installed")
        return
    device, batch = torch.device(setting.device), choice["batch"]
    config = geometry(choice["geometry"], setting.tiny)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_bytes = 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    kv_bytes *= batch * (choice["prompt"] + choice["answer"])
    started = time.monotonic()
    cap = parse_bytes(choice["device_memory"], "device_memory") if choice["device_memory"] else 0
    if cap:
        limit_allocations(device, cap)
    activations = 3 * GIB + batch * choice["prompt"] * 8 * config.hidden_size * 4
    model = offloaded(host_model(config), device, max(cap - kv_bytes - activations, 0))
    desk.note(open_seconds=time.monotonic() - started)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, config.vocab_size, (batch, choice["prompt"]), generator=generator).to(device)
    with torch.inference_mode():
        prompts_s = seconds(model, ids, 1, device)
        desk.note(prompts_seconds=prompts_s)
        step_s = max(seconds(model, ids, 1 + _DECODE_STEPS, device) - prompts_s, 0) / _DECODE_STEPS
    whole_s = prompts_s + (choice["answer"] - 1) * step_s
    desk.note(step_seconds=step_s, batch=batch, tokens_per_s=batch * choice["answer"] / whole_s)


if __name__ == "__main__":
    main()
