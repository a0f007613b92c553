"""The machine: what it has, and what it was measured to do.

Sizes are read at every start (a container's limit is the machine's size); rates come from `moegen probe`, kept on disk
under a key of the hardware. A rate that was not measured is None.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moegen.errors import SpecError


@dataclass(frozen=True)
class Rates:
    """What the probe measured. GEMM rates are `{dtype: {rows: FLOP/s}}`, for weights of an expert's size."""

    gemm_flops_per_s: dict[str, dict[int, float]] = field(default_factory=dict)
    dram_read_bytes_per_s: float | None = None
    h2d_bytes_per_s: float | None = None
    d2h_bytes_per_s: float | None = None

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> Rates:
        gemm = {d: {int(rows): f for rows, f in table.items()} for d, table in mapping["gemm_flops_per_s"].items()}
        return cls(**{**mapping, "gemm_flops_per_s": gemm})


@dataclass(frozen=True)
class Machine:
    """One host and the device that computes (the host's own cores when `device` is "cpu")."""

    device: str
    device_name: str
    cores: int
    host_memory_bytes: int  # free for us now, within any cgroup limit
    device_memory_bytes: int  # free on the device; 0 for "cpu"
    native_bf16: bool  # whether the device multiplies bfloat16 in hardware
    rates: Rates = field(default_factory=Rates)

    @classmethod
    def detect(cls, device: str = "auto") -> Machine:
        """Sizes as they are now, rates as they were last measured on this hardware.

        Raises:
            SpecError: the device does not exist here.
        """
        found = _cpu() if device == "cpu" else _cuda(device) or (_cpu() if device == "auto" else None)
        if found is None:
            raise SpecError(f"engine.device: no device {device!r} on this machine; use auto or cpu")
        try:
            return replace(found, rates=Rates.from_mapping(json.loads(found._path.read_text())))
        except (OSError, ValueError, KeyError, TypeError):
            return found  # never measured, or by another version

    def save(self) -> Path:
        """Keeps the rates for later runs on this hardware."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(asdict(self.rates)))
        return self._path

    @property
    def _path(self) -> Path:
        key = hashlib.sha256(f"{self.device_name} {self.cores} {platform.machine()}".encode()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "moegen" / f"machine-{key}.json"


def _cpu() -> Machine:
    info = _cpu_info()
    return Machine(
        device="cpu",
        device_name=info.get("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        host_memory_bytes=host_memory_bytes(),
        device_memory_bytes=0,
        native_bf16=not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint((info.get("flags") or "").split()),
    )


def _cuda(device: str) -> Machine | None:
    """By nvidia-smi, so that planning needs no torch; None when there is no such device."""
    command = shutil.which("nvidia-smi")
    if command is None or not device.startswith(("auto", "cuda")):
        return None
    query = [command, "--query-gpu=name,memory.free,compute_cap", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        name, free_mib, capability = lines[int(device.partition(":")[2] or 0)].rsplit(", ", 2)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return replace(
        _cpu(),
        device="cuda" if device == "auto" else device,
        device_name=name,
        device_memory_bytes=int(free_mib) << 20,
        native_bf16=float(capability) >= 8,
    )


def _cpu_info() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo (`Features` on Arm is what `flags` is on x86)."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    names = {"Features": "flags"}
    return {names.get(key.strip(), key.strip()): value.strip() for key, _, value in pairs}


def host_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that can still be taken: the kernel's estimate, or what a cgroup (v1 or v2) leaves, if that is less."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *_cgroup_room(root)])


def _cgroup_room(root: Path) -> Iterable[int]:
    for folder, limit, used in (
        ("sys/fs/cgroup", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most = (root / folder / limit).read_text().strip()
            taken = int((root / folder / used).read_text())
        except (OSError, ValueError):
            continue
        if most != "max":
            yield max(int(most) - taken, 0)
