"""Rates of a common machine, for choosing between plans where nothing was measured. No prediction is made from them."""

from __future__ import annotations

from moegen.plan.machine import Machine, Rates

_CORE_FLOPS, _DEVICE_FLOPS = 40e9, 100e12


def nominal_rates(machine: Machine) -> Rates:
    """By the number of cores; a GPU is taken for a mid-range one on PCIe 4."""
    on_cpu = machine.device == "cpu"
    peak = machine.cores * _CORE_FLOPS if on_cpu else _DEVICE_FLOPS
    gemm = {1 << 20: {rows: peak * min(rows / (16 if on_cpu else 512), 1.0) for rows in (1, 4, 16, 128, 512)}}
    return Rates(
        linear_flops_per_s={"float32": gemm},
        expert_flops_per_s={"float32": gemm},
        decode_bytes_per_s={4: {1 << 15: machine.cores * 5e9}},
        prefill_flops_per_s={64: peak / 2},
        disk_bytes_per_s={1: 1e9},
        place_bytes_per_s=2e9,
        dram_read_bytes_per_s=max(machine.cores * 4e9, 10e9),
        h2d_bytes_per_s=None if on_cpu else 20e9,
        d2h_bytes_per_s=None if on_cpu else 20e9,
        device_decode_bytes_per_s=None if on_cpu else 400e9,
        pass_s=2e-3,
        layer_s=2e-4,
        sequence_s=1e-5,
        element_s=None,
        logit_s=None,
    )
