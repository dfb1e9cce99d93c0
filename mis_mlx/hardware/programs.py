"""Run other people's programs: pip for one wheel, llama.cpp's quantizer.

Each runs in a process of its own, as llama.cpp may abort. What pip brings is neither installed nor
run; the wheel is known to the byte.
"""

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mis_mlx.hardware import import_path
from mis_mlx.storage.files import file_sha256
from mis_mlx.types import MisError

QUANTIZE = """
import ctypes, sys
import llama_cpp
source, target, kind = sys.argv[1:4]
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind)
pointer = ctypes.byref(parameters)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), pointer))"""


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


def quantizer() -> list[str]:
    """The command that takes `source target type`.

    MisError, with the programs to install, when there is none.
    """
    program = shutil.which("llama-quantize")
    if program:
        return [program]
    if importlib.util.find_spec("llama_cpp"):
        return import_path.python("-c", QUANTIZE)
    raise MisError(
        "llama.cpp is not installed: `brew install llama.cpp`, or `pip install llama-cpp-python`, "
        "or use another --out-type"
    )


def quantize(source: Path, target: Path, kind: str) -> None:
    """Quantize the unquantized GGUF `source` into `target`.

    kind: as llama-quantize spells it, such as "Q4_K_M". MisError with llama.cpp's last error when
    it fails; the caller deletes what it left in `target`.
    """
    code, lines = _run([*quantizer(), str(source), str(target), kind])
    if code or not target.is_file():
        errors = [line for line in lines if "failed" in line or "rror" in line]
        last = ["no message", *lines, *errors][-1][:200]
        why = f"llama.cpp could not make {target.name} (exit code {code}: {last})"
        raise MisError(f"{why}: check the free space, or use another --out-type")
