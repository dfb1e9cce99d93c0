"""What a report of this machine says beside its numbers: model, GPU, memory pressure, power,
variables, numpy's BLAS.

A line that cannot be had says why. On a Mac nobody has run this yet.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np
import psutil

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
PATIENCE_S = 10.0


def asked(command: Sequence[str]) -> str:
    """What a program says, in one line; or in parentheses why it says nothing."""
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"(refused: {type(error).__name__})"
    said = " ".join(done.stdout.decode(errors="replace").split())
    if done.returncode or not said:
        why = " ".join(done.stderr.decode(errors="replace").split())[:120]
        return f"(refused: exit code {done.returncode}{f', {why}' if why else ''})"
    return said


def _found(pattern: str, command: Sequence[str]) -> str:
    """What the pattern's group has in what a program says; or what it said instead."""
    said = asked(command)
    match = re.search(pattern, said)
    return match[1] if match else said if said.startswith("(refused") else "(refused: no such line)"


def compressed() -> str:
    """Memory that macOS's compressor holds."""
    said = asked(["vm_stat"])
    page = re.search(r"page size of (\d+) bytes", said)
    pages = re.search(r"occupied by compressor: (\d+)", said)
    if not page or not pages:
        return said if said.startswith("(refused") else "(refused: no such line)"
    return gib(int(page[1]) * int(pages[1]))


def lines(mac: bool | None = None) -> Iterator[str]:
    """`name: value` of all there is to say. mac: whether this is one; default: as it is."""
    mac = sys.platform == "darwin" if mac is None else mac
    if mac:
        for name in SYSCTL:
            yield f"{name}: {asked(['sysctl', '-n', name])}"
        cores = _found(GPU_CORES, ["ioreg", "-r", "-d", "1", "-c", "AGXAccelerator"])
        yield f"GPU cores: {cores}"
        yield f"held by the compressor: {compressed()}"
        yield f"power: {asked(['pmset', '-g', 'batt'])}"
        low = _found(LOW_POWER, ["pmset", "-g"])
        yield f"low power mode: {low}"
    else:
        swap = psutil.swap_memory()
        yield f"swap: {gib(swap.used)} of {gib(swap.total)}"
    about = mx.device_info()
    yield "MLX's device: " + ", ".join(f"{name} {about[name]}" for name in sorted(about))
    variables = sorted(name for name in os.environ if name.startswith(OURS))
    yield "variables: " + (", ".join(f"{name}={os.environ[name]}" for name in variables) or "none")
    yield f"numpy's BLAS: {numpy_blas()}"


def numpy_blas() -> str:
    """The library that numpy multiplies with, as it was built."""
    show: Callable[..., object] = np.show_config
    config = show(mode="dicts")
    if not isinstance(config, dict):
        return "(refused: numpy does not say)"
    blas = config.get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


def sensors(raw: Raw) -> Iterator[str]:
    """Every raw value of one look at the thermometers, by its own name; and what refused, with its
    words.
    """
    for provider, rows in (("HID", raw.hid), ("psutil", raw.linux)):
        if rows:
            yield f"{provider}: " + ", ".join(f"{name} {value:.1f}" for name, value in rows)
    if raw.smc:
        yield "SMC: " + ", ".join(f"{key} {value}" for key, value in raw.smc.items())
    for provider, why in raw.missing.items():
        yield f"{provider} refuses: {why}"
