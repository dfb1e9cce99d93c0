"""Become another command, with fast matrix products: `python blas.py COMMAND [ARGUMENTS]`.

Changes nothing off Linux. MLX's CPU build brings the reference BLAS, 20 to 50 times slower than
OpenBLAS, and takes one that is preloaded instead. The index has OpenBLAS in scipy-openblas32, with
kernels for every processor, but all its names begin with `scipy_`: `renamed` takes that off, in a
copy. Runs as a file, before mlx is imported; imports nothing of the package.
"""

import ctypes
import os
import struct
import sys
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

# "off": everything stays as it is. Otherwise set by us, so that this is done once
MARK = "MIS_MLX_BLAS"
THREADS = "OPENBLAS_NUM_THREADS"
CHOSEN = "chosen"  # MARK where the threads are ours and not the user's
# Seconds that are looked at, one after the other, while others keep a core busy: what the kernel
# still writes for the command before is over by then.
LOOKS_S = (0.2, 0.5, 0.5, 0.5, 0.5, 0.5)
PREFIX = b"scipy_"
# What `renamed` and the file system raise where the library is unknown or cannot be written.
OTHERWISE = (OSError, ValueError, LookupError, ArithmeticError, AttributeError, struct.error)
SLOW = (
    f"OpenBLAS is missing, so matrix products take 20 to 50 times as long: {sys.executable} -m pip "
    f"install --force-reinstall scipy-openblas32, and XDG_CACHE_HOME must be a writable folder "
    f"without a space in its name"
)
LATE = (
    "MLX was imported first, so matrix products take 20 to 50 times as long, and their last bits "
    "differ from a command's: take mis_mlx.distill, or what you call of it, before you import MLX"
)
# ELF: types of sections and of entries of the dynamic section, and the bytes of one symbol.
SHT_DYNSYM = 11
SHT_GNU_HASH = 0x6FFFFFF6
SHT_DYNAMIC = 6
DT_HASH = 4
DT_GNU_HASH = 0x6FFFFEF5
SYMBOL_BYTES = 24
Section = namedtuple("Section", "name type flags address start size link")


def renamed(library: bytes) -> bytes:
    """Return a 64-bit ELF library whose exported names have lost PREFIX.

    A name is an offset into a table of texts: it moves on by the prefix's length. The table that
    finds names by their hash must be made anew; the older, plainer kind (System V ABI, "Hash
    Table") fits where the GNU one was. Raises one of OTHERWISE where the library is built
    differently.
    """
    data = bytearray(library)
    table_start = struct.unpack_from("<Q", data, 40)[0]
    entry_bytes, count = struct.unpack_from("<HH", data, 58)
    sections = []
    for i in range(count):
        fields = struct.unpack_from("<IIQQQQI", data, table_start + entry_bytes * i)
        sections.append(Section(*fields))
    by_type = {section.type: section for section in sections}
    symbols = by_type[SHT_DYNSYM]
    hashes = by_type[SHT_GNU_HASH]
    dynamic = by_type[SHT_DYNAMIC]
    texts = sections[symbols.link]
    total = symbols.size // SYMBOL_BYTES
    # A System V table is two counts, the first symbol of every bucket, and for every symbol the
    # next one of its bucket. As many buckets as the room of the GNU table has left.
    buckets = [0] * (hashes.size // 4 - 2 - total)
    following = [0] * total
    for number in range(1, total):  # symbol 0 is the end of a chain
        entry = symbols.start + SYMBOL_BYTES * number
        text = struct.unpack_from("<I", data, entry)[0]
        if data.startswith(PREFIX, texts.start + text):
            text += len(PREFIX)
            struct.pack_into("<I", data, entry, text)
        start = texts.start + text
        name = data[start : data.index(0, start)]
        bucket = _hash(name) % len(buckets)
        following[number] = buckets[bucket]
        buckets[bucket] = number
    table = [len(buckets), total, *buckets, *following]
    struct.pack_into(f"<{len(table)}I", data, hashes.start, *table)
    # The dynamic section now names the table by its new kind, or the loader would read it wrongly.
    gnu_entry = data.index(struct.pack("<Q", DT_GNU_HASH), dynamic.start)
    struct.pack_into("<Q", data, gnu_entry, DT_HASH)
    return bytes(data)


def _hash(name: bytearray) -> int:
    """The hash of a symbol's name (System V ABI, "Hash Table")."""
    value = 0
    for letter in name:
        value = (value << 4) + letter
        value = (value ^ (value & 0xF0000000) >> 24) & 0x0FFFFFFF
    return value


def prepared() -> Path | None:
    """Return the renamed OpenBLAS, made where it is not there yet; None where that fails.

    It lies in the environment, else in the user's cache.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mis_mlx")
    folders = [cache]
    if sys.prefix != sys.base_prefix:  # a virtual environment, which is ours to write into
        folders.insert(0, Path(sys.prefix, "lib"))
    for folder in folders:
        with suppress(*OTHERWISE):
            source = _installed()
            library = source and _copied(source, folder)
            if library:
                return library
    return None


def _installed() -> Path | None:
    """The library of the package scipy-openblas32, if it is on the path of imports."""
    for folder in sys.path:
        path = Path(folder, "scipy_openblas32/lib/libscipy_openblas.so")
        if path.is_file():
            return path
    return None


def _copied(source: Path, folder: Path) -> Path | None:
    """The renamed copy of `source` in `folder`; None where its path could not be preloaded.

    LD_PRELOAD has no way to write a blank or a colon. The copy's name has the source's size and
    time, so that a newer package gets a copy of its own. OTHERWISE: it cannot be made.
    """
    facts = source.stat()
    library = folder / f"libopenblas-mis-{facts.st_size:x}-{facts.st_mtime_ns:x}.so"
    if set(" \t\n:") & set(str(library)):
        return None
    if library.is_file() and library.stat().st_size == facts.st_size:
        return library
    folder.mkdir(parents=True, exist_ok=True)
    # Whole or absent: another process may start at the same time.
    partial = library.with_suffix(f".{os.getpid()}")
    try:
        partial.write_bytes(renamed(source.read_bytes()))
        _ = ctypes.CDLL(str(partial)).cblas_sgemm  # it loads, and the name is there
        partial.replace(library)
    finally:
        partial.unlink(missing_ok=True)
    return library


def threads() -> tuple[str, str]:
    """(threads for OpenBLAS, the reason).

    The cores that this process may use, less those that others keep busy during all LOOKS_S (the
    last minute's load may be ours), shared with our own MLX ring on this machine. One thread too
    many is ten times slower than one too few.
    """
    cores = 1.0
    if sys.platform == "linux":
        cores = float(len(os.sched_getaffinity(0)))
    processes = 1
    load = 0.0
    with suppress(OSError, ValueError):  # no control group, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
        cores = max(1.0, min(cores, int(quota) / int(period)))
    with suppress(OSError):
        hosts = Path(os.environ.get("MLX_HOSTFILE", "")).read_text("utf-8")
        processes = max(1, hosts.count('"127.0.0.1'))
    whole = most(cores, 0.0, processes)
    with suppress(ImportError, OSError):
        import psutil  # not needed where the number of threads is given

        for seconds in LOOKS_S:
            load = psutil.cpu_percent(seconds) / 100 * cores
            if most(cores, load, processes) == whole:
                break
    found = most(cores, load, processes)
    reason = f"{cores:g} cores, {load:.1f} busy"
    if found < whole:
        reason += (
            f"; {THREADS}={whole} computes up to {whole / found:g} times as fast on idle cores"
        )
    return str(found), reason


def most(mine: float, load: float, processes: int) -> int:
    """Threads for each of `processes` that share `mine` cores, of which `load` are busy."""
    idle = max(mine - load, 1.0)
    return max(1, int(idle / processes + 0.5))


def settled() -> tuple[Path | None, list[str]]:
    """(the library to load, if one is needed and there, what to say).

    Sets the number of threads and MLX's width in the environment.
    """
    lines = list[str]()
    library = None
    if not hasattr(ctypes.CDLL(None), "cblas_sgemm"):  # else one is preloaded already
        library = prepared()
        if library is None:
            lines.append(SLOW)
    if THREADS not in os.environ:
        os.environ[THREADS], reason = threads()
        lines.append(f"{THREADS}={os.environ[THREADS]} ({reason})")
    # so that MLX takes from two streams in turn (streams.py)
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "100000")
    return library, lines


def _needed() -> bool:
    """Whether this is Linux and nothing has been settled yet."""
    return sys.platform == "linux" and MARK not in os.environ


def _say(lines: list[str]) -> None:
    """Write the lines to stderr at once, so that those of other processes do not come between."""
    if sys.stderr:  # None: closed from the first
        sys.stderr.write("".join(f"mis: {line}\n" for line in lines))


def load() -> None:
    """Load fast products into a process that imports this file, before MLX is imported."""
    if not _needed():
        return
    if "mlx.core" in sys.modules:  # MLX has linked its own BLAS by then
        if not hasattr(ctypes.CDLL(None), "cblas_sgemm"):
            _say([LATE])
        return
    library, lines = settled()
    if library:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    _say(lines)


def for_children() -> tuple[Path | None, list[str]]:
    """`settled`, for all that this process starts or becomes: it begins with the library."""
    os.environ[MARK] = "on" if THREADS in os.environ else CHOSEN
    library, lines = settled()
    if library:
        preloaded = f"{library}:{os.environ.get('LD_PRELOAD', '')}"
        os.environ["LD_PRELOAD"] = preloaded.rstrip(":")
    return library, lines


def load_for_children() -> None:
    """`load`, and the same for all that this process starts: as if it had begun under this file."""
    if not _needed() or "mlx.core" in sys.modules:
        return
    library, lines = for_children()
    if library:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    _say(lines)


def main() -> None:
    """Become the command of our arguments. What is preloaded or set already stays."""
    try:
        if _needed():
            _, lines = for_children()
            # Of several machines or processes one speaks.
            if os.environ.get("MLX_RANK", "0") in ("", "0"):
                with suppress(BrokenPipeError):
                    _say(lines)
    except KeyboardInterrupt:
        sys.stderr.write("mis_mlx: stopped by hand before it began: start it again\n")
        os._exit(130)
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
