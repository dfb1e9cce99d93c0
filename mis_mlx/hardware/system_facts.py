"""Facts for a report of this machine: model, GPU, memory, power, variables, numpy's BLAS.

A line that cannot be had says why. On a Mac nobody has run this yet.
"""

import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil

from mis_mlx.hardware import free_memory
from mis_mlx.hardware.macos import asked
from mis_mlx.hardware.thermal.recording import Raw
from mis_mlx.types import gib

SYSCTL = (
    "hw.model",
    "kern.osversion",
    "kern.hv_vmm_present",
    "kern.memorystatus_level",
    "iogpu.wired_limit_mb",
    "vm.swapusage",
)
OURS = ("MIS_", "MLX_", "AGX_", "METAL_", "OPENBLAS_", "VECLIB_")
GPU_CORES = r'"gpu-core-count" *= *(\d+)'
LOW_POWER = r"lowpowermode (\d)"


def commit() -> str:
    """This program's commit, of its checkout ("-dirty" where that was changed) or as pip fetched
    it; empty where neither says.
    """
    checkout = Path(__file__).parents[2]
    if (checkout / ".git").exists():  # else a Mac without git would offer to install it
        words = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return asked(["git", "-C", str(checkout), *words])
    known = importlib.metadata.distribution("mis-mlx").read_text("direct_url.json")
    return str(json.loads(known or "{}").get("vcs_info", {}).get("commit_id", ""))[:12]


def _unmatched(output: str) -> str:
    """What to say of an output without the line looked for: its own refusal, or ours."""
    if output.startswith("(refused"):
        return output
    return "(refused: no such line)"


def _found(pattern: str, command: Sequence[str]) -> str:
    """What the pattern's group matches in a program's output; or why it matches nothing."""
    output = asked(command)
    match = re.search(pattern, output)
    if match:
        return match[1]
    return _unmatched(output)


def compressed() -> str:
    """Memory that macOS's compressor holds."""
    output = asked(["vm_stat"])
    nbytes = free_memory.counted_bytes(output, free_memory.COMPRESSOR)
    if nbytes is None:
        return _unmatched(output)
    return gib(nbytes)


def lines(mac: bool | None = None) -> Iterator[str]:
    """Yield `name: value` for every fact. mac: whether this is a Mac; default: as it is."""
    if mac is None:
        mac = sys.platform == "darwin"
    if mac:
        yield from _of_a_mac()
    else:
        swap = psutil.swap_memory()
        yield f"swap: {gib(swap.used)} of {gib(swap.total)}"
    about = mx.device_info()
    yield "MLX's device: " + ", ".join(f"{name} {about[name]}" for name in sorted(about))
    names = sorted(name for name in os.environ if name.startswith(OURS))
    variables = ", ".join(f"{name}={os.environ[name]}" for name in names)
    yield f"variables: {variables or 'none'}"
    yield f"numpy's BLAS: {numpy_blas()}"


def _of_a_mac() -> Iterator[str]:
    """The facts that only macOS's own programs tell."""
    for name in SYSCTL:
        yield f"{name}: {asked(['sysctl', '-n', name])}"
    cores = _found(GPU_CORES, ["ioreg", "-r", "-d", "1", "-c", "AGXAccelerator"])
    yield f"GPU cores: {cores}"
    yield f"held by the compressor: {compressed()}"
    yield f"power: {asked(['pmset', '-g', 'batt'])}"
    low = _found(LOW_POWER, ["pmset", "-g"])
    yield f"low power mode: {low}"


def numpy_blas() -> str:
    """The BLAS that numpy was built with."""
    show: Callable[..., object] = np.show_config
    config = show(mode="dicts")
    if not isinstance(config, dict):
        return "(refused: numpy does not say)"
    blas = config.get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


def sensors(raw: Raw) -> Iterator[str]:
    """Yield every raw value of one look at the thermometers, and why a provider refused.

    Values have the provider's own names.
    """
    for provider, rows in (("HID", raw.hid), ("psutil", raw.linux)):
        if rows:
            values = ", ".join(f"{name} {value:.1f}" for name, value in rows)
            yield f"{provider}: {values}"
    if raw.smc:
        yield "SMC: " + ", ".join(f"{key} {value}" for key, value in raw.smc.items())
    for provider, why in raw.missing.items():
        yield f"{provider} refuses: {why}"
