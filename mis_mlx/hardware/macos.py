"""Ask macOS, and keep it from ending a long computation or falling asleep. No Mac has run this yet.

`mis_mlx` imports this before anything else, so it imports nothing of the package, and MLX only
inside functions.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

WATCHDOG = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
NO_COMPILE = "MLX_DISABLE_COMPILE"  # read by MLX when it first compiles a function
DEVICE = "MIS_MLX_DEVICE"
PATIENCE_S = 10.0  # with a program of macOS that is asked something
SMALL_BYTES = 8 * 2**30  # on a Mac with no more memory MLX sends small command buffers
# The size of a command buffer, read by MLX when it opens the device. Metal holds the
# temporaries of all buffers that are in flight. MLX counts elements, not bytes (mlx issue 3192): a
# buffer goes when it has more than so many times 2**20 of them, 16 MiB of float32 for 3. The limit
# on operations saves no memory, and a smaller one costs time.
MEGABYTES = "MLX_MAX_MB_PER_BUFFER"
SMALL_MEGABYTES = "3"
USUAL_MEGABYTES = "40"
OURS = "MIS_MLX_SMALL_BUFFERS"  # set where MEGABYTES is not the user's, for what we start
# Commands that only read a model: their arrays are small, and every buffer costs them time.
READERS = ("bench", "generate")


def settle() -> None:
    """Set on macOS what MLX and Metal read from the environment; the user's own settings stay.

    Metal reads WATCHDOG when the device is opened: without it macOS ends long computations on a GPU
    that also draws the screen (mlx issue 3267).
    """
    if sys.platform != "darwin":
        return
    os.environ.setdefault(WATCHDOG, "1")
    if reads_only(sys.orig_argv):
        if os.environ.pop(OURS, None):
            os.environ.pop(MEGABYTES, None)
    elif total_bytes() <= SMALL_BYTES and MEGABYTES not in os.environ:
        os.environ[MEGABYTES] = SMALL_MEGABYTES
        os.environ[OURS] = "1"
    if os.environ.get(DEVICE) == "cpu" and not compiler_installed():
        os.environ.setdefault(NO_COMPILE, "1")


def reads_only(words: Sequence[str]) -> bool:
    """Whether this process was started for one of READERS. words: its whole command line."""
    for word in words[1:]:
        if word.startswith("-") and word != "-m":
            return False
        name = os.path.basename(word).removeprefix("mis_mlx.")
        if name in READERS:
            return True
    return False


def total_bytes() -> int:
    """This machine's memory in bytes.

    Without psutil, which takes longer to import than the rest of the package.
    """
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def asked(command: Sequence[str]) -> str:
    """Run a program and return its output in one line; or in parentheses why there is none."""
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"(refused: {type(error).__name__})"
    output = _one_line(done.stdout)
    if output and not done.returncode:
        return output
    why = f"exit code {done.returncode}"
    errors = _one_line(done.stderr)[:120]
    if errors:
        why += f", {errors}"
    return f"(refused: {why})"


def _one_line(output: bytes) -> str:
    """A program's output with every run of white space made one blank."""
    return " ".join(output.decode(errors="replace").split())


def compiler_installed() -> bool:
    """Whether a C++ compiler may be called.

    On macOS without the command line tools, `g++` opens an installer window instead of running;
    `xcode-select -p` says whether they are there, and opens none.
    """
    if sys.platform != "darwin":
        return True
    try:
        answer = subprocess.run(
            ["xcode-select", "-p"], capture_output=True, stdin=subprocess.DEVNULL, check=False
        )
    except OSError:
        return False
    return answer.returncode == 0


@contextmanager
def no_installer() -> Iterator[None]:
    """Keep MLX on the CPU from calling a compiler that is not installed.

    Its functions run uncompiled within.
    """
    import mlx.core as mx

    if NO_COMPILE in os.environ or compiler_installed():
        yield
        return
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


@contextmanager
def awake() -> Iterator[None]:
    """Keep a Mac from falling asleep because nobody types.

    Its display may, and a closed lid still puts the Mac to sleep.
    `caffeinate -w` ends with this process, even where that is killed. A session of its own: Ctrl-C
    asks for one more step, and the machine has to stay awake for that.
    """
    if sys.platform != "darwin":
        yield
        return
    child = None
    with suppress(OSError):
        child = subprocess.Popen(
            ["caffeinate", "-i", "-w", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield
    finally:
        if child:
            child.terminate()
            child.wait()
