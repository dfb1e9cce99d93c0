"""Become another command, with fast matrix products: `python blas.py COMMAND [ARGUMENTS]`. Changes
nothing off Linux.

MLX's CPU build brings the reference BLAS, 20 to 50 times slower than OpenBLAS, and takes one that
is preloaded instead. The index has OpenBLAS in scipy-openblas32, with kernels for every processor,
but all its names begin with `scipy_`: `renamed` takes that off, in a copy. Runs as a file, before
mlx is imported; imports nothing of the package.
"""

import ctypes
import os
import struct
import sys
from contextlib import suppress
from pathlib import Path

# "off": everything stays as it is. Otherwise set by us, so that this is done once
MARK = "MIS_MLX_BLAS"
THREADS = "OPENBLAS_NUM_THREADS"
PREFIX = b"scipy_"
OTHERWISE = (OSError, ValueError, LookupError, ArithmeticError, AttributeError, struct.error)
SLOW = (
    f"no OpenBLAS, so matrix products take 20 to 50 times as long: {sys.executable} -m pip install "
    f"--force-reinstall "
    "scipy-openblas32, and XDG_CACHE_HOME must be a folder that can be written, without a blank in "
    "its name"
)


def renamed(library: bytes) -> bytes:
    """A 64-bit ELF library whose exported names have lost PREFIX. One of OTHERWISE where it is
    built otherwise. A name is an offset into a table of texts: it moves on by the prefix's length.
    The table that finds names by their hash must be made anew; the older, plainer kind (System V
    ABI, "Hash Table") fits where the GNU one was.
    """
    data = bytearray(library)
    start = struct.unpack_from("<Q", data, 40)[0]
    (size, count) = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQI", data, start + size * i) for i in range(count)]
    kinds = {section[1]: section for section in sections}
    # SHT_DYNSYM, SHT_GNU_HASH, SHT_DYNAMIC
    symbols, table, dynamic = (kinds[kind] for kind in (11, 0x6FFFFFF6, 6))
    texts = sections[symbols[6]][4]
    total = symbols[5] // 24
    heads = [0] * (table[5] // 4 - 2 - total)
    nexts = [0] * total
    for number in range(1, total):
        entry = symbols[4] + 24 * number
        text = struct.unpack_from("<I", data, entry)[0]
        if data.startswith(PREFIX, texts + text):
            struct.pack_into("<I", data, entry, text := text + len(PREFIX))
        value = 0
        for letter in data[texts + text : data.index(0, texts + text)]:
            value = (value << 4) + letter
            value = (value ^ (value & 0xF0000000) >> 24) & 0x0FFFFFFF
        bucket = value % len(heads)
        nexts[number], heads[bucket] = heads[bucket], number
    struct.pack_into(
        f"<{2 + len(heads) + total}I", data, table[4], len(heads), total, *heads, *nexts
    )
    # DT_GNU_HASH, DT_HASH
    struct.pack_into("<Q", data, data.index(struct.pack("<Q", 0x6FFFFEF5), dynamic[4]), 4)
    return bytes(data)


def prepared() -> Path | None:
    """The renamed OpenBLAS, made if it is not there yet, in the environment, else in the user's
    cache; None: neither. LD_PRELOAD has no way to write a blank or a colon, so no path with one
    will do.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mis_mlx")
    for place in [Path(sys.prefix, "lib"), cache] if sys.prefix != sys.base_prefix else [cache]:
        with suppress(*OTHERWISE, StopIteration):
            known = (
                Path(folder, "scipy_openblas32/lib/libscipy_openblas.so") for folder in sys.path
            )
            source = next(path for path in known if path.is_file())
            size = source.stat().st_size
            at = source.stat().st_mtime_ns
            library = place / f"libopenblas-mis-{size:x}-{at:x}.so"
            if set(" \t\n:") & set(str(library)):
                continue
            if not (library.is_file() and library.stat().st_size == size):
                place.mkdir(parents=True, exist_ok=True)
                half = library.with_suffix(f".{os.getpid()}")
                try:
                    half.write_bytes(renamed(source.read_bytes()))
                    _ = ctypes.CDLL(str(half)).cblas_sgemm  # it loads, and the name is there
                    half.replace(library)
                finally:
                    half.unlink(missing_ok=True)
            return library
    return None


def threads() -> tuple[str, str]:
    """Threads for OpenBLAS and the reason: the cores we may use, less those that others keep busy
    now (the last minute's load may be ours), shared with our own MLX ring here. One too many is ten
    times slower than one too few.
    """
    mine = float(len(os.sched_getaffinity(0)))
    ring = 1
    load = 0.0
    with suppress(OSError, ValueError):  # no control group, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
        mine = max(1.0, min(mine, int(quota) / int(period)))
    with suppress(OSError):
        ring = max(
            1, Path(os.environ.get("MLX_HOSTFILE", "")).read_text("utf-8").count('"127.0.0.1')
        )
    with suppress(ImportError, OSError):
        import psutil  # not needed where the number of threads is given

        load = psutil.cpu_percent(0.2) / 100 * mine
    return str(most(mine, load, ring)), f"{mine:g} cores, {load:.1f} busy"


def most(mine: float, load: float, processes: int) -> int:
    """Threads for each of `processes` that share `mine` cores, of which `load` are taken."""
    return max(1, int(max(mine - load, 1.0) / processes + 0.5))


def settled() -> tuple[Path | None, list[str]]:
    """The library to load, if one is needed and there, and what to say; threads and MLX's width are
    set.
    """
    lines = list[str]()
    library = None
    if not hasattr(ctypes.CDLL(None), "cblas_sgemm") and not (library := prepared()):
        lines.append(SLOW)
    if THREADS not in os.environ:
        os.environ[THREADS], reason = threads()
        lines.append(f"{THREADS}={os.environ[THREADS]} ({reason})")
    # so that MLX takes from two lanes in turn (lanes.py)
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "100000")
    return library, lines


def load() -> None:
    """Fast products in this process, for a program that imports us, where MLX is not imported
    yet.
    """
    if sys.platform == "linux" and MARK not in os.environ and "mlx.core" not in sys.modules:
        library, lines = settled()
        if library:
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        sys.stderr.write("".join(f"mis: {line}\n" for line in lines))


def main() -> None:
    """Become the command of our arguments. What is preloaded or set already stays."""
    try:
        if sys.platform == "linux" and MARK not in os.environ:
            os.environ[MARK] = "on"
            library, lines = settled()
            if library:
                os.environ["LD_PRELOAD"] = f"{library}:{os.environ.get('LD_PRELOAD', '')}".rstrip(
                    ":"
                )
            speaks = os.environ.get("MLX_RANK", "0") in ("", "0")
            with suppress(BrokenPipeError):
                sys.stderr.write("".join(f"mis: {line}\n" for line in lines if speaks))
    except KeyboardInterrupt:
        sys.stderr.write("mis_mlx: stopped by hand before anything was begun: start it again\n")
        os._exit(130)
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
