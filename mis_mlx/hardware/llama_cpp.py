"""llama.cpp's own quantizer, llama-quantize or Python's llama-cpp-python, in a process of its own: it may abort."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from mis_mlx.types import MisError

PROGRAM = """
import ctypes, sys
import llama_cpp
how = llama_cpp.llama_model_quantize_default_params()
how.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(how)))"""


def quantizer() -> list[str]:
    """The command that takes `source target type`. MisError, with what to install, when there is none."""
    if program := shutil.which("llama-quantize"):
        return [program]
    if importlib.util.find_spec("llama_cpp"):
        return [sys.executable, "-c", PROGRAM]
    why = "K-quants are made by llama.cpp, which is not here"
    raise MisError(f"{why}: `brew install llama.cpp`, or `pip install llama-cpp-python`, or another --out-type")


def quantize(source: Path, target: Path, kind: str) -> None:
    """Make `target` of the unquantized GGUF `source`; `kind` as llama-quantize spells it, such as "Q4_K_M". MisError
    with llama.cpp's last words when it fails; what it left in `target` is the caller's to delete."""
    command = [*quantizer(), str(source), str(target), kind]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode or not target.is_file():
        lines = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines() or ["without a word"]
        last = [line for line in lines if "failed" in line or "rror" in line] or lines
        why = f"llama.cpp could not make {target.name} (exit code {done.returncode}: {last[-1][:200]})"
        raise MisError(f"{why}: look at the free space, or take another --out-type")
