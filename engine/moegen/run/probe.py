"""Measures this machine, in under a minute: what the planner's cost model multiplies with."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moegen.errors import MoegenError
from moegen.ops.host_memory import keep_freed_memory
from moegen.ops.threads import use_threads
from moegen.plan.machine import Machine, Rates
from moegen.run import engine_rates, machine_rates
from moegen.run.timing import usual

log = logging.getLogger(__name__)

_STORED = torch.bfloat16  # what most checkpoints are
_EXPERT_SIZES = {torch.bfloat16: 3, torch.float32: 1}  # measured of each stored dtype
_READER_THREADS = (1, 2, 4)


def probe(device: str = "auto", model_uri: str | None = None) -> Machine:
    """This machine with its rates measured now; the disk's rate is that of `model_uri`'s files, if it names a folder.

    Raises:
        SpecError: the device does not exist.
        MoegenError: something could not be measured; says what, and why.
    """
    machine = Machine.detect(device)
    where = torch.device(machine.device)
    use_threads(machine.cores)
    keep_freed_memory()  # as jobs do: memory that comes anew from the system is slow at first touch
    compute = _compute_dtype(machine)
    rates = Rates()
    with _measuring("the fixed time of a pass, in a tiny model"):
        rates = replace(rates, **engine_rates.fixed_seconds(machine, _STORED, compute))
    rates = replace(rates, runtime_bytes=_resident_bytes())  # all is imported and compiled, nothing large is held yet
    rates = replace(_host_rates(rates, machine, model_uri), **_device_rates(machine, where, compute))
    return replace(machine, rates=_pass_rates(rates, machine, where, compute))


def _compute_dtype(machine: Machine) -> torch.dtype:
    """What the planner will choose for the usual checkpoint."""
    return torch.bfloat16 if machine.native_bf16 and not machine.dots_bf16 else torch.float32


def _host_rates(rates: Rates, machine: Machine, model_uri: str | None) -> Rates:
    with _measuring("reads of host memory"):
        rates = replace(rates, dram_read_bytes_per_s=machine_rates.dram_read_bytes_per_s())
    with _measuring(f"direct reads of {model_uri or 'a temporary file'}"):
        rates = replace(rates, disk_bytes_per_s=machine_rates.disk_bytes_per_s(model_uri, _READER_THREADS))
    with _measuring("the placing of expert weights"):
        rates = replace(rates, place_bytes_per_s=machine_rates.place_bytes_per_s(_STORED, machine.dots_bf16))
    with _measuring("decode attention on the host"):
        rates = replace(
            rates,
            decode_bytes_per_s=engine_rates.decode_bytes_per_s(_STORED, machine.dots_bf16 and machine.device == "cpu"),
        )
    with _measuring("decode attention over latents on the host"):
        return replace(rates, latent_flops_per_s=engine_rates.latent_flops_per_s(_STORED))


def _device_rates(machine: Machine, where: torch.device, compute: torch.dtype) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with _measuring(f"attention of prompts on {where}"):
        found["prefill_flops_per_s"] = engine_rates.prefill_flops_per_s(where, _STORED, compute, machine.dots_bf16)
    with _measuring(f"sampling on {where}"):
        found["logit_s"] = engine_rates.logit_seconds(where)
    if where.type != "cpu":
        with _measuring(f"the link to {where}"):
            found |= machine_rates.link_bytes_per_s(where)
        with _measuring(f"decode attention on {where}"):
            found["device_decode_bytes_per_s"] = engine_rates.device_decode_bytes_per_s(where)
        with _measuring(f"the gathering of KV pages for {where}"):
            found["gather_bytes_per_s"] = machine_rates.gather_bytes_per_s(where)
    return found


def _pass_rates(rates: Rates, machine: Machine, where: torch.device, compute: torch.dtype) -> Rates:
    """What most of a pass's time goes into, measured side by side."""
    products = {_name(_STORED): True, _name(compute): False} if machine.dots_bf16 else {_name(compute): False}
    with _measuring(f"dense layers, the expert stage and passes of a small model on {where}"):
        passes = engine_rates.SmallPasses(machine, _STORED, compute)
        linears = {
            name: engine_rates.linear_flops_per_s(where, _STORED, compute, rounded)
            for name, rounded in products.items()
        }
        experts = {
            _name(stored): engine_rates.expert_flops_per_s(where, stored, compute, machine.dots_bf16, sizes)
            for stored, sizes in _EXPERT_SIZES.items()
        }
        found = usual({"linear_flops_per_s": linears, "expert_flops_per_s": experts, "passes": passes.timings})
        measured = found.pop("passes")
        rates = replace(rates, **found)
        return replace(rates, **passes.rest(measured, rates))


@contextmanager
def _measuring(what: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    except MoegenError as error:
        raise type(error)(f"moegen probe: could not measure {what}: {error}") from error
    except (RuntimeError, OSError, MemoryError) as error:
        raise MoegenError(f"moegen probe: could not measure {what}: {type(error).__name__}: {error}") from error
    log.info("measured %s in %.1f s", what, time.monotonic() - started)


def _resident_bytes() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS")), None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
