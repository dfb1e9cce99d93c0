"""What this machine is, for people who compare numbers. No names of hosts or users."""

import os
import platform
import sys
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import psutil

from mis_mlx import __version__


def cores() -> int:
    """Cores that this process may use: fewer than there are, where it is pinned."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def about() -> dict[str, Any]:
    """What a number was measured on."""
    mac = sys.platform == "darwin"
    return {
        "chip": str(mx.device_info().get("device_name", "unknown")),
        "computes_on": "GPU" if mx.default_device() == mx.gpu else "CPU",
        "cores": os.cpu_count(),
        "cores_used": cores(),
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "release": f"macOS {platform.mac_ver()[0]}" if mac else f"Linux {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "mis-mlx": __version__,
        **{name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
    }
