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
from moegen.plan.curve import Curve, Surface


@dataclass(frozen=True)
class Rates:
    """What the probe measured: rates as curves over a size, seconds, bytes.

    Curves and surfaces are of the engine's own operations, over weights that do not fit a cache. Rows per expert are a
    mean: tokens were routed at random.
    """

    linear_flops_per_s: dict[str, Surface] = field(default_factory=dict)
    # dense linear layers, kept as the engine keeps them: {compute dtype: {elements of the weight: {rows: FLOP/s}}}
    expert_flops_per_s: dict[str, Surface] = field(default_factory=dict)
    # the whole expert stage: {expert dtype: {elements of an expert: {rows per expert: FLOP/s}}}
    decode_bytes_per_s: Surface = field(default_factory=dict)
    # decode attention: {query heads per KV head: {KV bytes of a sequence and KV head: bytes/s}}
    latent_flops_per_s: float | None = None  # decode attention over latents on the host, all heads of a DeepSeek-V3
    prefill_flops_per_s: Curve = field(default_factory=dict)  # {tokens of a prompt's chunk: FLOP/s}
    disk_bytes_per_s: Curve = field(default_factory=dict)  # {reader threads: bytes/s}
    place_bytes_per_s: float | None = None  # what one core packs of weights that were read
    dram_read_bytes_per_s: float | None = None
    h2d_bytes_per_s: float | None = None
    d2h_bytes_per_s: float | None = None
    dram_beside_h2d_bytes_per_s: float | None = None  # DRAM reads while the link is busy
    h2d_beside_dram_bytes_per_s: float | None = None  # the link while DRAM is read
    gather_bytes_per_s: float | None = None  # KV pages from all over the host to the device
    device_decode_bytes_per_s: float | None = None  # decode attention over pages in a GPU's own memory
    pass_s: float | None = None  # of a pass, whatever is in it
    layer_s: float | None = None  # of a layer, whatever is in it
    group_s: float | None = None  # of a group of a layer's experts beyond the first, whatever is in it
    sequence_s: float | None = None  # of every sequence in a pass
    element_s: float | None = None  # of every hidden element of a token in a layer, outside what is above
    logit_s: float | None = None  # of every logit that is sampled from
    runtime_bytes: int | None = None  # interpreter and libraries, resident once the engine has run

    @property
    def measured(self) -> bool:
        """Whether there is enough to predict from."""
        return bool(self.expert_flops_per_s and self.decode_bytes_per_s) and self.layer_s is not None

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> Rates:
        """From JSON, whose keys are text. Raises TypeError on an unknown field, ValueError on a key that is no size."""
        return cls(**{name: _sizes(value) for name, value in mapping.items()})


def _sizes(value: Any) -> Any:
    """Keys that are numbers, as numbers."""
    if not isinstance(value, dict):
        return value
    return {int(key) if key.isdigit() else key: _sizes(item) for key, item in value.items()}


@dataclass(frozen=True)
class Machine:
    """One host and the device that computes (the host's own cores when `device` is "cpu")."""

    device: str
    device_name: str
    cores: int
    host_memory_bytes: int  # free for us now, within any cgroup limit, and what the runtime has of it already
    device_memory_bytes: int  # free on the device; 0 for "cpu"
    native_bf16: bool  # whether the device multiplies bfloat16 in hardware
    dots_bf16: bool = False  # and our own kernel does so on it; a CPU's matrix units (AMX) are left to torch
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
            rates = Rates.from_mapping(json.loads(found._path.read_text()))
        except (OSError, ValueError, TypeError, AttributeError):
            return found  # never measured, or by another version
        ours = min(own_memory_bytes(), rates.runtime_bytes or 0)  # plans count the runtime, which is there already
        return replace(found, rates=rates, host_memory_bytes=found.host_memory_bytes + ours)

    @classmethod
    def read(cls, path: Path) -> Machine:
        """A machine that was described, as `moegen probe --json` prints one; nothing is asked of this one.

        Raises:
            SpecError: no such file, or not a description.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**values, "rates": Rates.from_mapping(values.get("rates") or {})})
        except OSError as error:
            raise SpecError(f"--machine: {str(path)!r} cannot be read: {error.strerror}; name a JSON file") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise SpecError(
                f"--machine: {str(path)!r} does not describe a machine: {error}; moegen probe --json prints one"
            ) from error

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
    flags = set((info.get("flags") or "").split())
    return Machine(
        device="cpu",
        device_name=info.get("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        host_memory_bytes=host_memory_bytes(),
        device_memory_bytes=0,
        native_bf16=not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags),
        dots_bf16="avx512_bf16" in flags and "amx_bf16" not in flags,
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
        dots_bf16=False,
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


def own_memory_bytes(root: Path = Path("/")) -> int:
    """What this process has taken and no file backs; 0 where nothing says."""
    try:
        lines = (root / "proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), 0)


def _cgroup_room(root: Path) -> Iterable[int]:
    """What each limit on this process leaves: of its own group and of those above it, cgroup v1 or v2."""
    for mount, own, limit, used in _cgroups(root):
        for folder in (mount / own, *(mount / own).parents):
            if not folder.is_relative_to(mount):
                break
            try:
                most = int((folder / limit).read_text())
                taken = int((folder / used).read_text())
            except (OSError, ValueError):  # no such group in this mount, or "max": no limit
                continue
            yield max(most - taken + _reclaimable(folder), 0)


def _cgroups(root: Path) -> Iterable[tuple[Path, str, str, str]]:
    """(mount, this process's path in it, file of the limit, file of the use) of version 2 and of version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    paths = {controllers: path.lstrip("/") for _, controllers, path in (line.split(":", 2) for line in lines)}
    mount = root / "sys/fs/cgroup"
    yield mount, paths.get("", ""), "memory.max", "memory.current"
    yield mount / "memory", paths.get("memory", ""), "memory.limit_in_bytes", "memory.usage_in_bytes"


def _reclaimable(folder: Path) -> int:
    """Page cache that counts as used but that the kernel gives up first."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
