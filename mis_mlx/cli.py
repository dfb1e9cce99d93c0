"""A dataclass becomes flags and YAML; progress goes to stderr, the result to stdout, JSON on its
last line.
"""

import difflib
import itertools
import json
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from mis_mlx import __version__, flag_help
from mis_mlx.types import GIB, MisError, Within

T = TypeVar("T")
ConfigFile = Annotated[str | None, tyro.conf.arg(aliases=["-c"], metavar="FILE")]
BLAS = Path(__file__).parent / "hardware" / "blas.py"  # a program of its own
BLAS_THREADS = "OPENBLAS_NUM_THREADS"
ACCEPT = "--accept-gemma-terms"
DETAILS = "MIS_MLX_DETAILS"
# of every command
SWITCHES = {ACCEPT: {"MIS_MLX_ACCEPT": "gemma"}, "-v": {DETAILS: "1"}, "--verbose": {DETAILS: "1"}}
# set by mlx.launch and mpirun, of several processes together
RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
# how errors of MLX begin that are the device's
DEVICE = re.compile(r"\[METAL\]|\[metal::|\[malloc|kIOGPU")
MEMORY_GONE = re.compile(r"\[malloc|\[metal::malloc\]|Insufficient Memory|OutOfMemory")
# the display of what this process does (reporting/progress.Display), if there is one
SHOWN = list[Any]()
MOST_BYTES = 2**50
UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": GIB,
}


def parse_bytes(text: str, flag: str = "--budget") -> int:
    """'5GiB', '600MiB', '4e9' -> bytes. GiB are powers of two, GB powers of ten; never mixed."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in UNITS:
        raise MisError(
            f"{flag} {text!r} is not a size: write a number and a unit, such as 5GiB or 600MiB"
        )
    if not 1 <= (nbytes := float(match[1]) * UNITS[match[2].lower()]) <= MOST_BYTES:
        raise MisError(f"{flag} is {text!r}: give a size from 1 byte to {MOST_BYTES // GIB}GiB")
    return int(nbytes)


@dataclass(frozen=True, kw_only=True)
class Budgeted:
    """Flags of every command that computes within a budget."""

    budget: str | None = None
    """memory this may take, such as 5GiB or 600MiB; default: 5GiB or 75 % of what is there"""
    config: ConfigFile = None
    """YAML file with any of these flags"""

    @property
    def budget_bytes(self) -> int | None:
        """What --budget asks for."""
        return None if self.budget is None else parse_bytes(self.budget)


@dataclass(frozen=True, kw_only=True)
class Resumable(Budgeted):
    """Flags of every command with a run folder."""

    out: str | None = None
    """run folder; default: the next free NAME-00N under runs/"""
    resume: bool = False
    """continue the run in --out, or the newest unfinished one"""
    dry_run: bool = False
    """say what it takes and stop"""


def read_yaml(path: str, config_type: type) -> dict[str, Any]:
    """The YAML file's values, by field name of `config_type`. Dashes and underscores are the
    same.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise MisError(
            f"{path}: cannot be read ({error.strerror}): give an existing file to -c"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MisError(
            f"{path}: is not YAML ({' '.join(str(error).split())[:120]}): mend that line"
        ) from None
    if not isinstance(values, dict):
        raise MisError(
            f"{path}: holds a {type(values).__name__}, not `flag: value` lines: write one a line"
        )
    known = {f.name: f for f in fields(config_type)}
    hints = get_type_hints(config_type)
    result = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise MisError(f"{path}: {key!r} is not a setting of this command: {hint}")
        # YAML 1.1 reads 1e-5 (no dot) as text; every tool in this field expects a number.
        if isinstance(value, str) and float in (hints[name], *get_args(hints[name])):
            with suppress(ValueError):
                value = float(value)
        if type(value) is int and not _fits(value, hints[name]) and _fits(str(value), hints[name]):
            value = str(value)  # `vocab: 16384`
        if not _fits(value, hints[name]):
            takes = flag_help.metavar(hints[name]) or "true or false"
            raise MisError(f"{path}: {key} is {value!r}, the setting takes {takes}: mend that line")
        result[name] = tuple(value) if isinstance(value, list) else value
    return result


def _fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value is one that a field of this type admits."""
    kind = get_origin(hint)
    inner = get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, i) for i in inner)
    if kind is Literal:
        return any(type(value) is type(i) and value == i for i in inner)
    if kind is tuple:
        return isinstance(value, list) and all(_fits(v, inner[0]) for v in value)
    return type(value) in ((int, float) if hint is float else (hint,))


def parse(config_type: Any, argv: Sequence[str] | None = None, prog: str | None = None) -> Any:
    """Settings from flags over YAML (`-c FILE`) over the dataclass's defaults. Usage errors exit
    with 2.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    default: Any = tyro.MISSING_NONPROP
    if is_dataclass(config_type) and isinstance(config_type, type):
        args = [
            part
            for a in args
            for part in (a.split("=", 1) if a.startswith(("--config=", "-c=")) else [a])
        ]
        if help_flags := {"-h", "--help", "--help-all"} & set(args):
            print(flag_help.text(config_type, prog or "mis_mlx", "--help-all" in help_flags))
            sys.exit(0)
        for flag in {a.partition("=")[0] for a in args if a.startswith("--")}:
            if (name := flag.lstrip("-").replace("-", "_")) in flag_help.quiet(config_type):
                raise MisError(
                    f"{flag} is no flag: write `{name}: ...` in a YAML file, give it to -c"
                )
        file = next((b for a, b in itertools.pairwise(args) if a in ("-c", "--config")), None)
        given = read_yaml(file, config_type) if file else {}
        if {
            f.name for f in fields(config_type) if f.default is f.default_factory is MISSING
        } <= set(given):
            default = config_type(**given)
    options = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    settings = tyro.cli(config_type, args=args, prog=prog, config=options, default=default)
    check_ranges(settings)
    return settings


def check_ranges(settings: Any) -> None:
    """MisError where a number lies outside of what its field's annotation says (`types.Within`), or
    a text is empty.
    """
    file_only = flag_help.quiet(type(settings))
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        shown = name if name in file_only else f"--{name.replace('_', '-')}"
        if "" in (value if isinstance(value, tuple) else (value,)) and value != getattr(
            type(settings), name, None
        ):
            raise MisError(f"{shown} is empty: give a word, or leave it out")
        for limits in _ranges(hint):
            if isinstance(value, int | float) and not limits.holds(value):
                raise MisError(f"{shown} is {value:g}: {limits.remedy(value)}")


def _ranges(hint: Any) -> Iterator[Within]:
    if isinstance(hint, Within):
        yield hint
    for part in (
        () if get_origin(hint) is Literal else (*getattr(hint, "__metadata__", ()), *get_args(hint))
    ):
        yield from _ranges(part)


def rank() -> int | None:
    """Which of several processes that work together this one is, from 0; None where it works
    alone.
    """
    hosts = os.environ.get("MLX_HOSTFILE")  # of the ring; `mlx.launch -n 1` leaves it empty
    with suppress(OSError, ValueError):
        if hosts and len(json.loads(Path(hosts).read_text(encoding="utf-8").strip() or "[]")) < 2:
            return None
    return next(
        (int(os.environ[name]) for name in RANKS if os.environ.get(name, "").isdigit()), None
    )


def prepare() -> None:
    """This process computes on the device of MIS_MLX_DEVICE, if that is set."""
    if device := os.environ.get("MIS_MLX_DEVICE"):
        import mlx.core as mx

        try:
            mx.set_default_device({"cpu": mx.cpu, "gpu": mx.gpu}[device])
        except (KeyError, ValueError):
            raise MisError(
                f"MIS_MLX_DEVICE is {device!r}, which is not here: set it to cpu, gpu or nothing"
            ) from None


def device_trouble(error: RuntimeError, config_type: Any = None) -> str:
    """What MLX's error about the GPU or memory means, the way out with flags of `config_type`; else
    empty.
    """
    text = " ".join(str(error).split())
    if not DEVICE.search(text):
        return ""
    flags = [f.name for f in fields(config_type)] if is_dataclass(config_type) else []
    what = "macOS ended a computation on the GPU"
    remedy = "let the display sleep, leave AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1, which mis_mlx sets,"
    if MEMORY_GONE.search(text):
        what = "no memory is left"
        remedy = "close other programs"
    smaller = " and ".join(
        f"--{name.replace('_', '-')}" for name in ("max_seq_length", "batch_size") if name in flags
    )
    less = f"lower {smaller}" if smaller else "use a smaller model"
    again = "; --resume goes on from the last checkpoint" if "resume" in flags else ""
    return f"{what} ({text[:160]}): {remedy} or {less}{again}"


def preload() -> None:
    """On Linux, start a command that computes again, once, under hardware/blas.py: MLX's own
    products are slow.
    """
    done = "MIS_MLX_BLAS" in os.environ or (
        "blas" in os.environ.get("LD_PRELOAD", "") and BLAS_THREADS in os.environ
    )
    ours = (
        Path(getattr(sys.modules["__main__"], "__file__", None) or "").parent
        == Path(__file__).parent
    )
    if sys.platform == "linux" and "mlx.core" in sys.modules and ours and not done:
        os.execv(
            sys.executable, [sys.executable, "-I", str(BLAS), sys.executable, *sys.orig_argv[1:]]
        )


@contextmanager
def reader() -> Iterator[None]:
    """Where the reader of our output leaves (`| head`), end as if by SIGPIPE: without a traceback,
    exit code 141.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        for stream in (1, 2):
            poll.register(stream, 0)
        if not (gone := poll.poll(0)):
            raise  # it was another pipe
        for stream, _ in gone:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        sys.exit(141)


@reader()
def main(config_type: Any, run: Callable[[Any], dict[str, Any]], several: bool = False) -> None:
    """Parse, run, print the result as the last stdout line. Exits: 0 done, 1 MisError, 2 usage, 3
    check, 130 Ctrl-C. several: whether this command can be one process of several; of these only
    the first one speaks.
    """
    prog = "python -m " + (
        sys.modules["__main__"].__spec__.name if sys.modules["__main__"].__spec__ else "mis_mlx"
    )
    if "--version" in sys.argv[1:]:
        print(f"mis_mlx {__version__}")
        sys.exit(0)
    for word in SWITCHES.keys() & set(sys.argv[1:]):
        sys.argv.remove(word)
        os.environ.update(SWITCHES[word])  # for child processes too
    try:
        settings = parse(config_type, prog=prog)
        preload()
        prepare()
        if rank() is not None and not several:
            raise MisError(f"{prog} is for one machine alone: start it without mlx.launch")
        result = run(settings)
    except (MisError, RuntimeError) as error:
        said = str(error) if isinstance(error, MisError) else device_trouble(error, config_type)
        if not said:
            raise
        sys.stdout.flush()
        print(f"mis_mlx: {f'machine {rank()}: ' if rank() else ''}{said}", file=sys.stderr)
        sys.exit(130 if isinstance(error.__cause__, KeyboardInterrupt) else 1)
    except KeyboardInterrupt as stop:
        how = (
            f"what was finished is kept: go on with --out {stop} --resume"
            if stop.args
            else "start it again"
        )
        say(f"mis_mlx: stopped by hand; {how}")
        sys.exit(130)
    if not rank():
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    sys.exit(3 if result.get("check_failed") else 0)


def say(*lines: str) -> None:
    """Lines of progress for people, on stderr."""
    for line in () if rank() else lines:
        print(line, file=sys.stderr, flush=True)


def counted(label: str, items: Iterable[T], total: int) -> Iterator[T]:
    """The items, one after the other; how many are done is on display, where there is one
    (reporting/progress).
    """
    with SHOWN[0].level(label, total) if SHOWN else nullcontext(lambda done: None) as show:
        for done, item in enumerate(items):
            show(done)
            yield item


@contextmanager
def stop_asked() -> Iterator[list[int]]:
    """A list that a first Ctrl-C or SIGTERM fills; a second one stops at once."""
    asked: list[int] = []

    def ask(number: int, _frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say("Stopping after this step; once more stops at once.")

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
