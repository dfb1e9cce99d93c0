"""Download one wheel by pip, in a process of its own.

What pip brings is neither installed nor run; the wheel is known to the byte.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from mis_mlx.hardware import import_path
from mis_mlx.storage.files import file_sha256
from mis_mlx.types import MisError


def _run(command: Sequence[str]) -> tuple[int, list[str]]:
    """Run a command; (exit code, its lines of output, then those of its errors)."""
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    text = (done.stdout + done.stderr).decode(errors="replace")
    return done.returncode, text.strip().splitlines()


def download_wheel(name: str, version: str, size_bytes: int, sha256: str, *, into: Path) -> Path:
    """Download a wheel into the empty folder `into` and return its path.

    It comes from the package index that pip is set up for. MisError when pip cannot get it, or when
    its size or sha256 are not the expected ones: then the file is deleted.
    """
    command = import_path.python("-m", "pip", "download")
    command += ["--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary", ":all:", "--retries", "2"]
    command += ["--dest", str(into), f"{name}=={version}"]
    code, lines = _run(command)
    if code:
        last = f"exit code {code}"
        if lines:
            last = lines[-1].removeprefix("ERROR: ")[:200]
        why = f"pip could not download {name} {version} ({last})"
        raise MisError(f"{why}: check the network and pip's settings")
    wheel = next(into.glob("*.whl"))
    nbytes = wheel.stat().st_size
    digest = file_sha256(wheel)
    if nbytes != size_bytes or digest != sha256:
        wheel.unlink()
        facts = f"{nbytes} bytes with sha256 {digest}"
        why = f"{wheel.name} is {facts}, expected {size_bytes} and {sha256}"
        raise MisError(f"{why}: the download was altered, try another package index")
    return wheel
